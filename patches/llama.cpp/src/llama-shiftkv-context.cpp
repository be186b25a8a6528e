#include "llama-shiftkv-context.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cinttypes>
#include <numeric>

void llama_shiftkv_context::drop_graph() {
    lctx.gf_res_prev_active = nullptr;
}

void llama_shiftkv_context::reserve() {
    lctx.sched_need_reserve = true;
    lctx.sched_reserve();
}

void llama_shiftkv_context::give_back_later() {
    // Mesa's software Vulkan (22.3) crashes when the buffers of a backend that goes on computing are replaced: devices keep them
    const bool host = std::all_of(lctx.backends.begin(), lctx.backends.end(), [](const auto & backend) {
        const auto type = ggml_backend_dev_type(ggml_backend_get_device(backend.get()));
        return type == GGML_BACKEND_DEVICE_TYPE_CPU || type == GGML_BACKEND_DEVICE_TYPE_ACCEL;
    });
    if (host) {
        lctx.sched_need_reserve = true;
    }
}

void llama_shiftkv_context::update() {
    lctx.synchronize();
    lctx.sched_reserve();
    lctx.memory_update(false);
}

void llama_shiftkv_context::set_memory(std::unique_ptr<llama_kv_cache> memory, uint32_t n_ctx) {
    lctx.synchronize();
    drop_graph();
    lctx.memory = std::move(memory);
    lctx.cparams.n_ctx = lctx.cparams.n_ctx_seq = n_ctx;
    lctx.graph_reuse_disable = true;
    lctx.sched_need_reserve  = true;
}

llm_graph_result * llama_shiftkv_context::start_graph() {
    auto * res = lctx.get_gf_res_reserve();

    ggml_backend_sched_reset(lctx.get_sched());
    res->reset();
    for (auto & prev : lctx.gf_res_prev) {
        if (prev) {
            prev->reset();
        }
    }
    drop_graph();

    return res;
}

bool llama_shiftkv_context::compute(const std::function<void(ggml_context *, ggml_cgraph *)> & build, const std::function<void()> & set) {
    auto * sched = lctx.get_sched();
    auto * res   = start_graph();

    build(res->get_ctx(), res->get_gf());

    if (!ggml_backend_sched_alloc_graph(sched, res->get_gf())) {
        LLAMA_LOG_ERROR("%s: failed to allocate the graph\n", __func__);
        return false;
    }

    set();

    if (lctx.graph_compute(res->get_gf(), true) != GGML_STATUS_SUCCESS) {
        return false;
    }
    ggml_backend_sched_synchronize(sched);

    return true;
}

size_t llama_shiftkv_context::measure(const std::function<void(ggml_context *, ggml_cgraph *)> & build, std::set<std::string> & operations) {
    auto * res = start_graph();

    build(res->get_ctx(), res->get_gf());

    for (int i = 0; i < ggml_graph_n_nodes(res->get_gf()); ++i) {
        const ggml_tensor * t = ggml_graph_node(res->get_gf(), i);
        std::string text = ggml_op_desc(t);
        for (const ggml_tensor * x : { t, (const ggml_tensor *) t->src[0], (const ggml_tensor *) t->src[1] }) {
            if (x) {
                text += format(" %s[%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 "]:%zu", ggml_type_name(x->type), x->ne[0], x->ne[1], x->ne[2], x->ne[3], ggml_nbytes(x));
            }
        }
        operations.insert(std::move(text));
    }

    std::vector<size_t> sizes(lctx.backends.size());
    ggml_backend_sched_reserve_size(lctx.get_sched(), res->get_gf(), sizes.data());

    return std::accumulate(sizes.begin(), sizes.end(), (size_t) 0);
}
