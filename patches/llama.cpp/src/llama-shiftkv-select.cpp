#include "llama-shiftkv-impl.h"
#include "llama-shiftkv-rules.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

// intermediate results of the attention of many queries stay below this, where a KV head allows
static constexpr size_t SHIFTKV_CHUNK_BYTES = 64u*1024*1024;

// a small model's graphs have room for 1024 tensors (llama_context::graph_max_nodes()); a chunk of the most proxies takes fewer than 90
static constexpr int64_t SHIFTKV_CHUNKS_MAX = 8;

static constexpr uint32_t SHIFTKV_POOL_MAX = 63;

const llama_shiftkv_rule * llama_shiftkv_get_rule(llama_shiftkv_method method) {
    switch (method) {
        case LLAMA_SHIFTKV_METHOD_SHIFTKV:   return &llama_shiftkv_rule_shiftkv;
        case LLAMA_SHIFTKV_METHOD_STREAMING: return &llama_shiftkv_rule_streaming;
        case LLAMA_SHIFTKV_METHOD_SNAPKV:    return &llama_shiftkv_rule_snapkv;
        case LLAMA_SHIFTKV_METHOD_KEYDIFF:   return &llama_shiftkv_rule_keydiff;
        case LLAMA_SHIFTKV_METHOD_EXPECTED:  return &llama_shiftkv_rule_expected;
        case LLAMA_SHIFTKV_METHOD_RANDOM:    return &llama_shiftkv_rule_random;
    }
    return nullptr;
}

llama_shiftkv_params llama_shiftkv_default_params(llama_shiftkv_method method) {
    llama_shiftkv_params params = {
        /*.method         =*/ method,
        /*.budget         =*/ 0,
        /*.n_prompt       =*/ 0,
        /*.n_sink         =*/ 0,
        /*.n_recent       =*/ 1,
        /*.n_pool         =*/ 1,
        /*.n_window       =*/ 32,
        /*.n_future       =*/ 512,
        /*.n_proxy        =*/ 512,
        /*.n_group        =*/ 16,
        /*.n_stat         =*/ 512,
        /*.n_layer_repeat =*/ 2,
        /*.n_repeat       =*/ 16,
        /*.gamma          =*/ 10.0f,
        /*.mass           =*/ 0.95f,
        /*.observed       =*/ 0.0f,
        /*.seed           =*/ 0,
        /*.keep_scores    =*/ false,
    };
    if (const auto * rule = llama_shiftkv_get_rule(method)) {
        rule->defaults(params);
    }
    return params;
}

// standard normal numbers: Mersenne twister and Box-Muller, the same on every platform
static std::vector<float> gen_noise(uint32_t seed, size_t n) {
    constexpr double two_pi = 6.283185307179586;

    std::mt19937 rng(seed);

    std::vector<float> res(n + n%2);
    for (size_t i = 0; i < res.size(); i += 2) {
        const double u = (rng() + 1.0)/4294967296.0; // (0, 1]
        const double v = rng()/4294967296.0;
        const double r = std::sqrt(-2.0*std::log(u));

        res[i]     = r*std::cos(two_pi*v);
        res[i + 1] = r*std::sin(two_pi*v);
    }
    res.resize(n);

    return res;
}

const std::vector<float> & llama_shiftkv::get_noise(uint32_t seed, uint32_t n_proxy) {
    const size_t n = (size_t) lctx.get_model().hparams.n_embd*n_proxy;
    if (noise.size() != n || noise_seed != seed) {
        noise      = gen_noise(seed, n);
        noise_seed = seed;
    }
    return noise;
}

//
// what rules build with
//

