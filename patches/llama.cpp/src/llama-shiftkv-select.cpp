#include "llama-shiftkv-impl.h"
#include "llama-shiftkv-pick.h"
#include "llama-shiftkv-rules.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <numeric>
#include <random>

static constexpr uint32_t SHIFTKV_POOL_MAX = 63;

// standard normal numbers: Mersenne twister and Box-Muller, the same on every platform
static std::vector<float> gen_noise(uint32_t seed, size_t n) {
    constexpr double two_pi = 6.283185307179586;

    std::mt19937 rng(seed);

    std::vector<float> res(n + n%2);
    for (size_t i = 0; i < res.size(); i += 2) {
        const double u = (rng() + 1.0)/4294967296.0; // (0, 1]
        const double v = rng()/4294967296.0;
        const double r = std::sqrt(-2.0*std::log(u));

        res[i]     = r*std::cos(two_pi*v);
        res[i + 1] = r*std::sin(two_pi*v);
    }
    res.resize(n);

    return res;
}

// n of them or more. the last ones are kept, for every context: most draw the same
static std::shared_ptr<const std::vector<float>> share_noise(uint32_t seed, size_t n) {
    static std::mutex mutex;
    static std::shared_ptr<const std::vector<float>> last;
    static uint32_t last_seed = 0;

    const std::lock_guard<std::mutex> lock(mutex);

    if (last && last_seed == seed && last->size() >= n) {
        return last;
    }
    auto res = std::make_shared<const std::vector<float>>(gen_noise(seed, n));
    if (n*sizeof(float) <= SHIFTKV_NOISE_KEPT) {
        last      = res;
        last_seed = seed;
    }
    return res;
}

const std::vector<float> & llama_shiftkv::get_noise(uint32_t seed, uint32_t n_proxy) {
    const size_t n = (size_t) capture.ctx.lctx.get_model().hparams.n_embd*n_proxy;
    if (!noise || noise->size() < n || noise_seed != seed) {
        noise      = share_noise(seed, n);
        noise_seed = seed;
    }
    return *noise;
}

