#include "llama-shiftkv-score.h"

#include "llama-context.h"

#include <algorithm>
#include <cmath>
#include <numeric>

// a graph has room for the nodes of this many chunks
static constexpr int SHIFTKV_CHUNKS_GRAPH = 16;

// rows of one softmax: CUDA has no more in a dimension of its grids than 65,535
static constexpr int64_t SHIFTKV_ROWS_MAX = 32768;

// the index of a cell that holds none of the prompt's tokens
static constexpr float SHIFTKV_NO_TOKEN = 1 << 24;

// minus infinity, but for what multiplies it with 0
static constexpr float SHIFTKV_LOWEST = -1e30f;

static ggml_tensor * new_input(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    return t;
}

static std::vector<int32_t> first_numbers(size_t n) {
    std::vector<int32_t> res(n);
    std::iota(res.begin(), res.end(), 0);
    return res;
}

std::vector<int32_t> llama_shiftkv_scoring::last_rows(size_t n) const {
    return skv.store.measure ? first_numbers(std::min<size_t>({ n, cells.size(), capture.n_query })) : capture.ring_rows(cells, n);
}

std::vector<int32_t> llama_shiftkv_scoring::last_stats(size_t n) const {
    return skv.store.measure ? first_numbers(std::min(n, cells.size())) : capture.stat_rows(cells, n);
}

void llama_shiftkv_scoring::compute(const std::function<void()> & build) {
    inputs.clear();
    jobs.clear();
    n_graph++;

    const auto build_graph = [&](ggml_context * ctx, ggml_cgraph * gf) {
        this->ctx = ctx;
        this->gf  = gf;
        build();
    };
    const auto set = [&]() {
        for (const auto & f : inputs) {
            f();
        }
    };

    if (skv.store.measure) {
        skv.graph_size = std::max(skv.graph_size, skv.capture.ctx.measure(build_graph, skv.graph_ops) + skv.store.size());
    } else if (!skv.capture.ctx.compute(build_graph, set)) {
        throw std::runtime_error("a graph of the selection failed");
    }
}

//
// tensors that stay
//

ggml_tensor * llama_shiftkv_scoring::kept(const char * name, int64_t ne0, int64_t ne1, int64_t ne2) {
    return skv.store.get(buft(), name, GGML_TYPE_F32, ne0, ne1, ne2);
}

ggml_tensor * llama_shiftkv_scoring::zeros(const char * name, int64_t ne0, int64_t ne1) {
    bool holds = false;
    ggml_tensor * t = skv.store.get(buft(), name, std::to_string(skv.n_select), GGML_TYPE_F32, ne0, ne1, holds);
    if (!holds && !skv.store.measure) {
        ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t));
    }
    return t;
}

ggml_tensor * llama_shiftkv_scoring::scores() {
    return kept("scores", n_kv, l.n_head_kv);
}

ggml_tensor * llama_shiftkv_scoring::observed() {
    return kept("observed", n_kv, l.n_head_kv);
}

ggml_tensor * llama_shiftkv_scoring::order() {
    return fixed<float>("order", GGML_TYPE_F32, n_kv, 1, [&]() {
        std::vector<float> res(n_kv, SHIFTKV_NO_TOKEN);
        for (size_t i = 0; i < cells.size(); ++i) {
            res[cells[i] - c0] = i;
        }
        return res;
    });
}

ggml_tensor * llama_shiftkv_scoring::positions(const char * name, const std::vector<llama_pos> & pos) {
    if (!l.path.uses(llama_shiftkv_path::POS)) {
        return nullptr;
    }
    return fixed<int32_t>(name, GGML_TYPE_I32, pos.size()*n_pos_comp, 1, [&]() {
        // a text token's in M-RoPE: three times the same, then 0
        std::vector<int32_t> res(pos.size()*n_pos_comp, 0);
        for (int64_t c = 0; c < std::min<int64_t>(n_pos_comp, 3); ++c) {
            std::copy(pos.begin(), pos.end(), res.begin() + c*pos.size());
        }
        return res;
    });
}

ggml_tensor * llama_shiftkv_scoring::rotation() {
    if (!l.path.uses(llama_shiftkv_path::ROT)) {
        return nullptr;
    }
    ggml_tensor * t = capture.cache.kv->build_input_k_rot(ctx);
    inputs.push_back([this, t]() {
        if (t->buffer) {
            capture.cache.kv->set_input_k_rot(t);
            skv.sel.info.bytes_moved += ggml_nbytes(t);
        }
    });
    return t;
}