// by halves: every backend adds views, not all sum over an outer dimension
ggml_tensor * llama_shiftkv_sum_dim1(ggml_context * ctx, ggml_tensor * x) {
    ggml_tensor * rest = nullptr;

    const auto rows = [&](ggml_tensor * t, int64_t i, int64_t n) {
        return ggml_view_3d(ctx, t, t->ne[0], n, t->ne[2], t->nb[1], t->nb[2], i*t->nb[1]);
    };

    while (x->ne[1] > 1) {
        const int64_t n = x->ne[1];
        if (n % 2 == 1) {
            ggml_tensor * last = rows(x, n - 1, 1);
            rest = rest ? ggml_add(ctx, last, rest) : last;
        }
        x = ggml_add(ctx, rows(x, 0, n/2), rows(x, n/2, n/2));
    }

    return rest ? ggml_add(ctx, x, rest) : x;
}

// concatenate along dimension 2, by halves
static ggml_tensor * concat_dim2(ggml_context * ctx, std::vector<ggml_tensor *> parts) {
    while (parts.size() > 1) {
        std::vector<ggml_tensor *> next;
        for (size_t i = 0; i + 1 < parts.size(); i += 2) {
            next.push_back(ggml_concat(ctx, parts[i], parts[i + 1], 2));
        }
        if (parts.size() % 2 == 1) {
            next.push_back(parts.back());
        }
        parts = std::move(next);
    }
    return parts[0];
}

// attention of queries to keys: k [d, n_kv, h_kv], q [d, n_q, r*h_kv] -> [n_kv, n_q, r*h_kv]
static ggml_tensor * build_attn_weights(ggml_context * ctx, ggml_tensor * k, ggml_tensor * q, ggml_tensor * mask, float kq_scale, float soft_cap) {
    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    if (soft_cap != 0.0f) {
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, kq_scale/soft_cap)), soft_cap);
        kq_scale = 1.0f;
    }

    return ggml_soft_max_ext(ctx, kq, mask, kq_scale, 0.0f);
}

static ggml_tensor * new_input(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    return t;
}

ggml_tensor * llama_shiftkv_scoring::input(std::vector<float> data, int64_t ne0, int64_t ne1) {
    ggml_tensor * t = new_input(ctx, GGML_TYPE_F32, ne0, ne1);
    inputs.push_back([t, data = std::move(data)]() { ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t)); });
    return t;
}

ggml_tensor * llama_shiftkv_scoring::input(const float * data, int64_t ne0, int64_t ne1) {
    ggml_tensor * t = new_input(ctx, GGML_TYPE_F32, ne0, ne1);
    inputs.push_back([t, data]() { ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t)); });
    return t;
}

ggml_tensor * llama_shiftkv_scoring::input(std::vector<int32_t> data) {
    ggml_tensor * t = new_input(ctx, GGML_TYPE_I32, data.size(), 1);
    inputs.push_back([t, data = std::move(data)]() { ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t)); });
    return t;
}

ggml_tensor * llama_shiftkv_scoring::input_pos(const std::vector<llama_pos> & pos) {
    if (!l.path.uses(llama_shiftkv_path::POS)) {
        return nullptr;
    }
    // a text token's in M-RoPE: three times the same, then 0
    std::vector<int32_t> data(pos.size()*n_pos_comp, 0);
    for (int64_t c = 0; c < std::min<int64_t>(n_pos_comp, 3); ++c) {
        std::copy(pos.begin(), pos.end(), data.begin() + c*pos.size());
    }
    return input(std::move(data));
}

ggml_tensor * llama_shiftkv_scoring::input_rot() {
    if (!l.path.uses(llama_shiftkv_path::ROT)) {
        return nullptr;
    }
    ggml_tensor * t = skv.kv->build_input_k_rot(ctx);
    inputs.push_back([this, t]() { skv.kv->set_input_k_rot(t); });
    return t;
}

ggml_tensor * llama_shiftkv_scoring::input_valid(size_t first, size_t last) {
    std::vector<float> data(n_kv, 0.0f);
    for (size_t i = first; i < last; ++i) {
        data[cells[i] - c0] = 1.0f;
    }
    return input(std::move(data), n_kv);
}

