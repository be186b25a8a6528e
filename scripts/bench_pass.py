"""Measure what a pass over a few tokens costs, and prefill, with the patched library and the stock one; prints a table.

    edge-shiftkv build --stock --no-install --wheel-dir stock && unzip -j stock/*.whl 'llama_cpp/lib/*' -d stock
    python scripts/bench_pass.py -m MODEL --stock stock

Two processes, one for each library, have the model loaded and take turns: in each round every number of tokens is
measured with one and then with the other, in the next round the other way round. A pass gives the logits of all its
tokens, as checking a draft does. Times are medians over rounds, ratios are medians of the rounds' ratios with their
quartiles. Without --stock, only the installed library is measured. On a machine that is not idle, --cpu-time measures
what one thread takes.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from harness import (
    Process,
    Row,
    add_model,
    add_options,
    clock_name,
    markdown,
    parsed,
    ratio,
    stock_library,
    turned,
    write_json,
)

PREFILL = 512
DEPTH = 64  # tokens in the KV cache that a pass is added to


def serve(model: str, n_gpu_layers: int, n_threads: int, clock: Callable[[], float]) -> None:
    """Measure passes over as many tokens as each line of stdin says; answer with the seconds."""
    import llama_cpp as llama

    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p())
    model_settings = llama.llama_model_default_params()
    model_settings.n_gpu_layers = n_gpu_layers
    weights = llama.llama_model_load_from_file(model.encode(), model_settings)
    if not weights:
        sys.exit(f"{model} does not load")
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = PREFILL
    settings.n_threads = settings.n_threads_batch = n_threads
    context = llama.llama_init_from_model(weights, settings)
    memory = llama.llama_get_memory(context)
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(weights))
    batch = llama.llama_batch_init(PREFILL, 0, 1)

    def read(first: int, n: int, n_logits: int) -> float:
        """The seconds that a pass over n tokens takes."""
        for i in range(n):
            batch.token[i] = (first + i) * 7919 % n_vocab
            batch.pos[i] = first + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= n - n_logits
        batch.n_tokens = n
        started = clock()
        if llama.llama_decode(context, batch):
            sys.exit("llama_decode failed")
        llama.llama_get_logits(context)  # waits for them
        return clock() - started

    print("ready", flush=True)
    for line in sys.stdin:
        n = int(line)
        llama.llama_memory_clear(memory, True)
        if n < PREFILL:
            read(0, DEPTH, 1)
            read(DEPTH, n, n)  # wakes the threads, and has the graph of this size built
            llama.llama_memory_seq_rm(memory, 0, DEPTH, -1)
        print(read(DEPTH, n, n) if n < PREFILL else read(0, n, 1), flush=True)


class Library(Process):
    """A process that has the model loaded with one of the libraries."""

    def __init__(self, options: argparse.Namespace, folder: Path | None) -> None:
        command = [sys.executable, __file__, "--serve", "-m", str(options.model), "--threads", str(options.threads)]
        command += ["--gpu-layers", str(options.gpu_layers)]
        command += ["--cpu-time"] if options.clock is time.process_time else []
        super().__init__(command, folder)
        self.read()

    def seconds(self, n_tokens: int) -> float:
        """What a pass over so many tokens takes, or prefill."""
        return float(self.ask(str(n_tokens)))


def measure(options: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """The rounds' seconds by library and number of tokens."""
    folders = {"patched": options.library} | ({"stock": stock_library(options.stock)} if options.stock else {})
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in options.tokens} for name in folders}
    with ExitStack() as stack:
        libraries = {name: stack.enter_context(Library(options, folder)) for name, folder in folders.items()}
        for i in range(options.rounds):
            for n in options.tokens:
                for name in turned(libraries, i):
                    times[name][n].append(libraries[name].seconds(n))
                if options.json:
                    write_json(options.json, {"model": options.model.name, "seconds": times})
    return times


def table(times: dict[str, dict[int, list[float]]]) -> str:
    """Rows by number of tokens: milliseconds, the ratio to a pass over one token, and to the stock library."""
    rows: list[Row] = []
    for n in next(iter(times.values())):
        if not all(of[n] for of in times.values()):  # stopped before
            continue
        n_rounds = min(len(of[n]) for of in times.values())  # the last one may have been cut off
        seconds = {name: of[n][:n_rounds] for name, of in times.items()}
        row: Row = {"Tokens": n, **{f"{name}, ms": f"{1000 * np.median(of):.1f}" for name, of in seconds.items()}}
        over_one = {
            name: ratio(of, times[name][1][:n_rounds], ".2f") for name, of in seconds.items() if 1 in times[name]
        }
        row |= {f"{name}, passes over one": text for name, text in over_one.items()}
        if "stock" in times:
            row["stock / patched"] = ratio(seconds["stock"], seconds["patched"], ".2f")
        rows.append(row)
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description="Measure passes over a few tokens, and prefill.")
    add_model(parser)
    parser.add_argument("--library", type=Path, metavar="FOLDER", help="the patched library's files (installed)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[*range(1, 10), 12, 16, PREFILL], help="of a pass")
    add_options(parser, "--stock", "--threads", "--gpu-layers", "--cpu-time", "--rounds", "--json", rounds=9)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parsed(parser, arguments)
    if not 1 <= min(options.tokens) <= max(options.tokens) <= PREFILL:
        parser.error(f"a pass has 1 to {PREFILL} tokens")
    if options.serve:
        serve(str(options.model), options.gpu_layers, options.threads, options.clock)
        return 0
    times = measure(options)
    settings = f"model: {options.model.name}, threads: {options.threads}, clock: {clock_name(options)}"
    print(f"{settings}, rounds: {options.rounds}\n\n{table(times)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
