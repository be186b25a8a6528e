#include "llama-shiftkv-pick.h"

#include <algorithm>
#include <cmath>

namespace {

// some KV heads' scores at a time, as rows in the prompt's order, [n_prompt, heads]
struct picker {
    llama_shiftkv_scoring & s;

    const int64_t n;      // of the prompt
    const int64_t first;  // the tokens between are those that have to be chosen from
    const int64_t last;

    ggml_context * ctx() const { return s.ctx; }

    bool in_a_row() const {
        return std::adjacent_find(s.cells.begin(), s.cells.end(), [](uint32_t a, uint32_t b) { return b != a + 1; }) == s.cells.end();
    }

    ggml_tensor * index() { // F32 [n]: 0 .. n - 1
        if (in_a_row()) {
            return ggml_view_1d(ctx(), s.order(), n, (s.cells[0] - s.c0)*sizeof(float));
        }
        return s.fixed<float>("index", GGML_TYPE_F32, n, 1, [&]() {
            std::vector<float> res(n);
            for (int64_t i = 0; i < n; ++i) {
                res[i] = i;
            }
            return res;
        });
    }

    // F32 [n]: 1 for the tokens a .. b - 1, else 0
    ggml_tensor * between(int64_t a, int64_t b) {
        return ggml_mul(ctx(), ggml_step(ctx(), ggml_scale_bias(ctx(), index(), 1.0f, 0.5f - a)), ggml_step(ctx(), ggml_scale_bias(ctx(), index(), -1.0f, b - 0.5f)));
    }

    // rows of scores by cell
    ggml_tensor * in_order(ggml_tensor * scores, int64_t h0, int64_t n_h) {
        const auto & cells = s.cells;

        ggml_tensor * rows = ggml_view_2d(ctx(), scores, s.n_kv, n_h, scores->nb[1], h0*scores->nb[1]);

        if (in_a_row()) {
            return ggml_cont(ctx(), ggml_view_2d(ctx(), rows, n, n_h, rows->nb[1], (cells[0] - s.c0)*sizeof(float)));
        }
        ggml_tensor * idxs = s.fixed<int32_t>("cells", GGML_TYPE_I32, n, 1, [&]() {
            std::vector<int32_t> res(n);
            std::transform(cells.begin(), cells.end(), res.begin(), [&](uint32_t c) { return c - s.c0; });
            return res;
        });
        rows = ggml_get_rows(ctx(), ggml_cont(ctx(), ggml_transpose(ctx(), rows)), idxs); // [n_h, n]
        return ggml_cont(ctx(), ggml_transpose(ctx(), rows));
    }

    // averaged over neighbours before the last tokens, with zeros around them
    ggml_tensor * pooled(ggml_tensor * rows, int64_t n_h_max) {
        const int64_t n_pool = s.params.n_pool;
        const int64_t n_side = n_pool/2;
        if (n_side == 0) {
            return rows;
        }
        ggml_tensor * padded = s.zeros("padded", n + 2*n_side, n_h_max);

        ggml_tensor * inner = ggml_cpy(ctx(), ggml_mul(ctx(), rows, between(0, last)),
                ggml_view_2d(ctx(), padded, n, rows->ne[1], padded->nb[1], n_side*sizeof(float)));
        ggml_build_forward_expand(s.gf, inner);

        ggml_tensor * sum = nullptr;
        for (int64_t i = 0; i < n_pool; ++i) {
            ggml_tensor * part = ggml_view_2d(ctx(), padded, n, rows->ne[1], padded->nb[1], i*sizeof(float));
            sum = sum ? ggml_add(ctx(), sum, part) : ggml_cont(ctx(), part);
            ggml_build_forward_expand(s.gf, sum);
        }
        return ggml_div(ctx(), sum, ggml_scale_bias(ctx(), ggml_view_1d(ctx(), index(), 1, 0), 0.0f, n_pool));
    }

