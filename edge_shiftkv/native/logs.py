"""llama.cpp's log, through Python's `logging`: silent until the application configures a handler.

The logger is ``edge_shiftkv.llama_cpp``; for everything llama.cpp says::

    logging.basicConfig()
    logging.getLogger("edge_shiftkv.llama_cpp").setLevel(logging.DEBUG)
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

logger = logging.getLogger("edge_shiftkv.llama_cpp")
logging.getLogger("edge_shiftkv").addHandler(logging.NullHandler())

# ggml_log_level (ggml.h); 5 continues the line before, at its level.
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUES = 5


class _Thread(threading.local):
    """What one thread logs: another's calls may fail at the same time."""

    def __init__(self) -> None:
        self.level = logging.DEBUG
        self.errors: list[str] | None = None  # only while somebody reads them


_thread = _Thread()
_callback: Any = None  # ctypes keeps no reference to what C calls back


def redirect(llama_cpp: ModuleType, mtmd_cpp: ModuleType) -> None:
    """Send the log of llama.cpp, ggml and mtmd to `logger`."""
    global _callback

    def receive(ggml_level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        if ggml_level != _CONTINUES:
            _thread.level = _LEVELS.get(ggml_level, logging.DEBUG)
        line = text.decode(errors="replace").strip()
        if not line.strip("."):  # loading prints its progress as dots
            return
        if _thread.errors is not None and _thread.level >= logging.ERROR:
            _thread.errors.append(line)
        logger.log(_thread.level, "%s", line)

    _callback = llama_cpp.llama_log_callback(receive)
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(_callback, ctypes.c_void_p(0))


@contextmanager
def errors_of_this_thread() -> Iterator[list[str]]:
    """Yields a list that grows by the error lines this thread logs."""
    errors: list[str] = []
    before, _thread.errors = _thread.errors, errors
    try:
        yield errors
    finally:
        _thread.errors = before


def explain(lines: Sequence[str]) -> str:
    """The first error line, which is the most specific one, as the end of a message; or nothing."""
    return f" (llama.cpp: {' '.join(lines[0].split())})" if lines else ""
