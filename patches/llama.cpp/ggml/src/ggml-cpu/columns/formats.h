#pragma once

// How weights lie in memory, and how they are unpacked. A tile is 16 rows of the matrix: for each block of the original
// format, its 32-bit words with those of the 16 rows side by side, 64 bytes a word. It takes the bytes that the rows took.
//
// A block is read in steps of 32 weights of each row. `weights` unpacks a step into bytes: of vector i, a lane holds the
// weights 4 * i to 4 * i + 3 of its row. `scales` has the factors of the step's sums, one for 32 weights or two for 16 each.

#include "vectors.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <utility>

namespace ggml::cpu::columns {

constexpr int TILE_ROWS   = 16;
constexpr int STEP        = 32;
constexpr int WORDS       = STEP / 4;
constexpr int VECTOR_SIZE = 4 * TILE_ROWS;

// How many bytes ahead to ask for, where a tile is not read from front to back and the CPU's own prefetching loses its way.
constexpr size_t FAR = 16384;

// A block of a column that is multiplied. What `sums` holds is for the format to say.
template <int QK, int SUMS> struct column_block {
    int8_t  qs[QK];
    int32_t sums[SUMS];
    float   d;
};

// Words of one row to where they stand in the tile, `row` words after those of row 0
static inline void spread(uint8_t * tile, int row, const void * words, size_t size) {
    for (size_t i = 0; i < size / 4; i++) {
        memcpy(tile + i * VECTOR_SIZE + row * 4, (const uint8_t *) words + i * 4, 4);
    }
}

static inline void spread_half(uint8_t * tile, int row, const void * half) {
    memcpy(tile + row * 2, half, 2);
}

constexpr size_t spread_size(size_t size) {
    return size * TILE_ROWS;
}

// Times 2^N, of which N may be negative
template <class V, int N> static COLUMNS_INLINE typename V::I shift(typename V::I a) {
    if constexpr (N < 0) {
        return V::template right<-N>(a);
    } else {
        return V::template left<N>(a);
    }
}

// Where ZERO is to be subtracted from each weight, this is what the sum is to start with.
template <int ZERO> static inline void sum_times_zero(const block_q8_0 & y, int32_t * sums) {
    sums[0] = 0;
    for (int i = 0; i < QK8_0; i++) {
        sums[0] -= ZERO * y.qs[i];
    }
}

static inline int32_t sum_of_pair(const block_q8_K & y, int i) {
    return y.bsums[2 * i] + y.bsums[2 * i + 1];
}

static inline int32_t two_words(int32_t low, int32_t high) {
    return int32_t(uint32_t(low & 0xffff) | uint32_t(high) << 16);
}

// The sums of the column's 32s, as `min_sum` multiplies them with the minimums of Q4_K and Q5_K
static inline void sums_for_minimums(const block_q8_K & y, int32_t * sums) {
    for (int i = 0; i < 4; i++) {
        const int first = i / 2 * 4 + i % 2;
        sums[i]         = two_words(sum_of_pair(y, first), sum_of_pair(y, first + 2));
    }
}

struct q2_K_layout {
    using source       = block_q2_K;
    using column       = column_block<QK_K, QK_K / 32>;
    using column_input = block_q8_K;

    static constexpr ggml_type TYPE  = GGML_TYPE_Q2_K;
    static constexpr size_t PREFETCH = 0;
    static constexpr size_t    D     = 0;
    static constexpr size_t    DMIN  = 32;
    static constexpr size_t    SCALE = 64;
    static constexpr size_t    QS    = SCALE + spread_size(QK_K / 16);

    static void pack(const source & from, int64_t, int64_t b, int row, uint8_t * tile) {
        tile += b * spread_size(sizeof(source));
        spread_half(tile + D, row, &from.data.data.d);
        spread_half(tile + DMIN, row, &from.data.data.dmin);
        spread(tile + SCALE, row, from.scales, sizeof(from.scales));
        spread(tile + QS, row, from.qs, sizeof(from.qs));
    }

    // The sums of the column's 16s, as `finish` multiplies them with the minimums
    static void sums(const block_q8_K & y, int32_t * sums) {
        for (int i = 0; i < QK_K / 32; i++) {
            const int first = i / 2 * 4 + i % 2;
            sums[i]         = two_words(y.bsums[first], y.bsums[first + 2]);
        }
    }
};

template <class V> struct q2_K : q2_K_layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 2;
    static constexpr int STEPS  = 4;
    static constexpr int PARTS  = 2;

    const uint8_t * qs;
    F               minimum;
    I               minimums[8];  // two each
    F               scales[16];

