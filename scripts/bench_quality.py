"""Which KV pairs to keep: the answers on what each method keeps, against those on the full cache.

    python scripts/bench_quality.py run --suite demo --cases 100 --out demo.jsonl
    python scripts/bench_quality.py run --suite text -m MODEL --tokens 500 1000 2000 --cases 12 --out text.jsonl
    python scripts/bench_quality.py run --suite pages -m MODEL --cases 60 --kv-types f16 q8_0/q4_0 --out pages.jsonl
    python scripts/bench_quality.py premise --suite demo --cases 20
    python scripts/bench_quality.py report demo.jsonl text.jsonl --csv quality.csv --plots docs/quality

A prompt is decoded once; every method and budget then selects from the same cache and answers greedily on its own copy
of what is kept, several of them at a time. A method is a name, with settings where they are not its defaults:
``paper:gamma=3,observed=0.5``. ``full`` is always measured. ``oracle`` ranks by the attention of the queries that the
full cache's answer really asked, the most that a ranking by attention after prefill can know. ``prototype:gamma=3`` is
a ranking in numpy, see kv_prototypes.py; it and the oracle are measured in f16 only. ``asked`` ranks by what some
questions in general attend to, for prompts that are cut before there is a question. ``paper+refit:ridge=1`` refits the
values of what ``paper`` keeps, in f16 only, see kv_refit.py. A budget is a number of KV pairs,
a share of the prompt such as ``1/8``, or a share of the bytes that the whole prompt has in f16, such as ``1/8B``, which
is more pairs of a smaller KV type; with ``--budgets all`` only full caches are measured. The pages suites take any
language model: the page reader is fitted to it, unless --mmproj names one. `run` writes each answer as it comes and
goes on where an output file ends, so that it may be ended at any time. `premise` measures, layer by layer, how much
wider hidden states and queries spread in the answer than in the prompt. `report` prints Markdown tables: mean score in
percent, 95 % interval (Wilson), and plots the score against pairs and against bytes.
Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from harness import JsonLines, Row, add_options, markdown
from kv_methods import configured, kv_types
from kv_prototypes import Answered, Ranking, asked, oracle, prototype
from kv_refit import MARK, Refit, Whole
from PIL.Image import Image
from quality_report import report
from quality_tasks import PAGE_CELLS, SUITES, Case, cases
from tqdm import tqdm

from edge_shiftkv.engine import Captured, Engine, Prefilled
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context
from edge_shiftkv.native.mtmd import TextChunk
from edge_shiftkv.page_reader import write_mmproj
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.selection.methods import METHODS, Method

DEMO = Path(__file__).resolve().parent.parent / "models" / "demo"
BUDGETS = {
    "demo": "16 32 64 128 1/8 1/2",
    "text": "64 128 256 1/8 1/4 1/2",
    "pages": "64 128 256 512 1/16B 1/8B 1/4B 1/2B",
}
PROTOTYPE = "prototype:"
ASKED = (
    "Copy the whole page, line by line.",
    "List every value with its label.",
    "Which names and numbers are on this page?",
    "What is this page about?",
)
BATCH = 64  # of a context that decodes: a second question is more than one token
N_PARALLEL = 8  # answers written at a time

Variant = tuple[str, str, int, Callable[[], object]]
"""A method, its budget as text and in KV pairs, and what selects them."""


@dataclass
class Answer:
    """An answer in a sequence of a context.

    position: of its last token, which is not decoded yet.
    """

    tokens: list[int]
    position: int
    sequence: int = 0

    def push(self, context: Context, output: int = -1) -> None:
        """Add the most likely token after the last one, which was just decoded."""
        self.tokens.append(int(context.logits(output).argmax()))
        self.position += 1


class Asker:
    """A model that answers in contexts of its caller's."""

    def __init__(self, model: Path, mmproj: Path | None, n_threads: int, kv_type: str = "f16") -> None:
        self.path = model
        self.kv_type = kv_type
        type_k, type_v = kv_types(kv_type)
        self.engine = Engine(model, mmproj, n_threads=n_threads, type_k=type_k, type_v=type_v)

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

    def tail(self, images: Sequence[Image], text: str) -> list[int]:
        """The tokens after the last picture of a prompt."""
        with closing(self.engine.prompt([Message("user", (*images, text))])) as prompt:
            chunk = prompt.chunks[-1]
        assert isinstance(chunk, TextChunk)
        return list(chunk.tokens)

    def read(self, prompt: Prompt, room: int, n_items: int | None = None) -> Prefilled:
        """The prompt in a context of its own, to be closed by the caller, with room for more tokens.

        n_items: read only its first ones.
        """
        context = self.engine.context(prompt.n_tokens + room, self.engine.batch(prompt))
        prefilled = Prefilled(context, self.engine.projector, n_query=shiftkv.MAX_QUERY)
        prefilled.read(prompt, n_items=n_items)
        return prefilled

    def ask(self, context: Context, tokens: Sequence[int], position: int, sequence: int = 0) -> tuple[int, int]:
        """Decode tokens; return the most likely one after them, and its position."""
        token = -1
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            context.decode_rows([(token, position + i, sequence) for i, token in enumerate(part)])
            position += len(part)
            token = int(context.logits(len(part) - 1).argmax())
        return token, position

    def answer(self, context: Context, first: int, position: int, limit: int) -> tuple[str, int]:
        """Go on greedily after the answer's first token; return the text and the number of tokens decoded."""
        answer = Answer([first], position)
        while not self.is_over(answer, limit):
            context.decode(answer.tokens[-1:], answer.position)
            answer.push(context)
        return self.text(answer), len(answer.tokens) - 1

    def side_by_side(self, context: Context, begun: Iterator[tuple[Row, Answer]], limit: int) -> Iterator[Row]:
        """Go on greedily with answers, each in the sequence that was free when it was asked for."""
        writing: dict[int, tuple[Row, Answer]] = {}
        while True:
            while len(writing) < N_PARALLEL and (following := next(begun, None)):
                writing[following[1].sequence] = following
            if not writing:
                return
            for sequence, (row, answer) in list(writing.items()):
                if self.is_over(answer, limit):
                    del writing[sequence]
                    context.remove(0, sequence)
                    yield {**row, "answer": self.text(answer)}
            if writing:
                answers = [answer for _, (_, answer) in sorted(writing.items(), key=lambda item: item[0])]
                context.decode_rows([(answer.tokens[-1], answer.position, answer.sequence) for answer in answers])
                for i, answer in enumerate(answers):
                    answer.push(context, i)

    def is_over(self, answer: Answer, limit: int) -> bool:
        """Whether nothing is to be added to an answer."""
        return len(answer.tokens) >= limit or self.engine.model.ends_generation(answer.tokens[-1])

    def text(self, answer: Answer) -> str:
        """What an answer says."""
        model = self.engine.model
        tokens = answer.tokens[: -1 if model.ends_generation(answer.tokens[-1]) else None]
        return b"".join(map(model.piece, tokens)).decode(errors="replace").strip()


