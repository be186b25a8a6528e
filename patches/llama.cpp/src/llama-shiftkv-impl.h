#pragma once

#include "llama-shiftkv.h"

#include "llama-shiftkv-capture.h"
#include "llama-shiftkv-layers.h"
#include "llama-shiftkv-store.h"

#include <memory>
#include <set>
#include <string>
#include <vector>

struct llama_shiftkv_scoring;

// per context: capture during prefill, selection, hand-over
struct llama_shiftkv {
    // what a selection found
    struct selection {
        llama_shiftkv_info info;

        std::vector<llama_shiftkv_cache::cell> captured; // the cells of all that was captured
        std::vector<uint32_t>                  cells;    // the prompt's, in order: index into the prompt -> cell
        llama_seq_id                           seq_id;

        // per cut layer and KV head
        std::vector<std::vector<std::vector<int32_t>>> kept;   // indices into the prompt, ascending
        std::vector<std::vector<std::vector<float>>>   scores; // empty unless asked for

        // the first tokens that are always kept: how many; and the first of the last ones that are
        std::pair<size_t, size_t> always_kept(const llama_shiftkv_params & params) const;

        // pairs that are kept by the second scores
        size_t n_observed(const llama_shiftkv_params & params) const;
    };

    llama_shiftkv(llama_context & lctx) : capture(lctx) {}

    // llama-shiftkv-select.cpp
    // scores: null, or the caller's; il: the only layer that is ranked, or -1
    int32_t select(const llama_shiftkv_params & params, const float * scores, size_t n_scores, int32_t il = -1);

    // bytes that a selection from a prompt of n_prompt tokens takes beside the cache
    int64_t select_size(const llama_shiftkv_params & params, uint32_t n_prompt);

    // n_proxy*n_embd standard normal numbers, or more
    const std::vector<float> & get_noise(uint32_t seed, uint32_t n_proxy);

    // write or read all of a tensor, and count its bytes
    void set(ggml_tensor * t, const void * data);
    void get(const ggml_tensor * t, void * data);

    // llama-shiftkv-compact.cpp
    int32_t compact(llama_context & dst, llama_seq_id seq_dst);

    // what is to be computed of a graph of the model
    ggml_cgraph * graph(ggml_cgraph * gf, llm_graph_result & res, const llama_ubatch & ubatch) {
        return gf && layers ? layers->window(gf, res, ubatch) : gf;
    }

    // idxs: per KV head, cells of src that go to dst_cells
    bool move_layer(const llama_shiftkv_cache & src, llama_seq_id seq_src, size_t ikv_src, const llama_shiftkv_cache & dst, llama_seq_id seq_dst, size_t ikv_dst,
            const std::vector<std::vector<int32_t>> & idxs, const std::vector<uint32_t> & dst_cells);

    llama_shiftkv_prefill capture;

    std::unique_ptr<llama_shiftkv_layers> layers; // of a context that reads layer by layer, else null

    selection sel;
    bool      selected = false;
    uint64_t  n_select = 0; // selections so far

    llama_shiftkv_store store;
    size_t graph_size = 0;           // of the largest graph and the store, where that only measures ...
    std::set<std::string> graph_ops; // ... and what all of them compute

private:
    struct ranking; // llama-shiftkv-select.cpp

    llama_shiftkv_scoring scoring(size_t i_layer, const llama_shiftkv_params & params);

    int32_t select_layer(size_t i_layer, const llama_shiftkv_params & params, const float * scores);

    bool pick_on_host(size_t i_layer, const llama_shiftkv_params & params, const ranking & r); // false if scores are NaN

    std::shared_ptr<const std::vector<float>> noise; // of the last selection that drew any, with its seed
    uint32_t noise_seed = 0;
};
