#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

//
// MM-ShiftKV: cut the KV cache of a prompt to a budget, once, after prefill
//
// Source: Shu, Wu, Xie, Wang, Shou, "MM-ShiftKV: Decode-Aware Prefill-Stage KV Selection for Multimodal Large Language Models",
// Findings of ACL 2026 (2026.findings-acl.1447).
//
//   llama_shiftkv_capture(ctx, seq_id, 1);          // before the prompt is decoded
//   llama_decode(ctx, ...);                         // the prompt: any number of calls, of text and of image embeddings
//   llama_shiftkv_select(ctx, &params);             // rank the prompt's KV pairs: per layer and per KV head
//   llama_shiftkv_compact(ctx, ctx_dst, seq_dst);   // hand the kept pairs over: ctx_dst may be ctx itself or a smaller context
//   llama_shiftkv_capture_end(ctx);
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

struct llama_shiftkv_params {
    uint32_t budget;         // C: KV pairs kept per layer and KV head, the last token's included (>= 2)
    uint32_t n_proxy;        // N: sampled query proxies (a multiple of n_group, up to 4096)
    uint32_t n_group;        // G: voting groups
    uint32_t n_stat;         // last prompt tokens that the hidden-state statistics are taken over
    uint32_t n_layer_repeat; // first layers whose proxies repeat the last hidden state instead of sampling
    uint32_t n_repeat;       // proxies of such a layer, in one group
    float    gamma;          // expansion of the standard deviation
    float    mass;           // share of a group's attention mass that its voted set holds, in (0, 1]
    uint32_t seed;           // of the proxies' noise: the same prompt and seed give the same kept set
    bool     keep_scores;    // keep the scores for llama_shiftkv_get_scores()
};

struct llama_shiftkv_info {
    uint32_t n_prompt;        // tokens of the prompt
    uint32_t n_kept;          // KV pairs kept per layer and KV head: min(n_prompt, budget)
    uint32_t n_layer;         // layers that are cut (all but sliding-window ones)
    size_t   kv_bytes_prompt; // bytes of the prompt's KV pairs, over all layers, before ...
    size_t   kv_bytes_kept;   // ... and after the cut (the window caches of sliding-window layers are kept whole)
};

// The paper's settings, with budget 0 (to be set by the caller). n_group is 16, the value for LLaVA; 32 for Qwen2.5-VL.
LLAMA_API struct llama_shiftkv_params llama_shiftkv_default_params(void);

// A sentence for a status code.
LLAMA_API const char * llama_shiftkv_status_str(int32_t status);

// Capture what a selection needs from the tokens of seq_id that are decoded from now on: per-token statistics of the hidden state,
// the last hidden state, and the last n_query (1 .. 64) queries of every layer. Ends a capture that is on.
// Errors: ARGUMENT, UNSUPPORTED, COMPUTE.
LLAMA_API int32_t llama_shiftkv_capture(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n_query);

// Stop capturing. The last selection stays readable.
LLAMA_API int32_t llama_shiftkv_capture_end(struct llama_context * ctx);

// Select the KV pairs to keep of all that the captured sequence holds. Changes nothing in the cache. A budget of at least the prompt's
// length keeps everything. Errors: ARGUMENT, NOT_CAPTURING, EMPTY, STALE, COMPUTE.
LLAMA_API int32_t llama_shiftkv_select(struct llama_context * ctx, const struct llama_shiftkv_params * params);

// Copy the selected KV pairs, bit for bit, into seq_dst of ctx_dst, which holds nothing else afterwards. ctx_dst is ctx or another
// context of the same model with the same KV types; it needs room for n_kept cells. The source sequence is left as it is,
// unless it is also the destination. Errors: ARGUMENT, NO_SELECTION, STALE, MISMATCH, NO_SPACE, COMPUTE.
LLAMA_API int32_t llama_shiftkv_compact(struct llama_context * ctx, struct llama_context * ctx_dst, llama_seq_id seq_dst);

// The last selection, in numbers. Errors: ARGUMENT, NO_SELECTION.
LLAMA_API int32_t llama_shiftkv_get_info(struct llama_context * ctx, struct llama_shiftkv_info * info);

// The model layers that are cut, ascending. Returns how many; out may be null to ask only that. Errors: ARGUMENT, NO_SELECTION, NO_SPACE.
LLAMA_API int32_t llama_shiftkv_get_layers(struct llama_context * ctx, int32_t * out, size_t n_out);

// The kept tokens of a layer's KV head, as indices into the prompt (0 .. n_prompt - 1), ascending. Returns how many.
// Errors: ARGUMENT, NO_SELECTION, NO_SPACE.
LLAMA_API int32_t llama_shiftkv_get_kept(struct llama_context * ctx, int32_t il, int32_t kv_head, int32_t * out, size_t n_out);

// The score of each prompt token in a layer's KV head (the last token's, always kept, is +inf). Returns n_prompt.
// Errors: ARGUMENT, NO_SELECTION (also when keep_scores was off or nothing had to be cut), NO_SPACE.
LLAMA_API int32_t llama_shiftkv_get_scores(struct llama_context * ctx, int32_t il, int32_t kv_head, float * out, size_t n_out);

// What was captured, for inspection. Errors: ARGUMENT, NOT_CAPTURING, EMPTY, STALE, NO_SPACE.
//   stats:   mean and standard deviation of the hidden state over the last n_stat tokens, out[2]
//   hidden:  the last token's hidden state, out[n_embd]
//   queries: the last queries as attention sees them, oldest first, out[n_query][n_head][n_embd_head]; returns the number of queries
LLAMA_API int32_t llama_shiftkv_get_stats  (struct llama_context * ctx, int32_t il, uint32_t n_stat, float * out);
LLAMA_API int32_t llama_shiftkv_get_hidden (struct llama_context * ctx, int32_t il, float * out, size_t n_out);
LLAMA_API int32_t llama_shiftkv_get_queries(struct llama_context * ctx, int32_t il, float * out, size_t n_out);

// Bytes that a context's KV cache occupies, used or not. Errors: ARGUMENT, UNSUPPORTED.
LLAMA_API int64_t llama_shiftkv_cache_size(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif
