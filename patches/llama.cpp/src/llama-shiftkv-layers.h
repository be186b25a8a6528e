#pragma once

#include "llama-shiftkv-cache.h"

#include "llama.h"

#include "ggml-cpp.h"

#include <memory>
#include <vector>

struct llama_context;
struct llama_shiftkv;
struct llama_shiftkv_params;
struct llama_ubatch;
class  llm_graph_result;

// Prefill layer by layer: the whole prompt through one layer, whose pairs are selected and handed over before the next layer's take
// their place. Between two layers the prompt is its hidden states
struct llama_shiftkv_layers {
    llama_shiftkv_layers(llama_shiftkv & skv) : skv(skv) {}

    // give the context a cache for the pairs of one layer; n_ctx cells
    int32_t init(uint32_t n_ctx, uint32_t n_query);

    // whether the context has that cache: then it can do nothing else
    bool begun() const { return states != nullptr; }

    // of a graph for the tokens of a ubatch, what computes the layer that is read; null if these are not its tokens
    ggml_cgraph * window(ggml_cgraph * gf, llm_graph_result & res, const llama_ubatch & ubatch);

    // hand over what is selected of the layer that was read, and go on to the next one: how many are left
    int32_t next(const llama_shiftkv_params & params, const float * scores, size_t n_scores, llama_context & dst, llama_seq_id seq_dst);

private:
    // the nodes of a layer in a graph for n tokens: from first to stop - 1; what it reads and what it makes, null at either end of the model
    struct range {
        int first;
        int stop;
        ggml_tensor * in;
        ggml_tensor * out;
    };
    bool find(ggml_cgraph * gf, int32_t il, int64_t n, range & res) const;

    int32_t move(llama_context & dst, llama_seq_id seq_dst);

    llama_shiftkv & skv;

    int32_t n_layer = 0;
    int32_t il      = 0; // the layer that is read

    std::vector<llama_pos> pos;          // of the prompt, as the first layer was given it
    size_t                 n_tokens = 0; // of it that this layer has read

    ggml_context_ptr        ctx_states;
    ggml_backend_buffer_ptr buf_states;
    ggml_tensor *           states = nullptr; // F32 [n_embd, n_ctx] what comes out of the last layer, of this one as far as it is read

    ggml_context_ptr ctx_window;

    // where the pairs go: cells that nothing is said of until all layers are there
    llama_context *                        dst     = nullptr;
    llama_seq_id                           seq_dst = -1;
    std::vector<uint32_t>                  cells_dst;
    std::vector<llama_shiftkv_cache::meta> metas;
};