    // F32 like rows: 1 for the best n_best of those that are 1 in open, of equal ones the first; else 0
    ggml_tensor * best(ggml_tensor * rows, ggml_tensor * open, int64_t n_best) {
        const int64_t n_h = rows->ne[1];

        const auto negative = [&](ggml_tensor * t) { return ggml_scale(ctx(), t, -1.0f); };

        rows = ggml_add(ctx(), ggml_mul(ctx(), rows, open), ggml_scale_bias(ctx(), open, 1e30f, -1e30f));

        // the least score to be kept: one number of each row
        ggml_tensor * order = ggml_argsort(ctx(), rows, GGML_SORT_ORDER_DESC);
        ggml_tensor * nth   = ggml_view_2d(ctx(), order, 1, n_h, order->nb[1], (n_best - 1)*order->nb[0]);
        ggml_tensor * least = ggml_reshape_2d(ctx(), ggml_get_rows(ctx(), ggml_reshape_3d(ctx(), rows, 1, n, n_h), nth), 1, n_h);

        // a sort may leave equal ones in any order
        ggml_tensor * over  = ggml_sub(ctx(), rows, least);
        ggml_tensor * above = ggml_step(ctx(), over);
        ggml_tensor * equal = ggml_sub(ctx(), ggml_sub(ctx(), open, above), ggml_mul(ctx(), open, ggml_step(ctx(), negative(over))));
        ggml_tensor * room  = ggml_scale_bias(ctx(), ggml_sum_rows(ctx(), above), -1.0f, n_best + 0.5f);
        ggml_tensor * fits  = ggml_step(ctx(), negative(ggml_sub(ctx(), ggml_cumsum(ctx(), equal), room)));

        return ggml_add(ctx(), above, ggml_mul(ctx(), equal, fits));
    }
};

}

bool llama_shiftkv_pick(llama_shiftkv_scoring & s) {
    auto & sel = s.skv.sel;

    const int64_t n         = s.n_prompt();
    const int64_t n_kept    = sel.info.n_kept;
    const int64_t n_head_kv = s.l.n_head_kv;

    const auto [n_sink, i_recent] = sel.always_kept(s.params);

    const int64_t n_rest     = n_kept - n_sink - (n - i_recent);
    const int64_t n_observed = s.params.observed > 0.0f ? sel.n_observed(s.params) : 0;

    picker p = { s, n, (int64_t) n_sink, (int64_t) i_recent };

    ggml_tensor * kept  = s.skv.store.get(s.buft(), "kept", GGML_TYPE_I32, n_kept, n_head_kv);
    ggml_tensor * check = s.kept("check", n_head_kv);

    const int64_t n_h_max = std::clamp<int64_t>(SHIFTKV_CHUNK/2/n, 1, n_head_kv);
    for (int64_t h0 = 0; h0 < n_head_kv; h0 += n_h_max) {
        const int64_t n_h = std::min(n_h_max, n_head_kv - h0);

        s.compute([&]() {
            ggml_context * ctx = s.ctx;

            ggml_tensor * ranks    = p.in_order(s.scores(), h0, n_h);
            ggml_tensor * observed = s.params.observed > 0.0f ? p.in_order(s.observed(), h0, n_h) : nullptr;

            // NaN if any of them is
            ggml_tensor * sum = ggml_sum_rows(ctx, observed ? ggml_add(ctx, ranks, observed) : ranks);
            s.put(ggml_reshape_1d(ctx, sum, n_h), ggml_view_1d(ctx, check, n_h, h0*sizeof(float)));

            (observed ? observed : ranks) = p.pooled(observed ? observed : ranks, n_h_max);

            ggml_tensor * open  = ggml_repeat_4d(ctx, p.between(p.first, p.last), n, n_h, 1, 1);
            ggml_tensor * taken = ggml_scale_bias(ctx, open, -1.0f, 1.0f); // those always kept

            const auto take = [&](ggml_tensor * rows, int64_t n_best) {
                if (n_best > 0) {
                    ggml_tensor * part = p.best(rows, open, n_best);
                    open  = ggml_sub(ctx, open, part);
                    taken = ggml_add(ctx, taken, part);
                }
            };
            take(observed, n_observed);
            take(ranks, n_rest - n_observed);

            // all numbers are different: those taken come first, in the prompt's order
            ggml_tensor * order = ggml_argsort(ctx, ggml_sub(ctx, ggml_scale(ctx, taken, 2.0f*n), p.index()), GGML_SORT_ORDER_DESC);
            s.put(ggml_view_2d(ctx, order, n_kept, n_h, order->nb[1], 0), ggml_view_2d(ctx, kept, n_kept, n_h, kept->nb[1], h0*kept->nb[1]));
        });
    }

    if (s.skv.store.measure) {
        return true;
    }

    std::vector<float> sums(n_head_kv);
    s.skv.get(check, sums.data());
    if (std::any_of(sums.begin(), sums.end(), [](float v) { return std::isnan(v); })) {
        return false;
    }

    auto & rows = sel.kept[s.i_layer];
    std::vector<int32_t> all(n_kept*n_head_kv);
    ggml_backend_tensor_get(kept, all.data(), 0, ggml_nbytes(kept));
    for (int64_t h = 0; h < n_head_kv; ++h) {
        rows.emplace_back(all.begin() + h*n_kept, all.begin() + (h + 1)*n_kept);
    }
    return true;
}