int32_t llama_shiftkv::select(const llama_shiftkv_params & params, const float * scores, size_t n_scores, int32_t il) {
    const auto * rule = llama_shiftkv_get_rule(params.method);

    if (params.budget < 2 || params.n_recent < 1 || params.n_pool % 2 != 1 || params.n_pool > SHIFTKV_POOL_MAX) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!scores && (!rule || !rule->valid(params))) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!scores && rule->n_query(params) > capture.n_query) {
        LLAMA_LOG_ERROR("%s: the method looks at the last %u queries, captured are %u\n", __func__, rule->n_query(params), capture.n_query);
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (!capture.error.empty()) {
        LLAMA_LOG_ERROR("%s: not supported: %s\n", __func__, capture.error.c_str());
        return LLAMA_SHIFTKV_ERR_UNSUPPORTED;
    }

    capture.ctx.update();

    const auto & layers = capture.layers;

    std::vector<llama_shiftkv_cache::cell> cells;
    int32_t status = capture.collect_with_query(cells);
    if (status != LLAMA_SHIFTKV_OK) {
        selected = false;
        sel = {};
        return status;
    }

    const uint32_t n_prompt = params.n_prompt == 0 ? cells.size() : params.n_prompt;
    const uint32_t n_kept   = std::min(n_prompt, params.budget);

    if (n_prompt > cells.size()) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (scores) {
        size_t n = 0;
        for (const auto & l : layers) {
            n += il < 0 || l.il == il ? l.n_head_kv*n_prompt : 0;
        }
        if (n_scores != n || std::any_of(scores, scores + n, [](float v) { return std::isnan(v); })) {
            return LLAMA_SHIFTKV_ERR_ARGUMENT;
        }
    } else if (n_prompt < cells.size() && rule->n_query(params) > 0) {
        LLAMA_LOG_ERROR("%s: the method looks at the last queries of the prompt, but captured are those of what follows it\n", __func__);
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }

    selected = false;
    sel = {};

    sel.seq_id        = capture.seq_id;
    sel.info.n_prompt = n_prompt;
    sel.info.n_kept   = n_kept;
    sel.info.n_layer  = layers.size();

    for (uint32_t i = 0; i < n_prompt; ++i) {
        sel.cells.push_back(cells[i].idx);
        sel.info.n_past = std::max(sel.info.n_past, cells[i].end);
    }
    sel.captured = std::move(cells);

    for (const auto & l : layers) {
        const size_t row = capture.cache.row_bytes(l.ikv);
        sel.info.kv_bytes_prompt += row*n_prompt;
        sel.info.kv_bytes_kept   += row*n_kept;
    }
    if (capture.cache_swa) {
        const auto   swa   = capture.cache_swa.cells(sel.seq_id);
        const size_t n_swa = std::count_if(swa.begin(), swa.end(), [&](const auto & c) { return c.pos < sel.info.n_past; });
        for (size_t ikv = 0; ikv < capture.cache_swa.n_layer(); ++ikv) {
            const size_t row = capture.cache_swa.row_bytes(ikv);
            sel.info.kv_bytes_prompt += row*n_swa;
            sel.info.kv_bytes_kept   += row*n_swa;
        }
    }

    sel.kept.resize(layers.size());

    if (n_kept == n_prompt) {
        std::vector<int32_t> all(n_prompt);
        std::iota(all.begin(), all.end(), 0);
        for (size_t i = 0; i < layers.size(); ++i) {
            sel.kept[i].assign(layers[i].n_head_kv, all);
        }
        selected = true;
        return LLAMA_SHIFTKV_OK;
    }

    if (params.keep_scores) {
        sel.scores.resize(layers.size());
    }

    n_select++;

    // what stays on the devices only stays as long as the selection, but for the noise
    struct clearer {
        llama_shiftkv_store & store;

        ~clearer() { store.clear("noise"); }
    };
    const clearer clear = { store };

    for (size_t i = 0; i < layers.size() && status == LLAMA_SHIFTKV_OK; ++i) {
        if (il >= 0 && layers[i].il != il) {
            continue;
        }
        status = select_layer(i, params, scores);
        if (scores) {
            scores += layers[i].n_head_kv*n_prompt;
        }
    }

    selected = status == LLAMA_SHIFTKV_OK;

    return status;
}

void llama_shiftkv::set(ggml_tensor * t, const void * data) {
    // an input that the graph makes no use of has no place
    if (t->buffer) {
        ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        sel.info.bytes_moved += ggml_nbytes(t);
    }
}

void llama_shiftkv::get(const ggml_tensor * t, void * data) {
    ggml_backend_tensor_get(t, data, 0, ggml_nbytes(t));
    sel.info.bytes_moved += ggml_nbytes(t);
}

llama_shiftkv_scoring llama_shiftkv::scoring(size_t i_layer, const llama_shiftkv_params & params) {
    const auto & cache = capture.cache;
    const auto & l     = capture.layers[i_layer];

    // cells from the prompt's first to its last, rounded to what fast matrix products want; others in between are masked
    const auto & cells = sel.cells;
    const auto [c_min, c_max] = std::minmax_element(cells.begin(), cells.end());
    const uint32_t c0 = *c_min/16*16;
    const uint32_t c1 = std::min((*c_max/16 + 1)*16, cache.size());

    const bool on_host = ggml_backend_buft_is_host(cache.buft(l.ikv)) && getenv("LLAMA_SHIFTKV_GRAPH") == nullptr && // for tests
        llama_shiftkv_cpu_supports(cache.k(l.ikv, sel.seq_id), l.n_embd_head);

    return {
        *this, capture, l, params, i_layer, cells, c0, c1 - c0, cache.k(l.ikv, sel.seq_id), cache.v(l.ikv, sel.seq_id), cache.v_trans(),
        capture.ctx.lctx.get_model().hparams.n_pos_per_embd(), on_host,
    };
}

