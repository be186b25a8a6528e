#include "llama-shiftkv-impl.h"
#include "llama-shiftkv-rules.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <typeinfo>

//
// the query path of a layer
//

static bool is_view_op(ggml_op op) {
    return op == GGML_OP_VIEW || op == GGML_OP_RESHAPE;
}

static bool is_tanh(const ggml_tensor * t) {
    return t->op == GGML_OP_UNARY && ggml_get_unary_op(t) == GGML_UNARY_OP_TANH;
}

static float op_param_f32(const ggml_tensor * t, int i) {
    float res;
    memcpy(&res, &t->op_params[i], sizeof(res));
    return res;
}

// the input of the product with one of the two weights, somewhere above t
static ggml_tensor * find_product_input(ggml_tensor * t, const ggml_tensor * w0, const ggml_tensor * w1, int depth = 0) {
    if (t == nullptr || depth > 32) {
        return nullptr;
    }
    if (t->op == GGML_OP_MUL_MAT && t->src[0] && (t->src[0] == w0 || t->src[0] == w1)) {
        return t->src[1];
    }
    for (auto * src : t->src) {
        if (auto * res = find_product_input(src, w0, w1, depth + 1)) {
            return res;
        }
    }
    return nullptr;
}

bool llama_shiftkv_path::record(ggml_tensor * q, const ggml_tensor * w0, const ggml_tensor * w1, int64_t n_tokens, ggml_tensor ** hidden, std::string & error) {
    nodes.clear();
    this->n_tokens = n_tokens;

    *hidden = find_product_input(q, w0, w1);
    if (*hidden == nullptr) {
        error = "the query projection was not found";
        return false;
    }

    std::map<ggml_tensor *, int32_t> seen;
    return visit(q, *hidden, seen, error);
}

bool llama_shiftkv_path::visit(ggml_tensor * t, ggml_tensor * hidden, std::map<ggml_tensor *, int32_t> & seen, std::string & error) {
    node n = {};

    n.op   = t->op;
    n.type = t->type;
    n.view = is_view_op(t->op);
    memcpy(n.ne,        t->ne,        sizeof(n.ne));
    memcpy(n.nb,        t->nb,        sizeof(n.nb));
    memcpy(n.op_params, t->op_params, sizeof(n.op_params));

    switch (t->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_ADD:
        case GGML_OP_MUL:
        case GGML_OP_SCALE:
        case GGML_OP_CLAMP:
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
        case GGML_OP_CONT:
        case GGML_OP_ROPE:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
            break;
        default:
            error = std::string("the query goes through ") + ggml_op_name(t->op);
            return false;
    }

    // tokens are the outermost dimension on the whole path
    int64_t outer = 1;
    for (int i = GGML_MAX_DIMS - 1; i >= 0 && outer == 1; --i) {
        outer = t->ne[i];
    }
    if (outer % n_tokens != 0) {
        error = format("%s (%s) is not laid out by tokens", t->name, ggml_op_name(t->op));
        return false;
    }

    if (n.view) {
        const size_t offs_src = t->src[0]->view_src ? t->src[0]->view_offs : 0;
        n.view_offs = t->view_offs - offs_src;
    }

    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        ggml_tensor * src = t->src[i];
        src_ref     & ref = n.src[i];

        if (src == nullptr) {
            continue;
        }

        if (src == hidden) {
            ref.kind = HIDDEN;
        } else if (src->op == GGML_OP_NONE && (src->flags & GGML_TENSOR_FLAG_INPUT)) {
            if (t->op == GGML_OP_ROPE && i == 1) {
                ref.kind = POS;
            } else if (t->op == GGML_OP_MUL_MAT && i == 0 && strncmp(src->name, "attn_inp_k_rot", 14) == 0) {
                ref.kind = ROT;
            } else {
                error = format("the query depends on the input %s", src->name);
                return false;
            }
        } else if (src->op == GGML_OP_NONE) {
            ref.kind   = WEIGHT;
            ref.tensor = src;
        } else {
            if (seen.find(src) == seen.end() && !visit(src, hidden, seen, error)) {
                return false;
            }
            ref.kind = NODE;
            ref.node = seen.at(src);
        }
    }

    seen[t] = nodes.size();
    nodes.push_back(n);

    return true;
}

