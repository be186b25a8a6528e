"""Refitted values: the fit against numpy's least squares, what is written into a cache against what is read there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from bench_quality import Asker, ask, method_of
from kv_refit import Refit, State, Whole, attention_to, by_head, ridge_fit
from quality_tasks import cases
from support.kv_state import parse

from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context
from edge_shiftkv.selection.methods import method

N_KEPT = 40
SEQUENCE = 1
TOKEN = 7


@dataclass
class Cut:
    """A question about a picture, and what KeyDiff keeps of it in the second of three sequences."""

    large: Context
    small: Context
    whole: Whole
    kept: dict[int, npt.NDArray[np.int32]]
    position: int

    def logits(self) -> npt.NDArray[np.float32]:
        """After one more token, which is taken back."""
        self.small.decode_rows([(TOKEN, self.position, SEQUENCE)])
        result: npt.NDArray[np.float32] = self.small.logits(0).copy()
        self.small.remove(self.position, SEQUENCE)
        return result


@pytest.fixture
def cut(demo: Path) -> Iterator[Cut]:
    asker = Asker(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", 1)
    with closing(asker), closing(asker.prompt(next(cases("demo", 1)))) as prompt:
        prefilled = asker.read(prompt, 8)
        small = asker.engine.context(N_KEPT + 8, 8, n_outputs=8, n_seq=3)
        with closing(prefilled.context) as large, closing(small):
            prefilled.select(method("keydiff"), N_KEPT)
            position = prefilled.hand_over(small, SEQUENCE)
            whole = Whole(large, asker.path, prompt.n_tokens)
            yield Cut(large, small, whole, shiftkv.kept(large), position)


def test_the_fit_is_the_least_squares_of_both_terms() -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(12), 30)
    old, wanted = rng.standard_normal((12, 5)), rng.standard_normal((30, 5))
    cost = 0.3 * np.square(weights).sum() / 12
    both = np.concatenate([weights, np.sqrt(cost) * np.eye(12)])
    expected = np.linalg.lstsq(both, np.concatenate([wanted, np.sqrt(cost) * old]), rcond=None)[0]
    np.testing.assert_allclose(ridge_fit(old, weights, wanted, 0.3), expected, atol=1e-9)
    np.testing.assert_allclose(ridge_fit(old, weights, wanted, 1e9), old, atol=1e-6)
    np.testing.assert_array_equal(ridge_fit(old, np.zeros((30, 12)), np.zeros((30, 5)), 0.3), old)


def test_attention_is_softmax_over_the_keys_that_a_query_sees() -> None:
    rng = np.random.default_rng(1)
    queries, keys = rng.standard_normal((3, 4, 8)), rng.standard_normal((2, 5, 8))
    places, positions = np.array([[0, 1, 2, 3, 4], [1, 2, 3, 7, 9]]), np.array([0, 3, 8])
    found = attention_to(queries, positions, keys, places).reshape(2, 2, 3, 5)
    for head in range(4):
        for i in range(3):
            seen = places[head // 2] <= positions[i]
            weights = np.where(seen, np.exp(keys[head // 2] @ queries[i, head] / np.sqrt(8)), 0)
            expected = weights / max(weights.sum(), 1e-30)
            np.testing.assert_allclose(found[head // 2, head % 2, i], expected, atol=1e-9)


def test_what_is_stored_unchanged_changes_nothing(cut: Cut) -> None:
    before, logits = State(cut.small, SEQUENCE), cut.logits()
    before.store()
    assert State(cut.small, SEQUENCE).bytes() == before.bytes()
    np.testing.assert_array_equal(cut.logits(), logits)


def test_a_cost_without_end_writes_the_values_that_were_there(cut: Cut) -> None:
    before, logits = State(cut.small, SEQUENCE).bytes(), cut.logits()
    cut.whole.write(Refit(ridge=1e12), cut.kept, cut.small, SEQUENCE)
    assert State(cut.small, SEQUENCE).bytes() == before
    np.testing.assert_array_equal(cut.logits(), logits)


@pytest.mark.parametrize("queries", ["real", "proxies"])
def test_what_is_written_is_the_fit_and_nothing_else(cut: Cut, queries: str) -> None:
    refit = Refit(queries, n=32, ridge=0.01)
    (before,), logits = parse(State(cut.small, SEQUENCE).bytes(), has_extent=False), cut.logits()
    cut.whole.write(refit, cut.kept, cut.small, SEQUENCE)
    (after,) = parse(State(cut.small, SEQUENCE).bytes(), has_extent=False)
    (large,) = parse(State(cut.large).bytes(), has_extent=False)
    np.testing.assert_array_equal(after.positions, before.positions)
    for i, (layer, kept) in enumerate(cut.kept.items()):
        n = len(kept)
        assert after.k[i].raw.tobytes() == before.k[i].raw.tobytes()
        np.testing.assert_array_equal(after.v[i].values(n), cut.whole.fitted(refit, layer, kept).astype(np.float16))
        np.testing.assert_array_equal(by_head(State(cut.large).values[i], n), large.v[i].values(n))
        np.testing.assert_array_equal(large.k[i].values(n), cut.whole.answered.keys(layer))
    assert np.abs(cut.logits() - logits).max() > 1e-3


def test_attention_comes_nearer_to_that_on_the_whole_prompt(cut: Cut) -> None:
    """For the queries that the values were fitted to, in every head."""
    for layer, kept in cut.kept.items():
        queries, positions, wanted = cut.whole.references(layer, "proxies", 256)
        keys = np.take_along_axis(cut.whole.answered.keys(layer), kept[..., None], 1)
        weights = attention_to(queries, positions, keys, kept)
        old = np.take_along_axis(cut.whole.values[layer], kept[..., None], 1)
        new = cut.whole.fitted(Refit("proxies", n=256, ridge=0.01), layer, kept)
        error = [np.square(weights @ values - wanted).sum((1, 2)) for values in (old, new)]
        assert (error[1] < 0.9 * error[0]).all()


def test_the_bench_refits_what_is_named_so(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the answer, in the sequence that it is written in: values of zero leave nothing to read."""
    seen = []

    def spy(self: Whole, refit: Refit, kept: dict[int, npt.NDArray[np.int32]], context: Context, sequence: int) -> None:
        seen.append(refit)
        state = State(context, sequence)
        for rows in state.values:
            rows[:] = 0
        state.store()

    monkeypatch.setattr(Whole, "write", spy)
    labels = ["keydiff", "keydiff+refit:queries=proxies,n=64,ridge=0.5"]
    methods = {label: method_of(label) for label in labels}
    with closing(Asker(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", 1)) as asker:
        rows = list(ask(asker, "demo", next(cases("demo", 1)), methods, ["256"], set()))
    assert seen == [Refit("proxies", 64, 0.5)]
    answers = {row["method"]: row["answer"] for row in rows}
    assert answers["keydiff"] == answers["full"] != answers[labels[1]]
