#pragma once

#include "llama-shiftkv-score.h"

// limits of llama-shiftkv.h
static constexpr uint32_t SHIFTKV_PROXY_MAX = 4096;
static constexpr uint32_t SHIFTKV_QUERY_MAX = 512;

// the noise of all proxies stays, on the device too, from one selection to the next, if it is no larger than this
static constexpr size_t SHIFTKV_NOISE_KEPT = 16*1024*1024;

// how the keys of a layer are scored: higher is better
struct llama_shiftkv_rule {
    // what the method is called, for users too
    const char * name;

    // the method's own settings as published, where they differ from the common ones
    void (*defaults)(llama_shiftkv_params & params);

    // whether the method's own settings are in range
    bool (*valid)(const llama_shiftkv_params & params);

    // how many of the last queries or hidden states it looks at
    uint32_t (*n_query)(const llama_shiftkv_params & params);

    // on the layer's device: s.scores(), and s.observed() if params.observed > 0
    void (*score)(llama_shiftkv_scoring & s);

    // or, if that is null, on the host: [n_head_kv][n_prompt]
    std::vector<float> (*fill)(const llama_shiftkv_scoring & s);
};

// A rule is a file llama-shiftkv-rule-*.cpp that registers it with a static object of this type. Nothing refers to such an object:
// it is there because libllama is a shared library, which all object files go into. From a static one a linker would leave it out
struct llama_shiftkv_register {
    llama_shiftkv_register(const llama_shiftkv_rule & rule);
};

// all rules, by name; a method's number is its place among them
const std::vector<llama_shiftkv_rule> & llama_shiftkv_rules();

// null for an unknown method
const llama_shiftkv_rule * llama_shiftkv_get_rule(int32_t method);

// SnapKV's scores, into a tensor [n_kv, n_head_kv]
void llama_shiftkv_observe(llama_shiftkv_scoring & s, ggml_tensor * to);
