"""The methods that MM-ShiftKV is compared with, in numpy, written from their descriptions; and what each may be off by.

A rule gives scores [Hkv, T] of a layer's keys from what a context holds; T prompt tokens, H query heads, Hkv KV heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_shiftkv.native.shiftkv import Method
from support import comparison, reference, selection
from support.comparison import Bounds
from support.native import GPU_LAYERS, Context, params
from support.reference import Array, Ints

_COSINE = 1e-3 if GPU_LAYERS else 1e-5
"""How much a cosine may be off."""


@dataclass(frozen=True)
class View:
    """A layer of a context, after its prompt."""

    context: Context
    layer: int
    index: int
    seq: int

    @property
    def n_past(self) -> int:
        """The position after the prompt."""
        return self.context.last_position(self.seq) + 1

    def keys(self) -> Array:
        """[Hkv, T, d]."""
        return self.context.cells(self.seq)[0].k[self.index].values(self.context.model.spec.layer_kv_heads(self.layer))

    def values(self) -> Array:
        """[Hkv, T, d]."""
        return self.context.cells(self.seq)[0].v[self.index].values(self.context.model.spec.layer_kv_heads(self.layer))


Score = Callable[[View, Mapping[str, int]], tuple[Array, Array]]
"""The scores [Hkv, T] and by how much they may be off, from a method's parameters."""


def streaming(view: View, settings: Mapping[str, int]) -> tuple[Array, Array]:
    """The later, the better."""
    n_head_kv, n_key, _ = view.keys().shape
    scores = np.tile(np.arange(n_key, dtype=float), (n_head_kv, 1))
    return scores, 0 * scores


def chance(view: View, settings: Mapping[str, int]) -> tuple[Array, Array]:
    """Uniform numbers of 24 bits: the Mersenne twister's."""
    n_head_kv, n_key, _ = view.keys().shape
    seed = (settings["seed"] + 0x9E3779B9 * (view.layer + 1)) % 2**32
    raw = np.random.RandomState(seed).randint(0, 2**32, n_head_kv * n_key, dtype=np.uint32)
    scores = ((raw >> 8) / 2**24).reshape(n_head_kv, n_key)
    return scores, 0 * scores


def snapkv(view: View, settings: Mapping[str, int]) -> tuple[Array, Array]:
    """The mean attention of the last queries, each over the keys up to its own."""
    weights, keys = view.context.model.weights, view.keys()
    queries = weights.kq_scale * view.context.queries(view.layer)[-settings["n_window"] :]
    queries = selection.rounded(queries, view.context.type_k)
    rows = []
    for query, n_seen in zip(queries, range(keys.shape[1] - len(queries) + 1, keys.shape[1] + 1), strict=True):
        row = np.zeros(keys.shape[:2])
        seen = reference.attention(query[None], keys[:, :n_seen], 1.0, weights.soft_cap)
        row[:, :n_seen] = seen[0]
        rows.append(row)
    scores = np.mean(rows, axis=0)
    return scores, 2 * selection.EPSILON * scores + 2.0**-24


def keydiff(view: View, settings: Mapping[str, int]) -> tuple[Array, Array]:
    """Minus the cosine similarity with the mean of the normalised keys."""
    keys = view.keys().astype(np.float64)
    normed = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    anchor = normed.mean(axis=1, keepdims=True)
    scores = -np.sum(normed * anchor, axis=-1) / np.linalg.norm(anchor, axis=-1)
    return scores, np.full_like(scores, _COSINE)