def pair_share(kv_type: str) -> Fraction:
    """The bytes of a KV pair, as a share of those in f16."""
    blocks = [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] for name in kv_types(kv_type)]
    return sum((Fraction(size, n) for n, size in blocks), Fraction(0)) / 4


def budget_of(text: str, n_prompt: int, kv_type: str = "f16") -> int:
    """The KV pairs that a budget means for a prompt."""
    if text == "all":
        return n_prompt
    if text.endswith("B"):
        return max(2, int(Fraction(text[:-1]) * n_prompt / pair_share(kv_type)))
    return max(2, int(Fraction(text) * n_prompt)) if "/" in text else int(text)


@dataclass(frozen=True)
class Prototyped:
    """A ranking of kv_prototypes.py as a method."""

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
    methods: dict[str, Method | Ranking],
    budgets: Sequence[str],
    done: Set[tuple[str, str]],
) -> Iterator[Row]:
    """All answers to one case but those of the methods and budgets that are done."""
    with closing(asker.prompt(case)) as prompt:
        n_prompt, n_items = prompt.n_tokens, None
        second = asker.second(case, prompt) if case.second_prompt else []
        if case.cut_first:
            second = asker.tail(case.images, case.prompt)
            n_prompt, n_items = n_prompt - len(second), len(prompt.items) - len(second)
        room = max(64, case.max_tokens + len(second) + 1)
        sizes = [(text, budget_of(text, n_prompt, asker.kv_type)) for text in budgets]
        sizes = [(text, size) for text, size in sizes if size < n_prompt]
        todo = {(label, text) for label in methods for text, _ in sizes} - done
        if not todo and ("full", "all") in done:
            return
        common = {"suite": suite, "task": case.task, "seed": case.seed, "n_prompt": n_prompt, "kv": asker.kv_type}
        bytes_share = float(pair_share(asker.kv_type)) / n_prompt
        prefilled = asker.read(prompt, room, n_items)
        with closing(prefilled.context) as large:
            first = -1 if second else int(large.logits().argmax())

            def begin(context: Context, position: int, sequence: int = 0) -> Answer:
                if not second:
                    return Answer([first], position, sequence)
                token, position = asker.ask(context, second, position, sequence)
                return Answer([token], position, sequence)

            def row(label: str, budget: str, n_budget: int, seconds: float) -> Row:
                cut = {"method": label, "budget": budget, "n_budget": n_budget, "bytes": n_budget * bytes_share}
                return {**common, **cut, "select_s": seconds}

            def budgeted(label: str, method: Method | Prototyped) -> Iterator[Variant]:
                for text, size in sizes:
                    if (label, text) in todo:
                        yield label, text, size, partial(prefilled.select, method, size)

            def variants() -> Iterator[Variant]:
                for label, chosen in methods.items():
                    if label in ("oracle", "asked"):
                        continue
                    if callable(chosen):
                        yield from budgeted(label, Prototyped(chosen, Answered(large, asker.path, n_prompt, 0)))
                    else:
                        yield from budgeted(label, chosen)
                if ("full", "all") not in done:
                    yield "full", "all", n_prompt, prefilled.select_all
                if any(label == "asked" for label, _ in todo):
                    tails = [asker.tail(case.images, text) for text in ASKED]
                    found = asked(large, tails, n_prompt, prefilled.position)
                    before = Answered(large, asker.path, n_prompt, 0)
                    yield from budgeted("asked", Prototyped(lambda _, __: found, before))
                if not any(label == "oracle" for label, _ in todo):
                    return
                # From here on the last queries are the answer's.
                _, n_decoded = asker.answer(large, first, prefilled.position, case.max_tokens)
                if not n_decoded:
                    return
                yield from budgeted("oracle", Prototyped(oracle, Answered(large, asker.path, n_prompt, n_decoded)))

            @cache
            def whole() -> Whole:
                return Whole(large, asker.path, n_prompt)

            n_cells = n_prompt if ("full", "all") not in done else max(size for _, size in sizes)
            n_cells += room
            with closing(asker.engine.context(n_cells, BATCH, n_outputs=BATCH, n_seq=N_PARALLEL)) as small:
                free = list(range(N_PARALLEL))

                def begun() -> Iterator[tuple[Row, Answer]]:
                    for label, text, size, select in variants():
                        started = time.perf_counter()
                        select()
                        seconds, sequence = time.perf_counter() - started, free.pop(0)
                        position = prefilled.hand_over(small, sequence)
                        if MARK in label:
                            refit = Refit.of(label.partition(MARK)[2])
                            whole().write(refit, shiftkv.kept(large), small, sequence)
                        answer = begin(small, position, sequence)
                        yield {**row(label, text, size, seconds), "sequence": sequence}, answer

                for said in asker.side_by_side(small, begun(), case.max_tokens):
                    free.append(said.pop("sequence"))
                    yield {**said, "score": case.score(said["answer"])}