bool llama_shiftkv_path::uses(leaf_kind kind) const {
    for (const auto & n : nodes) {
        for (const auto & ref : n.src) {
            if (ref.kind == kind) {
                return true;
            }
        }
    }
    return false;
}

// a node of the same kind; its size may be another
static ggml_tensor * new_node(ggml_context * ctx, const llama_shiftkv_path::node & n, const int64_t * ne, ggml_tensor ** src) {
    ggml_tensor * t = ggml_new_tensor(ctx, n.type, GGML_MAX_DIMS, ne);
    memcpy(t->op_params, n.op_params, sizeof(n.op_params));
    t->op = n.op;
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        t->src[i] = src[i];
    }
    return t;
}

ggml_tensor * llama_shiftkv_path::build(ggml_context * ctx, ggml_tensor * hidden, ggml_tensor * rot, const rope & build_rope) const {
    const int64_t n_new = hidden->ne[1];

    std::vector<ggml_tensor *> built;

    for (const auto & n : nodes) {
        ggml_tensor * src[GGML_MAX_SRC] = {};

        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            const auto & ref = n.src[i];
            switch (ref.kind) {
                case NODE:   src[i] = built[ref.node]; break;
                case HIDDEN: src[i] = hidden;          break;
                case ROT:    src[i] = rot;             break;
                case WEIGHT: src[i] = ref.tensor;      break;
                case POS:                              break; // build_rope() knows
                case NONE:                             break;
            }
        }

        int64_t ne[GGML_MAX_DIMS];
        memcpy(ne, n.ne, sizeof(ne));

        for (int i = GGML_MAX_DIMS - 1; i >= 0; --i) {
            if (n.ne[i] != 1) {
                ne[i] = n.ne[i]/n_tokens*n_new;
                break;
            }
        }

        ggml_tensor * t;
        if (n.view) {
            t = ggml_view_4d(ctx, src[0], ne[0], ne[1], ne[2], ne[3], n.nb[1], n.nb[2], n.nb[3], n.view_offs);
        } else if (n.op == GGML_OP_ROPE) {
            t = build_rope(n, src);
        } else {
            t = new_node(ctx, n, ne, src);
        }

        built.push_back(t);
    }

    return built.back();
}

ggml_tensor * llama_shiftkv_path::build(ggml_context * ctx, ggml_tensor * hidden, ggml_tensor * pos, ggml_tensor * rot) const {
    return build(ctx, hidden, rot, [&](const node & n, ggml_tensor ** src) {
        src[1] = pos;
        return new_node(ctx, n, src[0]->ne, src);
    });
}

ggml_tensor * llama_shiftkv_path::build_mean(ggml_context * ctx, ggml_tensor * hidden, const std::vector<ggml_tensor *> & pos, int64_t n_comp, ggml_tensor * eye, ggml_tensor * rot) const {
    return build(ctx, hidden, rot, [&](const node & rope, ggml_tensor ** src) {
        // a rotation is linear in what it turns: its mean is a matrix, whose columns are those of the unit matrix after it
        const int64_t d = eye->ne[0];

        ggml_tensor * x   = ggml_is_contiguous(src[0]) ? src[0] : ggml_cont(ctx, src[0]);
        ggml_tensor * sum = nullptr;
        int64_t n = 0;

        for (auto * part : pos) {
            const int64_t n_part = part->ne[0]/n_comp;
            src[0] = ggml_repeat_4d(ctx, eye, d, d, n_part, 1);
            src[1] = part;
            ggml_tensor * t = new_node(ctx, rope, src[0]->ne, src);
            t   = llama_shiftkv_sum_dim1(ctx, ggml_reshape_3d(ctx, t, d*d, n_part, 1));
            sum = sum ? ggml_add(ctx, sum, t) : t;
            n  += n_part;
        }

        sum = ggml_scale(ctx, ggml_reshape_2d(ctx, sum, d, d), 1.0f/n);

        ggml_tensor * res = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, sum)), x);
        ggml_prec_set_acc(res, GGML_PREC_F32);
        return res;
    });
}

//
// capture
//

// what the graph nodes that capture need to know of a ubatch
class llm_graph_input_shiftkv : public llm_graph_input_i {
public:
    llm_graph_input_shiftkv(llama_shiftkv & skv, const llama_kv_cache_context * mctx) : skv(skv), mctx(mctx) {}

