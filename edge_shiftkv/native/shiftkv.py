"""llama-shiftkv.h: the KV selection that the patches add to llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple, cast

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from edge_shiftkv.budget import PairBytes
from edge_shiftkv.errors import ShiftKVError
from edge_shiftkv.native import logs
from edge_shiftkv.native.calls import native_call
from edge_shiftkv.native.gguf_file import BLOCKS, F16
from edge_shiftkv.native.llama import Context

MAX_PROXY = 4096
MAX_QUERY = 512
MAX_POOL = 63

_SEQUENCE = 0

Floats = npt.NDArray[np.float32]


class Params(ctypes.Structure):
    """`struct llama_shiftkv_params`."""

    _fields_ = [
        ("method", ctypes.c_int32),
        ("budget", ctypes.c_uint32),
        ("n_prompt", ctypes.c_uint32),
        ("n_sink", ctypes.c_uint32),
        ("n_recent", ctypes.c_uint32),
        ("n_pool", ctypes.c_uint32),
        ("n_window", ctypes.c_uint32),
        ("n_future", ctypes.c_uint32),
        ("n_proxy", ctypes.c_uint32),
        ("n_group", ctypes.c_uint32),
        ("n_stat", ctypes.c_uint32),
        ("n_layer_repeat", ctypes.c_uint32),
        ("n_repeat", ctypes.c_uint32),
        ("gamma", ctypes.c_float),
        ("mass", ctypes.c_float),
        ("observed", ctypes.c_float),
        ("seed", ctypes.c_uint32),
        ("keep_scores", ctypes.c_bool),
    ]


class Info(ctypes.Structure):
    """`struct llama_shiftkv_info`."""

    n_prompt: int
    n_kept: int
    n_layer: int
    n_past: int
    kv_bytes_prompt: int
    kv_bytes_kept: int
    bytes_moved: int

    _fields_ = [
        ("n_prompt", ctypes.c_uint32),
        ("n_kept", ctypes.c_uint32),
        ("n_layer", ctypes.c_uint32),
        ("n_past", ctypes.c_int32),
        ("kv_bytes_prompt", ctypes.c_size_t),
        ("kv_bytes_kept", ctypes.c_size_t),
        ("bytes_moved", ctypes.c_size_t),
    ]


class Shape(NamedTuple):
    """The sizes of a layer that is cut; `n_embd_head` is the size of its heads."""

    n_head: int
    n_head_kv: int
    n_embd_head: int


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(llama._lib, f"llama_shiftkv_{name}")
    function.restype = restype
    function.argtypes = argtypes
    return function


_context = ctypes.c_void_p
_ints = ctypes.POINTER(ctypes.c_int32)
_floats = ctypes.POINTER(ctypes.c_float)

default_params = _function("default_params", Params, ctypes.c_int32)
_n_method = _function("n_method", ctypes.c_int32)
_method_name = _function("method_name", ctypes.c_char_p, ctypes.c_int32)
_n_query = _function("n_query", ctypes.c_int32, ctypes.POINTER(Params))
_status_str = _function("status_str", ctypes.c_char_p, ctypes.c_int32)
_capture = _function("capture", ctypes.c_int32, _context, llama.llama_seq_id, ctypes.c_uint32)
_capture_end = _function("capture_end", ctypes.c_int32, _context)
_select = _function("select", ctypes.c_int32, _context, ctypes.POINTER(Params))
_select_scores = _function("select_scores", ctypes.c_int32, _context, ctypes.POINTER(Params), _floats, ctypes.c_size_t)
_compact = _function("compact", ctypes.c_int32, _context, _context, llama.llama_seq_id)
_by_layer = _function("by_layer", ctypes.c_int32, _context, ctypes.c_uint32, ctypes.c_uint32)
_next_layer = _function(
    *("next_layer", ctypes.c_int32, _context, ctypes.POINTER(Params), _floats, ctypes.c_size_t),
    *(_context, llama.llama_seq_id),
)
_get_info = _function("get_info", ctypes.c_int32, _context, ctypes.POINTER(Info))
_get_layers = _function("get_layers", ctypes.c_int32, _context, _ints, ctypes.c_size_t)
_get_shape = _function("get_shape", ctypes.c_int32, _context, ctypes.c_int32, _ints)
_get_kept = _function("get_kept", ctypes.c_int32, _context, ctypes.c_int32, ctypes.c_int32, _ints, ctypes.c_size_t)
_get_scores = _function(
    "get_scores", ctypes.c_int32, _context, ctypes.c_int32, ctypes.c_int32, _floats, ctypes.c_size_t
)
_get_hidden = _function("get_hidden", ctypes.c_int32, _context, ctypes.c_int32, _floats, ctypes.c_size_t)
_get_queries = _function("get_queries", ctypes.c_int32, _context, ctypes.c_int32, _floats, ctypes.c_size_t)
_get_keys = _function("get_keys", ctypes.c_int32, _context, ctypes.c_int32, _floats, ctypes.c_size_t)
_cache_size = _function("cache_size", ctypes.c_int64, _context)


METHODS: dict[str, int] = {_method_name(number).decode(): number for number in range(_n_method())}
"""The library's methods: their names, and the numbers that `Params.method` and `default_params` call them by."""

