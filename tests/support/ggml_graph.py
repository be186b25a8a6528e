"""Products and attention of ggml's CPU backend, with the weights in a buffer type of one's choice."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import gguf
import llama_cpp
import numpy as np

CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
MUL_MAT_MEMORY = 1 << 20


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(llama_cpp.llama_cpp._lib, name)
    function.restype, function.argtypes = result, arguments
    return function


_P = c_void_p
_init = _function("ggml_init", _P, _InitParams)
_free = _function("ggml_free", None, _P)
_tensor = _function("ggml_new_tensor", _P, _P, c_int, c_int, POINTER(c_int64))
_mul_mat = _function("ggml_mul_mat", _P, _P, _P, _P)
_mul_mat_id = _function("ggml_mul_mat_id", _P, _P, _P, _P, _P)
_get_rows = _function("ggml_get_rows", _P, _P, _P, _P)
_attention = _function("ggml_flash_attn_ext", _P, _P, _P, _P, _P, _P, c_float, c_float, c_float)
_new_graph = _function("ggml_new_graph", _P, _P)
_expand = _function("ggml_build_forward_expand", None, _P, _P)
_alloc = _function("ggml_backend_alloc_ctx_tensors_from_buft", _P, _P, _P)
_free_buffer = _function("ggml_backend_buffer_free", None, _P)
_buffer_size = _function("ggml_backend_buffer_get_size", c_size_t, _P)
_set = _function("ggml_backend_tensor_set", None, _P, c_void_p, c_size_t, c_size_t)
_get = _function("ggml_backend_tensor_get", None, _P, c_void_p, c_size_t, c_size_t)
_cpu_init = _function("ggml_backend_cpu_init", _P)
_cpu_type = _function("ggml_backend_cpu_buffer_type", _P)
_cpu_threads = _function("ggml_backend_cpu_set_n_threads", None, _P, c_int)
_cpu_reference = _function("ggml_backend_cpu_set_use_ref", None, _P, c_bool)
_compute = _function("ggml_backend_graph_compute", c_int, _P, _P)
_free_backend = _function("ggml_backend_free", None, _P)
_device = _function("ggml_backend_dev_by_type", _P, c_int)
_registry = _function("ggml_backend_dev_backend_reg", _P, _P)
_address = _function("ggml_backend_reg_get_proc_address", _P, _P, c_char_p)
_type_name = _function("ggml_backend_buft_name", c_char_p, _P)
_supports = _function("ggml_backend_dev_supports_op", c_bool, _P, _P)

has_avx2 = _function("ggml_cpu_has_avx2", c_int)


def cpu_buffer_type(name: str | None) -> int | None:
    """One of the CPU backend's extra buffer types, None if it has none of this name; its plain one for None."""
    if name is None:
        return int(_cpu_type())
    address = _address(_registry(_device(CPU_DEVICE)), b"ggml_backend_dev_get_extra_bufts")
    types = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(_device(CPU_DEVICE))
    for buffer_type in types:
        if not buffer_type:
            return None
        if _type_name(buffer_type).decode() == name:
            return int(buffer_type)
    return None


@contextmanager
def _context() -> Iterator[int]:
    context = _init(_InitParams(MUL_MAT_MEMORY, None, True))
    try:
        yield context
    finally:
        _free(context)


def _new(context: int, kind: int, *shape: int) -> int:
    return int(_tensor(context, kind, len(shape), (c_int64 * len(shape))(*shape)))


