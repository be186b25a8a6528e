// no include guard: once for each set of instructions, with
//   SHIFTKV_ISA     a namespace
//   SHIFTKV_TARGET  attributes of each function. A function has to be compiled for them itself: what is inlined comes with its own
//   SHIFTKV_WIDTH   numbers in a vector
//   SHIFTKV_KEYS    keys whose products with two vectors of queries fit the registers

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

// exp(x) of x <= 0 or a little more, to 2 ulp; 0 where it is below the normal numbers. Cephes' expf
SHIFTKV_TARGET static inline vf exp(vf x) {
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

// adds the attention weights of L queries, those that inv is not 0 for, to out[n_kv]; s.last says what each sees
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

        for (int64_t i = 0; i < n; ++i) {
            convert(s.keys + (i0 + i)*s.nb_key, s.type, s.to_float, s.d, s.tile + i*DS);
        }
        float * logits = s.logits + i0*L;

        // rows that the keys do not fill hold what was there before, and their products are not looked at
        for (int j = 0; j < NV; j += QV) {
            for (int64_t i = 0; i < n; i += KB) {
                products<QV, DS>(s.tile + i*DS, s.queries + j*W, L, s.d, logits + i*L + j*W);
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
                store(logits + i*L + j*W, x);
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
    for (int64_t i = 0; i < s.n_kv; ++i) {
        vf x = load(s.logits + i*L)*all[0];
        for (int j = 1; j < NV; ++j) {
            x += load(s.logits + i*L + j*W)*all[j];
        }
        out[i] += sum(x);
    }
}

static const strip_functions functions = { strip<16, 272>, strip<32, 272>, strip<16, 528>, strip<32, 528> };

}

#undef SHIFTKV_ISA
#undef SHIFTKV_TARGET
#undef SHIFTKV_WIDTH
#undef SHIFTKV_KEYS