Method: Any = cast(Any, IntEnum)("Method", {name.upper().replace("-", "_"): number for name, number in METHODS.items()})
"""The same as an enum: "expected-attention" is `Method.EXPECTED_ATTENTION`."""


def n_query(params: Params) -> int:
    """The last queries that a selection with these parameters needs. Raises ShiftKVError when they are out of range."""
    return _check("the KV selection has wrong parameters", _n_query, ctypes.byref(params))


def capture(context: Context, n_query: int = 1) -> None:
    """Capture what `select` needs from the tokens decoded from now on, with the last `n_query` queries of each layer.

    Raises ShiftKVError.
    """
    _check("a kv_budget cannot be used with this model", _capture, context.pointer, _SEQUENCE, n_query)


def capture_end(context: Context) -> None:
    """Capture no more, and free what was; the last selection stays readable. Raises ShiftKVError."""
    _check("the capture could not be ended", _capture_end, context.pointer)


def select(context: Context, params: Params) -> None:
    """Choose the KV pairs to keep of all that was captured. Raises ShiftKVError."""
    _check("the KV selection failed", _select, context.pointer, ctypes.byref(params))


def select_scores(context: Context, params: Params, scores: Mapping[int, npt.ArrayLike]) -> None:
    """Choose the KV pairs to keep by scores [n_head_kv, n_prompt] of each layer of `layers`: higher is better.

    Of `params` only what every method has counts: n_prompt < the tokens captured ranks only the first ones.
    Raises ShiftKVError, also for scores that are NaN or of another shape.
    """
    flat = np.concatenate([np.asarray(scores[layer], np.float32).ravel() for layer in layers(context)])
    _check(
        "the KV selection failed",
        *(_select_scores, context.pointer, ctypes.byref(params), flat.ctypes.data_as(_floats), flat.size),
    )


def compact(context: Context, destination: Context, sequence: int = 0) -> int:
    """Copy the chosen KV pairs into a sequence of another context; return the position that decoding goes on at there.

    Raises ShiftKVError.
    """
    _check(
        "the selected KV pairs could not be handed over",
        *(_compact, context.pointer, destination.pointer, sequence),
    )
    # A picture at the end of the prompt takes more positions in M-RoPE than its tokens say.
    return info(context).n_past


def by_layer(context: Context, n_ctx: int, n_query: int = 1) -> None:
    """Give a new context a cache of `n_ctx` tokens for one layer: it then decodes through one layer after the other.

    n_query: as for `capture`.

    Raises ShiftKVError; the context can only be closed then.
    """
    _check("prompts of this model cannot be read layer by layer", _by_layer, context.pointer, n_ctx, n_query)
    context.resized()


def next_layer(
    context: Context,
    params: Params,
    destination: Context,
    sequence: int = 0,
    scores: npt.ArrayLike | None = None,
) -> int:
    """Select of the layer that a prompt was read through, hand over, and go on to the next; return how many are left.

    scores: in place of a method, as in `select_scores`: [n_head_kv, n_prompt].

    Raises ShiftKVError.
    """
    flat = None if scores is None else np.ascontiguousarray(scores, np.float32).ravel()
    return _check(
        "the KV pairs of a layer could not be selected and handed over",
        *(_next_layer, context.pointer, ctypes.byref(params)),
        *((None, 0) if flat is None else (flat.ctypes.data_as(_floats), flat.size)),
        *(destination.pointer, sequence),
    )


def info(context: Context) -> Info:
    """The last selection, in numbers."""
    result = Info()
    _check("no selection to read", _get_info, context.pointer, ctypes.byref(result))
    return result


