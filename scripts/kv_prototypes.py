"""Rankings that the library does not have, in numpy: what the quality bench tries before it is worth native code.

They see a context in which a prompt was decoded, the oracle also its answer, and are given to
`shiftkv.select_scores`. Those after other papers rank by keys and queries alone: terms with the values' norm are
left out.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context

Array = npt.NDArray[np.float32]

N_GROUP = 16
N_LAYER_REPEAT = 2
MASS = 0.95


@functools.lru_cache(maxsize=1)
def _file(path: Path) -> Any:
    return gguf.GGUFReader(path)  # which takes seconds for a large vocabulary


class Answered:
    """A context with a prompt of `n_prompt` tokens and the `n_decoded` tokens of its answer that were decoded.

    path: the model's GGUF file.
    """

    def __init__(self, context: Context, path: Path, n_prompt: int, n_decoded: int) -> None:
        self.n_prompt = n_prompt
        self.n_decoded = n_decoded
        self.layers = shiftkv.layers(context)
        self._context = context
        self._gguf = _file(path)
        self._tensors = {tensor.name: tensor for tensor in self._gguf.tensors}
        rope = llama.llama_model_rope_type(llama.llama_get_model(context.pointer))
        if rope not in (llama.LLAMA_ROPE_TYPE_NORM, llama.LLAMA_ROPE_TYPE_NEOX):
            raise SystemExit("prototypes know plain rotary embeddings only")
        self._interleaved = rope == llama.LLAMA_ROPE_TYPE_NORM
        architecture = self._gguf.fields["general.architecture"].contents()
        base = self._gguf.fields.get(f"{architecture}.rope.freq_base")
        self._base = float(base.contents()) if base else 10000.0

    def keys(self, layer: int, n: int | None = None) -> Array:
        """Those of the first n tokens, by default the prompt's: [n_head_kv, n, n_embd_head]."""
        keys: Array = shiftkv.keys(self._context, layer)[: n or self.n_prompt].transpose(1, 0, 2)
        return keys

    def queries(self, layer: int, *, answer: bool = False) -> Array:
        """The prompt's last ones, or the answer's: [n, n_head, n_embd_head]."""
        rows = shiftkv.queries(self._context, layer)
        n_prompt = len(rows) - self.n_decoded
        return rows[n_prompt:] if answer else rows[:n_prompt]

    def hidden(self, layer: int) -> Array:
        """What the prompt's last queries were projected from: [n, n_embd]."""
        rows = shiftkv.hidden(self._context, layer)
        return rows[: len(rows) - self.n_decoded]

    def project(self, layer: int, hidden: Array) -> Array:
        """[n, n_embd] to queries that are not rotated yet, [n, n_head, n_embd_head]."""
        queries: Array = hidden @ self._weight(f"blk.{layer}.attn_q.weight").T
        if f"blk.{layer}.attn_q.bias" in self._tensors:
            queries += self._weight(f"blk.{layer}.attn_q.bias")
        shape = shiftkv.shape(self._context, layer)
        return queries.reshape(len(hidden), shape.n_head, shape.n_embd_head)

    def rotate(self, queries: Array, positions: npt.NDArray[Any]) -> Array:
        """Turn queries [n, n_head, n_embd_head] to positions [n]; by negative ones, back."""
        half = queries.shape[-1] // 2
        angles = np.outer(positions, self._base ** (-np.arange(half) / half))[:, None]
        first, second = (..., slice(0, None, 2)), (..., slice(1, None, 2))
        if not self._interleaved:
            first, second = (..., slice(0, half)), (..., slice(half, None))
        result = np.empty_like(queries)
        result[first] = queries[first] * np.cos(angles) - queries[second] * np.sin(angles)
        result[second] = queries[first] * np.sin(angles) + queries[second] * np.cos(angles)
        return result

    def _weight(self, name: str) -> Array:
        tensor = self._tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type)


