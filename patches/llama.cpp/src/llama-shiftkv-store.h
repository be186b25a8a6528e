#pragma once

#include "ggml-cpp.h"

#include <map>
#include <string>

// Tensors that stay on a device from one graph of a selection to the next, by buffer type and name
struct llama_shiftkv_store {
    // one of this shape; what it holds is kept where it had the same shape before. throws std::bad_alloc
    ggml_tensor * get(ggml_backend_buffer_type_t buft, const std::string & name, ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1);

    // the same, but whether it holds already what is called by this tag, which it does from now on
    ggml_tensor * get(ggml_backend_buffer_type_t buft, const std::string & name, const std::string & tag, ggml_type type, int64_t ne0, int64_t ne1, bool & holds);

    size_t size() const; // bytes

    // give all back but the named one
    void clear(const std::string & but = {});

    bool measure = false; // allocate nothing, count only

private:
    struct slot {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
        ggml_tensor           * tensor = nullptr;
        std::string             tag;
    };
    std::map<std::pair<ggml_backend_buffer_type_t, std::string>, slot> slots;
};
