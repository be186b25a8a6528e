"""The C API as the tests use it: raw status codes, any sequence, and the cells of a KV cache as arrays."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from edge_shiftkv.native.shiftkv import MAX_QUERY, Info, Method, Params, default_params
from support import kv_state
from support.gguf_random import Spec, write_model
from support.kv_state import Cells
from support.weights import Weights

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

GPU_LAYERS = int(os.environ.get("EDGE_SHIFTKV_TEST_GPU_LAYERS", "0"))
"""Layers to put on a GPU; 0 tests the CPU backend."""

OK = 0
(
    ARGUMENT,
    UNSUPPORTED,
    NOT_CAPTURING,
    EMPTY,
    STALE,
    NO_SELECTION,
    MISMATCH,
    NO_SPACE,
    COMPUTE,
) = range(-1, -10, -1)

TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
"""enum ggml_type."""

QUANTIZED = ("q8_0", "q4_0")


def c_function(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of llama-shiftkv.h."""
    function = getattr(llama._lib, f"llama_shiftkv_{name}")
    prototype = ctypes.CFUNCTYPE(restype, *argtypes)
    return prototype(ctypes.cast(function, ctypes.c_void_p).value)


_i32, _u32, _size, _pointer = ctypes.c_int32, ctypes.c_uint32, ctypes.c_size_t, ctypes.c_void_p

c_status_str = c_function("status_str", ctypes.c_char_p, _i32)
c_capture = c_function("capture", _i32, _pointer, _i32, _u32)
c_capture_end = c_function("capture_end", _i32, _pointer)
c_select = c_function("select", _i32, _pointer, _pointer)
c_select_scores = c_function("select_scores", _i32, _pointer, _pointer, _pointer, _size)
c_select_size = c_function("select_size", ctypes.c_int64, _pointer, _pointer, _u32)
c_compact = c_function("compact", _i32, _pointer, _pointer, _i32)
c_by_layer = c_function("by_layer", _i32, _pointer, _u32, _u32)
c_next_layer = c_function("next_layer", _i32, _pointer, _pointer, _pointer, _size, _pointer, _i32)
c_get_info = c_function("get_info", _i32, _pointer, _pointer)
c_get_layers = c_function("get_layers", _i32, _pointer, _pointer, _size)
c_get_shape = c_function("get_shape", _i32, _pointer, _i32, _pointer)
c_get_kept = c_function("get_kept", _i32, _pointer, _i32, _i32, _pointer, _size)
c_get_scores = c_function("get_scores", _i32, _pointer, _i32, _i32, _pointer, _size)
c_get_stats = c_function("get_stats", _i32, _pointer, _i32, _u32, _pointer)
c_get_hidden = c_function("get_hidden", _i32, _pointer, _i32, _pointer, _size)
c_get_queries = c_function("get_queries", _i32, _pointer, _i32, _pointer, _size)
c_get_keys = c_function("get_keys", _i32, _pointer, _i32, _pointer, _size)
c_cache_size = c_function("cache_size", ctypes.c_int64, _pointer)

set_causal_attn = llama.llama_set_causal_attn


def params(budget: int, method: Method = Method.SHIFTKV, **others: Any) -> Params:
    """A method's settings as published, but for `others`."""
    result = default_params(method)
    result.budget = budget
    for name, value in others.items():
        assert hasattr(result, name)
        setattr(result, name, value)
    return result


class Model:
    """A model's weights."""

    def __init__(self, spec: Spec, folder: Path) -> None:
        options = llama.llama_model_default_params()
        options.n_gpu_layers = GPU_LAYERS
        self.spec = spec
        self.path = path = write_model(spec, folder)
        self.pointer = llama.llama_model_load_from_file(str(path).encode(), options)
        assert self.pointer, f"{path} cannot be loaded"
        self.n_embd: int = llama.llama_model_n_embd(self.pointer)
        self.n_vocab: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.pointer))
        self.n_pos = 4 if llama.llama_model_rope_type(self.pointer) in (8, 40) else 1

    @cached_property
    def weights(self) -> Weights:
        """The weights in numpy."""
        return Weights(self.spec, self.path)

    def close(self) -> None:
        """Free the weights."""
        llama.llama_model_free(self.pointer)


@dataclass(frozen=True)
class Image:
    """`nx` x `ny` embeddings between text tokens. M-RoPE models place them on a grid, others one after the other."""

    embeddings: Array
    nx: int
    ny: int


Chunk = Sequence[int] | Image