def attention(queries: Array, keys: Array, *, first: int | None = None) -> Array:
    """Weights of queries [n, n_head, d] over keys [n_head_kv, T, d]: [n_head_kv, heads of each, n, T].

    first: position of the first query, if none sees the keys behind its own.
    """
    n, _, d = queries.shape
    grouped = queries.reshape(n, len(keys), -1, d).transpose(1, 2, 0, 3)
    logits = grouped @ keys.transpose(0, 2, 1)[:, None] / math.sqrt(d)
    if first is not None:
        later = np.arange(keys.shape[1]) > first + np.arange(n)[:, None]
        logits = np.where(later, -np.inf, logits)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    result: Array = weights / weights.sum(-1, keepdims=True)
    return result


def pooled(scores: Array, kernel: int = 9) -> Array:
    """The mean over neighbouring keys, [n_head_kv, T]."""
    return np.stack([np.convolve(row, np.ones(kernel) / kernel, "same") for row in scores]).astype(np.float32)


def likeness(keys: Array) -> Array:
    """The cosine between each key [n_head_kv, T, d] and its head's mean direction: [n_head_kv, T]."""
    normed = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    anchor = normed.mean(1, keepdims=True)
    result: Array = (normed * anchor).sum(-1) / np.linalg.norm(anchor, axis=-1)
    return result


def oracle(answered: Answered, budget: int) -> dict[int, Array]:
    """Layer -> scores [n_head_kv, n_prompt]: the mean attention of the answer's own queries."""
    result = {}
    for layer in answered.layers:
        queries = answered.queries(layer, answer=True)
        keys = answered.keys(layer, answered.n_prompt + answered.n_decoded)
        weights = attention(queries, keys, first=keys.shape[1] - len(queries))
        result[layer] = weights[..., : answered.n_prompt].mean((1, 2))
    return result


@dataclass(frozen=True)
class Prototype:
    """MM-ShiftKV with other proxies, and the budget shared with other rankings.

    proxies: what they are drawn from: "scalar", the paper's mean and deviation of all that W_Q multiplies; "component",
        each component's own; "queries", the queries' mean and covariance, before their rotation; "real", which are
        queries of the prompt, chosen by chance.
    future: whether proxies are at positions after the prompt, as in the paper, or all at its last one.
    gamma: expansion of the deviation.
    observed: share of the budget for the last 8 queries' attention, averaged over 9 neighbouring keys.
    worst: whether that is the largest of the queries' and heads' attention to a key, not their mean (DefensiveKV).
    keydiff: share of the budget for KeyDiff's ranking.
    """

    proxies: str = "scalar"
    future: bool = True
    worst: bool = False
    gamma: float = 10.0
    n_proxy: int = 256
    observed: float = 0.5
    keydiff: float = 0.0
    seed: int = 0

    def __call__(self, answered: Answered, budget: int) -> dict[int, Array]:
        """Layer -> scores [n_head_kv, n_prompt]."""
        return {layer: self._scores(answered, layer, budget) for layer in answered.layers}

    def _scores(self, answered: Answered, layer: int, budget: int) -> Array:
        keys = answered.keys(layer)
        window = answered.queries(layer)[-8:]
        seen = attention(window, keys, first=answered.n_prompt - len(window))
        last = seen.mean(1)[:, -1]
        observed = pooled(seen.max((1, 2)) if self.worst else seen.mean((1, 2)))
        mass = attention(self._draw(answered, layer), keys).mean(1)
        n_kv, n, n_key = mass.shape
        if layer < N_LAYER_REPEAT:
            groups = mass.mean(1, keepdims=True).repeat(N_GROUP, 1)
        else:
            size = n // N_GROUP
            groups = (mass.reshape(n_kv, size, N_GROUP, n_key).sum(1) + last[:, None]) / (1 + size)
        scores = self._votes(groups) + last
        difference = -likeness(keys)
        taken = np.zeros(scores.shape, bool)
        taken[:, -1] = True
        for share, ranking in ((self.observed, observed), (self.keydiff, difference)):
            best = np.argsort(np.where(taken, np.inf, -ranking), axis=-1, kind="stable")[:, : round(share * budget)]
            np.put_along_axis(taken, best, True, axis=-1)
        return np.where(taken, 1e6, scores).astype(np.float32)

    def _draw(self, answered: Answered, layer: int) -> Array:
        """Proxies [n, n_head, n_embd_head]; in the first layers copies of the last query, as in the paper."""
        rng = np.random.default_rng((self.seed, layer))
        if layer < N_LAYER_REPEAT:
            plain = answered.project(layer, answered.hidden(layer)[-1:]).repeat(N_GROUP, 0)
        elif self.proxies == "queries":
            rows = answered.queries(layer)
            rows = answered.rotate(rows, -np.arange(answered.n_prompt - len(rows), answered.n_prompt))
            mean = rows.mean(0)
            mix = rng.standard_normal((self.n_proxy, len(rows)), np.float32) / np.float32(math.sqrt(len(rows)))
            plain = mean + self.gamma * np.einsum("pn,nhd->phd", mix, rows - mean, optimize=True)
        elif self.proxies == "real":
            rows = answered.queries(layer)
            rows = answered.rotate(rows, -np.arange(answered.n_prompt - len(rows), answered.n_prompt))
            plain = rows[rng.integers(len(rows), size=self.n_proxy)]
        else:
            rows = answered.hidden(layer)
            axis = 0 if self.proxies == "component" else None
            noise = rng.standard_normal((self.n_proxy, rows.shape[1]), np.float32)
            plain = answered.project(layer, rows.mean(axis) + self.gamma * rows.std(axis) * noise)
        step = np.arange(len(plain)) // N_GROUP
        positions = answered.n_prompt + (step + 1) * N_GROUP if self.future else step * 0 + answered.n_prompt - 1
        return answered.rotate(plain.astype(np.float32), positions)

    @staticmethod
    def _votes(mass: Array) -> Array:
        """In how many groups of [n_head_kv, n_group, T] a key belongs to the smallest set that holds MASS."""
        order = np.argsort(-mass, axis=-1, kind="stable")
        ordered = np.take_along_axis(mass, order, axis=-1)
        before = ordered.cumsum(-1) - ordered
        in_set = np.zeros(mass.shape, np.float32)
        np.put_along_axis(in_set, order, (before < MASS * mass.sum(-1, keepdims=True)).astype(np.float32), axis=-1)
        votes: Array = in_set.sum(1)
        return votes


