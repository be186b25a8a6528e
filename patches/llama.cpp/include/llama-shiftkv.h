#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

//
// Cut the KV cache of a prompt to a budget, once, after prefill: by MM-ShiftKV, or by one of the methods it is compared with
//
//   llama_shiftkv_params params = llama_shiftkv_default_params(method); // a number whose llama_shiftkv_method_name() is "shiftkv"
//
//   llama_shiftkv_capture(ctx, seq_id, llama_shiftkv_n_query(&params)); // before the prompt is decoded
//   llama_decode(ctx, ...);                         // the prompt: any number of calls, of text and of image embeddings
//   llama_shiftkv_select(ctx, &params);             // rank the prompt's KV pairs: per layer and per KV head
//   llama_shiftkv_compact(ctx, ctx_dst, seq_dst);   // hand the kept pairs over: ctx_dst may be ctx itself or a smaller context
//   llama_shiftkv_capture_end(ctx);
//
// A prompt may be selected from any number of times, and each selection be handed over to another context.
//
// Decoding goes on in ctx_dst at the position llama_shiftkv_info.n_past. Every function that returns a number returns
// LLAMA_SHIFTKV_OK, a count (>= 0), or one of the negative codes below; none of them aborts on wrong arguments, none throws.
// As with the rest of llama.h, one thread at a time may use a context, and so the two contexts of a hand-over.
//
// In a compacted sequence a cell stands for another prompt token in every layer and KV head. The kept pairs keep the rotary phase
// of their own tokens; the cells carry the positions of the prompt's last tokens, so that everything decoded later sees all of
// them and llama_memory_seq_rm() takes back generated tokens as usual. Only the last cell is the same token everywhere.
// A context shift that is to protect the first tokens (removes positions after them and moves the rest) protects none here: the
// cells of the lowest positions hold other tokens in every layer and KV head.
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
    LLAMA_SHIFTKV_ERR_STALE         = -5, // the query of the sequence's last token was not captured or is gone, or the cache has changed
                                          // since (also by another sequence's tokens or a loaded state in the same place)
    LLAMA_SHIFTKV_ERR_NO_SELECTION  = -6, // llama_shiftkv_select() has not succeeded yet
    LLAMA_SHIFTKV_ERR_MISMATCH      = -7, // the destination is of another model, or stores its KV pairs differently
    LLAMA_SHIFTKV_ERR_NO_SPACE      = -8, // the destination has too few free cells, or the buffer passed in is too small
    LLAMA_SHIFTKV_ERR_COMPUTE       = -9, // out of memory, or a backend failed; the destination sequence is empty
};

//
// The methods: how the keys of a layer's KV head are ranked. They have names, and numbers from 0 on, by which params call them; a
// number stands for the same method in one build of the library only.
//
//   shiftkv             by the attention of proxies of the queries to come. Shu, Wu, Xie, Wang, Shou, "MM-ShiftKV: Decode-Aware
//                       Prefill-Stage KV Selection for Multimodal Large Language Models", Findings of ACL 2026
//                       (2026.findings-acl.1447)
//   streamingllm        the first tokens and the last. Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
//                       arXiv:2309.17453
//   snapkv              by the attention of the last queries, causal among themselves. Li et al., "SnapKV: LLM Knows What You are
//                       Looking for Before Generation", arXiv:2404.14469
//   keydiff             by how little a key looks like the others: minus its cosine similarity with the mean of the normalised
//                       keys. Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
//                       Resource-Constrained Environments", arXiv:2504.15364
//   expected-attention  by the attention to be expected of normally distributed queries at the positions to come, times the norm
//                       of the value. Devoto, Jeblick, Jegou, "Expected Attention: KV Cache Compression by Estimating Attention
//                       from Future Queries Distribution", arXiv:2510.00636; but mean and covariance are those of the last
//                       n_window queries (there: of all of the prompt), and a cap of the logits (Gemma 2) is left out
//   random              by chance
//

