#include "llama-shiftkv-cache.h"

#include "llama-hparams.h"

#include <algorithm>

uint32_t llama_shiftkv_cache::size() const {
    return kv->get_size();
}

size_t llama_shiftkv_cache::n_cells() const {
    return (size_t) kv->get_size()*kv->get_n_stream();
}

size_t llama_shiftkv_cache::offset(llama_seq_id seq) const {
    return (size_t) kv->get_stream(seq)*kv->get_size();
}

std::vector<llama_shiftkv_cache::cell> llama_shiftkv_cache::cells(llama_seq_id seq) const {
    const auto & all = kv->get_cells(seq);

    std::vector<cell> res;
    for (const auto & [pos, idx] : all.seq_pos_get(seq)) {
        const auto & ext = all.ext_get(idx);
        res.push_back({ idx, pos, std::max({ pos, ext.x, ext.y }) + 1, all.gen_get(idx) });
    }
    return res;
}

llama_pos llama_shiftkv_cache::pos_max(llama_seq_id seq) const {
    return kv->seq_pos_max(seq);
}

uint64_t llama_shiftkv_cache::gen(llama_seq_id seq, uint32_t idx) const {
    return kv->get_cells(seq).gen_get(idx);
}

bool llama_shiftkv_cache::is_masked(llama_pos pos, llama_pos n_past) const {
    return llama_hparams::is_masked_swa(kv->n_swa, kv->swa_type, pos, n_past);
}

std::vector<uint32_t> llama_shiftkv_cache::find_free(llama_seq_id seq, uint32_t n) const {
    const auto & all = kv->get_cells(seq);

    const auto is_free = [&](uint32_t i) {
        return all.is_empty(i) || (all.seq_count(i) == 1 && all.seq_has(i, seq));
    };
    // as llama_kv_cache::find_slot() has it
    const auto is_out_of_window = [&](uint32_t i) {
        return all.seq_count(i) == 1 && is_masked(all.pos_get(i), all.seq_pos_max(all.seq_get(i)) + 1);
    };

    std::vector<uint32_t> res;

    for (const bool windows : { false, true }) {
        res.clear();

        uint32_t n_run = 0;
        for (uint32_t i = 0; i < all.size(); ++i) {
            if (!is_free(i) && !(windows && is_out_of_window(i))) {
                n_run = 0;
                continue;
            }
            res.push_back(i);
            if (++n_run == n) {
                return { res.end() - n, res.end() };
            }
        }
        if (res.size() >= n) {
            break;
        }
    }

    res.resize(std::min<size_t>(res.size(), n));

    return res;
}

std::vector<llama_shiftkv_cache::meta> llama_shiftkv_cache::metas(llama_seq_id seq, const std::vector<uint32_t> & idxs) const {
    const auto & all = kv->get_cells(seq);

    std::vector<meta> res;
    for (const uint32_t idx : idxs) {
        res.push_back({ all.pos_get(idx), all.ext_get(idx) });
    }
    return res;
}

void llama_shiftkv_cache::claim(llama_seq_id seq, const std::vector<uint32_t> & idxs) {
    kv->seq_rm(seq, -1, -1);

    const auto & all = kv->get_cells(seq);

    // as llama_kv_cache::apply_ubatch() has it: no sequence has gaps, so what lies before a token that goes has to go, too
    std::map<llama_seq_id, llama_pos> taken;
    for (const uint32_t idx : idxs) {
        if (!all.is_empty(idx)) {
            auto & last = taken[all.seq_get(idx)];
            last = std::max(last, all.pos_get(idx));
        }
    }
    for (const auto & [other, last] : taken) {
        kv->seq_rm(other, -1, last + 1);
    }
}

bool llama_shiftkv_cache::are_empty(llama_seq_id seq, const std::vector<uint32_t> & idxs) const {
    const auto & all = kv->get_cells(seq);
    return std::all_of(idxs.begin(), idxs.end(), [&](uint32_t idx) { return all.is_empty(idx); });
}

void llama_shiftkv_cache::put(llama_seq_id seq, const std::vector<uint32_t> & idxs, const std::vector<meta> & metas) {
    auto & all = kv->v_cells[kv->get_stream(seq)];

    for (size_t i = 0; i < idxs.size(); ++i) {
        all.pos_set(idxs[i], metas[i].pos);
        all.ext_set(idxs[i], metas[i].ext);
        all.seq_add(idxs[i], seq);
    }
}

