"""Measure what cutting the KV cache costs and saves; prints Markdown tables.

    python scripts/bench_kv.py selection -m MODEL    # each method's share of prefill time, and what capturing costs
    python scripts/bench_kv.py decode                # decode time against prompt length: full cache and cut cache
    python scripts/bench_kv.py types -m MODEL        # what smaller KV types cost: prefill and decode time
    python scripts/bench_kv.py memory                # the peak of a process: full cache, cut, and cut and read by layer

Contexts are made, filled, cut and freed as `edge_shiftkv.Runtime` does it. What is compared is measured alternately in
one run: figures are medians over rounds, ratios are medians of the rounds' ratios with their quartiles. The prompts are
Python source. A method is a name, with settings where they are not its defaults: ``paper:n_proxy=128``; `decode` and
`memory` take the default one. Without -m, they use a model with random weights and the shape of LLaVA-7B's layers,
kept in the build's cache directory. On a machine that is not idle, --cpu-time measures what one thread takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import (
    MIB,
    ROUNDS,
    Row,
    add_options,
    clock_name,
    first_text,
    first_tokens,
    markdown,
    parsed,
    ratio,
    resident,
    synthetic_model,
    turned,
    write_json,
)
from kv_methods import configured, kv_types

from edge_shiftkv import Runtime
from edge_shiftkv.budget import budget_for, read_budget
from edge_shiftkv.engine import Engine, Prefilled
from edge_shiftkv.engine.prefilled import BATCH
from edge_shiftkv.native.llama import Context
from edge_shiftkv.selection.methods import DEFAULT_METHOD, METHODS, Method, method

REFERENCE_TOKENS = 256
BLOCK = 8  # tokens decoded in a context before it is the next one's turn
ROOM = 64  # for the answer, in a context that decodes
NEXT = 64  # tokens after a prompt that types are compared by


class Bench:
    """A model, a prompt for it of any length, and a clock that counts seconds."""

    def __init__(
        self,
        path: Path,
        n_threads: int,
        clock: Callable[[], float] = time.perf_counter,
        n_gpu_layers: int = 0,
        kv_types: tuple[str, str] = ("f16", "f16"),
    ) -> None:
        self.clock = clock
        type_k, type_v = kv_types
        self._engine = Engine(path, n_gpu_layers=n_gpu_layers, n_threads=n_threads, type_k=type_k, type_v=type_v)

    def close(self) -> None:
        """Free the weights."""
        self._engine.close()

    def prompt(self, n_tokens: int) -> list[int]:
        """The first tokens of a text that repeats itself."""
        return first_tokens(self._engine.model, n_tokens)

    def n_pairs(self, budget: str, n_tokens: int) -> int:
        """The KV pairs per layer and KV head that a budget means for a prompt."""
        return budget_for(read_budget(budget), n_tokens, self._engine) or n_tokens

    @contextmanager
    def reading(self, n_ctx: int, n_query: int = 0) -> Iterator[Prefilled]:
        """A prompt of which nothing is read, in a context that is freed at the end."""
        with closing(self._engine.context(n_ctx)) as context:
            yield Prefilled(context, n_query=n_query)

    @contextmanager
    def handed_over(self, source: Prefilled, n_kept: int) -> Iterator[Context]:
        """A context to decode in, with the pairs that were selected last."""
        with closing(self._engine.context(n_kept + ROOM, 1)) as context:
            source.hand_over(context)
            yield context

    def seconds(self, function: Callable[..., object], *arguments: Any) -> float:
        """The time that a call takes."""
        started = self.clock()
        function(*arguments)
        return self.clock() - started


def read(prefilled: Prefilled, tokens: Sequence[int]) -> None:
    """Read tokens, and wait for their logits."""
    prefilled.read_tokens(tokens)
    prefilled.context.logits()


def measure_selection(
    bench: Bench, n_prompt: int, budget: int, methods: dict[str, Method], rounds: int
) -> tuple[list[float], list[float], dict[str, list[float]], dict[str, list[float]]]:
    """Return the rounds' seconds: prefill without and with capture, then by method selection and hand-over."""
    tokens = bench.prompt(n_prompt)
    plain: list[float] = []
    captured: list[float] = []
    select: dict[str, list[float]] = {name: [] for name in methods}
    hand_over: dict[str, list[float]] = {name: [] for name in methods}

    def without_capture() -> None:
        with bench.reading(n_prompt) as prefilled:
            plain.append(bench.seconds(read, prefilled, tokens))

    def with_capture() -> None:
        with bench.reading(n_prompt, max(chosen.n_query for chosen in methods.values())) as prefilled:
            captured.append(bench.seconds(read, prefilled, tokens))
            for name, chosen in methods.items():
                select[name].append(bench.seconds(prefilled.select, chosen, budget))
                started = bench.clock()
                with bench.handed_over(prefilled, budget):
                    hand_over[name].append(bench.clock() - started)

    for i in range(rounds):
        for step in turned((without_capture, with_capture), i):
            step()
    return plain, captured, select, hand_over