//
// in a graph
//

ggml_tensor * llama_shiftkv_scoring::input(std::vector<float> data, int64_t ne0, int64_t ne1) {
    ggml_tensor * t = new_input(ctx, GGML_TYPE_F32, ne0, ne1);
    inputs.push_back([this, t, data = std::move(data)]() { skv.set(t, data.data()); });
    return t;
}

ggml_tensor * llama_shiftkv_scoring::input(std::vector<int32_t> data) {
    ggml_tensor * t = new_input(ctx, GGML_TYPE_I32, data.size(), 1);
    inputs.push_back([this, t, data = std::move(data)]() { skv.set(t, data.data()); });
    return t;
}

ggml_tensor * llama_shiftkv_scoring::valid(int64_t first, int64_t last) {
    ggml_tensor * res = ggml_step(ctx, ggml_scale_bias(ctx, order(), -1.0f, last - 0.5f));
    if (first > 0) {
        res = ggml_mul(ctx, res, ggml_step(ctx, ggml_scale_bias(ctx, order(), 1.0f, 0.5f - first)));
    }
    return res;
}

ggml_tensor * llama_shiftkv_scoring::mask(int64_t first, int64_t last) {
    return ggml_scale_bias(ctx, valid(first, last), -SHIFTKV_LOWEST, SHIFTKV_LOWEST);
}

ggml_tensor * llama_shiftkv_scoring::keys(int64_t h0, int64_t n) const {
    const size_t nb_head = ggml_row_size(k->type, l.n_embd_head);
    return ggml_view_3d(ctx, k, l.n_embd_head, n_kv, n, k->nb[1], nb_head, c0*k->nb[1] + h0*nb_head);
}

ggml_tensor * llama_shiftkv_scoring::row_numbers(int64_t i0, int64_t n) {
    ggml_tensor * all = fixed<int32_t>("rows", GGML_TYPE_I32, n_kv, 1, [&]() { return first_numbers(n_kv); });
    return ggml_view_1d(ctx, all, n, i0*all->nb[0]);
}

ggml_tensor * llama_shiftkv_scoring::keys_f32(int64_t h, int64_t i0, int64_t n) {
    const size_t nb_head = ggml_row_size(k->type, l.n_embd_head);
    return ggml_get_rows(ctx, ggml_view_2d(ctx, k, l.n_embd_head, n_kv, k->nb[1], c0*k->nb[1] + h*nb_head), row_numbers(i0, n));
}

ggml_tensor * llama_shiftkv_scoring::value_norms(int64_t h, int64_t i0, int64_t n) {
    const int64_t d = l.n_embd_head_v;

    ggml_tensor * rows;
    int64_t       first;

    if (v_trans) {
        const size_t ts = ggml_type_size(v->type);
        rows  = ggml_view_2d(ctx, ggml_reshape_2d(ctx, v, v->ne[1], v->ne[0]), n, d, v->ne[1]*ts, h*d*v->ne[1]*ts + (c0 + i0)*ts);
        rows  = ggml_cont(ctx, ggml_transpose(ctx, rows)); // [d, n]
        first = 0;
    } else {
        rows  = ggml_view_2d(ctx, v, d, n_kv, v->nb[1], c0*v->nb[1] + h*ggml_row_size(v->type, d));
        first = i0;
    }

    rows = ggml_get_rows(ctx, rows, row_numbers(first, n)); // F32

    return ggml_reshape_1d(ctx, ggml_sqrt(ctx, ggml_sum_rows(ctx, ggml_sqr(ctx, rows))), n);
}

void llama_shiftkv_scoring::for_each_keys(const std::function<void(int64_t h, int64_t i0, int64_t n)> & f) {
    const int64_t n_max = std::max<int64_t>(1, SHIFTKV_CHUNK/std::max(l.n_embd_head, l.n_embd_head_v));

    std::vector<std::array<int64_t, 3>> parts;
    for (int64_t h = 0; h < l.n_head_kv; ++h) {
        for (int64_t i = 0; i < n_kv; i += n_max) {
            parts.push_back({ h, i, std::min(n_max, n_kv - i) });
        }
    }
    for (size_t i = 0; i < parts.size(); i += SHIFTKV_CHUNKS_GRAPH) {
        compute([&]() {
            for (size_t j = i; j < std::min<size_t>(i + SHIFTKV_CHUNKS_GRAPH, parts.size()); ++j) {
                f(parts[j][0], parts[j][1], parts[j][2]);
            }
        });
    }
}

