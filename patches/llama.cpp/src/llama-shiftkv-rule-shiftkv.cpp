#include "llama-shiftkv-rules.h"

#include <cmath>

// MM-ShiftKV (2026.findings-acl.1447)

static ggml_tensor * build(llama_shiftkv_scoring & s) {
    ggml_context * ctx = s.ctx;

    const auto & l      = s.l;
    const auto & params = s.params;

    const int64_t n_kv      = s.n_kv;
    const int64_t n_head_kv = l.n_head_kv;

    // the first layers repeat the last hidden state, in one group
    const bool    repeat      = s.i_layer < params.n_layer_repeat;
    const int64_t n_proxy     = repeat ? params.n_repeat : params.n_proxy;
    const int64_t n_group     = repeat ? 1 : params.n_group;
    const int64_t n_per_group = n_proxy/n_group;

    const auto last = s.capture.ring_rows(s.cells, 1);

    // steps 1 and 2: the proxies' hidden states
    ggml_tensor * hidden;
    if (repeat) {
        hidden = ggml_repeat_4d(ctx, s.hidden(last), l.hidden->ne[0], n_proxy, 1, 1);
    } else {
        float mean = 0.0f;
        float sd   = 0.0f;
        s.capture.get_stats(l, s.cells, params.n_stat, mean, sd);

        hidden = s.input(s.skv.get_noise(params.seed, params.n_proxy).data(), l.hidden->ne[0], n_proxy);
        hidden = ggml_scale_bias(ctx, hidden, params.gamma*sd, mean);
    }

    // step 3: [d, n_head, n_proxy] -> [d, n_proxy, n_head]. proxy j of group i is column j*n_group + i, at n_past + (j + 1)*n_group
    std::vector<llama_pos> pos(n_proxy);
    for (int64_t i = 0; i < n_proxy; ++i) {
        pos[i] = s.skv.sel.info.n_past + (i/n_group + 1)*n_group;
    }
    ggml_tensor * q = s.scaled(ggml_permute(ctx, l.path.build(ctx, hidden, s.input_pos(pos), s.input_rot()), 0, 2, 1, 3));

    ggml_tensor * mask = s.input_mask(std::vector<std::pair<size_t, size_t>>(n_proxy, { 0, s.n_prompt() }));

    // the real last query's attention, mean over the heads of a KV head: [n_kv, 1, n_head_kv]
    ggml_tensor * a_last = ggml_scale(ctx, s.sum_attention(s.scaled(s.queries(last)), mask, 1), 1.0f/s.n_gqa());

    // step 4: the proxies' attention, mean within groups: [n_kv, n_group, n_head_kv]
    ggml_tensor * mass = ggml_scale(ctx, s.sum_attention(q, mask, n_group), 1.0f/(s.n_gqa()*(1 + n_per_group)));
    mass = ggml_add(ctx, mass, ggml_scale(ctx, a_last, 1.0f/(1 + n_per_group)));
    mass = ggml_mul(ctx, mass, s.input_valid(0, s.n_prompt() - 1));

    // step 5: in each group the smallest set of keys that holds the share of its mass
    const int64_t n_sets = n_group*n_head_kv;

    mass = ggml_reshape_2d(ctx, mass, n_kv, n_sets);

    ggml_tensor * order  = ggml_argsort(ctx, mass, GGML_SORT_ORDER_DESC);
    ggml_tensor * sorted = ggml_get_rows(ctx, ggml_reshape_3d(ctx, mass, 1, n_kv, n_sets), order);
    sorted = ggml_reshape_2d(ctx, sorted, n_kv, n_sets);

    ggml_tensor * cum   = ggml_cumsum(ctx, sorted);
    ggml_tensor * total = ggml_cont(ctx, ggml_view_2d(ctx, cum, 1, n_sets, cum->nb[1], (n_kv - 1)*cum->nb[0]));

    // a key is in the set while the mass before it is short of the share
    ggml_tensor * in_set = ggml_sub(ctx, ggml_sub(ctx, cum, sorted), ggml_scale(ctx, total, params.mass));
    in_set = ggml_step(ctx, ggml_neg(ctx, in_set));

    // back to the order of the keys; every element of mass is overwritten
    ggml_tensor * votes = ggml_set_rows(ctx,
            ggml_reshape_3d(ctx, mass, 1, n_kv, n_sets), ggml_reshape_3d(ctx, in_set, 1, n_kv, n_sets), order);
    votes = llama_shiftkv_sum_dim1(ctx, ggml_reshape_3d(ctx, votes, n_kv, n_group, n_head_kv));

    if (params.observed > 0.0f) {
        s.observed = llama_shiftkv_build_observed(s);
    }

    // step 6
    return ggml_reshape_2d(ctx, ggml_add(ctx, votes, a_last), n_kv, n_head_kv);
}

static const llama_shiftkv_register reg({
    /*.name     =*/ "shiftkv",
    /*.defaults =*/ [](llama_shiftkv_params &) {},
    /*.valid    =*/ [](const llama_shiftkv_params & params) {
        return params.n_group >= 1 && params.n_proxy >= params.n_group && params.n_proxy <= SHIFTKV_PROXY_MAX && params.n_proxy % params.n_group == 0 &&
            params.n_stat >= 1 && params.n_repeat >= 1 && params.n_repeat <= SHIFTKV_PROXY_MAX &&
            std::isfinite(params.gamma) && params.gamma >= 0.0f && params.mass > 0.0f && params.mass <= 1.0f &&
            params.observed >= 0.0f && params.observed < 1.0f && (params.observed == 0.0f || params.n_window >= 1);
    },
    /*.n_query  =*/ [](const llama_shiftkv_params & params) { return params.observed > 0.0f ? params.n_window : 1u; },
    /*.n_wide   =*/ [](const llama_shiftkv_params & params) { return params.n_group; },
    /*.build    =*/ build,
    /*.fill     =*/ nullptr,
});