    void set_input(const llama_ubatch * ubatch) override {
        skv.set_input(*this, ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override {
        mctx = skv.kv_swa ?
            static_cast<const llama_kv_cache_iswa_context *>(params.mctx)->get_base() :
            static_cast<const llama_kv_cache_context      *>(params.mctx);

        return skv.capturing && cells->ne[0] == params.ubatch.n_tokens && rows->ne[0] == skv.n_query;
    }

    llama_shiftkv & skv;
    const llama_kv_cache_context * mctx;

    ggml_tensor * cells = nullptr; // I64 [n_tokens] cell of each token
    ggml_tensor * rows  = nullptr; // I32 [n_query]  tokens whose hidden states and queries are kept ...
    ggml_tensor * slots = nullptr; // I64 [n_query]  ... and where
};

llama_shiftkv::llama_shiftkv(llama_context & lctx) : lctx(lctx) {
}

int32_t llama_shiftkv::init() {
    const auto & model   = lctx.get_model();
    const auto & hparams = model.hparams;

    const auto unsupported = [](const char * what) {
        LLAMA_LOG_ERROR("llama_shiftkv: not supported: %s\n", what);
        return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
    };

    auto * memory = lctx.get_memory();

    if (llama_model_has_encoder(&model)) {
        return unsupported("encoder-decoder models");
    }
    if (hparams.is_mla()) {
        return unsupported("multi-head latent attention");
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return unsupported("ALiBi");
    }
    if (lctx.n_ubatch() < 2) {
        return unsupported("n_ubatch below 2");
    }

    // derived classes (other cache layouts) are not meant
    if (memory && typeid(*memory) == typeid(llama_kv_cache)) {
        kv = static_cast<llama_kv_cache *>(memory);
    } else if (memory && typeid(*memory) == typeid(llama_kv_cache_iswa)) {
        kv     = static_cast<llama_kv_cache_iswa *>(memory)->get_base();
        kv_swa = static_cast<llama_kv_cache_iswa *>(memory)->get_swa();
    } else {
        return unsupported("a memory that is no plain KV cache (recurrent, hybrid, indexed or none)");
    }
    if (kv->other) {
        return unsupported("a KV cache shared with another context");
    }

    for (size_t ikv = 0; ikv < kv->layers.size(); ++ikv) {
        layer l;

        l.il          = kv->layers[ikv].il;
        l.ikv         = ikv;
        l.n_head      = hparams.n_head(l.il);
        l.n_head_kv   = hparams.n_head_kv(l.il);
        l.n_embd_head = hparams.n_embd_head_k(l.il);

        if (kv->layers[ikv].v == nullptr) {
            return unsupported("a layer without values of its own");
        }

        layers.push_back(std::move(l));
    }
    std::sort(layers.begin(), layers.end(), [](const layer & a, const layer & b) { return a.il < b.il; });

    if (layers.empty()) {
        return unsupported("a model with sliding-window layers only");
    }

    return LLAMA_SHIFTKV_OK;
}

bool llama_shiftkv::alloc_buffers() {
    const int64_t n_cells = (int64_t) kv->get_size()*kv->get_n_stream();
    const int64_t n_embd  = lctx.get_model().hparams.n_embd;

    bufs.clear();

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctxs;

    for (auto & l : layers) {
        auto & ctx = ctxs[ggml_backend_buffer_get_type(kv->layers[l.ikv].k->buffer)];

        if (!ctx) {
            ggml_init_params params = {
                /*.mem_size   =*/ 3*layers.size()*ggml_tensor_overhead(),
                /*.mem_buffer =*/ nullptr,
                /*.no_alloc   =*/ true,
            };
            ctx.reset(ggml_init(params));
        }

        l.stats   = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 2, n_cells);
        l.hidden  = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n_embd, n_query + 1);
        l.queries = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, l.n_head*l.n_embd_head, n_query + 1);

        ggml_format_name(l.stats,   "shiftkv_stats_l%d",   l.il);
        ggml_format_name(l.hidden,  "shiftkv_hidden_l%d",  l.il);
        ggml_format_name(l.queries, "shiftkv_queries_l%d", l.il);
    }

    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!buf) {
            LLAMA_LOG_ERROR("%s: failed to allocate a buffer of type %s\n", __func__, ggml_backend_buft_name(buft));
            bufs.clear();
            n_query = 0;
            return false;
        }
        ggml_backend_buffer_clear(buf.get(), 0);
        bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    return true;
}

