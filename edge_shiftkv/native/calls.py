"""Calls into llama.cpp: what they log as errors, how they are ended early, and who may make them.

llama.cpp computes for seconds at a time, in which Python runs nothing: no signal handler, and no check of whether the
answer is still wanted. So it is given a callback that asks now and then, see `Interrupt`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import llama_cpp.llama_cpp as llama

from edge_shiftkv.errors import CancelledError, ClosedError, ShiftKVError, TimeLimitError
from edge_shiftkv.native import logs

_INTERVAL_US = 50_000

_asserts_throw = llama._lib.llama_shiftkv_asserts_throw
_asserts_throw.argtypes = [ctypes.c_bool]
_asserts_throw.restype = ctypes.c_bool

_ASK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)

Signal = tuple[int, FrameType | None]
_held: list[Signal] | None = None  # Ctrl-C during the call that the main thread is in
_n_forks = 0


def _forked() -> None:
    global _n_forks
    _n_forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@contextmanager
def native_call() -> Iterator[list[str]]:
    """Surround calls into llama.cpp; yields the error lines that this thread logs in them.

    Ctrl-C is held back until the end: raised inside a callback, a KeyboardInterrupt would be lost in C. A computation
    that an `Interrupt` watches ends early for it. An assertion of llama.cpp that fails ends the call with an error
    where llama.cpp handles errors, not the process.
    """
    with logs.errors_of_this_thread() as errors, _interrupts_held():
        before = _asserts_throw(True)
        try:
            yield errors
        finally:
            _asserts_throw(before)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    global _held
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous) or _held is not None:
        yield
        return
    held: list[Signal] = []
    _held = held
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        _held = None
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[-1])


class _Poll(ctypes.Structure):
    """`struct llama_shiftkv_poll`."""

    ended: bool

    _fields_ = [
        ("ask", _ASK),
        ("data", ctypes.c_void_p),
        ("interval_us", ctypes.c_int64),
        ("asked_us", ctypes.c_int64),
        ("ended", ctypes.c_bool),
    ]


class Interrupt:
    """Ends what llama.cpp computes for one request: by `cancel`, by a time limit, or by Ctrl-C.

    `cancel` may be called from any thread. What was ended raises where `check` is called, which is before and after
    each computation; Ctrl-C raises KeyboardInterrupt by itself.
    """

    def __init__(self) -> None:
        self._cancelled = False
        self._deadline: float | None = None
        self._time_limit = 0.0
        self._poll = _Poll(ask=_ASK(self._ask), interval_us=_INTERVAL_US)

    def begin(self, time_limit: float | None = None) -> None:
        """Begin a request, which has `time_limit` seconds."""
        self._cancelled = False
        self.limit(time_limit)

    def limit(self, time_limit: float | None) -> None:
        """Give the request `time_limit` seconds from now on; None, all that it takes."""
        self._time_limit = time_limit or 0.0
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._poll.ended = False

    def cancel(self) -> None:
        """End the request that was begun last."""
        self._cancelled = True

    def check(self) -> None:
        """Raise CancelledError or TimeLimitError if the request is to end."""
        self._poll.ended = False
        if self._cancelled:
            raise CancelledError("the request was cancelled")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise late(self._time_limit)

    def watch(self, context: Any) -> None:
        """Have computations of a `llama_context *` end early."""
        llama.llama_set_abort_callback(
            context,
            ctypes.cast(llama._lib.llama_shiftkv_abort_callback, llama.ggml_abort_callback),
            ctypes.cast(ctypes.byref(self._poll), ctypes.c_void_p),
        )

    def watch_encoder(self, params: Any) -> None:
        """The same for what is made with `mtmd_context_params`."""
        callback = llama._lib.llama_shiftkv_eval_callback
        params.cb_eval = ctypes.cast(callback, llama.ggml_backend_sched_eval_callback)
        params.cb_eval_user_data = ctypes.cast(ctypes.byref(self._poll), ctypes.c_void_p)

    def _ask(self, _data: int | None) -> bool:
        # Running Python code also lets the signal handler of `native_call` run.
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return bool(self._cancelled or late or _held)


def late(time_limit: float) -> TimeLimitError:
    """The error for a request that took too long."""
    return TimeLimitError(f"the request took longer than its time limit of {time_limit:g} s")


class Loading:
    """llama.cpp's progress in loading a file, for a callback; ends the load at Ctrl-C or when the callback raises.

    report: is given the share that is loaded, 0 to 1.
    """

    def __init__(self, report: Callable[[float], None] | None) -> None:
        self._report = report
        self._error: BaseException | None = None

    def __call__(self, share: float, _data: Any) -> bool:
        """Whether the load goes on."""
        try:
            if self._report:
                self._report(share)
        except BaseException as error:  # would be lost in C
            self._error = error
        return self._error is None and not _held

    def check(self) -> None:
        """Raise what the callback raised."""
        if self._error:
            raise self._error


class Handle:
    """A native object: freed once, and not used after that or in a forked child.

    what: names it in errors.
    """

    def __init__(self, what: str, pointer: Any, free: Callable[[Any], None]) -> None:
        self._what = what
        self._pointer = pointer
        self._free = free
        self._forks = _n_forks

    @property
    def pointer(self) -> Any:
        """The native pointer. Raises ClosedError after `close`, ShiftKVError in a child process."""
        if self._forks != _n_forks:
            raise ShiftKVError(
                f"the {self._what} was loaded before this process was forked, and llama.cpp's threads are not in it: "
                "load it in the child, or start children with multiprocessing's spawn"
            )
        if not self._pointer:
            raise ClosedError(f"the {self._what} is closed")
        return self._pointer

    def check_open(self) -> None:
        """Raise what `pointer` raises."""
        _ = self.pointer

    def close(self) -> None:
        """Free it; a second call does nothing, and so does one in a forked child, whose memory goes with it."""
        pointer, self._pointer = self._pointer, None
        if pointer and self._forks == _n_forks:
            self._free(pointer)

    def __reduce__(self) -> Any:
        raise TypeError(f"a {self._what} cannot be pickled: load it in the process that uses it")
