"""llama-shiftkv.h: the KV selection that the patches add to llama.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from edge_shiftkv.errors import ShiftKVError
from edge_shiftkv.native import logs
from edge_shiftkv.native.llama import Context

_ERR_ARGUMENT = -1
_QUERIES = 1  # the last prompt query is all that MM-ShiftKV looks at
_SEQUENCE = 0


class Params(ctypes.Structure):
    """`struct llama_shiftkv_params`."""

    _fields_ = [
        ("budget", ctypes.c_uint32),
        ("n_proxy", ctypes.c_uint32),
        ("n_group", ctypes.c_uint32),
        ("n_stat", ctypes.c_uint32),
        ("n_layer_repeat", ctypes.c_uint32),
        ("n_repeat", ctypes.c_uint32),
        ("gamma", ctypes.c_float),
        ("mass", ctypes.c_float),
        ("seed", ctypes.c_uint32),
        ("keep_scores", ctypes.c_bool),
    ]


class Info(ctypes.Structure):
    """`struct llama_shiftkv_info`."""

    n_prompt: int
    n_kept: int
    n_layer: int
    kv_bytes_prompt: int
    kv_bytes_kept: int

    _fields_ = [
        ("n_prompt", ctypes.c_uint32),
        ("n_kept", ctypes.c_uint32),
        ("n_layer", ctypes.c_uint32),
        ("kv_bytes_prompt", ctypes.c_size_t),
        ("kv_bytes_kept", ctypes.c_size_t),
    ]


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(llama._lib, f"llama_shiftkv_{name}")
    function.restype = restype
    function.argtypes = argtypes
    return function


_context = ctypes.c_void_p
_ints = ctypes.POINTER(ctypes.c_int32)

default_params = _function("default_params", Params)
_status_str = _function("status_str", ctypes.c_char_p, ctypes.c_int32)
_capture = _function("capture", ctypes.c_int32, _context, llama.llama_seq_id, ctypes.c_uint32)
_capture_end = _function("capture_end", ctypes.c_int32, _context)
_select = _function("select", ctypes.c_int32, _context, ctypes.POINTER(Params))
_compact = _function("compact", ctypes.c_int32, _context, _context, llama.llama_seq_id)
_get_info = _function("get_info", ctypes.c_int32, _context, ctypes.POINTER(Info))
_get_layers = _function("get_layers", ctypes.c_int32, _context, _ints, ctypes.c_size_t)
_get_kept = _function("get_kept", ctypes.c_int32, _context, ctypes.c_int32, ctypes.c_int32, _ints, ctypes.c_size_t)
_cache_size = _function("cache_size", ctypes.c_int64, _context)


def capture(context: Context) -> None:
    """Capture what `select` needs from the tokens decoded from now on. Raises ShiftKVError."""
    _check("a kv_budget cannot be used with this model", _capture, context.pointer, _SEQUENCE, _QUERIES)


def select(context: Context, params: Params) -> None:
    """Choose the KV pairs to keep of all that was captured. Raises ShiftKVError."""
    _check("the KV selection failed", _select, context.pointer, ctypes.byref(params))


def compact(context: Context, destination: Context) -> int:
    """Copy the chosen KV pairs into another context; return the position that decoding goes on at there.

    Raises ShiftKVError.
    """
    _check(
        "the selected KV pairs could not be handed over",
        *(_compact, context.pointer, destination.pointer, _SEQUENCE),
    )
    last: int = llama.llama_memory_seq_pos_max(llama.llama_get_memory(destination.pointer), _SEQUENCE)
    return last + 1


def info(context: Context) -> Info:
    """The last selection, in numbers."""
    result = Info()
    _check("no selection to read", _get_info, context.pointer, ctypes.byref(result))
    return result


def kept(context: Context) -> dict[int, npt.NDArray[np.int32]]:
    """The last selection: layer -> kept prompt tokens, shape [n_kv_head, n_kept], ascending in each head."""
    n_kept = info(context).n_kept
    n_layer = _check("no selection to read", _get_layers, context.pointer, None, 0)
    layers = (ctypes.c_int32 * n_layer)()
    _check("no selection to read", _get_layers, context.pointer, layers, n_layer)
    result = {}
    for layer in layers:
        heads: list[npt.NDArray[np.int32]] = []
        row = np.empty(n_kept, np.int32)
        while (status := _get_kept(context.pointer, layer, len(heads), row.ctypes.data_as(_ints), n_kept)) >= 0:
            heads.append(row.copy())
        if status != _ERR_ARGUMENT:  # which says that there is no such head
            raise _error("no selection to read", status)
        result[layer] = np.stack(heads)
    return result


def cache_size(context: Context) -> int:
    """The bytes a context's KV cache occupies, used or not. Raises ShiftKVError for a memory that has no such cache."""
    return _check("the size of the KV cache is not known", _cache_size, context.pointer)


def _check(what: str, function: Any, *arguments: Any) -> int:
    with logs.native_call() as errors:
        status: int = function(*arguments)
    if status < 0:
        raise _error(what, status, logs.explain(errors))
    return status


def _error(what: str, status: int, detail: str = "") -> ShiftKVError:
    return ShiftKVError(f"{what}: {_status_str(status).decode()}{detail}")
