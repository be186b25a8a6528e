#pragma once

#include "llama-shiftkv.h"

#include "llama-graph.h"
#include "llama-kv-cache.h"

#include "ggml-cpp.h"

#include <functional>
#include <map>
#include <string>
#include <vector>

struct llama_context;
struct llama_model;

class llm_graph_input_shiftkv;

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

// per context: capture during prefill, selection, hand-over
struct llama_shiftkv {
    // what is known of a layer that can be cut
    struct layer {
        int32_t il;
        int32_t ikv; // index in the KV cache

        int64_t n_head;
        int64_t n_head_kv;
        int64_t n_embd_head;

        float kq_scale = 0.0f;
        float soft_cap = 0.0f; // 0: none

        llama_shiftkv_path path;

        // on the layer's own device
        ggml_tensor * stats   = nullptr; // F32 [2, cells]              sum and sum of squares of a token's hidden state, by cell
        ggml_tensor * hidden  = nullptr; // F32 [n_embd, n_query + 1]   a ring; the last row takes what isn't wanted
        ggml_tensor * queries = nullptr; // F32 [n_head*d, n_query + 1] likewise
    };

    // what a selection found
    struct selection {
        llama_shiftkv_info info;

        std::vector<uint32_t> cells;     // the prompt's cells in order: index into the prompt -> cell
        std::vector<uint32_t> cells_all; // the same, and those of what was captured after it
        llama_seq_id          seq_id;
        llama_pos             n_past;    // position after the prompt
        uint64_t              hash;      // fingerprint() of cells_all

        // per cut layer and KV head
        std::vector<std::vector<std::vector<int32_t>>> kept;   // indices into the prompt, ascending
        std::vector<std::vector<std::vector<float>>>   scores; // empty unless asked for
    };

    llama_shiftkv(llama_context & lctx);

    // the memory's cache that is cut (of a sliding-window model: that of its full-attention layers) and its window cache, or null
    llama_kv_cache * kv     = nullptr;
    llama_kv_cache * kv_swa = nullptr;

    // llama-shiftkv.cpp
    int32_t init(); // UNSUPPORTED if the model or its memory can't be cut
    int32_t start(llama_seq_id seq_id, uint32_t n_query);
    void    stop();

    // wrap the graph's callback so that the graph also captures; used while capturing
    llm_graph_cb graph_cb(llm_graph_cb next, llm_graph_result * res, const llama_memory_context_i * mctx);

    // note the tokens of a ubatch that is about to be computed
    void set_input(llm_graph_input_shiftkv & inp, const llama_ubatch * ubatch);

    // the cells of the captured sequence in the order of its tokens
    int32_t collect(std::vector<uint32_t> & cells) const;

    // of the keys that the cells hold in the first cut layer: shows whether they are still those of a selection
    uint64_t fingerprint(const std::vector<uint32_t> & cells) const;

    int32_t get_stats(const layer & l, const std::vector<uint32_t> & cells, uint32_t n_stat, float & mean, float & sd) const;

    // the last tokens, n at most, that are still in the rings, oldest first: their rows there
    std::vector<int32_t> ring_rows(const std::vector<uint32_t> & cells, size_t n) const;

    // rows of hidden or queries; of the keys
    std::vector<float> get_ring(const ggml_tensor * ring, const std::vector<uint32_t> & cells) const;
    std::vector<float> get_keys(const layer & l, const std::vector<uint32_t> & cells) const;

    layer * find_layer(int32_t il);

    // llama-shiftkv-select.cpp
    int32_t select(const llama_shiftkv_params & params, const float * scores, size_t n_scores); // scores: null, or the caller's

    // n_proxy*n_embd standard normal numbers
    const std::vector<float> & get_noise(uint32_t seed, uint32_t n_proxy);

    // llama-shiftkv-compact.cpp
    int32_t compact(llama_context & dst, llama_seq_id seq_dst);

    // run a graph that is no forward pass of the model: build(ctx, gf), then after allocation set(), then compute
    bool compute(const std::function<void(ggml_context *, ggml_cgraph *)> & build, const std::function<void()> & set);

    llama_context & lctx;

    bool         capturing = false;
    llama_seq_id seq_id    = -1;
    uint32_t     n_query   = 0; // rows of the query rings

    std::vector<layer> layers; // in the order of the model's layers
    std::string        error;  // why a layer can't be captured, set while a graph is built

    selection sel;
    bool      selected = false;

private:
    void capture_layer(const llama_ubatch & ubatch, ggml_tensor * kqv_out, int il,
            llm_graph_result * res, const llama_memory_context_i * mctx, llm_graph_input_shiftkv *& inp);

    bool    alloc_buffers();
    int32_t select_layer(size_t i_layer, const llama_shiftkv_params & params, const float * scores);

    // idxs: per KV head, cells of src that go to dst_cells
    bool    move_layer(llama_kv_cache & src, llama_seq_id seq_src, llama_kv_cache & dst, llama_seq_id seq_dst, size_t ikv,
            const std::vector<std::vector<int32_t>> & idxs, const std::vector<uint32_t> & dst_cells);

    // by cell: ordinal of the captured token that was last written to it, -1 if none
    std::vector<int64_t> cell_ord;
    int64_t n_ord = 0;

    llama_pos pos_last = -1; // of the last captured token

    std::vector<float> noise; // of the last selection that drew any, with its seed
    uint32_t noise_seed = 0;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;
};
