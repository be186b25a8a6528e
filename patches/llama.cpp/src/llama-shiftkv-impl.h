#pragma once

#include "llama-shiftkv.h"

#include "llama-shiftkv-capture.h"
#include "llama-shiftkv-layers.h"

#include <vector>

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
    };

    llama_shiftkv(llama_context & lctx) : capture(lctx) {}

    // llama-shiftkv-select.cpp
    // scores: null, or the caller's; il: the only layer that is ranked, or -1
    int32_t select(const llama_shiftkv_params & params, const float * scores, size_t n_scores, int32_t il = -1);

    // n_proxy*n_embd standard normal numbers
    const std::vector<float> & get_noise(uint32_t seed, uint32_t n_proxy);

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

private:
    int32_t select_layer(size_t i_layer, const llama_shiftkv_params & params, const float * scores);

    std::vector<float> noise; // of the last selection that drew any, with its seed
    uint32_t noise_seed = 0;
};
