#include "llama-shiftkv-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

// intermediate results of the attention of proxies stay below this, where a KV head allows
static constexpr size_t SHIFTKV_CHUNK_BYTES = 64u*1024*1024;

// a small model's graphs have room for 1024 tensors (llama_context::graph_max_nodes()); a chunk of the most proxies takes fewer than 90
static constexpr int64_t  SHIFTKV_CHUNKS_MAX = 8;
static constexpr uint32_t SHIFTKV_PROXY_MAX  = 4096;

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

// sum over dimension 1 of a contiguous [a, n, b, 1] -> [a, 1, b, 1], by halves: every backend adds views, not all sum over an outer dimension
static ggml_tensor * sum_dim1(ggml_context * ctx, ggml_tensor * x) {
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

// concatenate along dimension 2
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

int32_t llama_shiftkv::select(const llama_shiftkv_params & params) {
    if (params.budget < 2 ||
        params.n_group < 1 || params.n_proxy < params.n_group || params.n_proxy > SHIFTKV_PROXY_MAX || params.n_proxy % params.n_group != 0 ||
        params.n_stat < 1 || params.n_repeat < 1 || params.n_repeat > SHIFTKV_PROXY_MAX ||
        !std::isfinite(params.gamma) || params.gamma < 0.0f || !(params.mass > 0.0f && params.mass <= 1.0f)) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!error.empty()) {
        LLAMA_LOG_ERROR("%s: not supported: %s\n", __func__, error.c_str());
        return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
    }

    lctx.synchronize();
    lctx.memory_update(false);

    selected = false;
    sel = {};

    int32_t status = collect(sel.cells);
    if (status != LLAMA_SHIFTKV_OK) {
        return status;
    }
    sel.seq_id = seq_id;
    sel.hash   = fingerprint(sel.cells);

    const uint32_t n_prompt = sel.cells.size();
    const uint32_t n_kept   = std::min(n_prompt, params.budget);

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
        const size_t n_swa = kv_swa->get_cells(seq_id).seq_pos_get(seq_id).size();
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

    const size_t n_noise = (size_t) lctx.get_model().hparams.n_embd*params.n_proxy;
    if (noise.size() != n_noise || noise_seed != params.seed) {
        noise      = gen_noise(params.seed, n_noise);
        noise_seed = params.seed;
    }

    for (size_t i = 0; i < layers.size() && status == LLAMA_SHIFTKV_OK; ++i) {
        status = select_layer(i, params);
    }

    selected = status == LLAMA_SHIFTKV_OK;

    return status;
}

