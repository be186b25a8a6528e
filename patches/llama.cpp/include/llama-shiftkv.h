#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

//
// Cut the KV cache of a prompt to a budget, once, after prefill: by MM-ShiftKV, or by one of the methods it is compared with
//
//   llama_shiftkv_params params = llama_shiftkv_default_params(LLAMA_SHIFTKV_METHOD_SHIFTKV);
//
//   llama_shiftkv_capture(ctx, seq_id, 1);          // before the prompt is decoded
//   llama_decode(ctx, ...);                         // the prompt: any number of calls, of text and of image embeddings
//   llama_shiftkv_select(ctx, &params);             // rank the prompt's KV pairs: per layer and per KV head
//   llama_shiftkv_compact(ctx, ctx_dst, seq_dst);   // hand the kept pairs over: ctx_dst may be ctx itself or a smaller context
//   llama_shiftkv_capture_end(ctx);
//
// A prompt may be selected from any number of times, and each selection be handed over to another context.
//
// Decoding goes on in ctx_dst at position llama_memory_seq_pos_max(seq_dst) + 1. Every function returns LLAMA_SHIFTKV_OK, a count
// (>= 0), or one of the negative codes below; none of them aborts on wrong arguments.
//
// In a compacted sequence a cell stands for another prompt token in every layer and KV head. The kept pairs keep the rotary phase
// of their own tokens; the cells carry the positions of the prompt's last tokens, so that everything decoded later sees all of
// them and llama_memory_seq_rm() takes back generated tokens as usual. Only the last cell is the same token everywhere.
//