    COLUMNS_INLINE q2_K(const uint8_t * tile, int64_t, int64_t b, int first_row) :
        qs(tile + b * spread_size(sizeof(source)) + QS + first_row * 4),
        minimum(V::load_half(qs - QS - first_row * 2 + DMIN)) {
        const F d      = V::load_half(qs - QS - first_row * 2 + D);
        const I four   = V::word(0x0f);
        const I fours  = V::word(0x000f000f);
        for (int i = 0; i < 4; i++) {
            const I both        = V::load(qs - QS + SCALE + i * VECTOR_SIZE);
            scales[4 * i]       = V::multiply(d, V::to_float(V::bits_and(both, four)));
            scales[4 * i + 1]   = V::multiply(d, V::to_float(V::bits_and(V::template right<8>(both), four)));
            scales[4 * i + 2]   = V::multiply(d, V::to_float(V::bits_and(V::template right<16>(both), four)));
            scales[4 * i + 3]   = V::multiply(d, V::to_float(V::bits_and(V::template right<24>(both), four)));
            minimums[2 * i]     = V::bits_and(V::template right<4>(both), fours);
            minimums[2 * i + 1] = V::bits_and(V::template right<12>(both), fours);
        }
    }

    template <int S> COLUMNS_INLINE void weights(int group, I * w) const {
        const uint8_t * p = qs + group * WORDS * VECTOR_SIZE;
        for (int i = 0; i < WORDS; i++) {
            w[i] = V::bits_and(shift<V, -2 * S>(V::load(p + i * VECTOR_SIZE)), V::word(0x03030303));
        }
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const column & y, int step, int part) const {
        constexpr int N = WORDS / PARTS;
        return V::template dot<N, 3>(V::word(0), w + part * N, y.qs + step * STEP + part * STEP / PARTS);
    }

    COLUMNS_INLINE F finish(F sum, const column & y) const {
        I min_sum = V::word(0);
        for (int i = 0; i < QK_K / 32; i++) {
            min_sum = V::dot_16(min_sum, minimums[i], y.sums + i);
        }
        return V::multiply_subtract(minimum, V::to_float(min_sum), sum);
    }
};

struct q3_K_layout {
    using source       = block_q3_K;
    using column       = column_block<QK_K, QK_K / 16>;
    using column_input = block_q8_K;

    static constexpr ggml_type TYPE  = GGML_TYPE_Q3_K;
    static constexpr size_t PREFETCH = FAR;
    static constexpr size_t    HMASK = 0;
    static constexpr size_t    QS    = spread_size(QK_K / 8);
    static constexpr size_t    SCALE = QS + spread_size(QK_K / 4);
    static constexpr size_t    BLOCK = SCALE + spread_size(K_SCALE_SIZE);  // the d of all blocks follow the last one

    static void pack(const source & from, int64_t n_blocks, int64_t b, int row, uint8_t * tile) {
        spread_half(tile + n_blocks * BLOCK + b * TILE_ROWS * 2, row, &from.d);
        tile += b * BLOCK;
        spread(tile + HMASK, row, from.hmask, sizeof(from.hmask));
        spread(tile + QS, row, from.qs, sizeof(from.qs));
        spread(tile + SCALE, row, from.scales, sizeof(from.scales));
    }

    // 4 is to be subtracted from each weight
    static void sums(const block_q8_K & y, int32_t * sums) {
        for (int i = 0; i < QK_K / 16; i++) {
            sums[i] = -4 * y.bsums[i];
        }
    }
};

template <class V> struct q3_K : q3_K_layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 1;
    static constexpr int STEPS  = 8;
    static constexpr int PARTS  = 2;

    const uint8_t * block;
    F               scales[16];

    COLUMNS_INLINE q3_K(const uint8_t * tile, int64_t n_blocks, int64_t b, int first_row) :
        block(tile + b * BLOCK + first_row * 4) {
        const F d    = V::load_half(tile + n_blocks * BLOCK + (b * TILE_ROWS + first_row) * 2);
        const I low  = V::load(block + SCALE);
        const I next = V::load(block + SCALE + VECTOR_SIZE);
        const I high = V::load(block + SCALE + 2 * VECTOR_SIZE);
        four_scales<4>(d, low, high, scales);
        four_scales<2>(d, next, high, scales + 4);
        four_scales<0>(d, V::template right<4>(low), high, scales + 8);
        four_scales<-2>(d, V::template right<4>(next), high, scales + 12);
    }

    // The lower four bits of each byte, and two of the high ones, shifted to be the fifth and sixth; 32 is subtracted.
    template <int SHIFT> static COLUMNS_INLINE void four_scales(F d, I low, I high, F * scales) {
        const I top = V::bits_and(shift<V, SHIFT>(high), V::word(0x30303030));
        const I six = V::select(V::word(0x0f0f0f0f), low, top);
        scales[0]   = V::multiply(d, one_scale<0>(six));
        scales[1]   = V::multiply(d, one_scale<8>(six));
        scales[2]   = V::multiply(d, one_scale<16>(six));
        scales[3]   = V::multiply(d, one_scale<24>(six));
    }

    template <int SHIFT> static COLUMNS_INLINE F one_scale(I six) {
        return V::to_float(V::subtract(V::bits_and(V::template right<SHIFT>(six), V::word(0x3f)), V::word(32)));
    }

    template <int S> COLUMNS_INLINE void weights(int, I * w) const {
        const uint8_t * p = block + QS + S / 4 * WORDS * VECTOR_SIZE;
        for (int i = 0; i < WORDS; i++) {
            const I low  = shift<V, -2 * (S % 4)>(V::load(p + i * VECTOR_SIZE));
            const I high = V::load(block + HMASK + i * VECTOR_SIZE);
            // bit S of the high ones is the third
            w[i] = V::bits_and(V::select(V::word(0x03030303), low, shift<V, 2 - S>(high)), V::word(0x07070707));
        }
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const column & y, int step, int part) const {
        constexpr int N = WORDS / PARTS;
        return V::template dot<N, 7>(V::load_all(y.sums + step * PARTS + part), w + part * N,
                                     y.qs + step * STEP + part * STEP / PARTS);
    }

    COLUMNS_INLINE F finish(F sum, const column &) const { return sum; }
};

// Scales and minimums of 6 bits, as Q4_K and Q5_K pack them in 12 bytes
template <class V> struct scales_and_minimums {
    using I = typename V::I;
    using F = typename V::F;

    I low_scales, high_scales;  // a byte for each step
    I low_minimums, high_minimums;

    COLUMNS_INLINE explicit scales_and_minimums(const uint8_t * p) {
        const I scales   = V::load(p);
        const I minimums = V::load(p + VECTOR_SIZE);
        const I both     = V::load(p + 2 * VECTOR_SIZE);
        const I nibbles  = V::word(0x0f0f0f0f);
        const I top      = V::word(0x30303030);
        const I six      = V::word(0x3f3f3f3f);
        low_scales       = V::bits_and(scales, six);
        low_minimums     = V::bits_and(minimums, six);
        high_scales      = V::select(nibbles, both, V::bits_and(V::template right<2>(scales), top));
        high_minimums    = V::select(nibbles, V::template right<4>(both), V::bits_and(V::template right<2>(minimums), top));
    }

    template <int STEP_INDEX> COLUMNS_INLINE F scale() const {
        const I of_four = STEP_INDEX < 4 ? low_scales : high_scales;
        return V::to_float(V::bits_and(V::template right<STEP_INDEX % 4 * 8>(of_four), V::word(0xff)));
    }

    // The sum of minimums times the column's sums
    COLUMNS_INLINE F min_sum(const int32_t * sums) const {
        const I bytes = V::word(0x00ff00ff);
        I       sum   = V::word(0);
        sum           = V::dot_16(sum, V::bits_and(low_minimums, bytes), sums);
        sum           = V::dot_16(sum, V::bits_and(V::template right<8>(low_minimums), bytes), sums + 1);
        sum           = V::dot_16(sum, V::bits_and(high_minimums, bytes), sums + 2);
        sum           = V::dot_16(sum, V::bits_and(V::template right<8>(high_minimums), bytes), sums + 3);
        return V::to_float(sum);
    }
};

struct q4_K_layout {
    using source       = block_q4_K;
    using column       = column_block<QK_K, 4>;
    using column_input = block_q8_K;

    static constexpr ggml_type TYPE  = GGML_TYPE_Q4_K;
    static constexpr size_t PREFETCH = 0;
    static constexpr size_t    D     = 0;
    static constexpr size_t    DMIN  = 32;
    static constexpr size_t    SCALE = 64;
    static constexpr size_t    QS    = SCALE + spread_size(K_SCALE_SIZE);

    static void pack(const source & from, int64_t, int64_t b, int row, uint8_t * tile) {
        tile += b * spread_size(sizeof(source));
        spread_half(tile + D, row, &from.data.data.d);
        spread_half(tile + DMIN, row, &from.data.data.dmin);
        spread(tile + SCALE, row, from.scales, sizeof(from.scales));
        spread(tile + QS, row, from.qs, sizeof(from.qs));
    }

    static void sums(const block_q8_K & y, int32_t * sums) { sums_for_minimums(y, sums); }
};

