#include "llama-shiftkv-rules.h"

#include <algorithm>
#include <cmath>

// MM-ShiftKV (2026.findings-acl.1447)

// halvings of the interval that holds the least mass of a set, after which it is known to about 5 parts in a million
static constexpr int SHIFTKV_HALVINGS = 22;

// mean and standard deviation of the last tokens' hidden states, F32 [1] each
static std::pair<ggml_tensor *, ggml_tensor *> build_stats(llama_shiftkv_scoring & s) {
    ggml_context * ctx = s.ctx;

    const auto rows = s.last_stats(s.params.n_stat);

    ggml_tensor * idxs = s.fixed<int32_t>("stat_rows", GGML_TYPE_I32, rows.size(), 1, [&]() { return rows; });
    ggml_tensor * sums = ggml_cont(ctx, ggml_transpose(ctx, ggml_get_rows(ctx, s.l.stats, idxs)));
    sums = ggml_scale(ctx, ggml_sum_rows(ctx, sums), 1.0f/(rows.size()*s.l.hidden->ne[0])); // [1, 2]

    ggml_tensor * mean = ggml_view_1d(ctx, sums, 1, 0);
    ggml_tensor * var  = ggml_sub(ctx, ggml_view_1d(ctx, sums, 1, sums->nb[1]), ggml_sqr(ctx, mean));

    return { mean, ggml_sqrt(ctx, ggml_mul(ctx, var, ggml_step(ctx, var))) };
}

// 1 for the keys of the smallest set that holds the share of a group's mass, else 0; of each row of masses [n_kv, n].
// in a set are the keys with less than the share above them: all above the least mass t. with more than 1 - share of it spread over
// all keys, t is above (1 - share)*sum/n_kv, and a bisection of its logarithm finds it without sorting
static ggml_tensor * build_sets(ggml_context * ctx, ggml_tensor * mass, float share) {
    ggml_tensor * sum    = ggml_sum_rows(ctx, mass); // [1, n]
    ggml_tensor * target = ggml_scale(ctx, sum, share);

    ggml_tensor * lo = ggml_scale_bias(ctx, sum, (1.0f - share)/mass->ne[0], 1e-30f);
    ggml_tensor * hi = sum;

    for (int i = 0; i < SHIFTKV_HALVINGS; ++i) {
        ggml_tensor * mid   = ggml_mul(ctx, ggml_sqrt(ctx, lo), ggml_sqrt(ctx, hi)); // their product may be too small
        ggml_tensor * above = ggml_sum_rows(ctx, ggml_mul(ctx, ggml_step(ctx, ggml_sub(ctx, mass, mid)), mass));
        ggml_tensor * enough = ggml_step(ctx, ggml_sub(ctx, above, target)); // t is above
        lo = ggml_add(ctx, lo, ggml_mul(ctx, enough, ggml_sub(ctx, mid, lo)));
        hi = ggml_add(ctx, mid, ggml_mul(ctx, enough, ggml_sub(ctx, hi, mid)));
    }
    return ggml_step(ctx, ggml_sub(ctx, mass, lo));
}

