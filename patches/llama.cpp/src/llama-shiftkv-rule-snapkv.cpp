#include "llama-shiftkv-rules.h"

// SnapKV, arXiv:2404.14469: the mean attention of the last queries, each of which sees the tokens up to its own, over the heads of
// a KV head. that the window itself is kept, and the averaging over neighbouring keys, are parameters of every method

ggml_tensor * llama_shiftkv_build_observed(llama_shiftkv_scoring & s) {
    const auto rows = s.capture.ring_rows(s.cells, s.params.n_window);

    const size_t n_window = rows.size();

    std::vector<std::pair<size_t, size_t>> ranges;
    for (size_t i = 0; i < n_window; ++i) {
        ranges.emplace_back(0, s.n_prompt() - n_window + i + 1);
    }

    ggml_tensor * sum = s.sum_attention(s.scaled(s.queries(rows)), s.input_mask(ranges), 1);

    return ggml_reshape_2d(s.ctx, ggml_scale(s.ctx, sum, 1.0f/(n_window*s.n_gqa())), s.n_kv, s.l.n_head_kv);
}

static const llama_shiftkv_register reg({
    /*.name     =*/ "snapkv",
    /*.defaults =*/ [](llama_shiftkv_params & params) { params.n_recent = 32; params.n_pool = 5; },
    /*.valid    =*/ [](const llama_shiftkv_params & params) { return params.n_window >= 1; },
    /*.n_query  =*/ [](const llama_shiftkv_params & params) { return params.n_window; },
    /*.n_wide   =*/ nullptr,
    /*.build    =*/ llama_shiftkv_build_observed,
    /*.fill     =*/ nullptr,
});
