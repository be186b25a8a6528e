#pragma once

#include "ggml.h"

#include <atomic>
#include <cstdint>

// Attention of many queries on the CPU, for keys in host memory: what the graphs of llama-shiftkv-score.cpp make with a matrix of all
// weights, in strips of a few queries that stay in the caches

// queries of one KV head: those of all its query heads, n_per of each group
struct llama_shiftkv_cpu_job {
    int64_t  d;
    int64_t  n_kv;
    int64_t  n_head_kv;
    int64_t  n_gqa;
    int64_t  g0;      // the first of the groups that are voted in ...
    int64_t  n_group; // ... and how many these are
    int64_t  n_per;
    int64_t  n_part; // units of work that a group's queries are divided into; 1 if there is a vote
    int64_t  n_prompt;
    bool     causal; // query j of n sees the tokens before n_prompt - n + j + 1, else all see all
    float    soft_cap;
    float    share;  // of a group's mass that its set holds

    std::atomic<int64_t> next = { 0 }; // unit of work

    int64_t n_lane() const { return n_per*n_gqa; } // of a group
};

// whether there is such a kernel for these keys
bool llama_shiftkv_cpu_supports(const ggml_tensor * k, int64_t d);

// keys [d, n_kv, n_head_kv] for many queries that need not be exact: where the CPU multiplies pairs of 16-bit integers, rounded to a
// 32767th of their length, as the queries are then. no sum of products is too large, and what is lost is about what halves lose.
// else as they are, as they also are where those of one KV head would take too much memory
ggml_tensor * llama_shiftkv_cpu_pairs(ggml_context * ctx, ggml_tensor * k);

// how many KV heads' keys to do that with at a time
int64_t llama_shiftkv_cpu_n_head(int64_t d, int64_t n_kv, int64_t n_head_kv);

// k: [d, n_kv, n_head_kv] as stored; q: F32 [d, n_group*n_per, n_head]; order: F32 [n_kv], the index into the prompt of a cell's token;
// for n_thread threads, of which as many compute as there is memory for. job has to live until the graph is computed.
// F32 [n_kv, n_part, n_head_kv]: the attention weights, summed over the queries of each part
ggml_tensor * llama_shiftkv_cpu_sums(ggml_context * ctx, ggml_tensor * k, ggml_tensor * q, ggml_tensor * order, llama_shiftkv_cpu_job & job, int n_thread);

// k: the same, or pairs. to, F32 [n_kv, n_head_kv]: base, which may be the same, and in how many groups a key belongs to the smallest set
// that holds the share of its mass. the mass is the mean of the weights and of last, F32 [n_kv, n_head_kv], without the prompt's last token
ggml_tensor * llama_shiftkv_cpu_votes(ggml_context * ctx, ggml_tensor * k, ggml_tensor * q, ggml_tensor * order, ggml_tensor * last, ggml_tensor * base, ggml_tensor * to, llama_shiftkv_cpu_job & job, int n_thread);