size_t llama_shiftkv_cache::n_layer() const {
    return kv->layers.size();
}

std::map<uint32_t, size_t> llama_shiftkv_cache::ikvs() const {
    return { kv->map_layer_ids.begin(), kv->map_layer_ids.end() };
}

size_t llama_shiftkv_cache::ikv(uint32_t il) const {
    return kv->map_layer_ids.at(il);
}

uint32_t llama_shiftkv_cache::il(size_t ikv) const {
    return kv->layers[ikv].il;
}

int64_t llama_shiftkv_cache::n_head(size_t ikv) const {
    return kv->hparams.n_head_kv(il(ikv));
}

int64_t llama_shiftkv_cache::n_embd_head_k(size_t ikv) const {
    return kv->hparams.n_embd_head_k(il(ikv));
}

int64_t llama_shiftkv_cache::n_embd_head_v(size_t ikv) const {
    return kv->hparams.n_embd_head_v(il(ikv));
}

ggml_tensor * llama_shiftkv_cache::k(size_t ikv, llama_seq_id seq) const {
    return kv->layers[ikv].k_stream[kv->get_stream(seq)];
}

ggml_tensor * llama_shiftkv_cache::v(size_t ikv, llama_seq_id seq) const {
    return kv->layers[ikv].v_stream[kv->get_stream(seq)];
}

bool llama_shiftkv_cache::v_trans() const {
    return kv->v_trans;
}

ggml_backend_buffer_type_t llama_shiftkv_cache::buft(size_t ikv) const {
    return ggml_backend_buffer_get_type(kv->layers[ikv].k->buffer);
}

size_t llama_shiftkv_cache::row_bytes(size_t ikv) const {
    const auto & l = kv->layers[ikv];
    return ggml_row_size(l.k->type, n_embd_head_k(ikv)*n_head(ikv)) + ggml_row_size(l.v->type, n_embd_head_v(ikv)*n_head(ikv));
}

bool llama_shiftkv_cache::is_shared() const {
    return kv->other != nullptr;
}

std::unique_ptr<llama_kv_cache> llama_shiftkv_cache::one_layer(const llama_model & model, uint32_t n_cells, bool offload) const {
    // layer -> the first one of its shape and device
    std::map<uint32_t, uint32_t> first;
    for (const auto & [il, ikv] : ikvs()) {
        first[il] = il;
        for (const auto & [other, ikv_other] : ikvs()) {
            const auto & a = kv->layers[ikv];
            const auto & b = kv->layers[ikv_other];
            if (kv->hparams.n_head_kv(il) == kv->hparams.n_head_kv(other) && a.k->ne[0] == b.k->ne[0] && a.v->ne[0] == b.v->ne[0] && buft(ikv) == buft(ikv_other)) {
                first[il] = other;
                break;
            }
        }
    }

    const auto filter = [&](int32_t il) {
        const auto it = first.find(il);
        return it != first.end() && it->second == (uint32_t) il;
    };
    auto res = std::make_unique<llama_kv_cache>(model, kv->hparams, kv->layers[0].k->type, kv->layers[0].v->type, kv->v_trans, offload, true, n_cells, 1,
            kv->n_pad, kv->n_swa, kv->swa_type, nullptr, filter, nullptr, nullptr);

    for (const auto & [il, il_first] : first) {
        res->map_layer_ids[il] = res->map_layer_ids.at(il_first);
    }
    return res;
}

bool llama_shiftkv_cache::same_layout(const llama_shiftkv_cache & other) const {
    const auto & a = *kv;
    const auto & b = *other.kv;

    if (a.map_layer_ids.size() != b.map_layer_ids.size() || a.v_trans != b.v_trans || a.attn_rot_k != b.attn_rot_k || a.attn_rot_v != b.attn_rot_v) {
        return false;
    }
    for (const auto & [il, ikv] : ikvs()) {
        const auto it = b.map_layer_ids.find(il);
        if (it == b.map_layer_ids.end()) {
            return false;
        }
        const auto & x = a.layers[ikv];
        const auto & y = b.layers[it->second];
        if (x.k->type != y.k->type || x.v->type != y.v->type || x.v->ne[0] != y.v->ne[0] || buft(ikv) != other.buft(it->second)) {
            return false;
        }
    }
    return true;
}
