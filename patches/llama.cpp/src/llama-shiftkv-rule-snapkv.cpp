#include "llama-shiftkv-rules.h"

// SnapKV, arXiv:2404.14469: the mean attention of the last queries, each of which sees the tokens up to its own, over the heads of
// a KV head. that the window itself is kept, and the averaging over neighbouring keys, are parameters of every method

void llama_shiftkv_observe(llama_shiftkv_scoring & s, ggml_tensor * to) {
    const auto rows = s.last_rows(s.params.n_window);

    ggml_tensor * q = s.keep_queries("window", rows.size(), [&](int64_t i0, int64_t n) {
        return s.queries({ rows.begin() + i0, rows.begin() + i0 + n });
    });
    s.mean_attention(q, true, to);
}

static const llama_shiftkv_register reg({
    /*.name     =*/ "snapkv",
    /*.defaults =*/ [](llama_shiftkv_params & params) { params.n_recent = 32; params.n_pool = 5; },
    /*.valid    =*/ [](const llama_shiftkv_params & params) { return params.n_window >= 1; },
    /*.n_query  =*/ [](const llama_shiftkv_params & params) { return params.n_window; },
    /*.score    =*/ [](llama_shiftkv_scoring & s) { llama_shiftkv_observe(s, s.scores()); },
    /*.fill     =*/ nullptr,
});