Ranking = Callable[[Answered, int], dict[int, Array]]


def _window(answered: Answered, layer: int, n: int) -> Array:
    """The attention of the last n queries: [n_head_kv, heads of each, n, T]."""
    queries = answered.queries(layer)[-n:]
    return attention(queries, answered.keys(layer), first=answered.n_prompt - len(queries))


def defensive(answered: Answered, budget: int) -> dict[int, Array]:
    """SnapKV's window with the largest attention in place of the mean: DefensiveKV, arXiv:2510.13334."""
    return {layer: pooled(_window(answered, layer, 8).max((1, 2))) for layer in answered.layers}


def mixkv(answered: Answered, budget: int) -> dict[int, Array]:
    """The window's attention, and keys unlike the mean by how alike the head's keys are: MixKV, arXiv:2510.20707."""
    result = {}
    for layer in answered.layers:
        seen, alike = pooled(_window(answered, layer, 8).mean((1, 2))), likeness(answered.keys(layer))
        unlike = 1 - _unit(alike)
        weight = np.clip(alike.mean(-1, keepdims=True), 0, 1)
        unlike *= _unit(seen).mean(-1, keepdims=True) / unlike.mean(-1, keepdims=True)
        result[layer] = weight * unlike + (1 - weight) * _unit(seen)
    return result


def _unit(scores: Array) -> Array:
    low, high = scores.min(-1, keepdims=True), scores.max(-1, keepdims=True)
    result: Array = (scores - low) / np.maximum(high - low, 1e-12)
    return result