// How many methods there are, and the name of one; null if there is none of that number.
LLAMA_API int32_t      llama_shiftkv_n_method(void);
LLAMA_API const char * llama_shiftkv_method_name(int32_t method);

struct llama_shiftkv_params {
    int32_t  method;

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
    uint32_t  n_prompt;        // tokens of the prompt
    uint32_t  n_kept;          // KV pairs kept per layer and KV head: min(n_prompt, budget)
    uint32_t  n_layer;         // layers that are cut (all but sliding-window ones)
    llama_pos n_past;          // the position after the prompt, which decoding goes on at
    size_t    kv_bytes_prompt; // bytes of the prompt's KV pairs, over all layers, before ...
    size_t    kv_bytes_kept;   // ... and after the cut (the window caches of sliding-window layers are kept whole)
    size_t    bytes_moved;     // between the host and the KV cache's devices, or within the host: inputs of the selection, and what
                               // it read back; without the indices of the kept pairs, and the scores where they were asked for
};

// A method's settings as published, with budget 0 (to be set by the caller). n_group is 16, the value for LLaVA; 32 for Qwen2.5-VL.
LLAMA_API struct llama_shiftkv_params llama_shiftkv_default_params(int32_t method);

// The last queries that have to be captured for a selection, 1 .. 512. Errors: ARGUMENT.
LLAMA_API int32_t llama_shiftkv_n_query(const struct llama_shiftkv_params * params);

// A sentence for a status code.
LLAMA_API const char * llama_shiftkv_status_str(int32_t status);

// Capture what a selection needs from the tokens of seq_id that are decoded from now on: per-token statistics of the hidden state,
// and the last n_query (1 .. 512) hidden states and queries of every layer. Ends a capture that is on.
// Errors: ARGUMENT, UNSUPPORTED, COMPUTE.
LLAMA_API int32_t llama_shiftkv_capture(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n_query);

// Stop capturing, and give back the memory that it took. The last selection stays readable, and may be handed over.
LLAMA_API int32_t llama_shiftkv_capture_end(struct llama_context * ctx);

// Select the KV pairs to keep of all that the captured sequence holds. Changes nothing in the cache. A budget of at least the prompt's
// length keeps everything. Errors: ARGUMENT, NOT_CAPTURING, EMPTY, STALE, COMPUTE.
LLAMA_API int32_t llama_shiftkv_select(struct llama_context * ctx, const struct llama_shiftkv_params * params);

// The bytes that llama_shiftkv_select() takes beside the KV cache, for tensors on its devices: the largest graph's, and those that stay
// from one graph to the next. For a prompt of n_prompt tokens, at most the context's size. Computes nothing.
// Errors: ARGUMENT, NOT_CAPTURING, COMPUTE.
LLAMA_API int64_t llama_shiftkv_select_size(struct llama_context * ctx, const struct llama_shiftkv_params * params, uint32_t n_prompt);

// Select by the caller's scores, higher is better, of the params only those of every method are looked at. scores: for each layer
// that llama_shiftkv_get_layers() would name, [n_head_kv][n_prompt], all layers one after the other; n_scores is how many in all.
// -inf is below everything else, of equal scores the earlier token's counts more. Errors: also ARGUMENT for another n_scores and for NaN.
LLAMA_API int32_t llama_shiftkv_select_scores(struct llama_context * ctx, const struct llama_shiftkv_params * params, const float * scores, size_t n_scores);

// Copy the selected KV pairs, bit for bit, into seq_dst of ctx_dst, which holds nothing else afterwards. ctx_dst is ctx or another
// context of the same model with the same KV types; it needs room for n_kept cells, for which, as when tokens are decoded, a window
// cache gives up what lies outside of a sequence's window. The source sequence is left as it is, but for that, unless it is also the
// destination. After params.n_prompt tokens decoding goes on at the position after those.
// Errors: ARGUMENT, NO_SELECTION, STALE, MISMATCH, NO_SPACE, COMPUTE.
LLAMA_API int32_t llama_shiftkv_compact(struct llama_context * ctx, struct llama_context * ctx_dst, llama_seq_id seq_dst);