template <class V> struct q4_K : q4_K_layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 4;  // of steps
    static constexpr int PARTS  = 1;  // sums of a step, each with a scale

    const uint8_t *        qs;
    F                      minimum;
    scales_and_minimums<V> packed;
    F                      scales[8];

    COLUMNS_INLINE q4_K(const uint8_t * tile, int64_t, int64_t b, int first_row) :
        qs(tile + b * spread_size(sizeof(source)) + QS + first_row * 4),
        minimum(V::load_half(qs - QS - first_row * 2 + DMIN)),
        packed(qs - QS + SCALE) {
        const F d = V::load_half(qs - QS - first_row * 2 + D);
        // of odd steps the upper nibbles stay where they are: the sums are 16 times as large
        const F odd = V::WIDE ? V::multiply(d, V::real(1.0f / 16)) : d;
        scales[0]   = V::multiply(d, packed.template scale<0>());
        scales[1]   = V::multiply(odd, packed.template scale<1>());
        scales[2]   = V::multiply(d, packed.template scale<2>());
        scales[3]   = V::multiply(odd, packed.template scale<3>());
        scales[4]   = V::multiply(d, packed.template scale<4>());
        scales[5]   = V::multiply(odd, packed.template scale<5>());
        scales[6]   = V::multiply(d, packed.template scale<6>());
        scales[7]   = V::multiply(odd, packed.template scale<7>());
    }

    static constexpr int STEPS = 2;  // of a group

    template <int S> COLUMNS_INLINE void weights(int group, I * w) const {
        const uint8_t * p = qs + group * WORDS * VECTOR_SIZE;
        for (int i = 0; i < WORDS; i++) {
            const I both = V::load(p + i * VECTOR_SIZE);
            if (S == 0) {
                w[i] = V::bits_and(both, V::word(0x0f0f0f0f));
            } else if (V::WIDE) {
                w[i] = V::bits_and(both, V::word(0xf0f0f0f0));
            } else {
                w[i] = V::bits_and(V::template right<4>(both), V::word(0x0f0f0f0f));
            }
        }
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const column & y, int step, int) const {
        return V::template dot<WORDS, S != 0 && V::WIDE ? 240 : 15>(V::word(0), w, y.qs + step * STEP);
    }

    COLUMNS_INLINE F finish(F sum, const column & y) const {
        return V::multiply_subtract(minimum, packed.min_sum(y.sums), sum);
    }
};

struct q5_K_layout {
    using source       = block_q5_K;
    using column       = column_block<QK_K, 4>;
    using column_input = block_q8_K;

    static constexpr ggml_type TYPE  = GGML_TYPE_Q5_K;
    static constexpr size_t PREFETCH = FAR;
    static constexpr size_t    D     = 0;
    static constexpr size_t    DMIN  = 32;
    static constexpr size_t    SCALE = 64;
    static constexpr size_t    QH    = SCALE + spread_size(K_SCALE_SIZE);
    static constexpr size_t    QS    = QH + spread_size(QK_K / 8);

    static void pack(const source & from, int64_t, int64_t b, int row, uint8_t * tile) {
        tile += b * spread_size(sizeof(source));
        spread_half(tile + D, row, &from.data.data.d);
        spread_half(tile + DMIN, row, &from.data.data.dmin);
        spread(tile + SCALE, row, from.scales, sizeof(from.scales));
        spread(tile + QH, row, from.qh, sizeof(from.qh));
        spread(tile + QS, row, from.qs, sizeof(from.qs));
    }

    static void sums(const block_q8_K & y, int32_t * sums) { sums_for_minimums(y, sums); }
};

template <class V> struct q5_K : q5_K_layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 1;
    static constexpr int STEPS  = 8;
    static constexpr int PARTS  = 1;

    const uint8_t *        qs;
    const uint8_t *        qh;
    F                      minimum;
    scales_and_minimums<V> packed;
    F                      scales[8];

    COLUMNS_INLINE q5_K(const uint8_t * tile, int64_t, int64_t b, int first_row) :
        qs(tile + b * spread_size(sizeof(source)) + QS + first_row * 4),
        qh(qs - QS + QH),
        minimum(V::load_half(qs - QS - first_row * 2 + DMIN)),
        packed(qs - QS + SCALE) {
        const F d = V::load_half(qs - QS - first_row * 2 + D);
        scales[0] = V::multiply(d, packed.template scale<0>());
        scales[1] = V::multiply(d, packed.template scale<1>());
        scales[2] = V::multiply(d, packed.template scale<2>());
        scales[3] = V::multiply(d, packed.template scale<3>());
        scales[4] = V::multiply(d, packed.template scale<4>());
        scales[5] = V::multiply(d, packed.template scale<5>());
        scales[6] = V::multiply(d, packed.template scale<6>());
        scales[7] = V::multiply(d, packed.template scale<7>());
    }

    template <int S> COLUMNS_INLINE void weights(int, I * w) const {
        const uint8_t * p = qs + S / 2 * WORDS * VECTOR_SIZE;
        for (int i = 0; i < WORDS; i++) {
            const I both = V::load(p + i * VECTOR_SIZE);
            const I high = V::load(qh + i * VECTOR_SIZE);
            // bit S of the high ones is the fifth
            const I fifth = shift<V, 4 - S>(high);
            const I low   = S % 2 == 0 ? both : V::template right<4>(both);
            w[i]          = V::bits_and(V::select(V::word(0x0f0f0f0f), low, fifth), V::word(0x1f1f1f1f));
        }
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const column & y, int step, int) const {
        return V::template dot<WORDS, 31>(V::word(0), w, y.qs + step * STEP);
    }

    COLUMNS_INLINE F finish(F sum, const column & y) const {
        return V::multiply_subtract(minimum, packed.min_sum(y.sums), sum);
    }
};

