"""The quality bench on pages, with the shipped language model: what it answers is noise, the plumbing is real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from bench_quality import budget_of, pair_share
from quality_tasks import PAGE_CELLS, cases

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
KV_TYPES = ("f16", "q8_0/q4_0")


def bench(demo: Path, *arguments: str) -> str:
    model = str(demo / "demo-text-q8_0.gguf")
    settings = ["--suite", "pages", "-m", model, "--cases", "1", "--tasks", "look-up", "--threads", "1"]
    command = [sys.executable, str(SCRIPTS / "bench_quality.py"), "run", *settings, *arguments]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_torn_run_goes_on_and_asks_nothing_twice(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages.jsonl"
    wanted = ("--methods", "keydiff", "oracle", "--budgets", "64", "1/8B", "--kv-types", *KV_TYPES, "--out", str(out))
    bench(demo, *wanted)
    whole = out.read_text()
    answers = {(row["kv"], row["method"], row["budget"]): row for row in rows(out)}
    assert set(answers) == {
        *((kv, "keydiff", budget) for kv in KV_TYPES for budget in ("64", "1/8B")),
        *((kv, "full", "all") for kv in KV_TYPES),
        *(("f16", "oracle", budget) for budget in ("64", "1/8B")),
    }
    n = answers["f16", "full", "all"]["n_prompt"]
    assert n > 24 * 24
    assert answers["f16", "keydiff", "1/8B"]["n_budget"] == n // 8
    # 8.5 and 4.5 bits instead of 16
    assert answers["q8_0/q4_0", "keydiff", "1/8B"]["n_budget"] == int(n / 8 * 32 / 13)
    assert answers["q8_0/q4_0", "keydiff", "1/8B"]["bytes"] == pytest.approx(1 / 8, abs=1e-3)
    assert answers["q8_0/q4_0", "full", "all"]["bytes"] == pytest.approx(13 / 32)

    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:40])
    bench(demo, *wanted)
    again = {(row["kv"], row["method"], row["budget"]): row["answer"] for row in rows(out)}
    assert len(rows(out)) == len(answers)
    assert again == {key: row["answer"] for key, row in answers.items()}


def test_budgets_in_pairs_and_in_bytes() -> None:
    assert pair_share("f16") == 1
    assert pair_share("q8_0") == Fraction(17, 32)
    assert pair_share("q8_0/q4_0") == Fraction(13, 32)
    assert budget_of("64", 600, "q4_0") == 64
    assert budget_of("1/8", 600, "q4_0") == 75
    assert budget_of("1/8B", 600) == 75
    assert budget_of("1/8B", 600, "q4_0") == 266  # 16 bits for 4.5


@pytest.mark.parametrize("suite", PAGE_CELLS)
def test_cases_of_pages(suite: str) -> None:
    for case in cases(suite, 3):
        assert case.images[0].size == (14 * PAGE_CELLS[suite],) * 2
        assert case.score("") == 0
        if suite == "pages-second":
            assert case.first_answer
            assert case.second_prompt != case.prompt
