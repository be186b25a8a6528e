#include "llama-shiftkv-capture.h"

#include "llama-shiftkv.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <typeinfo>

// nodes and leaves that capture adds to a graph: 14 a layer, and its inputs
static constexpr uint32_t SHIFTKV_NODES_LAYER = 16;

// the largest graph of a selection, in a model so small that its own needs less
static constexpr uint32_t SHIFTKV_NODES_SELECT = 1024;

static bool is_tanh(const ggml_tensor * t) {
    return t->op == GGML_OP_UNARY && ggml_get_unary_op(t) == GGML_UNARY_OP_TANH;
}

static float op_param_f32(const ggml_tensor * t, int i) {
    float res;
    memcpy(&res, &t->op_params[i], sizeof(res));
    return res;
}

// what the graph nodes that capture need to know of a ubatch
class llm_graph_input_shiftkv : public llm_graph_input_i {
public:
    llm_graph_input_shiftkv(llama_shiftkv_prefill & cap, const llama_kv_cache_context * mctx) : cap(cap), mctx(mctx) {}

    void set_input(const llama_ubatch * ubatch) override {
        cap.set_input(*this, ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override {
        mctx = cap.cache_swa ?
            static_cast<const llama_kv_cache_iswa_context *>(params.mctx)->get_base() :
            static_cast<const llama_kv_cache_context      *>(params.mctx);

        return cap.on && cells->ne[0] == params.ubatch.n_tokens && rows->ne[0] == cap.n_query;
    }

    llama_shiftkv_prefill & cap;
    const llama_kv_cache_context * mctx;

    ggml_tensor * cells = nullptr; // I64 [n_tokens] cell of each token
    ggml_tensor * rows  = nullptr; // I32 [n_query]  tokens whose hidden states and queries are kept ...
    ggml_tensor * slots = nullptr; // I64 [n_query]  ... and where
};

llama_shiftkv_prefill::llama_shiftkv_prefill(llama_context & lctx) : ctx({ lctx }) {
}

std::pair<llama_shiftkv_cache, llama_shiftkv_cache> llama_shiftkv_caches(llama_memory_i * memory) {
    // derived classes (other cache layouts) are not meant
    if (memory && typeid(*memory) == typeid(llama_kv_cache)) {
        return { { static_cast<llama_kv_cache *>(memory) }, {} };
    }
    if (memory && typeid(*memory) == typeid(llama_kv_cache_iswa)) {
        auto * iswa = static_cast<llama_kv_cache_iswa *>(memory);
        return { { iswa->get_base() }, { iswa->get_swa() } };
    }
    return {};
}

int32_t llama_shiftkv_prefill::init() {
    const auto & model   = ctx.lctx.get_model();
    const auto & hparams = model.hparams;

    const auto unsupported = [](const char * what) {
        LLAMA_LOG_ERROR("llama_shiftkv: not supported: %s\n", what);
        return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
    };

    if (llama_model_has_encoder(&model)) {
        return unsupported("encoder-decoder models");
    }
    if (hparams.is_mla()) {
        return unsupported("multi-head latent attention");
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return unsupported("ALiBi");
    }
    if (ctx.lctx.n_ubatch() < 2) {
        return unsupported("n_ubatch below 2");
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return unsupported("tensors split over devices (LLAMA_SPLIT_MODE_TENSOR)");
    }
    // their queries would not count
    if (!hparams.has_kv(hparams.n_layer_all - 1)) {
        return unsupported("layers that read the KV pairs of another layer");
    }

    std::tie(cache, cache_swa) = llama_shiftkv_caches(ctx.lctx.get_memory());

    if (!cache) {
        return unsupported("a memory that is no plain KV cache (recurrent, hybrid, indexed or none)");
    }
    if (cache.is_shared()) {
        return unsupported("a KV cache shared with another context");
    }

    for (const auto & [il, ikv] : cache.ikvs()) {
        llama_shiftkv_layer l;

        l.il            = il;
        l.ikv           = ikv;
        l.n_head        = hparams.n_head(l.il);
        l.n_head_kv     = cache.n_head(ikv);
        l.n_embd_head   = cache.n_embd_head_k(ikv);
        l.n_embd_head_v = cache.n_embd_head_v(ikv);

        if (l.n_head_kv == 0) {
            continue; // without attention
        }
        if (cache.v(ikv, 0) == nullptr) {
            return unsupported("a layer without values of its own");
        }

        layers.push_back(std::move(l));
    }

    if (layers.empty()) {
        return unsupported("a model with sliding-window layers only");
    }

    return LLAMA_SHIFTKV_OK;
}

bool llama_shiftkv_prefill::alloc_buffers(uint32_t n_query) {
    const int64_t n_cells = cache.n_cells();
    const int64_t n_embd  = ctx.lctx.get_model().hparams.n_embd;

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctxs;

    for (auto & l : layers) {
        auto & ctx0 = ctxs[cache.buft(l.ikv)];

        if (!ctx0) {
            ggml_init_params params = {
                /*.mem_size   =*/ 3*layers.size()*ggml_tensor_overhead(),
                /*.mem_buffer =*/ nullptr,
                /*.no_alloc   =*/ true,
            };
            ctx0.reset(ggml_init(params));
        }

        // layers that take the same place one after the other need one
        const auto same = std::find_if(layers.begin(), layers.end(), [&](const auto & o) { return o.ikv == l.ikv && o.n_head == l.n_head && o.stats; });
        if (same != layers.end()) {
            l.stats   = same->stats;
            l.hidden  = same->hidden;
            l.queries = same->queries;
            continue;
        }

        l.stats   = ggml_new_tensor_2d(ctx0.get(), GGML_TYPE_F32, 2, n_cells);
        l.hidden  = ggml_new_tensor_2d(ctx0.get(), GGML_TYPE_F32, n_embd, n_query + 1);
        l.queries = ggml_new_tensor_2d(ctx0.get(), GGML_TYPE_F32, l.n_head*l.n_embd_head, n_query + 1);

        ggml_format_name(l.stats,   "shiftkv_stats_l%d",   l.il);
        ggml_format_name(l.hidden,  "shiftkv_hidden_l%d",  l.il);
        ggml_format_name(l.queries, "shiftkv_queries_l%d", l.il);
    }

    for (auto & [buft, ctx0] : ctxs) {
        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx0.get(), buft));
        if (!buf) {
            LLAMA_LOG_ERROR("%s: failed to allocate a buffer of type %s\n", __func__, ggml_backend_buft_name(buft));
            return false;
        }
        ggml_backend_buffer_clear(buf.get(), 0);
        bufs.emplace_back(std::move(ctx0), std::move(buf));
    }