struct q6_K_layout {
    using source       = block_q6_K;
    using column       = column_block<QK_K, QK_K / 16>;
    using column_input = block_q8_K;

    static constexpr ggml_type TYPE  = GGML_TYPE_Q6_K;
    static constexpr size_t PREFETCH = FAR;
    static constexpr size_t    QL    = 0;
    static constexpr size_t    QH    = spread_size(QK_K / 2);
    static constexpr size_t    SCALE = QH + spread_size(QK_K / 4);
    static constexpr size_t    BLOCK = SCALE + spread_size(QK_K / 16);  // the d of all blocks follow the last one

    static void pack(const source & from, int64_t n_blocks, int64_t b, int row, uint8_t * tile) {
        spread_half(tile + n_blocks * BLOCK + b * TILE_ROWS * 2, row, &from.d);
        tile += b * BLOCK;
        spread(tile + QL, row, from.ql, sizeof(from.ql));
        spread(tile + QH, row, from.qh, sizeof(from.qh));
        spread(tile + SCALE, row, from.scales, sizeof(from.scales));
    }

    // 32 is to be subtracted from each weight
    static void sums(const block_q8_K & y, int32_t * sums) {
        for (int i = 0; i < QK_K / 16; i++) {
            sums[i] = -32 * y.bsums[i];
        }
    }
};

template <class V> struct q6_K : q6_K_layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 2;
    static constexpr int STEPS  = 4;
    static constexpr int PARTS  = 2;

    const uint8_t * block;
    F               scales[16];

    COLUMNS_INLINE q6_K(const uint8_t * tile, int64_t n_blocks, int64_t b, int first_row) :
        block(tile + b * BLOCK + first_row * 4) {
        const F d = V::load_half(tile + n_blocks * BLOCK + (b * TILE_ROWS + first_row) * 2);
        for (int i = 0; i < 4; i++) {
            const I four      = V::load(block + SCALE + i * VECTOR_SIZE);
            scales[4 * i]     = V::multiply(d, V::to_float(V::template right_signed<24>(V::template left<24>(four))));
            scales[4 * i + 1] = V::multiply(d, V::to_float(V::template right_signed<24>(V::template left<16>(four))));
            scales[4 * i + 2] = V::multiply(d, V::to_float(V::template right_signed<24>(V::template left<8>(four))));
            scales[4 * i + 3] = V::multiply(d, V::to_float(V::template right_signed<24>(four)));
        }
    }

    template <int S> COLUMNS_INLINE void weights(int group, I * w) const {
        const uint8_t * ql = block + QL + (group * 2 + S % 2) * WORDS * VECTOR_SIZE;
        const uint8_t * qh = block + QH + group * WORDS * VECTOR_SIZE;
        for (int i = 0; i < WORDS; i++) {
            const I both = V::load(ql + i * VECTOR_SIZE);
            const I high = V::load(qh + i * VECTOR_SIZE);
            // bits 2 * S and 2 * S + 1 of the high ones are the fifth and sixth
            const I top = shift<V, 4 - 2 * S>(high);
            const I low = S < 2 ? both : V::template right<4>(both);
            w[i]        = V::bits_and(V::select(V::word(0x0f0f0f0f), low, top), V::word(0x3f3f3f3f));
        }
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const column & y, int step, int part) const {
        constexpr int N = WORDS / PARTS;
        return V::template dot<N, 63>(V::load_all(y.sums + step * PARTS + part), w + part * N,
                                      y.qs + step * STEP + part * STEP / PARTS);
    }

    COLUMNS_INLINE F finish(F sum, const column &) const { return sum; }
};

struct q8_0_layout {
    using source       = block_q8_0;
    using column       = column_block<QK8_0, 1>;
    using column_input = block_q8_0;

    static constexpr ggml_type TYPE  = GGML_TYPE_Q8_0;
    static constexpr size_t PREFETCH = FAR;
    static constexpr size_t    BLOCK = spread_size(QK8_0);

    static void pack(const source & from, int64_t n_blocks, int64_t b, int row, uint8_t * tile) {
        uint8_t unsigned_qs[QK8_0];
        for (int i = 0; i < QK8_0; i++) {
            unsigned_qs[i] = uint8_t(from.qs[i] + 128);
        }
        spread_half(tile + n_blocks * BLOCK + b * TILE_ROWS * 2, row, &from.d);
        spread(tile + b * BLOCK, row, unsigned_qs, sizeof(unsigned_qs));
    }

    static void sums(const block_q8_0 & y, int32_t * sums) { sum_times_zero<128>(y, sums); }
};