ggml_tensor * llama_shiftkv_scoring::input_mask(const std::vector<std::pair<size_t, size_t>> & ranges) {
    const bool all = std::all_of(ranges.begin(), ranges.end(), [&](const auto & r) { return r.first == 0 && (int64_t) r.second == n_kv; });
    if (all) {
        return nullptr;
    }
    std::vector<float> data(n_kv*ranges.size(), -INFINITY);
    for (size_t i = 0; i < ranges.size(); ++i) {
        for (size_t t = ranges[i].first; t < ranges[i].second; ++t) {
            data[i*n_kv + cells[t] - c0] = 0.0f;
        }
    }
    return input(std::move(data), n_kv, ranges.size());
}

ggml_tensor * llama_shiftkv_scoring::keys(int64_t h0, int64_t n) const {
    const size_t nb_head = ggml_row_size(k->type, l.n_embd_head);
    return ggml_view_3d(ctx, k, l.n_embd_head, n_kv, n, k->nb[1], nb_head, c0*k->nb[1] + h0*nb_head);
}

ggml_tensor * llama_shiftkv_scoring::keys_f32() {
    std::vector<int32_t> idxs(n_kv);
    std::iota(idxs.begin(), idxs.end(), c0);
    return ggml_reshape_3d(ctx, ggml_get_rows(ctx, k, input(std::move(idxs))), l.n_embd_head, l.n_head_kv, n_kv);
}

ggml_tensor * llama_shiftkv_scoring::value_norms() {
    const int64_t d = v->ne[0]/l.n_head_kv;

    ggml_tensor * rows   = v;
    int32_t       offset = c0;

    if (v_trans) {
        const size_t ts = ggml_type_size(v->type);
        rows   = ggml_view_2d(ctx, ggml_reshape_2d(ctx, v, v->ne[1], v->ne[0]), n_kv, v->ne[0], v->ne[1]*ts, c0*ts);
        rows   = ggml_cont(ctx, ggml_transpose(ctx, rows)); // [d*n_head_kv, n_kv]
        offset = 0;
    }

    std::vector<int32_t> idxs(n_kv);
    std::iota(idxs.begin(), idxs.end(), offset);
    rows = ggml_get_rows(ctx, rows, input(std::move(idxs))); // F32

    ggml_tensor * sum = ggml_sum_rows(ctx, ggml_sqr(ctx, ggml_reshape_3d(ctx, rows, d, l.n_head_kv, n_kv)));
    sum = ggml_reshape_2d(ctx, ggml_sqrt(ctx, sum), l.n_head_kv, n_kv);

    return ggml_cont(ctx, ggml_transpose(ctx, sum));
}

ggml_tensor * llama_shiftkv_scoring::queries(const std::vector<int32_t> & rows) {
    ggml_tensor * q = ggml_get_rows(ctx, l.queries, input(rows));
    return ggml_permute(ctx, ggml_reshape_3d(ctx, q, l.n_embd_head, l.n_head, rows.size()), 0, 2, 1, 3);
}

ggml_tensor * llama_shiftkv_scoring::hidden(const std::vector<int32_t> & rows) {
    return ggml_get_rows(ctx, l.hidden, input(rows));
}