def selection(options: argparse.Namespace) -> Iterator[Row]:
    """Each method's share of prefill time."""
    methods = {text: configured(text) for text in options.methods}
    with closing(Bench(options.model, options.threads, options.clock, options.gpu_layers)) as bench:
        measure_selection(bench, min(2 * BATCH, *options.tokens), options.budget, methods, 1)  # warm-up
        for n_prompt in sorted(options.tokens):
            plain, captured, select, hand_over = measure_selection(
                bench, n_prompt, options.budget, methods, options.rounds
            )
            capture = ratio(captured, plain)
            for name in methods:
                both = [sum(pair) for pair in zip(select[name], hand_over[name], strict=True)]
                yield {
                    "Prompt tokens": n_prompt,
                    "Method": name,
                    "Prefill, s": f"{np.median(plain):.2f}",
                    "Prefill with / without capture": capture,
                    "Selection, s": f"{np.median(select[name]):.3f}",
                    "Hand-over, s": f"{np.median(hand_over[name]):.3f}",
                    "Both / prefill": ratio(both, plain, ".1%"),
                    ROUNDS: {
                        "prefill": plain,
                        "prefill with capture": captured,
                        "selection": select[name],
                        "hand-over": hand_over[name],
                    },
                }


def decode_block(context: Context, position: int, token: int, n_tokens: int) -> None:
    """Decode tokens from `position` on, waiting for the logits of each."""
    for i in range(n_tokens):
        context.decode([token], position + i)
        context.logits()


def measure_decode(
    bench: Bench, contexts: dict[str, tuple[Context, int]], token: int, rounds: int
) -> dict[str, list[float]]:
    """Return the milliseconds per token in each context, by round. The contexts are left as they were.

    contexts: name -> a context, and the position that decoding goes on at in it.
    """
    result: dict[str, list[float]] = {name: [] for name in contexts}
    for i in range(-1, rounds):  # the first one to warm up
        for name in turned(contexts, i):
            context, position = contexts[name]
            milliseconds = 1e3 * bench.seconds(decode_block, context, position, token, BLOCK) / BLOCK
            context.remove(position)
            if i >= 0:
                result[name].append(milliseconds)
    return result


def decode(options: argparse.Namespace) -> Iterator[Row]:
    """Decode time per token against prompt length."""
    lengths = sorted(options.tokens)
    chosen = method(DEFAULT_METHOD)
    path = options.model or synthetic_model(options.layers)
    with (
        closing(Bench(path, options.threads, options.clock, options.gpu_layers)) as bench,
        bench.reading(lengths[-1], chosen.n_query) as prefilled,
    ):
        tokens = bench.prompt(lengths[-1])
        read(prefilled, tokens[:REFERENCE_TOKENS])
        prefilled.select(chosen, REFERENCE_TOKENS)  # keeps all
        with bench.handed_over(prefilled, REFERENCE_TOKENS) as reference:
            for n_prompt in lengths:
                read(prefilled, tokens[prefilled.n_tokens : n_prompt])
                prefilled.select(chosen, n_prompt)
                with bench.handed_over(prefilled, n_prompt) as full:
                    prefilled.select(chosen, options.budget)
                    with bench.handed_over(prefilled, options.budget) as cut:
                        contexts = {
                            "full": (full, n_prompt),
                            "cut": (cut, n_prompt),
                            "short": (reference, REFERENCE_TOKENS),
                        }
                        times = measure_decode(bench, contexts, tokens[0], options.rounds)
                yield {
                    "Prompt tokens": n_prompt,
                    "Full cache, ms": f"{np.median(times['full']):.2f}",
                    f"Budget {options.budget}, ms": f"{np.median(times['cut']):.2f}",
                    f"{REFERENCE_TOKENS}-token prompt, ms": f"{np.median(times['short']):.2f}",
                    "Full / cut": ratio(times["full"], times["cut"]),
                    f"Cut / {REFERENCE_TOKENS}-token prompt": ratio(times["cut"], times["short"]),
                    ROUNDS: times,
                }


