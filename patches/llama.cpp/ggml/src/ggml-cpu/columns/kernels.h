#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

namespace ggml::cpu::columns {

// Rows that a tile holds; columns that are multiplied at once
constexpr int ROWS        = 16;
constexpr int MAX_COLUMNS = 8;

// Products of 16 rows, packed in a tile, with n columns. Columns are packed block by block: block b of column c is the
// number b * n + c. Each entry of `out` is where a column's 16 results go.
typedef void (*multiply_t)(int64_t n_blocks, const void * tile, const void * columns, float * const * out);

struct format {
    ggml_type type;
    ggml_type column_type;  // what a column is rounded to
    int64_t   block;        // weights and values of a block
    size_t    column_size;  // bytes of a packed block of a column

    // Packs ROWS rows, `row_size` bytes apart. The tile takes ROWS * row_size bytes.
    void (*pack)(const void * rows, size_t row_size, void * tile);
    // Packs n blocks of one column that are `stride` bytes apart in the result.
    void (*pack_column)(const void * blocks, int64_t n, void * packed, size_t stride);
    // by number of columns - 1
    multiply_t multiply[MAX_COLUMNS];
    multiply_t reference;  // one column in plain C++, with the same bits

    int max_columns;
};

// nullptr where the type has no kernels, or the CPU that this is compiled for none at all
const format * find_format(ggml_type type);

}  // namespace ggml::cpu::columns
