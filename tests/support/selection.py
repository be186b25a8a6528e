"""The reference's ranking of what a context holds, and whether the library's agrees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace

import gguf
import numpy as np

from edge_shiftkv.build.options import cpu_features
from support import comparison, reference
from support.comparison import Bounds
from support.gguf_random import Spec
from support.native import GPU_LAYERS, Context, params
from support.reference import Array, Ranking, Settings

EPSILON = 2e-2 if GPU_LAYERS else 5e-4
"""How much an attention weight may differ, relative to itself.

On the CPU products are summed in single precision, and the query is rounded to what the keys' type is multiplied with,
which the reference repeats; `open_weights` has what that leaves open. GPU backends round elsewhere.
"""

ON_HOST = not GPU_LAYERS and "LLAMA_SHIFTKV_GRAPH" not in os.environ
"""Whether attention is summed by the kernel for keys in host memory, not by llama.cpp's operations."""

PAIRS = ON_HOST and os.environ.get("LLAMA_SHIFTKV_ISA", "vnni") == "vnni" and "avx512_vnni" in cpu_features().split()
"""Whether that kernel multiplies integers, for the proxies."""

_NOISE = 1e-6
"""How much a number of a query may differ, of the query's size: sums of a few hundred products in single precision."""

_MULTIPLIED_WITH = {"q8_0": "Q8_0", "q4_0": "Q8_0", "bf16": "BF16", "f16": "F16"}


def native_params(settings: Settings, budget: int) -> object:
    """The library's parameters for the reference's settings."""
    return params(budget, keep_scores=True, **asdict(settings))


def activations(spec: Spec) -> list[type[np.floating]]:
    """What kernels may round to before they multiply with a model's weights; each multiplies all with one of them.

    With f16 weights the plain CPU kernels multiply f16, and AMX's multiply f32.
    """
    half = spec.weight_type == gguf.GGMLQuantizationType.F16
    return [np.float16, np.float32] if half else [np.float32]


def rankings(
    context: Context, settings: Settings, n_past: int, seq: int = 0, activation: type[np.floating] = np.float32
) -> Iterator[tuple[int, Ranking, Ranking]]:
    """Rank the captured sequence by the reference: keys from the cache, hidden states from the capture.

    Gives layer, ranking, and how much each of its numbers may be off.
    """
    weights = context.model.weights
    cells = context.cells(seq)[0]
    for index, layer in enumerate(context.layers()):
        k = cells.k[index].values(weights.spec.layer_kv_heads(layer))
        last_hidden = context.hidden(layer)[-1].astype(np.float64)
        stats = context.stats(layer, settings.n_stat)
        repeat = index < settings.n_layer_repeat
        hidden, positions, n_group = reference.proxies(settings, stats, last_hidden, n_past, repeat)
        hidden = np.concatenate([hidden, last_hidden[None]])
        positions = np.append(positions, n_past - 1)
        if context.model.n_pos > 1:  # in M-RoPE the last token may be an image's, which has a row and a column
            positions = np.repeat(positions[:, None], 3, axis=1)
            positions[-1] = cells.positions[-1]
        hidden = hidden.astype(activation).astype(np.float64)
        queries = weights.kq_scale * weights.queries(layer, hidden, positions, rotated=context.rotated)
        attention = reference.attention(rounded(queries, context.type_k), k, 1.0, weights.soft_cap)
        if PAIRS:
            attention[:-1] = reference.attention(paired(queries[:-1]), paired(k), 1.0, weights.soft_cap)
        ranking = reference.rank(attention[:-1], attention[-1], n_group)
        error = comparison.relative(ranking, EPSILON)
        # Among the many queries behind a mass a few that are rounded otherwise do not count.
        last = open_weights(queries[-1:], k, context.type_k, attention[-1:], 1.0)[0, :, :-1]
        yield layer, ranking, replace(error, last=np.maximum(error.last, last))


def rounded(queries: Array, type_k: str, *, by_graph: bool = not ON_HOST) -> Array:
    """Queries as the CPU backend multiplies them with keys of a type; our own kernel leaves them as they are."""
    kind = _MULTIPLIED_WITH.get(type_k)
    if kind is None or GPU_LAYERS or not by_graph:
        return queries
    quant = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(queries.astype(np.float32), quant), quant)


def paired(x: Array) -> Array:
    """Queries or keys as integers: rounded to a 32767th of their length."""
    step = np.maximum(np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True), 1e-30) / 32767
    return np.rint(x / step) * step


def open_weights(queries: Array, k: Array, type_k: str, attention: Array, scale: float) -> Array:
    """How much attention weights [n, Hkv, T] may differ by how queries [n, H, d] are rounded, over keys k [Hkv, T, d].

    A number as good as halfway between two of its type may become either one.
    """
    if type_k not in _MULTIPLIED_WITH or GPU_LAYERS or ON_HOST:
        return 0 * attention
    size = _NOISE * np.sqrt(np.mean(np.square(queries), axis=-1, keepdims=True))
    nearby = (queries - size, queries + size, queries * (1 - _NOISE), queries * (1 + _NOISE))
    variants = [rounded(x, type_k) for x in nearby]
    step = np.max(variants, axis=0) - np.min(variants, axis=0)
    # Heads are averaged: the one that is off most stands for all of a KV head.
    step = step.reshape(len(step), len(k), -1, k.shape[-1]).max(axis=2)
    # What is the same for all keys does not change their weights.
    apart = np.abs(k - k.mean(axis=1, keepdims=True)).astype(np.float64)
    logits = scale * np.einsum("nhd,htd->nht", step, apart)
    return attention * (logits + np.sum(attention * logits, axis=-1, keepdims=True))


def bounds(
    context: Context, settings: Settings, n_past: int, seq: int = 0, activation: type[np.floating] = np.float32
) -> dict[int, Bounds]:
    """What the reference allows, by layer."""
    ranked = rankings(context, settings, n_past, seq, activation)
    return {layer: comparison.bounds(ranking, settings.mass, error) for layer, ranking, error in ranked}


def problems(context: Context, allowed: dict[int, Bounds], budget: int) -> list[str]:
    """In which way the context's last selection contradicts the reference, over all layers and KV heads."""
    return [
        f"layer {layer}, {problem}"
        for layer, limits in allowed.items()
        for problem in comparison.problems(limits, budget, context.kept(layer), context.scores(layer))
    ]
