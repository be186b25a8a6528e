"""Which KV pairs to keep: the answers on what each method keeps, against those on the full cache.

    python scripts/bench_quality.py run --suite demo --cases 100 --out demo.jsonl
    python scripts/bench_quality.py run --suite text -m MODEL --tokens 500 1000 2000 --cases 12 --out text.jsonl
    python scripts/bench_quality.py premise --suite demo --cases 20
    python scripts/bench_quality.py report demo.jsonl text.jsonl --csv quality.csv --plots docs/quality

A prompt is decoded once; every method and budget then selects from the same cache and answers greedily on its own copy
of what is kept. A method is a name, with settings where they are not its defaults: ``paper:gamma=3,observed=0.5``.
``full`` and ``oracle`` are always measured: the oracle ranks by the attention of the queries that the full cache's
answer really asked, the most that a ranking by attention after prefill can know. ``prototype:gamma=3``
is a ranking in numpy, see kv_prototypes.py. A budget is a number of KV pairs, or a share of the prompt such as ``1/8``.
`run` goes on where an output file ends. `premise` measures, layer by layer, how much wider hidden states and queries
spread in the answer than in the prompt. `report` prints Markdown tables: mean score in percent, 95 % interval (Wilson).
Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from intervals import wilson
from kv_methods import configured
from kv_prototypes import Answered, Ranking, oracle, prototype
from quality_tasks import SUITES, Case, cases
from tqdm import tqdm

from edge_shiftkv.engine import Captured, Engine, Prefilled
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context
from edge_shiftkv.native.mtmd import TextChunk
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.selection.methods import Method

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"
METHODS = ("mixed", "paper", "snapkv", "keydiff", "expected-attention", "streamingllm", "random")
BUDGETS = {"demo": "16 32 64 128 1/8 1/2", "text": "64 128 256 1/8 1/4 1/2"}
PROTOTYPE = "prototype:"
BATCH = 64  # of a context that decodes: a second question is more than one token

Row = dict[str, Any]


class Asker:
    """A model that answers in contexts of its caller's."""

    def __init__(self, model: Path, mmproj: Path | None, n_threads: int) -> None:
        self.path = model
        self.engine = Engine(model, mmproj, n_threads=n_threads)

    def close(self) -> None:
        """Free everything."""
        self.engine.close()

    def prompt(self, case: Case) -> Prompt:
        """The tokens of the first question."""
        return self.engine.prompt([Message("user", (*case.images, case.prompt))])

    def second(self, case: Case, first: Prompt) -> list[int]:
        """The tokens that ask the second question after the first one's."""
        messages = [
            Message("user", (*case.images, case.prompt)),
            Message("assistant", (case.first_answer,)),
            Message("user", (case.second_prompt,)),
        ]
        with closing(self.engine.prompt(messages)) as both:
            before, after = first.chunks[-1], both.chunks[-1]
        assert isinstance(before, TextChunk) and isinstance(after, TextChunk)
        assert after.tokens[: len(before.tokens)] == before.tokens
        return list(after.tokens[len(before.tokens) :])

    def read(self, prompt: Prompt, room: int) -> Prefilled:
        """The prompt in a context of its own, to be closed by the caller, with room for more tokens."""
        context = self.engine.context(prompt.n_tokens + room, self.engine.batch(prompt))
        return self.engine.read(prompt, context, n_query=shiftkv.MAX_QUERY)

    def ask(self, context: Context, tokens: Sequence[int], position: int) -> tuple[int, int]:
        """Decode tokens; return the most likely one after them, and its position."""
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            context.decode(part, position)
            position += len(part)
        return int(context.logits().argmax()), position

    def answer(self, context: Context, first: int, position: int, limit: int) -> tuple[str, int]:
        """Go on greedily after the answer's first token; return the text and the number of tokens decoded."""
        model = self.engine.model
        tokens = [first]
        while not model.ends_generation(tokens[-1]) and len(tokens) < limit:
            following, position = self.ask(context, tokens[-1:], position)
            tokens.append(following)
        n_decoded = len(tokens) - 1
        if model.ends_generation(tokens[-1]):
            tokens.pop()
        return b"".join(map(model.piece, tokens)).decode(errors="replace").strip(), n_decoded


def budget_of(text: str, n_prompt: int) -> int:
    """The KV pairs that a budget means for a prompt."""
    return max(2, int(Fraction(text) * n_prompt)) if "/" in text else int(text)


@dataclass(frozen=True)
class Prototyped:
    """A ranking of kv_prototypes.py as a method: it also sees the answer, which was decoded after the prompt."""

    ranking: Ranking
    answered: Answered
    n_query: int = shiftkv.MAX_QUERY

    def scores(self, captured: Captured, budget: int) -> Mapping[int, npt.ArrayLike]:
        """See `ScoringMethod`."""
        return self.ranking(self.answered, budget)


