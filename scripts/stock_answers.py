"""Answers requests with llama-cpp-python's own API, on the stock library: the other side of bench_batch.py.

Reads settings as one line of JSON, then an array of messages' contents a line; prints how many tokens were written.
Nothing here imports edge_shiftkv, which needs the patched library.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import Llava15ChatHandler


def main() -> None:
    """Answer requests, a JSON array a line, with llama-cpp-python's own API; print how many tokens were written."""
    settings = json.loads(sys.stdin.readline())
    handler = Llava15ChatHandler(clip_model_path=settings["mmproj"], verbose=False) if settings["mmproj"] else None
    model = llama_cpp.Llama(
        settings["model"],
        chat_handler=handler,
        n_ctx=settings["n_ctx"],
        n_gpu_layers=0,
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
        flash_attn=True,
        verbose=False,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        n_tokens = 0
        for content in json.loads(line):
            reply: Any = model.create_chat_completion(
                [{"role": "user", "content": content}],
                max_tokens=settings["tokens"],
                temperature=0.0,
                logit_bias=settings["logit_bias"],
            )
            n_tokens += reply["usage"]["completion_tokens"]
        print(n_tokens, flush=True)


if __name__ == "__main__":
    main()
