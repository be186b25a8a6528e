#include "llama-shiftkv-layers.h"

#include "llama-shiftkv-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>

static bool has_prefix(const ggml_tensor * t, const char * prefix) {
    return strncmp(t->name, prefix, strlen(prefix)) == 0;
}

int32_t llama_shiftkv_layers::init(uint32_t n_ctx, uint32_t n_query) {
    auto & ctx  = skv.capture.ctx;
    auto & lctx = ctx.lctx;

    const auto & hparams = lctx.get_model().hparams;

    n_layer = hparams.n_layer();

    int32_t status = skv.capture.init();
    if (status != LLAMA_SHIFTKV_OK) {
        return status;
    }
    if (skv.capture.cache_swa || lctx.n_seq_max() != 1) {
        LLAMA_LOG_ERROR("%s: not supported: %s\n", __func__, skv.capture.cache_swa ? "layers with a sliding window" : "several sequences");
        return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
    }

    n_ctx = GGML_PAD(n_ctx, 256);

    auto memory = skv.capture.cache.one_layer(lctx.get_model(), n_ctx, lctx.get_cparams().offload_kqv);

    il = n_layer; // nothing can be read until all is there

    const ggml_init_params params = { ggml_tensor_overhead(), nullptr, true };
    ctx_states.reset(ggml_init(params));
    states = ggml_new_tensor_2d(ctx_states.get(), GGML_TYPE_F32, hparams.n_embd, n_ctx);
    ggml_set_name(states, "shiftkv_states");

    ctx.set_memory(std::move(memory), n_ctx);

    // of the cache anew, with layers that share their place
    skv.capture.layers.clear();
    status = skv.capture.init();
    if (status != LLAMA_SHIFTKV_OK) {
        return status;
    }
    buf_states.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_states.get(), skv.capture.cache.buft(0)));
    if (!buf_states) {
        LLAMA_LOG_ERROR("%s: failed to allocate the hidden states of %u tokens\n", __func__, n_ctx);
        return LLAMA_SHIFTKV_ERR_COMPUTE;
    }
    ggml_backend_buffer_clear(buf_states.get(), 0);

    status = skv.capture.start(0, n_query);
    if (status != LLAMA_SHIFTKV_OK) {
        return status;
    }

    // the graph that this has left behind is that of a batch
    auto * res = lctx.get_gf_res_reserve();
    range  r;
    for (int32_t i = 0; i < n_layer; ++i) {
        if (!find(res->get_gf(), i, -1, r)) {
            return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
        }
    }
    skv.capture.only = il = 0;

    return LLAMA_SHIFTKV_OK;
}

bool llama_shiftkv_layers::find(ggml_cgraph * gf, int32_t il, int64_t n, range & res) const {
    const int n_nodes = ggml_graph_n_nodes(gf);

    const auto index = [&](int32_t i) {
        const std::string name = format("l_out-%d", i);
        int k = 0;
        while (k < n_nodes && name != ggml_graph_node(gf, k)->name) {
            k++;
        }
        return k;
    };

    const int i_in  = il == 0           ? -1      : index(il - 1);
    const int i_out = il == n_layer - 1 ? n_nodes : index(il);

    res.first = i_in + 1;
    res.stop  = std::min(i_out + 1, n_nodes);
    res.in    = il == 0           ? nullptr : i_in  < n_nodes ? ggml_graph_node(gf, i_in)  : nullptr;
    res.out   = il == n_layer - 1 ? nullptr : i_out < n_nodes ? ggml_graph_node(gf, i_out) : nullptr;

    const auto is_states = [&](const ggml_tensor * t) {
        return t && t->type == GGML_TYPE_F32 && t->ne[0] == states->ne[0] && (n < 0 || t->ne[1] == n) && ggml_nrows(t) == t->ne[1] && !t->view_src;
    };
    if ((il > 0 && !is_states(res.in)) || (il < n_layer - 1 && !is_states(res.out))) {
        LLAMA_LOG_ERROR("%s: not supported: the hidden states before or after layer %d were not found\n", __func__, il);
        return false;
    }

    // of what was computed before, a layer may read that of the inputs (the mask in another type), but no other layer's
    std::unordered_set<const ggml_tensor *> seen;
    std::vector<const ggml_tensor *> todo;
    for (int k = res.first; k < res.stop; ++k) {
        seen.insert(ggml_graph_node(gf, k));
        todo.push_back(ggml_graph_node(gf, k));
    }
    const size_t n_own = todo.size();
    for (size_t k = 0; k < todo.size(); ++k) {
        for (const auto * src : todo[k]->src) {
            if (src == nullptr || src == res.in) {
                continue;
            }
            if (src->op != GGML_OP_NONE) {
                if (seen.insert(src).second) {
                    todo.push_back(src);
                }
            } else if (k >= n_own && (has_prefix(src, "blk.") || has_prefix(src, "cache_"))) {
                LLAMA_LOG_ERROR("%s: not supported: layer %d reads more than what the one before makes\n", __func__, il);
                return false;
            }
        }
    }

    return true;
}

