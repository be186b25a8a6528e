"""The shipped model, on documents that training never drew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_documents import TASKS, Document, Question, make_document

from edge_shiftkv import Runtime

DOCUMENTS = 12


@pytest.fixture(scope="module")
def reader(demo: Path) -> Iterator[Runtime]:
    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf") as runtime:
        yield runtime


def one_per_task(document: Document) -> dict[str, Question]:
    return {item.task: item for item in reversed(document.questions())}


def score(reader: Runtime, task: str, share: float) -> int:
    right = 0
    for seed in range(DOCUMENTS):
        document = make_document(seed)
        item = one_per_task(document)[task]
        n_prompt = 256 + len(item.question) + 8  # within a token or two; what counts is the share
        reader.kv_budget = None if share == 1 else int(share * n_prompt)
        answer = reader.generate(item.question, [document.pil_image()], max_tokens=160, temperature=0.0)
        right += answer.text == item.answer
    return right


@pytest.mark.parametrize("task", TASKS)
def test_it_reads_with_the_full_cache(reader: Runtime, task: str) -> None:
    assert score(reader, task, 1) >= DOCUMENTS - 2


def test_it_reads_with_half_the_cache(reader: Runtime) -> None:
    """A quarter of the answers would be lost by chance alone long before this; figures are in models/demo/README.md."""
    assert sum(score(reader, task, 0.5) for task in TASKS) >= DOCUMENTS


def test_budgets_above_the_prompt_change_nothing(reader: Runtime) -> None:
    document = make_document(1)
    item = one_per_task(document)["transcribe"]
    reader.kv_budget = None
    full = reader.generate(item.question, [document.pil_image()], temperature=0.0)
    reader.kv_budget = 100_000
    assert reader.generate(item.question, [document.pil_image()], temperature=0.0).text == full.text
