#include "columns.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "kernels.h"
#include "traits.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <algorithm>
#include <cmath>

namespace ggml::cpu::columns {

// Values that are rounded at a time, and the most bytes they take then
constexpr int64_t PIECE      = 256;
constexpr size_t  PIECE_SIZE = 512;

// Where several groups of columns follow each other, the weights of a chunk stay in the second-level cache.
constexpr size_t CHUNK_SIZE = 256 * 1024;

// Columns are multiplied in groups of nearly the same size. A group's packed columns lie together.
struct column_groups {
    int64_t n_columns;
    int64_t n_groups;

    column_groups(int64_t n_columns, int64_t max_columns) :
        n_columns(n_columns),
        n_groups((n_columns + max_columns - 1) / max_columns) {}

    int64_t first(int64_t group) const { return group * n_columns / n_groups; }

    int size(int64_t group) const { return int(first(group + 1) - first(group)); }
};

// The part of the tensor that a column is
template <typename T> static T * column_data(const ggml_tensor * tensor, int64_t column) {
    const int64_t i1 = column % tensor->ne[1];
    const int64_t i2 = column / tensor->ne[1] % tensor->ne[2];
    const int64_t i3 = column / tensor->ne[1] / tensor->ne[2];
    return (T *) ((char *) tensor->data + i1 * tensor->nb[1] + i2 * tensor->nb[2] + i3 * tensor->nb[3]);
}

// What llama.cpp's quantize_row_q8_K does, in loops that a compiler makes vectors of
static void round_q8_K(const float * x, void * blocks, int64_t n_values) {
    constexpr int LANES = 16;
    for (auto * y = (block_q8_K *) blocks; n_values > 0; n_values -= QK_K, x += QK_K, y++) {
        float high[LANES] = {};
        float low[LANES]  = {};
        for (int i = 0; i < QK_K; i += LANES) {
            for (int lane = 0; lane < LANES; lane++) {
                high[lane] = x[i + lane] > high[lane] ? x[i + lane] : high[lane];
                low[lane]  = x[i + lane] < low[lane] ? x[i + lane] : low[lane];
            }
        }
        const float highest = *std::max_element(high, high + LANES);
        const float lowest  = *std::min_element(low, low + LANES);
        const float largest = highest > -lowest ? highest : lowest;
        const float scale   = largest == 0.0f ? 0.0f : -127.0f / largest;
        for (int i = 0; i < QK_K; i++) {
            y->qs[i] = int8_t(int32_t(std::rint(scale * x[i])));
        }
        for (int i = 0; i < QK_K / 16; i++) {
            int32_t sum = 0;
            for (int j = 0; j < 16; j++) {
                sum += y->qs[16 * i + j];
            }
            y->bsums[i] = int16_t(sum);
        }
        y->d = largest == 0.0f ? 0.0f : 1.0f / scale;
    }
}

// Rounds and packs the thread's share of the columns.
static void pack_columns(const ggml_compute_params * params, const format & format, const column_groups & groups,
                         const ggml_tensor * src) {
    const int64_t n_values   = src->ne[0];
    const int64_t n_blocks   = n_values / format.block;
    const int64_t n_pieces   = (n_values + PIECE - 1) / PIECE;
    const auto    from_float =
        format.column_type == GGML_TYPE_Q8_K ? round_q8_K : ggml_get_type_traits_cpu(format.column_type)->from_float;
    const int64_t end        = groups.n_columns * n_pieces * (params->ith + 1) / params->nth;
    int64_t       group      = 0;
    for (int64_t i = groups.n_columns * n_pieces * params->ith / params->nth; i < end; i++) {
        const int64_t column = i / n_pieces;
        const int64_t begin  = i % n_pieces * PIECE;
        const int64_t length = std::min(PIECE, n_values - begin);
        while (column >= groups.first(group + 1)) {
            group++;
        }
        const int64_t width = groups.size(group);
        const int64_t index = groups.first(group) * n_blocks + begin / format.block * width + column - groups.first(group);

        alignas(64) char rounded[PIECE_SIZE];
        from_float(column_data<float>(src, column) + begin, rounded, length);
        format.pack_column(rounded, length / format.block, (char *) params->wdata + index * format.column_size,
                           width * format.column_size);
    }
}

static void multiply(ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * weights  = dst->src[0];
    const ggml_tensor * src      = dst->src[1];
    const format &      format   = *find_format(weights->type);
    const int64_t       n_blocks = weights->ne[0] / format.block;
    const int64_t       n_tiles  = weights->ne[1] / ROWS;
    const size_t        tile     = weights->nb[1] * ROWS;
    const column_groups groups(ggml_nrows(src), params->use_ref ? 1 : format.max_columns);

    GGML_ASSERT(params->wsize >= groups.n_columns * n_blocks * format.column_size);
    pack_columns(params, format, groups, src);

    int64_t chunk = std::max<int64_t>(1, n_tiles / (8 * params->nth));
    if (groups.n_groups > 1) {
        chunk = std::min(chunk, std::max<int64_t>(1, CHUNK_SIZE / tile));
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    for (int64_t begin = params->ith * chunk; begin < n_tiles;
         begin         = ggml_threadpool_chunk_add(params->threadpool, 1) * chunk) {
        const int64_t end = std::min(begin + chunk, n_tiles);
        for (int64_t group = 0; group < groups.n_groups; group++) {
            const int64_t first      = groups.first(group);
            const int     width      = groups.size(group);
            const auto    kernel     = params->use_ref ? format.reference : format.multiply[width - 1];
            const char *  columns    = (const char *) params->wdata + first * n_blocks * format.column_size;
            float *       out[MAX_COLUMNS];
            for (int c = 0; c < width; c++) {
                out[c] = column_data<float>(dst, first + c) + begin * ROWS;
            }
            for (int64_t i = begin; i < end; i++) {
                kernel(n_blocks, (const char *) weights->data + i * tile, columns, out);
                for (int c = 0; c < width; c++) {
                    out[c] += ROWS;
                }
            }
        }
    }
}

class tensor_traits : public ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor * op, size_t & size) override {
        const format & format = *find_format(op->src[0]->type);
        size                  = ggml_nrows(op->src[1]) * (op->src[1]->ne[0] / format.block) * format.column_size;
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        multiply(params, op);
        return true;
    }
};

