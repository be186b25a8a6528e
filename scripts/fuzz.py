"""Feed damaged model files, pictures and odd prompts to the runtime; report what ends a process, hangs or raises other errors.

    python scripts/fuzz.py --n 1000                     # 1,000 cases of each kind
    python scripts/fuzz.py --kind mmproj --n 10000 --jobs 2
    python scripts/fuzz.py --replay mmproj:4711         # one case, in this process

A case follows from its kind and seed alone. Cases run in worker processes; one that dies or hangs is replaced. Any error
of this package is a right answer to a damaged file, and so is a text; everything else is a finding. The exit status is 1
where there is one.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import queue
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"
LIMIT_S = 20.0
MEMORY = 6 << 30  # address space of a worker: what asks for more is to be refused, not to swap

sys.path.insert(0, str(ROOT / "tests"))


# --- GGUF files, as lists that can be changed in every way and written again

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
CODES = "BbHhIif?  Qqd"
EDGES = (
    *(0, 1, 2, 3, 5, 7, 8, 31, 64, 127, 255, 256, 511, 513, 1000, 4096, 65535, 65536, 100_000, 1 << 24),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 32) + 1, (1 << 63) - 1, (1 << 64) - 1, -1, -2, -128),
)
FLOAT_EDGES = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"), 0.5, 1e-5)


@dataclass
class Pair:
    """A metadata entry. `item` is the type of a list's items; `n` overrides the count written before them."""

    key: bytes
    kind: int
    value: Any
    item: int = 0
    n: int | None = None


@dataclass
class Tensor:
    """`size` is that of its data in the file, with the padding."""

    name: bytes
    shape: list[int]
    type: int
    offset: int
    size: int


