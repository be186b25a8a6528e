#pragma once

// What the kernels are made of, for each kind of CPU. A vector holds a 32-bit lane for each of V::ROWS rows of the weights;
// as bytes, four consecutive weights of the row. All kinds give the same bits: sums of integers are exact, and every float
// operation is a product with a power of two or an exact one, or a fused multiply-add.

#include "ggml-impl.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#    include <immintrin.h>
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#    define COLUMNS_INLINE __forceinline
#else
#    define COLUMNS_INLINE inline __attribute__((always_inline))
#endif

namespace ggml::cpu::columns {

// Plain C++, the reference that the others are tested against.
struct portable {
    static constexpr int  ROWS    = 16;
    static constexpr int  COLUMNS = 1;
    static constexpr bool WIDE    = true;

    struct I {
        uint32_t lane[ROWS];
    };

    struct F {
        float lane[ROWS];
    };

    template <typename T, typename Function> static T each(Function && function) {
        T result;
        for (int i = 0; i < ROWS; i++) {
            result.lane[i] = function(i);
        }
        return result;
    }

    static I load(const uint8_t * p) {
        I result;
        memcpy(result.lane, p, sizeof(result.lane));
        return result;
    }

    static I load_u16(const uint8_t * p) {
        return each<I>([p](int i) { return uint32_t(p[2 * i] | p[2 * i + 1] << 8); });
    }

    static F load_half(const uint8_t * p) {
        return each<F>([p](int i) { return ggml_fp16_to_fp32(ggml_fp16_t(p[2 * i] | p[2 * i + 1] << 8)); });
    }

    static I word(uint32_t x) {
        return each<I>([x](int) { return x; });
    }

    static F real(float x) {
        return each<F>([x](int) { return x; });
    }

    static I load_all(const int32_t * p) { return word(uint32_t(*p)); }

    static I bits_and(I a, I b) {
        return each<I>([&](int i) { return a.lane[i] & b.lane[i]; });
    }

    // a where the mask's bits are set, b elsewhere
    static I select(I mask, I a, I b) {
        return each<I>([&](int i) { return (a.lane[i] & mask.lane[i]) | (b.lane[i] & ~mask.lane[i]); });
    }

    template <int N> static I left(I a) {
        return each<I>([&](int i) { return a.lane[i] << N; });
    }

    template <int N> static I right(I a) {
        return each<I>([&](int i) { return a.lane[i] >> N; });
    }

    template <int N> static I right_signed(I a) {
        return each<I>([&](int i) { return uint32_t(int32_t(a.lane[i]) >> N); });
    }

    static I subtract(I a, I b) {
        return each<I>([&](int i) { return a.lane[i] - b.lane[i]; });
    }

    static I lookup(const uint8_t * table, I index) {
        return each<I>([&](int i) {
            uint32_t result = 0;
            for (int byte = 0; byte < 4; byte++) {
                result |= uint32_t(table[index.lane[i] >> 8 * byte & 15]) << 8 * byte;
            }
            return result;
        });
    }

    static F to_float(I a) {
        return each<F>([&](int i) { return float(int32_t(a.lane[i])); });
    }

    static F multiply(F a, F b) {
        return each<F>([&](int i) { return a.lane[i] * b.lane[i]; });
    }

    // a * b + c, rounded once
    static F multiply_add(F a, F b, F c) {
        return each<F>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
    }

    // c - a * b, rounded once
    static F multiply_subtract(F a, F b, F c) {
        return each<F>([&](int i) { return std::fma(-a.lane[i], b.lane[i], c.lane[i]); });
    }

    static void prefetch(const uint8_t *) {}

    static void store(float * p, F a) { memcpy(p, a.lane, sizeof(a.lane)); }

    // The sum of products of 4 * N bytes: weights without a sign, at most MAX, and signed ones of a column.
    template <int N, int MAX> static I dot(I sum, const I * w, const int8_t * y) {
        return each<I>([&](int i) {
            int32_t result = int32_t(sum.lane[i]);
            for (int n = 0; n < N; n++) {
                for (int byte = 0; byte < 4; byte++) {
                    result += int32_t(w[n].lane[i] >> 8 * byte & 255) * y[4 * n + byte];
                }
            }
            return uint32_t(result);
        });
    }