ggml_tensor * llama_shiftkv_scoring::queries(const std::vector<int32_t> & rows) {
    return ggml_reshape_3d(ctx, ggml_get_rows(ctx, l.queries, input(rows)), l.n_embd_head, l.n_head, rows.size());
}

ggml_tensor * llama_shiftkv_scoring::hidden(const std::vector<int32_t> & rows) {
    return ggml_get_rows(ctx, l.hidden, input(rows));
}

void llama_shiftkv_scoring::put(ggml_tensor * t, ggml_tensor * to) {
    ggml_build_forward_expand(gf, ggml_cpy(ctx, t, to));
}

ggml_tensor * llama_shiftkv_scoring::product(ggml_tensor * k, ggml_tensor * q) {
    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    return kq;
}

//
// in graphs of their own
//

ggml_tensor * llama_shiftkv_scoring::keep_queries(const char * name, int64_t n, const std::function<ggml_tensor *(int64_t i0, int64_t n)> & f) {
    ggml_tensor * q = kept(name, l.n_embd_head, n, l.n_head);

    const int64_t n_max = std::max<int64_t>(1, SHIFTKV_CHUNK/std::max(l.hidden->ne[0], l.queries->ne[0]));
    for (int64_t i0 = 0; i0 < n; i0 += n_max) {
        compute([&]() {
            const int64_t n_i = std::min(n_max, n - i0);
            ggml_tensor * part = f(i0, n_i);
            if (!ggml_is_contiguous(part)) {
                part = ggml_cont(ctx, part);
            }
            part = ggml_scale(ctx, ggml_reshape_3d(ctx, part, l.n_embd_head, l.n_head, n_i), l.kq_scale);
            part = ggml_permute(ctx, part, 0, 2, 1, 3);
            put(part, ggml_view_3d(ctx, q, l.n_embd_head, n_i, l.n_head, q->nb[1], q->nb[2], i0*q->nb[1]));
        });
    }
    return q;
}

