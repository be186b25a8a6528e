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
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from whole_files import write_whole

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


class Library:
    """A process that has the model loaded with one of the libraries."""

    def __init__(self, options: argparse.Namespace, folder: Path | None) -> None:
        environment = dict(os.environ)
        environment.pop("LLAMA_CPP_LIB_PATH", None)
        if folder:
            environment["LLAMA_CPP_LIB_PATH"] = str(folder.absolute())
        command = [sys.executable, __file__, "--serve", "-m", str(options.model), "--threads", str(options.threads)]
        command += ["--gpu-layers", str(options.gpu_layers)]
        command += ["--cpu-time"] if options.cpu_time else []
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._line()

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def seconds(self, n_tokens: int) -> float:
        """What a pass over so many tokens takes, or prefill."""
        assert self._process.stdin
        print(n_tokens, file=self._process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the measuring process ended with status {self._process.wait()}")
        return line


def measure(options: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """The rounds' seconds by library and number of tokens."""
    folders = {"patched": options.library} | ({"stock": options.stock} if options.stock else {})
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in options.tokens} for name in folders}
    with ExitStack() as stack:
        libraries = {name: stack.enter_context(Library(options, folder)) for name, folder in folders.items()}
        for i in range(options.rounds):
            order = list(libraries) if i % 2 == 0 else list(libraries)[::-1]
            for n in options.tokens:
                for name in order:
                    times[name][n].append(libraries[name].seconds(n))
            if options.json:
                text = json.dumps({"model": options.model.name, "seconds": times}, indent=1)
                write_whole(options.json, text + "\n")
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> str:
    """The median and the quartiles of the rounds' ratios."""
    low, middle, high = np.quantile(np.divide(over, under), (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def table(times: dict[str, dict[int, list[float]]]) -> str:
    """Rows by number of tokens: milliseconds, the ratio to a pass over one token, and to the stock library."""
    headings = ["Tokens", *(f"{name}, ms" for name in times)]
    if 1 in next(iter(times.values())):
        headings += [f"{name}, passes over one" for name in times]
    if "stock" in times:
        headings.append("stock / patched")
    lines = [headings, ["---"] * len(headings)]
    for n in next(iter(times.values())):
        line = [str(n), *(f"{1000 * np.median(of[n]):.1f}" for of in times.values())]
        line += [ratio(of[n], of[1]) for of in times.values() if 1 in of]
        if "stock" in times:
            line.append(ratio(times["stock"][n], times["patched"][n]))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description="Measure passes over a few tokens, and prefill.")
    parser.add_argument("-m", "--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--stock", type=Path, metavar="FOLDER", help="the stock library's files")
    parser.add_argument("--library", type=Path, metavar="FOLDER", help="the patched library's files (installed)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[*range(1, 10), 12, 16, PREFILL], help="of a pass")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all)")
    parser.add_argument("--gpu-layers", type=int, default=0, help="layers on the GPU (0)")
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time of one thread, not wall time")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all single measurements there, each round")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not 1 <= min(options.tokens) <= max(options.tokens) <= PREFILL:
        parser.error(f"a pass has 1 to {PREFILL} tokens")
    if options.cpu_time:
        options.threads = 1
    if options.serve:
        clock = time.process_time if options.cpu_time else time.perf_counter
        serve(str(options.model), options.gpu_layers, options.threads, clock)
        return 0
    times = measure(options)
    measured_in = "CPU time" if options.cpu_time else "wall time"
    settings = (
        f"model: {options.model.name}, threads: {options.threads}, clock: {measured_in}, rounds: {options.rounds}"
    )
    print(f"{settings}\n\n{table(times)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