    // The same for weights of which 128 is to be subtracted; `correction` is -128 times the sum of y.
    template <int N> static I dot_128(const int32_t * correction, const I * w, const int8_t * y) {
        return dot<N, 255>(load_all(correction), w, y);
    }

    // The sum of products of two 16-bit numbers each
    static I dot_16(I sum, I w, const int32_t * y) {
        return each<I>([&](int i) {
            return uint32_t(int32_t(sum.lane[i]) + int16_t(w.lane[i] & 0xffff) * int16_t(*y & 0xffff) +
                            int16_t(w.lane[i] >> 16) * int16_t(*y >> 16));
        });
    }
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512VL__)

struct avx512 {
    using I = __m512i;
    using F = __m512;

    static constexpr int  ROWS    = 16;
    static constexpr int  COLUMNS = 8;
    static constexpr bool WIDE    = true;  // dot takes weights of all 8 bits without overflow

    static COLUMNS_INLINE I load(const uint8_t * p) { return _mm512_loadu_si512(p); }

    static COLUMNS_INLINE I load_u16(const uint8_t * p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) p));
    }

    static COLUMNS_INLINE F load_half(const uint8_t * p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p));
    }

    static COLUMNS_INLINE I word(uint32_t x) { return _mm512_set1_epi32(int(x)); }

    static COLUMNS_INLINE F real(float x) { return _mm512_set1_ps(x); }

    static COLUMNS_INLINE I load_all(const int32_t * p) { return _mm512_set1_epi32(*p); }

    static COLUMNS_INLINE I bits_and(I a, I b) { return _mm512_and_si512(a, b); }

    static COLUMNS_INLINE I select(I mask, I a, I b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }

    template <int N> static COLUMNS_INLINE I left(I a) { return _mm512_slli_epi32(a, N); }

    template <int N> static COLUMNS_INLINE I right(I a) { return _mm512_srli_epi32(a, N); }

    template <int N> static COLUMNS_INLINE I right_signed(I a) { return _mm512_srai_epi32(a, N); }

    static COLUMNS_INLINE I subtract(I a, I b) { return _mm512_sub_epi32(a, b); }

    static COLUMNS_INLINE I lookup(const uint8_t * table, I index) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) table)), index);
    }

    static COLUMNS_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }

    static COLUMNS_INLINE F multiply(F a, F b) { return _mm512_mul_ps(a, b); }

    static COLUMNS_INLINE F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

    static COLUMNS_INLINE F multiply_subtract(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }

    static COLUMNS_INLINE void prefetch(const uint8_t * p) { _mm_prefetch((const char *) p, _MM_HINT_T1); }

    static COLUMNS_INLINE void store(float * p, F a) { _mm512_storeu_ps(p, a); }

    static COLUMNS_INLINE I four(const int8_t * y) {
        int32_t bytes;
        memcpy(&bytes, y, sizeof(bytes));
        return _mm512_set1_epi32(bytes);
    }

    template <int N, int MAX> static COLUMNS_INLINE I dot(I sum, const I * w, const int8_t * y) {
        for (int n = 0; n < N; n++) {
            sum = _mm512_dpbusd_epi32(sum, w[n], four(y + 4 * n));
        }
        return sum;
    }

    template <int N> static COLUMNS_INLINE I dot_128(const int32_t * correction, const I * w, const int8_t * y) {
        return dot<N, 255>(load_all(correction), w, y);
    }

    static COLUMNS_INLINE I dot_16(I sum, I w, const int32_t * y) {
        return _mm512_dpwssd_epi32(sum, w, load_all(y));
    }
};

using native = avx512;
#    define COLUMNS_NATIVE

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

struct avx2 {
    using I = __m256i;
    using F = __m256;