def layers(context: Context) -> list[int]:
    """The model layers that are cut, ascending. Raises ShiftKVError before `capture`."""
    n_layer = _check("nothing was captured", _get_layers, context.pointer, None, 0)
    result = (ctypes.c_int32 * n_layer)()
    _check("nothing was captured", _get_layers, context.pointer, result, n_layer)
    return list(result)


def shape(context: Context, layer: int) -> Shape:
    """The sizes of a layer that is cut. Raises ShiftKVError for another layer, or before `capture`."""
    result = (ctypes.c_int32 * 3)()
    _check("nothing was captured", _get_shape, context.pointer, layer, result)
    return Shape(*result)


def pair_bytes(context: Context) -> PairBytes:
    """What a token's KV pairs take in the layers that are cut. Raises ShiftKVError before `capture`."""
    stored = f16 = 0
    for layer in layers(context):
        size = shape(context, layer)
        n_k, n_v = size.n_head_kv * size.n_embd_head, size.n_head_kv * context.model.n_embd_head_v
        stored += _row_bytes(context.ggml_type_k, n_k) + _row_bytes(context.ggml_type_v, n_v)
        f16 += _row_bytes(F16, n_k + n_v)
    return PairBytes(stored, f16)


def _row_bytes(ggml_type: int, n: int) -> int:
    block, size = BLOCKS[ggml_type]
    return n // block * size


def kept(context: Context) -> dict[int, npt.NDArray[np.int32]]:
    """The last selection: layer -> kept prompt tokens, shape [n_kv_head, n_kept], ascending in each head."""
    n_kept = info(context).n_kept
    return {layer: _heads(context, layer, _get_kept, _ints, n_kept, np.int32) for layer in layers(context)}


def scores(context: Context) -> dict[int, Floats]:
    """The last selection's scores, if its params asked to keep them: layer -> [n_kv_head, n_prompt].

    They are infinite where a token is always kept. Raises ShiftKVError when they were not kept.
    """
    n_prompt = info(context).n_prompt
    return {layer: _heads(context, layer, _get_scores, _floats, n_prompt, np.float32) for layer in layers(context)}


def hidden(context: Context, layer: int) -> Floats:
    """What the query projection of a layer multiplied: the last rows captured, [n, n_embd]. Raises ShiftKVError."""
    n_embd = llama.llama_model_n_embd(llama.llama_get_model(context.pointer))
    return _captured(_get_hidden, context, layer, MAX_QUERY, (n_embd,))


def queries(context: Context, layer: int) -> Floats:
    """The last queries captured, as attention sees them: [n, n_head, n_embd_head]. Raises ShiftKVError."""
    size = shape(context, layer)
    return _captured(_get_queries, context, layer, MAX_QUERY, (size.n_head, size.n_embd_head))


def keys(context: Context, layer: int) -> Floats:
    """The keys of all tokens in the sequence, as attention sees them: [n, n_head_kv, n_embd_head].

    Quantized ones may be stored rotated, as `queries` are then, too. Raises ShiftKVError.
    """
    size = shape(context, layer)
    return _captured(_get_keys, context, layer, context.n_ctx, (size.n_head_kv, size.n_embd_head))


def cache_size(context: Context) -> int:
    """The bytes a context's KV cache occupies, used or not. Raises ShiftKVError for a memory that has no such cache."""
    return _check("the size of the KV cache is not known", _cache_size, context.pointer)


def _heads(context: Context, layer: int, function: Any, pointer: Any, n: int, dtype: Any) -> npt.NDArray[Any]:
    """A row of n values for each KV head of a layer."""
    result = np.empty((shape(context, layer).n_head_kv, n), dtype)
    for head, row in enumerate(result):
        _check("no selection to read", function, context.pointer, layer, head, row.ctypes.data_as(pointer), n)
    return result


def _captured(function: Any, context: Context, layer: int, n_max: int, row: tuple[int, ...]) -> Floats:
    """The rows, n_max at most, that a function returns the number of."""
    result = np.empty((n_max, *row), np.float32)
    n = _check("nothing to read", function, context.pointer, layer, result.ctypes.data_as(_floats), result.size)
    rows: Floats = result[:n].copy()
    return rows


def _check(what: str, function: Any, *arguments: Any) -> int:
    with native_call() as errors:
        status: int = function(*arguments)
    if status < 0:
        detail = logs.explain(errors)
        raise ShiftKVError(f"{what}: {_status_str(status).decode()}{detail}")
    return status
