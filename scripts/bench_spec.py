"""Measure speculative decoding with a draft of another vocabulary; prints Markdown tables.

    python scripts/bench_spec.py accept -m TARGET --draft DRAFT    # tokens per target pass, acceptance, time in Python
    python scripts/bench_spec.py speed -m TARGET --draft DRAFT     # tokens per second over those without a draft
    python scripts/bench_spec.py exact -m TARGET --draft DRAFT --rules greedy coupled  # what the target writes alone?
    python scripts/bench_spec.py report --out FILE                 # the tables of what was measured before

Every request is a line of JSON in --out; what is there is not measured again, so a run that was stopped can go on.
Prompts are those of data/spec_prompts.jsonl, as many of every kind. `speed` measures all variants of one prompt one
after the other, beginning with another one each time; `disagree` is a draft of which no token is right. For a target of
a larger one's cost see deepen_gguf.py, and take a file of its own for --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from harness import JsonLines, Row, add_options, markdown, ratio, turned

from edge_shiftkv import Completion, Runtime, answering
from edge_shiftkv.sampling import Floats, Outputs, Sampler
from edge_shiftkv.speculative.draft import Draft
from edge_shiftkv.speculative.length import MOST
from edge_shiftkv.speculative.loop import Drafting, SpeculativeDecoder
from edge_shiftkv.speculative.options import DraftOptions
from edge_shiftkv.speculative.records import Drafted, Proposal
from edge_shiftkv.speculative.rules import SAMPLING_RULES, SamplingRule

SUMMED = ("tokens", "rounds", "drafted", "accepted", "decode_s", "native_s", "draft_s", "align_s", "verify_s")
PROMPTS = Path(__file__).parent / "data" / "spec_prompts.jsonl"
NATIVE = ("llama_decode", "llama_get_logits_ith", "llama_sampler_apply", "llama_tokenize", "llama_token_to_piece")
TIE = 0.05  # logits; passes over one token and over several differ by rounding
SAMPLED: dict[str, Any] = {"temperature": 0.7, "seed": 1}


def prompts(n: int | None) -> list[Row]:
    """The first `n` prompts, one of every kind after the other."""
    kinds = defaultdict(list)
    for line in PROMPTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kinds[row["kind"]].append(row)
    rows = [row for rank in itertools.zip_longest(*kinds.values()) for row in rank if row]
    return rows[:n]


class Results(JsonLines):
    """What was measured, by what it is about."""

    def has(self, **key: Any) -> bool:
        """Whether there is such a row."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)


@contextmanager
def native_clock() -> Iterator[Callable[[], float]]:
    """Count the seconds in calls into llama.cpp while an answer is decoded, after its first token."""
    seconds = 0.0
    decoding = False
    advance = SpeculativeDecoder.advance
    originals = {name: getattr(llama, name) for name in NATIVE}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal seconds
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                seconds += decoding * (time.perf_counter() - started)

        return call

    def counted_advance(decoder: SpeculativeDecoder, token: int) -> int:
        nonlocal decoding
        decoding = True
        try:
            return advance(decoder, token)
        finally:
            decoding = False

    for name, function in originals.items():
        setattr(llama, name, timed(function))
    SpeculativeDecoder.advance = counted_advance  # type: ignore[method-assign, assignment]
    try:
        yield lambda: seconds
    finally:
        SpeculativeDecoder.advance = advance  # type: ignore[method-assign]
        for name, function in originals.items():
            setattr(llama, name, function)


class Wrong(Draft):
    """A draft of which no token is right; it takes as long as one that might be."""

    def propose(self, *arguments: Any) -> Drafted:
        drafted = super().propose(*arguments)
        wrong = [token - 1 if token else 1 for token in drafted.proposal.tokens]
        return dataclasses.replace(drafted, proposal=Proposal(wrong, drafted.proposal.probabilities))


class WrongDrafting(Drafting):
    """Uses it."""

    draft_class = Wrong


class Bench:
    """A target, alone and with any number of drafting variants."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._resources = ExitStack()
        self._runtime = self._resources.enter_context(
            Runtime(arguments.model, n_threads=arguments.threads, n_ctx=2048, n_gpu_layers=arguments.gpu_layers)
        )
        self._variants: dict[Any, Drafting] = {}

    def close(self) -> None:
        """Free everything."""
        self._resources.close()

    def alone(self, prompt: str, **options: Any) -> Completion:
        """The target's own answer."""
        self._runtime.drafting = None
        return self._runtime.generate(prompt, max_tokens=self._arguments.tokens, **options)

    def helped(
        self, prompt: str, n_draft: int | None, rule: SamplingRule | None = None, *, wrong: bool = False, **options: Any
    ) -> Completion:
        """Its answer with a draft; every variant keeps what it learns of its costs."""
        key = (n_draft, rule, wrong)
        if key not in self._variants:
            kind = WrongDrafting if wrong else Drafting
            self._variants[key] = kind(Path(self._arguments.draft), self._runtime.engine, DraftOptions(n_draft, rule))
            self._resources.callback(self._variants[key].close)
        self._runtime.drafting = self._variants[key]
        return self._runtime.generate(prompt, max_tokens=self._arguments.tokens, **options)


