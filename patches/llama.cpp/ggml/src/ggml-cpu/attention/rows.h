#pragma once

// Rows of a KV cache as floats. What ggml's type traits have for it is compiled for any CPU; this, for the one that it runs on.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "ggml.h"
#include "simd-mappings.h"

#include <cstdint>

namespace ggml::cpu::attention {

inline void block_to_float(const block_q4_0 & b, float * y) {
#if defined(__AVX2__) // compilers make five times as much of the loop
    const __m256  d     = _mm256_set1_ps(GGML_CPU_FP16_TO_FP32(b.d));
    const __m256i low   = _mm256_set1_epi32(0x0F);
    const __m256i eight = _mm256_set1_epi32(8);
    for (int i = 0; i < QK4_0/2; i += 8) {
        const __m256i q  = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (b.qs + i)));
        const __m256i lo = _mm256_sub_epi32(_mm256_and_si256(q, low), eight);
        const __m256i hi = _mm256_sub_epi32(_mm256_srli_epi32(q, 4), eight);
        _mm256_storeu_ps(y + i,           _mm256_mul_ps(_mm256_cvtepi32_ps(lo), d));
        _mm256_storeu_ps(y + i + QK4_0/2, _mm256_mul_ps(_mm256_cvtepi32_ps(hi), d));
    }
#else
    const float d = GGML_CPU_FP16_TO_FP32(b.d);
    for (int i = 0; i < QK4_0/2; ++i) {
        y[i]           = ((b.qs[i] & 0x0F) - 8)*d;
        y[i + QK4_0/2] = ((b.qs[i] >>   4) - 8)*d;
    }
#endif
}

// the same numbers as to_float of the type's traits
inline void row_to_float(ggml_type type, const void * row, float * y, int64_t n) {
    switch (type) {
        case GGML_TYPE_Q8_0:
            for (const block_q8_0 * b = (const block_q8_0 *) row; n > 0; ++b, y += QK8_0, n -= QK8_0) {
                const float d = GGML_CPU_FP16_TO_FP32(b->d);
                for (int i = 0; i < QK8_0; ++i) {
                    y[i] = b->qs[i]*d;
                }
            }
            break;
        case GGML_TYPE_Q4_0:
            for (const block_q4_0 * b = (const block_q4_0 *) row; n > 0; ++b, y += QK4_0, n -= QK4_0) {
                block_to_float(*b, y);
            }
            break;
        default:
            ggml_get_type_traits(type)->to_float(row, y, n);
    }
}

} // namespace ggml::cpu::attention
