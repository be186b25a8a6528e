#include "kernels.h"

#include "formats.h"

#include <type_traits>
#include <utility>

namespace ggml::cpu::columns {

#ifdef COLUMNS_NATIVE


// Asks for what is read PREFETCH bytes after a step.
template <class V, class Layout> static COLUMNS_INLINE void prefetch_step(const uint8_t * tile, int64_t b, int step, int n_steps) {
    constexpr size_t BLOCK = spread_size(sizeof(typename Layout::source));
    if (Layout::PREFETCH) {
        for (size_t i = 0; i < BLOCK / n_steps; i += VECTOR_SIZE) {
            V::prefetch(tile + b * BLOCK + step * (BLOCK / n_steps) + i + Layout::PREFETCH);
        }
    }
}

template <class V, template <class> class Format, int N, int S>
static COLUMNS_INLINE void multiply_step(const Format<V> & format, int group, const typename Format<V>::column * y,
                                         typename V::F * sums, const uint8_t * tile, int64_t b) {
    using F               = Format<V>;
    constexpr int STEPS   = F::STEPS;
    constexpr int PARTS   = F::PARTS;
    const int     step    = group * STEPS + S;
    prefetch_step<V, F>(tile, b, step, F::GROUPS * STEPS);
    typename V::I w[WORDS];
    format.template weights<S>(group, w);
    for (int c = 0; c < N; c++) {
        for (int part = 0; part < PARTS; part++) {
            const typename V::I sum = format.template dot<S>(w, y[c], step, part);
            sums[c] = V::multiply_add(V::to_float(sum), format.scales[step * PARTS + part], sums[c]);
        }
    }
}

template <class V, template <class> class Format, int N, int... S>
static COLUMNS_INLINE void multiply_group(const Format<V> & format, int group, const typename Format<V>::column * y,
                                          typename V::F * sums, const uint8_t * tile, int64_t b, std::integer_sequence<int, S...>) {
    (multiply_step<V, Format, N, S>(format, group, y, sums, tile, b), ...);
}

template <class V, template <class> class Format, int N>
static void multiply(int64_t n_blocks, const void * tile, const void * columns, float * const * out) {
    using F               = Format<V>;
    constexpr int PARTS   = TILE_ROWS / V::ROWS;
    const auto *  y       = (const typename F::column *) columns;
    typename V::F result[PARTS][N];
    for (int part = 0; part < PARTS; part++) {
        for (int c = 0; c < N; c++) {
            result[part][c] = V::real(0.0f);
        }
    }
    for (int64_t b = 0; b < n_blocks; b++, y += N) {
        for (int part = 0; part < PARTS; part++) {
            const F       format((const uint8_t *) tile, n_blocks, b, part * V::ROWS);
            typename V::F sums[N];
            for (int c = 0; c < N; c++) {
                sums[c] = V::real(0.0f);
            }
            for (int group = 0; group < F::GROUPS; group++) {
                multiply_group<V, Format, N>(format, group, y, sums, (const uint8_t *) tile, b, std::make_integer_sequence<int, F::STEPS>());
            }
            for (int c = 0; c < N; c++) {
                result[part][c] = V::multiply_add(V::real(y[c].d), format.finish(sums[c], y[c]), result[part][c]);
            }
        }
    }
    for (int part = 0; part < PARTS; part++) {
        for (int c = 0; c < N; c++) {
            V::store(out[c] + part * V::ROWS, result[part][c]);
        }
    }
}

template <class Layout> static void pack(const void * rows, size_t row_size, void * tile) {
    const int64_t n_blocks = row_size / sizeof(typename Layout::source);
    for (int64_t b = 0; b < n_blocks; b++) {
        for (int row = 0; row < TILE_ROWS; row++) {
            const auto * from = (const typename Layout::source *) ((const char *) rows + row * row_size) + b;
            Layout::pack(*from, n_blocks, b, row, (uint8_t *) tile);
        }
    }
}

static float scale_of(const block_q8_K & block) {
    return block.d;
}

static float scale_of(const block_q8_0 & block) {
    return ggml_fp16_to_fp32(block.d);
}

template <class Layout> static void pack_column(const void * blocks, int64_t n, void * packed, size_t stride) {
    const auto * from = (const typename Layout::column_input *) blocks;
    for (int64_t b = 0; b < n; b++) {
        auto * to = (typename Layout::column *) ((char *) packed + b * stride);
        static_assert(sizeof(to->qs) == sizeof(from->qs), "blocks of weights and of columns are of one size");
        memcpy(to->qs, from[b].qs, sizeof(to->qs));
        Layout::sums(from[b], to->sums);
        to->d = scale_of(from[b]);
    }
}

template <template <class> class Format, int... N>
static format make_format(std::integer_sequence<int, N...>) {
    using F                = Format<native>;
    constexpr bool super   = std::is_same<typename F::column_input, block_q8_K>::value;
    return {
        F::TYPE,
        super ? GGML_TYPE_Q8_K : GGML_TYPE_Q8_0,
        sizeof(F::column::qs),
        sizeof(typename F::column),
        pack<F>,
        pack_column<F>,
        { multiply<native, Format, N + 1>... },
        multiply<portable, Format, 1>,
        native::COLUMNS,
    };
}

const format * find_format(ggml_type type) {
    static const auto   N         = std::make_integer_sequence<int, native::COLUMNS>();
    static const format formats[] = {
        make_format<q4_0>(N), make_format<q4_1>(N), make_format<q5_0>(N), make_format<q5_1>(N),
        make_format<q8_0>(N), make_format<q2_K>(N), make_format<q3_K>(N), make_format<q4_K>(N),
        make_format<q5_K>(N), make_format<q6_K>(N), make_format<iq4_nl>(N), make_format<iq4_xs>(N),
    };
    for (const format & format : formats) {
        if (format.type == type) {
            return &format;
        }
    }
    return nullptr;
}

#else

const format * find_format(ggml_type) {
    return nullptr;
}

#endif

}  // namespace ggml::cpu::columns
