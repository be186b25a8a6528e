"""A random model's parts in numpy, computed from the weights in its GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import scipy.linalg

from support.gguf_random import RMS_EPS, Spec
from support.reference import Array, Ints

_ROPE_PAIRS_ADJACENT = frozenset({"llama", "deci", "smollm3"})
_NO_ROPE = frozenset({"gpt2", "starcoder", "cohere2"})  # of Cohere 2 the layers that see everything
_SCALED_QUERIES = frozenset({"phi3", "gemma2", "gemma3"})
_FUSED = frozenset({"phi3", "openelm", "falcon", "gpt2", "starcoder"})


def rms_norm(x: Array, weight: Array | None = None) -> Array:
    """x / rms(x) over the last dimension, times the weight."""
    normed = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + RMS_EPS)
    return normed if weight is None else normed * weight


class Weights:
    """The tensors of a GGUF file as numbers, and the computations that the tests repeat."""

    def __init__(self, spec: Spec, path: Path) -> None:
        self.spec = spec
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self._values: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._values:
            tensor = self._tensors[name]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            values.setflags(write=False)
            self._values[name] = values
        return self._values[name]

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._tensors

    def layer(self, il: int, name: str) -> Array:
        """A tensor of layer `il`."""
        return self[f"blk.{il}.{name}"]

    def embed(self, tokens: list[int]) -> Array:
        """The input of the first layer."""
        scale = self.spec.n_embd**0.5 if self.spec.arch.startswith("gemma") else 1.0
        return scale * self["token_embd.weight"][tokens]

    def attention_input(self, il: int, x: Array) -> Array:
        """What the projections of layer `il` multiply."""
        return rms_norm(x, self.layer(il, "attn_norm.weight"))

    @property
    def kq_scale(self) -> float:
        """What attention multiplies q.k with; 1 where the query path has done it."""
        return 1.0 if self.spec.arch in _SCALED_QUERIES | {"gemma4"} else self.spec.d_head**-0.5

    @property
    def soft_cap(self) -> float:
        """The bound of attention's logits, 0 for none."""
        return float(self.spec.meta.get("attn_logit_softcapping", 0.0))

    @property
    def rope_scaling(self) -> str | None:
        """ "linear", "yarn" or None."""
        return self.spec.meta.get("rope.scaling.type")

    def queries(self, il: int, hidden: Array, positions: Ints, *, rotated: bool = False) -> Array:
        """The query path of layer `il`: hidden [n, n_embd] -> queries [n, n_head, d_head] as attention sees them.

        `positions` are [n] or, with M-RoPE, may be [n, 3]. `rotated`: for a cache whose keys are rotated.
        """
        return self.placed(il, self.projected(il, hidden), positions, rotated=rotated)

    def projected(self, il: int, hidden: Array) -> Array:
        """The part of the query path that does not depend on positions."""
        spec = self.spec
        n_q = spec.n_head * spec.d_head
        weight = self.layer(il, "attn_qkv.weight")[:n_q] if spec.arch in _FUSED else self.layer(il, "attn_q.weight")
        q = hidden @ weight.T
        if self.has(f"blk.{il}.attn_q.bias"):
            q = q + self.layer(il, "attn_q.bias")
        if self.has(f"blk.{il}.attn_qkv.bias"):
            q = q + self.layer(il, "attn_qkv.bias")[:n_q]
        q = q.reshape(len(q), spec.n_head, spec.d_head)
        if self.has(f"blk.{il}.attn_q_norm.weight"):
            q = rms_norm(q, self.layer(il, "attn_q_norm.weight"))
        return q

    def placed(self, il: int, q: Array, positions: Ints, *, rotated: bool = False) -> Array:
        """The rest of the query path."""
        if self.has_rope(il):
            q = self.rope(q, positions)
        if self.spec.arch in _SCALED_QUERIES:
            q = q * self.spec.d_head**-0.5
        return rotate(q) if rotated else q

    def has_rope(self, il: int) -> bool:
        """Whether layer `il`, of those that see everything, rotates its queries."""
        arch = self.spec.arch
        every_fourth = arch == "smollm3" or (arch == "exaone4" and self.spec.n_layer == 64)
        return arch not in _NO_ROPE and not (every_fourth and il % 4 == 3)

    def rope(self, x: Array, positions: Ints) -> Array:
        """Rotate x [n, head, d] by its positions."""
        cos, sin = self._angles(np.asarray(positions))
        if self.spec.arch in _ROPE_PAIRS_ADJACENT:
            a, b = x[..., 0::2], x[..., 1::2]
            return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def _angles(self, positions: Ints) -> tuple[Array, Array]:
        meta, n_pair = self.spec.meta, self.spec.d_head // 2
        pair = np.arange(n_pair)
        base = meta.get("rope.freq_base", 10000.0)
        # Pair by pair in single precision, as the backends do: at later positions the difference shows.
        start = positions[:, None] if positions.ndim == 1 else positions
        factors = np.full((*start.shape, n_pair), base ** (-1 / n_pair), np.float32)
        factors[..., 0] = start
        section = np.repeat(np.arange(3), meta["rope.dimension_sections"][:3]) if start.shape[1] == 3 else 0 * pair
        angles = np.multiply.accumulate(factors, axis=-1)[:, section, pair].astype(np.float64)
        if self.spec.rope_factors:
            angles = angles / self["rope_freqs.weight"]
        if self.rope_scaling is None:
            return np.cos(angles)[:, None], np.sin(angles)[:, None]
        factor = meta["rope.scaling.factor"]
        if self.rope_scaling == "linear":
            angles = angles / factor
            return np.cos(angles)[:, None], np.sin(angles)[:, None]
        # YaRN, arXiv:2309.00071: interpolate the slow dimensions, keep the fast ones, sharpen attention.
        n_ctx = meta["rope.scaling.original_context_length"]
        low, high = (n_pair * np.log(n_ctx / (turns * 2 * np.pi)) / np.log(base) for turns in (32, 1))
        low, high = max(0, np.floor(low)), min(2 * n_pair - 1, np.ceil(high))
        interpolated = np.clip((pair - low) / max(0.001, high - low), 0, 1)
        angles = angles * (1 - interpolated + interpolated / factor)
        scale = 0.1 * np.log(factor) + 1
        return scale * np.cos(angles)[:, None], scale * np.sin(angles)[:, None]


