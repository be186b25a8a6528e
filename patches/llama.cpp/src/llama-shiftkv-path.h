#pragma once

#include "ggml.h"

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

// the model's own way from the input of a layer's query projection to the query that attention sees, taken off a model graph.
// weights are leaves and stay valid as long as the model does, so the path can be built again in another graph, for other inputs.
struct llama_shiftkv_path {
    enum leaf_kind { NODE, HIDDEN, POS, ROT, WEIGHT, NONE };

    struct src_ref {
        leaf_kind     kind   = NONE;
        int32_t       node   = -1;      // NODE
        ggml_tensor * tensor = nullptr; // WEIGHT
    };

    struct node {
        ggml_op   op;
        ggml_type type;
        int64_t   ne[GGML_MAX_DIMS];
        size_t    nb[GGML_MAX_DIMS];
        int32_t   op_params[GGML_MAX_OP_PARAMS/sizeof(int32_t)];
        bool      view;
        size_t    view_offs; // relative to the source
        src_ref   src[GGML_MAX_SRC];
    };

    std::vector<node> nodes; // in topological order, the query last
    int64_t n_tokens = 0;    // tokens of the graph that it was taken off

    // the tensors that the path ends in and starts from are found by attention and by the weight: w0 or w1
    // false: something on the way can't be built again, error says what
    bool record(ggml_tensor * q, const ggml_tensor * w0, const ggml_tensor * w1, int64_t n_tokens, ggml_tensor ** hidden, std::string & error);

    // hidden: [n_embd, n], pos: as the model's, for n tokens, rot: as attention's; the last two may be null where the path has none
    ggml_tensor * build(ggml_context * ctx, ggml_tensor * hidden, ggml_tensor * pos, ggml_tensor * rot) const;

    // the same with the mean of the rotations to many positions, n_comp numbers each, which come in parts; eye is the unit matrix
    // [n_embd_head, n_embd_head]. neither is looked at where the path has no rotation
    ggml_tensor * build_mean(ggml_context * ctx, ggml_tensor * hidden, const std::vector<ggml_tensor *> & pos, int64_t n_comp, ggml_tensor * eye, ggml_tensor * rot) const;

    bool uses(leaf_kind kind) const;

private:
    using rope = std::function<ggml_tensor *(const node & n, ggml_tensor ** src)>;

    ggml_tensor * build(ggml_context * ctx, ggml_tensor * hidden, ggml_tensor * rot, const rope & build_rope) const;

    bool visit(ggml_tensor * t, ggml_tensor * hidden, std::map<ggml_tensor *, int32_t> & seen, std::string & error);
};

// sum over dimension 1 of a contiguous [a, n, b, 1] -> [a, 1, b, 1]
ggml_tensor * llama_shiftkv_sum_dim1(ggml_context * ctx, ggml_tensor * x);
