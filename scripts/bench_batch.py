"""Measure what answering many requests at once saves; prints a Markdown table.

    python scripts/bench_batch.py -m MODEL --mmproj MMPROJ --images PAGES/*.png --slots 4 8 16 --out batch.jsonl
    python scripts/bench_batch.py -m MODEL --prompt-tokens 1024 --requests 16    # pages of text (Python source)

The same requests are answered by `Runtime.generate`, one by one with the full cache, and by `Runtime.generate_many`
with so many slots, uncut and cut to the budget. A request is a page of its own and a question; answers have --tokens
tokens, however they go. All that is compared is measured in one run, a round after the other, in an order that turns:
ratios are medians of the rounds' ratios with their quartiles. Each measurement is a line of --out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_kv import markdown, ratio
from PIL import Image

from edge_shiftkv import Runtime, load_image

QUESTION = "What does the page say?"
ONE_BY_ONE = "one by one, full cache"

Request = Mapping[str, Any]


def pages(options: argparse.Namespace, runtime: Runtime) -> list[Request]:
    """The requests, each about a page that no other has."""
    if not options.images:
        source = "\n".join(Path(module).read_text() for module in (argparse.__file__, tempfile.__file__))
        model = runtime.engine.model
        tokens = model.tokenize(source)
        n = options.prompt_tokens
        texts = [[tokens[(101 * i + j) % len(tokens)] for j in range(n)] for i in range(options.requests)]
        pieces = [b"".join(map(model.piece, text)).decode(errors="ignore") for text in texts]
        return [{"prompt": f"{piece}\n{QUESTION}"} for piece in pieces]
    pictures = [load_image(path) for path in options.images]
    return [
        {"prompt": QUESTION, "images": [_marked(pictures[i % len(pictures)], i // len(pictures))]}
        for i in range(options.requests)
    ]


def _marked(picture: Image.Image, times: int) -> Image.Image:
    """The same page, but for a pixel: nothing that is known of one serves another."""
    copy = picture.copy()
    copy.putpixel((0, 0), (times % 256, times // 256 % 256, 0))
    return copy


def ways(options: argparse.Namespace, runtime: Runtime, requests: Sequence[Request]) -> dict[str, Callable[[], int]]:
    """How the requests are answered: a name, and what answers them and returns the tokens that it wrote."""
    model = runtime.engine.model
    endless = {token: -np.inf for token in range(model.n_vocab) if model.ends_generation(token)}
    settings: dict[str, Any] = {"max_tokens": options.tokens, "logit_bias": endless}

    def one_by_one() -> int:
        answers = (runtime.generate(**request, kv_budget=None, **settings) for request in requests)
        return sum(answer.figures.generated_tokens for answer in answers)

    def many(n_parallel: int, budget: int | None) -> Callable[[], int]:
        def answer() -> int:
            n_tokens = 0
            for result in runtime.generate_many(
                requests, n_parallel=n_parallel, ordered=False, kv_budget=budget, **settings
            ):
                if result.error:
                    raise result.error
                assert result.completion
                n_tokens += result.completion.figures.generated_tokens
            return n_tokens

        return answer

    found: dict[str, Callable[[], int]] = {ONE_BY_ONE: one_by_one}
    for n in options.slots:
        found[f"{n} slots, uncut"] = many(n, None)
        found[f"{n} slots, cut to {options.budget}"] = many(n, options.budget)
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table."""
    seconds: dict[str, list[float]] = {}
    with Runtime(options.model, options.mmproj, n_threads=options.threads, image_cache=0) as runtime:
        requests = pages(options, runtime)
        found = ways(options, runtime, requests)
        runtime.generate(**requests[0], max_tokens=1)  # to warm up
        for i in range(options.rounds):
            names = list(found)
            for name in (*names[i % len(names) :], *names[: i % len(names)]):
                started = time.perf_counter()
                n_tokens = found[name]()
                seconds.setdefault(name, []).append(time.perf_counter() - started)
                if options.out:
                    line = {
                        "way": name,
                        "round": i,
                        "requests": len(requests),
                        "tokens": n_tokens,
                        "seconds": seconds[name][-1],
                    }
                    with options.out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    rows = []
    for name in found:
        row = {"Way": name, "Requests an hour": f"{3600 * len(requests) / float(np.median(seconds[name])):.0f}"}
        row["Over one by one"] = ratio(seconds[ONE_BY_ONE], seconds[name])
        uncut = f"{name.partition(',')[0]}, uncut"
        row["Over uncut slots"] = ratio(seconds[uncut], seconds[name]) if uncut in seconds else ""
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description="Measure what answering many requests at once saves.")
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="GGUF")
    parser.add_argument("--mmproj", type=Path, metavar="GGUF")
    parser.add_argument("--images", type=Path, nargs="+", metavar="PAGE", help="pictures, used by turns")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="of a page of text, without pictures (1024)")
    parser.add_argument("--requests", type=int, default=16, help="how many there are (16)")
    parser.add_argument("--slots", type=int, nargs="+", default=[8], help="answers written at a time (8)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (64)")
    parser.add_argument("--budget", type=int, default=128, help="KV pairs kept (128)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, one a measurement")
    options = parser.parse_args(arguments)
    print(markdown(measure(options)))


if __name__ == "__main__":
    main()
