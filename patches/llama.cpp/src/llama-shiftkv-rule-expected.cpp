#include "llama-shiftkv-rules.h"

#include <algorithm>
#include <numeric>

// Expected Attention, arXiv:2510.00636: queries to come are taken to be normally distributed, with the mean and covariance of the
// prompt's before their rotation, turned by the mean rotation R to the positions to come. with u the mean of R q over the prompt's
// queries q, and s the scale of the logits, a key's exp(s k.q) is then expected to be exp(s k.u + s^2/2 mean((k.(R q - u))^2)),
// of which softmax makes attention; times the norm of the value

static ggml_tensor * build(llama_shiftkv_scoring & s) {
    ggml_context * ctx = s.ctx;

    const auto & params = s.params;

    const int64_t d      = s.l.n_embd_head;
    const size_t  n_sink = std::min<size_t>(params.n_sink, s.n_prompt() - 1);

    // the first tokens' queries and keys are unlike the others
    const auto rows = s.capture.ring_rows(s.cells, std::min<size_t>(params.n_window, s.n_prompt() - n_sink));

    // in parts, which need less memory
    const uint32_t n_part = (params.n_future + 7)/8;
    std::vector<ggml_tensor *> pos;
    for (uint32_t i = 0; i < params.n_future; i += n_part) {
        std::vector<llama_pos> part(std::min(n_part, params.n_future - i));
        std::iota(part.begin(), part.end(), s.skv.sel.info.n_past + i);
        pos.push_back(s.input_pos(part));
    }

    std::vector<float> eye(d*d, 0.0f);
    for (int64_t i = 0; i < d; ++i) {
        eye[i*d + i] = 1.0f;
    }

    ggml_tensor * q = s.l.path.build_mean(ctx, s.hidden(rows), pos, s.n_pos_comp, s.input(std::move(eye), d, d), s.input_rot());
    q = s.scaled(ggml_permute(ctx, q, 0, 2, 1, 3)); // [d, rows, n_head]

    ggml_tensor * mean = ggml_scale(ctx, llama_shiftkv_sum_dim1(ctx, q), 1.0f/rows.size());

    ggml_tensor * logits = s.sum_queries(ggml_sub(ctx, q, mean), 1, true, [&](ggml_tensor * k, ggml_tensor * q, int64_t) {
        return ggml_sqr(ctx, s.product(k, q));
    });
    logits = ggml_scale(ctx, logits, 0.5f/rows.size());
    logits = ggml_add(ctx, logits, s.product(s.keys(0, s.l.n_head_kv), mean)); // [n_kv, 1, n_head]

    ggml_tensor * a = ggml_soft_max_ext(ctx, logits, s.input_mask({ { n_sink, s.n_prompt() } }), 1.0f, 0.0f);
    a = llama_shiftkv_sum_dim1(ctx, ggml_reshape_3d(ctx, a, s.n_kv, s.n_gqa(), s.l.n_head_kv));
    a = ggml_scale(ctx, ggml_reshape_2d(ctx, a, s.n_kv, s.l.n_head_kv), 1.0f/s.n_gqa());

    return ggml_mul(ctx, a, s.value_norms());
}

static const llama_shiftkv_register reg({
    /*.name     =*/ "expected-attention",
    /*.defaults =*/ [](llama_shiftkv_params & params) { params.n_sink = 4; params.n_window = SHIFTKV_QUERY_MAX; },
    /*.valid    =*/ [](const llama_shiftkv_params & params) {
        return params.n_window >= 1 && params.n_future >= 1 && params.n_future <= SHIFTKV_PROXY_MAX;
    },
    /*.n_query  =*/ [](const llama_shiftkv_params & params) { return params.n_window; },
    /*.n_wide   =*/ nullptr,
    /*.build    =*/ build,
    /*.fill     =*/ nullptr,
});
