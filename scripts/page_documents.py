"""Pages for the page reader, with questions in plain words: receipts, tickets, timetables, forms, price lists, letters.

A page has n x n cells of one character, of which the last in each row stays free. Five tasks are asked about pages:

``look-up``
    a value by its name: ``What is the fare on this ticket?`` -> ``48.20``
``which``
    the other way round, by way of a row: ``Which train leaves at 08:15?`` -> ``Oslo``
``list``
    all values from top to bottom
``transcribe``
    the text, line by line
``sum up``
    a sentence about a letter or a ticket, which has to hold its facts

Everything follows from a seed, through numpy's frozen ``RandomState``. Needs numpy and pillow.

``python scripts/page_documents.py --kind receipt --seed 7 --out page.png`` writes a picture and prints its questions.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from page_pictures import numbers, paint
from PIL import Image
from rapidfuzz.distance import OSA

TASKS = ("look-up", "which", "list", "transcribe", "sum up")
_TABLES = ("receipt", "timetable", "prices")  # rows of a name and a value, besides what else there is
KINDS = (*_TABLES, "ticket", "form", "letter")
_ASKED = {  # task -> kinds of pages it is asked about
    "look-up": KINDS,
    "which": (*_TABLES, "form"),
    "list": (*_TABLES, "form"),
    "transcribe": ("receipt", "timetable", "prices", "ticket", "form"),  # of letters the model joins the lines
    "sum up": ("ticket", "letter"),
}

_ITEMS = (
    "Coffee Tea Bread Milk Butter Cheese Apples Pears Grapes Lemons Rice Pasta Soup Salad Honey Sugar Salt Pepper "
    "Juice Water Eggs Ham Fish Cake Cookies Olives Onions Carrots Beans Corn Yoghurt Soap Candles Batteries"
)
_CITIES = (
    "Lisbon Oslo Vienna Dublin Prague Athens Warsaw Madrid Helsinki Zagreb Riga Geneva Naples Lyon Porto Bergen Turin "
    "Gdansk Malmo Ghent"
)
_PEOPLE = "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Louis Marta Niels Olga Peter Rosa"
_SHOPS = ("Corner Shop", "Green Market", "City Store", "Harbour Cafe", "Old Mill Bakery", "Station Kiosk")
_LABELS = (
    "Batch Branch Contact Customer Delivery Discount Invoice Locker Meter Model Office Order Parcel Phone Policy "
    "Project Rent Room Shelf Shipping Storage Supplier Table Voucher Weight Warranty Account Permit Vehicle Badge"
)
_MONTHS = "January February March April May June July August September October November December"
_MATTERS = ("meeting", "concert", "lecture", "dinner", "workshop", "interview", "rehearsal", "inspection")


@dataclass(frozen=True)
class PageQuestion:
    """A question about a page.

    items: what has to stand in the answer, in this order or, with `any_order`, anywhere; `lines` wants whole lines.
    max_tokens: of an answer.
    """

    task: str
    question: str
    items: tuple[str, ...]
    max_tokens: int
    any_order: bool = False
    lines: bool = False

    def score(self, answer: str) -> float:
        """The share of the items that stand in the answer, from 0 to 1.

        Case and the punctuation around words do not count. A word without digits may differ in one letter of every
        four, or in a pair of them exchanged, as the language model spells what it read letter by letter; one with
        digits may not. In whole lines gaps do not count either: all digits have to be right, and of the letters three
        in four.
        """
        if self.lines:
            return _lines_found(self.items, answer) / len(self.items)
        said, found, start = _words(answer), 0, 0
        for item in self.items:
            wanted = _words(item)
            places = range(0 if self.any_order else start, len(said) - len(wanted) + 1)
            place = next((i for i in places if all(map(_same, wanted, said[i : i + len(wanted)]))), None)
            if place is not None:
                found, start = found + 1, place + len(wanted)
        return found / len(self.items)


def _words(text: str) -> list[str]:
    """Words and numbers, without the punctuation around them: 12.40 and 08:15 are whole."""
    return re.findall(r"\w+(?:[.:/-]\w+)*", re.sub(r"(?<=[^\W\d]):", " ", text.casefold()))


def _same(wanted: str, said: str) -> bool:
    if any(char.isdigit() for char in wanted):
        return wanted == said
    return OSA.distance(wanted, said) <= len(wanted) // 4


def _lines_found(wanted: Sequence[str], answer: str) -> int:
    """How many lines are there, in their order."""
    said, found, start = [_letters_and_digits(line) for line in answer.splitlines()], 0, 0
    for letters, digits in map(_letters_and_digits, wanted):
        for i in range(start, len(said)):
            if said[i][1] == digits and OSA.distance(said[i][0], letters) <= len(letters) // 4:
                found, start = found + 1, i + 1
                break
    return found


def _letters_and_digits(line: str) -> tuple[str, str]:
    """A line without gaps and punctuation: its letters, and its digits with what stands between them."""
    solid = "".join(line.casefold().split())
    return "".join(filter(str.isalpha, solid)), "".join(re.findall(r"\d+|(?<=\d)[.:/-](?=\d)", solid))


@dataclass(frozen=True)
class Page:
    """A page.

    seed, kind: what it was made from.
    lines: its text, n lines of less than n characters.
    rows: name -> value, from top to bottom, of the table or the fields.
    facts: question -> answer, about what else is there, and the facts of a sentence under "".
    """

    seed: int
    kind: str
    lines: tuple[str, ...]
    rows: dict[str, str]
    facts: dict[str, tuple[str, ...]]

    def picture(self) -> Image.Image:
        """The picture of the page, 14 pixels a cell, in a typeface that the page reader knows."""
        n = len(self.lines)
        rng = np.random.RandomState([self.seed, KINDS.index(self.kind), n])
        return Image.fromarray(paint(rng, numbers(list(self.lines), n)))

    def text(self) -> list[str]:
        """The lines that are not blank, with single gaps."""
        return [" ".join(line.split()) for line in self.lines if line.strip()]

    def ask(self, task: str, number: int = 0) -> PageQuestion:
        """A question; `number` chooses among those of a task, in an order of its own on each page."""
        rng = np.random.RandomState([self.seed, TASKS.index(task), 1])
        if task == "look-up":
            known: dict[str, tuple[str, ...]] = {
                _value_question(self.kind, name): (value,) for name, value in self.rows.items()
            }
            known |= {question: answer for question, answer in self.facts.items() if question}
            question = _some(rng, list(known), len(known))[number % len(known)]
            return PageQuestion(task, f"{question} Answer with the value only.", known[question], 24)
        if task == "which":
            name = _some(rng, list(self.rows), len(self.rows))[number % len(self.rows)]
            return PageQuestion(task, _name_question(self.kind, self.rows[name]), (name,), 24)
        values = tuple(self.rows.values())
        if task == "list":
            what = {"receipt": "prices of the items", "prices": "prices", "timetable": "times"}.get(self.kind, "values")
            without = "labels" if self.kind == "form" else "names"
            question = f"Write out all {what} on the page, one per line, without {without}."
            return PageQuestion(task, question, values, 16 * len(values))
        if task == "transcribe":
            lines = tuple(line for line in self.text() if _words(line))  # rules are not asked for
            question = "Copy the whole page from the first line to the last, line by line, with all numbers."
            return PageQuestion(task, question, lines, 24 * len(lines), lines=True)
        question = f"Sum up this {self.kind} in one sentence, with all that matters."
        return PageQuestion(task, question, self.facts[""], 80, any_order=True)


def page_for(task: str, seed: int, n_cells: int = 24) -> Page:
    """The page of a seed that a task is asked about."""
    kinds = _ASKED[task]
    return make_page(kinds[seed % len(kinds)], seed, n_cells)


def make_page(kind: str, seed: int, n_cells: int = 24) -> Page:
    """The page of a kind and a seed, 0 to 2**32 - 1, of 24 to 32 cells a side."""
    rng = np.random.RandomState([seed, KINDS.index(kind)])
    width = n_cells - 1
    lines, rows, facts = {
        "receipt": _receipt,
        "timetable": _timetable,
        "prices": _prices,
        "ticket": _ticket,
        "form": _form,
        "letter": _letter,
    }[kind](rng, width)
    # Free lines anywhere above, between and below, more of them the emptier the page is.
    places = np.sort(rng.permutation(n_cells)[: len(lines)]) if rng.randint(2) else np.arange(len(lines))
    if kind in ("letter", "timetable", "prices"):  # which hang together
        places = np.arange(len(lines)) + rng.randint(n_cells - len(lines) + 1)
    sheet = [""] * n_cells
    for place, line in zip(places, lines, strict=True):
        sheet[place] = line
    return Page(seed, kind, tuple(sheet), rows, facts)


_Made = tuple[list[str], dict[str, str], dict[str, tuple[str, ...]]]


def _receipt(rng: np.random.RandomState, width: int) -> _Made:
    items = _some(rng, _ITEMS.split(), rng.randint(4, 8))
    cents = _distinct(rng, len(items), 80, 2000)
    rows = {item: _money(price) for item, price in zip(items, cents, strict=True)}
    shop, number, date = _SHOPS[rng.randint(len(_SHOPS))], str(rng.randint(1000, 10000)), _date(rng)
    total = _money(sum(cents))
    lines = [shop.center(width).rstrip(), f"Receipt No. {number}", f"Date: {date}", ""]
    lines += [_spaced(item, price, width) for item, price in rows.items()]
    lines += ["-" * width, _spaced("TOTAL", total, width)]
    facts: dict[str, tuple[str, ...]] = {
        "What is the total of this receipt?": (total,),
        "What is the number of this receipt?": (number,),
        "What is the date of this receipt?": (date,),
    }
    return lines, rows, facts


def _timetable(rng: np.random.RandomState, width: int) -> _Made:
    cities = _some(rng, _CITIES.split(), rng.randint(5, 9))
    minutes = sorted(_distinct(rng, len(cities), 5 * 60, 23 * 60))
    rows = {city: f"{minute // 60:02d}:{minute % 60:02d}" for city, minute in zip(cities, minutes, strict=True)}
    platforms = [str(rng.randint(1, 15)) for _ in cities]
    lines = ["DEPARTURES", "Train to   Time  Track"]
    lines += [f"{city:<11}{rows[city]} {track:>5}" for city, track in zip(cities, platforms, strict=True)]
    facts: dict[str, tuple[str, ...]] = {
        f"From which track does the train to {city} leave?": (track,)
        for city, track in zip(cities, platforms, strict=True)
    }
    return lines, rows, facts


def _prices(rng: np.random.RandomState, width: int) -> _Made:
    items = _some(rng, _ITEMS.split(), rng.randint(7, 12))
    cents = _distinct(rng, len(items), 80, 3000)
    rows = {item: _money(price) for item, price in zip(items, cents, strict=True)}
    wide = rng.randint(16, width + 1)
    lines = [f"{_SHOPS[rng.randint(len(_SHOPS))]}", "Price list"]
    lines += [_spaced(item, price, wide) for item, price in rows.items()]
    return lines, rows, {}


def _ticket(rng: np.random.RandomState, width: int) -> _Made:
    start, stop = _some(rng, _CITIES.split(), 2)
    date, hour = _date(rng), f"{rng.randint(5, 23):02d}:{rng.randint(0, 60):02d}"
    rows = {
        "Passenger": _some(rng, _PEOPLE.split(), 1)[0],
        "From": start,
        "To": stop,
        "Date": date,
        "Departure": hour,
        "Coach": str(rng.randint(1, 20)),
        "Seat": f"{rng.randint(20, 100)}{'ABCD'[rng.randint(4)]}",
        "Fare": _money(rng.randint(800, 20000)),
        "Booking": _code(rng),
    }
    lines = ["TRAIN TICKET", *_fields(rng, rows, width)]
    return lines, rows, {"": (rows["Passenger"], start, stop, hour)}


def _form(rng: np.random.RandomState, width: int) -> _Made:
    labels = _some(rng, _LABELS.split(), rng.randint(7, 12))
    rows: dict[str, str] = {}
    for label in labels:
        value = _value(rng)
        while value in rows.values():
            value = _value(rng)
        rows[label] = value
    return _fields(rng, rows, width), rows, {}


def _letter(rng: np.random.RandomState, width: int) -> _Made:
    reader, writer = _some(rng, _PEOPLE.split(), 2)
    matter, city = _MATTERS[rng.randint(len(_MATTERS))], _some(rng, _CITIES.split(), 1)[0]
    day = f"{rng.randint(1, 29)} {_some(rng, _MONTHS.split(), 1)[0]}"
    hour, room = f"{rng.randint(8, 21):02d}:{15 * rng.randint(4):02d}", str(rng.randint(100, 500))
    phone = f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}"
    body = f"the {matter} in {city} is on {day} at {hour} in room {room}. Please call {phone} if you cannot come."
    lines = [f"Dear {reader},", *textwrap.wrap(body, width), "Kind regards", writer]
    facts: dict[str, tuple[str, ...]] = {
        "": (matter, city, hour, room),
        f"At what time is the {matter}?": (hour,),
        f"In which room is the {matter}?": (room,),
        f"In which city is the {matter}?": (city,),
        f"On what day is the {matter}?": (day,),
        "Which number should be called?": (phone,),
        "Who wrote this letter?": (writer,),
    }
    return lines, {}, facts


def _value_question(kind: str, name: str) -> str:
    if kind in ("receipt", "prices"):
        return f"What is the price of {name}?"
    if kind == "timetable":
        return f"When does the train to {name} leave?"
    if name in ("From", "To"):
        return f"{name} which city does the trip on this ticket go?"
    return f"What is the {name} on this {kind}?"


def _name_question(kind: str, value: str) -> str:
    if kind in ("receipt", "prices"):
        return f"Which item costs {value}? Answer with its name only."
    if kind == "timetable":
        return f"Where does the train at {value} go? Answer with the place only."
    return f"Which label has the value {value}? Answer with the label only."


def _some(rng: np.random.RandomState, words: Sequence[str], n: int) -> list[str]:
    return [words[i] for i in rng.permutation(len(words))[:n]]


def _distinct(rng: np.random.RandomState, n: int, low: int, high: int) -> list[int]:
    return [int(low + i) for i in rng.permutation(high - low)[:n]]


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def _date(rng: np.random.RandomState) -> str:
    return f"{rng.randint(1, 29):02d}.{rng.randint(1, 13):02d}.20{rng.randint(20, 30)}"


def _code(rng: np.random.RandomState) -> str:
    return f"{chr(ord('A') + rng.randint(26))}{rng.randint(10, 100)}-{rng.randint(100, 1000)}"


def _value(rng: np.random.RandomState) -> str:
    kind = rng.randint(4)
    if kind == 0:
        return _date(rng)
    if kind == 1:
        return _code(rng)
    return _money(rng.randint(1000, 90000)) if kind == 2 else str(rng.randint(1000, 100000))


def _spaced(name: str, value: str, width: int) -> str:
    """A name at the left and a value at the right."""
    return f"{name}{value:>{width - len(name)}}"


def _fields(rng: np.random.RandomState, rows: dict[str, str], width: int) -> list[str]:
    """Lines of a label and a value: one after the other, or in two columns."""
    indent = " " * rng.randint(3)
    if rng.randint(2):
        return [f"{indent}{label}: {value}" for label, value in rows.items()]
    return [f"{indent}{label + ':':<11}{value:>{width - 11 - len(indent)}}" for label, value in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a page and print questions about it.")
    parser.add_argument("--kind", choices=KINDS, default="form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=int, default=24, help="a side, 24 to 32 (default 24)")
    parser.add_argument("--out", type=Path, help="where to write the picture (png)")
    args = parser.parse_args()
    page = make_page(args.kind, args.seed, args.cells)
    if args.out:
        page.picture().save(args.out, optimize=True)
    print("\n".join(page.lines))
    for task, kinds in _ASKED.items():
        if args.kind in kinds:
            item = page.ask(task)
            print(f"{task:10s} {item.question!r} -> {list(item.items)}")


if __name__ == "__main__":
    main()