def rotate(x: Array) -> Array:
    """The rotation of a cache of quantized keys: Hadamard matrices over the largest power of 2 that divides a head."""
    d = x.shape[-1]
    size = d & -d
    blocks = x.reshape(*x.shape[:-1], -1, size) @ (scipy.linalg.hadamard(size) / size**0.5)
    return blocks.reshape(x.shape)


@dataclass
class Forward:
    """Logits [n, n_vocab] of the tokens decoded, their hidden states and all keys and values, by layer."""

    logits: Array
    hidden: list[Array]
    pairs: list[tuple[Array, Array]]


class Llama:
    """A whole model of architecture llama with a cache in which each KV head may miss pairs."""

    def __init__(self, weights: Weights, cache_type: type[np.floating]) -> None:
        self.weights = weights
        self._cache_type = cache_type

    def forward(
        self,
        tokens: list[int],
        position: int,
        past: list[tuple[Array, Array]] | None = None,
        visible: list[Array] | None = None,
    ) -> Forward:
        """Decode tokens after `past`, keys and values by layer, of which a KV head sees only `visible` [Hkv, n]."""
        w, spec = self.weights, self.weights.spec
        n = len(tokens)
        positions = np.arange(position, position + n)
        x = w.embed(tokens)
        hidden, pairs = [], []
        for il in range(spec.n_layer):
            h = w.attention_input(il, x)
            hidden.append(h)
            shape = (n, spec.n_head_kv, spec.d_head)
            k = w.rope((h @ w.layer(il, "attn_k.weight").T).reshape(shape), positions).swapaxes(0, 1)
            v = (h @ w.layer(il, "attn_v.weight").T).reshape(shape).swapaxes(0, 1)
            k, v = (x_.astype(self._cache_type).astype(np.float64) for x_ in (k, v))
            see = np.broadcast_to(np.tri(n, dtype=bool), (spec.n_head_kv, n, n))
            if past:
                k, v = (np.concatenate(pair, axis=1) for pair in zip(past[il], (k, v), strict=True))
                old = np.ones(past[il][0].shape[:2], bool) if visible is None else visible[il]
                see = np.concatenate([np.repeat(old[:, None], n, axis=1), see], axis=2)
            pairs.append((k, v))
            x = x + self._attend(w.queries(il, h, positions), k, v, see) @ w.layer(il, "attn_output.weight").T
            x = x + self._feed_forward(il, rms_norm(x, w.layer(il, "ffn_norm.weight")))
        logits = rms_norm(x, w["output_norm.weight"]) @ w["output.weight"].T
        return Forward(logits, hidden, pairs)

    def _attend(self, q: Array, k: Array, v: Array, see: Array) -> Array:
        group = self.weights.spec.n_head // len(k)
        heads = []
        for head in range(self.weights.spec.n_head):
            kv = head // group
            logits = np.where(see[kv], self.weights.kq_scale * q[:, head] @ k[kv].T, -np.inf)
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            heads.append(weights / weights.sum(axis=-1, keepdims=True) @ v[kv])
        return np.concatenate(heads, axis=-1)

    def _feed_forward(self, il: int, x: Array) -> Array:
        w = self.weights
        gate = x @ w.layer(il, "ffn_gate.weight").T
        return (gate / (1 + np.exp(-gate)) * (x @ w.layer(il, "ffn_up.weight").T)) @ w.layer(il, "ffn_down.weight").T
