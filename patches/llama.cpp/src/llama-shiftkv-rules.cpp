#include "llama-shiftkv-rules.h"

#include <algorithm>
#include <cstring>

// made by whichever file registers first
static std::vector<llama_shiftkv_rule> & registered() {
    static std::vector<llama_shiftkv_rule> rules;
    return rules;
}

// sorted, as files register in no certain order
llama_shiftkv_register::llama_shiftkv_register(const llama_shiftkv_rule & rule) {
    auto & rules = registered();
    rules.insert(std::upper_bound(rules.begin(), rules.end(), rule, [](const auto & a, const auto & b) { return strcmp(a.name, b.name) < 0; }), rule);
}

const std::vector<llama_shiftkv_rule> & llama_shiftkv_rules() {
    return registered();
}

const llama_shiftkv_rule * llama_shiftkv_get_rule(int32_t method) {
    const auto & rules = registered();
    return method >= 0 && (size_t) method < rules.size() ? &rules[method] : nullptr;
}
