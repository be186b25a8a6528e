"""Flash attention over a cache of quantized keys and values on the CPU, against numpy on what they stand for."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from support import ggml_graph

KINDS = [
    *((kind, kind) for kind in (Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.IQ4_NL)),
    *((Kind.Q8_0, Kind.Q4_0), (Kind.F16, Kind.Q4_0), (Kind.Q5_0, Kind.F16)),
]
N_HEAD, N_HEAD_KV = 4, 2


def stored(kind: Kind, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a cache has them, and the numbers that they stand for."""
    if kind == Kind.IQ4_NL:  # which gguf does not quantize: any bits do
        blocks = np.random.default_rng(3).integers(0, 256, (*values.shape[:-1], values.shape[-1] // 32, 18), np.uint8)
        blocks[..., :2] = np.array([0.01], np.float16).view(np.uint8)
        rows = blocks.reshape(*values.shape[:-1], -1)
    elif kind == Kind.F16:
        rows = values.astype(np.float16).view(np.uint8)
    else:
        rows = gguf.quants.quantize(values, kind)
    flat = gguf.quants.dequantize(rows.reshape(-1, rows.shape[-1]), kind) if kind != Kind.F16 else rows.view(np.float16)
    return rows, flat.astype(np.float64).reshape(*values.shape)


def expected(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray, softcap: float) -> np.ndarray:
    """Attention in double precision, [n, n_head, d of values]."""
    heads = []
    for head, q in enumerate(queries.astype(np.float64)):
        logits = q @ keys[head * N_HEAD_KV // N_HEAD].T / np.sqrt(q.shape[-1])
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits + mask.astype(np.float64))
        heads.append(weights / weights.sum(-1, keepdims=True) @ values[head * N_HEAD_KV // N_HEAD])
    return np.stack(heads, 1)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(kind.name for kind in kinds))
def test_a_prompt_is_read_with_the_numbers_that_are_stored(kinds: tuple[Kind, Kind], softcap: float) -> None:
    """Queries of a prompt are not rounded to eight bits, whatever the cache's types; 150 keys are no whole tiles."""
    rng = np.random.default_rng(0)
    for n, d, d_value in ((64, 64, 64), (97, 96, 32), (130, 32, 128)):
        queries = 2 * rng.normal(size=(N_HEAD, n, d)).astype(np.float32)
        keys, keys_mean = stored(kinds[0], rng.normal(size=(N_HEAD_KV, 150, d)).astype(np.float32))
        values, values_mean = stored(kinds[1], rng.normal(size=(N_HEAD_KV, 150, d_value)).astype(np.float32))
        mask = np.where(np.arange(150) > 20 + np.arange(n)[:, None], -np.inf, 0).astype(np.float16)
        wanted = expected(queries, keys_mean, values_mean, mask, softcap)
        found = [ggml_graph.attention(queries, keys, values, kinds, mask, n_threads, softcap) for n_threads in (1, 2)]
        assert np.array_equal(*found)
        assert np.abs(found[0] - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kinds", KINDS[1:], ids=lambda kinds: "-".join(kind.name for kind in kinds))
def test_a_few_tokens_get_what_they_get_one_by_one(kinds: tuple[Kind, Kind]) -> None:
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(N_HEAD, 8, 64)).astype(np.float32)
    keys, values = (stored(kind, rng.normal(size=(N_HEAD_KV, 150, 64)).astype(np.float32))[0] for kind in kinds)
    mask = np.where(np.arange(150) > 100 + np.arange(8)[:, None], -np.inf, 0).astype(np.float16)
    together = ggml_graph.attention(queries, keys, values, kinds, mask, 1)
    for i, n_threads in itertools.product(range(8), (1, 2)):
        alone = ggml_graph.attention(queries[:, i : i + 1], keys, values, kinds, mask[i : i + 1], n_threads)
        assert np.array_equal(alone[0], together[i])
