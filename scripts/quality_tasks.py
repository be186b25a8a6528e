"""What the quality bench asks: cases of a prompt, a question and the exact answer, each from a seed.

Suites: ``demo`` and ``demo-second`` are pictures for the shipped model (`demo_documents`); ``text`` and ``text-second``
are texts for any chat model, of about the number of tokens asked for; ``pages`` and ``pages-second`` are pages of 24 x
24 cells for a language model with the page reader (`page_documents`), ``pages-32`` larger ones. In the second ones the
cache is cut for one question, which gets its right answer, and another one is asked on what was kept; in ``pages-cut``
it is cut before there is any question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from demo_documents import Question, make_document
from page_documents import TASKS as PAGE_TASKS
from page_documents import page_for
from PIL import Image

PAGE_CELLS = {"pages": 24, "pages-second": 24, "pages-cut": 24, "pages-32": 32}
SUITES = ("demo", "demo-second", "text", "text-second", *PAGE_CELLS)
TEXT_TASKS = ("code", "codes", "table", "story")


@dataclass(frozen=True)
class Case:
    """One question, or a question and a second one whose answer counts.

    items: what has to stand in the answer, in this order. exact: whether the answer may hold nothing else.
    judge: scores answers instead.
    cut_first: whether the cache is cut after the pictures, and the prompt comes after that.
    """

    task: str
    seed: int
    images: tuple[Image.Image, ...]
    prompt: str
    items: tuple[str, ...]
    max_tokens: int
    exact: bool = False
    first_answer: str = ""
    second_prompt: str = ""
    judge: Callable[[str], float] | None = None
    cut_first: bool = False

    def score(self, answer: str) -> float:
        """The share of the items that are there, from 0 to 1; 0 or 1 where the answer has to be exact."""
        if self.judge:
            return self.judge(answer)
        if self.exact:
            return float(answer == self.items[0])
        found, start = 0, 0
        for item in self.items:
            match = re.compile(rf"(?<!\w){re.escape(item)}(?!\w)", re.IGNORECASE).search(answer, start)
            if match:
                found, start = found + 1, match.end()
        return found / len(self.items)


def cases(suite: str, n: int, first_seed: int = 0, n_tokens: Sequence[int] = (1000,)) -> Iterator[Case]:
    """`n` cases of every task of a suite; those of a text suite take their lengths in turn from `n_tokens`."""
    for seed in range(first_seed, first_seed + n):
        if suite == "demo":
            questions = make_document(seed).questions()
            for item in {question.task: question for question in reversed(questions)}.values():
                yield _about_document(seed, item)
        elif suite == "demo-second":
            yield _two_about_document(seed)
        elif suite == "text":
            for task in TEXT_TASKS:
                yield _TEXT[task](seed, n_tokens[seed % len(n_tokens)])
        elif suite == "text-second":
            yield _two_codes(seed, n_tokens[seed % len(n_tokens)])
        elif suite == "pages-second":
            yield _two_about_page(seed, "look-up")
            yield _two_about_page(seed, "list")
        elif suite in PAGE_CELLS:
            for task in PAGE_TASKS:
                yield replace(_about_page(seed, task, PAGE_CELLS[suite]), cut_first=suite == "pages-cut")
        else:
            raise ValueError(f"unknown suite {suite!r}, expected one of {SUITES}")


def _about_document(seed: int, item: Question) -> Case:
    picture = make_document(seed).pil_image()
    return Case(item.task, seed, (picture,), item.question, (item.answer,), 160, exact=True)


def _two_about_document(seed: int) -> Case:
    document = make_document(seed)
    lookups = [question for question in document.questions() if question.task == "lookup"]
    lines = [question for question in document.questions() if question.task == "line"]
    first = lookups[seed % len(lookups)]
    second = next(line for line in lines[seed % len(lines) :] + lines if first.answer not in line.answer)
    return Case(
        "line after lookup",
        seed,
        (document.pil_image(),),
        first.question,
        (second.answer,),
        160,
        exact=True,
        first_answer=first.answer,
        second_prompt=second.question,
    )


def _about_page(seed: int, task: str, n_cells: int) -> Case:
    page = page_for(task, seed, n_cells)
    item = page.ask(task)
    return Case(task, seed, (page.picture(),), item.question, item.items, item.max_tokens, judge=item.score)


def _two_about_page(seed: int, task: str) -> Case:
    page = page_for(task, seed, PAGE_CELLS["pages-second"])
    first, second = page.ask("look-up"), page.ask(task, 1)
    return Case(
        f"{task} after look-up",
        seed,
        (page.picture(),),
        first.question,
        second.items,
        second.max_tokens,
        first_answer=first.items[0],
        second_prompt=second.question,
        judge=second.score,
    )


_NAMES = (
    "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Louis Marta Niels Olga Peter Quinn Rosa Simon "
    "Tessa Ulrich Vera Walter Xenia Yusuf Zoe"
)
_PLACES = "Lisbon Oslo Vienna Dublin Prague Athens Warsaw Madrid Helsinki Zagreb Riga Geneva Naples Lyon Porto Bergen"
_THINGS = "violin telescope bicycle lantern compass suitcase umbrella painting clock teapot ladder camera"
_COLOURS = "red blue green yellow black white purple orange brown grey pink silver"
_ASK_CODE = "What is the access code of {}? Answer with the code only."
_FILLER = (
    "The ferry was late again and nobody on the pier knew why.",
    "Rain had fallen since the early morning, and the streets were quiet.",
    "A committee met to discuss the new library, but reached no decision.",
    "Bread was cheaper at the corner shop than at the market.",
    "Some of the old houses near the river were being painted.",
    "The school orchestra practised the same piece for weeks.",
    "Two dogs slept in the shade of the chestnut tree.",
    "An engineer explained how the bridge had been repaired.",
    "The museum opened an hour later than the poster said.",
    "Most visitors took the tram up the hill and walked back down.",
    "A letter arrived without a stamp and without a sender.",
    "The baker changed his recipe after the harvest.",
    "Winters here are mild, but the wind from the sea is strong.",
    "The radio played a song that everyone seemed to know.",
)


def _spread(rng: random.Random, facts: Sequence[str], n_tokens: int) -> str:
    """The facts, in order, in between sentences that say nothing, about `n_tokens` tokens in all."""
    n_filler = max(0, int((n_tokens - 17 * len(facts)) / 12.5))
    lines = [rng.choice(_FILLER) for _ in range(n_filler)]
    places = sorted(rng.sample(range(n_filler + len(facts)), len(facts)))
    for place, fact in zip(places, facts, strict=True):
        lines.insert(place, fact)
    return " ".join(lines)


def _code_facts(rng: random.Random, n: int) -> tuple[dict[str, str], list[str]]:
    codes = {name: str(rng.randint(10000, 99999)) for name in rng.sample(_NAMES.split(), n)}
    return codes, [f"The access code of {name} is {code}." for name, code in codes.items()]


def _one_code(seed: int, n_tokens: int) -> Case:
    rng = random.Random(f"code {seed}")
    codes, facts = _code_facts(rng, 12)
    name = rng.choice(list(codes))
    prompt = f"{_spread(rng, facts, n_tokens)}\n\n{_ASK_CODE.format(name)}"
    return Case("code", seed, (), prompt, (codes[name],), 16)


def _four_codes(seed: int, n_tokens: int) -> Case:
    rng = random.Random(f"codes {seed}")
    codes, facts = _code_facts(rng, 12)
    names = rng.sample(list(codes), 4)
    question = f"What are the access codes of {names[0]}, {names[1]}, {names[2]} and {names[3]}, in this order?"
    prompt = f"{_spread(rng, facts, n_tokens)}\n\n{question} Answer with the four codes only, separated by commas."
    return Case("codes", seed, (), prompt, tuple(codes[name] for name in names), 48)


def _table(seed: int, n_tokens: int) -> Case:
    rng = random.Random(f"table {seed}")
    rows = [f"{name},{rng.randint(100, 999)}" for name in rng.sample(_NAMES.split(), 8)]
    half = max(0, (n_tokens - 90) // 2)
    before, after = _spread(rng, (), half), _spread(rng, (), half)
    table = "\n".join(["name,amount", *rows])
    prompt = f"{before}\n\n{table}\n\n{after}\n\nRepeat the table above, line by line, and nothing else."
    return Case("table", seed, (), prompt, tuple(rows), 96)


def _story(seed: int, n_tokens: int) -> Case:
    rng = random.Random(f"story {seed}")
    people, places = rng.sample(_NAMES.split(), 6), rng.sample(_PLACES.split(), 6)
    things, colours = rng.sample(_THINGS.split(), 6), rng.sample(_COLOURS.split(), 6)
    facts = [
        f"{person} came from {place} and carried a {colour} {thing}."
        for person, place, colour, thing in zip(people, places, colours, things, strict=True)
    ]
    i = rng.randrange(6)
    question, answer = rng.choice(
        [
            (f"Where did {people[i]} come from?", places[i]),
            (f"What colour was the {things[i]}?", colours[i]),
            (f"Who carried the {things[i]}?", people[i]),
        ]
    )
    prompt = f"{_spread(rng, facts, n_tokens)}\n\n{question} Answer with one word."
    return Case("story", seed, (), prompt, (answer,), 12)


def _two_codes(seed: int, n_tokens: int) -> Case:
    rng = random.Random(f"second {seed}")
    codes, facts = _code_facts(rng, 12)
    first, second = rng.sample(list(codes), 2)
    return Case(
        "code after code",
        seed,
        (),
        f"{_spread(rng, facts, n_tokens)}\n\n{_ASK_CODE.format(first)}",
        (codes[second],),
        16,
        first_answer=codes[first],
        second_prompt=_ASK_CODE.format(second),
    )


_TEXT: dict[str, Callable[[int, int], Case]] = {
    "code": _one_code,
    "codes": _four_codes,
    "table": _table,
    "story": _story,
}
