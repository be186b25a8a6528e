#pragma once

#include "llama-shiftkv-impl.h"

#include <functional>
#include <vector>

// what is to be scored: the keys of one layer, and what a rule builds its part of the graph with
struct llama_shiftkv_scoring {
    llama_shiftkv               & skv;
    const llama_shiftkv_prefill & capture;
    const llama_shiftkv_layer   & l;
    const llama_shiftkv_params  & params;
    const size_t                  i_layer; // among those that are cut

    // the cells from the prompt's first to its last: n_kv from c0 on. those in between that are not the prompt's hold finite numbers
    const std::vector<uint32_t> & cells; // index into the prompt -> cell
    uint32_t c0;
    int64_t  n_kv;

    ggml_tensor * k; // of all cells
    ggml_tensor * v;
    bool v_trans;

    int64_t n_pos_comp; // numbers that a position has

    ggml_context * ctx = nullptr;
    ggml_cgraph  * gf  = nullptr;

    // second scores, which params.observed of the budget goes by
    ggml_tensor * observed = nullptr;

    int64_t n_prompt() const { return cells.size(); }
    int64_t n_gqa()    const { return l.n_head/l.n_head_kv; }

    // an input and what it holds; the second one's numbers have to live on
    ggml_tensor * input(std::vector<float>   data, int64_t ne0, int64_t ne1 = 1);
    ggml_tensor * input(const float        * data, int64_t ne0, int64_t ne1);
    ggml_tensor * input(std::vector<int32_t> data);

    ggml_tensor * input_pos(const std::vector<llama_pos> & pos); // of text tokens; null if the query path has no rotation
    ggml_tensor * input_rot();                                   // null likewise
    ggml_tensor * input_valid(size_t first, size_t last);        // F32 [n_kv]: 1 for the prompt's tokens first .. last - 1, else 0

    // F32 [n_kv, ranges]: 0 where a query sees a key, else -inf; of each query, which tokens it sees: first and last + 1.
    // null if they all see everything
    ggml_tensor * input_mask(const std::vector<std::pair<size_t, size_t>> & ranges);

    // keys of n KV heads, as stored: [d, n_kv, n]
    ggml_tensor * keys(int64_t h0, int64_t n) const;

    // F32 [d, n_head_kv, n_kv], and the norms of the values, F32 [n_kv, n_head_kv]
    ggml_tensor * keys_f32();
    ggml_tensor * value_norms();

    // rows of a ring: queries F32 [d, rows, n_head], hidden states F32 [n_embd, rows]
    ggml_tensor * queries(const std::vector<int32_t> & rows);
    ggml_tensor * hidden (const std::vector<int32_t> & rows);

    // what f makes of some KV heads' keys and some of their queries, [n_kv, n, n_gqa*heads], summed over the queries of each group,
    // and over the heads of a KV head unless by_head: [n_kv, n_group, n_head_kv or n_head]; a few at a time, to save memory.
    // q: [d, n_q, n_head], query j of group i is column j*n_group + i; f is told the first column
    using chunk = std::function<ggml_tensor *(ggml_tensor * k, ggml_tensor * q, int64_t first)>;
    ggml_tensor * sum_queries(ggml_tensor * q, int64_t n_group, bool by_head, const chunk & f);

    // queries times the scale of the logits, for all that multiplies them with keys: those products have to stay small where a backend
    // adds up in half precision. contiguous, as some of the fast products want them
    ggml_tensor * scaled(ggml_tensor * q);

    // products of keys and queries: [n_kv, n_q, r*h_kv] of k [d, n_kv, h_kv] and q [d, n_q, r*h_kv]
    ggml_tensor * product(ggml_tensor * k, ggml_tensor * q);

    // sum_queries() of the attention weights; mask: null, or a row for each query
    ggml_tensor * sum_attention(ggml_tensor * q, ggml_tensor * mask, int64_t n_group);

    std::vector<std::function<void()>> inputs = {}; // set the inputs
};
