#include "llama-shiftkv-rules.h"

#include <algorithm>
#include <numeric>

// Expected Attention, arXiv:2510.00636: queries to come are taken to be normally distributed, with the mean and covariance of the
// prompt's before their rotation, turned by the mean rotation R to the positions to come. with u the mean of R q over the prompt's
// queries q, and s the scale of the logits, a key's exp(s k.q) is then expected to be exp(s k.u + s^2/2 mean((k.(R q - u))^2)),
// of which softmax makes attention; times the norm of the value

static void score(llama_shiftkv_scoring & s) {
    const auto & params = s.params;

    const int64_t d      = s.l.n_embd_head;
    const int64_t r      = s.n_gqa();
    const size_t  n_sink = std::min<size_t>(params.n_sink, s.n_prompt() - 1);

    // the first tokens' queries and keys are unlike the others
    const auto    rows = s.last_rows(std::min<size_t>(params.n_window, s.n_prompt() - n_sink));
    const int64_t n    = rows.size();

    // in parts, which need less memory
    const int64_t n_part = std::clamp<int64_t>(2*SHIFTKV_CHUNK/(d*d), 1, (params.n_future + 7)/8);

    ggml_tensor * q = s.keep_queries("window", n, [&](int64_t i0, int64_t n_rows) {
        std::vector<llama_pos> future(params.n_future);
        std::iota(future.begin(), future.end(), s.skv.sel.info.n_past);

        std::vector<ggml_tensor *> pos;
        for (int64_t i = 0; i < params.n_future; i += n_part) {
            pos.push_back(s.positions(("future" + std::to_string(i)).c_str(), { future.begin() + i, future.begin() + std::min<int64_t>(i + n_part, params.n_future) }));
        }
        ggml_tensor * eye = s.fixed<float>("eye", GGML_TYPE_F32, d, d, [&]() {
            std::vector<float> res(d*d, 0.0f);
            for (int64_t i = 0; i < d; ++i) {
                res[i*d + i] = 1.0f;
            }
            return res;
        });
        return s.l.path.build_mean(s.ctx, s.hidden({ rows.begin() + i0, rows.begin() + i0 + n_rows }), pos, s.n_pos_comp, eye, s.rotation());
    });

    ggml_tensor * mean = s.kept("mean_query", d, 1, s.l.n_head);
    s.compute([&]() {
        s.put(ggml_scale(s.ctx, llama_shiftkv_sum_dim1(s.ctx, q), 1.0f/n), mean);
    });
    s.compute([&]() {
        s.put(ggml_sub(s.ctx, q, mean), q);
    });

    ggml_tensor * scores = s.scores();

    const auto variance = [&](ggml_tensor * k, ggml_tensor * q, int64_t) {
        return ggml_sqr(s.ctx, s.product(k, q));
    };
    s.sum_queries(q, 1, true, variance, [&](ggml_tensor * sums, int64_t, int64_t, int64_t h0, int64_t n_h) {
        ggml_tensor * linear = s.product(s.keys(h0, n_h), ggml_view_3d(s.ctx, mean, d, 1, n_h*r, mean->nb[1], mean->nb[2], h0*r*mean->nb[2]));
        ggml_tensor * logits = ggml_add(s.ctx, ggml_scale(s.ctx, sums, 0.5f/n), ggml_reshape_3d(s.ctx, linear, s.n_kv, r, n_h));

        ggml_tensor * a = ggml_soft_max_ext(s.ctx, ggml_reshape_3d(s.ctx, logits, s.n_kv, 1, r*n_h), s.mask(n_sink, s.n_prompt()), 1.0f, 0.0f);
        a = llama_shiftkv_sum_dim1(s.ctx, ggml_reshape_3d(s.ctx, a, s.n_kv, r, n_h));
        s.put(ggml_scale(s.ctx, a, 1.0f/r), ggml_view_3d(s.ctx, scores, s.n_kv, 1, n_h, scores->nb[1], scores->nb[1], h0*scores->nb[1]));
    });

    s.for_each_keys([&](int64_t h, int64_t i0, int64_t n) {
        ggml_tensor * part = ggml_view_1d(s.ctx, scores, n, h*scores->nb[1] + i0*sizeof(float));
        s.put(ggml_mul(s.ctx, part, s.value_norms(h, i0, n)), part);
    });
}

static const llama_shiftkv_register reg({
    /*.name     =*/ "expected-attention",
    /*.defaults =*/ [](llama_shiftkv_params & params) { params.n_sink = 4; params.n_window = SHIFTKV_QUERY_MAX; },
    /*.valid    =*/ [](const llama_shiftkv_params & params) {
        return params.n_window >= 1 && params.n_future >= 1 && params.n_future <= SHIFTKV_PROXY_MAX;
    },
    /*.n_query  =*/ [](const llama_shiftkv_params & params) { return params.n_window; },
    /*.score    =*/ score,
    /*.fill     =*/ nullptr,
});