class extra_buffer_type : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * weights = op->src[0];
        const ggml_tensor * src     = op->src[1];
        if (op->op != GGML_OP_MUL_MAT || !is_here(weights) || weights->view_src || ggml_n_dims(weights) > 2) {
            return false;
        }
        const format * format = find_format(weights->type);
        return format && weights->ne[0] % format->block == 0 && weights->ne[1] % ROWS == 0 &&
               src->type == GGML_TYPE_F32 && src->nb[0] == sizeof(float) &&
               (!src->buffer || ggml_backend_buft_is_host(src->buffer->buft));
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        static tensor_traits traits;
        return op->op == GGML_OP_MUL_MAT && is_here(op->src[0]) ? &traits : nullptr;
    }

    static bool is_here(const ggml_tensor * tensor) {
        return tensor->buffer && tensor->buffer->buft == ggml_backend_cpu_columns_buffer_type();
    }
};

}  // namespace ggml::cpu::columns

static void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor));
    const ggml::cpu::columns::format * format = ggml::cpu::columns::find_format(tensor->type);
    const size_t                       tile   = tensor->nb[1] * ggml::cpu::columns::ROWS;
    GGML_ASSERT(format && size % tile == 0);
    for (size_t i = 0; i < size; i += tile) {
        format->pack((const char *) data + i, tensor->nb[1], (char *) tensor->data + i);
    }
}

static const char * get_name(ggml_backend_buffer_type_t) {
    return "CPU_COLUMNS";
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        buffer->buft             = buft;
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = nullptr;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

static size_t get_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

ggml_backend_buffer_type_t ggml_backend_cpu_columns_buffer_type(void) {
    if (!ggml::cpu::columns::find_format(GGML_TYPE_Q4_K)) {
        return nullptr;
    }
    static ggml_backend_buffer_type type = {
        /* .iface   = */ {
            /* .get_name       = */ get_name,
            /* .alloc_buffer   = */ alloc_buffer,
            /* .get_alignment  = */ get_alignment,
            /* .get_max_size   = */ nullptr,
            /* .get_alloc_size = */ nullptr,
            /* .is_host        = */ nullptr,
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ new ggml::cpu::columns::extra_buffer_type(),
    };
    return &type;
}