void llama_shiftkv_scoring::sum_queries(ggml_tensor * q, int64_t n_group, bool by_head, const chunk & f, const sums & done) {
    const int64_t r       = n_gqa();
    const int64_t n_per   = q->ne[1]/n_group;
    const int64_t n_wide  = by_head ? r : 1; // sums of a group
    const int64_t n_sums  = std::max<int64_t>(1, SHIFTKV_CHUNK/(n_kv*n_wide));
    const int64_t n_rows  = std::clamp<int64_t>(SHIFTKV_CHUNK/n_kv, 1, SHIFTKV_ROWS_MAX);

    // groups and KV heads whose sums are made at a time
    const int64_t n_g_max = std::min(n_group, n_sums);
    const int64_t n_h_max = std::clamp<int64_t>(n_sums/n_group, 1, l.n_head_kv);

    ggml_tensor * all = kept("sums", n_kv*n_wide*n_g_max*n_h_max);

    // a chunk: queries j0 .. of groups g0 .. of KV heads h0 .., and of those all query heads or r0 ..
    struct part {
        int64_t h0, n_h, r0, n_r, g0, n_g, j0, n_j;
    };

    for (int64_t h0 = 0; h0 < l.n_head_kv; h0 += n_h_max) {
        for (int64_t g0 = 0; g0 < n_group; g0 += n_g_max) {
            const int64_t n_h = std::min(n_h_max, l.n_head_kv - h0);
            const int64_t n_g = std::min(n_g_max, n_group - g0);

            const int64_t c_h = std::clamp<int64_t>(n_rows/(n_g*n_per*r), 1, n_h);
            const int64_t c_g = std::clamp<int64_t>(n_rows/(n_per*r), 1, n_g);
            const int64_t c_j = std::clamp<int64_t>(n_rows/r, 1, n_per);
            const int64_t c_r = std::min(n_rows, r);

            std::vector<part> parts;
            for (int64_t h = 0; h < n_h; h += c_h) {
                for (int64_t g = 0; g < n_g; g += c_g) {
                    for (int64_t i = 0; i < r; i += c_r) {
                        for (int64_t j = 0; j < n_per; j += c_j) {
                            parts.push_back({ h, std::min(c_h, n_h - h), i, std::min(c_r, r - i), g, std::min(c_g, n_g - g), j, std::min(c_j, n_per - j) });
                        }
                    }
                }
            }

            // of a chunk's sums: [n_kv*n_wide*n_g, n_h], or [n_kv*n_r] where they are by head
            const auto target = [&](const part & p) {
                const size_t nb = n_kv*sizeof(float);
                return by_head && p.n_r < r ?
                    ggml_view_2d(ctx, all, n_kv*p.n_r, 1, nb*p.n_r, (p.h0*r + p.r0)*nb) :
                    ggml_view_2d(ctx, all, n_kv*n_wide*p.n_g, p.n_h, nb*n_wide*n_g, (p.h0*n_g + p.g0)*n_wide*nb);
            };
            const auto same = [&](const part & a, const part & b) {
                return a.h0 == b.h0 && a.g0 == b.g0 && (!by_head || a.r0 == b.r0);
            };

            for (size_t i = 0; i < parts.size(); i += SHIFTKV_CHUNKS_GRAPH) {
                const size_t end = std::min<size_t>(i + SHIFTKV_CHUNKS_GRAPH, parts.size());

                compute([&]() {
                    ggml_tensor * sum = nullptr;

                    for (size_t ip = i; ip < end; ++ip) {
                        const auto & p = parts[ip];

                        ggml_tensor * q_part = ggml_view_3d(ctx, q, l.n_embd_head, p.n_g*p.n_j, p.n_h*p.n_r, q->nb[1], q->nb[2],
                                ((g0 + p.g0)*n_per + p.j0)*q->nb[1] + ((h0 + p.h0)*r + p.r0)*q->nb[2]);

                        ggml_tensor * a = f(keys(h0 + p.h0, p.n_h), q_part, (g0 + p.g0)*n_per + p.j0);

                        a = llama_shiftkv_sum_dim1(ctx, ggml_reshape_3d(ctx, a, n_kv, p.n_j, p.n_g*p.n_r*p.n_h));
                        if (!by_head) {
                            a = llama_shiftkv_sum_dim1(ctx, ggml_reshape_3d(ctx, a, n_kv*p.n_g, p.n_r, p.n_h));
                        }
                        a = ggml_reshape_2d(ctx, a, ggml_nelements(a)/p.n_h, p.n_h);

                        sum = sum ? ggml_add(ctx, sum, a) : a;
                        ggml_build_forward_expand(gf, sum); // one after the other, so that they share memory

                        if (ip + 1 == end || !same(p, parts[ip + 1])) {
                            size_t first = ip;
                            while (first > 0 && same(p, parts[first - 1])) {
                                first--;
                            }
                            put(first < i ? ggml_add(ctx, target(p), sum) : sum, target(p));
                            sum = nullptr;
                        }
                    }
                });
            }

            compute([&]() {
                done(ggml_view_3d(ctx, all, n_kv, n_g*n_wide, n_h, n_kv*sizeof(float), n_kv*n_g*n_wide*sizeof(float), 0), g0, n_g, h0, n_h);
            });
        }
    }
}

void llama_shiftkv_scoring::sum_attention(ggml_tensor * q, int64_t n_group, bool causal, const sums & done) {
    const int64_t n_q = q->ne[1];

    sum_queries(q, n_group, false, [&](ggml_tensor * k, ggml_tensor * q, int64_t j0) {
        ggml_tensor * kq = product(k, q);
        if (l.soft_cap != 0.0f) {
            kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, 1.0f/l.soft_cap)), l.soft_cap);
        }
        if (causal) {
            const int64_t n = q->ne[1];

            std::vector<float> last(n); // the last token that a query sees
            std::iota(last.begin(), last.end(), n_prompt() - n_q + j0 + 0.5f);

            ggml_tensor * seen = ggml_sub(ctx, ggml_repeat_4d(ctx, order(), n_kv, n, 1, 1), input(std::move(last), 1, n));
            seen = ggml_step(ctx, ggml_scale(ctx, seen, -1.0f));
            return ggml_soft_max_ext(ctx, kq, ggml_scale_bias(ctx, seen, -SHIFTKV_LOWEST, SHIFTKV_LOWEST), 1.0f, 0.0f);
        }
        if (n_kv == n_prompt()) {
            return ggml_soft_max_ext(ctx, kq, nullptr, 1.0f, 0.0f);
        }
        // one row for all
        ggml_tensor * a = ggml_soft_max_ext(ctx, ggml_reshape_3d(ctx, kq, n_kv, 1, kq->ne[1]*kq->ne[2]), mask(0, n_prompt()), 1.0f, 0.0f);
        return ggml_reshape_3d(ctx, a, n_kv, kq->ne[1], kq->ne[2]);
    }, done);
}

