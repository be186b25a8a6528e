"""What llama.cpp takes on trust in a GGUF file, checked before it reads the file.

llama.cpp itself refuses most damaged files; here is what would have it read past a buffer, divide by zero or call a
kernel that there is not. Nothing but the header is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_shiftkv.errors import ModelError
from edge_shiftkv.native.gguf_file import BF16, F16, F32, INTEGERS, GGUFError, Header, read_header

_NO_KERNEL = frozenset({9, 15, 24, 25, 26, 27, 28})  # q8_1, q8_K, i8 .. i64, f64: nothing multiplies with these
_FIXED_POSITIONS = ("mlp", "ldp", "ldpv2", "adapter", "resampler")  # looked up by the patch's number
_POSITIONS_LOOKED_UP = (*_FIXED_POSITIONS, "gemma4v", "gemma4uv")
_RESAMPLER_POSITIONS = 70 * 70
_CLIP_SCALARS = tuple(
    f"clip.{key}"
    for key in (
        *("has_vision_encoder", "projector_type", "vision.projector_type", "vision.attention.head_count"),
        *("vision.image_size", "vision.patch_size", "vision.block_count", "vision.embedding_length"),
        "vision.attention.layer_norm_epsilon",
    )
)
_MAX_TILES, _MAX_PINPOINTS = 256, 1024
_N_SECTIONS = 4
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_INDEX_TABLES = ("ffn_gate_tid2eid.weight", "d2t")  # integers, as they should be


def check_model(path: Path) -> None:
    """Raise ModelError unless `path` is a GGUF file that llama.cpp can safely try to load as a language model."""
    _check(path, _model_faults)


def check_mmproj(path: Path) -> None:
    """Raise ModelError unless `path` is a GGUF file that mtmd can safely try to load as a vision encoder."""
    _check(path, _mmproj_faults)


def _check(path: Path, faults: Callable[[Header], Iterator[str]]) -> None:
    try:
        header = read_header(path)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except GGUFError as error:
        raise ModelError(f"{path}: {error}") from error
    for fault in (*_tensor_faults(header), *_number_faults(header), *faults(header)):
        raise ModelError(f"{path}: {fault}; the file is damaged, or no model that this llama.cpp knows")


def _tensor_faults(header: Header) -> Iterator[str]:
    for name, tensor in header.tensors.items():
        if 0 in tensor.shape:
            yield f"tensor {name!r} is empty: {list(tensor.shape)}"
        if name.endswith(_INDEX_TABLES):
            continue
        if tensor.type in _NO_KERNEL:
            yield f"the weights {name!r} have a type that cannot be multiplied with ({tensor.type})"
        if len(tensor.shape) == 1 and tensor.type not in (F32, F16, BF16):
            yield f"{name!r} is a vector of the block type {tensor.type}"
        is_weight = name.endswith((".weight", ".lora_a", ".lora_b")) and not name.endswith("norm.weight")
        if tensor.type != F32 and not is_weight:
            yield f"{name!r} has the type {tensor.type}: norms, biases and what else is no weight are F32"


def _number_faults(header: Header) -> Iterator[str]:
    for key, entry in header.metadata.items():
        if key.endswith("epsilon") and isinstance(entry.value, float) and not 0 <= entry.value < math.inf:
            yield f"{key} is {entry.value}: it has to be at least 0"


def _model_faults(header: Header) -> Iterator[str]:
    if header.text("tokenizer.ggml.model") in ("none", "no_vocab"):
        yield "it has no vocabulary"
    architecture = header.text("general.architecture")
    n_head = header.integer(f"{architecture}.attention.head_count")
    size = header.integer(f"{architecture}.attention.key_length")
    if size is None and n_head:
        size = (header.integer(f"{architecture}.embedding_length") or 0) // n_head
    sections = header.array(f"{architecture}.rope.dimension_sections")
    if sections and sections.kind in INTEGERS and sections.n <= _N_SECTIONS and size is not None:
        sides = header.numbers(sections)
        if min(sides, default=0) < 0 or max(sides[:3], default=0) < 1 or sum(sides) > size:
            yield f"{architecture}.rope.dimension_sections is {list(sides)} for heads of {size}"


def _mmproj_faults(header: Header) -> Iterator[str]:
    tensors = header.tensors
    for name, tensor in tensors.items():
        if len(tensor.shape) == 1 and tensor.type != F32:
            yield f"{name!r} has the type {tensor.type}: vectors are F32"
        if name.startswith("v.patch_embd.weight") and tensor.type not in (F32, F16, BF16):
            yield f"{name!r} has the type {tensor.type}: the first convolution is F32, F16 or BF16"
        n = math.prod(tensor.shape)
        weight = tensors.get(f"{name.removesuffix('bias')}weight")
        is_linear = name.startswith(("v.blk.", "mm.")) and weight is not None and len(weight.shape) <= 2
        if is_linear and name.endswith(".bias") and weight and n != weight.shape[-1]:
            yield f"{name!r} has {n} numbers for {weight.shape[-1]} outputs"
    for key in _CLIP_SCALARS:
        if header.array(key):  # clip takes the first item
            yield f"{key} is a list"
    if header.flag("clip.has_vision_encoder"):
        yield from _vision_faults(header)


def _vision_faults(header: Header) -> Iterator[str]:
    def number(key: str) -> int:
        return header.integer(f"clip.vision.{key}") or 0

    tensors = header.tensors
    if number("block_count") > _MAX_LAYERS:
        yield f"clip.vision.block_count is {number('block_count')}: at most {_MAX_LAYERS} layers are known"
    n_head = number("attention.head_count")
    if n_head > 0 and number("embedding_length") % n_head and not number("embedding_head_length"):
        yield f"{n_head} attention heads share {number('embedding_length')} numbers"
    image_size, patch_size = number("image_size"), number("patch_size")
    if patch_size < 1:
        yield f"clip.vision.patch_size is {patch_size}"
        return
    projector = header.text("clip.projector_type") or header.text("clip.vision.projector_type")
    if projector == "mlp" and ("mm.3.bias" if "mm.3.weight" in tensors else "mm.2.weight") not in tensors:
        yield "the projector's last layer is missing"
    positions = tensors.get("v.position_embd.weight")
    if projector in _FIXED_POSITIONS and positions:
        n_rows, n_needed = positions.n_rows, (image_size // patch_size) ** 2 + ("v.class_embd" in tensors)
        if projector == "resampler":
            n_needed = _RESAMPLER_POSITIONS
        if n_rows < n_needed:
            yield f"there are {n_rows} position embeddings for {n_needed} patches"
    if projector not in _POSITIONS_LOOKED_UP and positions and positions.type != F32:
        yield f"the position embeddings have the type {positions.type}: those of {projector!r} are F32"
    pinpoints = header.array("clip.vision.image_grid_pinpoints")
    if pinpoints and pinpoints.n > _MAX_PINPOINTS:
        yield f"clip.vision.image_grid_pinpoints has {pinpoints.n} numbers"
    elif pinpoints and pinpoints.n and pinpoints.kind in INTEGERS:
        sides = header.numbers(pinpoints)
        if not all(1 <= side <= _MAX_TILES * image_size for side in sides):
            yield f"clip.vision.image_grid_pinpoints has sides of {min(sides)} to {max(sides)} pixels"
        if any(w * h > _MAX_TILES * image_size**2 for w, h in zip(sides[::2], sides[1::2], strict=False)):
            yield f"clip.vision.image_grid_pinpoints has pictures of more than {_MAX_TILES} tiles"
