"""The reference's ranking of what a context holds, and whether the library's agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import gguf
import numpy as np

from support import comparison, reference
from support.comparison import Bounds
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


def rankings(context: Context, settings: Settings, n_past: int, seq: int = 0) -> Iterator[tuple[int, Ranking]]:
    """Rank the captured sequence by the reference: keys from the cache, hidden states from the capture."""
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
        queries = weights.queries(layer, hidden, positions, rotated=context.rotated)
        queries = rounded(weights.kq_scale * queries, context.type_k)
        attention = reference.attention(queries, k, 1.0, weights.soft_cap)
        yield layer, reference.rank(attention[:-1], attention[-1], n_group)


def rounded(queries: Array, type_k: str) -> Array:
    """Queries as the CPU backend multiplies them with keys of a type."""
    kind = _MULTIPLIED_WITH.get(type_k)
    if kind is None or GPU_LAYERS:
        return queries
    quant = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(queries.astype(np.float32), quant), quant)


def bounds(context: Context, settings: Settings, n_past: int, seq: int = 0) -> dict[int, Bounds]:
    """What the reference allows, by layer."""
    ranked = rankings(context, settings, n_past, seq)
    return {layer: comparison.bounds(ranking, settings.mass, EPSILON) for layer, ranking in ranked}


def problems(context: Context, allowed: dict[int, Bounds], budget: int) -> list[str]:
    """In which way the context's last selection contradicts the reference, over all layers and KV heads."""
    return [
        f"layer {layer}, {problem}"
        for layer, limits in allowed.items()
        for problem in comparison.problems(limits, budget, context.kept(layer), context.scores(layer))
    ]