#ifdef __cplusplus
extern "C" {
#endif

enum llama_shiftkv_status {
    LLAMA_SHIFTKV_OK                = 0,
    LLAMA_SHIFTKV_ERR_ARGUMENT      = -1, // a null pointer, or a parameter out of its range
    LLAMA_SHIFTKV_ERR_UNSUPPORTED   = -2, // this model or context has a memory or an attention that can't be cut (the log says which)
    LLAMA_SHIFTKV_ERR_NOT_CAPTURING = -3, // llama_shiftkv_capture() was not called before the prompt
    LLAMA_SHIFTKV_ERR_EMPTY         = -4, // the captured sequence holds no tokens
    LLAMA_SHIFTKV_ERR_STALE         = -5, // the sequence's last token was not captured, or the cache has changed since the selection
    LLAMA_SHIFTKV_ERR_NO_SELECTION  = -6, // llama_shiftkv_select() has not succeeded yet
    LLAMA_SHIFTKV_ERR_MISMATCH      = -7, // the destination is of another model, or stores its KV pairs differently
    LLAMA_SHIFTKV_ERR_NO_SPACE      = -8, // the destination has too few free cells, or the buffer passed in is too small
    LLAMA_SHIFTKV_ERR_COMPUTE       = -9, // out of memory, or a backend failed; the destination sequence is empty
};

// How the keys of a layer's KV head are ranked.
enum llama_shiftkv_method {
    // by the attention of proxies of the queries to come. Shu, Wu, Xie, Wang, Shou, "MM-ShiftKV: Decode-Aware Prefill-Stage KV
    // Selection for Multimodal Large Language Models", Findings of ACL 2026 (2026.findings-acl.1447)
    LLAMA_SHIFTKV_METHOD_SHIFTKV = 0,

    // the first tokens and the last. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453
    LLAMA_SHIFTKV_METHOD_STREAMING = 1,

    // by the attention of the last queries, causal among themselves. Li et al., "SnapKV: LLM Knows What You are Looking for Before
    // Generation", arXiv:2404.14469
    LLAMA_SHIFTKV_METHOD_SNAPKV = 2,

    // by how little a key looks like the others: minus its cosine similarity with the mean of the normalised keys. Park et al.,
    // "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained Environments",
    // arXiv:2504.15364
    LLAMA_SHIFTKV_METHOD_KEYDIFF = 3,

    // by the attention to be expected of normally distributed queries at the positions to come, times the norm of the value. Devoto,
    // Jeblick, Jegou, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    // arXiv:2510.00636; but mean and covariance are those of the last n_window queries (there: of all of the prompt), and a cap of
    // the logits (Gemma 2) is left out
    LLAMA_SHIFTKV_METHOD_EXPECTED = 4,

    // by chance
    LLAMA_SHIFTKV_METHOD_RANDOM = 5,
};

struct llama_shiftkv_params {
    enum llama_shiftkv_method method;

    // of every method
    uint32_t budget;         // C: KV pairs kept per layer and KV head, those always kept included (>= 2)
    uint32_t n_prompt;       // rank only the first so many captured tokens, 0: all; then only by methods that look at no queries
    uint32_t n_sink;         // first tokens that are always kept, as far as the budget goes after n_recent
    uint32_t n_recent;       // last tokens that are always kept (>= 1)
    uint32_t n_pool;         // neighbouring keys that scores are averaged over (odd, 1 .. 63); if observed > 0 only SnapKV's

    // of SnapKV, Expected Attention, and of MM-ShiftKV if observed > 0
    uint32_t n_window;       // last queries looked at (1 .. those captured)

    // of Expected Attention
    uint32_t n_future;       // positions that the rotation of the queries is averaged over (1 .. 4096)

    // of MM-ShiftKV
    uint32_t n_proxy;        // N: sampled query proxies (a multiple of n_group, up to 4096)
    uint32_t n_group;        // G: voting groups
    uint32_t n_stat;         // last prompt tokens that the hidden-state statistics are taken over
    uint32_t n_layer_repeat; // first layers whose proxies repeat the last hidden state instead of sampling
    uint32_t n_repeat;       // proxies of such a layer, in one group
    float    gamma;          // expansion of the standard deviation
    float    mass;           // share of a group's attention mass that its voted set holds, in (0, 1]
    float    observed;       // share of the budget that goes to the best keys by SnapKV's score, in [0, 1); the paper has none

    uint32_t seed;           // of the proxies' noise, and of chance: the same prompt and seed give the same kept set
    bool     keep_scores;    // keep the scores for llama_shiftkv_get_scores()
};

struct llama_shiftkv_info {
    uint32_t n_prompt;        // tokens of the prompt
    uint32_t n_kept;          // KV pairs kept per layer and KV head: min(n_prompt, budget)
    uint32_t n_layer;         // layers that are cut (all but sliding-window ones)
    size_t   kv_bytes_prompt; // bytes of the prompt's KV pairs, over all layers, before ...
    size_t   kv_bytes_kept;   // ... and after the cut (the window caches of sliding-window layers are kept whole)
};

// A method's settings as published, with budget 0 (to be set by the caller). n_group is 16, the value for LLaVA; 32 for Qwen2.5-VL.
LLAMA_API struct llama_shiftkv_params llama_shiftkv_default_params(enum llama_shiftkv_method method);

// A sentence for a status code.
LLAMA_API const char * llama_shiftkv_status_str(int32_t status);

// Capture what a selection needs from the tokens of seq_id that are decoded from now on: per-token statistics of the hidden state,
// and the last n_query (1 .. 512) hidden states and queries of every layer. Ends a capture that is on.
// Errors: ARGUMENT, UNSUPPORTED, COMPUTE.
LLAMA_API int32_t llama_shiftkv_capture(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n_query);

// Stop capturing. The last selection stays readable.
LLAMA_API int32_t llama_shiftkv_capture_end(struct llama_context * ctx);

// Select the KV pairs to keep of all that the captured sequence holds. Changes nothing in the cache. A budget of at least the prompt's
// length keeps everything. Errors: ARGUMENT, NOT_CAPTURING, EMPTY, STALE, COMPUTE.
LLAMA_API int32_t llama_shiftkv_select(struct llama_context * ctx, const struct llama_shiftkv_params * params);

// The same by the caller's scores, higher is better, of the params only those of every method are looked at. scores: for each layer
// that llama_shiftkv_get_layers() would name, [n_head_kv][n_prompt], all layers one after the other; n_scores is how many in all.
// -inf is below everything else, of equal scores the earlier token's counts more. Errors: also ARGUMENT for another n_scores and for NaN.
LLAMA_API int32_t llama_shiftkv_select_scores(struct llama_context * ctx, const struct llama_shiftkv_params * params, const float * scores, size_t n_scores);

// Copy the selected KV pairs, bit for bit, into seq_dst of ctx_dst, which holds nothing else afterwards. ctx_dst is ctx or another
// context of the same model with the same KV types; it needs room for n_kept cells. The source sequence is left as it is,
// unless it is also the destination. After params.n_prompt tokens decoding goes on at the position after those.
// Errors: ARGUMENT, NO_SELECTION, STALE, MISMATCH, NO_SPACE, COMPUTE.
LLAMA_API int32_t llama_shiftkv_compact(struct llama_context * ctx, struct llama_context * ctx_dst, llama_seq_id seq_dst);

// The last selection, in numbers. Errors: ARGUMENT, NO_SELECTION.
LLAMA_API int32_t llama_shiftkv_get_info(struct llama_context * ctx, struct llama_shiftkv_info * info);

// The model layers that are cut, ascending. Returns how many; out may be null to ask only that. Known from llama_shiftkv_capture() on.
// Errors: ARGUMENT, NOT_CAPTURING, NO_SPACE.
LLAMA_API int32_t llama_shiftkv_get_layers(struct llama_context * ctx, int32_t * out, size_t n_out);

// The sizes of a layer that is cut: query heads, KV heads, and numbers in a head, out[3]. Errors: ARGUMENT, NOT_CAPTURING.
LLAMA_API int32_t llama_shiftkv_get_shape(struct llama_context * ctx, int32_t il, int32_t * out);

// The kept tokens of a layer's KV head, as indices into the prompt (0 .. n_prompt - 1), ascending. Returns how many.
// Errors: ARGUMENT, NO_SELECTION, NO_SPACE.
LLAMA_API int32_t llama_shiftkv_get_kept(struct llama_context * ctx, int32_t il, int32_t kv_head, int32_t * out, size_t n_out);

// The score of each prompt token in a layer's KV head (+inf where it is always kept). Returns n_prompt.
// Errors: ARGUMENT, NO_SELECTION (also when keep_scores was off or nothing had to be cut), NO_SPACE.
LLAMA_API int32_t llama_shiftkv_get_scores(struct llama_context * ctx, int32_t il, int32_t kv_head, float * out, size_t n_out);

// What was captured, for inspection. Errors: ARGUMENT, NOT_CAPTURING, EMPTY, STALE, NO_SPACE.
//   stats:   mean and standard deviation of the hidden state over the last n_stat tokens, out[2]
//   hidden:  the last hidden states, oldest first, out[n][n_embd]; returns n
//   queries: the last queries as attention sees them, oldest first, out[n][n_head][n_embd_head]; returns n
//   keys:    of all tokens of the sequence, as attention sees them, out[n][n_head_kv][n_embd_head]; returns n
LLAMA_API int32_t llama_shiftkv_get_stats  (struct llama_context * ctx, int32_t il, uint32_t n_stat, float * out);
LLAMA_API int32_t llama_shiftkv_get_hidden (struct llama_context * ctx, int32_t il, float * out, size_t n_out);
LLAMA_API int32_t llama_shiftkv_get_queries(struct llama_context * ctx, int32_t il, float * out, size_t n_out);
LLAMA_API int32_t llama_shiftkv_get_keys   (struct llama_context * ctx, int32_t il, float * out, size_t n_out);

// Bytes that a context's KV cache occupies, used or not. Errors: ARGUMENT, UNSUPPORTED.
LLAMA_API int64_t llama_shiftkv_cache_size(struct llama_context * ctx);

// Whether an assertion of llama.cpp that fails in the calling thread throws std::runtime_error instead of ending the process. Loading a
// model or an mmproj, making a context, tokenizing, encoding an image and decoding catch it and return their error; kernels still abort.
// Returns what it was before.
LLAMA_API bool llama_shiftkv_asserts_throw(bool on);

#ifdef __cplusplus
}
#endif
