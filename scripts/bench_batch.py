"""Measure what answering many requests at once saves; prints a Markdown table.

    python scripts/bench_batch.py -m MODEL --mmproj MMPROJ --images PAGES/*.png --slots 4 8 16 --out batch.jsonl
    python scripts/bench_batch.py -m MODEL --prompt-tokens 1024 --requests 16    # pages of text (Python source)
    python scripts/bench_batch.py -m MODEL --prompt-tokens 2900 --memory         # what the sequences' KV caches take

The same requests are answered by `Runtime.generate`, one by one with the full cache, and by `Runtime.generate_many`
with so many slots, uncut and cut to the budget; with --stock FOLDER (see bench_pass.py) also by llama-cpp-python's own
`Llama` on the stock library, in a process of its own. A request is a page of its own and a question; answers have
--tokens tokens, however they go. All that is compared is measured in one run, a round after the other, in an order that
turns: ratios are medians of the rounds' ratios with their quartiles. Each measurement is a line of --out.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    MIB,
    JsonLines,
    Process,
    Row,
    add_model,
    add_options,
    first_text,
    markdown,
    ratio,
    resident,
    stock_library,
    turned,
)
from PIL import Image

from edge_shiftkv import Runtime, load_image
from edge_shiftkv.answering import n_cells

QUESTION = "What does the page say?"
ONE_BY_ONE = "one by one, full cache"
STOCK = "stock llama.cpp, one by one"

Request = Mapping[str, Any]


def pages(options: argparse.Namespace, runtime: Runtime) -> list[Request]:
    """The requests, each about a page that no other has."""
    if not options.images:
        model, n = runtime.engine.model, options.prompt_tokens
        return [{"prompt": f"{first_text(model, n, 101 * i)}\n{QUESTION}"} for i in range(options.requests)]
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


class Stock(Process):
    """A process that answers with the stock library."""

    def __init__(self, options: argparse.Namespace, runtime: Runtime, requests: Sequence[Request]) -> None:
        super().__init__(
            [sys.executable, str(Path(__file__).with_name("stock_answers.py"))], stock_library(options.stock)
        )
        model = runtime.engine.model
        n_prompt = runtime.generate(**requests[0], max_tokens=1).figures.prompt_tokens
        settings = {
            "model": str(options.model),
            "mmproj": options.mmproj and str(options.mmproj),
            "n_ctx": n_prompt + options.tokens + 512,
            "threads": options.threads,
            "tokens": options.tokens,
            "logit_bias": {str(i): -1e9 for i in range(model.n_vocab) if model.ends_generation(i)},
        }
        self.ask(json.dumps(settings))
        self._requests = [self._content(request) for request in requests]

    def __call__(self) -> int:
        return int(self.ask(json.dumps(self._requests)))

    def warm_up(self) -> None:
        """Answer one request."""
        self.ask(json.dumps(self._requests[:1]))

    @staticmethod
    def _content(request: Request) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "text", "text": request["prompt"]}]
        for image in request.get("images", ()):
            file = io.BytesIO()
            image.save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        return content


def measure(options: argparse.Namespace) -> list[Row]:
    """The table."""
    times: dict[str, list[float]] = defaultdict(list)
    written = JsonLines(options.out) if options.out else None
    with (
        Runtime(options.model, options.mmproj, n_threads=options.threads, image_cache=0) as runtime,
        ExitStack() as processes,
    ):
        requests = pages(options, runtime)
        found = ways(options, runtime, requests)
        if options.stock:
            stock = processes.enter_context(Stock(options, runtime, requests))
            stock.warm_up()
            found = {STOCK: stock, **found}
        runtime.generate(**requests[0], max_tokens=1)  # to warm up
        for i in range(options.rounds):
            for name in turned(found, i):
                started = time.perf_counter()
                n_tokens = found[name]()
                times[name].append(time.perf_counter() - started)
                if written:
                    line = {"way": name, "round": i, "requests": len(requests), "tokens": n_tokens}
                    written.add({**line, "seconds": times[name][-1]})
    rows = []
    for name in found:
        row = {"Way": name, "Requests an hour": f"{3600 * len(requests) / float(np.median(times[name])):.0f}"}
        if options.stock:
            row["Over stock"] = ratio(times[STOCK], times[name])
        row["Over one by one"] = ratio(times[ONE_BY_ONE], times[name])
        uncut = f"{name.partition(',')[0]}, uncut"
        row["Over uncut slots"] = ratio(times[uncut], times[name]) if uncut in times else ""
        rows.append(row)
    return rows


def memory(options: argparse.Namespace) -> list[Row]:
    """What the context takes that all answers are written in, uncut and cut to 1/8 and to the budget."""
    rows = []
    with Runtime(options.model, options.mmproj, n_threads=options.threads) as runtime:
        model, n_prompt = runtime.engine.model, options.prompt_tokens
        for n in options.slots:
            taken = []
            for kept in (n_prompt, n_prompt // 8, options.budget):
                before = resident("RssAnon")
                n_ctx = n_cells(model, n_prompt, kept, options.tokens)
                with closing(runtime.engine.context(n_ctx, n, n_outputs=n, n_seq=n)):
                    taken.append((resident("RssAnon") - before) / MIB)
                rows.append({"Slots": n, "Prompt": n_prompt, "Kept": kept, "Room for": options.tokens,
                             "MiB": f"{taken[-1]:.0f}", "Over uncut": f"{taken[-1] / taken[0]:.2f}"})  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description="Measure what answering many requests at once saves.")
    add_model(parser)
    add_options(parser, "--mmproj", "--budget", "--threads", "--rounds", "--stock", budget=128)
    parser.add_argument("--images", type=Path, nargs="+", metavar="PAGE", help="pictures, used by turns")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="of a page of text, without pictures (1024)")
    parser.add_argument("--requests", type=int, default=16, help="how many there are (16)")
    parser.add_argument("--slots", type=int, nargs="+", default=[8], help="answers written at a time (8)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (64)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, one a measurement")
    parser.add_argument("--memory", action="store_true", help="measure what the slots' KV caches take")
    options = parser.parse_args(arguments)
    print(markdown(memory(options) if options.memory else measure(options)))


if __name__ == "__main__":
    main()