def ask(
    asker: Asker,
    suite: str,
    case: Case,
    methods: dict[str, Method],
    prototypes: dict[str, Ranking],
    budgets: Sequence[str],
) -> Iterator[Row]:
    """All answers to one case."""
    with closing(asker.prompt(case)) as prompt:
        n_prompt = prompt.n_tokens
        second = asker.second(case, prompt) if case.second_prompt else []
        room = case.max_tokens + len(second) + 1
        common = {"suite": suite, "task": case.task, "seed": case.seed, "n_prompt": n_prompt}
        prefilled = asker.read(prompt, room)
        with closing(prefilled.context) as large:
            first = int(large.logits().argmax())

            def answer_in(context: Context, position: int) -> tuple[str, int]:
                token = first
                if second:
                    token, position = asker.ask(context, second, position)
                return asker.answer(context, token, position, case.max_tokens)

            def on_kept(label: str, budget: str, n_budget: int, seconds: float) -> Row:
                with closing(asker.engine.context(n_budget + room, BATCH)) as small:
                    text, _ = answer_in(small, prefilled.hand_over(small))
                row = {"method": label, "budget": budget, "n_budget": n_budget, "select_s": seconds}
                return {**common, **row, "score": case.score(text), "answer": text}

            sizes = [(text, budget_of(text, n_prompt)) for text in budgets]
            sizes = [(text, size) for text, size in sizes if size < n_prompt]
            for label, chosen in methods.items():
                for text, size in sizes:
                    started = time.perf_counter()
                    prefilled.select(chosen, size)
                    yield on_kept(label, text, size, time.perf_counter() - started)
            text, n_decoded = answer_in(large, prefilled.position)
            row = {"method": "full", "budget": "all", "n_budget": n_prompt, "select_s": 0.0}
            yield {**common, **row, "score": case.score(text), "answer": text}
            if not second and n_decoded:
                answered = Answered(large, asker.path, n_prompt, n_decoded)
                for label, ranking in prototypes.items():
                    for text, size in sizes:
                        prefilled.select(Prototyped(ranking, answered), size)
                        yield on_kept(label, text, size, 0.0)


def spread(rows: npt.NDArray[np.float32]) -> float:
    """The standard deviation around each component's mean, over all rows and components."""
    return float(np.sqrt(rows.var(0).mean()))


def premise(args: argparse.Namespace) -> None:
    """Print the spread in the answer over that in the prompt: medians over the answers of 8 tokens or more."""
    ratios: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    with closing(asker_of(args)) as asker:
        for case in tqdm(list(cases(args.suite, args.cases, args.first_seed, args.tokens)), unit="case"):
            with closing(asker.prompt(case)) as prompt, ExitStack() as resources:
                prefilled = asker.read(prompt, case.max_tokens)
                context = prefilled.context
                resources.callback(context.close)
                _, n = asker.answer(context, int(context.logits().argmax()), prefilled.position, case.max_tokens)
                for layer in shiftkv.layers(context) if n >= 8 else ():
                    h, q = shiftkv.hidden(context, layer), shiftkv.queries(context, layer)
                    ratios[layer].append(
                        (
                            float(h[-n:].std() / h[:-n].std()),
                            spread(h[-n:]) / spread(h[:-n]),
                            spread(q[-n:]) / spread(q[:-n]),
                        )
                    )
    n_cases = len(next(iter(ratios.values()), []))
    print(f"Answer over prompt (its last {shiftkv.MAX_QUERY} tokens at most), medians of {n_cases} answers\n")
    print(
        "| layer | hidden, one scalar | hidden, by component | queries, by component |\n| ---: | ---: | ---: | ---: |"
    )
    for layer, rows in ratios.items():
        print(f"| {layer} | " + " | ".join(f"{value:.2f}" for value in np.median(rows, axis=0)) + " |")


def asker_of(args: argparse.Namespace) -> Asker:
    """The model that a suite is asked with."""
    if args.suite.startswith("demo"):
        return Asker(args.model or DEMO / "demo-text-q8_0.gguf", DEMO / "demo-mmproj-f16.gguf", args.threads)
    if not args.model:
        raise SystemExit("a text suite needs a model: -m FILE.gguf")
    return Asker(args.model, None, args.threads)


