#pragma once

#include "ggml.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>

class  llama_kv_cache;
struct llama_context;
class llm_graph_result;

// A context as the selection uses it. Its file is the only one of ours that looks inside llama_context
struct llama_shiftkv_context {
    llama_context & lctx;

    // let the next decode build its graph anew
    void drop_graph();

    // lay the compute buffers out for the worst case. throws as llama_context does
    void reserve();

    // the same before the next decode, without what is not needed any more; on the CPU only
    void give_back_later();

    // wait for what runs, and apply what is pending in the memory (shifts, copies)
    void update();

    // another cache of n_ctx cells in place of the memory, for graphs that are built anew each time
    void set_memory(std::unique_ptr<llama_kv_cache> memory, uint32_t n_ctx);

    // run a graph that is no forward pass of the model: build(ctx, gf), then after allocation set(), then compute
    bool compute(const std::function<void(ggml_context *, ggml_cgraph *)> & build, const std::function<void()> & set);

    // the bytes that its temporary tensors would take, over all devices; and what a backend has to support for it: operations, then type,
    // size and bytes of the result and of what it is made of. reserve() has to come after the last one
    size_t measure(const std::function<void(ggml_context *, ggml_cgraph *)> & build, std::set<std::string> & operations);

private:
    llm_graph_result * start_graph();
};