def types(options: argparse.Namespace) -> Iterator[Row]:
    """What KV types cost: prefill, decoding on whole caches and on the same bytes of each, and what is then expected.

    The next `NEXT` tokens of the text are looked up on the whole caches: how often is the likeliest token the first
    type's, and how far are the probabilities from its (Kullback-Leibler divergence).
    """
    chosen = method(DEFAULT_METHOD)
    with ExitStack() as stack:
        benches = {
            text: stack.enter_context(
                closing(Bench(options.model, options.threads, options.clock, options.gpu_layers, kv_types(text)))
            )
            for text in options.types
        }
        for n_prompt in sorted(options.tokens):
            expected = {text: expectation(bench, n_prompt, chosen) for text, bench in benches.items()}
            times: dict[str, dict[str, list[float]]] = {text: defaultdict(list) for text in benches}
            for i in range(options.rounds):
                for text in turned(options.types, i):
                    for name, value in measure_type(benches[text], n_prompt, chosen, options.share).items():
                        times[text][name].append(value)
            first, reference = times[options.types[0]], expected[options.types[0]]
            for text, of in times.items():
                apart = (np.exp(reference) * (reference - expected[text])).sum(-1)
                same = (reference.argmax(-1) == expected[text].argmax(-1)).mean()
                yield {
                    "Prompt tokens": n_prompt,
                    "Types": text,
                    **{name: f"{np.median(values):.2f}" for name, values in of.items()},
                    **{f"{name.partition(',')[0]} / {options.types[0]}": ratio(of[name], first[name]) for name in of},
                    "Same token": f"{same:.1%}",
                    "KL, nats": f"{apart.mean():.4f}",
                    ROUNDS: of,
                }


def expectation(bench: Bench, n_prompt: int, chosen: Method) -> npt.NDArray[np.float32]:
    """The logarithms of the probabilities of the tokens after a prompt, [NEXT, n_vocab], given the true ones before."""
    tokens = bench.prompt(n_prompt + NEXT)
    with bench.reading(n_prompt, chosen.n_query) as prefilled:
        read(prefilled, tokens[:n_prompt])
        prefilled.select(chosen, n_prompt)  # keeps all
        with bench.handed_over(prefilled, n_prompt) as context:
            rows = []
            for i, token in enumerate(tokens[n_prompt:]):
                context.decode([token], n_prompt + i)
                rows.append(context.logits().astype(np.float32))
    logits = np.stack(rows)
    logits -= logits.max(-1, keepdims=True)
    result: npt.NDArray[np.float32] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return result


def measure_type(bench: Bench, n_prompt: int, chosen: Method, share: str) -> dict[str, float]:
    """Seconds of prefill and selection, milliseconds a token on the whole cache and on a share of its bytes."""
    tokens, result = bench.prompt(n_prompt), {}
    with bench.reading(n_prompt, chosen.n_query) as prefilled:
        result["Prefill, s"] = bench.seconds(read, prefilled, tokens)
        prefilled.select(chosen, n_prompt)
        with bench.handed_over(prefilled, n_prompt) as full:
            n_pairs = bench.n_pairs(share, n_prompt)
            result["Selection, s"] = bench.seconds(prefilled.select, chosen, n_pairs)
            with bench.handed_over(prefilled, n_pairs) as cut:
                contexts = {"Whole, ms": (full, n_prompt), f"{share} of the bytes, ms": (cut, n_prompt)}
                result |= {name: of[0] for name, of in measure_decode(bench, contexts, tokens[0], 1).items()}
    return result


WAYS: dict[str, dict[str, Any]] = {
    "uncut": {},
    "cut, read by layer": {"prefill": "by-layer"},
    "cut": {"prefill": "by-batch"},
}
"""How a prompt is read: the settings of a runtime, which has a budget where there are any."""