// Prefill layer by layer, so that of all the prompt's KV pairs only one layer's exist at a time, and what is selected of the others:
//
//   llama_shiftkv_by_layer(ctx, n_ctx, llama_shiftkv_n_query(&params)); // a new context, made with as many cells as it decodes at once
//   do {
//       llama_decode(ctx, ...);                                         // the prompt, for each layer with the same calls
//   } while (llama_shiftkv_next_layer(ctx, &params, NULL, 0, ctx_dst, seq_dst) > 0);
//
// What is computed is what llama_shiftkv_select() and llama_shiftkv_compact() go by, and the logits of the last calls are those of the
// whole model. In between the prompt is n_ctx x n_embd numbers. The results can be read as those of a selection.

// Give a context that nothing was decoded in, of one sequence, a cache of n_ctx cells for one layer. From then on each llama_decode()
// takes the tokens through one layer only, the first, and captures as llama_shiftkv_capture() does.
// Errors: ARGUMENT (also for a context that captures), UNSUPPORTED (also for layers with sliding windows, and those that read more than
// what the one before makes), COMPUTE.
LLAMA_API int32_t llama_shiftkv_by_layer(struct llama_context * ctx, uint32_t n_ctx, uint32_t n_query);

// Select of the layer that was read, copy what is kept into seq_dst of ctx_dst, and go on to the next one with an empty cache. Returns how
// many layers are still to be read. The destination is the same for each, and holds the sequence after the last one, as after
// llama_shiftkv_compact(). scores: null, or the caller's, of this layer only, as for llama_shiftkv_select_scores(). params.n_prompt: 0.
// After an error nothing can be gone on with.
// Errors: ARGUMENT, NOT_CAPTURING, EMPTY, STALE (also where the layer was not given all tokens), MISMATCH, NO_SPACE, COMPUTE.
LLAMA_API int32_t llama_shiftkv_next_layer(struct llama_context * ctx, const struct llama_shiftkv_params * params, const float * scores, size_t n_scores, struct llama_context * ctx_dst, llama_seq_id seq_dst);

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

// Bytes that a context's KV cache occupies, used or not. Errors: ARGUMENT, UNSUPPORTED (also for recurrent and hybrid memory).
LLAMA_API int64_t llama_shiftkv_cache_size(struct llama_context * ctx);

// Ends a computation early. The struct is the caller's, and has to live as long as the context that it was given to.
struct llama_shiftkv_poll {
    bool  (*ask)(void * data); // asked now and then by the thread that computes; true ends the computation
    void *  data;
    int64_t interval_us;       // microseconds between two questions, at least
    int64_t asked_us;          // when it was asked last; 0 at first
    bool    ended;             // the last answer; once true, ask is not called until the caller sets it to false again
};

// For llama_set_abort_callback(), with a llama_shiftkv_poll: llama_decode() then returns 2, and llama_shiftkv_select() and
// llama_shiftkv_compact() return COMPUTE. Backends other than the CPU go on to the end of their part of a graph.
LLAMA_API bool llama_shiftkv_abort_callback(void * data);

// The same for mtmd_context_params.cb_eval; the embeddings of a computation that was ended are not to be used.
LLAMA_API bool llama_shiftkv_eval_callback(struct ggml_tensor * t, bool ask, void * data);

// Whether an assertion of llama.cpp that fails in the calling thread throws std::runtime_error instead of ending the process. Loading a
// model or an mmproj, making a context, tokenizing, encoding an image and decoding catch it and return their error; kernels still abort.
// Returns what it was before.
LLAMA_API bool llama_shiftkv_asserts_throw(bool on);

#ifdef __cplusplus
}
#endif