template <class V> struct q8_0 : q8_0_layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 1;
    static constexpr int STEPS  = 1;
    static constexpr int PARTS  = 1;

    const uint8_t * qs;
    F               scales[1];

    COLUMNS_INLINE q8_0(const uint8_t * tile, int64_t n_blocks, int64_t b, int first_row) :
        qs(tile + b * BLOCK + first_row * 4) {
        scales[0] = V::load_half(tile + n_blocks * BLOCK + (b * TILE_ROWS + first_row) * 2);
    }

    template <int S> COLUMNS_INLINE void weights(int, I * w) const {
        for (int i = 0; i < WORDS; i++) {
            w[i] = V::load(qs + i * VECTOR_SIZE);
        }
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const column & y, int, int) const {
        return V::template dot_128<WORDS>(y.sums, w, y.qs);
    }

    COLUMNS_INLINE F finish(F sum, const column &) const { return sum; }
};

// 32 weights of 4 bits with one factor
template <class Source, ggml_type KIND, int ZERO> struct nibbles_layout {
    using source       = Source;
    using column       = column_block<QK8_0, 1>;
    using column_input = block_q8_0;

    static constexpr ggml_type TYPE  = KIND;
    static constexpr size_t PREFETCH = FAR;
    static constexpr size_t    BLOCK = spread_size(QK8_0 / 2);

    static void pack(const source & from, int64_t n_blocks, int64_t b, int row, uint8_t * tile) {
        spread_half(tile + n_blocks * BLOCK + b * TILE_ROWS * 2, row, &from.d);
        spread(tile + b * BLOCK, row, from.qs, sizeof(from.qs));
    }

    static void sums(const block_q8_0 & y, int32_t * sums) { sum_times_zero<ZERO>(y, sums); }
};

template <class V, class Layout> struct nibbles : Layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 1;
    static constexpr int STEPS  = 1;
    static constexpr int PARTS  = 1;

    const uint8_t * qs;
    F               scales[1];

    COLUMNS_INLINE nibbles(const uint8_t * tile, int64_t n_blocks, int64_t b, int first_row) :
        qs(tile + b * Layout::BLOCK + first_row * 4) {
        scales[0] = V::load_half(tile + n_blocks * Layout::BLOCK + (b * TILE_ROWS + first_row) * 2);
    }

    COLUMNS_INLINE F finish(F sum, const typename Layout::column &) const { return sum; }
};

template <class V> struct q4_0 : nibbles<V, nibbles_layout<block_q4_0, GGML_TYPE_Q4_0, 8>> {
    using I      = typename V::I;
    using parent = nibbles<V, nibbles_layout<block_q4_0, GGML_TYPE_Q4_0, 8>>;
    using parent::parent;

    template <int S> COLUMNS_INLINE void weights(int, I * w) const {
        for (int i = 0; i < WORDS / 2; i++) {
            const I both     = V::load(this->qs + i * VECTOR_SIZE);
            w[i]             = V::bits_and(both, V::word(0x0f0f0f0f));
            w[i + WORDS / 2] = V::bits_and(V::template right<4>(both), V::word(0x0f0f0f0f));
        }
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const typename parent::column & y, int, int) const {
        return V::template dot<WORDS, 15>(V::load_all(y.sums), w, y.qs);
    }
};

// kvalues_iq4nl, each plus 128
static constexpr uint8_t IQ4_VALUES[16] = { 1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241 };

// The weights of 32 numbers of such values
template <class V> static COLUMNS_INLINE void look_up(const uint8_t * qs, typename V::I * w) {
    for (int i = 0; i < WORDS / 2; i++) {
        const typename V::I both = V::load(qs + i * VECTOR_SIZE);
        w[i]                     = V::lookup(IQ4_VALUES, V::bits_and(both, V::word(0x0f0f0f0f)));
        w[i + WORDS / 2] = V::lookup(IQ4_VALUES, V::bits_and(V::template right<4>(both), V::word(0x0f0f0f0f)));
    }
}

template <class V> struct iq4_nl : nibbles<V, nibbles_layout<block_iq4_nl, GGML_TYPE_IQ4_NL, 128>> {
    using I      = typename V::I;
    using parent = nibbles<V, nibbles_layout<block_iq4_nl, GGML_TYPE_IQ4_NL, 128>>;
    using parent::parent;

    template <int S> COLUMNS_INLINE void weights(int, I * w) const { look_up<V>(this->qs, w); }

    template <int S> COLUMNS_INLINE I dot(const I * w, const typename parent::column & y, int, int) const {
        return V::template dot_128<WORDS>(y.sums, w, y.qs);
    }
};

// 32 weights of 4 bits with a factor and a minimum
struct q4_1_layout {
    using source       = block_q4_1;
    using column       = column_block<QK8_0, 1>;
    using column_input = block_q8_0;

    static constexpr ggml_type TYPE  = GGML_TYPE_Q4_1;
    static constexpr size_t PREFETCH = 0;
    static constexpr size_t    D     = 0;
    static constexpr size_t    M     = 32;
    static constexpr size_t    QS    = 64;

    static void pack(const source & from, int64_t, int64_t b, int row, uint8_t * tile) {
        tile += b * spread_size(sizeof(source));
        spread_half(tile + D, row, &from.data.data.d);
        spread_half(tile + M, row, &from.data.data.m);
        spread(tile + QS, row, from.qs, sizeof(from.qs));
    }

