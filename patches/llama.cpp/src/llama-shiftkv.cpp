#include "llama-shiftkv-impl.h"
#include "llama-shiftkv-rules.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <exception>

// The C API: checks the arguments, and lets no exception out

// what f returns; COMPUTE if it throws
template <typename F>
static auto guarded(const char * name, F f) -> decltype(f()) {
    try {
        return f();
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", name, e.what());
    } catch (...) {
        LLAMA_LOG_ERROR("%s: an unknown error\n", name);
    }
    return LLAMA_SHIFTKV_ERR_COMPUTE;
}

// the selection's part of a context, once it has captured; null before, and where the capture was refused
static llama_shiftkv * get_ready(const llama_context * ctx) {
    return ctx->shiftkv && ctx->shiftkv->capture.ready ? ctx->shiftkv.get() : nullptr;
}

static llama_shiftkv * get_capturing(const llama_context * ctx) {
    return ctx->shiftkv && ctx->shiftkv->capture.on ? ctx->shiftkv.get() : nullptr;
}

static llama_shiftkv * get_selected(const llama_context * ctx) {
    return ctx->shiftkv && ctx->shiftkv->selected ? ctx->shiftkv.get() : nullptr;
}

static int32_t reads_by_layer(const char * name) {
    LLAMA_LOG_ERROR("%s: the context reads layer by layer: use llama_shiftkv_next_layer()\n", name);
    return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
}

const char * llama_shiftkv_status_str(int32_t status) {
    switch (status) {
        case LLAMA_SHIFTKV_ERR_ARGUMENT:      return "a pointer is null or a parameter is out of range";
        case LLAMA_SHIFTKV_ERR_UNSUPPORTED:   return "the KV cache of this model or context can't be cut";
        case LLAMA_SHIFTKV_ERR_NOT_CAPTURING: return "capture was not on while the prompt was decoded";
        case LLAMA_SHIFTKV_ERR_EMPTY:         return "the captured sequence is empty";
        case LLAMA_SHIFTKV_ERR_STALE:         return "the cache has changed since the capture or the selection";
        case LLAMA_SHIFTKV_ERR_NO_SELECTION:  return "nothing was selected";
        case LLAMA_SHIFTKV_ERR_MISMATCH:      return "the destination is of another model or stores KV pairs differently";
        case LLAMA_SHIFTKV_ERR_NO_SPACE:      return "too little room in the destination";
        case LLAMA_SHIFTKV_ERR_COMPUTE:       return "out of memory, or a backend failed";
        default:                              return status >= 0 ? "ok" : "unknown status";
    }
}

int32_t llama_shiftkv_n_method(void) {
    return llama_shiftkv_rules().size();
}

const char * llama_shiftkv_method_name(int32_t method) {
    const auto * rule = llama_shiftkv_get_rule(method);
    return rule ? rule->name : nullptr;
}