    static constexpr int ROWS    = 8;
    static constexpr int COLUMNS = 4;
#    if defined(__AVXVNNI__)
    static constexpr bool WIDE = true;
#    else
    static constexpr bool WIDE = false;
#    endif

    static COLUMNS_INLINE I load(const uint8_t * p) { return _mm256_loadu_si256((const __m256i *) p); }

    static COLUMNS_INLINE I load_u16(const uint8_t * p) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p));
    }

    static COLUMNS_INLINE F load_half(const uint8_t * p) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
    }

    static COLUMNS_INLINE I word(uint32_t x) { return _mm256_set1_epi32(int(x)); }

    static COLUMNS_INLINE F real(float x) { return _mm256_set1_ps(x); }

    static COLUMNS_INLINE I load_all(const int32_t * p) { return _mm256_set1_epi32(*p); }

    static COLUMNS_INLINE I bits_and(I a, I b) { return _mm256_and_si256(a, b); }

    static COLUMNS_INLINE I select(I mask, I a, I b) {
        return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
    }

    template <int N> static COLUMNS_INLINE I left(I a) { return _mm256_slli_epi32(a, N); }

    template <int N> static COLUMNS_INLINE I right(I a) { return _mm256_srli_epi32(a, N); }

    template <int N> static COLUMNS_INLINE I right_signed(I a) { return _mm256_srai_epi32(a, N); }

    static COLUMNS_INLINE I subtract(I a, I b) { return _mm256_sub_epi32(a, b); }

    static COLUMNS_INLINE I lookup(const uint8_t * table, I index) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table)), index);
    }

    static COLUMNS_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }

    static COLUMNS_INLINE F multiply(F a, F b) { return _mm256_mul_ps(a, b); }

    static COLUMNS_INLINE F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

    static COLUMNS_INLINE F multiply_subtract(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }

    static COLUMNS_INLINE void prefetch(const uint8_t * p) { _mm_prefetch((const char *) p, _MM_HINT_T1); }

    static COLUMNS_INLINE void store(float * p, F a) { _mm256_storeu_ps(p, a); }

    static COLUMNS_INLINE I four(const int8_t * y) {
        int32_t bytes;
        memcpy(&bytes, y, sizeof(bytes));
        return _mm256_set1_epi32(bytes);
    }

    static COLUMNS_INLINE I add_pairs(I sum, I pairs) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }

    template <int N, int MAX> static COLUMNS_INLINE I dot(I sum, const I * w, const int8_t * y) {
#    if defined(__AVXVNNI__)
        for (int n = 0; n < N; n++) {
            sum = _mm256_dpbusd_avx_epi32(sum, w[n], four(y + 4 * n));
        }
#    else
        // as many pairs of products as 16 bits hold, then they are widened
        constexpr int FIT = INT16_MAX / (2 * 127 * MAX);
        static_assert(FIT > 0, "products of two pairs have to fit in 16 bits");
        for (int n = 0; n < N; n += FIT) {
            I pairs = _mm256_maddubs_epi16(w[n], four(y + 4 * n));
            for (int i = n + 1; i < n + FIT && i < N; i++) {
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[i], four(y + 4 * i)));
            }
            sum = add_pairs(sum, pairs);
        }
#    endif
        return sum;
    }

    template <int N> static COLUMNS_INLINE I dot_128(const int32_t * correction, const I * w, const int8_t * y) {
#    if defined(__AVXVNNI__)
        return dot<N, 255>(load_all(correction), w, y);
#    else
        GGML_UNUSED(correction);
        I sum = _mm256_setzero_si256();
        for (int n = 0; n < N; n++) {
            const I centred = _mm256_xor_si256(w[n], _mm256_set1_epi8(-128));
            sum = add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(four(y + 4 * n), centred)));
        }
        return sum;
#    endif
    }

    static COLUMNS_INLINE I dot_16(I sum, I w, const int32_t * y) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(w, load_all(y)));
    }
};

using native = avx2;
#    define COLUMNS_NATIVE

#endif

}  // namespace ggml::cpu::columns