@dataclass
class File:
    """A GGUF file's parts."""

    pairs: list[Pair]
    tensors: list[Tensor]
    data: bytes
    version: int = 3
    n_pairs: int | None = None
    n_tensors: int | None = None

    def find(self, key: str) -> Pair | None:
        """The entry with this key."""
        return next((pair for pair in self.pairs if pair.key == key.encode()), None)

    def set(self, key: str, kind: int, value: Any, item: int = 0) -> None:
        """Replace an entry, or add it."""
        pair = self.find(key)
        if pair is None:
            self.pairs.append(Pair(key.encode(), kind, value, item))
        else:
            pair.kind, pair.value, pair.item = kind, value, item

    def remove(self, *keys: str) -> None:
        """Drop entries."""
        self.pairs = [pair for pair in self.pairs if pair.key.decode(errors="replace") not in keys]

    def lay_out(self) -> None:
        """Give the tensors the offsets and the data that their shapes ask for."""
        from edge_shiftkv.native.gguf_file import BLOCKS

        parts, offset = [], 0
        for tensor in self.tensors:
            block, size = BLOCKS.get(tensor.type, (1, 4))
            n = 1
            for side in tensor.shape:
                n *= side
            n_bytes = max(0, min(n // block * size, 16 << 20))
            padded = -(-n_bytes // 32) * 32
            old = self.data[tensor.offset : tensor.offset + tensor.size] or bytes(32)
            parts.append((old * (padded // len(old) + 1))[:padded])
            tensor.offset, tensor.size = offset, padded
            offset += padded
        self.data = b"".join(parts)

    def write(self) -> bytes:
        """The file's bytes."""
        out = io.BytesIO()
        out.write(b"GGUF" + struct.pack("<I", self.version))
        out.write(_pack("Q", len(self.tensors) if self.n_tensors is None else self.n_tensors))
        out.write(_pack("Q", len(self.pairs) if self.n_pairs is None else self.n_pairs))
        for pair in self.pairs:
            _write_string(out, pair.key)
            out.write(_pack("I", pair.kind))
            _write_value(out, pair)
        for tensor in self.tensors:
            _write_string(out, tensor.name)
            out.write(_pack("I", len(tensor.shape)))
            for side in tensor.shape:
                out.write(_pack("Q", side))
            out.write(_pack("I", tensor.type) + _pack("Q", tensor.offset))
        out.write(bytes(-out.tell() % 32) + self.data)
        return out.getvalue()


def _pack(code: str, value: Any) -> bytes:
    if code in "fd":
        return struct.pack(f"<{code}", float(value)) if abs(float(value)) < 3e38 or code == "d" else b"\0\0\x80\x7f"
    size = struct.calcsize(f"<{code}")
    try:
        number = int(value)
    except (ValueError, OverflowError):  # NaN, infinity
        number = 0
    return (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _write_string(out: io.BytesIO, text: bytes) -> None:
    out.write(_pack("Q", len(text)) + text)


def _write_value(out: io.BytesIO, pair: Pair) -> None:
    if isinstance(pair.value, bytes) and pair.kind != STRING:  # raw bytes in place of a value
        out.write(pair.value)
    elif pair.kind == STRING:
        _write_string(out, pair.value if isinstance(pair.value, bytes) else str(pair.value).encode())
    elif pair.kind == ARRAY:
        items = pair.value if isinstance(pair.value, list) else [pair.value]
        out.write(_pack("I", pair.item) + _pack("Q", len(items) if pair.n is None else pair.n))
        for item in items:
            if pair.item == STRING:
                _write_string(out, item if isinstance(item, bytes) else str(item).encode())
            elif not isinstance(item, bytes) and 0 <= pair.item < len(CODES):
                out.write(_pack(CODES[pair.item].strip() or "I", item))
            else:
                out.write(item if isinstance(item, bytes) else b"\0\0\0\0")
    else:
        value = pair.value[0] if isinstance(pair.value, list) and pair.value else pair.value
        code = CODES[pair.kind].strip() if 0 <= pair.kind < len(CODES) else ""
        out.write(_pack(code or "I", 0 if isinstance(value, (list, bytes)) else value))


def parse(data: bytes) -> File:
    """Take a whole GGUF file apart."""
    at = 8

    def number(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return value

    def string() -> bytes:
        nonlocal at
        size = number("Q")
        at += size
        return data[at - size : at]

    def item(kind: int) -> Any:
        return string() if kind == STRING else number(CODES[kind])

    n_tensors, n_pairs = number("Q"), number("Q")
    pairs, tensors = [], []
    for _ in range(n_pairs):
        key, kind = string(), number("I")
        if kind == ARRAY:
            inner, n = number("I"), number("Q")
            pairs.append(Pair(key, kind, [item(inner) for _ in range(n)], inner))
        else:
            pairs.append(Pair(key, kind, item(kind)))
    for _ in range(n_tensors):
        name = string()
        shape = [number("Q") for _ in range(number("I"))]
        tensors.append(Tensor(name, shape, number("I"), number("Q"), 0))
    rest = data[-(-at // 32) * 32 :]
    ends = [tensor.offset for tensor in tensors[1:]] + [len(rest)]
    for tensor, end in zip(tensors, ends, strict=True):
        tensor.size = end - tensor.offset
    return File(pairs, tensors, rest, n_pairs=None)


# --- changes to a GGUF file

TOKENIZERS = (b"llama", b"gpt2", b"bert", b"t5", b"rwkv", b"plamo2", b"none", b"no_vocab", b"hybriddna", b"whitespace")
PRE_TOKENIZERS = (
    *(b"default", b"llama-bpe", b"qwen2", b"gpt-2", b"deepseek-llm", b"falcon", b"gpt-4o", b"tekken", b"kimi-k2"),
    *(b"gemma4", b"bloom", b"poro-chat", b"chatglm-bpe", b"viking", b"superbpe", b"jais-2", b"grok-2", b"youtu"),
)
ARCHITECTURES = (
    *(b"llama", b"qwen2", b"qwen3", b"gemma", b"gemma2", b"gemma3", b"gemma3n", b"phi2", b"phi3", b"falcon", b"gpt2"),
    *(b"gptneox", b"mpt", b"bloom", b"starcoder", b"starcoder2", b"stablelm", b"command-r", b"cohere2", b"olmo2"),
    *(b"mamba", b"rwkv6", b"t5", b"bert", b"clip", b"deepseek2", b"gpt-oss", b"qwen2vl", b"qwen3moe", b"llama4"),
    *(b"smollm3", b"exaone4", b"jamba", b"lfm2", b"plamo2", b"granite", b"minicpm3", b"glm4", b"internlm2", b"refact"),
)
PROJECTORS = (
    *(b"mlp", b"ldp", b"ldpv2", b"resampler", b"adapter", b"qwen2vl_merger", b"qwen2.5vl_merger", b"qwen3vl_merger"),
    *(b"gemma3", b"gemma3nv", b"idefics3", b"pixtral", b"internvl", b"llama4", b"ultravox", b"glm4v", b"lfm2", b"kimivl"),
    *(b"cogvlm", b"janus_pro", b"lightonocr", b"phi4", b"paddleocr", b"deepseekocr", b"youtuvl", b"whisper-enc", b"qwen2a"),
)
TEXT_KEYS = tuple(
    f"{{arch}}.{name}"
    for name in (
        "context_length embedding_length block_count feed_forward_length attention.head_count attention.head_count_kv "
        "attention.key_length attention.value_length attention.layer_norm_rms_epsilon attention.layer_norm_epsilon "
        "rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.original_context_length "
        "rope.dimension_sections rope.freq_scale rope.scaling.attn_factor rope.scaling.yarn_beta_fast rope.scale_linear "
        "expert_count expert_used_count expert_weights_scale expert_gating_func expert_group_count leading_dense_block_count "
        "attention.sliding_window attention.sliding_window_pattern attn_logit_softcapping final_logit_softcapping "
        "attention.clamp_kqv attention.max_alibi_bias attention.causal attention.scale attention.temperature_length "
        "use_parallel_residual tensor_data_layout pooling_type logit_scale residual_scale embedding_scale vocab_size "
        "nextn_predict_layers attention.shared_kv_layers rope.dimension_count_swa attention.key_length_swa "
        "embedding_length_out no_rope_layer_interval interleave_moe_layer_step ssm.inner_size ssm.state_size"
    ).split()
)
TOKENIZER_KEYS = tuple(
    f"tokenizer.ggml.{name}"
    for name in (
        "model pre tokens scores token_type merges bos_token_id eos_token_id eot_token_id eom_token_id unknown_token_id "
        "seperator_token_id padding_token_id mask_token_id cls_token_id add_bos_token add_eos_token add_sep_token "
        "add_space_prefix remove_extra_whitespaces precompiled_charsmap fim_pre_token_id fim_suf_token_id eog_token_ids "
        "suppress_tokens token_type_count prefix_token_id normalizer.lowercase"
    ).split()
) + ("tokenizer.chat_template", "general.alignment", "general.architecture", "split.count", "split.no", "general.type")
VISION_KEYS = tuple(
    f"clip.vision.{name}"
    for name in (
        "image_size patch_size embedding_length feed_forward_length projection_dim block_count attention.head_count "
        "attention.head_count_kv attention.layer_norm_epsilon image_mean image_std image_grid_pinpoints feature_layer "
        "projector.scale_factor projector.query_num spatial_merge_size n_wa_pattern window_size image_min_pixels "
        "image_max_pixels preproc_image_size projector_type mm_patch_merge_type image_crop_resolution is_deepstack_layers "
        "wa_layer_indexes use_gelu rope_theta embedding_head_length preproc_min_tiles preproc_max_tiles"
    ).split()
) + ("clip.has_vision_encoder", "clip.has_audio_encoder", "clip.projector_type", "clip.use_gelu", "clip.use_silu", "clip.minicpmv_version")
TEMPLATES = (b"", b"{% for", b"{{ messages[9].content }}", b"{{ 1/0 }}", b"{{ raise_exception('no') }}", b"\xff\xfe{{ x }}", b"hi")

Change = Callable[[random.Random, File], None]


def odd_number(rng: random.Random, old: Any) -> Any:
    """A number near another one, or at some edge."""
    number = old if isinstance(old, (int, float)) and old == old and abs(old) < 1 << 63 else 1
    near = (number + 1, number - 1, number * 2, number // 2, -number, number * 3, number + 32, number * 1000)
    return rng.choice((rng.choice(EDGES), rng.choice(near), rng.getrandbits(rng.randint(1, 64))))


def odd_value(rng: random.Random, kind: int, old: Any) -> Any:
    if kind in (FLOAT32, 12):
        return rng.choice((*FLOAT_EDGES, rng.gauss(0, 1), rng.uniform(-1e6, 1e6)))
    if kind == BOOL:
        return rng.choice((0, 1, 1, 2, 255))
    if kind == STRING:
        words = (*TOKENIZERS, *PRE_TOKENIZERS, *ARCHITECTURES, *PROJECTORS, *TEMPLATES)
        noise = rng.randbytes(rng.randint(0, 40))
        return rng.choice((b"", old[:-1] if isinstance(old, bytes) else b"", rng.choice(words), rng.choice(words), noise, b"x" * 5000))
    return odd_number(rng, old)


def change_value(rng: random.Random, file: File) -> None:
    pair = rng.choice(file.pairs)
    if pair.kind == ARRAY:
        change_array(rng, file, pair)
    else:
        pair.value = odd_value(rng, pair.kind, pair.value)


def change_array(rng: random.Random, file: File, pair: Pair | None = None) -> None:
    arrays = [p for p in file.pairs if p.kind == ARRAY and isinstance(p.value, list)]
    pair = pair or (rng.choice(arrays) if arrays else None)
    if pair is None or not isinstance(pair.value, list):
        return
    items = pair.value = list(pair.value)
    way = rng.randrange(8)
    if way == 0:
        pair.value = items[: rng.randrange(len(items) + 1)]
    elif way == 1:
        pair.value = items + items[: rng.randint(1, 5)] + [odd_value(rng, pair.item, 0)]
    elif way == 2:
        pair.value = []
    elif way == 3:
        pair.item = rng.choice((*range(13), 13, 255))
    elif way == 4:
        pair.n = rng.choice((*EDGES, len(items) + 1, max(0, len(items) - 1)))
    elif items:
        for _ in range(rng.choice((1, 1, 2, 10))):
            i = rng.randrange(len(items))
            other = rng.choice(items)
            items[i] = rng.choice((other, odd_value(rng, pair.item, items[i])))


def change_kind(rng: random.Random, file: File) -> None:
    pair = rng.choice(file.pairs)
    way = rng.randrange(3)
    if way == 0:
        pair.kind = rng.choice((*range(13), 13, 99, -1))
    elif way == 1 and pair.kind != ARRAY:
        pair.value, pair.item, pair.kind = [pair.value] * rng.choice((0, 1, 2, 3, 512, 513)), pair.kind, ARRAY
    else:
        pair.kind = rng.choice((UINT32, INT32, FLOAT32, BOOL, STRING, UINT64))
        if pair.kind == STRING or isinstance(pair.value, (list, bytes)):
            pair.value = odd_value(rng, pair.kind, 1)


def change_keys(rng: random.Random, file: File) -> None:
    i, j = rng.randrange(len(file.pairs)), rng.randrange(len(file.pairs))
    way = rng.randrange(5)
    if way <= 1:
        del file.pairs[i]
    elif way == 2:
        file.pairs.append(replace(file.pairs[i]))
    elif way == 3:
        file.pairs[i].key, file.pairs[j].key = file.pairs[j].key, file.pairs[i].key
    else:
        file.pairs[i].key = rng.choice((b"", b"x", file.pairs[i].key + b"x", rng.randbytes(9)))


def _known(rng: random.Random, keys: Sequence[str], file: File) -> str:
    return rng.choice(keys).format(arch=_architecture(file))


def _architecture(file: File) -> str:
    pair = file.find("general.architecture")
    return pair.value.decode(errors="replace") if pair and isinstance(pair.value, bytes) else "llama"


def add_key(keys: Sequence[str]) -> Change:
    def change(rng: random.Random, file: File) -> None:
        key = _known(rng, keys, file)
        old = file.find(key)
        kind = old.kind if old and rng.random() < 0.7 else rng.choice((UINT32, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY))
        if kind == ARRAY:
            item = rng.choice((UINT32, INT32, FLOAT32, STRING, BOOL))
            n = rng.choice((0, 1, 2, 3, 4, 6, 512, 513))
            file.set(key, ARRAY, [odd_value(rng, item, 0) for _ in range(n)], item)
        else:
            file.set(key, kind, odd_value(rng, kind, old.value if old else 1))

    return change


def change_words(rng: random.Random, file: File) -> None:
    """Another architecture (with its keys), tokenizer or projector."""
    way = rng.randrange(3)
    if way == 0 and (pair := file.find("general.architecture")) and isinstance(pair.value, bytes):
        old, new = pair.value, rng.choice(ARCHITECTURES)
        for other in file.pairs:
            if other.key.startswith(old + b"."):
                other.key = new + other.key[len(old) :]
        pair.value = new
    elif way == 1 and file.find("tokenizer.ggml.model"):
        file.set("tokenizer.ggml.model", STRING, rng.choice(TOKENIZERS))
        if rng.random() < 0.7:
            file.set("tokenizer.ggml.pre", STRING, rng.choice(PRE_TOKENIZERS))
        if not file.find("tokenizer.ggml.merges"):
            file.set("tokenizer.ggml.merges", ARRAY, [b"t h", b"th e"], STRING)
    else:
        key = "clip.projector_type" if file.find("clip.projector_type") else "tokenizer.ggml.pre"
        file.set(key, STRING, rng.choice(PROJECTORS if key.startswith("clip") else PRE_TOKENIZERS))


def change_vocabulary(rng: random.Random, file: File) -> None:
    pairs = [p for p in file.pairs if p.key.startswith(b"tokenizer.") and p.kind == ARRAY and isinstance(p.value, list)]
    if not pairs:
        return
    pair = rng.choice(pairs)
    items = pair.value = list(pair.value)
    if not items:
        return
    way = rng.randrange(6)
    if way == 0:
        items[rng.randrange(len(items))] = rng.choice(items)
    elif way == 1:
        rng.shuffle(items)
    elif way == 2 and pair.item == STRING:
        words = (b"", b" ", b"  ", b"a  b", b" a", b"a ", b"x" * 4000, b"\xff\xff", b"\0", b"<0x0A>", b"\n", b"<s>", "Ġ Ġ".encode())
        for _ in range(rng.choice((1, 2, 20))):
            items[rng.randrange(len(items))] = rng.choice((*words, rng.randbytes(rng.randint(1, 12))))
    elif way == 3:
        for i in range(len(items)):
            items[i] = odd_value(rng, pair.item, items[i]) if pair.item != STRING else b"%d" % i
    elif way == 4:
        del items[rng.randrange(len(items)) :]
    else:
        for _ in range(rng.choice((1, 5, 50))):
            items[rng.randrange(len(items))] = odd_value(rng, pair.item, 0)


def change_shape(rng: random.Random, file: File) -> None:
    tensor = rng.choice(file.tensors)
    shape = tensor.shape = list(tensor.shape)
    way = rng.randrange(6)
    if way <= 1 and shape:
        i = rng.randrange(len(shape))
        shape[i] = rng.choice((*EDGES, shape[i] + 1, shape[i] - 1, shape[i] * 2, shape[i] // 2, shape[i] + 32, 1)) & ((1 << 64) - 1)
    elif way == 2:
        rng.shuffle(shape)
    elif way == 3 and shape:
        shape.pop(rng.randrange(len(shape)))
    elif way == 4:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((0, 1, 1, 2)))
    elif len(shape) > 1:
        i, j = rng.sample(range(len(shape)), 2)
        if shape[j] % 2 == 0:
            shape[i], shape[j] = shape[i] * 2, shape[j] // 2


def change_type(rng: random.Random, file: File) -> None:
    tensor = rng.choice(file.tensors)
    tensor.type = rng.choice((0, 1, 8, 30, 26, 24, 25, 27, 28, 9, 15, *range(44), 99, -1))


def change_tensor(rng: random.Random, file: File) -> None:
    i, j = rng.randrange(len(file.tensors)), rng.randrange(len(file.tensors))
    a, b = file.tensors[i], file.tensors[j]
    way = rng.randrange(6)
    if way == 0:
        del file.tensors[i]
    elif way == 1:
        a.name, b.name = b.name, a.name
    elif way == 2:
        file.tensors.insert(j, replace(a, shape=list(a.shape), name=rng.choice((a.name, a.name + b"x"))))
    elif way == 3:
        a.name = rng.choice((b"", b"x" * 63, b"x" * 64, b"blk.0.nonsense.weight", a.name[:-1], a.name.replace(b"0", b"1"), rng.randbytes(8)))
    elif way == 4:
        a.offset = rng.choice((*EDGES, a.offset + 32, max(0, a.offset - 32), b.offset)) & ((1 << 64) - 1)
    else:
        a.shape, a.type, b.shape, b.type = list(b.shape), b.type, list(a.shape), a.type


def change_counts(rng: random.Random, file: File) -> None:
    way = rng.randrange(3)
    if way == 0:
        file.n_pairs = rng.choice((*EDGES, len(file.pairs) + 1, len(file.pairs) - 1))
    elif way == 1:
        file.n_tensors = rng.choice((*EDGES, len(file.tensors) + 1, len(file.tensors) - 1))
    else:
        file.version = rng.choice((0, 1, 2, 4, 1 << 24, (1 << 32) - 1))


def change_data(rng: random.Random, file: File) -> None:
    data = bytearray(file.data)
    for _ in range(rng.choice((1, 10, 1000))):
        if data:
            i = rng.randrange(len(data))
            data[i : i + 4] = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, rng.randbytes(4)))[: len(data) - i]
    file.data = bytes(data)


def damage_bytes(rng: random.Random, data: bytes, header: int) -> bytes:
    """Changes that know nothing of the format; most of them in the first `header` bytes."""
    out = bytearray(data)
    way = rng.randrange(5)
    end = min(header, len(out)) if rng.random() < 0.9 else len(out)
    if way == 0:
        return bytes(out[: rng.choice((rng.randrange(end), rng.randrange(len(out)), rng.randrange(40)))])
    if way == 1:
        i = rng.randrange(end)
        out[i : i + rng.randint(0, 16)] = rng.randbytes(rng.randint(0, 16))
    elif way == 2:
        i = rng.randrange(max(1, end - 8))
        out[i : i + 8] = _pack("Q", rng.choice(EDGES))
    else:
        for _ in range(rng.choice((1, 2, 8, 64))):
            out[rng.randrange(end)] = rng.choice((0, 1, 255, 127, 128, rng.randrange(256)))
    return bytes(out)


COMMON: tuple[Change, ...] = (
    *(change_value, change_value, change_value, change_array, change_kind, change_keys, change_words),
    *(change_shape, change_shape, change_shape, change_type, change_type, change_tensor, change_counts, change_data),
)
TEXT_CHANGES = (*COMMON, change_vocabulary, change_vocabulary, change_vocabulary, *[add_key(TEXT_KEYS)] * 3, *[add_key(TOKENIZER_KEYS)] * 3)
MMPROJ_CHANGES = (*COMMON, *[add_key(VISION_KEYS)] * 5)


def damaged(rng: random.Random, data: bytes, changes: Sequence[Change]) -> bytes:
    """A GGUF file with one to four changes. Most keep the file's layout consistent, so that the loader reads on."""
    file = parse(data)
    header = len(data) - len(file.data)
    if rng.random() < 0.2:
        return damage_bytes(rng, data, header)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if file.pairs and file.tensors:
            rng.choice(changes)(rng, file)
    if rng.random() < 0.85 and all(max(tensor.shape, default=1) < 1 << 31 for tensor in file.tensors):
        offsets = [tensor.offset for tensor in file.tensors]
        if offsets == sorted(offsets) or rng.random() < 0.8:
            file.lay_out()
    out = file.write()
    return damage_bytes(rng, out, header) if rng.random() < 0.1 else out


# --- cases

KINDS = ("text", "mmproj", "pictures", "prompts")
WORDS = (
    *("<|im_start|>", "<|im_end|>", "</s>", "<s>", "[INST]", "<|eot_id|>", "<__media__>", "<image>", "<0x0A>", "<unk>"),
    *("\0", "\ud800", "\udfff", "\U0010ffff", "\ufeff", "\u202e", "e\u0301", "👨‍👩‍👧", "\x1b[2J", "\r\n", " ", "\t", "\u2581", "ﷺ", "Ａ"),
    *("{{ messages }}", "{% for x in y %}", "%s%n", "😀", "\u0300" * 50, "a" * 300, "中文", "ß", "Hello", "1234567890"),
)


@dataclass(eq=False)
class Bases:
    """The whole files that cases are made from, and the runtimes that are kept between cases."""

    folder: Path
    runtimes: dict[str, Any] = field(default_factory=dict)

    @cache  # noqa: B019 - one instance in a process
    def texts(self) -> list[bytes]:
        """Language models: the demo's, and random ones of many architectures and with every tokenizer."""
        tiny, by_spec = importlib.import_module("support.tiny_models"), importlib.import_module("support.gguf_random")
        spec = by_spec.Spec
        window = {"attention.sliding_window": 32}
        specs = [
            *(spec(), spec("qwen2"), spec("qwen3"), spec("phi3", n_layer=2), spec(rope_factors=True), spec("mpt", n_head_kv=4)),
            spec("gemma2", meta={**window, "attn_logit_softcapping": 20.0}),
            spec("gemma3", n_layer=6, meta={**window, "attention.sliding_window_pattern": 2}),
            spec("qwen3vl", meta={"rope.dimension_sections": [6, 5, 5, 0], "n_deepstack_layers": 1}),
            spec("qwen2", meta={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024}),
            spec("gpt-oss", meta={**window, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96}),
            spec("mamba", meta={"ssm.inner_size": 256, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 8}),
        ]
        paths = [
            *[by_spec.write_model(one, self.folder) for one in specs],
            tiny.write_text_model(self.folder / "tiny.gguf"),
            tiny.write_text_model(self.folder / "tiny-qwen2vl.gguf", "qwen2vl"),
        ]
        files = [path.read_bytes() for path in paths]
        for tokenizer in (b"t5", b"rwkv", b"plamo2", b"bert", b"hybriddna", b"whitespace", b"gpt2"):
            file = parse(files[0])
            file.set("tokenizer.ggml.model", STRING, tokenizer)
            file.set("tokenizer.ggml.merges", ARRAY, [b"t h", b"th e"], STRING)
            if tokenizer == b"rwkv":
                tokens = file.find("tokenizer.ggml.tokens")
                assert tokens
                tokens.value = [b"\\x%02x" % i if i < 256 else b"tok%d" % i for i in range(len(tokens.value))]
            files.append(file.write())
        return files

    @cache  # noqa: B019
    def demo_text(self) -> bytes:
        return (DEMO / "demo-text-q8_0.gguf").read_bytes()

    @cache  # noqa: B019
    def tiny_text(self, architecture: str) -> Path:
        module = importlib.import_module("support.tiny_models")
        path: Path = module.write_text_model(self.folder / f"for-mmproj-{architecture}.gguf", architecture)
        return path

    @cache  # noqa: B019
    def mmprojs(self) -> list[tuple[Path, bytes]]:
        """Vision encoders with their language models: the demo's, and random ones."""
        module = importlib.import_module("support.tiny_models")
        llama, qwen = self.tiny_text("llama"), self.tiny_text("qwen2vl")
        tiled = {"pinpoints": ((112, 56), (56, 112))}
        others = (("mlp", llama, {}), ("mlp", llama, tiled), ("gemma3", llama, {}), ("qwen2vl_merger", qwen, {}))
        files = [(DEMO / "demo-text-q8_0.gguf", (DEMO / "demo-mmproj-f16.gguf").read_bytes())] * 4
        for i, (projector, text, options) in enumerate(others):
            path = module.write_mmproj(self.folder / f"mmproj-{i}.gguf", projector, **options)
            files.append((text, path.read_bytes()))
        return files

    @cache  # noqa: B019
    def picture(self) -> Any:
        from PIL import Image

        return Image.open(DEMO / "glyphs.png").convert("RGB").resize((150, 90))

    def runtime(self, name: str) -> Any:
        """A runtime that is loaded once: the demo with its mmproj, or a tiny one."""
        from edge_shiftkv import Runtime

        if name not in self.runtimes:
            if name == "demo":
                files = DEMO / "demo-text-q8_0.gguf", DEMO / "demo-mmproj-f16.gguf"
            else:
                text, mmproj = self.mmprojs()[4 if name == "tiny" else 5]
                files = text, self.folder / f"kept-{name}.gguf"
                files[1].write_bytes(mmproj)
            self.runtimes[name] = Runtime(*files, n_threads=1, n_ctx=1024)
        return self.runtimes[name]


def run_case(kind: str, seed: int, bases: Bases) -> str:
    """Run one case; return what came of it: ok, or the name of this package's error. Other errors pass through."""
    from edge_shiftkv import ShiftKVError

    rng = random.Random(f"{kind}:{seed}")
    try:
        {"text": text_case, "mmproj": mmproj_case, "pictures": picture_case, "prompts": prompt_case}[kind](rng, bases)
    except ShiftKVError as error:
        str(error).encode()  # a message has to be printable
        return type(error).__name__
    return "ok"


def text_case(rng: random.Random, bases: Bases) -> None:
    from edge_shiftkv import Runtime

    data = bases.demo_text() if rng.random() < 0.4 else rng.choice(bases.texts())
    path = bases.folder / "case.gguf"
    path.write_bytes(damaged(rng, data, TEXT_CHANGES))
    budget = rng.choice((None, None, 8))
    with Runtime(path, n_threads=1, n_ctx=128, kv_budget=budget) as runtime:
        runtime.generate("Hello, wörld 12 <s>!\n the end of it", raw=rng.random() < 0.5, max_tokens=3, temperature=0.0)


def mmproj_case(rng: random.Random, bases: Bases) -> None:
    from edge_shiftkv import Runtime

    text, data = rng.choice(bases.mmprojs())
    path = bases.folder / "case.gguf"
    path.write_bytes(damaged(rng, data, MMPROJ_CHANGES))
    with Runtime(text, path, n_threads=1, n_ctx=1024, kv_budget=rng.choice((None, 8))) as runtime:
        runtime.generate("the", [bases.picture()], raw=True, max_tokens=2, temperature=0.0)


def picture_case(rng: random.Random, bases: Bases) -> None:
    from PIL import Image

    kind = rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))
    mode = rng.choice(("RGB", "RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"))
    size = rng.choice(((1, 1), (2, 200), (17, 9), (64, 64), (150, 90), (300, 40)))
    image = bases.picture().resize(size)
    out = io.BytesIO()
    options: dict[str, Any] = {}
    if rng.random() < 0.2:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 77))
        options["exif"] = exif
    if kind == "TIFF":
        options["compression"] = rng.choice((None, "tiff_lzw", "jpeg", "packbits", "tiff_deflate", "group4"))
    try:
        image.convert(mode).save(out, kind, **options)
    except (OSError, ValueError, KeyError, SystemError, RuntimeError):  # a mode that this format does not have
        out = io.BytesIO()
        image.save(out, kind)
    data = out.getvalue()
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        data = damage_bytes(rng, data, rng.choice((64, 256, len(data)))) or b"\0"
    suffix = rng.choice((kind.lower(), kind.lower(), "png", "eps", ""))
    path = bases.folder / f"case.{suffix}"
    path.write_bytes(data)
    try:
        runtime = bases.runtime(rng.choice(("demo", "tiny", "tiled")))
        runtime.kv_budget = rng.choice((None, 8))
        runtime.generate("the", [path], raw=True, max_tokens=1, temperature=0.0)
    finally:
        path.unlink()


def prompt_case(rng: random.Random, bases: Bases) -> None:
    runtime = bases.runtime(rng.choice(("demo", "demo", "tiny", "tiled")))
    runtime.kv_budget = rng.choice((None, 2, 8, 64))
    way = rng.randrange(6)
    if way == 0:
        prompt = "".join(chr(rng.choice((rng.randrange(0x110000), rng.randrange(256)))) for _ in range(rng.randint(0, 60)))
    elif way == 1:
        prompt = rng.randbytes(rng.randint(0, 200)).decode("utf-8", "surrogateescape")
    elif way == 2:
        prompt = rng.choice(WORDS) * rng.choice((0, 1, 7, 300, 20_000))
    else:
        prompt = rng.choice(("", " ")).join(rng.choices(WORDS, k=rng.randint(0, 12)))
    images = [bases.picture()] * rng.choice((0, 0, 0, 1, 2))
    options = {"max_tokens": rng.choice((1, 2, 5)), "temperature": rng.choice((0.0, 1.0)), "seed": rng.getrandbits(31)}
    if rng.random() < 0.2:
        options["stop"] = rng.choice(WORDS)
    if rng.random() < 0.3:
        parts: list[Any] = [{"type": "text", "text": prompt}]
        roles = ("user", "assistant", "system", "tool", rng.choice(WORDS))
        messages = [{"role": rng.choice(roles), "content": rng.choice((prompt, parts, ""))} for _ in range(rng.randint(0, 4))]
        runtime.create_chat_completion(messages, **options)
    else:
        runtime.generate(prompt, images, raw=rng.random() < 0.5, **options)


# --- workers

@dataclass(frozen=True)
class Finding:
    """A case that did not end well."""

    case: str
    what: str
    detail: str


def serve() -> None:
    """Run the cases named on stdin, one a line; a line of JSON for each on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(Path(folder))
        limit_memory()
        for line in sys.stdin:
            kind, seed = line.split(":")
            try:
                answer = {"ok": run_case(kind, int(seed), bases)}
            except BaseException as error:
                answer = {"error": f"{type(error).__name__}: {error}", "at": _where(error)}
            print(json.dumps(answer), file=out, flush=True)


def limit_memory() -> None:
    """Have too large an allocation fail."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""


class Worker:
    """A process that runs cases until one of them ends it."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()
        command = [sys.executable, __file__, "--serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        self.alive = True

    def run(self, case: str, limit_s: float) -> tuple[str, Finding | None]:
        """What came of the case, and what is wrong with that."""
        assert self._process.stdin and self._process.stdout
        start = self._log.seek(0, os.SEEK_END)
        self._process.stdin.write(f"{case}\n".encode())
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        if not ready:
            self.close()
            return "hang", Finding(case, "hang", f"no answer within {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(start)
            log = self._log.read(1 << 20).decode(errors="replace")
            self.close()
            name = signal.Signals(-status).name if status < 0 else f"exit {status}"
            return name, Finding(case, name, _told(log))
        answer = json.loads(line)
        if "error" in answer:
            return "error", Finding(case, answer["error"][:200], answer["at"])
        return answer["ok"], None

    def close(self) -> None:
        """End the process."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe:
                pipe.close()


def _told(log: str) -> str:
    """The line of a dying process that says why."""
    lines = [line for line in log.splitlines() if any(word in line for word in ("ASSERT", "what():", "abort", ".cpp:", ".c:", "rror"))]
    return lines[0][-220:] if lines else ""


def fuzz(cases: Iterator[str], jobs: int, limit_s: float, report: Callable[[Finding], None]) -> Counter[str]:
    """Run the cases in `jobs` workers; return how many ended how."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    todo: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for case in cases:
        todo.put(case)
    for _ in range(jobs):
        todo.put(None)

    def work() -> None:
        with ExitStack() as ends:
            worker = Worker()
            ends.callback(lambda: worker.close())
            while (case := todo.get()) is not None:
                if not worker.alive:
                    worker = Worker()
                outcome, finding = worker.run(case, limit_s)
                with lock:
                    counts[outcome] += 1
                    if finding:
                        report(finding)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable; default: all")
    parser.add_argument("--n", type=int, default=1000, help="cases of each kind (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="the first case's seed; the others' follow (default: 0)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the CPUs)")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help=f"seconds for a case (default: {LIMIT_S})")
    parser.add_argument("--replay", metavar="KIND:SEED", help="run one case in this process")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="with --replay: copy the damaged file there first")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return 0
    if options.replay:
        return replay(options.replay, options.keep)
    n_found = 0

    def report(finding: Finding) -> None:
        nonlocal n_found
        n_found += 1
        print(f"  {finding.case}: {finding.what} [{finding.detail}]", flush=True)

    for kind in options.kind or KINDS:
        started = time.monotonic()
        cases = (f"{kind}:{seed}" for seed in range(options.seed, options.seed + options.n))
        counts = fuzz(cases, options.jobs, options.limit, report)
        ends = ", ".join(f"{n} {name}" for name, n in counts.most_common())
        print(f"{kind}: {counts.total()} cases in {time.monotonic() - started:.0f} s: {ends}", flush=True)
    print(f"{n_found} findings")
    return int(n_found > 0)


def replay(case: str, keep: Path | None) -> int:
    """Run one case here, where a debugger can see it."""
    kind, seed = case.split(":")
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(Path(folder))
        limit_memory()
        if keep:
            write = Path.write_bytes

            def write_both(path: Path, data: bytes) -> int:
                if path.stem == "case":
                    write(keep, data)
                return write(path, data)

            Path.write_bytes = write_both  # type: ignore[method-assign, assignment]
        print(run_case(kind, int(seed), bases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