static void score(llama_shiftkv_scoring & s) {
    const auto & l      = s.l;
    const auto & params = s.params;

    const int64_t n_kv   = s.n_kv;
    const int64_t n_embd = l.hidden->ne[0];

    // the first layers repeat the last hidden state, in one group
    const bool    repeat  = s.i_layer < params.n_layer_repeat;
    const int64_t n_proxy = repeat ? params.n_repeat : params.n_proxy;
    const int64_t n_group = repeat ? 1 : params.n_group;
    const int64_t n_per   = n_proxy/n_group;

    const auto last = s.last_rows(1);

    // proxy j of group i is column i*n_per + j, at n_past + (j + 1)*n_group
    std::vector<llama_pos> pos(n_proxy);
    for (int64_t i = 0; i < n_proxy; ++i) {
        pos[i] = s.skv.sel.info.n_past + (i % n_per + 1)*n_group;
    }
    // .. and has row j*n_group + i of the noise
    const auto noise = [&](int64_t i0, int64_t n) {
        const auto & all = s.skv.get_noise(params.seed, params.n_proxy);
        std::vector<float> res(n*n_embd);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t row = (i0 + i) % n_per*n_group + (i0 + i)/n_per;
            std::copy_n(all.begin() + row*n_embd, n_embd, res.begin() + i*n_embd);
        }
        return res;
    };

    const auto build_noise = [&](int64_t i0, int64_t n) {
        if (n_proxy*n_embd*sizeof(float) > SHIFTKV_NOISE_KEPT) {
            return s.input(s.skv.store.measure ? std::vector<float>() : noise(i0, n), n_embd, n);
        }
        const auto tag = std::to_string(params.seed) + " " + std::to_string(n_group);
        ggml_tensor * all = s.fixed<float>("noise", GGML_TYPE_F32, n_embd, n_proxy, [&]() { return noise(0, n_proxy); }, tag);
        return ggml_view_2d(s.ctx, all, n_embd, n, all->nb[1], i0*all->nb[1]);
    };

    // the real last query's attention
    ggml_tensor * a_last = s.kept("a_last", n_kv, l.n_head_kv);
    ggml_tensor * q_last = s.keep_queries("last", 1, [&](int64_t, int64_t) { return s.queries(last); });
    s.mean_attention(q_last, false, a_last);

    // steps 1 to 3
    ggml_tensor * q = s.keep_queries("proxies", n_proxy, [&](int64_t i0, int64_t n) {
        ggml_tensor * hidden;
        if (repeat) {
            hidden = ggml_repeat_4d(s.ctx, s.hidden(last), n_embd, n, 1, 1);
        } else {
            const auto [mean, sd] = build_stats(s);
            const auto row = [&](ggml_tensor * t) { return ggml_repeat_4d(s.ctx, t, n_embd, 1, 1, 1); }; // a single number is slow to add
            hidden = ggml_add(s.ctx, ggml_mul(s.ctx, build_noise(i0, n), row(ggml_scale(s.ctx, sd, params.gamma))), row(mean));
        }
        const auto name = (repeat ? "at_repeated" : "at") + std::to_string(i0);
        ggml_tensor * at = s.positions(name.c_str(), { pos.begin() + i0, pos.begin() + i0 + n });
        return l.path.build(s.ctx, hidden, at, s.rotation());
    });

    // steps 4 to 6
    ggml_tensor * scores = s.scores();

    const auto vote = [&](ggml_tensor * sums, int64_t g0, int64_t n_g, int64_t h0, int64_t n_h) {
        ggml_context * ctx = s.ctx;

        const auto heads = [&](ggml_tensor * t) {
            return ggml_view_3d(ctx, t, n_kv, 1, n_h, t->nb[1], t->nb[1], h0*t->nb[1]);
        };

        ggml_tensor * mass = ggml_scale(ctx, sums, 1.0f/(s.n_gqa()*(1 + n_per)));
        mass = ggml_add(ctx, mass, ggml_scale(ctx, heads(a_last), 1.0f/(1 + n_per)));
        mass = ggml_mul(ctx, mass, s.valid(0, s.n_prompt() - 1));

        ggml_tensor * sets  = build_sets(ctx, ggml_reshape_2d(ctx, mass, n_kv, n_g*n_h), params.mass);
        ggml_tensor * votes = llama_shiftkv_sum_dim1(ctx, ggml_reshape_3d(ctx, sets, n_kv, n_g, n_h));

        s.put(ggml_add(ctx, votes, heads(g0 == 0 ? a_last : scores)), heads(scores));
    };
    if (s.on_host) {
        s.vote_on_host(q, n_group, a_last, scores);
    } else {
        s.sum_attention(q, n_group, false, vote);
    }

    if (params.observed > 0.0f) {
        llama_shiftkv_observe(s, s.observed());
    }
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
    /*.score    =*/ score,
    /*.fill     =*/ nullptr,
});