    return true;
}

int32_t llama_shiftkv_prefill::start(llama_seq_id seq_id, uint32_t n_query) {
    on = false;
    ctx.drop_graph();

    cell_written.assign(cache.n_cells(), {});
    ring.assign(n_query, {});
    n_ord    = 0;
    pos_last = -1;

    this->seq_id = seq_id;
    error.clear();

    if (this->n_query == n_query) {
        on = true;
        return LLAMA_SHIFTKV_OK;
    }

    end();

    bool done = false;
    try {
        if (alloc_buffers(n_query)) {
            this->n_query = n_query;

            // room for the nodes that capture; building the worst case also shows whether every layer can be captured
            on = true;
            ctx.reserve();
            done = true;
        }
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
    }
    if (!done) {
        end();
        return LLAMA_SHIFTKV_ERR_COMPUTE;
    }

    for (const auto & l : layers) {
        if (error.empty() && l.path.nodes.empty()) {
            error = format("layer %d has no attention of the usual form", l.il);
        }
    }
    if (!error.empty()) {
        LLAMA_LOG_ERROR("%s: not supported: %s\n", __func__, error.c_str());
        end();
        return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
    }

    ctx.drop_graph();
    ready = true;

    return LLAMA_SHIFTKV_OK;
}

void llama_shiftkv_prefill::end() {
    on = false;

    if (n_query == 0 && bufs.empty()) {
        return;
    }

    ctx.lctx.synchronize();
    ctx.drop_graph();
    ctx.give_back_later(); // without the nodes that capture, and what the selection needed

    n_query = 0;
    error.clear();
    for (auto & l : layers) {
        l.path  = {};
        l.stats = l.hidden = l.queries = nullptr;
    }
    bufs.clear();
}

uint32_t llama_shiftkv_prefill::n_nodes() const {
    return SHIFTKV_NODES_LAYER*(layers.size() + 1) + SHIFTKV_NODES_SELECT;
}

