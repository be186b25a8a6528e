"""MM-ShiftKV in numpy, written from the description of the method: step by step, for one layer.

It is given what it cannot know by itself: the keys in the cache, the model's query path, the hidden states. Shapes: T
prompt tokens; N proxies in G groups of g = N / G; H query heads; Hkv KV heads with r = H / Hkv query heads each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Settings:
    """The method's parameters, with the paper's values."""

    n_proxy: int = 512
    n_group: int = 16
    n_stat: int = 512
    n_layer_repeat: int = 2
    n_repeat: int = 16
    gamma: float = 10.0
    mass: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Ranking:
    """What a layer's keys are ranked by: of all the prompt's tokens but the last, which is kept in any case."""

    mass: Array
    """[Hkv, G, T - 1]: the attention mass in each group."""
    last: Array
    """[Hkv, T - 1]: the attention of the real last query."""


def noise(seed: int, n_proxy: int, n_embd: int) -> Array:
    """Standard normal numbers [n_proxy, n_embd]: the Mersenne twister's raw output through Box and Muller."""
    n = n_proxy * n_embd
    raw = np.random.RandomState(seed).randint(0, 2**32, n + n % 2, dtype=np.uint32)
    u, v = (raw[0::2] + 1.0) / 2**32, raw[1::2] / 2**32
    radius = np.sqrt(-2 * np.log(u))
    pairs = np.stack([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)], axis=1)
    return pairs.ravel()[:n].reshape(n_proxy, n_embd)


def statistics(hidden: Array, n_stat: int) -> tuple[float, float]:
    """Step 1: mean and standard deviation over the last tokens and all dimensions of hidden states [T, n_embd]."""
    last = hidden[-n_stat:].astype(np.float64)
    return float(last.mean()), float(last.std())


def proxies(
    settings: Settings, stats: tuple[float, float], last_hidden: Array, n_past: int, repeat: bool
) -> tuple[Array, Ints, int]:
    """Steps 2 and 3 before the query path: hidden states, positions and the number of groups.

    Sample j of group i is row j * G + i. `n_past` is the position after the prompt's last token.
    """
    if repeat:
        settings = replace(settings, n_proxy=settings.n_repeat, n_group=1)
        hidden = np.repeat(last_hidden[None], settings.n_proxy, axis=0)
    else:
        mean, sd = stats
        hidden = mean + settings.gamma * sd * noise(settings.seed, settings.n_proxy, len(last_hidden))
    step = np.arange(settings.n_proxy) // settings.n_group
    return hidden, n_past + (step + 1) * settings.n_group, settings.n_group


def attention(q: Array, k: Array, scale: float, soft_cap: float = 0.0) -> Array:
    """Attention weights of q [n, H, d] over k [Hkv, T, d], mean over the heads of a KV head: [n, Hkv, T]."""
    n, n_head, d = q.shape
    n_head_kv, n_key, _ = k.shape
    grouped = q.reshape(n, n_head_kv, -1, d).swapaxes(0, 1).reshape(n_head_kv, -1, d)
    logits = scale * grouped.astype(np.float64) @ k.astype(np.float64).swapaxes(1, 2)
    if soft_cap:
        logits = soft_cap * np.tanh(logits / soft_cap)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights.reshape(n_head_kv, n, n_head // n_head_kv, n_key).mean(axis=2).swapaxes(0, 1)


def rank(proxy_attention: Array, last_attention: Array, n_group: int) -> Ranking:
    """Step 4, from the proxies' attention [N, Hkv, T] and the last query's [Hkv, T]."""
    n_proxy, n_head_kv, n_key = proxy_attention.shape
    size = n_proxy // n_group
    groups = proxy_attention.reshape(size, n_group, n_head_kv, n_key).sum(axis=0)
    mass = (groups + last_attention) / (1 + size)
    return Ranking(mass[..., :-1].swapaxes(0, 1), last_attention[:, :-1])


def votes(mass: Array, share: float) -> Ints:
    """Step 5: in how many groups a key belongs to the smallest set that holds the share, [Hkv, T - 1]."""
    order = np.argsort(-mass, axis=-1, kind="stable")
    ordered = np.take_along_axis(mass, order, axis=-1)
    before = ordered.cumsum(axis=-1) - ordered
    in_set = np.zeros(mass.shape, int)
    np.put_along_axis(in_set, order, (before < share * mass.sum(axis=-1, keepdims=True)).astype(int), axis=-1)
    return in_set.sum(axis=1)


def select(scores: Array, budget: int) -> Ints:
    """Step 7: the kept tokens by KV head, ascending, from scores [Hkv, T - 1]."""
    n_head_kv, n = scores.shape
    best = np.argsort(-scores, axis=-1, kind="stable")[:, : budget - 1]
    return np.sort(np.concatenate([best, np.full((n_head_kv, 1), n)], axis=1), axis=1)