int32_t llama_shiftkv::start(llama_seq_id seq_id, uint32_t n_query) {
    stop();

    cell_ord.assign((size_t) kv->get_size()*kv->get_n_stream(), -1);
    n_ord = 0;

    this->seq_id = seq_id;
    error.clear();

    if (this->n_query != n_query) {
        this->n_query = n_query;
        if (!alloc_buffers()) {
            return LLAMA_SHIFTKV_ERR_COMPUTE;
        }

        // room for the nodes that capture; building the worst case also shows whether every layer can be captured
        for (auto & l : layers) {
            l.path = {};
        }
        capturing = true;
        lctx.sched_need_reserve = true;
        try {
            lctx.sched_reserve();
        } catch (const std::exception & e) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
            capturing = false;
            this->n_query = 0;
            return LLAMA_SHIFTKV_ERR_COMPUTE;
        }

        for (const auto & l : layers) {
            if (error.empty() && l.path.nodes.empty()) {
                error = format("layer %d has no attention of the usual form", l.il);
            }
        }
        if (!error.empty()) {
            LLAMA_LOG_ERROR("%s: not supported: %s\n", __func__, error.c_str());
            stop();
            this->n_query = 0;
            return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
        }
    }

    capturing = true;
    lctx.gf_res_prev_active = nullptr;

    return LLAMA_SHIFTKV_OK;
}

void llama_shiftkv::stop() {
    if (capturing) {
        capturing = false;
        lctx.gf_res_prev_active = nullptr;
    }
}

llm_graph_cb llama_shiftkv::graph_cb(llm_graph_cb next, llm_graph_result * res, const llama_memory_context_i * mctx) {
    // made with the graph's first layer
    auto inp = std::make_shared<llm_graph_input_shiftkv *>(nullptr);

    return [this, next, res, mctx, inp](const llama_ubatch & ubatch, ggml_tensor * cur, const char * name, int il) {
        next(ubatch, cur, name, il);

        if (strcmp(name, "kqv_out") == 0) {
            capture_layer(ubatch, cur, il, res, mctx, *inp);
        }
    };
}

void llama_shiftkv::capture_layer(const llama_ubatch & ubatch, ggml_tensor * kqv_out, int il,
        llm_graph_result * res, const llama_memory_context_i * mctx, llm_graph_input_shiftkv *& inp) {
    layer * l = find_layer(il);
    if (l == nullptr || !error.empty()) {
        return;
    }

    const auto & model = lctx.get_model();

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

    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();

    if (inp == nullptr) {
        const auto * mctx_kv = kv_swa ?
            static_cast<const llama_kv_cache_iswa_context *>(mctx)->get_base() :
            static_cast<const llama_kv_cache_context      *>(mctx);

        auto ptr = std::make_unique<llm_graph_input_shiftkv>(*this, mctx_kv);

        ptr->cells = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, ubatch.n_tokens);
        ptr->rows  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_query);
        ptr->slots = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_query);

        for (auto * tensor : { ptr->cells, ptr->rows, ptr->slots }) {
            ggml_set_input(tensor);
        }

        inp = static_cast<llm_graph_input_shiftkv *>(res->add_input(std::move(ptr)));
    }

    if (!ggml_is_contiguous(q)) {
        q = ggml_cont(ctx, q);
    }
    q = ggml_reshape_2d(ctx, q, l->n_head*l->n_embd_head, ubatch.n_tokens);

    ggml_tensor * sums = ggml_concat(ctx, ggml_sum_rows(ctx, hidden), ggml_sum_rows(ctx, ggml_sqr(ctx, hidden)), 0);

    ggml_build_forward_expand(gf, ggml_set_rows(ctx, l->stats,   sums, inp->cells));
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, l->hidden,  ggml_get_rows(ctx, hidden, inp->rows), inp->slots));
    ggml_build_forward_expand(gf, ggml_set_rows(ctx, l->queries, ggml_get_rows(ctx, q,      inp->rows), inp->slots));
}

