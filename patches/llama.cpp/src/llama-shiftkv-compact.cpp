#include "llama-shiftkv-impl.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>

// a graph has room for the nodes of this many runs of destination cells
static constexpr size_t SHIFTKV_RUNS_MAX = 32;

// calls f(first index, first cell, length) for every run of consecutive cells
template <typename F>
static void for_each_run(const std::vector<uint32_t> & cells, F f) {
    for (size_t i = 0; i < cells.size(); ) {
        size_t n = 1;
        while (i + n < cells.size() && cells[i + n] == cells[i] + n) {
            n++;
        }
        f(i, cells[i], n);
        i += n;
    }
}

// a view of the same bytes as another type
static ggml_tensor * view_as(ggml_context * ctx, ggml_tensor * t, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, size_t nb1, size_t nb2, size_t offs) {
    ggml_tensor * v = ggml_view_1d(ctx, t, ggml_blck_size(t->type), offs);

    v->type  = type;
    v->ne[0] = ne0;
    v->ne[1] = ne1;
    v->ne[2] = ne2;
    v->nb[0] = ggml_type_size(type);
    v->nb[1] = nb1;
    v->nb[2] = nb2;
    v->nb[3] = nb2*ne2;

    return v;
}

// copy cells of a [n_head_kv*d, n_cells] cache of rows: idxs[h][i] of src to the cell dst_cells[i] of dst, for every KV head h.
// as 32-bit integers, which backends move unchanged; what they compute with they may round
static void build_move_rows(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * src, ggml_tensor * dst, ggml_tensor * idxs, int64_t n_head_kv, const std::vector<uint32_t> & dst_cells) {
    const int64_t nb_head = src->nb[1]/n_head_kv;
    const int64_t n_word  = nb_head/sizeof(int32_t);
    const int64_t n       = idxs->ne[0];

    ggml_tensor * rows = ggml_get_rows(ctx, view_as(ctx, src, GGML_TYPE_I32, n_word, src->ne[1], n_head_kv, src->nb[1], nb_head, 0), idxs);

    for_each_run(dst_cells, [&](size_t i0, uint32_t cell, size_t n_run) {
        ggml_tensor * from = ggml_view_3d(ctx, rows, n_word, n_run, n_head_kv, n_word*sizeof(int32_t), n_word*n*sizeof(int32_t), i0*n_word*sizeof(int32_t));
        ggml_tensor * to   = view_as(ctx, dst, GGML_TYPE_I32, n_word, n_run, n_head_kv, dst->nb[1], nb_head, cell*dst->nb[1]);
        ggml_build_forward_expand(gf, ggml_cpy(ctx, from, to));
    });
}

// the same for a transposed cache, in which element e of KV head h has its cells in row h*d + e, which may be followed by
// padding; idxs count from cell c0, of n_cells cells
static void build_move_cols(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * src, ggml_tensor * dst, ggml_tensor * idxs, int64_t d, int64_t n_head_kv, const std::vector<uint32_t> & dst_cells, uint32_t c0, int64_t n_cells) {
    const size_t  ts = ggml_type_size(src->type);
    const int64_t n  = idxs->ne[0];

    const int64_t n_word = d*ts/sizeof(int32_t);

    ggml_tensor * t = view_as(ctx, src, src->type, n_cells, d, n_head_kv, src->ne[1]*ts, src->ne[1]*d*ts, c0*ts);
    t = ggml_cont(ctx, ggml_permute(ctx, t, 1, 0, 2, 3)); // [d, n_cells, n_head_kv]

    ggml_tensor * rows = ggml_get_rows(ctx, view_as(ctx, t, GGML_TYPE_I32, n_word, n_cells, n_head_kv, d*ts, n_cells*d*ts, 0), idxs);

    for_each_run(dst_cells, [&](size_t i0, uint32_t cell, size_t n_run) {
        ggml_tensor * from = view_as(ctx, rows, src->type, d, n_run, n_head_kv, d*ts, n*d*ts, i0*d*ts);
        ggml_tensor * to   = view_as(ctx, dst,  src->type, n_run, d, n_head_kv, dst->ne[1]*ts, dst->ne[1]*d*ts, cell*ts);
        ggml_build_forward_expand(gf, ggml_cpy(ctx, ggml_permute(ctx, from, 1, 0, 2, 3), to));
    });
}