def expected(view: View, settings: Mapping[str, int]) -> tuple[Array, Array]:
    """The softmax of the logits' mean plus half their variance, for normally distributed queries; times value norms."""
    context, weights = view.context, view.context.model.weights
    keys, values = view.keys().astype(np.float64), view.values().astype(np.float64)
    n_head_kv, n_key, _ = keys.shape
    n_sink = min(settings["n_sink"], n_key - 1)
    hidden = context.hidden(view.layer)[-min(settings["n_window"], n_key - n_sink) :].astype(np.float64)
    positions = view.n_past + np.arange(settings["n_future"])
    projected = weights.projected(view.layer, hidden)
    queries = weights.kq_scale * np.mean(
        [weights.placed(view.layer, projected, np.full(len(hidden), p), rotated=context.rotated) for p in positions],
        axis=0,
    )
    mean = queries.mean(axis=0)
    logits = []
    for head in range(queries.shape[1]):
        k = keys[head * n_head_kv // queries.shape[1], n_sink:]
        centred = selection.rounded(queries[:, head] - mean[head], context.type_k, by_graph=True)
        linear = k @ selection.rounded(mean[head : head + 1], context.type_k, by_graph=True)[0]
        logits.append(linear + np.mean((centred @ k.T) ** 2, axis=0) / 2)
    attention = np.exp(logits - np.max(logits, axis=1, keepdims=True))
    attention /= attention.sum(axis=1, keepdims=True)
    scores = np.zeros((n_head_kv, n_key))
    scores[:, n_sink:] = attention.reshape(n_head_kv, -1, n_key - n_sink).mean(axis=1)
    scores *= np.linalg.norm(values, axis=-1)
    return scores, 10 * selection.EPSILON * scores + 2.0**-24


@dataclass(frozen=True)
class Rule:
    """One row of the table: a method, its reference, and the parameters that differ from the published ones."""

    name: str
    method: Method
    score: Score
    n_query: int = 1
    settings: Mapping[str, int] = field(default_factory=dict)

    def params(self, budget: int, **others: Any) -> Any:
        """The native parameters."""
        return params(budget, self.method, keep_scores=True, **(dict(self.settings) | others))


SNAPKV = Rule("snapkv", Method.SNAPKV, snapkv, 16, {"n_window": 16, "n_recent": 16})
EXPECTED = Rule("expected", Method.EXPECTED_ATTENTION, expected, 40, {"n_window": 40, "n_future": 100})

RULES = [
    Rule("streaming", Method.STREAMINGLLM, streaming),
    SNAPKV,
    Rule("keydiff", Method.KEYDIFF, keydiff),
    EXPECTED,
    Rule("random", Method.RANDOM, chance, settings={"seed": 7}),
]


def pooled(scores: Array, kernel: int, n: int) -> Array:
    """The first n of scores [Hkv, T] averaged over `kernel` neighbours, with zeros around them."""
    padded = np.pad(scores[:, :n], ((0, 0), (kernel // 2, kernel // 2)))
    result = scores.copy()
    result[:, :n] = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1).mean(axis=-1)
    return result


def always_kept(native: Any, n_prompt: int) -> tuple[int, int]:
    """The number of first and of last tokens that are kept in any case."""
    n_recent = min(native.n_recent, native.budget)
    return min(native.n_sink, native.budget - n_recent), n_recent


def problems(native: Any, scores: Array, tolerance: Array, kept: Ints, kept_scores: Array) -> Iterator[str]:
    """In which way the kept tokens [Hkv, C] and their scores [Hkv, T] contradict the reference's scores."""
    n_head_kv, n_prompt = scores.shape
    n_sink, n_recent = always_kept(native, n_prompt)
    n = n_prompt - n_recent
    scores, tolerance = (pooled(x, native.n_pool, n)[:, n_sink:n] for x in (scores, tolerance))
    forced = np.concatenate([np.arange(n_sink), np.arange(n, n_prompt)])
    if kept.shape != (n_head_kv, native.budget) or not np.all(np.diff(kept, axis=1) > 0):
        yield f"the kept tokens are not {native.budget} different ones, ascending: {kept}"
        return
    is_kept = np.zeros((n_head_kv, n_prompt), bool)
    np.put_along_axis(is_kept, kept, True, axis=1)
    if not is_kept[:, forced].all() or not np.all(np.isposinf(kept_scores[:, forced])):
        yield f"not all of {forced} are kept"
    off = np.abs(kept_scores[:, n_sink:n] - scores) > tolerance
    if off.any():
        yield f"{int(off.sum())} scores of {off.size}: {kept_scores[:, n_sink:n][off][:4]}, expected {scores[off][:4]}"
    # What a Bounds takes for the last token stands for all that are kept in any case.
    none, rest = np.zeros(scores.shape, int), native.budget - len(forced) + 1
    limits = Bounds(none, none, scores, tolerance)
    for name, wrong in (
        ("not kept", limits.must_keep(rest) & ~is_kept[:, n_sink:n]),
        ("kept", limits.must_drop(rest) & is_kept[:, n_sink:n]),
    ):
        if wrong.any():
            yield f"{name}: head, token - {n_sink}: {np.argwhere(wrong).tolist()}"
    # Within a device's wide bounds more may change places.
    if not GPU_LAYERS and comparison.undecided(limits, rest) > 0.05:
        yield "the comparison decides about too few keys"


def check(context: Context, rule: Rule, native: Any, seq: int = 0) -> None:
    """The context's last selection, made with `native`, is what the rule's reference says, in all layers."""
    settings = {name: getattr(native, name) for name, _ in native._fields_}
    for index, layer in enumerate(context.layers()):
        scores, tolerance = rule.score(View(context, layer, index, seq), settings)
        found = list(problems(native, scores, tolerance, context.kept(layer), context.scores(layer)))
        assert found == [], (rule.name, layer, found)