int64_t llama_shiftkv::select_size(const llama_shiftkv_params & params, uint32_t n_prompt) {
    const auto * rule = llama_shiftkv_get_rule(params.method);

    if (params.budget < 2 || params.n_recent < 1 || params.n_pool % 2 != 1 || params.n_pool > SHIFTKV_POOL_MAX ||
            !rule || !rule->valid(params) || rule->n_query(params) > capture.n_query || n_prompt < 1 || n_prompt > capture.cache.size()) {
        return LLAMA_SHIFTKV_ERR_ARGUMENT;
    }
    if (rule->fill) {
        return 0;
    }

    capture.ctx.update();

    // what a selection changes, and comes back
    struct guard {
        llama_shiftkv     & skv;
        llama_shiftkv_store store;
        selection           sel;

        guard(llama_shiftkv & skv) : skv(skv), store(std::move(skv.store)), sel(std::move(skv.sel)) {
            skv.store = {};
            skv.store.measure = true;
            skv.sel = {};
            skv.graph_size = 0;
            skv.graph_ops.clear();
        }
        ~guard() {
            skv.store = std::move(store);
            skv.sel   = std::move(sel);
        }
    };
    {
        const guard usual(*this);

        sel.seq_id        = capture.seq_id;
        sel.info.n_prompt = n_prompt;
        sel.info.n_kept   = std::min(n_prompt, params.budget);
        sel.info.n_past   = n_prompt;
        sel.cells.resize(n_prompt);
        std::iota(sel.cells.begin(), sel.cells.end(), 0);

        for (size_t i = 0; i < capture.layers.size(); ++i) {
            auto s = scoring(i, params);
            rule->score(s);
            if (!s.on_host) {
                llama_shiftkv_pick(s);
            }
        }
    }
    for (const auto & op : graph_ops) {
        LLAMA_LOG_DEBUG("%s: computes %s\n", __func__, op.c_str());
    }
    capture.ctx.reserve();

    return graph_size;
}

// scores on the host, in the prompt's order: [n_head_kv][n_prompt]
struct llama_shiftkv::ranking {
    std::vector<float> ranks;
    std::vector<float> observed; // the same, or empty
};

int32_t llama_shiftkv::select_layer(size_t i_layer, const llama_shiftkv_params & params, const float * scores) {
    const auto & l = capture.layers[i_layer];

    auto s = scoring(i_layer, params);

    const size_t n_head_kv = l.n_head_kv;
    const size_t n_prompt  = sel.cells.size();

    ranking r;

    bool picked = false; // on the device

    if (scores) {
        r.ranks.assign(scores, scores + n_head_kv*n_prompt);
    } else if (const auto * rule = llama_shiftkv_get_rule(params.method); rule->fill) {
        r.ranks = rule->fill(s);
    } else {
        rule->score(s);

        // in the prompt's order
        const auto read = [&](const ggml_tensor * t) {
            std::vector<float> by_cell(s.n_kv*n_head_kv);
            ggml_backend_tensor_get(t, by_cell.data(), 0, ggml_nbytes(t));

            std::vector<float> res;
            res.reserve(n_head_kv*n_prompt);
            for (size_t h = 0; h < n_head_kv; ++h) {
                for (const uint32_t c : sel.cells) {
                    res.push_back(by_cell[h*s.n_kv + c - s.c0]);
                }
            }
            return res;
        };

        if (!s.on_host) {
            if (!llama_shiftkv_pick(s)) {
                LLAMA_LOG_ERROR("%s: layer %d has scores that are NaN\n", __func__, l.il);
                return LLAMA_SHIFTKV_ERR_COMPUTE;
            }
            picked = true;
        }
        if (s.on_host || params.keep_scores) {
            r.ranks = read(s.scores());
        }
        if (s.on_host && params.observed > 0.0f) {
            r.observed = read(s.observed());
        }
    }

    const auto [n_sink, i_recent] = sel.always_kept(params);

    // the tokens before the last ones, which are always kept, averaged with their neighbours among them
    const auto pool = [&, i_recent = i_recent](std::vector<float> & rows) {
        const size_t n_side = params.n_pool/2;
        if (n_side == 0 || rows.empty()) {
            return;
        }
        std::vector<float> res(i_recent);
        for (size_t h = 0; h < n_head_kv; ++h) {
            float * row = rows.data() + h*n_prompt;
            for (size_t i = 0; i < i_recent; ++i) {
                const size_t first = i - std::min(i, n_side);
                const size_t last  = std::min(i + n_side + 1, i_recent);
                res[i] = std::accumulate(row + first, row + last, 0.0f)/params.n_pool;
            }
            std::copy(res.begin(), res.end(), row);
        }
    };
    pool(params.observed > 0.0f && !scores && llama_shiftkv_get_rule(params.method)->score ? r.observed : r.ranks);

    if (!picked && !pick_on_host(i_layer, params, r)) {
        LLAMA_LOG_ERROR("%s: layer %d has scores that are NaN\n", __func__, l.il);
        return scores ? LLAMA_SHIFTKV_ERR_ARGUMENT : LLAMA_SHIFTKV_ERR_COMPUTE;
    }

    if (params.keep_scores) {
        sel.scores[i_layer].resize(n_head_kv);
        for (size_t h = 0; h < n_head_kv; ++h) {
            auto & row = sel.scores[i_layer][h];
            row.assign(r.ranks.begin() + h*n_prompt, r.ranks.begin() + (h + 1)*n_prompt);
            std::fill(row.begin(), row.begin() + n_sink, std::numeric_limits<float>::infinity());
            std::fill(row.begin() + i_recent, row.end(), std::numeric_limits<float>::infinity());
        }
    }

    return LLAMA_SHIFTKV_OK;
}

