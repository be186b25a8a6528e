"""GGUF files with random weights, small enough to write in a test: their answers are noise, their plumbing is real."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np

N_EMBD, N_FF, N_HEAD, N_HEAD_KV, N_LAYER = 64, 96, 4, 2, 3
PATCH = 14
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_text_model(
    path: Path,
    architecture: str = "llama",
    *,
    n_embd: int = N_EMBD,
    template: str | None = CHAT_TEMPLATE,
    added: Mapping[str, gguf.TokenType] = MappingProxyType({}),
    sentencepiece: bool = False,
    merges: tuple[str, ...] = (),
) -> Path:
    """A language model of bytes.

    architecture: llama, or qwen2vl for M-RoPE.
    added: more tokens and their types, or other types of control tokens.
    sentencepiece: whether the tokenizer puts a space before a text, as Llama 2's; else it is byte-level BPE.
    merges: more of them.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(1024)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(N_FF)
    writer.add_block_count(N_LAYER)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "qwen2vl":
        writer.add_rope_dimension_sections([2, 3, 3, 0])
    kinds = _bytes(sentencepiece) | dict.fromkeys(CONTROL, gguf.TokenType.CONTROL) | dict(added)
    tokens, types = list(kinds), [int(kind) for kind in kinds.values()]
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_unk_token_id(tokens.index("<unk>"))
    else:
        writer.add_token_merges(["t h", "th e", *merges])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(template)

    add = _Tensors(writer, seed=1)
    # The embeddings are the output matrix, too: what is not printable ASCII gets logits near 0, and is hardly written.
    written = np.array(
        [kind == gguf.TokenType.NORMAL and text.isascii() for text, kind in zip(tokens, types, strict=True)]
    )
    add.matrix("token_embd.weight", n_embd, len(tokens), scale=np.where(written, 1, 0.01)[:, None])
    add.ones("output_norm.weight", n_embd)
    kv = n_embd // N_HEAD * N_HEAD_KV
    for i in range(N_LAYER):
        add.ones(f"blk.{i}.attn_norm.weight", n_embd)
        add.ones(f"blk.{i}.ffn_norm.weight", n_embd)
        for name, size in (("q", n_embd), ("k", kv), ("v", kv)):
            add.matrix(f"blk.{i}.attn_{name}.weight", n_embd, size)
            if architecture == "qwen2vl":
                add.zeros(f"blk.{i}.attn_{name}.bias", size)
        add.matrix(f"blk.{i}.attn_output.weight", n_embd, n_embd)
        add.matrix(f"blk.{i}.ffn_gate.weight", n_embd, N_FF)
        add.matrix(f"blk.{i}.ffn_up.weight", n_embd, N_FF)
        add.matrix(f"blk.{i}.ffn_down.weight", N_FF, n_embd)
    return _write(writer, path)


def write_mmproj(
    path: Path,
    projector: str = "mlp",
    *,
    n_embd_text: int = N_EMBD,
    n_patches: int = 4,
    pinpoints: tuple[tuple[int, int], ...] = (),
) -> Path:
    """A vision encoder with projector.

    `projector`: mlp (LLaVA; tiled with `pinpoints`, as 1.6), gemma3 (tokens that see each other), or qwen2vl_merger. A
    picture or tile has `n_patches` squared tokens, but for Qwen2-VL, where it has one for 28 x 28 pixels.
    """
    qwen = projector == "qwen2vl_merger"
    n_embd, n_layer, image_size = 32, 2, n_patches * PATCH
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", projector)
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "image_size": image_size,
        "patch_size": PATCH,
        "embedding_length": n_embd,
        "feed_forward_length": 48,
        "projection_dim": n_embd_text,
        "block_count": n_layer,
        "attention.head_count": 2,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    if projector == "gemma3":
        writer.add_uint32("clip.vision.projector.scale_factor", 1)
    if pinpoints:
        writer.add_array("clip.vision.image_grid_pinpoints", [side for size in pinpoints for side in size])

    add = _Tensors(writer, seed=2)
    for name in ("v.patch_embd.weight", "v.patch_embd.weight.1") if qwen else ("v.patch_embd.weight",):
        add.matrix(name, PATCH, PATCH, 3, n_embd)
    if not qwen:
        add.matrix("v.position_embd.weight", n_embd, (image_size // PATCH) ** 2)
    for i in range(n_layer):
        for name in ("ln1", "ln2"):
            add.ones(f"v.blk.{i}.{name}.weight", n_embd)
            add.zeros(f"v.blk.{i}.{name}.bias", n_embd)
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add.matrix(f"v.blk.{i}.{name}.weight", n_embd, n_embd)
            add.zeros(f"v.blk.{i}.{name}.bias", n_embd)
        add.matrix(f"v.blk.{i}.ffn_up.weight", n_embd, 48)
        add.zeros(f"v.blk.{i}.ffn_up.bias", 48)
        add.matrix(f"v.blk.{i}.ffn_down.weight", 48, n_embd)
        add.zeros(f"v.blk.{i}.ffn_down.bias", n_embd)
    if qwen:
        add.ones("v.post_ln.weight", n_embd)
        add.zeros("v.post_ln.bias", n_embd)
    if projector == "gemma3":
        add.matrix("mm.input_projection.weight", n_embd_text, n_embd)
        add.ones("mm.soft_emb_norm.weight", n_embd)
        return _write(writer, path)
    merged = n_embd * 4 if qwen else n_embd
    add.matrix("mm.0.weight", merged, n_embd_text)
    add.zeros("mm.0.bias", n_embd_text)
    add.matrix("mm.2.weight", n_embd_text, n_embd_text)
    add.zeros("mm.2.bias", n_embd_text)
    return _write(writer, path)


class _Tensors:
    """Adds tensors to a GGUF; sizes are given as llama.cpp names them, the fastest dimension first."""

    def __init__(self, writer: gguf.GGUFWriter, seed: int) -> None:
        self._writer = writer
        self._random = np.random.default_rng(seed)

    def matrix(self, name: str, *sizes: int, scale: np.ndarray | float = 1.0) -> None:
        values = self._random.normal(0, 1 / np.sqrt(sizes[0]), sizes[::-1]) * scale
        self._writer.add_tensor(name, values.astype(np.float32))

    def ones(self, name: str, size: int) -> None:
        self._writer.add_tensor(name, np.ones(size, np.float32))

    def zeros(self, name: str, size: int) -> None:
        self._writer.add_tensor(name, np.zeros(size, np.float32))


def _bytes(sentencepiece: bool) -> dict[str, gguf.TokenType]:
    """Tokens for all bytes, "th" and "the", as the two kinds of tokenizers write them."""
    normal = gguf.TokenType.NORMAL
    words = dict.fromkeys(("th", "the"), normal)
    if sentencepiece:
        letters = dict.fromkeys(["▁", *map(chr, range(ord("!"), ord("~") + 1))], normal)
        codes = dict.fromkeys((f"<0x{byte:02X}>" for byte in range(256)), gguf.TokenType.BYTE)
        return {"<unk>": gguf.TokenType.UNKNOWN} | codes | words | letters
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return dict.fromkeys((letters[byte] for byte in range(256)), normal) | words


def _write(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
