#pragma once

#include "llama-kv-cache.h"

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

// A KV cache as the selection sees it. Its file is the only one of ours that looks inside llama_kv_cache
struct llama_shiftkv_cache {
    // where a token of a sequence lies
    struct cell {
        uint32_t  idx; // in the sequence's stream
        llama_pos pos;
        llama_pos end; // the position after it: after a token of an image in M-RoPE, that after its row and column
        uint64_t  gen; // which writing of the cell this is

        bool operator==(const cell & other) const { return idx == other.idx && pos == other.pos && gen == other.gen; }
        bool operator!=(const cell & other) const { return !(*this == other); }
    };

    // what a cell says of its token
    struct meta {
        llama_pos         pos;
        llama_kv_cell_ext ext;
    };

    llama_kv_cache * kv = nullptr;

    explicit operator bool() const { return kv != nullptr; }

    // of the cells
    uint32_t size()                   const; // cells of a stream
    size_t   n_cells()                const; // of all streams
    size_t   offset(llama_seq_id seq) const; // of the sequence's stream among all cells

    std::vector<cell> cells(llama_seq_id seq) const; // in the order of the sequence's tokens
    llama_pos         pos_max(llama_seq_id seq) const;

    // which writing of cell idx of the sequence's stream this is: another after each
    uint64_t gen(llama_seq_id seq, uint32_t idx) const;

    // whether the token at n_past no longer sees the one at pos, because of the window
    bool is_masked(llama_pos pos, llama_pos n_past) const;

    // n cells, in one run if there is one, that a sequence may be moved to: empty ones, those that it alone holds, and if need be
    // those of another sequence that are out of its window. fewer if there are no more
    std::vector<uint32_t> find_free(llama_seq_id seq, uint32_t n) const;

    std::vector<meta> metas(llama_seq_id seq, const std::vector<uint32_t> & idxs) const;

    // remove the sequence, and whatever else the cells hold; then, when their keys and values are there, let it hold them
    void claim(llama_seq_id seq, const std::vector<uint32_t> & idxs);
    bool are_empty(llama_seq_id seq, const std::vector<uint32_t> & idxs) const;
    void put  (llama_seq_id seq, const std::vector<uint32_t> & idxs, const std::vector<meta> & metas);

    // of the layers, by index in the cache
    size_t   n_layer()       const;
    std::map<uint32_t, size_t> ikvs() const; // of each layer of the model that has one; several may share theirs
    size_t   ikv(uint32_t il) const;
    uint32_t il(size_t ikv)  const;
    int64_t  n_head(size_t ikv) const;
    int64_t  n_embd_head_k(size_t ikv) const;
    int64_t  n_embd_head_v(size_t ikv) const; // a transposed cache may be padded: its rows are then wider than all heads together

    ggml_tensor * k(size_t ikv, llama_seq_id seq) const; // of the sequence's stream: [n_embd_head_k*n_head, size()]
    ggml_tensor * v(size_t ikv, llama_seq_id seq) const; // null where there are no values; likewise, but for the padding
    bool          v_trans() const;

    ggml_backend_buffer_type_t buft(size_t ikv) const;

    // bytes of a token's keys and values, without padding
    size_t row_bytes(size_t ikv) const;

    // whether it stands for another context's
    bool is_shared() const;

    // another like it, with n_cells cells of one sequence in which layers of the same shape and device take the same place.
    // throws as llama_kv_cache does
    std::unique_ptr<llama_kv_cache> one_layer(const llama_model & model, uint32_t n_cells, bool offload) const;

    // whether rows may be copied between the two
    bool same_layout(const llama_shiftkv_cache & other) const;
};
