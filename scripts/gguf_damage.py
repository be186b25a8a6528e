"""Damage GGUF files: take one apart, change what it says of itself in one way or several, write it again."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edge_shiftkv.native.gguf_file import BLOCKS

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


def _words(text: str) -> tuple[bytes, ...]:
    return tuple(text.encode().split())


TOKENIZERS = _words("llama gpt2 bert t5 rwkv plamo2 none no_vocab hybriddna whitespace")
PRE_TOKENIZERS = _words("""
    default llama-bpe qwen2 gpt-2 deepseek-llm falcon gpt-4o tekken kimi-k2 gemma4 bloom poro-chat chatglm-bpe viking
    superbpe jais-2 grok-2 youtu
""")
ARCHITECTURES = _words("""
    llama qwen2 qwen3 gemma gemma2 gemma3 gemma3n phi2 phi3 falcon gpt2 gptneox mpt bloom starcoder starcoder2 stablelm
    command-r cohere2 olmo2 mamba rwkv6 t5 bert clip deepseek2 gpt-oss qwen2vl qwen3moe llama4 smollm3 exaone4 jamba
    lfm2 plamo2 granite minicpm3 glm4 internlm2 refact
""")
PROJECTORS = _words("""
    mlp ldp ldpv2 resampler adapter qwen2vl_merger qwen2.5vl_merger qwen3vl_merger gemma3 gemma3nv idefics3 pixtral
    internvl llama4 ultravox glm4v lfm2 kimivl cogvlm janus_pro lightonocr phi4 paddleocr deepseekocr youtuvl
    whisper-enc qwen2a
""")
TEMPLATES = (
    *(
        b"",
        b"{% for",
        b"{{ messages[9].content }}",
        b"{{ 1/0 }}",
        b"{{ raise_exception('no') }}",
        b"\xff\xfe{{ x }}",
        b"hi",
    ),
)
_MODEL_KEYS = _words("""
    context_length embedding_length block_count feed_forward_length attention.head_count attention.head_count_kv
    attention.key_length attention.value_length attention.layer_norm_rms_epsilon attention.layer_norm_epsilon
    rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    rope.dimension_sections rope.freq_scale rope.scaling.attn_factor rope.scaling.yarn_beta_fast rope.scale_linear
    expert_count expert_used_count expert_weights_scale expert_gating_func expert_group_count leading_dense_block_count
    attention.sliding_window attention.sliding_window_pattern attn_logit_softcapping final_logit_softcapping
    attention.clamp_kqv attention.max_alibi_bias attention.causal attention.scale attention.temperature_length
    use_parallel_residual tensor_data_layout pooling_type logit_scale residual_scale embedding_scale vocab_size
    nextn_predict_layers attention.shared_kv_layers rope.dimension_count_swa attention.key_length_swa
    embedding_length_out no_rope_layer_interval interleave_moe_layer_step ssm.inner_size ssm.state_size
""")
_VOCABULARY_KEYS = _words("""
    model pre tokens scores token_type merges bos_token_id eos_token_id eot_token_id eom_token_id unknown_token_id
    seperator_token_id padding_token_id mask_token_id cls_token_id add_bos_token add_eos_token add_sep_token
    add_space_prefix remove_extra_whitespaces precompiled_charsmap fim_pre_token_id fim_suf_token_id eog_token_ids
    suppress_tokens token_type_count prefix_token_id normalizer.lowercase
""")
_VISION_KEYS = _words("""
    image_size patch_size embedding_length feed_forward_length projection_dim block_count attention.head_count
    attention.head_count_kv attention.layer_norm_epsilon image_mean image_std image_grid_pinpoints feature_layer
    projector.scale_factor projector.query_num spatial_merge_size n_wa_pattern window_size image_min_pixels
    image_max_pixels preproc_image_size projector_type mm_patch_merge_type image_crop_resolution is_deepstack_layers
    wa_layer_indexes use_gelu rope_theta embedding_head_length preproc_min_tiles preproc_max_tiles
""")
_OTHER_KEYS = _words("tokenizer.chat_template general.alignment general.architecture general.type split.count split.no")
_CLIP_KEYS = _words("has_vision_encoder has_audio_encoder projector_type use_gelu use_silu minicpmv_version")
TEXT_KEYS = tuple(f"{{arch}}.{key.decode()}" for key in _MODEL_KEYS)
TOKENIZER_KEYS = (
    *(f"tokenizer.ggml.{key.decode()}" for key in _VOCABULARY_KEYS),
    *(key.decode() for key in _OTHER_KEYS),
)
VISION_KEYS = (
    *(f"clip.vision.{key.decode()}" for key in _VISION_KEYS),
    *(f"clip.{key.decode()}" for key in _CLIP_KEYS),
)

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
        return rng.choice(
            (b"", old[:-1] if isinstance(old, bytes) else b"", rng.choice(words), rng.choice(words), noise, b"x" * 5000)
        )
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
        kind = (
            old.kind
            if old and rng.random() < 0.7
            else rng.choice((UINT32, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY))
        )
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
        words = (
            b"",
            b" ",
            b"  ",
            b"a  b",
            b" a",
            b"a ",
            b"x" * 4000,
            b"\xff\xff",
            b"\0",
            b"<0x0A>",
            b"\n",
            b"<s>",
            "Ġ Ġ".encode(),
        )
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
        shape[i] = rng.choice((*EDGES, shape[i] + 1, shape[i] - 1, shape[i] * 2, shape[i] // 2, shape[i] + 32, 1)) & (
            (1 << 64) - 1
        )
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
        a.name = rng.choice(
            (
                b"",
                b"x" * 63,
                b"x" * 64,
                b"blk.0.nonsense.weight",
                a.name[:-1],
                a.name.replace(b"0", b"1"),
                rng.randbytes(8),
            )
        )
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
            data[i : i + 4] = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, rng.randbytes(4)))[
                : len(data) - i
            ]
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
TEXT_CHANGES = (
    *COMMON,
    change_vocabulary,
    change_vocabulary,
    change_vocabulary,
    *[add_key(TEXT_KEYS)] * 3,
    *[add_key(TOKENIZER_KEYS)] * 3,
)
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