def memory(options: argparse.Namespace) -> Iterator[Row]:
    """The peak of a process that reads a prompt and answers, and the time that it takes to the first token."""
    path = options.model or synthetic_model(options.layers)
    for n_prompt in sorted(options.tokens):
        peaks: dict[str, list[float]] = {way: [] for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for i in range(options.rounds):
            for way in turned(WAYS, i):
                settings = {**WAYS[way], "kv_budget": options.budget} if WAYS[way] else {}
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    peak, taken = pool.submit(
                        measure_memory, path, n_prompt, options.threads, options.clock, settings
                    ).result()
                print(f"{n_prompt} tokens, {way}: {peak / MIB:.0f} MiB, {taken:.1f} s", file=sys.stderr, flush=True)
                peaks[way].append(peak)
                seconds[way].append(taken)
        for way in WAYS:
            yield {
                "Prompt tokens": n_prompt,
                "Cache": way,
                "Peak, MiB": f"{np.median(peaks[way]) / MIB:.0f}",
                "Peak / uncut": f"{np.median(np.divide(peaks[way], peaks['uncut'])):.3f}",
                "First token, s": f"{np.median(seconds[way]):.2f}",
                "First token / cut": ratio(seconds[way], seconds["cut"]),
                ROUNDS: {"peak": peaks[way], "seconds": seconds[way]},
            }


def measure_memory(
    path: Path, n_prompt: int, n_threads: int, clock: Callable[[], float], settings: dict[str, Any]
) -> tuple[int, float]:
    """Return the peak in bytes, and the seconds to the first token; to be run in a process of its own."""
    n_ctx = n_prompt + 2 * ROOM  # a text that is tokenized again may have some tokens more
    with Runtime(path, n_gpu_layers=0, n_threads=n_threads, n_ctx=n_ctx, **settings) as runtime:
        text = first_text(runtime.engine.model, n_prompt)
        started = clock()
        with closing(runtime.stream(text, raw=True, max_tokens=ROOM // 4)) as stream:
            next(stream)
            seconds = clock() - started
            for _ in stream:
                pass
    return resident("VmHWM"), seconds


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what cutting the KV cache costs and saves.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        function: Callable[[argparse.Namespace], Iterator[Row]], tokens: Sequence[int], rounds: int, **model: Any
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("-m", "--model", type=Path, metavar="GGUF", **model)
        command.add_argument("--tokens", type=int, nargs="+", default=tokens, help="of the prompts")
        add_options(command, "--budget", "--threads", "--cpu-time", "--rounds", "--json", rounds=rounds)
        command.set_defaults(function=function)
        return command

    command = add(selection, [1024, 2048, 4096], 3, required=True, help="a language model")
    command.add_argument("--methods", nargs="+", default=list(METHODS))
    add_options(command, "--gpu-layers")

    command = add(decode, [512, 1024, 2048, 4096, 8192, 16384], 15, help="a language model (random weights)")
    command.add_argument("--layers", type=int, default=2, help="of the model with random weights (2)")
    add_options(command, "--gpu-layers")

    command = add(types, [1024, 4096], 3, required=True, help="a language model")
    command.add_argument("--types", nargs="+", default=["f16", "q8_0", "q8_0/q4_0"], help="the first to compare with")
    command.add_argument("--share", default="1/8", help="of the bytes in f16 that is kept (1/8)")
    add_options(command, "--gpu-layers")

    command = add(memory, [8192, 16384, 32000], 1, help="a language model (random weights)")
    command.add_argument("--layers", type=int, default=8, help="of the model with random weights (8)")

    options = parsed(parser, arguments)
    lengths = options.tokens
    if not 2 <= options.budget < min(lengths):
        parser.error("the budget has to be 2 or more, and below the prompts' lengths")
    if options.command == "decode" and min(lengths) <= REFERENCE_TOKENS:
        parser.error(f"prompts are compared with one of {REFERENCE_TOKENS} tokens: they have to be longer")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print what came out."""
    options = parse(arguments)
    model = options.model.name if options.model else f"random weights, {options.layers} layers of LLaVA-7B's shape"
    settings = {"model": model, "threads": options.threads, "clock": clock_name(options), "budget": options.budget}
    rows: list[Row] = []
    for row in options.function(options):
        rows.append(row)
        if options.json:
            write_json(options.json, {"command": options.command, **settings, "rows": rows})
    print(f"{', '.join(f'{name}: {value}' for name, value in settings.items())}\n\n{markdown(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