llm_graph_cb llama_shiftkv_prefill::graph_cb(llm_graph_cb next, llm_graph_result * res, const llama_memory_context_i * mctx) {
    if (!on) {
        return next;
    }

    // made with the graph's first layer
    auto inp = std::make_shared<llm_graph_input_shiftkv *>(nullptr);

    return [this, next, res, mctx, inp](const llama_ubatch & ubatch, ggml_tensor * cur, const char * name, int il) {
        next(ubatch, cur, name, il);

        if (strcmp(name, "kqv_out") == 0) {
            capture_layer(ubatch, cur, il, res, mctx, *inp);
        }
    };
}

void llama_shiftkv_prefill::capture_layer(const llama_ubatch & ubatch, ggml_tensor * kqv_out, int il,
        llm_graph_result * res, const llama_memory_context_i * mctx, llm_graph_input_shiftkv *& inp) {
    const auto * found = find_layer(il);
    if (found == nullptr || !error.empty() || (only >= 0 && il != only)) {
        return;
    }
    auto * l = &layers[found - layers.data()];

    const auto & model = ctx.lctx.get_model();

    // attention: flash, or a chain of products
    ggml_tensor * t = kqv_out;
    while (t->op == GGML_OP_RESHAPE || t->op == GGML_OP_CONT || t->op == GGML_OP_PERMUTE) {
        t = t->src[0];
    }

    ggml_tensor * q     = nullptr;
    ggml_tensor * sinks = nullptr;

    if (t->op == GGML_OP_FLASH_ATTN_EXT) {
        q           = t->src[0];
        sinks       = t->src[4];
        l->kq_scale = op_param_f32(t, 0);
        l->soft_cap = op_param_f32(t, 2);
    } else if (t->op == GGML_OP_MUL_MAT && t->src[1]->op == GGML_OP_SOFT_MAX) {
        t           = t->src[1];
        sinks       = t->src[2];
        l->kq_scale = op_param_f32(t, 0);
        l->soft_cap = 0.0f;
        t = t->src[0];
        if (t->op == GGML_OP_SCALE && is_tanh(t->src[0]) && t->src[0]->src[0]->op == GGML_OP_SCALE) {
            l->soft_cap = op_param_f32(t, 0);
            if (l->kq_scale != 1.0f || std::fabs(op_param_f32(t->src[0]->src[0], 0)*l->soft_cap - 1.0f) > 1e-5f) {
                error = format("layer %d caps its logits in an unknown way", il);
                return;
            }
            t = t->src[0]->src[0]->src[0];
        }
        if (t->op == GGML_OP_MUL_MAT) {
            q = t->src[1];
        }
    }

    // as build_attn_mha() makes it: permute(view(q))
    if (q == nullptr || q->op != GGML_OP_PERMUTE || q->src[0]->op != GGML_OP_VIEW) {
        error = format("layer %d has no attention of the usual form", il);
        return;
    }
    if (sinks) {
        error = format("layer %d has attention sinks", il);
        return;
    }
    q = q->src[0]->src[0];

    if (q->ne[0] != l->n_embd_head || q->ne[1] != l->n_head || q->ne[2] != (int64_t) ubatch.n_tokens || q->type != GGML_TYPE_F32) {
        error = format("layer %d has queries of an unknown shape", il);
        return;
    }

    const auto & weights = model.layers[il];

    // one token does not show which dimension is the tokens'; the path doesn't change, so that of a larger graph serves
    llama_shiftkv_path path;
    ggml_tensor * hidden = nullptr;
    if (!path.record(q, weights.wq, weights.wqkv, ubatch.n_tokens, &hidden, error)) {
        error = format("layer %d: %s", il, error.c_str());
        return;
    }
    if (hidden->ne[0] != l->hidden->ne[0] || hidden->ne[1] != (int64_t) ubatch.n_tokens || hidden->type != GGML_TYPE_F32) {
        error = format("layer %d has hidden states of an unknown shape", il);
        return;
    }
    if (ubatch.n_tokens > 1) {
        l->path = std::move(path);
    }

    auto * ctx0 = res->get_ctx();
    auto * gf   = res->get_gf();

    if (inp == nullptr) {
        const auto * mctx_kv = cache_swa ?
            static_cast<const llama_kv_cache_iswa_context *>(mctx)->get_base() :
            static_cast<const llama_kv_cache_context      *>(mctx);

        auto ptr = std::make_unique<llm_graph_input_shiftkv>(*this, mctx_kv);

        ptr->cells = ggml_new_tensor_1d(ctx0, GGML_TYPE_I64, ubatch.n_tokens);
        ptr->rows  = ggml_new_tensor_1d(ctx0, GGML_TYPE_I32, n_query);
        ptr->slots = ggml_new_tensor_1d(ctx0, GGML_TYPE_I64, n_query);

        for (auto * tensor : { ptr->cells, ptr->rows, ptr->slots }) {
            ggml_set_input(tensor);
        }

        inp = static_cast<llm_graph_input_shiftkv *>(res->add_input(std::move(ptr)));
    }

    if (!ggml_is_contiguous(q)) {
        q = ggml_cont(ctx0, q);
    }
    q = ggml_reshape_2d(ctx0, q, l->n_head*l->n_embd_head, ubatch.n_tokens);

    ggml_tensor * sums = ggml_concat(ctx0, ggml_sum_rows(ctx0, hidden), ggml_sum_rows(ctx0, ggml_sqr(ctx0, hidden)), 0);

    ggml_build_forward_expand(gf, ggml_set_rows(ctx0, l->stats,   sums, inp->cells));
    ggml_build_forward_expand(gf, ggml_set_rows(ctx0, l->hidden,  ggml_get_rows(ctx0, hidden, inp->rows), inp->slots));
    ggml_build_forward_expand(gf, ggml_set_rows(ctx0, l->queries, ggml_get_rows(ctx0, q,      inp->rows), inp->slots));
}

