"""Text models with random weights, to measure with: what they write is noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

N_CONTEXT = 1 << 15


@dataclass(frozen=True)
class Shape:
    """Of a model's layers."""

    name: str
    n_embd: int
    n_head: int
    n_ff: int


LLAVA_7B = Shape("llava-7b", 4096, 32, 11008)
"""Vicuna-7B, the language model of LLaVA-1.5 and 1.6."""

SMALL = Shape("small", 160, 8, 416)
"""Little work, without flash attention on Vulkan, which has it for heads of a multiple of 8 values: these have 20."""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_TOKENS = ["<unk>", "<s>", "</s>", *_BYTES, "\u2581"]
_Q4_0 = gguf.GGMLQuantizationType.Q4_0
_BLOCK = 32  # weights that share a scale in Q4_0


def write(path: Path, n_layer: int, shape: Shape = LLAVA_7B, seed: int = 0) -> None:
    """Write a model of the llama architecture with Q4_0 weights and a vocabulary of bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(N_CONTEXT)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_block_count(n_layer)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    _add_tokenizer(writer)

    rng = np.random.default_rng(seed)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.n_embd, np.float32))

    def matrix(name: str, n_in: int, n_out: int) -> None:
        writer.add_tensor(name, _random_q4_0(rng, n_in, n_out), raw_dtype=_Q4_0)

    matrix("token_embd.weight", shape.n_embd, len(_TOKENS))
    norm("output_norm.weight")
    matrix("output.weight", shape.n_embd, len(_TOKENS))
    for i in range(n_layer):
        for part in ("q", "k", "v", "output"):
            matrix(f"blk.{i}.attn_{part}.weight", shape.n_embd, shape.n_embd)
        for part in ("gate", "up"):
            matrix(f"blk.{i}.ffn_{part}.weight", shape.n_embd, shape.n_ff)
        matrix(f"blk.{i}.ffn_down.weight", shape.n_ff, shape.n_embd)
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    kinds = gguf.TokenType
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * len(_BYTES), kinds.NORMAL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(_TOKENS)
    writer.add_token_scores([0.0] * len(_TOKENS))
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _random_q4_0(rng: np.random.Generator, n_in: int, n_out: int) -> np.ndarray:
    """Rows of blocks: a scale, then 32 numbers from -8 to 7. Their standard deviation becomes 1 / sqrt(n_in)."""
    blocks = np.empty((n_out, n_in // _BLOCK, 2 + _BLOCK // 2), np.uint8)
    scale = np.float16(1 / (np.sqrt(n_in) * np.arange(-8, 8).std()))
    blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    blocks[..., 2:] = rng.integers(0, 256, blocks[..., 2:].shape, np.uint8)
    return blocks.reshape(n_out, -1)
