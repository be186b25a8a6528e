#pragma once

#include "llama-shiftkv-cpu.h"
#include "llama-shiftkv-impl.h"

#include <array>
#include <deque>
#include <functional>
#include <stdexcept>
#include <vector>

// what is to be scored: the keys of one layer, and what a rule computes their scores with, in one graph after the other
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

    bool on_host; // whether a kernel of our own may read the keys, llama-shiftkv-cpu.h

    // of the graph that is being built
    ggml_context * ctx = nullptr;
    ggml_cgraph  * gf  = nullptr;
    int            n_graph = 0;

    int64_t n_prompt() const { return cells.size(); }
    int64_t n_gqa()    const { return l.n_head/l.n_head_kv; }

    // the last tokens, n at most, whose hidden states and queries were captured: their rows in the rings
    std::vector<int32_t> last_rows(size_t n) const;

    // the same of their statistics
    std::vector<int32_t> last_stats(size_t n) const;

    // build a graph and compute it. throws std::runtime_error
    void compute(const std::function<void()> & build);

    //
    // tensors that stay: on the layer's device, from one graph to the next
    //

    ggml_tensor * kept(const char * name, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1);

    ggml_tensor * zeros(const char * name, int64_t ne0, int64_t ne1); // where it is not written to

    ggml_tensor * scores();   // F32 [n_kv, n_head_kv], by cell: what a rule is there for
    ggml_tensor * observed(); // the second ones, which params.observed of the budget goes by

    // numbers that are uploaded once a selection, or once for all that have the same tag. fill() makes them
    template <typename T>
    ggml_tensor * fixed(const char * name, ggml_type type, int64_t ne0, int64_t ne1, const std::function<std::vector<T>()> & fill, const std::string & tag = {});

    ggml_tensor * order(); // F32 [n_kv]: the index into the prompt of a cell's token; far above all for others

    ggml_tensor * positions(const char * name, const std::vector<llama_pos> & pos); // of text tokens; null if the query path has no rotation
    ggml_tensor * rotation();                                                       // null likewise

    //
    // in a graph
    //

    ggml_tensor * input(std::vector<float>   data, int64_t ne0, int64_t ne1 = 1);
    ggml_tensor * input(std::vector<int32_t> data);

    // F32 [n_kv]: 1 for the prompt's tokens first .. last - 1, else 0; and 0 and as good as -inf
    ggml_tensor * valid(int64_t first, int64_t last);
    ggml_tensor * mask (int64_t first, int64_t last);

    ggml_tensor * keys(int64_t h0, int64_t n) const; // of n KV heads, as stored: [d, n_kv, n]

    // F32 [d, n]: the keys i0 .. i0 + n - 1 of a KV head; F32 [n]: the norms of its values
    ggml_tensor * keys_f32   (int64_t h, int64_t i0, int64_t n);
    ggml_tensor * value_norms(int64_t h, int64_t i0, int64_t n);

    // calls f(h, i0, n), which computes with some keys of a KV head, for all of them, a few in each graph
    void for_each_keys(const std::function<void(int64_t h, int64_t i0, int64_t n)> & f);

    // rows of a ring: queries F32 [d, n_head, rows], hidden states F32 [n_embd, rows]
    ggml_tensor * queries(const std::vector<int32_t> & rows);
    ggml_tensor * hidden (const std::vector<int32_t> & rows);

    // copy t to a part of a tensor that stays
    void put(ggml_tensor * t, ggml_tensor * to);

    //
    // in graphs of their own
    //

    // F32 [d, n, n_head], contiguous: n queries times the scale of the logits, for all that multiplies them with keys: those
    // products have to stay small where a backend adds up in half precision. f makes rows i0 .. i0 + n - 1, [d, n_head, n]
    ggml_tensor * keep_queries(const char * name, int64_t n, const std::function<ggml_tensor *(int64_t i0, int64_t n)> & f);

    // what f makes of some KV heads' keys [d, n_kv, h_kv] and some of their queries [d, n_q, r*h_kv]: [n_kv, n_q, r*h_kv],
    // summed over the queries of each group, and over the heads of a KV head unless by_head. q: [d, n_q, n_head], with the queries of
    // group i one after the other; f is told the first. done gets the sums of some groups of some KV heads: [n_kv, groups, heads];
    // by head there is one group only, and the sums are [n_kv, n_gqa, heads]
    using chunk = std::function<ggml_tensor *(ggml_tensor * k, ggml_tensor * q, int64_t j0)>;
    using sums  = std::function<void(ggml_tensor * sums, int64_t g0, int64_t n_g, int64_t h0, int64_t n_h)>;
    void sum_queries(ggml_tensor * q, int64_t n_group, bool by_head, const chunk & f, const sums & done);

    // the same of attention weights. query j sees the tokens before n_prompt, or, with causal, before n_prompt - n_q + j + 1
    void sum_attention(ggml_tensor * q, int64_t n_group, bool causal, const sums & done);

    // to: [n_kv, n_head_kv], the mean over all queries and heads of a KV head
    void mean_attention(ggml_tensor * q, bool causal, ggml_tensor * to);

    // to: [n_kv, n_head_kv], the votes of n_group groups of queries, whose mass is the mean of their weights and of
    // those of the last query, plus the latter. on the host only
    void vote_on_host(ggml_tensor * q, int64_t n_group, ggml_tensor * last, ggml_tensor * to);

    // products of keys and queries: [n_kv, n_q, r*h_kv] of k [d, n_kv, h_kv] and q [d, n_q, r*h_kv]
    ggml_tensor * product(ggml_tensor * k, ggml_tensor * q);

    std::vector<std::function<void()>> inputs = {}; // set the inputs

    ggml_backend_buffer_type_t buft() const { return capture.cache.buft(l.ikv); }

    llama_shiftkv_cpu_job & new_job(int64_t n_q, int64_t n_group, int64_t n_h);

    std::deque<llama_shiftkv_cpu_job> jobs = {}; // of the graph

    ggml_tensor * row_numbers(int64_t i0, int64_t n); // I32 [n]: i0 .. i0 + n - 1, of n_kv
};

// numbers that temporary tensors of a graph may have, where a row of scores allows
static constexpr int64_t SHIFTKV_CHUNK = 2*1024*1024;

template <typename T>
ggml_tensor * llama_shiftkv_scoring::fixed(const char * name, ggml_type type, int64_t ne0, int64_t ne1, const std::function<std::vector<T>()> & fill, const std::string & tag) {
    bool holds = false;
    ggml_tensor * t = skv.store.get(buft(), name, tag.empty() ? std::to_string(skv.n_select) : tag, type, ne0, ne1, holds);
    if (!holds && !skv.store.measure) {
        skv.set(t, fill().data());
    }
    return t;
}