    static void sums(const block_q8_0 & y, int32_t * sums) { sum_times_zero<-1>(y, sums); }
};

template <class V> struct q4_1 : q4_1_layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 1;
    static constexpr int STEPS  = 1;
    static constexpr int PARTS  = 1;

    const uint8_t * qs;
    F               minimum;
    F               scales[1];

    COLUMNS_INLINE q4_1(const uint8_t * tile, int64_t, int64_t b, int first_row) :
        qs(tile + b * spread_size(sizeof(source)) + QS + first_row * 4),
        minimum(V::load_half(qs - QS - first_row * 2 + M)) {
        scales[0] = V::load_half(qs - QS - first_row * 2 + D);
    }

    template <int S> COLUMNS_INLINE void weights(int, I * w) const {
        for (int i = 0; i < WORDS / 2; i++) {
            const I both     = V::load(qs + i * VECTOR_SIZE);
            w[i]             = V::bits_and(both, V::word(0x0f0f0f0f));
            w[i + WORDS / 2] = V::bits_and(V::template right<4>(both), V::word(0x0f0f0f0f));
        }
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const column & y, int, int) const {
        return V::template dot<WORDS, 15>(V::word(0), w, y.qs);
    }

    COLUMNS_INLINE F finish(F sum, const column & y) const {
        return V::multiply_add(minimum, V::to_float(V::load_all(y.sums)), sum);
    }
};

// Fifth bits in the order in which they are used: bit i of a byte belongs to vector i.
static inline uint32_t fifth_bits(const uint8_t * qh) {
    uint32_t result = 0;
    for (int i = 0; i < STEP; i++) {
        result |= uint32_t(qh[i / 8] >> i % 8 & 1) << (i % 4 * 8 + i / 4);
    }
    return result;
}

template <class V, int... N>
static COLUMNS_INLINE void five_bits(const uint8_t * qs, typename V::I high, typename V::I * w, std::integer_sequence<int, N...>) {
    const typename V::I nibbles = V::word(0x0f0f0f0f);
    const typename V::I five    = V::word(0x1f1f1f1f);
    typename V::I       both[WORDS / 2];
    for (int i = 0; i < WORDS / 2; i++) {
        both[i] = V::load(qs + i * VECTOR_SIZE);
    }
    ((w[N] = V::bits_and(V::select(nibbles, shift<V, N / 4 * -4>(both[N % 4]), shift<V, 4 - N>(high)), five)), ...);
}

struct q5_0_layout {
    using source       = block_q5_0;
    using column       = column_block<QK8_0, 1>;
    using column_input = block_q8_0;

    static constexpr ggml_type TYPE  = GGML_TYPE_Q5_0;
    static constexpr size_t PREFETCH = FAR;
    static constexpr size_t    QH    = 0;
    static constexpr size_t    QS    = VECTOR_SIZE;
    static constexpr size_t    BLOCK = QS + spread_size(QK5_0 / 2);  // the d of all blocks follow the last one

    static void pack(const source & from, int64_t n_blocks, int64_t b, int row, uint8_t * tile) {
        const uint32_t high = fifth_bits(from.qh);
        spread_half(tile + n_blocks * BLOCK + b * TILE_ROWS * 2, row, &from.d);
        spread(tile + b * BLOCK + QH, row, &high, sizeof(high));
        spread(tile + b * BLOCK + QS, row, from.qs, sizeof(from.qs));
    }

    static void sums(const block_q8_0 & y, int32_t * sums) { sum_times_zero<16>(y, sums); }
};

template <class V> struct q5_0 : q5_0_layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 1;
    static constexpr int STEPS  = 1;
    static constexpr int PARTS  = 1;

    const uint8_t * block;
    F               scales[1];

    COLUMNS_INLINE q5_0(const uint8_t * tile, int64_t n_blocks, int64_t b, int first_row) :
        block(tile + b * BLOCK + first_row * 4) {
        scales[0] = V::load_half(tile + n_blocks * BLOCK + (b * TILE_ROWS + first_row) * 2);
    }

    template <int S> COLUMNS_INLINE void weights(int, I * w) const {
        five_bits<V>(block + QS, V::load(block + QH), w, std::make_integer_sequence<int, WORDS>());
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const column & y, int, int) const {
        return V::template dot<WORDS, 31>(V::load_all(y.sums), w, y.qs);
    }

    COLUMNS_INLINE F finish(F sum, const column &) const { return sum; }
};

struct q5_1_layout {
    using source       = block_q5_1;
    using column       = column_block<QK8_0, 1>;
    using column_input = block_q8_0;

    static constexpr ggml_type TYPE  = GGML_TYPE_Q5_1;
    static constexpr size_t PREFETCH = 0;
    static constexpr size_t    D     = 0;
    static constexpr size_t    M     = 32;
    static constexpr size_t    QH    = 64;
    static constexpr size_t    QS    = QH + VECTOR_SIZE;

