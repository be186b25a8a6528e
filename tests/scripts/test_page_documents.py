"""Generated pages and their questions: layout, determinism, and what counts as an answer."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from page_documents import KINDS, TASKS, PageQuestion, make_page, page_for
from page_pictures import numbers

from edge_shiftkv.page_reader import CELL

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SEEDS = range(20)


def digest(seed: int) -> str:
    page = make_page(KINDS[seed % len(KINDS)], seed)
    return hashlib.sha256(np.asarray(page.picture()).tobytes() + "\n".join(page.lines).encode()).hexdigest()


def test_a_seed_makes_the_same_page_in_another_process() -> None:
    seeds = range(7, 13)  # all kinds
    code = f"import sys; sys.path[:0] = {[str(SCRIPTS), str(Path(__file__).parent)]}\n"
    code += f"from test_page_documents import digest\nprint(*map(digest, {list(seeds)}))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = [digest(seed) for seed in seeds]
    assert there.stdout.split() == here
    assert len(set(here)) == len(here)


def test_characters_stand_in_cells_of_their_own() -> None:
    cells = numbers(["Aa ~", "", " 0"], 24)
    assert cells.shape == (24, 24)
    assert cells[0, :5].tolist() == [33, 65, 0, 94, 0]  # places in ASCII from the blank on
    assert cells[2, :3].tolist() == [0, 16, 0]
    assert cells.astype(bool).sum() == 4


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 23"):
        numbers(["x" * 24], 24)
    with pytest.raises(ValueError, match="25 lines"):
        numbers([""] * 25, 24)


@pytest.mark.parametrize("n_cells", [24, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_fit_and_hold_what_is_asked_for(kind: str, n_cells: int) -> None:
    for seed in SEEDS:
        page = make_page(kind, seed, n_cells)
        assert len(page.lines) == n_cells
        assert max(map(len, page.lines)) < n_cells
        text = " ".join(page.text())
        for name, value in page.rows.items():
            line = next(line for line in page.text() if line.startswith(name))
            assert value in line.split()
        for answers in page.facts.values():
            assert all(answer in text for answer in answers)
        if kind not in ("ticket", "letter"):  # else a value would name two rows
            assert len(set(page.rows.values())) == len(page.rows)


def test_ink_is_where_characters_are() -> None:
    page = make_page("prices", 3)
    picture = np.asarray(page.picture()).astype(float).mean(-1)
    assert picture.shape == (24 * CELL, 24 * CELL)
    spread = picture.reshape(24, CELL, 24, CELL).std((1, 3))
    inked = numbers(list(page.lines), 24) > 0
    assert np.median(spread[inked]) > 2 * np.median(spread[~inked])


@pytest.mark.parametrize("task", TASKS)
def test_the_page_itself_is_a_right_answer(task: str) -> None:
    for seed in SEEDS:
        page = page_for(task, seed)
        item = page.ask(task)
        text = "\n".join(page.text())
        assert item.question.count("?") + item.question.count(".") >= 1
        assert item.score("nothing of the kind") == 0
        assert item.score(text) == 1


def test_look_ups_of_a_page_differ() -> None:
    page = make_page("form", 1)
    asked = [page.ask("look-up", number) for number in range(len(page.rows))]
    assert len({item.question for item in asked}) == len(asked)
    for item in asked:
        label = item.question.removeprefix("What is the ").partition(" on this form")[0]
        assert item.items == (page.rows[label],)


def score(items: tuple[str, ...], answer: str, **settings: bool) -> float:
    return PageQuestion("", "", items, 8, **settings).score(answer)


def test_case_punctuation_and_sentences_do_not_count() -> None:
    assert score(("12.40",), "The total is $12.40.") == 1
    assert score(("B73-291",), "b73-291") == 1
    assert score(("14 November",), "on 14 NOVEMBER, at noon") == 1
    assert score(("08:15",), "Time:08:15") == 1


def test_numbers_have_to_be_right_and_whole() -> None:
    assert score(("12.40",), "12.41") == 0
    assert score(("12.40",), "112.40") == 0
    assert score(("12.40",), "12.4") == 0
    assert score(("7",), "17") == 0


def test_words_may_be_misspelled_a_little() -> None:
    assert score(("Voucher",), "Vouchr") == 1
    assert score(("Voucher",), "Vuocher") == 1
    assert score(("Voucher",), "Vuchr") == 0
    assert score(("Oslo",), "Osla") == 1
    assert score(("Tea",), "Pea") == 0


def test_the_share_of_items_in_their_order() -> None:
    items = ("1.10", "2.20", "3.30", "4.40")
    assert score(items, "1.10\n2.20\n3.30\n4.40") == 1
    assert score(items, "1.10\n3.30") == 0.5
    assert score(items, "4.40 3.30 2.20 1.10") == 0.25
    assert score(items, "4.40 3.30 2.20 1.10", any_order=True) == 1


def test_lines_count_whole_but_not_their_gaps() -> None:
    lines = ("Receipt No. 4711", "Milk 2.30", "TOTAL 12.40")
    assert score(lines, "Receipt No. 4711\nMilk 2.30\nTOTAL 12.40", lines=True) == 1
    assert score(lines, "R e c e i p t  No.4711\nMilk      2.30\nTOTA L: 12.40", lines=True) == 1
    assert score(lines, "Receipt No. 4711\nMilk\nTOTAL 12.40", lines=True) == pytest.approx(2 / 3)
    assert score(lines, "Milk 2.30\nReceipt No. 4711\nTOTAL 12.40", lines=True) == pytest.approx(2 / 3)
    assert score(lines, "Receipt No. 4711 Milk 2.30 TOTAL 12.40", lines=True) == 0
    assert score(lines, "Receipt No. 4712\nMilk 23.0\nTOTAL 1240", lines=True) == 0