llama_shiftkv_params llama_shiftkv_default_params(int32_t method) {
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

int32_t llama_shiftkv_n_query(const llama_shiftkv_params * params) {
    const auto * rule = params ? llama_shiftkv_get_rule(params->method) : nullptr;
    if (rule == nullptr || !rule->valid(*params)) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return std::clamp<uint32_t>(rule->n_query(*params), 1, SHIFTKV_QUERY_MAX);
}

int32_t llama_shiftkv_capture(llama_context * ctx, llama_seq_id seq_id, uint32_t n_query) {
    if (ctx == nullptr || seq_id < 0 || (uint32_t) seq_id >= ctx->n_seq_max() || n_query < 1 || n_query > SHIFTKV_QUERY_MAX) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return guarded(__func__, [&]() -> int32_t {
        ctx->synchronize();

        if (ctx->shiftkv && ctx->shiftkv->layers) {
            return reads_by_layer(__func__);
        }
        if (!ctx->shiftkv) {
            auto skv = std::make_unique<llama_shiftkv>(*ctx);
            const int32_t status = skv->capture.init();
            if (status != LLAMA_SHIFTKV_OK) {
                return status;
            }
            ctx->shiftkv = std::move(skv);
        }

        return ctx->shiftkv->capture.start(seq_id, n_query);
    });
}

int32_t llama_shiftkv_capture_end(llama_context * ctx) {
    if (ctx == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return guarded(__func__, [&]() -> int32_t {
        if (ctx->shiftkv) {
            ctx->shiftkv->capture.end();
            ctx->shiftkv->store.clear();
        }
        return LLAMA_SHIFTKV_OK;
    });
}

static int32_t select(const char * name, llama_context * ctx, const llama_shiftkv_params & params, const float * scores, size_t n_scores) {
    return guarded(name, [&]() -> int32_t {
        auto * skv = get_capturing(ctx);
        if (skv && skv->layers) {
            return reads_by_layer(name);
        }
        return skv ? skv->select(params, scores, n_scores) : LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
    });
}

int32_t llama_shiftkv_select(llama_context * ctx, const llama_shiftkv_params * params) {
    if (ctx == nullptr || params == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return select(__func__, ctx, *params, nullptr, 0);
}

int64_t llama_shiftkv_select_size(llama_context * ctx, const llama_shiftkv_params * params, uint32_t n_prompt) {
    if (ctx == nullptr || params == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return guarded(__func__, [&]() -> int64_t {
        auto * skv = get_capturing(ctx);
        return skv ? skv->select_size(*params, n_prompt) : (int64_t) LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
    });
}

int32_t llama_shiftkv_select_scores(llama_context * ctx, const llama_shiftkv_params * params, const float * scores, size_t n_scores) {
    if (ctx == nullptr || params == nullptr || scores == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return select(__func__, ctx, *params, scores, n_scores);
}

int32_t llama_shiftkv_compact(llama_context * ctx, llama_context * ctx_dst, llama_seq_id seq_dst) {
    if (ctx == nullptr || ctx_dst == nullptr || seq_dst < 0 || (uint32_t) seq_dst >= ctx_dst->n_seq_max()) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return guarded(__func__, [&]() -> int32_t {
        auto * skv = get_selected(ctx);
        if (skv && skv->layers) {
            return reads_by_layer("llama_shiftkv_compact");
        }
        return skv ? skv->compact(*ctx_dst, seq_dst) : LLAMA_SHIFTKV_ERR_NO_SELECTION;
    });
}

int32_t llama_shiftkv_by_layer(llama_context * ctx, uint32_t n_ctx, uint32_t n_query) {
    if (ctx == nullptr || n_ctx < 1 || n_query < 1 || n_query > SHIFTKV_QUERY_MAX || ctx->shiftkv) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    const int32_t status = guarded(__func__, [&]() -> int32_t {
        ctx->synchronize();
        ctx->shiftkv = std::make_unique<llama_shiftkv>(*ctx);
        ctx->shiftkv->layers = std::make_unique<llama_shiftkv_layers>(*ctx->shiftkv);
        return ctx->shiftkv->layers->init(n_ctx, n_query);
    });
    if (status != LLAMA_SHIFTKV_OK && ctx->shiftkv && !(ctx->shiftkv->layers && ctx->shiftkv->layers->begun())) {
        ctx->shiftkv.reset();
    }
    return status;
}

int32_t llama_shiftkv_next_layer(llama_context * ctx, const llama_shiftkv_params * params, const float * scores, size_t n_scores, llama_context * ctx_dst, llama_seq_id seq_dst) {
    if (ctx == nullptr || params == nullptr || ctx_dst == nullptr || seq_dst < 0 || (uint32_t) seq_dst >= ctx_dst->n_seq_max()) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return guarded(__func__, [&]() -> int32_t {
        if (!ctx->shiftkv || !ctx->shiftkv->layers) {
            return LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
        }
        ctx->synchronize();
        return ctx->shiftkv->layers->next(*params, scores, n_scores, *ctx_dst, seq_dst);
    });
}

int32_t llama_shiftkv_get_info(llama_context * ctx, llama_shiftkv_info * info) {
    if (ctx == nullptr || info == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    const auto * skv = get_selected(ctx);
    if (skv == nullptr) {
        return LLAMA_SHIFTKV_ERR_NO_SELECTION;
    }
    *info = skv->sel.info;
    return LLAMA_SHIFTKV_OK;
}

int32_t llama_shiftkv_get_layers(llama_context * ctx, int32_t * out, size_t n_out) {
    if (ctx == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    const auto * skv = get_ready(ctx);
    if (skv == nullptr) {
        return LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
    }
    const auto & layers = skv->capture.layers;
    if (out) {
        if (n_out < layers.size()) {
            return LLAMA_SHIFTKV_ERR_NO_SPACE;
        }
        std::transform(layers.begin(), layers.end(), out, [](const auto & l) { return l.il; });
    }
    return layers.size();
}

int32_t llama_shiftkv_get_shape(llama_context * ctx, int32_t il, int32_t * out) {
    if (ctx == nullptr || out == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    const auto * skv = get_ready(ctx);
    if (skv == nullptr) {
        return LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
    }
    const auto * l = skv->capture.find_layer(il);
    if (l == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    out[0] = l->n_head;
    out[1] = l->n_head_kv;
    out[2] = l->n_embd_head;
    return LLAMA_SHIFTKV_OK;
}

// copy a row of what was selected for (il, kv_head)
template <typename T>
static int32_t get_row(llama_context * ctx, int32_t il, int32_t kv_head, T * out, size_t n_out,
        std::vector<std::vector<std::vector<T>>> llama_shiftkv::selection::* rows) {
    if (ctx == nullptr || out == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    const auto * skv = get_selected(ctx);
    if (skv == nullptr || (skv->sel.*rows).empty()) {
        return LLAMA_SHIFTKV_ERR_NO_SELECTION;
    }
    const auto * l = skv->capture.find_layer(il);
    if (l == nullptr || kv_head < 0 || kv_head >= l->n_head_kv) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    const auto & row = (skv->sel.*rows)[l - skv->capture.layers.data()][kv_head];
    if (n_out < row.size()) {
        return LLAMA_SHIFTKV_ERR_NO_SPACE;
    }
    std::copy(row.begin(), row.end(), out);
    return row.size();
}

int32_t llama_shiftkv_get_kept(llama_context * ctx, int32_t il, int32_t kv_head, int32_t * out, size_t n_out) {
    return get_row(ctx, il, kv_head, out, n_out, &llama_shiftkv::selection::kept);
}

int32_t llama_shiftkv_get_scores(llama_context * ctx, int32_t il, int32_t kv_head, float * out, size_t n_out) {
    return get_row(ctx, il, kv_head, out, n_out, &llama_shiftkv::selection::scores);
}

// common to the functions that read what was captured: f(capture, layer, cells)
template <typename F>
static int32_t get_captured(const char * name, llama_context * ctx, int32_t il, const void * out, F f) {
    if (ctx == nullptr || out == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return guarded(name, [&]() -> int32_t {
        const auto * skv = get_capturing(ctx);
        if (skv == nullptr) {
            return LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
        }
        const auto * l = skv->capture.find_layer(il);
        if (l == nullptr) {
            return LLAMA_SHIFTKV_ERR_ARGUMENT;
        }
        ctx->synchronize();

        std::vector<llama_shiftkv_cache::cell> captured;
        const int32_t status = skv->capture.collect_with_query(captured);
        if (status != LLAMA_SHIFTKV_OK) {
            return status;
        }
        std::vector<uint32_t> cells;
        for (const auto & c : captured) {
            cells.push_back(c.idx);
        }
        return f(skv->capture, *l, cells);
    });
}

int32_t llama_shiftkv_get_stats(llama_context * ctx, int32_t il, uint32_t n_stat, float * out) {
    return get_captured(__func__, ctx, il, out, [&](const auto & capture, const auto & l, const auto & cells) -> int32_t {
        if (n_stat < 1) {
            return LLAMA_SHIFTKV_ERR_ARGUMENT;
        }
        capture.get_stats(l, cells, n_stat, out[0], out[1]);
        return LLAMA_SHIFTKV_OK;
    });
}

// copy rows of n_row numbers; returns how many
static int32_t put_rows(const std::vector<float> & rows, int64_t n_row, float * out, size_t n_out) {
    if (n_out < rows.size()) {
        return LLAMA_SHIFTKV_ERR_NO_SPACE;
    }
    std::copy(rows.begin(), rows.end(), out);
    return rows.size()/n_row;
}

int32_t llama_shiftkv_get_hidden(llama_context * ctx, int32_t il, float * out, size_t n_out) {
    return get_captured(__func__, ctx, il, out, [&](const auto & capture, const auto & l, const auto & cells) {
        return put_rows(capture.get_ring(l.hidden, cells), l.hidden->ne[0], out, n_out);
    });
}

int32_t llama_shiftkv_get_queries(llama_context * ctx, int32_t il, float * out, size_t n_out) {
    return get_captured(__func__, ctx, il, out, [&](const auto & capture, const auto & l, const auto & cells) {
        return put_rows(capture.get_ring(l.queries, cells), l.queries->ne[0], out, n_out);
    });
}

int32_t llama_shiftkv_get_keys(llama_context * ctx, int32_t il, float * out, size_t n_out) {
    return get_captured(__func__, ctx, il, out, [&](const auto & capture, const auto & l, const auto & cells) {
        return put_rows(capture.get_keys(l, cells), l.n_head_kv*l.n_embd_head, out, n_out);
    });
}

int64_t llama_shiftkv_cache_size(llama_context * ctx) {
    if (ctx == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return guarded(__func__, [&]() -> int64_t {
        // what recurrent layers remember are no KV pairs
        const auto * model = &ctx->get_model();
        if (ctx->get_memory() == nullptr || llama_model_is_recurrent(model) || llama_model_is_hybrid(model)) {
            return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
        }
        int64_t size = 0;
        for (const auto & [buft, n] : ctx->get_memory()->memory_breakdown()) {
            size += n;
        }
        return size;
    });
}