    static void pack(const source & from, int64_t, int64_t b, int row, uint8_t * tile) {
        const uint32_t high = fifth_bits(from.qh);
        tile += b * spread_size(sizeof(source));
        spread_half(tile + D, row, &from.data.data.d);
        spread_half(tile + M, row, &from.data.data.m);
        spread(tile + QH, row, &high, sizeof(high));
        spread(tile + QS, row, from.qs, sizeof(from.qs));
    }

    static void sums(const block_q8_0 & y, int32_t * sums) { sum_times_zero<-1>(y, sums); }
};

template <class V> struct q5_1 : q5_1_layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 1;
    static constexpr int STEPS  = 1;
    static constexpr int PARTS  = 1;

    const uint8_t * qs;
    F               minimum;
    F               scales[1];

    COLUMNS_INLINE q5_1(const uint8_t * tile, int64_t, int64_t b, int first_row) :
        qs(tile + b * spread_size(sizeof(source)) + QS + first_row * 4),
        minimum(V::load_half(qs - QS - first_row * 2 + M)) {
        scales[0] = V::load_half(qs - QS - first_row * 2 + D);
    }

    template <int S> COLUMNS_INLINE void weights(int, I * w) const {
        five_bits<V>(qs, V::load(qs - QS + QH), w, std::make_integer_sequence<int, WORDS>());
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const column & y, int, int) const {
        return V::template dot<WORDS, 31>(V::word(0), w, y.qs);
    }

    COLUMNS_INLINE F finish(F sum, const column & y) const {
        return V::multiply_add(minimum, V::to_float(V::load_all(y.sums)), sum);
    }
};

struct iq4_xs_layout {
    using source       = block_iq4_xs;
    using column       = column_block<QK_K, QK_K / STEP>;
    using column_input = block_q8_K;

    static constexpr ggml_type TYPE   = GGML_TYPE_IQ4_XS;
    static constexpr size_t PREFETCH = 0;
    static constexpr size_t    D      = 0;
    static constexpr size_t    SCALEH = 32;
    static constexpr size_t    SCALEL = 64;
    static constexpr size_t    QS     = SCALEL + spread_size(QK_K / 64);

    static void pack(const source & from, int64_t, int64_t b, int row, uint8_t * tile) {
        tile += b * spread_size(sizeof(source));
        spread_half(tile + D, row, &from.d);
        spread_half(tile + SCALEH, row, &from.scales_h);
        spread(tile + SCALEL, row, from.scales_l, sizeof(from.scales_l));
        spread(tile + QS, row, from.qs, sizeof(from.qs));
    }

    static void sums(const block_q8_K & y, int32_t * sums) {
        for (int i = 0; i < QK_K / STEP; i++) {
            sums[i] = -128 * sum_of_pair(y, i);
        }
    }
};

template <class V> struct iq4_xs : iq4_xs_layout {
    using I = typename V::I;
    using F = typename V::F;

    static constexpr int GROUPS = 8;
    static constexpr int STEPS  = 1;
    static constexpr int PARTS  = 1;

    const uint8_t * qs;
    F               scales[8];

    COLUMNS_INLINE iq4_xs(const uint8_t * tile, int64_t, int64_t b, int first_row) :
        qs(tile + b * spread_size(sizeof(source)) + QS + first_row * 4) {
        const F d    = V::load_half(qs - QS - first_row * 2 + D);
        const I high = V::load_u16(qs - QS - first_row * 2 + SCALEH);
        const I low  = V::load(qs - QS + SCALEL);
        scales[0]    = V::multiply(d, scale<0>(low, high));
        scales[1]    = V::multiply(d, scale<1>(low, high));
        scales[2]    = V::multiply(d, scale<2>(low, high));
        scales[3]    = V::multiply(d, scale<3>(low, high));
        scales[4]    = V::multiply(d, scale<4>(low, high));
        scales[5]    = V::multiply(d, scale<5>(low, high));
        scales[6]    = V::multiply(d, scale<6>(low, high));
        scales[7]    = V::multiply(d, scale<7>(low, high));
    }

    template <int S> static COLUMNS_INLINE F scale(I low, I high) {
        const I top = shift<V, 4 - 2 * S>(high);
        const I six = V::select(V::word(0x0f), V::template right<4 * S>(low), V::bits_and(top, V::word(0x30)));
        return V::to_float(V::subtract(six, V::word(32)));
    }

    template <int S> COLUMNS_INLINE void weights(int group, I * w) const {
        look_up<V>(qs + group * (WORDS / 2) * VECTOR_SIZE, w);
    }

    template <int S> COLUMNS_INLINE I dot(const I * w, const column & y, int step, int) const {
        return V::template dot_128<WORDS>(y.sums + step, w, y.qs + step * STEP);
    }

    COLUMNS_INLINE F finish(F sum, const column &) const { return sum; }
};

}  // namespace ggml::cpu::columns