class Weights:
    """A matrix of quantized rows, as bytes, in a buffer of the CPU backend."""

    def __init__(self, kind: gguf.GGMLQuantizationType, rows: np.ndarray, buffer_type: int) -> None:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        self.n_rows = len(rows)
        self.n_values = rows.shape[1] // size * block
        self._context = _init(_InitParams(MUL_MAT_MEMORY, None, True))
        self.tensor = _new(self._context, kind, self.n_values, self.n_rows)
        self._buffer = _alloc(self._context, buffer_type)
        assert self._buffer
        self.buffer_size = int(_buffer_size(self._buffer))
        data = np.ascontiguousarray(rows)
        _set(self.tensor, data.ctypes.data, 0, data.nbytes)

    def close(self) -> None:
        """Free the buffer."""
        _free_buffer(self._buffer)
        _free(self._context)

    def multiply(self, columns: np.ndarray, n_threads: int = 1, *, reference: bool = False) -> np.ndarray:
        """Return the product with each of the float32 rows of `columns`, which may have more dimensions."""
        columns = np.ascontiguousarray(columns, np.float32)
        result = np.empty((*columns.shape[:-1], self.n_rows), np.float32)
        with _context() as context:
            source = _new(context, gguf.GGMLQuantizationType.F32, *columns.shape[::-1])
            product = _mul_mat(context, self.tensor, source)
            _run(context, product, {source: columns}, result, n_threads, reference=reference)
        return result


def _run(
    context: int,
    product: int,
    sources: Mapping[int, np.ndarray],
    result: np.ndarray,
    n_threads: int,
    *,
    reference: bool = False,
) -> None:
    """Fill tensors and compute a product of theirs into `result`."""
    backend = _cpu_init()
    graph = _new_graph(context)
    _expand(graph, product)
    buffer = _alloc(context, _cpu_type())
    for tensor, array in sources.items():
        data = np.ascontiguousarray(array)
        _set(tensor, data.ctypes.data, 0, data.nbytes)
    _cpu_threads(backend, n_threads)
    _cpu_reference(backend, reference)
    assert _compute(backend, graph) == 0
    _get(product, result.ctypes.data, 0, result.nbytes)
    _free_buffer(buffer)
    _free_backend(backend)


def attention(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    kinds: tuple[gguf.GGMLQuantizationType, gguf.GGMLQuantizationType],
    mask: np.ndarray,
    n_threads: int,
    softcap: float = 0.0,
) -> np.ndarray:
    """Flash attention of queries [n_head, n, d] over keys and values [n_head_kv, T, bytes]: [n, n_head, d of values].

    kinds: the types of keys and values.
    mask: [n, T] in float16, added to the logits.
    """
    with _context() as context:

        def new(kind: gguf.GGMLQuantizationType, array: np.ndarray, n_values: int) -> int:
            return _new(context, kind, n_values, *array.shape[-2::-1])

        def size(kind: gguf.GGMLQuantizationType, rows: np.ndarray) -> int:
            block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
            return int(rows.shape[-1] // n_bytes * block)

        d, d_value = size(kinds[0], keys), size(kinds[1], values)
        sources = {
            new(gguf.GGMLQuantizationType.F32, queries, d): queries,
            new(kinds[0], keys, d): keys,
            new(kinds[1], values, d_value): values,
            new(gguf.GGMLQuantizationType.F16, mask, mask.shape[1]): mask,
        }
        result = np.empty((queries.shape[1], len(queries), d_value), np.float32)
        product = _attention(context, *sources, d**-0.5, 0.0, softcap)
        _run(context, product, sources, result, n_threads)
    return result


def supports(
    kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], buffer_type: int, *, look_up: bool = False
) -> bool:
    """Whether the CPU multiplies by, or looks up, weights of this shape (values, rows, experts) in such a buffer."""
    with _context() as weights, _context() as context:
        tensor = _new(weights, kind, *shape)
        buffer = _alloc(weights, buffer_type)
        if look_up:
            rows = (4,) if len(shape) == 2 else (4, shape[2])
            product = _get_rows(context, tensor, _new(context, gguf.GGMLQuantizationType.I32, *rows))
        elif len(shape) == 3:
            source = _new(context, gguf.GGMLQuantizationType.F32, shape[0], 1, 4)
            product = _mul_mat_id(context, tensor, source, _new(context, gguf.GGMLQuantizationType.I32, 1, 4))
        else:
            product = _mul_mat(context, tensor, _new(context, gguf.GGMLQuantizationType.F32, shape[0], 4))
        try:
            return bool(_supports(_device(CPU_DEVICE), product))
        finally:
            _free_buffer(buffer)
