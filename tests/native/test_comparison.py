"""The comparison with the reference can fail: for a reference that is wrong in any one place, it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import comparison, reference, selection
from support.cases import FEW, GEMMA2, QWEN2, QWEN3, Case, Load, selected
from support.gguf_random import Spec
from support.native import Context
from support.reference import Array, Ints, Ranking, Settings
from support.weights import Weights

YARN = Spec(
    meta={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024}
)
ROTATED = Spec(n_head=2, n_head_kv=1, d_head=64)

Patch = Callable[[pytest.MonkeyPatch], None]


def problems(context: Context, settings: Settings, n_past: int, budget: int) -> list[str]:
    return selection.problems(context, selection.bounds(context, settings, n_past), budget)


def check_fails(load: Load, case: Case, wrong: Settings | int, patch: Patch | None = None) -> None:
    """The true reference agrees with the selection; the wrong one, other settings or n_past, does not."""
    with selected(load(case.spec), case) as context:
        n_past = context.last_position() + 1
        assert problems(context, case.settings, n_past, case.budget) == []
        settings = wrong if isinstance(wrong, Settings) else case.settings
        n_past += wrong if isinstance(wrong, int) else 0
        with pytest.MonkeyPatch.context() as monkeypatch:
            if patch:
                patch(monkeypatch)
            assert problems(context, settings, n_past, case.budget) != []


@pytest.mark.parametrize(
    "change",
    [
        {"n_proxy": 112},
        {"n_group": 32},
        {"n_stat": 100},
        {"n_layer_repeat": 1},
        {"n_layer_repeat": 3},
        {"n_repeat": 15},
        {"gamma": 9.9},
        {"mass": 0.94},
        {"seed": 1},
    ],
    ids=str,
)
def test_wrong_settings_are_noticed(load: Load, change: dict[str, Any]) -> None:
    check_fails(load, Case("", settings=FEW), replace(FEW, **change))


@pytest.mark.parametrize("offset", [-1, 1, 16])
def test_wrong_positions_are_noticed(load: Load, offset: int) -> None:
    check_fails(load, Case(""), offset)


def other_head_order(attention: Callable[..., Array]) -> Callable[..., Array]:
    def wrong(q: Array, k: Array, *others: float) -> Array:
        n, n_head, d = q.shape
        return attention(q.reshape(n, -1, len(k), d).swapaxes(1, 2).reshape(n, n_head, d), k, *others)

    return wrong


def without_last_key(attention: Callable[..., Array]) -> Callable[..., Array]:
    def wrong(q: Array, k: Array, *others: float) -> Array:
        weights = attention(q, k[:, :-1], *others)
        return np.concatenate([weights, np.zeros_like(weights[..., :1])], axis=-1)

    return wrong


def other_sample_order(proxies: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*arguments: Any) -> Any:
        hidden, positions, n_group = proxies(*arguments)
        order = np.arange(len(hidden)).reshape(-1, n_group).T.ravel()
        return hidden[order], positions, n_group

    return wrong


def without_last_query(rank: Callable[..., Ranking]) -> Callable[..., Ranking]:
    def wrong(proxy_attention: Array, last_attention: Array, n_group: int) -> Ranking:
        return replace(rank(proxy_attention, 0 * last_attention, n_group), last=last_attention[:, :-1])

    return wrong


def other_last_query(rank: Callable[..., Ranking]) -> Callable[..., Ranking]:
    def wrong(proxy_attention: Array, last_attention: Array, n_group: int) -> Ranking:
        return replace(rank(proxy_attention, last_attention, n_group), last=proxy_attention[0, :, :-1])

    return wrong


def standard_noise(_: Callable[..., Array]) -> Callable[..., Array]:
    return lambda seed, n_proxy, n_embd: np.random.RandomState(seed).standard_normal((n_proxy, n_embd))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("attention", other_head_order),
        ("attention", without_last_key),
        ("proxies", other_sample_order),
        ("rank", without_last_query),
        ("rank", other_last_query),
        ("noise", standard_noise),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_wrong_steps_are_noticed(load: Load, part: str, change: Callable[[Any], Any]) -> None:
    check_fails(load, Case(""), 0, lambda patch: patch.setattr(reference, part, change(getattr(reference, part))))


def without(suffix: str) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        read = Weights.has
        monkeypatch.setattr(Weights, "has", lambda self, name: read(self, name) and not name.endswith(suffix))

    return patch


def without_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.weights.rotate", lambda x: x)


def unscaled_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "rope_scaling", None)


def other_rope_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.weights._ROPE_PAIRS_ADJACENT", frozenset())


def uncapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "soft_cap", 0.0)


@pytest.mark.parametrize(
    ("case", "patch"),
    [
        (Case("bias", QWEN2), without("attn_q.bias")),
        (Case("q-norm", QWEN3), without("attn_q_norm.weight")),
        (Case("yarn", YARN), unscaled_rope),
        (Case("rope-pairs"), other_rope_pairs),
        (Case("soft-cap", GEMMA2), uncapped),
        (Case("rotation", ROTATED, type_k="q8_0"), without_rotation),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_wrong_query_paths_are_noticed(load: Load, case: Case, patch: Patch) -> None:
    check_fails(load, case, 0, patch)


def random_ranking(seed: int, ties: bool) -> Ranking:
    rng = np.random.default_rng(seed)
    mass = rng.dirichlet(np.full(50, 0.2), (2, 8))
    last = rng.dirichlet(np.full(50, 0.2), 2)
    return Ranking(np.round(mass, 3), np.round(last, 3)) if ties else Ranking(mass, last)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_without_tolerance_are_the_votes(seed: int) -> None:
    ranking = random_ranking(seed, ties=False)
    limits = comparison.bounds(ranking, 0.95, comparison.relative(ranking, 0.0))
    expected = reference.votes(ranking.mass, 0.95)
    assert np.array_equal(limits.votes_min, expected)
    assert np.array_equal(limits.votes_max, expected)
    kept = reference.select(expected + ranking.last, 12)
    scores = np.pad(expected + ranking.last, ((0, 0), (0, 1)), constant_values=np.inf)
    assert comparison.problems(limits, 12, kept, scores) == []
    assert comparison.undecided(limits, 12) == 0


@pytest.mark.parametrize("seed", range(5))
def test_bounds_cover_ties_and_rounding(seed: int) -> None:
    ranking = random_ranking(seed, ties=True)
    limits = comparison.bounds(ranking, 0.95, comparison.relative(ranking, 1e-3))
    rng = np.random.default_rng(seed)
    for _ in range(20):
        mass, last = (x * (1 + 1e-3 * rng.uniform(-1, 1, x.shape)) for x in (ranking.mass, ranking.last))
        scores = reference.votes(mass, 0.95) + last
        padded = np.pad(scores, ((0, 0), (0, 1)), constant_values=np.inf)
        assert comparison.problems(limits, 12, reference.select(scores, 12), padded) == []


def broken(kept: Ints, how: str) -> Ints:
    kept = kept.copy()
    if how == "swapped":
        kept[0, 0] = next(i for i in range(50) if i not in kept[0])
        kept[0].sort()
    elif how == "unordered":
        kept[0, :2] = kept[0, 1::-1]
    elif how == "last-missing":
        kept[0, -1] -= 1 + (kept[0, -2] == kept[0, -1] - 1)
    elif how == "fewer":
        kept = kept[:, 1:]
    return kept


@pytest.mark.parametrize("how", ["swapped", "unordered", "last-missing", "fewer"])
def test_wrong_kept_sets_are_noticed(how: str) -> None:
    ranking = random_ranking(0, ties=False)
    limits = comparison.bounds(ranking, 0.95, comparison.relative(ranking, 1e-3))
    kept = reference.select(reference.votes(ranking.mass, 0.95) + ranking.last, 12)
    assert comparison.problems(limits, 12, kept, None) == []
    assert comparison.problems(limits, 12, broken(kept, how), None) != []
