// no include guard: once for each set of instructions, with
//   SHIFTKV_ISA     a namespace
//   SHIFTKV_TARGET  attributes of each function. A function has to be compiled for them itself: what is inlined comes with its own
//   SHIFTKV_WIDTH   numbers in a vector
//   SHIFTKV_KEYS    keys whose products with two vectors of queries fit the registers
//   SHIFTKV_PAIRS   whether pairs of 16-bit integers are multiplied

namespace SHIFTKV_ISA {

static constexpr int W  = SHIFTKV_WIDTH;
static constexpr int KB = SHIFTKV_KEYS;

typedef float   vf __attribute__((vector_size(W*sizeof(float))));
typedef int32_t vi __attribute__((vector_size(W*sizeof(float))));

SHIFTKV_TARGET static inline vf load(const float * p) {
    vf v;
    memcpy(&v, p, sizeof(v));
    return v;
}

SHIFTKV_TARGET static inline void store(float * p, vf v) {
    memcpy(p, &v, sizeof(v));
}

SHIFTKV_TARGET static inline float sum(vf v) {
#if SHIFTKV_WIDTH == 16
    return _mm512_reduce_add_ps((__m512) v);
#elif SHIFTKV_WIDTH == 8
    __m128 a = _mm_add_ps(_mm256_castps256_ps128((__m256) v), _mm256_extractf128_ps((__m256) v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
#else
    return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}

// exp(x) of x <= 0 or a little more, to 2 ulp of numbers and of x; 0 where it is below the normal numbers
SHIFTKV_TARGET static inline vf exp(vf x) {
#if SHIFTKV_WIDTH == 16
    const vf y = x*1.44269504088896341f;
    const vf n = (vf) _mm512_roundscale_ps((__m512) y, 0);
    const vf t = y - n;

    vf p = t*1.3276471519e-03f + 9.6755413307e-03f;
    p = p*t + 5.5507132750e-02f;
    p = p*t + 2.4022119724e-01f;
    p = p*t + 6.9314696706e-01f;
    p = p*t + 1.0000000717e+00f;

    const __mmask16 some = _mm512_cmp_ps_mask((__m512) x, _mm512_set1_ps(-87.0f), _CMP_NLE_UQ); // so of NaN
    return (vf) _mm512_maskz_scalef_ps(some, (__m512) p, (__m512) n);
#else
    // Cephes' expf
    const vf shifted = x*1.44269504088896341f + 12582912.0f; // rounds to integers, in the lowest bits
    const vf n       = shifted - 12582912.0f;

    vf t = x - n*0.693359375f;
    t = t + n*2.12194440e-4f;

    vf p = t*1.9875691500e-4f + 1.3981999507e-3f;
    p = p*t + 8.3334519073e-3f;
    p = p*t + 4.1665795894e-2f;
    p = p*t + 1.6666665459e-1f;
    p = p*t + 5.0000001201e-1f;
    p = p*(t*t) + t + 1.0f;

    const vf scale = (vf) (((vi) shifted - 0x4b400000 + 127) << 23);
    const vi none  = x <= -87.0f; // not so of NaN
    return (vf) ((vi) (p*scale) & ~none);
#endif
}

// adds the sum of each of W vectors to out
SHIFTKV_TARGET static inline void add_sums(const vf * v, float * out) {
#if SHIFTKV_WIDTH == 16
    // halves of all, until one number of each is left
    __m512 a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 8; ++i) {
        const __m512 x = (__m512) v[i];
        const __m512 y = (__m512) v[i + 8];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2; ++i) {
        a[i] = _mm512_add_ps(_mm512_shuffle_ps(a[i], a[i + 2], 0x44), _mm512_shuffle_ps(a[i], a[i + 2], 0xee));
    }
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(a[0], a[1], 0x88), _mm512_shuffle_ps(a[0], a[1], 0xdd));

    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    store(out, load(out) + (vf) _mm512_permutexvar_ps(order, all));
#else
    for (int i = 0; i < W; ++i) {
        out[i] += sum(v[i]);
    }
#endif
}

// a row of keys as F32
SHIFTKV_TARGET static inline void convert(const void * row, ggml_type type, ggml_to_float_t to_float, int64_t d, float * out) {
#if SHIFTKV_WIDTH >= 8
    if (type == GGML_TYPE_F16 && d % W == 0) {
        const auto * p = (const uint16_t *) row;
        for (int64_t i = 0; i < d; i += W) {
#if SHIFTKV_WIDTH == 16
            _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (p + i))));
#else
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p + i))));
#endif
        }
        return;
    }