def spread(rows: npt.NDArray[np.float32]) -> float:
    """The standard deviation around each component's mean, over all rows and components."""
    return float(np.sqrt(rows.var(0).mean()))


def premise(args: argparse.Namespace) -> None:
    """Print the spread in the answer over that in the prompt: medians over the answers of 8 tokens or more."""
    ratios: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    with ExitStack() as stack:
        asker = asker_of(args, stack)
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
    names = ("hidden, one scalar", "hidden, by component", "queries, by component")
    print(
        markdown(
            [
                {"layer": layer, **dict(zip(names, (f"{value:.2f}" for value in np.median(rows, axis=0)), strict=True))}
                for layer, rows in ratios.items()
            ],
            numbers=True,
        )
    )


def parts(args: argparse.Namespace, stack: ExitStack) -> tuple[Path, Path | None]:
    """The model and the mmproj that a suite is asked with."""
    if args.suite.startswith("demo"):
        return args.model or DEMO / "demo-text-q8_0.gguf", DEMO / "demo-mmproj-f16.gguf"
    if not args.model:
        raise SystemExit("a suite of texts or pages needs a language model: -m FILE.gguf")
    if args.suite not in PAGE_CELLS or args.mmproj:
        return args.model, args.mmproj
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    write_mmproj(args.model, folder / "page-reader.gguf", PAGE_CELLS[args.suite])
    return args.model, folder / "page-reader.gguf"