std::pair<size_t, size_t> llama_shiftkv::selection::always_kept(const llama_shiftkv_params & params) const {
    const size_t n_recent = std::min<size_t>(params.n_recent, info.n_kept);
    const size_t n_sink   = std::min<size_t>(params.n_sink, info.n_kept - n_recent);

    return { n_sink, info.n_prompt - n_recent };
}

size_t llama_shiftkv::selection::n_observed(const llama_shiftkv_params & params) const {
    const auto [n_sink, i_recent] = always_kept(params);

    return std::min<size_t>(std::lround(params.observed*info.n_kept), info.n_kept - n_sink - (info.n_prompt - i_recent));
}

bool llama_shiftkv::pick_on_host(size_t i_layer, const llama_shiftkv_params & params, const ranking & r) {
    const size_t n_head_kv = capture.layers[i_layer].n_head_kv;
    const size_t n_prompt  = sel.cells.size();
    const size_t n_kept    = sel.info.n_kept;

    const auto [n_sink, i_recent] = sel.always_kept(params);

    sel.kept[i_layer].resize(n_head_kv);
    for (size_t h = 0; h < n_head_kv; ++h) {
        auto & kept = sel.kept[i_layer][h];

        for (size_t i = 0; i < n_sink; ++i) {
            kept.push_back(i);
        }
        for (size_t i = i_recent; i < n_prompt; ++i) {
            kept.push_back(i);
        }

        std::vector<int32_t> rest(i_recent - n_sink);
        std::iota(rest.begin(), rest.end(), n_sink);

        // the n best of the rest; of equal ones the first
        const auto take = [&](const std::vector<float> & rows, size_t n) {
            const float * row = rows.data() + h*n_prompt;
            if (std::any_of(rest.begin(), rest.end(), [&](int32_t i) { return std::isnan(row[i]); })) {
                return false;
            }
            std::nth_element(rest.begin(), rest.begin() + n, rest.end(), [&](int32_t a, int32_t b) {
                return row[a] > row[b] || (row[a] == row[b] && a < b);
            });
            kept.insert(kept.end(), rest.begin(), rest.begin() + n);
            rest.erase(rest.begin(), rest.begin() + n);
            return true;
        };

        const size_t n_observed = r.observed.empty() ? 0 : sel.n_observed(params);

        if ((n_observed > 0 && !take(r.observed, n_observed)) || !take(r.ranks, n_kept - kept.size())) {
            return false;
        }
        std::sort(kept.begin(), kept.end());
    }

    return true;
}