#endif
    if (type == GGML_TYPE_BF16) {
        const auto * p = (const uint16_t *) row;
        for (int64_t i = 0; i < d; ++i) {
            const uint32_t bits = (uint32_t) p[i] << 16;
            memcpy(out + i, &bits, sizeof(bits));
        }
    } else if (to_float) {
        to_float(row, out, d);
    } else {
        memcpy(out, row, d*sizeof(float));
    }
}

// products of KB keys, rows of DS numbers, and QV vectors of queries of n, which are stored by dimension
template <int QV, int DS>
SHIFTKV_TARGET static inline void products(const float * keys, const float * queries, int64_t n, int64_t d, float * out) {
    vf acc[KB][QV] = {};

    for (int64_t e = 0; e < d; ++e) {
        vf q[QV];
#pragma GCC unroll 2
        for (int j = 0; j < QV; ++j) {
            q[j] = load(queries + e*n + j*W);
        }
#pragma GCC unroll 16
        for (int i = 0; i < KB; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < QV; ++j) {
                acc[i][j] += q[j]*keys[i*DS + e];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < KB; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < QV; ++j) {
            store(out + i*n + j*W, acc[i][j]);
        }
    }
}

#if SHIFTKV_PAIRS

// x: d numbers, with zeros up to a multiple of 16. their pairs of integers, each step words after the one before; gives the number that
// these are to be multiplied with
SHIFTKV_TARGET static inline float pack(const float * x, int64_t d, int32_t * out, int64_t step) {
    vf squares = {};
    for (int64_t i = 0; i < d; i += W) {
        squares += load(x + i)*load(x + i);
    }
    const float length = std::sqrt(sum(squares));
    const vf    scale  = vf{} + (length > 0.0f ? 32767.0f/length : 0.0f);

    for (int64_t i = 0; i < d; i += W) {
        int32_t pairs[W/2];
        _mm256_storeu_si256((__m256i *) pairs, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512) (load(x + i)*scale))));
        for (int64_t j = 0; j < W/2; ++j) {
            out[(i/2 + j)*step] = pairs[j];
        }
    }
    return length/32767.0f; // may be NaN
}

// KB keys, the last ones of which there need not be: pairs, then what to multiply with. row: of zeros, which has room for a key
SHIFTKV_TARGET static void pack_keys(const char * keys, size_t nb_key, int64_t n, ggml_type type, ggml_to_float_t to_float, int64_t d, float * row, int32_t * out) {
    float scales[KB] = {};
    for (int64_t i = 0; i < KB; ++i) {
        if (i < n) {
            convert(keys + i*nb_key, type, to_float, d, row);
            scales[i] = pack(row, d, out + i, KB);
        } else {
            for (int64_t e = 0; e < n_pair(d); ++e) {
                out[e*KB + i] = 0;
            }
        }
    }
    memcpy(out + n_pair(d)*KB, scales, sizeof(scales));
}

// adds products of pairs. GCC 12 copies the sums around the builtin
SHIFTKV_TARGET static inline void add_products(__m512i & sums, __m512i a, __m512i b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}

// products of KB keys, as pack_keys() leaves them, and QV vectors of queries of n, which are stored by pairs of dimensions
template <int QV>
SHIFTKV_TARGET static inline void pair_products(const int32_t * keys, const float * queries, const float * scales, int64_t n, int64_t d, float * out) {
    __m512i acc[KB][QV] = {};

    for (int64_t e = 0; e < n_pair(d); ++e) {
        __m512i q[QV];
#pragma GCC unroll 2
        for (int j = 0; j < QV; ++j) {
            q[j] = _mm512_loadu_si512(queries + e*n + j*W);
        }
#pragma GCC unroll 16
        for (int i = 0; i < KB; ++i) {
            const __m512i k = _mm512_set1_epi32(keys[e*KB + i]);
#pragma GCC unroll 2
            for (int j = 0; j < QV; ++j) {
                add_products(acc[i][j], q[j], k);
            }
        }
    }
    float of_keys[KB];
    memcpy(of_keys, keys + n_pair(d)*KB, sizeof(of_keys));
#pragma GCC unroll 16
    for (int i = 0; i < KB; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < QV; ++j) {
            store(out + i*n + j*W, (vf) _mm512_cvtepi32_ps(acc[i][j])*(load(scales + j*W)*of_keys[i]));
        }
    }
}

#endif

