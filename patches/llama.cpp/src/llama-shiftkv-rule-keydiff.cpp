#include "llama-shiftkv-rules.h"

// KeyDiff, arXiv:2504.15364: minus the cosine similarity of a key with the mean of the normalised keys. a rotated cache does not
// change it

static ggml_tensor * build(llama_shiftkv_scoring & s) {
    ggml_context * ctx = s.ctx;

    const int64_t d         = s.l.n_embd_head;
    const int64_t n_head_kv = s.l.n_head_kv;

    ggml_tensor * k = ggml_l2_norm(ctx, s.keys_f32(), 1e-12f); // [d, n_head_kv, n_kv]

    // the mean's length does not matter
    ggml_tensor * valid = ggml_reshape_2d(ctx, s.input_valid(0, s.n_prompt()), 1, s.n_kv);
    ggml_tensor * mean  = llama_shiftkv_sum_dim1(ctx, ggml_mul(ctx, ggml_reshape_2d(ctx, k, d*n_head_kv, s.n_kv), valid));
    mean = ggml_l2_norm(ctx, ggml_reshape_2d(ctx, mean, d, n_head_kv), 1e-12f);

    ggml_tensor * cosine = ggml_reshape_2d(ctx, ggml_sum_rows(ctx, ggml_mul(ctx, k, mean)), n_head_kv, s.n_kv);

    return ggml_neg(ctx, ggml_cont(ctx, ggml_transpose(ctx, cosine)));
}

static const llama_shiftkv_register reg({
    /*.name     =*/ "keydiff",
    /*.defaults =*/ [](llama_shiftkv_params &) {},
    /*.valid    =*/ [](const llama_shiftkv_params &) { return true; },
    /*.n_query  =*/ [](const llama_shiftkv_params &) { return 0u; },
    /*.n_wide   =*/ nullptr,
    /*.build    =*/ build,
    /*.fill     =*/ nullptr,
});
