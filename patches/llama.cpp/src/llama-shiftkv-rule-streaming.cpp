#include "llama-shiftkv-rules.h"

// StreamingLLM, arXiv:2309.17453: the first tokens, and then the most recent ones

static std::vector<float> fill(const llama_shiftkv_scoring & s) {
    std::vector<float> res;
    for (int64_t h = 0; h < s.l.n_head_kv; ++h) {
        for (int64_t i = 0; i < s.n_prompt(); ++i) {
            res.push_back(i);
        }
    }
    return res;
}

static const llama_shiftkv_register reg({
    /*.name     =*/ "streamingllm",
    /*.defaults =*/ [](llama_shiftkv_params & params) { params.n_sink = 4; },
    /*.valid    =*/ [](const llama_shiftkv_params &) { return true; },
    /*.n_query  =*/ [](const llama_shiftkv_params &) { return 0u; },
    /*.score    =*/ nullptr,
    /*.fill     =*/ fill,
});