def tgv(answered: Answered, budget: int, n_text: int = 32) -> dict[int, Array]:
    """The question's attention, each token's by what later ones pay to it: TGV-KV, arXiv:2606.03075."""
    result = {}
    for layer in answered.layers:
        seen = _window(answered, layer, n_text).mean((0, 1))
        paid = np.tril(seen[:, -seen.shape[0] :], -1)
        weight = paid.sum(0) / np.maximum(np.arange(len(paid))[::-1], 1)
        heads = _window(answered, layer, n_text).mean(1)
        result[layer] = np.einsum("t,htk->hk", weight / weight.sum(), heads)
    return result


def bacon(answered: Answered, budget: int) -> dict[int, Array]:
    """The window, and the last query where neighbours and adjacent layers agree: BACON, arXiv:2606.14782."""
    seen = {layer: _window(answered, layer, 8).mean(1) for layer in answered.layers}
    result = {}
    for i, layer in enumerate(answered.layers):
        last = seen[layer][:, -1]
        peak = last > last.mean(-1, keepdims=True)
        near = pooled(peak.astype(np.float32), 3) > 0.5
        others = [seen[other][:, -1].mean(0) for other in answered.layers[max(0, i - 1) : i + 2] if other != layer]
        agreed = np.all([other > other.mean() for other in others], axis=0)
        result[layer] = pooled(seen[layer].mean(1)) + np.where(peak & near & agreed, last, 0)
    return result


def compactor(answered: Answered, budget: int, chunk: int = 256) -> dict[int, Array]:
    """Leverage of the keys before their rotation, and attention of all to all in chunks: Compactor, arXiv:2507.08143.

    Only the last 512 queries are there: the first keys of longer prompts have leverage alone.
    """
    result = {}
    for layer in answered.layers:
        keys = answered.keys(layer)
        plain = answered.rotate(keys.transpose(1, 0, 2), -np.arange(answered.n_prompt)).transpose(1, 0, 2)
        centred = plain - plain.mean(1, keepdims=True)
        inverse = np.linalg.pinv(centred.transpose(0, 2, 1) @ centred)
        leverage = np.einsum("htd,hde,hte->ht", centred, inverse, centred)
        queries = answered.queries(layer)
        received = np.zeros(leverage.shape, np.float32)
        first = answered.n_prompt - len(queries)
        for start in range(first, answered.n_prompt, chunk):
            stop = min(start + chunk, answered.n_prompt)
            weights = attention(queries[start - first : stop - first], keys[:, start:stop])
            received[:, start:stop] = weights.mean(1).sum(1)
        received = pooled(received, 3)
        share = 1 - budget / answered.n_prompt
        result[layer] = (_standard(leverage) * share + _standard(received)).astype(np.float32)
    return result


def asked(context: Context, questions: Sequence[Sequence[int]], n_prompt: int, position: int) -> dict[int, Array]:
    """What questions that are likely to come attend to: the largest weight of any of their tokens, as in KVzip.

    questions: the tokens of each, which are decoded after the prompt and removed again.
    """
    result: dict[int, Array] = {}
    for tokens in questions:
        context.decode(tokens, position)
        for layer in shiftkv.layers(context):
            queries = shiftkv.queries(context, layer)[-len(tokens) :]
            keys = shiftkv.keys(context, layer).transpose(1, 0, 2)
            weights = attention(queries, keys, first=n_prompt)[..., :n_prompt].max((1, 2))
            result[layer] = np.maximum(result.get(layer, 0), weights)
        context.remove(position)
    return result


def _standard(scores: Array) -> Array:
    result: Array = (scores - scores.mean(-1, keepdims=True)) / scores.std(-1, keepdims=True)
    return result


_NAMED: dict[str, Ranking] = {
    "defensive": defensive,
    "mixkv": mixkv,
    "tgv": tgv,
    "bacon": bacon,
    "compactor": compactor,
}


def prototype(settings: str) -> Ranking:
    """The prototype of settings such as ``proxies="component",gamma=3``, or a ranking after another paper by name."""
    if settings in _NAMED:
        return _NAMED[settings]
    values: dict[str, Any] = {}
    for setting in settings.split(",") if settings else ():
        name, value = setting.split("=")
        values[name] = value if name == "proxies" else json.loads(value)
    return Prototype(**values)
