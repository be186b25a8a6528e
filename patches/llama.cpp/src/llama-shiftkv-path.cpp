#include "llama-shiftkv-path.h"

#include "llama-impl.h"

#include <cstring>

static bool is_view_op(ggml_op op) {
    return op == GGML_OP_VIEW || op == GGML_OP_RESHAPE;
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