ggml_tensor * llama_shiftkv_scoring::sum_queries(ggml_tensor * q, int64_t n_group, bool by_head, const chunk & f) {
    const int64_t n_head_kv   = l.n_head_kv;
    const int64_t n_per_group = q->ne[1]/n_group;

    // a few KV heads, then a few queries at a time
    const int64_t bytes_per_query = n_kv*n_gqa()*sizeof(float);
    const int64_t n_head_chunk = std::max({ (int64_t) 1, (int64_t) SHIFTKV_CHUNK_BYTES/(bytes_per_query*q->ne[1]), (n_head_kv + SHIFTKV_CHUNKS_MAX - 1)/SHIFTKV_CHUNKS_MAX });
    const int64_t n_chunks_max = std::max<int64_t>(1, SHIFTKV_CHUNKS_MAX*n_head_chunk/n_head_kv);
    const int64_t n_j_chunk    = std::max({ (int64_t) 1, (int64_t) SHIFTKV_CHUNK_BYTES/(bytes_per_query*n_group), (n_per_group + n_chunks_max - 1)/n_chunks_max });

    std::vector<ggml_tensor *> parts;
    for (int64_t h0 = 0; h0 < n_head_kv; h0 += n_head_chunk) {
        const int64_t n_h = std::min(n_head_chunk, n_head_kv - h0);

        ggml_tensor * part = nullptr;
        for (int64_t j0 = 0; j0 < n_per_group; j0 += n_j_chunk) {
            const int64_t n_j = std::min(n_j_chunk, n_per_group - j0);

            ggml_tensor * q_part = ggml_view_3d(ctx, q, l.n_embd_head, n_j*n_group, n_h*n_gqa(), q->nb[1], q->nb[2], j0*n_group*q->nb[1] + h0*n_gqa()*q->nb[2]);

            ggml_tensor * a = f(keys(h0, n_h), q_part, j0*n_group);

            a = llama_shiftkv_sum_dim1(ctx, ggml_reshape_3d(ctx, a, n_kv*n_group, n_j, n_gqa()*n_h));
            if (!by_head) {
                a = llama_shiftkv_sum_dim1(ctx, ggml_reshape_3d(ctx, a, n_kv*n_group, n_gqa(), n_h));
            }

            part = part ? ggml_add(ctx, part, a) : a;
        }
        part = ggml_reshape_3d(ctx, part, n_kv, n_group, ggml_nelements(part)/(n_kv*n_group));
        ggml_build_forward_expand(gf, part); // one after the other, so that they share memory
        parts.push_back(part);
    }

    return concat_dim2(ctx, parts);
}

ggml_tensor * llama_shiftkv_scoring::sum_attention(ggml_tensor * q, ggml_tensor * mask, int64_t n_group) {
    return sum_queries(q, n_group, false, [&](ggml_tensor * k, ggml_tensor * q, int64_t first) {
        ggml_tensor * rows = mask ? ggml_view_2d(ctx, mask, n_kv, q->ne[1], mask->nb[1], first*mask->nb[1]) : nullptr;
        return build_attn_weights(ctx, k, q, rows, l.kq_scale, l.soft_cap);
    });
}

//
// selection
//

