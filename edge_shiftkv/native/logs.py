"""llama.cpp's log, through Python's `logging`: silent until the application configures a handler.

The logger is ``edge_shiftkv.llama_cpp``; for everything llama.cpp says::

    logging.basicConfig()
    logging.getLogger("edge_shiftkv.llama_cpp").setLevel(logging.DEBUG)
"""

from __future__ import annotations

import ctypes
import logging
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

logger = logging.getLogger("edge_shiftkv.llama_cpp")
logging.getLogger("edge_shiftkv").addHandler(logging.NullHandler())

# ggml_log_level (ggml.h); 5 continues the line before, at its level.
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUES = 5

_recent_errors: deque[str] = deque(maxlen=8)
_callback: Any = None  # ctypes keeps no reference to what C calls back
_asserts_throw: Any = None  # llama_shiftkv_asserts_throw


def redirect(llama_cpp: ModuleType, mtmd_cpp: ModuleType) -> None:
    """Send the log of llama.cpp, ggml and mtmd to `logger`."""
    global _callback, _asserts_throw
    level = logging.DEBUG

    def receive(ggml_level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        nonlocal level
        if ggml_level != _CONTINUES:
            level = _LEVELS.get(ggml_level, logging.DEBUG)
        line = text.decode(errors="replace").strip()
        if not line.strip("."):  # loading prints its progress as dots
            return
        if level >= logging.ERROR:
            _recent_errors.append(line)
        logger.log(level, "%s", line)

    _asserts_throw = llama_cpp._lib.llama_shiftkv_asserts_throw
    _asserts_throw.argtypes = [ctypes.c_bool]
    _asserts_throw.restype = ctypes.c_bool
    _callback = llama_cpp.llama_log_callback(receive)
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(_callback, ctypes.c_void_p(0))


@contextmanager
def native_call() -> Iterator[deque[str]]:
    """Surround calls into llama.cpp that may log; yields the error lines they log.

    Ctrl-C is held back until the end: raised inside the log callback, a KeyboardInterrupt would be lost in C. An
    assertion of llama.cpp that fails ends the call with an error where llama.cpp handles errors, not the process.
    """
    _recent_errors.clear()
    before = _asserts_throw(True)
    try:
        with _interrupts_held():
            yield _recent_errors
    finally:
        _asserts_throw(before)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[-1])


def explain(lines: deque[str]) -> str:
    """The first error line, which is the most specific one, as the end of a message; or nothing."""
    return f" (llama.cpp: {' '.join(lines[0].split())})" if lines else ""