// the cells from the first to the last one that idxs name
static std::pair<int32_t, int32_t> cell_range(const std::vector<std::vector<int32_t>> & idxs) {
    int32_t c0 = idxs[0][0];
    int32_t c1 = idxs[0][0] + 1;
    for (const auto & row : idxs) {
        const auto [lo, hi] = std::minmax_element(row.begin(), row.end());
        c0 = std::min(c0, *lo);
        c1 = std::max(c1, *hi + 1);
    }
    return { c0, c1 };
}

// the two above through the host: for heads that are no multiple of 32 bits (some quantized types with some head sizes), and
// for destinations in so many runs that a graph has no room for them
static void move_rows_host(ggml_tensor * src, ggml_tensor * dst, const std::vector<std::vector<int32_t>> & idxs, const std::vector<uint32_t> & dst_cells) {
    const size_t nb_row  = src->nb[1];
    const size_t nb_head = nb_row/idxs.size();

    const auto [c0, c1] = cell_range(idxs);

    std::vector<uint8_t> from((c1 - c0)*nb_row);
    ggml_backend_tensor_get(src, from.data(), c0*nb_row, from.size());

    std::vector<uint8_t> to(dst_cells.size()*nb_row);
    for (size_t h = 0; h < idxs.size(); ++h) {
        for (size_t i = 0; i < idxs[h].size(); ++i) {
            memcpy(to.data() + i*nb_row + h*nb_head, from.data() + (idxs[h][i] - c0)*nb_row + h*nb_head, nb_head);
        }
    }

    for_each_run(dst_cells, [&](size_t i0, uint32_t cell, size_t n_run) {
        ggml_backend_tensor_set(dst, to.data() + i0*nb_row, cell*nb_row, n_run*nb_row);
    });
}

static void move_cols_host(ggml_tensor * src, ggml_tensor * dst, size_t d, const std::vector<std::vector<int32_t>> & idxs, const std::vector<uint32_t> & dst_cells) {
    const size_t ts     = ggml_type_size(src->type);
    const size_t n_elem = d*idxs.size();
    const size_t n      = dst_cells.size();

    const auto [c0, c1] = cell_range(idxs);
    const size_t n_from = c1 - c0;

    std::vector<uint8_t> from(n_elem*n_from*ts);
    ggml_backend_tensor_get_2d(src, from.data(), c0*ts, n_from*ts, n_elem, src->ne[1]*ts, n_from*ts);

    std::vector<uint8_t> to(n_elem*n*ts);
    for (size_t e = 0; e < n_elem; ++e) {
        const auto & row = idxs[e/d];
        for (size_t i = 0; i < n; ++i) {
            memcpy(to.data() + (e*n + i)*ts, from.data() + (e*n_from + row[i] - c0)*ts, ts);
        }
    }

    for_each_run(dst_cells, [&](size_t i0, uint32_t cell, size_t n_run) {
        ggml_backend_tensor_set_2d(dst, to.data() + i0*ts, cell*ts, n_run*ts, n_elem, dst->ne[1]*ts, n*ts);
    });
}

