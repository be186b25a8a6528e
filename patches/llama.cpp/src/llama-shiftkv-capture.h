#pragma once

#include "llama-shiftkv-cache.h"
#include "llama-shiftkv-context.h"
#include "llama-shiftkv-path.h"

#include "llama-graph.h"

#include "ggml-cpp.h"

#include <string>
#include <vector>

class llm_graph_input_shiftkv;

// what is known of a layer that can be cut
struct llama_shiftkv_layer {
    int32_t il;
    size_t  ikv; // index in the KV cache

    int64_t n_head;
    int64_t n_head_kv;
    int64_t n_embd_head;
    int64_t n_embd_head_v;

    float kq_scale = 0.0f;
    float soft_cap = 0.0f; // 0: none

    llama_shiftkv_path path;

    // on the layer's own device
    ggml_tensor * stats   = nullptr; // F32 [2, cells]              sum and sum of squares of a token's hidden state, by cell
    ggml_tensor * hidden  = nullptr; // F32 [n_embd, n_query + 1]   a ring; the last row takes what isn't wanted
    ggml_tensor * queries = nullptr; // F32 [n_head*d, n_query + 1] likewise
};

// what the prefill of a sequence leaves behind for the selection
struct llama_shiftkv_prefill {
    llama_shiftkv_prefill(llama_context & lctx);

    int32_t init(); // UNSUPPORTED if the model or its memory can't be cut
    int32_t start(llama_seq_id seq_id, uint32_t n_query);
    void    end(); // give the memory back

    // nodes that a graph needs room for beside the model's own
    uint32_t n_nodes() const;

    // wrap the graph's callback so that the graph also captures
    llm_graph_cb graph_cb(llm_graph_cb next, llm_graph_result * res, const llama_memory_context_i * mctx);

    // note the tokens of a ubatch that is about to be computed
    void set_input(llm_graph_input_shiftkv & inp, const llama_ubatch * ubatch);

    // the cells of the captured sequence in the order of its tokens
    int32_t collect(std::vector<llama_shiftkv_cache::cell> & cells) const;

    // the same while the capture is on: STALE also if the last one's query is gone
    int32_t collect_with_query(std::vector<llama_shiftkv_cache::cell> & cells) const;

    // mean and standard deviation of the hidden state over the last tokens, n_stat at most
    void get_stats(const llama_shiftkv_layer & l, const std::vector<uint32_t> & cells, uint32_t n_stat, float & mean, float & sd) const;

    // the last tokens, n at most, as far as they were captured: their rows in the statistics
    std::vector<int32_t> stat_rows(const std::vector<uint32_t> & cells, size_t n) const;

    // the last tokens, n at most, that are still in the rings, oldest first: their rows there
    std::vector<int32_t> ring_rows(const std::vector<uint32_t> & cells, size_t n) const;

    // rows of hidden or queries; of the keys
    std::vector<float> get_ring(const ggml_tensor * ring, const std::vector<uint32_t> & cells) const;
    std::vector<float> get_keys(const llama_shiftkv_layer & l, const std::vector<uint32_t> & cells) const;

    const llama_shiftkv_layer * find_layer(int32_t il) const;

    llama_shiftkv_context ctx;

    // the memory's cache that is cut (of a sliding-window model: that of its full-attention layers) and its window cache, or none
    llama_shiftkv_cache cache;
    llama_shiftkv_cache cache_swa;

    bool         on      = false;
    bool         ready   = false; // has been on: the layers are known
    llama_seq_id seq_id  = -1;
    uint32_t     n_query = 0;     // rows of the query rings
    int32_t      only    = -1;    // the only layer that is captured, or -1

    std::vector<llama_shiftkv_layer> layers; // in the order of the model's layers
    std::string                      error;  // why a layer can't be captured, set while a graph is built

private:
    void capture_layer(const llama_ubatch & ubatch, ggml_tensor * kqv_out, int il,
            llm_graph_result * res, const llama_memory_context_i * mctx, llm_graph_input_shiftkv *& inp);

    bool alloc_buffers(uint32_t n_query);

    // ordinal of the captured token that a cell of the sequence holds, -1 if it holds another
    int64_t ord(uint32_t cell) const;

    // by cell: the captured token that was last written to it, where it was, and which writing of the cell that was
    struct written {
        int64_t   ord = -1;
        llama_pos pos = -1;
        uint64_t  gen = 0;
    };
    std::vector<written> cell_written;
    int64_t   n_ord    = 0;
    llama_pos pos_last = -1; // of the last captured token

    // by row of the rings: whose it is, as index into cell_written, and which writing of that
    struct owner {
        size_t   cell = 0;
        uint64_t gen  = 0;
        bool     set  = false;
    };
    std::vector<owner> ring;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;
};

// the cache that is cut, and the window cache or none, of a memory that has them, else none
std::pair<llama_shiftkv_cache, llama_shiftkv_cache> llama_shiftkv_caches(llama_memory_i * memory);
