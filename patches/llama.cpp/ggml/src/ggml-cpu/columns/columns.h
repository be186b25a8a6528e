#pragma once

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// Weights for products with a few columns: 16 rows are interleaved, so that unpacking a weight once serves all columns.
// The result of a column is the same, bit for bit, however many columns and threads there are.
// nullptr where the CPU that this is compiled for has no kernels.
ggml_backend_buffer_type_t ggml_backend_cpu_columns_buffer_type(void);

#ifdef __cplusplus
}
#endif
