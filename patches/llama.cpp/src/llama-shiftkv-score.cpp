#include "llama-shiftkv-score.h"

#include <algorithm>
#include <cmath>
#include <numeric>

// intermediate results of the attention of many queries stay below this, where a KV head allows
static constexpr size_t SHIFTKV_CHUNK_BYTES = 64u*1024*1024;

// a small model's graphs have room for 1024 tensors (llama_context::graph_max_nodes()); a chunk of the most proxies takes fewer than 90
static constexpr int64_t SHIFTKV_CHUNKS_MAX = 8;

// concatenate along dimension 2, by halves
static ggml_tensor * concat_dim2(ggml_context * ctx, std::vector<ggml_tensor *> parts) {
    while (parts.size() > 1) {
        std::vector<ggml_tensor *> next;
        for (size_t i = 0; i + 1 < parts.size(); i += 2) {
            next.push_back(ggml_concat(ctx, parts[i], parts[i + 1], 2));
        }
        if (parts.size() % 2 == 1) {
            next.push_back(parts.back());
        }
        parts = std::move(next);
    }
    return parts[0];
}

static ggml_tensor * new_input(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    return t;
}

// an input that the graph makes no use of has no place: that of a rotation in a layer without one
static void set_tensor(ggml_tensor * t, const void * data) {
    if (t->buffer) {
        ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
    }
}

ggml_tensor * llama_shiftkv_scoring::input(std::vector<float> data, int64_t ne0, int64_t ne1) {
    ggml_tensor * t = new_input(ctx, GGML_TYPE_F32, ne0, ne1);
    inputs.push_back([t, data = std::move(data)]() { set_tensor(t, data.data()); });
    return t;
}

ggml_tensor * llama_shiftkv_scoring::input(const float * data, int64_t ne0, int64_t ne1) {
    ggml_tensor * t = new_input(ctx, GGML_TYPE_F32, ne0, ne1);
    inputs.push_back([t, data]() { set_tensor(t, data); });
    return t;
}

ggml_tensor * llama_shiftkv_scoring::input(std::vector<int32_t> data) {
    ggml_tensor * t = new_input(ctx, GGML_TYPE_I32, data.size(), 1);
    inputs.push_back([t, data = std::move(data)]() { set_tensor(t, data.data()); });
    return t;
}

ggml_tensor * llama_shiftkv_scoring::input_pos(const std::vector<llama_pos> & pos) {
    if (!l.path.uses(llama_shiftkv_path::POS)) {
        return nullptr;
    }
    // a text token's in M-RoPE: three times the same, then 0
    std::vector<int32_t> data(pos.size()*n_pos_comp, 0);
    for (int64_t c = 0; c < std::min<int64_t>(n_pos_comp, 3); ++c) {
        std::copy(pos.begin(), pos.end(), data.begin() + c*pos.size());
    }
    return input(std::move(data));
}

ggml_tensor * llama_shiftkv_scoring::input_rot() {
    if (!l.path.uses(llama_shiftkv_path::ROT)) {
        return nullptr;
    }
    ggml_tensor * t = capture.cache.kv->build_input_k_rot(ctx);
    inputs.push_back([this, t]() { capture.cache.kv->set_input_k_rot(t); });
    return t;
}

ggml_tensor * llama_shiftkv_scoring::input_valid(size_t first, size_t last) {
    std::vector<float> data(n_kv, 0.0f);
    for (size_t i = first; i < last; ++i) {
        data[cells[i] - c0] = 1.0f;
    }
    return input(std::move(data), n_kv);
}

ggml_tensor * llama_shiftkv_scoring::input_mask(const std::vector<std::pair<size_t, size_t>> & ranges) {
    const bool all = std::all_of(ranges.begin(), ranges.end(), [&](const auto & r) { return r.first == 0 && (int64_t) r.second == n_kv; });
    if (all) {
        return nullptr;
    }
    std::vector<float> data(n_kv*ranges.size(), -INFINITY);
    for (size_t i = 0; i < ranges.size(); ++i) {
        for (size_t t = ranges[i].first; t < ranges[i].second; ++t) {
            data[i*n_kv + cells[t] - c0] = 0.0f;
        }
    }
    return input(std::move(data), n_kv, ranges.size());
}

ggml_tensor * llama_shiftkv_scoring::keys(int64_t h0, int64_t n) const {
    const size_t nb_head = ggml_row_size(k->type, l.n_embd_head);
    return ggml_view_3d(ctx, k, l.n_embd_head, n_kv, n, k->nb[1], nb_head, c0*k->nb[1] + h0*nb_head);
}

ggml_tensor * llama_shiftkv_scoring::keys_f32() {
    std::vector<int32_t> idxs(n_kv);
    std::iota(idxs.begin(), idxs.end(), c0);
    return ggml_reshape_3d(ctx, ggml_get_rows(ctx, k, input(std::move(idxs))), l.n_embd_head, l.n_head_kv, n_kv);
}