def asker_of(args: argparse.Namespace, stack: ExitStack) -> Asker:
    """What a suite is asked with, to be closed with the stack."""
    return stack.enter_context(closing(Asker(*parts(args, stack), args.threads)))


def run(args: argparse.Namespace) -> None:
    """Ask what was not asked before, and append the answers to the file."""
    kind = args.suite.split("-")[0]
    budgets = args.budgets or BUDGETS[kind].split()
    asked_later = args.suite.endswith(("second", "cut"))
    methods = {text: method_of(text) for text in args.methods if not (asked_later and text == "oracle")}
    done: dict[tuple[Any, ...], set[tuple[str, str]]] = defaultdict(set)
    out = JsonLines(args.out)
    for row in out.rows:
        key = row["suite"], row["task"], row["seed"], row.get("kv", "f16")
        done[key].add((row["method"], row["budget"]))
    there = cases(args.suite, args.cases, args.first_seed, args.tokens)
    todo = [case for case in there if args.tasks is None or case.task in args.tasks]
    with ExitStack() as stack:
        model, mmproj = parts(args, stack)
        progress = stack.enter_context(tqdm(total=len(todo) * len(args.kv_types), unit="case"))
        for kv_type in args.kv_types:
            usable = {text: chosen for text, chosen in methods.items() if kv_type == "f16" or not callable(chosen)}
            with closing(Asker(model, mmproj, args.threads, kv_type)) as asker:
                for case in todo:
                    before = done[args.suite, case.task, case.seed, kv_type]
                    for row in ask(asker, args.suite, case, usable, budgets, before):
                        out.add(row)
                    progress.update()


def method_of(text: str) -> Method | Ranking:
    """A method of the library, or a ranking in numpy; those that need more than a prompt are made where it is there."""
    text = text.partition(MARK)[0]
    if text in ("oracle", "asked"):
        return oracle
    return prototype(text[len(PROTOTYPE) :]) if text.startswith(PROTOTYPE) else configured(text)


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
        command.add_argument("--mmproj", type=Path, help="of a pages suite (default: the page reader, fitted to it)")
        command.add_argument("--cases", type=int, default=20, help="of each task (default 20)")
        command.add_argument("--first-seed", type=int, default=0)
        command.add_argument("--tokens", type=int, nargs="+", default=[1000], help="of the texts (default 1000)")
        add_options(command, "--threads")
        if name == "run":
            command.add_argument("--out", type=Path, required=True, help="JSON lines")
            command.add_argument("--tasks", nargs="+", help="only these")
            command.add_argument("--methods", nargs="*", default=[*METHODS, "oracle"])
            command.add_argument("--kv-types", nargs="+", default=["f16"], help="such as f16 q8_0 q8_0/q4_0 q4_0")
            command.add_argument("--budgets", nargs="+")
    command = commands.add_parser("report", help="tables and plots of result files")
    command.set_defaults(run=lambda args: report(args.files, args.csv, args.plots))
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--csv", type=Path)
    command.add_argument("--plots", type=Path, help="folder to write PNG files to")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