def accept(arguments: argparse.Namespace, results: Results) -> None:
    """Tokens per target pass and acceptance by rule and draft length."""
    bench = Bench(arguments)
    for row in prompts(arguments.prompts):
        for rule in arguments.rules:
            for n_draft in arguments.lengths:
                key = {"measured": "accept", "rule": rule, "n_draft": n_draft, "prompt": row["prompt"]}
                if results.has(**key):
                    continue
                options: dict[str, Any] = {} if rule == "greedy" else SAMPLED
                with native_clock() as native_s:
                    figures = bench.helped(
                        row["prompt"], n_draft, rule if rule in SAMPLING_RULES else None, **options
                    ).figures
                    native = native_s()
                assert figures.draft
                measured = {"kind": row["kind"], "tokens": figures.generated_tokens, "decode_s": figures.decode_s}
                results.add({**key, **measured, "native_s": native, **dataclasses.asdict(figures.draft)})
    bench.close()


def speed(arguments: argparse.Namespace, results: Results) -> None:
    """Tokens per second of all variants, prompt by prompt."""
    bench = Bench(arguments)
    variants: dict[str, Callable[[str], Completion]] = {
        "alone": bench.alone,
        "planned": lambda prompt: bench.helped(prompt, None),
        "planned, disagree": lambda prompt: bench.helped(prompt, None, wrong=True),
        **{f"{n} tokens": partial(bench.helped, n_draft=n) for n in arguments.lengths},
    }
    for variant in variants.values():  # reads the weights from disk and measures costs
        variant("Hello.")
    for i, row in enumerate(prompts(arguments.prompts)):
        for name in turned(variants, i):
            key = {"measured": "speed", "variant": name, "prompt": row["prompt"]}
            if results.has(**key):
                continue
            figures = variants[name](row["prompt"]).figures
            measured = {"kind": row["kind"], "tokens": figures.generated_tokens, "decode_s": figures.decode_s}
            results.add({**key, **measured, "draft": figures.draft and dataclasses.asdict(figures.draft)})
    bench.close()


def exact(arguments: argparse.Namespace, results: Results) -> None:
    """Answers with a draft, token for token, against those without: greedily, and at a temperature with one seed."""
    recorded: list[tuple[int, float]] = []

    class Recorder(Sampler):
        def sample(self, outputs: Outputs, output: int = -1) -> int:
            scores: Floats = outputs.logits(output).astype(np.float64)
            if self.sampling.temperature > 0:
                choices = self.choices(outputs.logits(output))
                scores = choices.scores + self.noise.gumbel(self.n_drawn, choices.tokens)
            second, first = np.partition(np.append(scores, -np.inf), -2)[-2:]
            token = super().sample(outputs, output)
            recorded.append((token, float(first - second)))
            return token

    answering.Sampler = Recorder  # type: ignore[attr-defined]
    bench = Bench(arguments)
    for row, rule in itertools.product(prompts(arguments.prompts), arguments.rules):
        options: dict[str, Any] = {} if rule == "greedy" else SAMPLED
        expected = None
        for n_draft in (*arguments.lengths, None):
            key = {"measured": "exact", "rule": rule, "n_draft": n_draft, "prompt": row["prompt"]}
            if results.has(**key):
                continue
            if expected is None:
                recorded.clear()
                bench.alone(row["prompt"], **options)
                expected = recorded.copy()
            recorded.clear()
            figures = bench.helped(row["prompt"], n_draft, rule if rule in SAMPLING_RULES else None, **options).figures
            differing = (i for i, (a, b) in enumerate(zip(expected, recorded, strict=False)) if a[0] != b[0])
            first = next(differing, None)
            gap = None if first is None else expected[first][1]
            accepted = figures.draft and figures.draft.accepted
            results.add({**key, "tokens": len(expected), "accepted": accepted, "differs_at": first, "gap": gap})
    bench.close()


def rate(rows: list[Row]) -> float:
    """Tokens per second of several answers, after their first ones."""
    return float(sum(row["tokens"] - 1 for row in rows) / sum(row["decode_s"] for row in rows))


def report(results: Results) -> None:
    """Print the tables."""
    by_what: dict[str, list[Row]] = defaultdict(list)
    for row in results.rows:
        by_what[row["measured"]].append(row)
    if by_what["accept"]:
        print(f"{accept_table(by_what['accept'])}\n")
    if greedy := [row for row in by_what["accept"] if row["rule"] == "greedy"]:
        print(f"{kinds_table(greedy)}\n")
    if rows := [row for row in by_what["speed"] if row["tokens"] > 1]:
        print("\n\n".join(speed_tables(rows)))
    for rule in dict.fromkeys(row["rule"] for row in by_what["exact"]):
        print(f"\nExact, {rule}: {exact_line([row for row in by_what['exact'] if row['rule'] == rule])}")


