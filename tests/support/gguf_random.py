"""Tiny models with random weights, written as GGUF files that stock llama.cpp loads.

The weights make attention far from uniform, the embeddings have a mean other than 0, and norms and biases are never
trivial, so that leaving any part of a query path out changes the result.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

N_VOCAB = 288
"""3 control tokens, 256 bytes, 29 letters and signs."""

BOS, EOS = 1, 2
RMS_EPS = 1e-5

_BIAS = frozenset({"qwen2", "qwen2vl"})
_QK_NORM = frozenset({"qwen3", "qwen3vl", "gemma3", "gemma4", "openelm", "exaone4"})
_POST_NORM = frozenset({"gemma2", "gemma3", "gemma4", "exaone4"})
_FUSED = frozenset({"phi3", "mpt", "openelm", "falcon", "gpt2", "starcoder"})
_TIED = frozenset({"gemma2", "openelm", "cohere2"})
_LEARNED_POSITIONS = frozenset({"gpt2", "starcoder"})
_NORM_BIAS = frozenset({"falcon", "gpt2", "starcoder"})
_ALL_BIAS = frozenset({"gpt2", "starcoder"})
_NO_ATTENTION_NORM = frozenset({"exaone4"})
_NO_FFN_NORM = frozenset({"falcon", "cohere2", "exaone4"})
_NO_GATE = frozenset({"mpt", "phi3", "falcon", "gpt2", "starcoder"})


@dataclass(frozen=True)
class Spec:
    """A model's shape. `meta` holds further metadata, keyed without the architecture's prefix."""

    arch: str = "llama"
    n_layer: int = 3
    n_embd: int = 128
    n_head: int = 4
    n_head_kv: int = 2
    d_head: int = 32
    n_ff: int = 96
    seed: int = 1
    sharpness: float = 1.5
    """Standard deviation of the entries of queries and keys, but for a q-norm."""
    weight_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
    """Of the attention's projections."""
    kv_heads: tuple[int, ...] = ()
    """KV heads by layer, where they differ. A layer without any has no attention (DeciLM)."""
    rope_factors: bool = False
    """Whether the frequencies have factors of their own, as Llama 3's."""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def layer_kv_heads(self, il: int) -> int:
        """KV heads of a layer."""
        return self.kv_heads[il] if self.kv_heads else self.n_head_kv

    def layer_d_head(self, il: int) -> int:
        """The size of a layer's heads; in Gemma 4 window layers have their own."""
        if "attention.key_length_swa" not in self.meta or not self.meta["attention.sliding_window_pattern"][il]:
            return self.d_head
        return int(self.meta["attention.key_length_swa"])

    @property
    def n_embd_image(self) -> int:
        """Numbers that an image's token comes with: with Qwen3-VL's deepstack, also what later layers add."""
        return self.n_embd * (1 + int(self.meta.get("n_deepstack_layers", 0)))

    @property
    def name(self) -> str:
        """A file name that tells specs apart within one test run."""
        return f"{self.arch}-{zlib.crc32(repr(self).encode()):08x}.gguf"


def write_model(spec: Spec, folder: Path) -> Path:
    """Write the model into `folder` unless it is there already; return its path."""
    path = folder / spec.name
    if path.exists():
        return path
    writer = gguf.GGUFWriter(path, spec.arch)
    _write_tokenizer(writer)
    for key, value in (_metadata(spec) | dict(spec.meta)).items():
        _add(writer, f"{spec.arch}.{key}", value)
    rng = np.random.default_rng(spec.seed)
    for name, shape, kind in _tensors(spec):
        values = _random(rng, shape, kind, spec)
        if kind in ("qk", "v"):
            raw = gguf.quants.quantize(values, spec.weight_type)
            writer.add_tensor(name, raw, raw_dtype=spec.weight_type)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(spec: Spec) -> dict[str, Any]:
    return {
        "context_length": 4096,
        "embedding_length": spec.n_embd,
        "block_count": spec.n_layer,
        "feed_forward_length": spec.n_ff,
        "attention.head_count": spec.n_head,
        "attention.head_count_kv": spec.kv_heads or spec.n_head_kv,
        "attention.key_length": spec.d_head,
        "attention.value_length": spec.d_head,
        "attention.layer_norm_rms_epsilon": RMS_EPS,
        "attention.layer_norm_epsilon": RMS_EPS,
        "rope.dimension_count": spec.d_head,
        "rope.freq_base": 10000.0,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    signs = " abcdefghijklmnopqrstuvwxyz.?"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *signs.replace(" ", "\u2581")]
    control, byte, normal = gguf.TokenType.CONTROL, gguf.TokenType.BYTE, gguf.TokenType.NORMAL
    types = [gguf.TokenType.UNKNOWN, control, control, *[byte] * 256, *[normal] * len(signs)]
    assert len(tokens) == N_VOCAB
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(signs))])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)