int32_t llama_shiftkv::select(const llama_shiftkv_params & params, const float * scores, size_t n_scores) {
    const auto * rule = llama_shiftkv_get_rule(params.method);

    if (params.budget < 2 || params.n_recent < 1 || params.n_pool % 2 != 1 || params.n_pool > SHIFTKV_POOL_MAX) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!scores && (!rule || !rule->valid(params))) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!scores && rule->n_query(params) > n_query) {
        LLAMA_LOG_ERROR("%s: the method looks at the last %u queries, captured are %u\n", __func__, rule->n_query(params), n_query);
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!error.empty()) {
        LLAMA_LOG_ERROR("%s: not supported: %s\n", __func__, error.c_str());
        return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
    }

    lctx.synchronize();
    lctx.memory_update(false);

    std::vector<uint32_t> cells;
    int32_t status = collect(cells);
    if (status != LLAMA_SHIFTKV_OK) {
        selected = false;
        sel = {};
        return status;
    }

    const uint32_t n_prompt = params.n_prompt == 0 ? cells.size() : params.n_prompt;
    const uint32_t n_kept   = std::min(n_prompt, params.budget);

    if (n_prompt > cells.size()) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (scores) {
        size_t n = 0;
        for (const auto & l : layers) {
            n += l.n_head_kv*n_prompt;
        }
        if (n_scores != n || std::any_of(scores, scores + n, [](float v) { return std::isnan(v); })) {
            return LLAMA_SHIFTKV_ERR_ARGUMENT;
        }
    } else if (n_prompt < cells.size() && rule->n_query(params) > 0) {
        LLAMA_LOG_ERROR("%s: the method looks at the last queries of the prompt, but captured are those of what follows it\n", __func__);
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }

    selected = false;
    sel = {};

    sel.cells_all = cells;
    sel.cells     = std::move(cells);
    sel.cells.resize(n_prompt);
    sel.seq_id = seq_id;
    sel.n_past = kv->get_cells(seq_id).pos_get(sel.cells.back()) + 1;
    sel.hash   = fingerprint(sel.cells_all);

    sel.info.n_prompt = n_prompt;
    sel.info.n_kept   = n_kept;
    sel.info.n_layer  = layers.size();

    for (const auto & l : layers) {
        const auto & kvl = kv->layers[l.ikv];
        const size_t row = kvl.k->nb[1] + ggml_row_size(kvl.v->type, kvl.v->ne[0]);
        sel.info.kv_bytes_prompt += row*n_prompt;
        sel.info.kv_bytes_kept   += row*n_kept;
    }
    if (kv_swa) {
        size_t n_swa = 0;
        for (const auto & pos_cell : kv_swa->get_cells(seq_id).seq_pos_get(seq_id)) {
            n_swa += pos_cell.first < sel.n_past;
        }
        for (const auto & kvl : kv_swa->layers) {
            const size_t row = kvl.k->nb[1] + ggml_row_size(kvl.v->type, kvl.v->ne[0]);
            sel.info.kv_bytes_prompt += row*n_swa;
            sel.info.kv_bytes_kept   += row*n_swa;
        }
    }

    sel.kept.resize(layers.size());

    if (n_kept == n_prompt) {
        std::vector<int32_t> all(n_prompt);
        std::iota(all.begin(), all.end(), 0);
        for (size_t i = 0; i < layers.size(); ++i) {
            sel.kept[i].assign(layers[i].n_head_kv, all);
        }
        selected = true;
        return LLAMA_SHIFTKV_OK;
    }

    if (params.keep_scores) {
        sel.scores.resize(layers.size());
    }

    for (size_t i = 0; i < layers.size() && status == LLAMA_SHIFTKV_OK; ++i) {
        status = select_layer(i, params, scores);
        if (scores) {
            scores += layers[i].n_head_kv*n_prompt;
        }
    }

    selected = status == LLAMA_SHIFTKV_OK;

    return status;
}