template <int NV>
SHIFTKV_TARGET static inline vf weights(const float * p, const vf * all) {
    vf x = load(p)*all[0];
    for (int j = 1; j < NV; ++j) {
        x += load(p + j*W)*all[j];
    }
    return x;
}

// adds the attention weights of L queries, those that used is not 0 for, to out[n_kv]; s.last says what each sees.
// DS: numbers in a row of the tile; 0 where the keys are pairs
template <int L, int DS>
SHIFTKV_TARGET static void strip(const strip_data & s, float * out) {
    constexpr int NV = L/W;                  // vectors
    constexpr int QV = NV < 2 ? NV : 2;

    vf last[NV];
    vf max [NV];
    vf all [NV];
    for (int j = 0; j < NV; ++j) {
        last[j] = load(s.last + j*W);
        max [j] = vf{} - INFINITY;
        all [j] = vf{};
    }

    for (int64_t i0 = 0; i0 < s.n_kv; i0 += STRIP_KEYS) {
        const int64_t n = std::min<int64_t>(STRIP_KEYS, s.n_kv - i0);

        float * logits = s.logits + i0*L;

        // rows that the keys do not fill hold what was there before, and their products are not looked at
#if SHIFTKV_PAIRS
        if (DS == 0) {
            for (int j = 0; j < NV; j += QV) {
                for (int64_t i = 0; i < n; i += KB) {
                    pair_products<QV>((const int32_t *) (s.keys + (i0 + i)/KB*s.nb_key), s.queries + j*W, s.scales + j*W, L, s.d, logits + i*L + j*W);
                }
            }
        } else
#endif
        {
            for (int64_t i = 0; i < n; ++i) {
                convert(s.keys + (i0 + i)*s.nb_key, s.type, s.to_float, s.d, s.tile + i*DS);
            }
            for (int j = 0; j < NV; j += QV) {
                for (int64_t i = 0; i < n; i += KB) {
                    products<QV, DS>(s.tile + i*DS, s.queries + j*W, L, s.d, logits + i*L + j*W);
                }
            }
        }

        for (int64_t i = 0; i < n; ++i) {
            const float order = s.order[i0 + i];
            for (int j = 0; j < NV; ++j) {
                vf x = load(logits + i*L + j*W);
                if (s.soft_cap != 0.0f) {
                    // tanh(y) of y = |x|/soft_cap
                    const vi sign = (vi) x & (int32_t) 0x80000000;
                    const vf u    = exp((vf) ((vi) x ^ sign)*(-2.0f/s.soft_cap));
                    x = (vf) ((vi) (s.soft_cap*(1.0f - u)/(1.0f + u)) | sign);
                }
                if (order >= s.last_min) {
                    const vi seen = last[j] > order;
                    x = (vf) (((vi) x & seen) | ((vi) (vf{} - FLT_MAX) & ~seen));
                }
                if (s.soft_cap != 0.0f || order >= s.last_min) {
                    store(logits + i*L + j*W, x);
                }
                max[j] = x > max[j] ? x : max[j];
            }
        }
    }

    for (int64_t i = 0; i < s.n_kv; ++i) {
        for (int j = 0; j < NV; ++j) {
            const vf x = exp(load(s.logits + i*L + j*W) - max[j]);
            store(s.logits + i*L + j*W, x);
            all[j] += x;
        }
    }
    for (int j = 0; j < NV; ++j) {
        all[j] = load(s.used + j*W)/all[j];
    }
    int64_t i = 0;
    for (; i + W <= s.n_kv; i += W) {
        vf x[W];
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) {
            x[k] = weights<NV>(s.logits + (i + k)*L, all);
        }
        add_sums(x, out + i);
    }
    for (; i < s.n_kv; ++i) {
        out[i] += sum(weights<NV>(s.logits + i*L, all));
    }
}

static const strip_functions functions = {
    /*.n_key =*/ KB,
#if SHIFTKV_PAIRS
    /*.pack_keys =*/ pack_keys,
    /*.pack      =*/ pack,
    /*.strips    =*/ { { strip<16, 0>, strip<16, 272>, strip<16, 528> }, { strip<32, 0>, strip<32, 272>, strip<32, 528> } },
#else
    /*.pack_keys =*/ nullptr,
    /*.pack      =*/ nullptr,
    /*.strips    =*/ { { nullptr, strip<16, 272>, strip<16, 528> }, { nullptr, strip<32, 272>, strip<32, 528> } },
#endif
};

}

#undef SHIFTKV_ISA
#undef SHIFTKV_TARGET
#undef SHIFTKV_WIDTH
#undef SHIFTKV_KEYS
#undef SHIFTKV_PAIRS