void llama_shiftkv::set_input(llm_graph_input_shiftkv & inp, const llama_ubatch * ubatch) {
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

    for (size_t i = 0; i < tokens.size(); ++i) {
        cell_ord[cells[tokens[i]]] = n_ord;

        if (i + n_keep >= tokens.size()) {
            const size_t k = i + n_keep - tokens.size();
            rows [k] = tokens[i];
            slots[k] = n_ord % n_query;
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

llama_shiftkv::layer * llama_shiftkv::find_layer(int32_t il) {
    for (auto & l : layers) {
        if (l.il == il) {
            return &l;
        }
    }
    return nullptr;
}

int32_t llama_shiftkv::collect(std::vector<uint32_t> & cells) const {
    const uint32_t strm = kv->get_stream(seq_id);

    cells.clear();
    for (const auto & pos_cell : kv->get_cells(seq_id).seq_pos_get(seq_id)) {
        cells.push_back(pos_cell.second);
    }

    if (cells.empty()) {
        return LLAMA_SHIFTKV_ERR_EMPTY;
    }
    // a last token that was moved has its query at another distance from the keys
    if (n_ord == 0 || cell_ord[(size_t) strm*kv->get_size() + cells.back()] != n_ord - 1 || kv->seq_pos_max(seq_id) != pos_last) {
        return LLAMA_SHIFTKV_ERR_STALE;
    }
    return LLAMA_SHIFTKV_OK;
}

uint64_t llama_shiftkv::fingerprint(const std::vector<uint32_t> & cells) const {
    const ggml_tensor * k = kv->layers[layers[0].ikv].k_stream[kv->get_stream(seq_id)];

    const auto [lo, hi] = std::minmax_element(cells.begin(), cells.end());

    const size_t nb_row = k->nb[1];
    std::vector<uint8_t> rows((*hi - *lo + 1)*nb_row);
    ggml_backend_tensor_get(k, rows.data(), *lo*nb_row, rows.size());

    // FNV-1a, over 16 bits at a time: rows are whole multiples of that
    uint64_t hash = 14695981039346656037ull;
    for (const uint32_t cell : cells) {
        const uint8_t * row = rows.data() + (cell - *lo)*nb_row;
        for (size_t i = 0; i + 1 < nb_row; i += 2) {
            hash = (hash ^ (row[i] | row[i + 1] << 8))*1099511628211ull;
        }
    }
    return hash;
}

int32_t llama_shiftkv::get_stats(const layer & l, const std::vector<uint32_t> & cells, uint32_t n_stat, float & mean, float & sd) const {
    const size_t  offs = (size_t) kv->get_stream(seq_id)*kv->get_size();
    const int64_t n_embd = lctx.get_model().hparams.n_embd;

    // the last tokens, as far as they were captured
    std::vector<size_t> rows;
    for (size_t i = cells.size() - std::min<size_t>(n_stat, cells.size()); i < cells.size(); ++i) {
        if (cell_ord[offs + cells[i]] >= 0) {
            rows.push_back(offs + cells[i]);
        }
    }

    const auto [lo, hi] = std::minmax_element(rows.begin(), rows.end());

    std::vector<float> sums((*hi - *lo + 1)*2);
    ggml_backend_tensor_get(l.stats, sums.data(), *lo*2*sizeof(float), sums.size()*sizeof(float));

    double s1 = 0.0;
    double s2 = 0.0;
    for (const size_t row : rows) {
        s1 += sums[(row - *lo)*2];
        s2 += sums[(row - *lo)*2 + 1];
    }

    const double n = (double) rows.size()*n_embd;

    mean = s1/n;
    sd   = std::sqrt(std::max(0.0, s2/n - (s1/n)*(s1/n)));

    return LLAMA_SHIFTKV_OK;
}

std::vector<int32_t> llama_shiftkv::ring_rows(const std::vector<uint32_t> & cells, size_t n) const {
    const size_t offs = (size_t) kv->get_stream(seq_id)*kv->get_size();

    // tokens that were taken back and decoded again have pushed others off the ring
    std::vector<int32_t> res;
    for (size_t i = cells.size(); i > 0 && res.size() < n; --i) {
        const int64_t ord = cell_ord[offs + cells[i - 1]];
        if (ord < std::max<int64_t>(0, n_ord - n_query)) {
            break;
        }
        res.push_back(ord % n_query);
    }
    std::reverse(res.begin(), res.end());

    return res;
}

std::vector<float> llama_shiftkv::get_ring(const ggml_tensor * ring, const std::vector<uint32_t> & cells) const {
    const auto rows = ring_rows(cells, n_query);

    std::vector<float> res(rows.size()*ring->ne[0]);
    for (size_t i = 0; i < rows.size(); ++i) {
        ggml_backend_tensor_get(ring, res.data() + i*ring->ne[0], rows[i]*ring->nb[1], ring->nb[1]);
    }
    return res;
}

std::vector<float> llama_shiftkv::get_keys(const layer & l, const std::vector<uint32_t> & cells) const {
    const ggml_tensor * k = kv->layers[l.ikv].k_stream[kv->get_stream(seq_id)];

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

bool llama_shiftkv::compute(const std::function<void(ggml_context *, ggml_cgraph *)> & build, const std::function<void()> & set) {
    auto * sched = lctx.get_sched();
    auto * res   = lctx.get_gf_res_reserve();

    ggml_backend_sched_reset(sched);
    res->reset();
    for (auto & prev : lctx.gf_res_prev) {
        if (prev) {
            prev->reset();
        }
    }
    lctx.gf_res_prev_active = nullptr;

    build(res->get_ctx(), res->get_gf());

    if (!ggml_backend_sched_alloc_graph(sched, res->get_gf())) {
        LLAMA_LOG_ERROR("%s: failed to allocate the graph\n", __func__);
        return false;
    }

    set();

    if (lctx.graph_compute(res->get_gf(), true) != GGML_STATUS_SUCCESS) {
        return false;
    }
    ggml_backend_sched_synchronize(sched);

    return true;
}

//
// C API
//

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

int32_t llama_shiftkv_capture(llama_context * ctx, llama_seq_id seq_id, uint32_t n_query) {
    if (ctx == nullptr || seq_id < 0 || (uint32_t) seq_id >= ctx->n_seq_max() || n_query < 1 || n_query > SHIFTKV_QUERY_MAX) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }

    ctx->synchronize();

    if (!ctx->shiftkv) {
        auto skv = std::make_unique<llama_shiftkv>(*ctx);
        const int32_t status = skv->init();
        if (status != LLAMA_SHIFTKV_OK) {
            return status;
        }
        ctx->shiftkv = std::move(skv);
    }

    return ctx->shiftkv->start(seq_id, n_query);
}

int32_t llama_shiftkv_capture_end(llama_context * ctx) {
    if (ctx == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (ctx->shiftkv) {
        ctx->shiftkv->stop();
    }
    return LLAMA_SHIFTKV_OK;
}

int32_t llama_shiftkv_select(llama_context * ctx, const llama_shiftkv_params * params) {
    if (ctx == nullptr || params == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!ctx->shiftkv || !ctx->shiftkv->capturing) {
        return LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
    }
    return ctx->shiftkv->select(*params, nullptr, 0);
}

int32_t llama_shiftkv_select_scores(llama_context * ctx, const llama_shiftkv_params * params, const float * scores, size_t n_scores) {
    if (ctx == nullptr || params == nullptr || scores == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!ctx->shiftkv || !ctx->shiftkv->capturing) {
        return LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
    }
    return ctx->shiftkv->select(*params, scores, n_scores);
}

int32_t llama_shiftkv_compact(llama_context * ctx, llama_context * ctx_dst, llama_seq_id seq_dst) {
    if (ctx == nullptr || ctx_dst == nullptr || seq_dst < 0 || (uint32_t) seq_dst >= ctx_dst->n_seq_max()) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!ctx->shiftkv || !ctx->shiftkv->selected) {
        return LLAMA_SHIFTKV_ERR_NO_SELECTION;
    }
    return ctx->shiftkv->compact(*ctx_dst, seq_dst);
}

int32_t llama_shiftkv_get_info(llama_context * ctx, llama_shiftkv_info * info) {
    if (ctx == nullptr || info == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!ctx->shiftkv || !ctx->shiftkv->selected) {
        return LLAMA_SHIFTKV_ERR_NO_SELECTION;
    }
    *info = ctx->shiftkv->sel.info;
    return LLAMA_SHIFTKV_OK;
}

int32_t llama_shiftkv_get_layers(llama_context * ctx, int32_t * out, size_t n_out) {
    if (ctx == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!ctx->shiftkv || ctx->shiftkv->n_query == 0) { // 0: the capture was refused
        return LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
    }
    const auto & layers = ctx->shiftkv->layers;
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
    if (!ctx->shiftkv || ctx->shiftkv->n_query == 0) {
        return LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
    }
    const auto * l = ctx->shiftkv->find_layer(il);
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
static int32_t get_selected(llama_context * ctx, int32_t il, int32_t kv_head, T * out, size_t n_out,
        std::vector<std::vector<std::vector<T>>> llama_shiftkv::selection::* rows) {
    if (ctx == nullptr || out == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!ctx->shiftkv || !ctx->shiftkv->selected || (ctx->shiftkv->sel.*rows).empty()) {
        return LLAMA_SHIFTKV_ERR_NO_SELECTION;
    }
    const auto & skv = *ctx->shiftkv;
    const auto * l   = ctx->shiftkv->find_layer(il);
    if (l == nullptr || kv_head < 0 || kv_head >= l->n_head_kv) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    const auto & row = (skv.sel.*rows)[l - skv.layers.data()][kv_head];
    if (n_out < row.size()) {
        return LLAMA_SHIFTKV_ERR_NO_SPACE;
    }
    std::copy(row.begin(), row.end(), out);
    return row.size();
}

int32_t llama_shiftkv_get_kept(llama_context * ctx, int32_t il, int32_t kv_head, int32_t * out, size_t n_out) {
    return get_selected(ctx, il, kv_head, out, n_out, &llama_shiftkv::selection::kept);
}

int32_t llama_shiftkv_get_scores(llama_context * ctx, int32_t il, int32_t kv_head, float * out, size_t n_out) {
    return get_selected(ctx, il, kv_head, out, n_out, &llama_shiftkv::selection::scores);
}

// common to the functions that read what was captured
static int32_t get_captured(llama_context * ctx, int32_t il, const void * out, const llama_shiftkv::layer *& l, std::vector<uint32_t> & cells) {
    if (ctx == nullptr || out == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!ctx->shiftkv || !ctx->shiftkv->capturing) {
        return LLAMA_SHIFTKV_ERR_NOT_CAPTURING;
    }
    l = ctx->shiftkv->find_layer(il);
    if (l == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    ctx->synchronize();
    return ctx->shiftkv->collect(cells);
}

int32_t llama_shiftkv_get_stats(llama_context * ctx, int32_t il, uint32_t n_stat, float * out) {
    const llama_shiftkv::layer * l;
    std::vector<uint32_t> cells;
    const int32_t status = get_captured(ctx, il, out, l, cells);
    if (status != LLAMA_SHIFTKV_OK) {
        return status;
    }
    if (n_stat < 1) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    return ctx->shiftkv->get_stats(*l, cells, n_stat, out[0], out[1]);
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
    const llama_shiftkv::layer * l;
    std::vector<uint32_t> cells;
    const int32_t status = get_captured(ctx, il, out, l, cells);
    return status != LLAMA_SHIFTKV_OK ? status : put_rows(ctx->shiftkv->get_ring(l->hidden, cells), l->hidden->ne[0], out, n_out);
}

int32_t llama_shiftkv_get_queries(llama_context * ctx, int32_t il, float * out, size_t n_out) {
    const llama_shiftkv::layer * l;
    std::vector<uint32_t> cells;
    const int32_t status = get_captured(ctx, il, out, l, cells);
    return status != LLAMA_SHIFTKV_OK ? status : put_rows(ctx->shiftkv->get_ring(l->queries, cells), l->queries->ne[0], out, n_out);
}

int32_t llama_shiftkv_get_keys(llama_context * ctx, int32_t il, float * out, size_t n_out) {
    const llama_shiftkv::layer * l;
    std::vector<uint32_t> cells;
    const int32_t status = get_captured(ctx, il, out, l, cells);
    return status != LLAMA_SHIFTKV_OK ? status : put_rows(ctx->shiftkv->get_keys(*l, cells), l->n_head_kv*l->n_embd_head, out, n_out);
}

int64_t llama_shiftkv_cache_size(llama_context * ctx) {
    if (ctx == nullptr) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (ctx->get_memory() == nullptr) {
        return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
    }
    int64_t size = 0;
    for (const auto & [buft, n] : ctx->get_memory()->memory_breakdown()) {
        size += n;
    }
    return size;
}