ggml_cgraph * llama_shiftkv_layers::window(ggml_cgraph * gf, llm_graph_result & res, const llama_ubatch & ubatch) {
    const size_t n = ubatch.n_tokens;

    if (il == n_layer) {
        LLAMA_LOG_ERROR("%s: all layers have read their prompt\n", __func__);
        return nullptr;
    }
    if (il == 0 ? n_tokens + n > (size_t) states->ne[1] : n_tokens + n > pos.size() || !std::equal(ubatch.pos, ubatch.pos + n, pos.begin() + n_tokens)) {
        LLAMA_LOG_ERROR("%s: layer %d is given other tokens than the first\n", __func__, il);
        return nullptr;
    }

    range r;
    if (!find(gf, il, n, r)) {
        return nullptr;
    }

    const int    size   = ggml_graph_size(gf);
    const size_t offset = n_tokens*states->nb[1];

    const ggml_init_params params = { ggml_graph_overhead_custom(size, false) + 2*ggml_tensor_overhead(), nullptr, true };
    ctx_window.reset(ggml_init(params));

    ggml_cgraph * win = ggml_new_graph_custom(ctx_window.get(), size, false);

    if (r.in) {
        // not the node of the layer before, but what it has left
        r.in->op    = GGML_OP_NONE;
        r.in->flags = 0;
        std::fill(r.in->src, r.in->src + GGML_MAX_SRC, nullptr);
        r.in->view_src  = states;
        r.in->view_offs = offset;
        ggml_backend_view_init(r.in);
    }

    // inputs are set whether a layer reads them or not
    for (int k = 0; k < ggml_graph_n_nodes(gf); ++k) {
        for (auto * src : ggml_graph_node(gf, k)->src) {
            if (src && src->op == GGML_OP_NONE && (src->flags & GGML_TENSOR_FLAG_INPUT)) {
                ggml_build_forward_order(win, src);
            }
        }
    }
    for (int k = r.first; k < r.stop; ++k) {
        ggml_build_forward_order(win, ggml_graph_node(gf, k));
    }

    if (r.out) {
        // rows that only these tokens read, and have read by then
        ggml_tensor * to = ggml_view_2d(ctx_window.get(), states, states->ne[0], n, states->nb[1], offset);
        ggml_build_forward_expand(win, ggml_cpy(ctx_window.get(), r.out, to));

        // these are not computed
        res.t_logits = res.t_embd = res.t_embd_pooled = res.t_h_nextn = nullptr;
        res.t_sampled.clear();
        res.t_sampled_logits.clear();
        res.t_sampled_probs.clear();
        res.t_candidates.clear();
    }

    if (il == 0) {
        pos.insert(pos.end(), ubatch.pos, ubatch.pos + n);
    }
    n_tokens += n;

    return win;
}

