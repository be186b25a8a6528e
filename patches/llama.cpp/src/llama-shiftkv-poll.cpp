#include "llama-shiftkv.h"

#include "ggml.h"

// asking may mean to wait for a lock of the caller's language, and a graph has a thousand nodes
static bool ask(llama_shiftkv_poll & poll) {
    const int64_t now = ggml_time_us();
    if (!poll.ended && now - poll.asked_us >= poll.interval_us) {
        poll.asked_us = now;
        poll.ended    = poll.ask(poll.data);
    }
    return poll.ended;
}

bool llama_shiftkv_abort_callback(void * data) {
    auto * poll = static_cast<llama_shiftkv_poll *>(data);
    return poll && poll->ask && ask(*poll);
}

bool llama_shiftkv_eval_callback(ggml_tensor * t, bool ask_first, void * data) {
    if (ask_first) {
        return t->op == GGML_OP_MUL_MAT; // between them little time goes by
    }
    return !llama_shiftkv_abort_callback(data);
}