bool llama_shiftkv::move_layer(const llama_shiftkv_cache & src, llama_seq_id seq_src, size_t ikv_src, const llama_shiftkv_cache & dst, llama_seq_id seq_dst, size_t ikv_dst,
        const std::vector<std::vector<int32_t>> & idxs, const std::vector<uint32_t> & dst_cells) {
    const int64_t n_head_kv = idxs.size();
    const int64_t n         = dst_cells.size();

    if (n_head_kv == 0 || n == 0) {
        return true; // a layer without attention; a window that has just begun
    }

    const int32_t c0 = cell_range(idxs).first;
    const int32_t c1 = cell_range(idxs).second;

    ggml_tensor * k_src = src.k(ikv_src, seq_src);
    ggml_tensor * v_src = src.v(ikv_src, seq_src);
    ggml_tensor * k_dst = dst.k(ikv_dst, seq_dst);
    ggml_tensor * v_dst = dst.v(ikv_dst, seq_dst);

    const int64_t d_k     = src.n_embd_head_k(ikv_src);
    const int64_t d_v     = src.n_embd_head_v(ikv_src);
    const bool    v_trans = src.v_trans();

    size_t n_run = 0;
    for_each_run(dst_cells, [&](size_t, uint32_t, size_t) { n_run++; });

    const auto in_graph = [&](const ggml_tensor * t, int64_t d) {
        return n_run <= SHIFTKV_RUNS_MAX && ggml_row_size(t->type, d) % sizeof(int32_t) == 0;
    };

    const bool k_graph = in_graph(k_src, d_k);
    const bool v_graph = in_graph(v_src, d_v);

    if (k_graph || v_graph) {
        ggml_tensor * inp_idxs     = nullptr; // I32 [n, n_head_kv] cells
        ggml_tensor * inp_idxs_win = nullptr; // the same, counted from c0

        const auto build = [&](ggml_context * ctx, ggml_cgraph * gf) {
            const auto new_idxs = [&]() {
                ggml_tensor * t = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n, n_head_kv);
                ggml_set_input(t);
                return t;
            };
            if (k_graph || (v_graph && !v_trans)) {
                inp_idxs = new_idxs();
            }
            if (k_graph) {
                build_move_rows(ctx, gf, k_src, k_dst, inp_idxs, n_head_kv, dst_cells);
            }
            if (v_graph && v_trans) {
                inp_idxs_win = new_idxs();
                build_move_cols(ctx, gf, v_src, v_dst, inp_idxs_win, d_v, n_head_kv, dst_cells, c0, c1 - c0);
            } else if (v_graph) {
                build_move_rows(ctx, gf, v_src, v_dst, inp_idxs, n_head_kv, dst_cells);
            }
        };

        const auto set = [&]() {
            for (int64_t h = 0; h < n_head_kv; ++h) {
                if (inp_idxs) {
                    ggml_backend_tensor_set(inp_idxs, idxs[h].data(), h*inp_idxs->nb[1], n*sizeof(int32_t));
                }
                if (inp_idxs_win) {
                    std::vector<int32_t> win(n);
                    std::transform(idxs[h].begin(), idxs[h].end(), win.begin(), [&](int32_t c) { return c - c0; });
                    ggml_backend_tensor_set(inp_idxs_win, win.data(), h*inp_idxs_win->nb[1], n*sizeof(int32_t));
                }
            }
        };

        if (!capture.ctx.compute(build, set)) {
            return false;
        }
    }

    if (!k_graph) {
        move_rows_host(k_src, k_dst, idxs, dst_cells);
    }
    if (!v_graph && v_trans) {
        move_cols_host(v_src, v_dst, d_v, idxs, dst_cells);
    } else if (!v_graph) {
        move_rows_host(v_src, v_dst, idxs, dst_cells);
    }

    return true;
}

