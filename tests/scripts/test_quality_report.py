"""Tables, CSV and plots of the quality bench, of scores that are counted by hand."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy.stats import binomtest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench_quality.py"


def row(task: str, method: str, budget: str, n_budget: int, score: float, **more: Any) -> dict[str, Any]:
    return {
        "suite": "pages",
        "task": task,
        "method": method,
        "budget": budget,
        "n_budget": n_budget,
        "score": score,
    } | more


def report(tmp_path: Path, rows: list[dict[str, Any]], *arguments: str) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')  # a run that goes on
    command = [sys.executable, str(BENCH), "report", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


ROWS = [
    *(row("look-up", "full", "all", 600, score) for score in (1, 1, 1, 0)),
    *(row("look-up", "mixed", "128", 128, score) for score in (1, 1, 0.5, 0)),
    *(row("look-up", "mixed", "64", 64, score) for score in (1, 0, 0, 0)),
    *(row("look-up", "mixed", "1/8", 75, score) for score in (1, 1, 1, 1)),
    row("list", "full", "all", 600, 1),
    row("list", "mixed", "64", 64, 0),
    row("list", "keydiff", "64", 64, 1),
    row("list", "mixed", "64", 64, 0, kv="q8_0/q4_0", bytes=0.05),
    row("list", "mixed", "64", 64, 0, kv="q8_0/q4_0", bytes=0.07),
    row("list", "full", "all", 600, 0, kv="q8_0/q4_0", bytes=0.40625),
    {**row("list after look-up", "full", "all", 600, 1), "suite": "pages-second"},
]


def interval(right: int, n: int) -> str:
    found = binomtest(right, n).proportion_ci(method="wilson")
    return f"{100 * right / n:.0f} ({100 * found.low:.0f}-{100 * found.high:.0f})"


def test_tables(tmp_path: Path) -> None:
    printed = report(tmp_path, ROWS)
    parts = {part.split("**")[0]: part.strip().splitlines() for part in printed.split("\n**")[1:]}
    assert list(parts) == ["pages, all tasks", "pages, look-up", "pages, list", "pages-second, list after look-up"]
    looked_up = parts["pages, look-up"]
    assert looked_up[0] == f"pages, look-up**: full cache {interval(3, 4)}, n = 4"
    assert looked_up[2:4] == ["| method | 64 | 128 | 1/8 |", "| --- | ---: | ---: | ---: |"]
    cells = looked_up[4].split(" | ")
    assert cells[0] == "| mixed"
    assert cells[1] == interval(1, 4)
    assert cells[2].startswith("62 (")  # 2.5 of 4
    assert cells[3] == f"{interval(4, 4)} |"
    listed = parts["pages, list"]
    assert listed[2] == f"full, q8_0/q4_0: {interval(0, 1)} at 0.41 of the bytes, n = 1"
    assert listed[4] == "| method | 64 |"
    assert [line.split(" | ")[0] for line in listed[6:]] == ["| mixed", "| keydiff", "| mixed, q8_0/q4_0"]
    assert parts["pages, all tasks"][0].endswith(f"full cache {interval(4, 5)}, n = 5")
    assert len(parts["pages-second, list after look-up"]) == 1  # only full caches: no table


def test_csv_and_plots(tmp_path: Path) -> None:
    report(tmp_path, ROWS, "--csv", "out.csv", "--plots", "plots")
    with (tmp_path / "out.csv").open() as file:
        written = {(line["task"], line["method"], line["budget"]): line for line in csv.DictReader(file)}
    assert len(written) == 7 + 4 + 5 + 1
    half = written["look-up", "mixed", "128"]
    assert (half["suite"], half["bytes"], half["n"], float(half["mean"])) == ("pages", "", "4", 0.625)
    one = written["all tasks", "mixed", "64"]
    found = binomtest(1, 5).proportion_ci(method="wilson")
    assert [float(one[name]) for name in ("low", "high")] == pytest.approx([found.low, found.high], abs=1e-3)
    assert written["list", "full, q8_0/q4_0", "all"]["bytes"] == "0.40625"
    assert float(written["list", "mixed, q8_0/q4_0", "64"]["bytes"]) == pytest.approx(0.06)
    plots = {path.name: path for path in (tmp_path / "plots").iterdir()}
    pairs = {"pages-all-tasks.png", "pages-look-up.png", "pages-list.png"}
    assert set(plots) == pairs | {"pages-all-tasks-bytes.png", "pages-list-bytes.png"}
    for path in plots.values():
        with Image.open(path) as picture:
            assert picture.size == (880, 440)
