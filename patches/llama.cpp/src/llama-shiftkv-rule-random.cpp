#include "llama-shiftkv-rules.h"

#include <random>

// by chance: what any other rule has to beat

static std::vector<float> fill(const llama_shiftkv_scoring & s) {
    std::mt19937 rng(s.params.seed + 0x9e3779b9u*(s.l.il + 1));

    std::vector<float> res(s.l.n_head_kv*s.n_prompt());
    for (auto & v : res) {
        v = (rng() >> 8)/16777216.0f; // [0, 1), 24 bits
    }
    return res;
}

static const llama_shiftkv_register reg({
    /*.name     =*/ "random",
    /*.defaults =*/ [](llama_shiftkv_params &) {},
    /*.valid    =*/ [](const llama_shiftkv_params &) { return true; },
    /*.n_query  =*/ [](const llama_shiftkv_params &) { return 0u; },
    /*.score    =*/ nullptr,
    /*.fill     =*/ fill,
});