def accept_table(rows: list[Row]) -> str:
    """By rule and draft length: what is accepted, and what share of decoding is not spent in llama.cpp."""
    lines: list[Row] = []
    for rule, n_draft in sorted({(row["rule"], row["n_draft"]) for row in rows}):
        some = [row for row in rows if (row["rule"], row["n_draft"]) == (rule, n_draft)]
        total = {name: sum(row[name] for row in some) for name in SUMMED}
        shares = ", ".join(f"{total[name] / total['decode_s']:.1%}" for name in ("draft_s", "align_s", "verify_s"))
        lines.append(
            {
                "Rule": rule,
                "Draft tokens": n_draft,
                "Tokens per pass": f"{(total['rounds'] + total['accepted']) / total['rounds']:.2f}",
                "Accepted": f"{total['accepted'] / max(1, total['drafted']):.1%}",
                "Draft, align, verify": shares,
                "Align, a round": f"{1e6 * total['align_s'] / total['rounds']:.0f} µs",
                "In Python": f"{1 - total['native_s'] / total['decode_s']:.1%}",
            }
        )
    return markdown(lines)


def kinds_table(rows: list[Row]) -> str:
    """Tokens per pass by kind of prompt and draft length."""
    lines: list[Row] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = []
        for n_draft in sorted({row["n_draft"] for row in rows}):
            some = [row for row in rows if (row["kind"], row["n_draft"]) == (kind, n_draft)]
            rounds = sum(row["rounds"] for row in some)
            cells.append(f"{n_draft}: {1 + sum(row['accepted'] for row in some) / max(1, rounds):.2f}")
        lines.append({"Kind of prompt": kind, "Tokens per pass, by draft tokens, greedy": ", ".join(cells)})
    return markdown(lines)


def speed_tables(rows: list[Row]) -> tuple[str, str]:
    """Tokens per second of each variant over those alone: of all prompts, and by their kinds."""
    by_variant: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_variant[row["variant"]][row["prompt"]] = row
    lines: list[Row] = []
    by_kind: list[Row] = []
    for name, measured in by_variant.items():
        both = [prompt for prompt in measured if prompt in by_variant["alone"]]
        here, alone = [measured[prompt] for prompt in both], [by_variant["alone"][prompt] for prompt in both]
        lines.append(
            {
                "Draft": name,
                "Prompts": len(both),
                "Tokens/s": f"{rate(here):.2f}",
                "Over those alone, all tokens": f"{rate(here) / rate(alone):.3f}",
                "Per prompt: median (quartiles)": ratio([rate([row]) for row in here], [rate([row]) for row in alone]),
            }
        )
        cells: Row = {"Over alone, by kind of prompt": name}
        for kind in dict.fromkeys(row["kind"] for row in rows):
            places = [i for i, row in enumerate(here) if row["kind"] == kind]
            over = rate([here[i] for i in places]) / rate([alone[i] for i in places]) if places else None
            cells[kind] = "" if over is None else f"{over:.3f}"
        by_kind.append(cells)
    return markdown(lines), markdown(by_kind)


def exact_line(rows: list[Row]) -> str:
    """How many answers are others, and whether rounding explains it."""
    flips = [row for row in rows if row["differs_at"] is not None]
    ties = [row for row in flips if row["gap"] < TIE]
    gaps = ", ".join(f"{row['gap']:.4f}" for row in flips) or "none"
    return (
        f"{len(rows)} answers, {sum(row['tokens'] for row in rows)} tokens, "
        f"{sum(row['accepted'] for row in rows)} of them drafted; {len(flips)} differ, "
        f"{len(ties)} of them where the two best tokens are less than {TIE} apart (gaps: {gaps})"
    )


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accept", "speed", "exact", "report"])
    parser.add_argument("-m", "--model", metavar="GGUF", help="the target")
    parser.add_argument("--draft", metavar="GGUF", help="the draft")
    parser.add_argument(
        "--out", type=Path, default=Path("bench_spec.jsonl"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--prompts", type=int, metavar="N", help="how many (default: all)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each answer (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(range(1, MOST + 1)), metavar="N", help="drafted")
    parser.add_argument("--rules", nargs="+", default=["greedy", *SAMPLING_RULES], metavar="RULE")
    add_options(parser, "--threads", "--gpu-layers")
    arguments = parser.parse_args()
    if arguments.what == "report" and not arguments.out.is_file():
        parser.error(f"{arguments.out} is no file")
    results = Results(arguments.out)
    if arguments.what != "report":
        if not arguments.model or not arguments.draft:
            parser.error("a target (-m) and a draft (--draft) are needed")
        {"accept": accept, "speed": speed, "exact": exact}[arguments.what](arguments, results)
    report(results)


if __name__ == "__main__":
    main()
