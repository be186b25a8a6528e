"""The tables of docs/quality-tables.md have the figures of the CSV files beside them."""

from __future__ import annotations

import csv
import re

import pytest
from support.howto import ROOT

PAGE = (ROOT / "docs" / "quality-tables.md").read_text(encoding="utf-8")
SECTIONS = {
    "## Pictures: the demo model": ("demo.csv", 5),
    "### At equal bytes": ("demo-bytes.csv", 1),
    "### Texts at equal bytes": ("text-bytes.csv", 1),
    "## Texts: ": ("text-long.csv", 1),
    "Shorter, about 500 tokens": ("text.csv", 1),
    "The 1.5B model, texts of 1,000 tokens": ("text-long.csv", 1),
}


def measured(name):
    """What a file says of its suite's tasks, methods and budgets, as tables show it."""
    with (ROOT / "docs" / "quality" / name).open(newline="", encoding="utf-8") as lines:
        return {
            (row["suite"], row["task"], row["method"], row["budget"]): shown(
                *map(float, (row["mean"], row["low"], row["high"]))
            )
            for row in csv.DictReader(lines)
        }


def shown(mean, low, high):
    return f"{100 * mean:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def cells(line):
    return [cell.strip().strip("`") for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("begin", SECTIONS)
def test_tables_of_a_suite(begin):
    name, n_tables = SECTIONS[begin]
    known = measured(name)
    part = PAGE[PAGE.index(begin) :]
    tables = re.findall(
        r"^\*\*([\w-]+), ([\w ]+)\*\*: full cache (.*?), n.*\n\n(?:full[,:] .*\n\n)*\| method (.*)\n.*\n((?:\|.*\n)+)",
        part,
        re.MULTILINE,
    )
    for suite, task, full, budgets, lines in tables[:n_tables]:
        assert full == known[suite, task, "full", "all"]
        said = {}
        for line in lines.splitlines():
            method, *scores = cells(line)
            said |= {
                (suite, task, method, budget): score
                for budget, score in zip(cells(budgets), scores, strict=True)
                if score
            }
        assert len(said) > 10
        assert said == {key: known.get(key) for key in said}


def test_tables_of_pages():
    """Which have the bytes and the KV types in columns of their own."""
    known = measured("pages.csv")
    part = PAGE[PAGE.index("## Pages\n") : PAGE.index("## Which default\n")]
    tables = re.findall(r"^\| bytes \| types \| method (.*)\n.*\n((?:\|.*\n)+)", part, re.MULTILINE)
    assert len(tables) == 2
    for tasks, lines in tables:
        for line in lines.splitlines():
            size, kv_type, method, *scores = cells(line)
            name = "full" if method == "nothing cut" else method
            key = name if kv_type == "f16" else f"{name}, {kv_type}"
            budget = "all" if method == "nothing cut" else f"{size}B"
            assert scores == [known["pages", task, key, budget] for task in cells(tasks)], line