int32_t llama_shiftkv_layers::next(const llama_shiftkv_params & params, const float * scores, size_t n_scores, llama_context & dst, llama_seq_id seq_dst) {
    auto & capture = skv.capture;

    if (il == n_layer || params.n_prompt != 0 || &dst == &capture.ctx.lctx) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (this->dst && (this->dst != &dst || this->seq_dst != seq_dst)) {
        LLAMA_LOG_ERROR("%s: the layers before were handed over to another context or sequence\n", __func__);
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (n_tokens == 0) {
        return LLAMA_SHIFTKV_ERR_EMPTY;
    }
    if (n_tokens != pos.size() || capture.cache.cells(0).size() != n_tokens) {
        LLAMA_LOG_ERROR("%s: layer %d was given %zu of %zu tokens\n", __func__, il, n_tokens, pos.size());
        return LLAMA_SHIFTKV_ERR_STALE;
    }

    if (capture.find_layer(il)) {
        const llama_shiftkv::selection before = std::move(skv.sel);

        int32_t status = skv.select(params, scores, n_scores, il);

        skv.selected = false; // not of all layers
        skv.sel.info.bytes_moved += before.info.bytes_moved;
        for (size_t i = 0; i < before.kept.size() && i < skv.sel.kept.size(); ++i) {
            if (capture.layers[i].il < il) {
                skv.sel.kept[i] = before.kept[i];
                if (!before.scores.empty() && !skv.sel.scores.empty()) {
                    skv.sel.scores[i] = before.scores[i];
                }
            }
        }
        if (status == LLAMA_SHIFTKV_OK) {
            status = move(dst, seq_dst);
        }
        if (status != LLAMA_SHIFTKV_OK) {
            return status;
        }
    }

    il++;
    n_tokens = 0;

    if (il == n_layer) {
        llama_shiftkv_caches(dst.get_memory()).first.put(seq_dst, cells_dst, metas);
        skv.selected = true;
        return 0;
    }

    capture.ctx.lctx.get_memory()->clear(false);
    capture.only = il;

    const int32_t status = capture.start(0, capture.n_query);

    return status == LLAMA_SHIFTKV_OK ? n_layer - il : status;
}

int32_t llama_shiftkv_layers::move(llama_context & dst, llama_seq_id seq_dst) {
    const auto & capture = skv.capture;
    const auto & l       = *capture.find_layer(il);

    auto cache_dst = llama_shiftkv_caches(dst.get_memory()).first;

    if (&dst.get_model() != &capture.ctx.lctx.get_model() || !cache_dst || cache_dst.is_shared() || !capture.cache.same_layout(cache_dst)) {
        LLAMA_LOG_ERROR("%s: the destination is of another model, or stores KV pairs differently (KV types, flash attention, offload)\n", __func__);
        return LLAMA_SHIFTKV_ERR_MISMATCH;
    }
    llama_shiftkv_context{ dst }.update();

    const size_t n_kept = skv.sel.info.n_kept;

    if (this->dst == nullptr) {
        const std::vector<uint32_t> last(skv.sel.cells.end() - n_kept, skv.sel.cells.end());

        cells_dst = cache_dst.find_free(seq_dst, n_kept);
        if (cells_dst.size() < n_kept) {
            LLAMA_LOG_ERROR("%s: the destination has room for %zu of %zu cells\n", __func__, cells_dst.size(), n_kept);
            return LLAMA_SHIFTKV_ERR_NO_SPACE;
        }
        cache_dst.claim(seq_dst, cells_dst);
        metas         = capture.cache.metas(0, last);
        this->dst     = &dst;
        this->seq_dst = seq_dst;
    } else if (cells_dst.size() != n_kept) {
        LLAMA_LOG_ERROR("%s: %zu pairs of a layer are kept, of the layers before %zu\n", __func__, n_kept, cells_dst.size());
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    } else if (!cache_dst.are_empty(seq_dst, cells_dst)) {
        LLAMA_LOG_ERROR("%s: the destination was decoded in before all layers were there\n", __func__);
        return LLAMA_SHIFTKV_ERR_STALE;
    }

    std::vector<std::vector<int32_t>> idxs;
    for (const auto & kept : skv.sel.kept[&l - capture.layers.data()]) {
        idxs.emplace_back(kept.size());
        std::transform(kept.begin(), kept.end(), idxs.back().begin(), [&](int32_t t) { return skv.sel.cells[t]; });
    }

    const bool done = skv.move_layer(capture.cache, 0, l.ikv, cache_dst, seq_dst, cache_dst.ikv(l.il), idxs, cells_dst);

    return done ? LLAMA_SHIFTKV_OK : LLAMA_SHIFTKV_ERR_COMPUTE;
}
