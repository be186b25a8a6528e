"""Greedy answers of llama-cpp-python's own API, with whatever llama.cpp it loads: run by test_stock.py, prints JSON.

python greedy.py MODEL MMPROJ PICTURE PROMPT...
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Llava15ChatHandler


def main(model: str, mmproj: str, picture: str, *prompts: str) -> None:
    """Print, for every prompt, the answer and a digest of the prompt's logits; then an answer on the picture."""
    # As the runtime sets them; flash attention is another kernel.
    settings = {"n_ctx": 1024, "n_gpu_layers": 0, "n_threads": 2, "flash_attn": True, "verbose": False}
    plain = llama_cpp.Llama(model, logits_all=True, **settings)
    answers = []
    for prompt in prompts:
        tokens = plain.tokenize(prompt.encode(), add_bos=True, special=False)
        plain.reset()
        plain.eval(tokens)
        logits = hashlib.sha256(np.ascontiguousarray(plain.scores[: len(tokens)]).tobytes()).hexdigest()
        text = plain.create_completion(tokens, max_tokens=24, temperature=0.0)["choices"][0]["text"]
        answers.append({"text": text, "logits": logits})

    seeing = llama_cpp.Llama(model, chat_handler=Llava15ChatHandler(clip_model_path=mmproj, verbose=False), **settings)
    url = "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Read line 3."}]
    reply = seeing.create_chat_completion([{"role": "user", "content": content}], max_tokens=48, temperature=0.0)
    answers.append({"text": reply["choices"][0]["message"]["content"]})
    patched = hasattr(llama_cpp.llama_cpp._lib, "llama_shiftkv_select")
    kernels = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"patched": patched, "kernels": kernels, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