class Context:
    """A KV cache and the buffers to decode with."""

    def __init__(
        self,
        model: Model,
        n_ctx: int = 512,
        *,
        type_k: str = "f32",
        type_v: str | None = None,
        flash: bool | None = False,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        unified: bool = True,
        **others: Any,
    ) -> None:
        options = llama.llama_context_default_params()
        options.n_ctx = n_ctx
        options.n_batch = 512
        options.n_ubatch = n_ubatch
        options.n_seq_max = n_seq_max
        options.kv_unified = unified
        options.flash_attn_type = -1 if flash is None else int(flash)
        options.type_k = TYPES[type_k]
        options.type_v = TYPES[type_v or type_k]
        options.n_threads = options.n_threads_batch = 1
        for name, value in others.items():
            assert hasattr(options, name)
            setattr(options, name, value)
        self.model = model
        self.type_k = type_k
        rotation_off = os.environ.get("LLAMA_ATTN_ROT_DISABLE", "0") != "0"
        self.rotated = type_k in QUANTIZED and model.spec.d_head % 64 == 0 and not rotation_off
        """Whether keys are stored rotated."""
        self.pointer = llama.llama_init_from_model(model.pointer, options)
        assert self.pointer, "no context"

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        llama.llama_free(self.pointer)

    # decoding

    def try_decode(
        self,
        tokens: Sequence[int] | None,
        positions: Sequence[int],
        seq: Sequence[int],
        embeddings: Array | None = None,
    ) -> int:
        """One llama_decode() call of tokens or embeddings, each in one sequence, with logits after the last."""
        n = len(seq)
        ids = [(ctypes.c_int32 * 1)(s) for s in seq]
        pointers = [ctypes.cast(i, ctypes.POINTER(ctypes.c_int32)) for i in ids]
        batch = llama.llama_batch(
            n_tokens=n,
            pos=(ctypes.c_int32 * len(positions))(*positions),
            n_seq_id=(ctypes.c_int32 * n)(*[1] * n),
            seq_id=(ctypes.POINTER(ctypes.c_int32) * n)(*pointers),
            logits=(ctypes.c_int8 * n)(*[0] * (n - 1), 1),
        )
        if embeddings is None:
            assert tokens is not None
            batch.token = (ctypes.c_int32 * n)(*tokens)
        else:
            data = np.ascontiguousarray(embeddings, np.float32)
            batch.embd = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        status: int = llama.llama_decode(self.pointer, batch)
        return status

    def decode(self, tokens: Sequence[int], position: int, seq: int = 0) -> Array:
        """Decode tokens from `position` on, in as few calls as possible; return the logits after the last."""
        for i in range(0, len(tokens), 512):
            part = tokens[i : i + 512]
            start = position + i
            assert self.try_decode(part, range(start, start + len(part)), [seq] * len(part)) == 0
        return self.logits()

    def decode_image(self, image: Image, position: int, seq: int = 0) -> int:
        """Decode an image's embeddings, positioned as mtmd does; return the position after it."""
        n = len(image.embeddings)
        if self.model.n_pos == 1:
            positions = list(range(position, position + n))
            after = position + n
        else:
            rows, columns = np.divmod(np.arange(n), image.nx)
            grid = [np.full(n, position), position + rows, position + columns, np.zeros(n, int)]
            positions = np.concatenate(grid).tolist()
            after = position + max(image.nx, image.ny)
        assert self.try_decode(None, positions, [seq] * n, image.embeddings) == 0
        return after

    def prefill(self, prompt: Sequence[Chunk], seq: int = 0, position: int = 0) -> int:
        """Decode a prompt of text and images chunk by chunk; return the position after it."""
        for chunk in prompt:
            if isinstance(chunk, Image):
                position = self.decode_image(chunk, position, seq)
            else:
                self.decode(chunk, position, seq)
                position += len(chunk)
        return position

    def logits(self) -> Array:
        """The logits after the last token decoded."""
        pointer = llama.llama_get_logits_ith(self.pointer, -1)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab,)).copy()

    # memory

    @property
    def memory(self) -> Any:
        """The `llama_memory_t`."""
        return llama.llama_get_memory(self.pointer)

    def remove(self, seq: int = 0, start: int = -1, stop: int = -1) -> bool:
        """llama_memory_seq_rm()."""
        removed: bool = llama.llama_memory_seq_rm(self.memory, seq, start, stop)
        return removed

    def clear(self) -> None:
        """llama_memory_clear() without the data."""
        llama.llama_memory_clear(self.memory, False)

    def last_position(self, seq: int = 0) -> int:
        """llama_memory_seq_pos_max()."""
        position: int = llama.llama_memory_seq_pos_max(self.memory, seq)
        return position

    def state(self, seq: int = 0) -> bytes:
        """A sequence's state as llama.cpp saves it."""
        size = llama.llama_state_seq_get_size(self.pointer, seq)
        buffer = (ctypes.c_uint8 * size)()
        assert llama.llama_state_seq_get_data(self.pointer, buffer, size, seq) == size
        return bytes(buffer)

    def load_state(self, data: bytes, seq: int = 0) -> None:
        """Put a saved state into a sequence."""
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        assert llama.llama_state_seq_set_data(self.pointer, buffer, len(data), seq) == len(data)

    def cells(self, seq: int = 0) -> list[Cells]:
        """A sequence's cells in its caches: one cache, or a sliding-window model's two (full attention first)."""
        return kv_state.parse(self.state(seq), has_extent=self.model.n_pos > 1)

    def cache_size(self) -> int:
        """llama_shiftkv_cache_size()."""
        size: int = c_cache_size(self.pointer)
        return size

    # the selection

    def capture(self, seq: int = 0, n_query: int = 1) -> int:
        """llama_shiftkv_capture()."""
        status: int = c_capture(self.pointer, seq, n_query)
        return status

    def capture_end(self) -> int:
        """llama_shiftkv_capture_end()."""
        status: int = c_capture_end(self.pointer)
        return status

    def select(self, settings: Params) -> int:
        """llama_shiftkv_select()."""
        status: int = c_select(self.pointer, ctypes.addressof(settings))
        return status

    def select_size(self, settings: Params, n_prompt: int) -> int:
        """llama_shiftkv_select_size()."""
        size: int = c_select_size(self.pointer, ctypes.addressof(settings), n_prompt)
        return size

    def select_scores(self, settings: Params, scores: Array) -> int:
        """llama_shiftkv_select_scores() by scores of all layers: [n_layer, n_head_kv, n_prompt], or the same flat."""
        flat = np.ascontiguousarray(scores, np.float32)
        status: int = c_select_scores(self.pointer, ctypes.addressof(settings), flat.ctypes.data, flat.size)
        return status

    def compact(self, destination: Context | None = None, seq: int = 0) -> int:
        """llama_shiftkv_compact()."""
        status: int = c_compact(self.pointer, (destination or self).pointer, seq)
        return status

    def by_layer(self, n_ctx: int = 512, n_query: int = 1) -> int:
        """llama_shiftkv_by_layer()."""
        status: int = c_by_layer(self.pointer, n_ctx, n_query)
        return status

    def next_layer(self, settings: Params, destination: Context, seq: int = 0, scores: Array | None = None) -> int:
        """llama_shiftkv_next_layer()."""
        flat = None if scores is None else np.ascontiguousarray(scores, np.float32)
        given = (None, 0) if flat is None else (flat.ctypes.data, flat.size)
        status: int = c_next_layer(self.pointer, ctypes.addressof(settings), *given, destination.pointer, seq)
        return status

    def info(self) -> Info:
        """llama_shiftkv_get_info()."""
        result = Info()
        assert c_get_info(self.pointer, ctypes.addressof(result)) == OK
        return result

    def layers(self) -> list[int]:
        """llama_shiftkv_get_layers()."""
        n = c_get_layers(self.pointer, None, 0)
        assert n > 0
        out = np.empty(n, np.int32)
        assert c_get_layers(self.pointer, out.ctypes.data, n) == n
        return out.tolist()

    def shape(self, layer: int) -> tuple[int, ...]:
        """llama_shiftkv_get_shape()."""
        out = np.empty(3, np.int32)
        assert c_get_shape(self.pointer, layer, out.ctypes.data) == OK
        return tuple(out.tolist())

    def kept(self, layer: int) -> Ints:
        """The kept prompt tokens of a layer, [n_head_kv, n_kept]."""
        n_kept = self.info().n_kept
        return np.array(list(self._rows(c_get_kept, layer, n_kept, np.int32)), np.int32)

    def scores(self, layer: int) -> Array:
        """The scores of a layer, [n_head_kv, n_prompt]."""
        n_prompt = self.info().n_prompt
        return np.array(list(self._rows(c_get_scores, layer, n_prompt, np.float32)), np.float32)

    def all_kept(self) -> dict[int, list[list[int]]]:
        """The kept prompt tokens by layer and KV head."""
        return {layer: self.kept(layer).tolist() for layer in self.layers()}

    def stats(self, layer: int, n_stat: int = 512) -> tuple[float, float]:
        """Mean and standard deviation of the hidden state over the last tokens."""
        out = np.empty(2, np.float32)
        assert c_get_stats(self.pointer, layer, n_stat, out.ctypes.data) == OK
        return float(out[0]), float(out[1])

    def hidden(self, layer: int) -> Array:
        """The last hidden states, [n, n_embd]."""
        return self._captured(c_get_hidden, layer, (MAX_QUERY, self.model.n_embd))

    def queries(self, layer: int) -> Array:
        """The last queries, [n, n_head, d_head]."""
        spec = self.model.spec
        return self._captured(c_get_queries, layer, (MAX_QUERY, spec.n_head, spec.d_head))

    def keys(self, layer: int) -> Array:
        """The keys of all tokens, [n, n_head_kv, d_head]."""
        spec = self.model.spec
        return self._captured(c_get_keys, layer, (1024, spec.n_head_kv, spec.d_head))

    def _captured(self, function: Any, layer: int, shape: tuple[int, ...]) -> Array:
        out = np.empty(shape, np.float32)
        n = function(self.pointer, layer, out.ctypes.data, out.size)
        assert n >= 0, n
        return out[:n]

    def _rows(self, function: Any, layer: int, n: int, dtype: Any) -> Iterator[npt.NDArray[Any]]:
        for head in range(1 << 10):
            row = np.empty(n, dtype)
            status = function(self.pointer, layer, head, row.ctypes.data, n)
            if status == ARGUMENT and head > 0:
                return
            assert status == n, status
            yield row


def assert_same(values: Array, expected: Array) -> None:
    """Two results are equal; on a GPU, where batches may be computed differently, nearly so."""
    np.testing.assert_allclose(values, expected, rtol=0, atol=2e-2 if GPU_LAYERS else 0)


@contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable that the library reads; None: none of that name."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
