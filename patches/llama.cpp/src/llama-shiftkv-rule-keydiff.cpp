#include "llama-shiftkv-rules.h"

// KeyDiff, arXiv:2504.15364: minus the cosine similarity of a key with the mean of the normalised keys. a rotated cache does not
// change it

static void score(llama_shiftkv_scoring & s) {
    const int64_t d = s.l.n_embd_head;

    ggml_tensor * scores = s.scores();
    ggml_tensor * mean   = s.kept("mean", d, s.l.n_head_kv); // its length does not matter

    const auto keys = [&](int64_t h, int64_t i0, int64_t n) {
        return ggml_l2_norm(s.ctx, s.keys_f32(h, i0, n), 1e-12f); // [d, n]
    };
    const auto mean_of = [&](int64_t h) {
        return ggml_view_1d(s.ctx, mean, d, h*mean->nb[1]);
    };

    // so far, in the graph of this number
    ggml_tensor * sum   = nullptr;
    int           graph = 0;

    s.for_each_keys([&](int64_t h, int64_t i0, int64_t n) {
        ggml_tensor * valid = ggml_view_2d(s.ctx, s.valid(0, s.n_prompt()), 1, n, sizeof(float), i0*sizeof(float));
        ggml_tensor * part  = llama_shiftkv_sum_dim1(s.ctx, ggml_mul(s.ctx, keys(h, i0, n), valid));
        part = ggml_reshape_1d(s.ctx, part, d);
        if (i0 > 0) {
            part = ggml_add(s.ctx, graph == s.n_graph ? sum : mean_of(h), part);
        }
        sum   = part;
        graph = s.n_graph;
        s.put(part, mean_of(h));
    });

    s.for_each_keys([&](int64_t h, int64_t i0, int64_t n) {
        ggml_tensor * cosine = ggml_sum_rows(s.ctx, ggml_mul(s.ctx, keys(h, i0, n), ggml_l2_norm(s.ctx, mean_of(h), 1e-12f)));
        s.put(ggml_reshape_1d(s.ctx, ggml_scale(s.ctx, cosine, -1.0f), n), ggml_view_1d(s.ctx, scores, n, h*scores->nb[1] + i0*sizeof(float)));
    });
}

static const llama_shiftkv_register reg({
    /*.name     =*/ "keydiff",
    /*.defaults =*/ [](llama_shiftkv_params &) {},
    /*.valid    =*/ [](const llama_shiftkv_params &) { return true; },
    /*.n_query  =*/ [](const llama_shiftkv_params &) { return 0u; },
    /*.score    =*/ score,
    /*.fill     =*/ nullptr,
});
