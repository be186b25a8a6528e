#include "llama-shiftkv.h"

#include "ggml.h"

#include <cstdio>
#include <mutex>
#include <stdexcept>
#include <string>

extern "C" {
    GGML_API void ggml_print_backtrace(void);
}

//
// assertions as exceptions
//
// llama.cpp loads files and builds graphs within try blocks, but much that a damaged file gets wrong only fails an assertion
//

static thread_local bool asserts_throw = false;

static ggml_abort_callback_t asserts_next = nullptr;

// a kernel runs in several threads, of which the others would wait for one that left it
static bool is_in_backend(std::string message) {
    for (char & c : message) {
        c = c == '\\' ? '/' : c;
    }
    const std::string core = "ggml/src/ggml-";

    const size_t begin = message.find(core);
    if (begin == std::string::npos) {
        return false;
    }
    const size_t end = message.find_first_of("/:", begin + core.size());
    return end != std::string::npos && message[end] == '/';
}

static void asserts_callback(const char * message) {
    if (asserts_throw && !is_in_backend(message)) {
        throw std::runtime_error(message);
    }
    if (asserts_next) {
        asserts_next(message);
        return;
    }
    // what ggml_abort() does without a callback
    fprintf(stderr, "%s\n", message);
    ggml_print_backtrace();
}

bool llama_shiftkv_asserts_throw(bool on) {
    static std::once_flag once;
    std::call_once(once, [] { asserts_next = ggml_set_abort_callback(asserts_callback); });

    const bool before = asserts_throw;
    asserts_throw = on;
    return before;
}