void llama_shiftkv_prefill::set_input(llm_graph_input_shiftkv & inp, const llama_ubatch * ubatch) {
    inp.mctx->set_input_k_idxs(inp.cells, ubatch);

    const auto * cells = static_cast<const int64_t *>(inp.cells->data);

    std::vector<int32_t> tokens; // of the captured sequence
    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        for (int32_t s = 0; s < ubatch->n_seq_id[i]; ++s) {
            if (ubatch->seq_id[i][s] == seq_id) {
                tokens.push_back(i);
            }
        }
    }

    std::vector<int32_t> rows (n_query, 0);
    std::vector<int64_t> slots(n_query, n_query);

    const size_t n_keep = std::min<size_t>(n_query, tokens.size());

    // after tokens were taken back, count on from those that are left, so that they keep their rows of the rings
    if (!tokens.empty() && ubatch->pos[tokens[0]] <= pos_last) {
        n_ord = 0;
        for (const auto & c : cache.cells(seq_id)) {
            n_ord = std::max(n_ord, ord(c.idx) + 1);
        }
    }

    for (size_t i = 0; i < tokens.size(); ++i) {
        const int64_t cell = cells[tokens[i]];

        cell_written[cell] = { n_ord, ubatch->pos[tokens[i]], cache.gen(seq_id, cell - cache.offset(seq_id)) };

        if (i + n_keep >= tokens.size()) {
            const size_t k = i + n_keep - tokens.size();
            rows [k] = tokens[i];
            slots[k] = n_ord % n_query;
            ring[slots[k]] = { (size_t) cell, cell_written[cell].gen, true };
        }
        n_ord++;
    }

    if (!tokens.empty()) {
        pos_last = ubatch->pos[tokens.back()];
    }

    ggml_backend_tensor_set(inp.rows,  rows.data(),  0, ggml_nbytes(inp.rows));
    ggml_backend_tensor_set(inp.slots, slots.data(), 0, ggml_nbytes(inp.slots));
}

//
// what was captured
//

const llama_shiftkv_layer * llama_shiftkv_prefill::find_layer(int32_t il) const {
    for (const auto & l : layers) {
        if (l.il == il) {
            return &l;
        }
    }
    return nullptr;
}

int64_t llama_shiftkv_prefill::ord(uint32_t cell) const {
    const auto & w = cell_written[cache.offset(seq_id) + cell];
    return w.gen == cache.gen(seq_id, cell) ? w.ord : -1;
}