int32_t llama_shiftkv::compact(llama_context & dst, llama_seq_id seq_dst) {
    llama_context & src = capture.ctx.lctx;

    if (&dst.get_model() != &src.get_model()) {
        LLAMA_LOG_ERROR("%s: the destination is of another model\n", __func__);
        return LLAMA_SHIFTKV_ERR_MISMATCH;
    }

    const auto & cache     = capture.cache;
    const auto & cache_swa = capture.cache_swa;

    const auto caches_dst = llama_shiftkv_caches(dst.get_memory());

    const auto match = [](const llama_shiftkv_cache & a, const llama_shiftkv_cache & b) {
        return a && b && !b.is_shared() && a.same_layout(b);
    };
    if (!match(cache, caches_dst.first) || (cache_swa && !match(cache_swa, caches_dst.second))) {
        LLAMA_LOG_ERROR("%s: the destination stores KV pairs differently (KV types, flash attention, offload)\n", __func__);
        return LLAMA_SHIFTKV_ERR_MISMATCH;
    }

    capture.ctx.update();
    if (&dst != &src) {
        llama_shiftkv_context{ dst }.update();
    }

    // what was selected must still be there
    {
        std::vector<llama_shiftkv_cache::cell> cells;
        if (capture.seq_id != sel.seq_id || capture.collect(cells) != LLAMA_SHIFTKV_OK || cells != sel.captured) {
            return LLAMA_SHIFTKV_ERR_STALE;
        }
    }

    const bool in_place = &dst == &src && seq_dst == sel.seq_id;

    if (in_place && sel.info.n_kept == sel.captured.size()) {
        return LLAMA_SHIFTKV_OK;
    }

    // source cells by KV head, and the positions that the destination's cells carry
    struct move {
        llama_shiftkv_cache src;
        llama_shiftkv_cache dst;

        std::vector<std::vector<std::vector<int32_t>>> idxs; // per layer of the cache and KV head
        std::vector<uint32_t> cells_meta;                    // source cells whose positions are taken over
        std::vector<uint32_t> cells_dst;
    };
    std::vector<move> moves;

    {
        move m = { cache, caches_dst.first, {}, {}, {} };

        m.idxs.resize(cache.n_layer());
        for (size_t i = 0; i < capture.layers.size(); ++i) {
            for (const auto & kept : sel.kept[i]) {
                std::vector<int32_t> row(kept.size());
                std::transform(kept.begin(), kept.end(), row.begin(), [&](int32_t t) { return sel.cells[t]; });
                m.idxs[capture.layers[i].ikv].push_back(std::move(row));
            }
        }
        m.cells_meta.assign(sel.cells.end() - sel.info.n_kept, sel.cells.end());

        moves.push_back(std::move(m));
    }

    if (cache_swa) {
        move m = { cache_swa, caches_dst.second, {}, {}, {} };

        const llama_pos n_past = sel.info.n_past;

        const auto in_window = [&](const llama_shiftkv_cache::cell & c) {
            return c.pos < n_past && !cache_swa.is_masked(c.pos, n_past);
        };
        for (const auto & c : cache_swa.cells(sel.seq_id)) {
            if (in_window(c)) {
                m.cells_meta.push_back(c.idx);
            }
        }

        // what was decoded after the prompt may have taken its window's cells
        if (sel.cells.size() < sel.captured.size()) {
            const size_t n = std::count_if(sel.captured.begin(), sel.captured.begin() + sel.cells.size(), in_window);
            if (m.cells_meta.size() < n) {
                LLAMA_LOG_ERROR("%s: the sliding-window cache holds only %zu of the %zu tokens before the prompt's end\n", __func__, m.cells_meta.size(), n);
                return LLAMA_SHIFTKV_ERR_STALE;
            }
        }
        for (size_t ikv = 0; ikv < cache_swa.n_layer(); ++ikv) {
            m.idxs.emplace_back(cache_swa.n_head(ikv), std::vector<int32_t>(m.cells_meta.begin(), m.cells_meta.end()));
        }

        if (!in_place) {
            moves.push_back(std::move(m));
        }
    }

    for (auto & m : moves) {
        m.cells_dst = m.dst.find_free(seq_dst, m.cells_meta.size());
        if (m.cells_dst.size() < m.cells_meta.size()) {
            LLAMA_LOG_ERROR("%s: the destination has room for %zu of %zu cells\n", __func__, m.cells_dst.size(), m.cells_meta.size());
            return LLAMA_SHIFTKV_ERR_NO_SPACE;
        }
    }

    // half a sequence is none
    struct remover {
        llama_memory_i * memory;
        llama_seq_id     seq;

        ~remover() {
            if (memory) {
                memory->seq_rm(seq, -1, -1);
            }
        }
    };
    remover undo = { dst.get_memory(), seq_dst };

    for (auto & m : moves) {
        const auto metas = m.src.metas(sel.seq_id, m.cells_meta);

        m.dst.claim(seq_dst, m.cells_dst);

        // the graph reads all that it needs of a layer before it writes, so source and destination may overlap
        for (size_t ikv = 0; ikv < m.idxs.size(); ++ikv) {
            if (!move_layer(m.src, sel.seq_id, ikv, m.dst, seq_dst, ikv, m.idxs[ikv], m.cells_dst)) {
                return LLAMA_SHIFTKV_ERR_COMPUTE;
            }
        }

        m.dst.put(seq_dst, m.cells_dst, metas);
    }
    undo.memory = nullptr;

    if (in_place) {
        if (cache_swa) {
            cache_swa.kv->seq_rm(sel.seq_id, sel.info.n_past, -1);
        }
        store.clear();
        capture.ctx.give_back_later(); // without what the selection needed
    }

    return LLAMA_SHIFTKV_OK;
}