int32_t llama_shiftkv::select_layer(size_t i_layer, const llama_shiftkv_params & params) {
    const layer & l = layers[i_layer];

    const auto & hparams = lctx.get_model().hparams;

    const int64_t n_embd    = hparams.n_embd;
    const int64_t n_head    = l.n_head;
    const int64_t n_head_kv = l.n_head_kv;
    const int64_t n_gqa     = n_head/n_head_kv;

    // the first layers repeat the last hidden state, in one group
    const bool    repeat      = i_layer < params.n_layer_repeat;
    const int64_t n_proxy     = repeat ? params.n_repeat : params.n_proxy;
    const int64_t n_group     = repeat ? 1 : params.n_group;
    const int64_t n_per_group = n_proxy/n_group;

    // cells from the prompt's first to its last, rounded to what fast matrix products want; others in between are masked
    const auto & cells = sel.cells;
    const auto [c_min, c_max] = std::minmax_element(cells.begin(), cells.end());
    const uint32_t c0 = *c_min/16*16;
    const uint32_t c1 = std::min((*c_max/16 + 1)*16, kv->get_size());

    const int64_t n_kv    = c1 - c0;
    const bool    foreign = n_kv != (int64_t) cells.size();
    const uint32_t c_last = cells.back() - c0;

    float mean = 0.0f;
    float sd   = 0.0f;
    get_stats(l, cells, params.n_stat, mean, sd);

    ggml_tensor * inp_noise = nullptr; // F32 [n_embd, n_proxy]
    ggml_tensor * inp_pos   = nullptr; // I32 [n_proxy*n_pos]
    ggml_tensor * inp_rot   = nullptr; // F32 [n_rot, n_rot]
    ggml_tensor * inp_mask  = nullptr; // F32 [n_kv, n_proxy]  -inf: not of this prompt
    ggml_tensor * inp_valid = nullptr; // F32 [n_kv]           0: the last key, or not of this prompt
    ggml_tensor * inp_bias  = nullptr; // F32 [n_kv]           -inf likewise
    ggml_tensor * out_order = nullptr; // I32 [n_kv, n_head_kv]
    ggml_tensor * out_score = nullptr; // F32 [n_kv, n_head_kv]

    const int64_t n_pos = hparams.n_pos_per_embd();

    const auto build = [&](ggml_context * ctx, ggml_cgraph * gf) {
        const auto new_input = [&](ggml_type type, int64_t ne0, int64_t ne1) {
            ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
            ggml_set_input(t);
            return t;
        };

        inp_valid = new_input(GGML_TYPE_F32, n_kv, 1);
        inp_bias  = new_input(GGML_TYPE_F32, n_kv, 1);

        if (l.path.uses(llama_shiftkv_path::POS)) {
            inp_pos = new_input(GGML_TYPE_I32, n_proxy*n_pos, 1);
        }
        if (l.path.uses(llama_shiftkv_path::ROT)) {
            inp_rot = kv->build_input_k_rot(ctx);
        }
        if (foreign) {
            inp_mask = new_input(GGML_TYPE_F32, n_kv, n_proxy);
        }

        // step 2: the proxies' hidden states
        ggml_tensor * hidden;
        if (repeat) {
            hidden = ggml_repeat_4d(ctx, ggml_view_2d(ctx, l.hidden, n_embd, 1, l.hidden->nb[1], 0), n_embd, n_proxy, 1, 1);
        } else {
            inp_noise = new_input(GGML_TYPE_F32, n_embd, n_proxy);
            hidden    = ggml_scale_bias(ctx, inp_noise, params.gamma*sd, mean);
        }

        // step 3: [d, n_head, n_proxy] -> [d, n_proxy, n_head]. proxy j of group i is column j*n_group + i
        ggml_tensor * q = ggml_permute(ctx, l.path.build(ctx, hidden, inp_pos, inp_rot), 0, 2, 1, 3);

        ggml_tensor * k_cells = kv->layers[l.ikv].k_stream[kv->get_stream(seq_id)];

        const auto k_heads = [&](int64_t h0, int64_t n) {
            const size_t nb_head = ggml_row_size(k_cells->type, l.n_embd_head);
            return ggml_view_3d(ctx, k_cells, l.n_embd_head, n_kv, n, k_cells->nb[1], nb_head, c0*k_cells->nb[1] + h0*nb_head);
        };

        // the real last query's attention, mean over the heads of a KV head: [n_kv, 1, n_head_kv]
        const size_t q_row = ((n_ord - 1) % n_query)*l.queries->nb[1];
        ggml_tensor * q_last = ggml_view_3d(ctx, l.queries, l.n_embd_head, 1, n_head, l.queries->nb[1], l.n_embd_head*sizeof(float), q_row);
        ggml_tensor * a_last = build_attn_weights(ctx, k_heads(0, n_head_kv), q_last, inp_mask, l.kq_scale, l.soft_cap);
        a_last = sum_dim1(ctx, ggml_reshape_3d(ctx, a_last, n_kv, n_gqa, n_head_kv));
        a_last = ggml_scale(ctx, a_last, 1.0f/n_gqa);

        // step 4: the proxies' attention, summed within groups: [n_kv, n_group, n_head_kv]; a few KV heads, then a few proxies at a time
        const int64_t bytes_per_proxy = n_kv*n_gqa*sizeof(float);
        const int64_t n_head_chunk = std::max({ (int64_t) 1, (int64_t) SHIFTKV_CHUNK_BYTES/(bytes_per_proxy*n_proxy), (n_head_kv + SHIFTKV_CHUNKS_MAX - 1)/SHIFTKV_CHUNKS_MAX });
        const int64_t n_chunks_max = std::max<int64_t>(1, SHIFTKV_CHUNKS_MAX*n_head_chunk/n_head_kv);
        const int64_t n_j_chunk    = std::max({ (int64_t) 1, (int64_t) SHIFTKV_CHUNK_BYTES/(bytes_per_proxy*n_group), (n_per_group + n_chunks_max - 1)/n_chunks_max });

        std::vector<ggml_tensor *> parts;
        for (int64_t h0 = 0; h0 < n_head_kv; h0 += n_head_chunk) {
            const int64_t n_h = std::min(n_head_chunk, n_head_kv - h0);

            ggml_tensor * part = nullptr;
            for (int64_t j0 = 0; j0 < n_per_group; j0 += n_j_chunk) {
                const int64_t n_j = std::min(n_j_chunk, n_per_group - j0);

                ggml_tensor * q_part = ggml_view_3d(ctx, q, l.n_embd_head, n_j*n_group, n_h*n_gqa, q->nb[1], q->nb[2], j0*n_group*q->nb[1] + h0*n_gqa*q->nb[2]);

                ggml_tensor * a = build_attn_weights(ctx, k_heads(h0, n_h), q_part, inp_mask, l.kq_scale, l.soft_cap);

                a = sum_dim1(ctx, ggml_reshape_3d(ctx, a, n_kv*n_group, n_j, n_gqa*n_h));
                a = sum_dim1(ctx, ggml_reshape_3d(ctx, a, n_kv*n_group, n_gqa, n_h));

                part = part ? ggml_add(ctx, part, a) : a;
            }
            part = ggml_reshape_3d(ctx, part, n_kv, n_group, n_h);
            ggml_build_forward_expand(gf, part); // one after the other, so that they share memory
            parts.push_back(part);
        }

        ggml_tensor * mass = ggml_scale(ctx, concat_dim2(ctx, parts), 1.0f/(n_gqa*(1 + n_per_group)));
        mass = ggml_add(ctx, mass, ggml_scale(ctx, a_last, 1.0f/(1 + n_per_group)));
        mass = ggml_mul(ctx, mass, inp_valid);

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
        votes = sum_dim1(ctx, ggml_reshape_3d(ctx, votes, n_kv, n_group, n_head_kv));

        // step 6
        ggml_tensor * score = ggml_add(ctx, ggml_add(ctx, votes, a_last), inp_bias);

        // step 7
        out_score = ggml_reshape_2d(ctx, score, n_kv, n_head_kv);
        out_order = ggml_argsort(ctx, out_score, GGML_SORT_ORDER_DESC);

        ggml_set_output(out_score);
        ggml_set_output(out_order);
        ggml_build_forward_expand(gf, out_order);
    };

    const auto set = [&]() {
        if (inp_noise) {
            ggml_backend_tensor_set(inp_noise, noise.data(), 0, ggml_nbytes(inp_noise));
        }
        if (inp_pos) {
            // proxy j of every group is at n_past + (j + 1)*n_group; as a text token's in M-RoPE: three times the same, then 0
            const llama_pos n_past = kv->seq_pos_max(seq_id) + 1;

            std::vector<llama_pos> pos(n_proxy*n_pos, 0);
            for (int64_t i = 0; i < n_proxy; ++i) {
                for (int64_t c = 0; c < std::min<int64_t>(n_pos, 3); ++c) {
                    pos[c*n_proxy + i] = n_past + (i/n_group + 1)*n_group;
                }
            }
            ggml_backend_tensor_set(inp_pos, pos.data(), 0, ggml_nbytes(inp_pos));
        }
        if (inp_rot) {
            kv->set_input_k_rot(inp_rot);
        }

        std::vector<float> valid(n_kv, 0.0f);
        for (const uint32_t c : cells) {
            valid[c - c0] = 1.0f;
        }
        std::vector<float> bias(n_kv);
        const auto to_bias = [](float v) { return v == 1.0f ? 0.0f : -INFINITY; };

        if (inp_mask) {
            std::transform(valid.begin(), valid.end(), bias.begin(), to_bias);

            std::vector<float> mask;
            mask.reserve(n_kv*n_proxy);
            for (int64_t i = 0; i < n_proxy; ++i) {
                mask.insert(mask.end(), bias.begin(), bias.end());
            }
            ggml_backend_tensor_set(inp_mask, mask.data(), 0, ggml_nbytes(inp_mask));
        }

        valid[c_last] = 0.0f;
        std::transform(valid.begin(), valid.end(), bias.begin(), to_bias);

        ggml_backend_tensor_set(inp_valid, valid.data(), 0, ggml_nbytes(inp_valid));
        ggml_backend_tensor_set(inp_bias,  bias.data(),  0, ggml_nbytes(inp_bias));
    };

    if (!compute(build, set)) {
        return LLAMA_SHIFTKV_ERR_COMPUTE;
    }

    // cell -> index into the prompt
    std::vector<int32_t> index(n_kv, -1);
    for (size_t i = 0; i < cells.size(); ++i) {
        index[cells[i] - c0] = i;
    }

    const size_t n_top = sel.info.n_kept - 1;

    std::vector<int32_t> top(n_top*n_head_kv);
    ggml_backend_tensor_get_2d(out_order, top.data(), 0, n_top*sizeof(int32_t), n_head_kv, out_order->nb[1], n_top*sizeof(int32_t));

    sel.kept[i_layer].resize(n_head_kv);
    for (int64_t h = 0; h < n_head_kv; ++h) {
        auto & kept = sel.kept[i_layer][h];
        for (size_t i = 0; i < n_top; ++i) {
            const int32_t c = top[h*n_top + i];
            if (c < 0 || c >= n_kv || index[c] < 0 || c == (int32_t) c_last) {
                LLAMA_LOG_ERROR("%s: layer %d ranks no valid scores (NaN in the cache or the weights?)\n", __func__, l.il);
                return LLAMA_SHIFTKV_ERR_COMPUTE;
            }
            kept.push_back(index[c]);
        }
        kept.push_back(cells.size() - 1);
        std::sort(kept.begin(), kept.end());
    }

    if (params.keep_scores) {
        std::vector<float> score(n_kv*n_head_kv);
        ggml_backend_tensor_get(out_score, score.data(), 0, ggml_nbytes(out_score));

        sel.scores[i_layer].resize(n_head_kv);
        for (int64_t h = 0; h < n_head_kv; ++h) {
            auto & row = sel.scores[i_layer][h];
            for (const uint32_t c : cells) {
                row.push_back(score[h*n_kv + c - c0]);
            }
            row.back() = std::numeric_limits<float>::infinity();
        }
    }

    return LLAMA_SHIFTKV_OK;
}