int32_t llama_shiftkv_prefill::collect(std::vector<llama_shiftkv_cache::cell> & cells) const {
    cells = cache.cells(seq_id);

    if (cells.empty()) {
        return LLAMA_SHIFTKV_ERR_EMPTY;
    }
    // a last token that was moved has its query at another distance from the keys
    const uint32_t last = cells.back().idx;
    if (ord(last) < 0 || cells.back().pos != cell_written[cache.offset(seq_id) + last].pos) {
        return LLAMA_SHIFTKV_ERR_STALE;
    }
    return LLAMA_SHIFTKV_OK;
}

int32_t llama_shiftkv_prefill::collect_with_query(std::vector<llama_shiftkv_cache::cell> & cells) const {
    const int32_t status = collect(cells);
    if (status == LLAMA_SHIFTKV_OK && ring_rows({ cells.back().idx }, 1).empty()) {
        return LLAMA_SHIFTKV_ERR_STALE;
    }
    return status;
}

std::vector<int32_t> llama_shiftkv_prefill::stat_rows(const std::vector<uint32_t> & cells, size_t n) const {
    std::vector<int32_t> res;
    for (size_t i = cells.size() - std::min(n, cells.size()); i < cells.size(); ++i) {
        if (ord(cells[i]) >= 0) {
            res.push_back(cache.offset(seq_id) + cells[i]);
        }
    }
    return res;
}

void llama_shiftkv_prefill::get_stats(const llama_shiftkv_layer & l, const std::vector<uint32_t> & cells, uint32_t n_stat, float & mean, float & sd) const {
    const int64_t n_embd = ctx.lctx.get_model().hparams.n_embd;

    const auto rows = stat_rows(cells, n_stat);

    const auto [lo, hi] = std::minmax_element(rows.begin(), rows.end());

    std::vector<float> sums((*hi - *lo + 1)*2);
    ggml_backend_tensor_get(l.stats, sums.data(), *lo*2*sizeof(float), sums.size()*sizeof(float));

    double s1 = 0.0;
    double s2 = 0.0;
    for (const int32_t row : rows) {
        s1 += sums[(row - *lo)*2];
        s2 += sums[(row - *lo)*2 + 1];
    }

    const double n = (double) rows.size()*n_embd;

    mean = s1/n;
    sd   = std::sqrt(std::max(0.0, s2/n - (s1/n)*(s1/n)));
}

std::vector<int32_t> llama_shiftkv_prefill::ring_rows(const std::vector<uint32_t> & cells, size_t n) const {
    // tokens that were decoded after them may have taken their rows, and be gone themselves
    std::vector<int32_t> res;
    for (size_t i = cells.size(); i > 0 && res.size() < n; --i) {
        const int64_t o = ord(cells[i - 1]);
        if (o < 0) {
            break;
        }
        const auto & r = ring[o % n_query];
        const size_t c = cache.offset(seq_id) + cells[i - 1];
        if (!r.set || r.cell != c || r.gen != cell_written[c].gen) {
            break;
        }
        res.push_back(o % n_query);
    }
    std::reverse(res.begin(), res.end());

    return res;
}

std::vector<float> llama_shiftkv_prefill::get_ring(const ggml_tensor * ring, const std::vector<uint32_t> & cells) const {
    const auto rows = ring_rows(cells, n_query);

    std::vector<float> res(rows.size()*ring->ne[0]);
    for (size_t i = 0; i < rows.size(); ++i) {
        ggml_backend_tensor_get(ring, res.data() + i*ring->ne[0], rows[i]*ring->nb[1], ring->nb[1]);
    }
    return res;
}

std::vector<float> llama_shiftkv_prefill::get_keys(const llama_shiftkv_layer & l, const std::vector<uint32_t> & cells) const {
    const ggml_tensor * k = cache.k(l.ikv, seq_id);

    const auto to_float = ggml_get_type_traits(k->type)->to_float; // null for F32

    std::vector<uint8_t> row(k->nb[1]);
    std::vector<float>   res(cells.size()*k->ne[0]);
    for (size_t i = 0; i < cells.size(); ++i) {
        float * out = res.data() + i*k->ne[0];
        ggml_backend_tensor_get(k, row.data(), cells[i]*k->nb[1], row.size());
        if (to_float) {
            to_float(row.data(), out, k->ne[0]);
        } else {
            memcpy(out, row.data(), row.size());
        }
    }
    return res;
}