Tensor = tuple[str, tuple[int, ...], str]


def _tensors(spec: Spec) -> Iterator[Tensor]:
    """Name, shape as numpy has it, and kind of every tensor."""
    if spec.arch == "t5":
        yield from _t5(spec)
        return
    yield "token_embd.weight", (N_VOCAB, spec.n_embd), "embd"
    if spec.arch in _LEARNED_POSITIONS:
        yield "position_embd.weight", (4096, spec.n_embd), "linear"
    yield from _norm("output_norm", spec.n_embd, spec)
    if spec.arch not in _TIED:
        yield "output.weight", (N_VOCAB, spec.n_embd), "linear"
    if spec.rope_factors:
        yield "rope_freqs.weight", (spec.d_head // 2,), "factor"
    for il in range(spec.n_layer):
        layer = _mamba_layer(spec) if spec.arch == "mamba" else _layer(spec, il)
        for name, shape, kind in layer:
            yield f"blk.{il}.{name}", shape, kind


def _norm(name: str, size: int, spec: Spec) -> Iterator[Tensor]:
    yield f"{name}.weight", (size,), "norm"
    if spec.arch in _NORM_BIAS:
        yield f"{name}.bias", (size,), "bias"


def _layer(spec: Spec, il: int) -> Iterator[Tensor]:
    n_embd, n_ff, d, n_head_kv = spec.n_embd, spec.n_ff, spec.layer_d_head(il), spec.layer_kv_heads(il)
    n_q, n_kv = spec.n_head * d, n_head_kv * d
    if spec.arch not in _NO_ATTENTION_NORM:
        yield from _norm("attn_norm", n_embd, spec)
    if spec.arch in _FUSED:
        yield "attn_qkv.weight", (n_q + 2 * n_kv, n_embd), "qk"
        if spec.arch in _ALL_BIAS:
            yield "attn_qkv.bias", (n_q + 2 * n_kv,), "bias"
    elif n_head_kv:
        yield "attn_q.weight", (n_q, n_embd), "qk"
        yield "attn_k.weight", (n_kv, n_embd), "qk"
        yield "attn_v.weight", (n_kv, n_embd), "v"
    if spec.arch in _BIAS:
        yield "attn_q.bias", (n_q,), "bias"
        yield "attn_k.bias", (n_kv,), "bias"
        yield "attn_v.bias", (n_kv,), "bias"
    if spec.arch in _QK_NORM:
        yield "attn_q_norm.weight", (d,), "qk_norm"
        yield "attn_k_norm.weight", (d,), "qk_norm"
    yield "attn_output.weight", (n_embd, n_q if n_head_kv else n_embd), "linear"
    if spec.arch in _ALL_BIAS:
        yield "attn_output.bias", (n_embd,), "bias"
    if spec.arch in _POST_NORM:
        yield "post_attention_norm.weight", (n_embd,), "norm"
        yield "post_ffw_norm.weight", (n_embd,), "norm"
    if spec.arch == "gpt-oss":
        yield from _experts_with_sinks(spec)
        return
    if spec.arch not in _NO_FFN_NORM:
        yield from _norm("ffn_norm", n_embd, spec)
    yield "ffn_up.weight", ((2 if spec.arch == "phi3" else 1) * n_ff, n_embd), "linear"
    if spec.arch not in _NO_GATE:
        yield "ffn_gate.weight", (n_ff, n_embd), "linear"
    yield "ffn_down.weight", (n_embd, n_ff), "linear"
    if spec.arch in _ALL_BIAS:
        yield "ffn_up.bias", (n_ff,), "bias"
        yield "ffn_down.bias", (n_embd,), "bias"


def _experts_with_sinks(spec: Spec) -> Iterator[Tensor]:
    n_embd, n_ff, n_expert = spec.n_embd, spec.n_ff, spec.meta["expert_count"]
    yield "attn_sinks.weight", (spec.n_head,), "bias"
    yield "attn_output.bias", (n_embd,), "bias"
    yield "post_attention_norm.weight", (n_embd,), "norm"
    yield "ffn_gate_inp.weight", (n_expert, n_embd), "linear"
    yield "ffn_gate_inp.bias", (n_expert,), "bias"
    for part, shape in (("gate", (n_ff, n_embd)), ("up", (n_ff, n_embd)), ("down", (n_embd, n_ff))):
        yield f"ffn_{part}_exps.weight", (n_expert, *shape), "linear"
        yield f"ffn_{part}_exps.bias", (n_expert, shape[0]), "bias"


def _mamba_layer(spec: Spec) -> Iterator[Tensor]:
    d_inner, d_conv = spec.meta["ssm.inner_size"], spec.meta["ssm.conv_kernel"]
    d_state, dt_rank = spec.meta["ssm.state_size"], spec.meta["ssm.time_step_rank"]
    yield "attn_norm.weight", (spec.n_embd,), "norm"
    yield "ssm_in.weight", (2 * d_inner, spec.n_embd), "linear"
    yield "ssm_conv1d.weight", (d_inner, d_conv), "linear"
    yield "ssm_conv1d.bias", (d_inner,), "bias"
    yield "ssm_x.weight", (dt_rank + 2 * d_state, d_inner), "linear"
    yield "ssm_dt.weight", (d_inner, dt_rank), "linear"
    yield "ssm_dt.bias", (d_inner,), "bias"
    yield "ssm_a", (d_inner, d_state), "linear"
    yield "ssm_d", (d_inner,), "bias"
    yield "ssm_out.weight", (spec.n_embd, d_inner), "linear"


def _t5(spec: Spec) -> Iterator[Tensor]:
    n_embd, n_ff, n_q = spec.n_embd, spec.n_ff, spec.n_head * spec.d_head
    yield "token_embd.weight", (N_VOCAB, n_embd), "embd"
    for side in ("enc", "dec"):
        yield f"{side}.output_norm.weight", (n_embd,), "norm"
        for il in range(spec.n_layer):
            block = f"{side}.blk.{il}"
            yield f"{block}.attn_rel_b.weight", (spec.meta["attention.relative_buckets_count"], spec.n_head), "bias"
            for attention in ("attn", "cross_attn") if side == "dec" else ("attn",):
                yield f"{block}.{attention}_norm.weight", (n_embd,), "norm"
                for part in "qkv":
                    yield f"{block}.{attention}_{part}.weight", (n_q, n_embd), "linear"
                yield f"{block}.{attention}_o.weight", (n_embd, n_q), "linear"
            yield f"{block}.ffn_norm.weight", (n_embd,), "norm"
            yield f"{block}.ffn_up.weight", (n_ff, n_embd), "linear"
            yield f"{block}.ffn_down.weight", (n_embd, n_ff), "linear"


def _random(rng: np.random.Generator, shape: tuple[int, ...], kind: str, spec: Spec) -> Array:
    x = rng.standard_normal(shape)
    if kind == "embd":
        x = 0.4 + x
    elif kind == "norm":
        x = 1 + 0.2 * x
    elif kind == "qk_norm":
        x = spec.sharpness * (1 + 0.2 * x)
    elif kind == "bias":
        x = 0.5 * x
    elif kind == "factor":
        x = 1 + rng.random(shape) * 4
    elif kind == "qk":
        x *= spec.sharpness / shape[-1] ** 0.5
    else:
        x /= shape[-1] ** 0.5
    return x.astype(np.float32)