int32_t llama_shiftkv::select_layer(size_t i_layer, const llama_shiftkv_params & params, const float * scores) {
    const layer & l = layers[i_layer];

    // cells from the prompt's first to its last, rounded to what fast matrix products want; others in between are masked
    const auto & cells = sel.cells;
    const auto [c_min, c_max] = std::minmax_element(cells.begin(), cells.end());
    const uint32_t c0 = *c_min/16*16;
    const uint32_t c1 = std::min((*c_max/16 + 1)*16, kv->get_size());

    const uint32_t strm = kv->get_stream(seq_id);
    const auto   & kvl  = kv->layers[l.ikv];

    llama_shiftkv_scoring s = {
        *this, l, params, i_layer, cells, c0, c1 - c0, kvl.k_stream[strm], kvl.v_stream[strm], kv->v_trans, lctx.get_model().hparams.n_pos_per_embd(),
    };

    const size_t n_head_kv = l.n_head_kv;
    const size_t n_prompt  = cells.size();

    std::vector<float> ranks;    // [n_head_kv][n_prompt]
    std::vector<float> observed; // the same, or empty

    if (scores) {
        ranks.assign(scores, scores + n_head_kv*n_prompt);
    } else if (const auto * rule = llama_shiftkv_get_rule(params.method); rule->fill) {
        ranks = rule->fill(s);
    } else {
        ggml_tensor * out = nullptr;

        const auto build = [&](ggml_context * ctx, ggml_cgraph * gf) {
            s.ctx = ctx;
            s.gf  = gf;

            out = rule->build(s);
            for (auto * t : { out, s.observed }) {
                if (t) {
                    ggml_set_output(t);
                    ggml_build_forward_expand(gf, t);
                }
            }
        };
        const auto set = [&]() {
            for (const auto & f : s.inputs) {
                f();
            }
        };
        if (!compute(build, set)) {
            return LLAMA_SHIFTKV_ERR_COMPUTE;
        }

        // in the prompt's order
        const auto read = [&](const ggml_tensor * t) {
            std::vector<float> by_cell(s.n_kv*n_head_kv);
            ggml_backend_tensor_get(t, by_cell.data(), 0, ggml_nbytes(t));

            std::vector<float> res;
            res.reserve(n_head_kv*n_prompt);
            for (size_t h = 0; h < n_head_kv; ++h) {
                for (const uint32_t c : cells) {
                    res.push_back(by_cell[h*s.n_kv + c - c0]);
                }
            }
            return res;
        };
        ranks = read(out);
        if (s.observed) {
            observed = read(s.observed);
        }
    }

    const size_t n_kept   = sel.info.n_kept;
    const size_t n_recent = std::min<size_t>(params.n_recent, n_kept);
    const size_t n_sink   = std::min<size_t>(params.n_sink, n_kept - n_recent);
    const size_t i_recent = n_prompt - n_recent;

    // the tokens before the last ones, which are always kept, averaged with their neighbours among them
    const auto pool = [&](std::vector<float> & rows) {
        const size_t n_side = params.n_pool/2;
        if (n_side == 0 || rows.empty()) {
            return;
        }
        std::vector<float> res(i_recent);
        for (size_t h = 0; h < n_head_kv; ++h) {
            float * row = rows.data() + h*n_prompt;
            for (size_t i = 0; i < i_recent; ++i) {
                const size_t first = i - std::min(i, n_side);
                const size_t last  = std::min(i + n_side + 1, i_recent);
                res[i] = std::accumulate(row + first, row + last, 0.0f)/params.n_pool;
            }
            std::copy(res.begin(), res.end(), row);
        }
    };
    pool(observed.empty() ? ranks : observed);

    sel.kept[i_layer].resize(n_head_kv);
    for (size_t h = 0; h < n_head_kv; ++h) {
        auto & kept = sel.kept[i_layer][h];

        for (size_t i = 0; i < n_sink; ++i) {
            kept.push_back(i);
        }
        for (size_t i = i_recent; i < n_prompt; ++i) {
            kept.push_back(i);
        }

        std::vector<int32_t> rest(i_recent - n_sink);
        std::iota(rest.begin(), rest.end(), n_sink);

        // the n best of the rest; of equal ones the first
        const auto take = [&](const std::vector<float> & rows, size_t n) {
            const float * row = rows.data() + h*n_prompt;
            if (std::any_of(rest.begin(), rest.end(), [&](int32_t i) { return std::isnan(row[i]); })) {
                return false;
            }
            std::nth_element(rest.begin(), rest.begin() + n, rest.end(), [&](int32_t a, int32_t b) {
                return row[a] > row[b] || (row[a] == row[b] && a < b);
            });
            kept.insert(kept.end(), rest.begin(), rest.begin() + n);
            rest.erase(rest.begin(), rest.begin() + n);
            return true;
        };

        const size_t n_observed = observed.empty() ? 0 : std::min<size_t>(std::lround(params.observed*n_kept), n_kept - kept.size());

        if ((n_observed > 0 && !take(observed, n_observed)) || !take(ranks, n_kept - kept.size())) {
            LLAMA_LOG_ERROR("%s: layer %d has scores that are NaN\n", __func__, l.il);
            return scores ? LLAMA_SHIFTKV_ERR_ARGUMENT : LLAMA_SHIFTKV_ERR_COMPUTE;
        }
        std::sort(kept.begin(), kept.end());
    }

    if (params.keep_scores) {
        sel.scores[i_layer].resize(n_head_kv);
        for (size_t h = 0; h < n_head_kv; ++h) {
            auto & row = sel.scores[i_layer][h];
            row.assign(ranks.begin() + h*n_prompt, ranks.begin() + (h + 1)*n_prompt);
            std::fill(row.begin(), row.begin() + n_sink, std::numeric_limits<float>::infinity());
            std::fill(row.begin() + i_recent, row.end(), std::numeric_limits<float>::infinity());
        }
    }

    return LLAMA_SHIFTKV_OK;
}