llama_shiftkv_cpu_job & llama_shiftkv_scoring::new_job(int64_t n_q, int64_t n_group, int64_t n_h) {
    auto & job = jobs.emplace_back();

    job.d         = l.n_embd_head;
    job.n_kv      = n_kv;
    job.n_head_kv = n_h;
    job.n_gqa     = n_gqa();
    job.g0        = 0;
    job.n_group   = n_group;
    job.n_per     = n_q/n_group;
    job.n_part    = 1;
    job.n_prompt  = n_prompt();
    job.causal    = false;
    job.soft_cap  = l.soft_cap;
    job.share     = params.mass;

    return job;
}

void llama_shiftkv_scoring::vote_on_host(ggml_tensor * q, int64_t n_group, ggml_tensor * last, ggml_tensor * to) {
    // a bit for each key and group
    const int64_t n_g_max = std::clamp<int64_t>(32*SHIFTKV_CHUNK/(n_kv*l.n_head_kv), 1, n_group);

    const int64_t n_h_max = llama_shiftkv_cpu_n_head(l.n_embd_head, n_kv, l.n_head_kv);

    for (int64_t h0 = 0; h0 < l.n_head_kv; h0 += n_h_max) {
        for (int64_t g0 = 0; g0 < n_group; g0 += n_g_max) {
            const int64_t n_h = std::min(n_h_max, l.n_head_kv - h0);

            compute([&]() {
                const auto rows = [&](ggml_tensor * t) { return ggml_view_2d(ctx, t, n_kv, n_h, t->nb[1], h0*t->nb[1]); };

                ggml_tensor * q_part = ggml_view_3d(ctx, q, q->ne[0], q->ne[1], n_gqa()*n_h, q->nb[1], q->nb[2], n_gqa()*h0*q->nb[2]);

                auto & job = new_job(q->ne[1], n_group, n_h);
                job.g0      = g0;
                job.n_group = std::min(n_g_max, n_group - g0);
                ggml_tensor * k = llama_shiftkv_cpu_pairs(ctx, keys(h0, n_h));
                ggml_build_forward_expand(gf, llama_shiftkv_cpu_votes(ctx, k, q_part, order(), rows(last), rows(g0 == 0 ? last : to), rows(to), job,
                        capture.ctx.lctx.n_threads_batch()));
            });
        }
    }
}

void llama_shiftkv_scoring::mean_attention(ggml_tensor * q, bool causal, ggml_tensor * to) {
    if (on_host) {
        compute([&]() {
            auto & job = new_job(q->ne[1], 1, l.n_head_kv);
            job.causal = causal;
            job.n_part = std::clamp<int64_t>(job.n_lane()/32, 1, std::max<int64_t>(1, 8/l.n_head_kv)); // for few KV heads on many threads
            ggml_tensor * sums = llama_shiftkv_sum_dim1(ctx, llama_shiftkv_cpu_sums(ctx, keys(0, l.n_head_kv), q, order(), job, capture.ctx.lctx.n_threads_batch()));
            put(ggml_scale(ctx, ggml_reshape_2d(ctx, sums, n_kv, l.n_head_kv), 1.0f/(q->ne[1]*n_gqa())), to);
        });
        return;
    }
    sum_attention(q, 1, causal, [&](ggml_tensor * sums, int64_t, int64_t, int64_t h0, int64_t n_h) {
        put(ggml_scale(ctx, sums, 1.0f/(q->ne[1]*n_gqa())), ggml_view_3d(ctx, to, n_kv, 1, n_h, to->nb[1], to->nb[1], h0*to->nb[1]));
    });
}
