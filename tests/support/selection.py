"""The reference's ranking of what a context holds, and whether the library's agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import gguf
import numpy as np

from support import comparison, reference
from support.comparison import Bounds
from support.gguf_random import Spec
from support.native import GPU_LAYERS, Context, params
from support.reference import Array, Ranking, Settings

EPSILON = 2e-2 if GPU_LAYERS else 5e-4
"""How much an attention weight may differ, relative to itself.

On the CPU products are summed in single precision, and the query is rounded to what the keys' type is multiplied with,
which the reference repeats. GPU backends round elsewhere.
"""

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
) -> Iterator[tuple[int, Ranking]]:
    """Rank the captured sequence by the reference: keys from the cache, hidden states from the capture."""
    weights = context.model.weights
    cells = context.cells(seq)[0]
    for index, layer in enumerate(context.layers()):
        k = cells.k[index].values(weights.spec.n_head_kv)
        last_hidden = context.hidden(layer)[-1].astype(np.float64)
        stats = context.stats(layer, settings.n_stat)
        repeat = index < settings.n_layer_repeat
        hidden, positions, n_group = reference.proxies(settings, stats, last_hidden, n_past, repeat)
        hidden = np.concatenate([hidden, last_hidden[None]])
        positions = np.append(positions, n_past - 1)
        hidden = hidden.astype(activation).astype(np.float64)
        queries = weights.queries(layer, hidden, positions, rotated=context.rotated)
        queries = rounded(queries, context.type_k)
        attention = reference.attention(queries, k, weights.kq_scale, weights.soft_cap)
        yield layer, reference.rank(attention[:-1], attention[-1], n_group)


def rounded(queries: Array, type_k: str) -> Array:
    """Queries as the CPU backend multiplies them with keys of a type."""
    kind = _MULTIPLIED_WITH.get(type_k)
    if kind is None or GPU_LAYERS:
        return queries
    quant = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(queries.astype(np.float32), quant), quant)


def bounds(
    context: Context, settings: Settings, n_past: int, seq: int = 0, activation: type[np.floating] = np.float32
) -> dict[int, Bounds]:
    """What the reference allows, by layer."""
    ranked = rankings(context, settings, n_past, seq, activation)
    return {layer: comparison.bounds(ranking, settings.mass, EPSILON) for layer, ranking in ranked}


def problems(context: Context, allowed: dict[int, Bounds], budget: int) -> list[str]:
    """In which way the context's last selection contradicts the reference, over all layers and KV heads."""
    return [
        f"layer {layer}, {problem}"
        for layer, limits in allowed.items()
        for problem in comparison.problems(limits, budget, context.kept(layer), context.scores(layer))
    ]