def run(args: argparse.Namespace) -> None:
    """Ask what was not asked before, and append the answers to the file."""
    kind = "demo" if args.suite.startswith("demo") else "text"
    methods = {text: configured(text) for text in args.methods if not text.startswith(PROTOTYPE)}
    prototypes = {text: prototype(text[len(PROTOTYPE) :]) for text in args.methods if text.startswith(PROTOTYPE)}
    prototypes["oracle"] = oracle
    done = {(row["suite"], row["task"], row["seed"]) for row in read([args.out])} if args.out.exists() else set()
    todo = list(cases(args.suite, args.cases, args.first_seed, args.tokens))
    todo = [case for case in todo if (args.suite, case.task, case.seed) not in done]
    with closing(asker_of(args)) as asker, args.out.open("a") as out:
        for case in tqdm(todo, unit="case"):
            budgets = args.budgets or BUDGETS[kind].split()
            rows = list(ask(asker, args.suite, case, methods, prototypes, budgets))
            out.writelines(json.dumps(row) + "\n" for row in rows)  # whole cases only: a file can be gone on with
            out.flush()


def read(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of result files."""
    for path in paths:
        with path.open() as lines:
            yield from map(json.loads, lines)


@dataclass(frozen=True)
class Mean:
    """A mean score in [0, 1] with its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, scores: Sequence[float]) -> Mean:
        """Wilson's interval; for scores between 0 and 1 it is wider than needed."""
        return cls(len(scores), sum(scores) / len(scores), *wilson(sum(scores), len(scores)))

    def __str__(self) -> str:
        return f"{100 * self.mean:.0f} ({100 * self.low:.0f}-{100 * self.high:.0f})"


def report(args: argparse.Namespace) -> None:
    """Tables by suite and task, a CSV file and plots."""
    groups: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    order: dict[str, float] = {}
    for row in read(args.files):
        tasks = [row["task"]] if row["suite"].endswith("second") else ["all tasks", row["task"]]
        for task in tasks:
            groups[row["suite"], task][row["method"], row["budget"]].append(row["score"])
        order[row["budget"]] = max(order.get(row["budget"], 0), row["n_budget"])
    written: list[list[object]] = []
    for (suite, task), scores in groups.items():
        means = {key: Mean.of(values) for key, values in scores.items()}
        budgets = sorted(
            {budget for _, budget in means if budget != "all"}, key=lambda text: ("/" in text, order[text])
        )
        methods = list(dict.fromkeys(name for name, _ in means if name != "full"))
        full = means["full", "all"]
        print(f"\n**{suite}, {task}**: full cache {full}, n = {full.n}\n")
        print("| method | " + " | ".join(budgets) + " |\n| --- " + "| ---: " * len(budgets) + "|")
        for name in methods:
            print(f"| {name} | " + " | ".join(str(means.get((name, budget), "")) for budget in budgets) + " |")
        written += [[suite, task, *key, m.n, m.mean, m.low, m.high] for key, m in means.items()]
        if args.plots:
            plot(args.plots / f"{suite}-{task.replace(' ', '-')}.png", suite, task, means, methods, budgets)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["suite", "task", "method", "budget", "n", "mean", "low", "high"])
            writer.writerows(written)


def plot(
    path: Path,
    suite: str,
    task: str,
    means: dict[tuple[str, str], Mean],
    methods: Sequence[str],
    budgets: Sequence[str],
) -> None:
    """Score against budget in KV pairs, one line a method, between nothing and the full cache."""
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    numbers = [budget for budget in budgets if "/" not in budget]
    for name in methods:
        points = [(int(budget), means[name, budget]) for budget in numbers if (name, budget) in means]
        style = "k--" if name == "oracle" else "o-"
        axes.plot([x for x, _ in points], [100 * m.mean for _, m in points], style, label=name, markersize=4)
    axes.axhline(100 * means["full", "all"].mean, color="black", linewidth=1, label="full cache")
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(budget) for budget in numbers], numbers)
    axes.set(xlabel="KV pairs per layer and KV head", ylabel="score, %", ylim=(0, 100), title=f"{suite}: {task}")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the KV selection methods on answers.")
    commands = parser.add_subparsers(required=True)
    for name, function, what in (
        ("run", run, "ask, and append the answers to a file"),
        ("premise", premise, "measure how queries and hidden states spread"),
    ):
        command = commands.add_parser(name, help=what)
        command.set_defaults(run=function)
        command.add_argument("--suite", choices=SUITES, required=True)
        command.add_argument("-m", "--model", type=Path, help="default: the shipped model, which has the demo suites")
        command.add_argument("--cases", type=int, default=20, help="of each task (default 20)")
        command.add_argument("--first-seed", type=int, default=0)
        command.add_argument("--tokens", type=int, nargs="+", default=[1000], help="of the texts (default 1000)")
        command.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        if name == "run":
            command.add_argument("--out", type=Path, required=True, help="JSON lines")
            command.add_argument("--methods", nargs="+", default=list(METHODS))
            command.add_argument("--budgets", nargs="+")
    command = commands.add_parser("report", help="tables and plots of result files")
    command.set_defaults(run=report)
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--csv", type=Path)
    command.add_argument("--plots", type=Path, help="folder to write PNG files to")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
