#pragma once

#include "llama-shiftkv.h"

#include "llama-shiftkv-capture.h"

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
    int32_t select(const llama_shiftkv_params & params, const float * scores, size_t n_scores); // scores: null, or the caller's

    // n_proxy*n_embd standard normal numbers
    const std::vector<float> & get_noise(uint32_t seed, uint32_t n_proxy);

    // llama-shiftkv-compact.cpp
    int32_t compact(llama_context & dst, llama_seq_id seq_dst);

    llama_shiftkv_prefill capture;

    selection sel;
    bool      selected = false;

private:
    int32_t select_layer(size_t i_layer, const llama_shiftkv_params & params, const float * scores);

    // idxs: per KV head, cells of src that go to dst_cells
    bool    move_layer(const llama_shiftkv_cache & src, llama_seq_id seq_src, const llama_shiftkv_cache & dst, llama_seq_id seq_dst, size_t ikv,
            const std::vector<std::vector<int32_t>> & idxs, const std::vector<uint32_t> & dst_cells);

    std::vector<float> noise; // of the last selection that drew any, with its seed
    uint32_t noise_seed = 0;
};