ggml_tensor * llama_shiftkv_scoring::value_norms() {
    const int64_t d = l.n_embd_head_v;
    const int64_t n = d*l.n_head_kv; // without padding

    ggml_tensor * rows   = v;
    int32_t       offset = c0;

    if (v_trans) {
        const size_t ts = ggml_type_size(v->type);
        rows   = ggml_view_2d(ctx, ggml_reshape_2d(ctx, v, v->ne[1], v->ne[0]), n_kv, n, v->ne[1]*ts, c0*ts);
        rows   = ggml_cont(ctx, ggml_transpose(ctx, rows)); // [n, n_kv]
        offset = 0;
    }

    std::vector<int32_t> idxs(n_kv);
    std::iota(idxs.begin(), idxs.end(), offset);
    rows = ggml_get_rows(ctx, rows, input(std::move(idxs))); // F32

    ggml_tensor * sum = ggml_sum_rows(ctx, ggml_sqr(ctx, ggml_reshape_3d(ctx, rows, d, l.n_head_kv, n_kv)));
    sum = ggml_reshape_2d(ctx, ggml_sqrt(ctx, sum), l.n_head_kv, n_kv);

    return ggml_cont(ctx, ggml_transpose(ctx, sum));
}

ggml_tensor * llama_shiftkv_scoring::queries(const std::vector<int32_t> & rows) {
    ggml_tensor * q = ggml_get_rows(ctx, l.queries, input(rows));
    return ggml_permute(ctx, ggml_reshape_3d(ctx, q, l.n_embd_head, l.n_head, rows.size()), 0, 2, 1, 3);
}

ggml_tensor * llama_shiftkv_scoring::hidden(const std::vector<int32_t> & rows) {
    return ggml_get_rows(ctx, l.hidden, input(rows));
}

ggml_tensor * llama_shiftkv_scoring::sum_queries(ggml_tensor * q, int64_t n_group, bool by_head, const chunk & f) {
    const int64_t n_head_kv   = l.n_head_kv;
    const int64_t n_per_group = q->ne[1]/n_group;

    // a few KV heads, then a few queries at a time
    const int64_t bytes_per_query = n_kv*n_gqa()*sizeof(float);
    const int64_t n_head_chunk = std::max({ (int64_t) 1, (int64_t) SHIFTKV_CHUNK_BYTES/(bytes_per_query*q->ne[1]), (n_head_kv + SHIFTKV_CHUNKS_MAX - 1)/SHIFTKV_CHUNKS_MAX });
    const int64_t n_chunks_max = std::max<int64_t>(1, SHIFTKV_CHUNKS_MAX*n_head_chunk/n_head_kv);
    const int64_t n_j_chunk    = std::max({ (int64_t) 1, (int64_t) SHIFTKV_CHUNK_BYTES/(bytes_per_query*n_group), (n_per_group + n_chunks_max - 1)/n_chunks_max });

    std::vector<ggml_tensor *> parts;
    for (int64_t h0 = 0; h0 < n_head_kv; h0 += n_head_chunk) {
        const int64_t n_h = std::min(n_head_chunk, n_head_kv - h0);

        ggml_tensor * part = nullptr;
        for (int64_t j0 = 0; j0 < n_per_group; j0 += n_j_chunk) {
            const int64_t n_j = std::min(n_j_chunk, n_per_group - j0);

            ggml_tensor * q_part = ggml_view_3d(ctx, q, l.n_embd_head, n_j*n_group, n_h*n_gqa(), q->nb[1], q->nb[2], j0*n_group*q->nb[1] + h0*n_gqa()*q->nb[2]);

            ggml_tensor * a = f(keys(h0, n_h), q_part, j0*n_group);

            a = llama_shiftkv_sum_dim1(ctx, ggml_reshape_3d(ctx, a, n_kv*n_group, n_j, n_gqa()*n_h));
            if (!by_head) {
                a = llama_shiftkv_sum_dim1(ctx, ggml_reshape_3d(ctx, a, n_kv*n_group, n_gqa(), n_h));
            }

            part = part ? ggml_add(ctx, part, a) : a;
        }
        part = ggml_reshape_3d(ctx, part, n_kv, n_group, ggml_nelements(part)/(n_kv*n_group));
        ggml_build_forward_expand(gf, part); // one after the other, so that they share memory
        parts.push_back(part);
    }

    return concat_dim2(ctx, parts);
}

ggml_tensor * llama_shiftkv_scoring::scaled(ggml_tensor * q) {
    return ggml_scale(ctx, ggml_cont(ctx, q), l.kq_scale);
}

ggml_tensor * llama_shiftkv_scoring::product(ggml_tensor * k, ggml_tensor * q) {
    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    return kq;
}

ggml_tensor * llama_shiftkv_scoring::sum_attention(ggml_tensor * q, ggml_tensor * mask, int64_t n_group) {
    return sum_queries(q, n_group, false, [&](ggml_tensor * k, ggml_tensor * q, int64_t first) {
        ggml_tensor * kq = product(k, q);
        if (l.soft_cap != 0.0f) {
            kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, 1.0f/l.soft_cap)), l.soft_cap);
        }
        ggml_tensor * rows = mask ? ggml_view_2d(ctx, mask, n_kv, q->ne[1], mask->nb[1], first*mask->nb[1]) : nullptr;
        return ggml_soft_max_ext(ctx, kq, rows, 1.0f, 0.0f);
    });
}
