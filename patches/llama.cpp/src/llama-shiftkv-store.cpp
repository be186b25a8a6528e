#include "llama-shiftkv-store.h"

#include <new>

ggml_tensor * llama_shiftkv_store::get(ggml_backend_buffer_type_t buft, const std::string & name, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    auto & s = slots[{ buft, name }];

    if (s.tensor && s.tensor->type == type && s.tensor->ne[0] == ne0 && s.tensor->ne[1] == ne1 && s.tensor->ne[2] == ne2) {
        return s.tensor;
    }
    s = {};

    s.ctx.reset(ggml_init({ /*.mem_size =*/ ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));
    ggml_tensor * t = ggml_new_tensor_3d(s.ctx.get(), type, ne0, ne1, ne2);
    ggml_format_name(t, "shiftkv_%s", name.c_str());

    if (measure) {
        s.buf.reset(ggml_backend_buft_alloc_buffer(buft, 0)); // the scheduler allocates what has none
        t->buffer = s.buf.get();
    } else {
        s.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(s.ctx.get(), buft));
    }
    if (!s.buf) {
        throw std::bad_alloc();
    }
    s.tensor = t;

    return t;
}

ggml_tensor * llama_shiftkv_store::get(ggml_backend_buffer_type_t buft, const std::string & name, const std::string & tag, ggml_type type, int64_t ne0, int64_t ne1, bool & holds) {
    ggml_tensor * t = get(buft, name, type, ne0, ne1);

    auto & s = slots[{ buft, name }];
    holds = s.tag == tag;
    s.tag = tag;

    return t;
}

size_t llama_shiftkv_store::size() const {
    size_t res = 0;
    for (const auto & [key, s] : slots) {
        res += s.tensor ? ggml_nbytes(s.tensor) : 0;
    }
    return res;
}

void llama_shiftkv_store::clear(const std::string & but) {
    for (auto it = slots.begin(); it != slots.end(); ) {
        it = it->first.second == but ? std::next(it) : slots.erase(it);
    }
}
