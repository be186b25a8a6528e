"""Text models with the shape of LLaVA-7B's layers and random weights, to measure with: what they write is noise."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

# Vicuna-7B, the language model of LLaVA-1.5 and 1.6
N_EMBD, N_HEAD, N_FF = 4096, 32, 11008
N_CONTEXT = 1 << 15

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_TOKENS = ["<unk>", "<s>", "</s>", *_BYTES, "\u2581"]
_Q4_0 = gguf.GGMLQuantizationType.Q4_0
_BLOCK = 32  # weights that share a scale in Q4_0


def write_llava_7b(path: Path, n_layer: int, seed: int = 0) -> None:
    """Write a model of the llama architecture with Q4_0 weights and a vocabulary of bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(N_CONTEXT)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_block_count(n_layer)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    _add_tokenizer(writer)

    rng = np.random.default_rng(seed)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(N_EMBD, np.float32))

    def matrix(name: str, n_in: int, n_out: int) -> None:
        writer.add_tensor(name, _random_q4_0(rng, n_in, n_out), raw_dtype=_Q4_0)

    matrix("token_embd.weight", N_EMBD, len(_TOKENS))
    norm("output_norm.weight")
    matrix("output.weight", N_EMBD, len(_TOKENS))
    for i in range(n_layer):
        for part in ("q", "k", "v", "output"):
            matrix(f"blk.{i}.attn_{part}.weight", N_EMBD, N_EMBD)
        for part in ("gate", "up"):
            matrix(f"blk.{i}.ffn_{part}.weight", N_EMBD, N_FF)
        matrix(f"blk.{i}.ffn_down.weight", N_FF, N_EMBD)
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
