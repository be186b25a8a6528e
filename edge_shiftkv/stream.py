"""Answers as they are written, and whose turn it is to write."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

from edge_shiftkv.closing import Closing
from edge_shiftkv.errors import BusyError, ClosedError, ShiftKVError
from edge_shiftkv.results import Completion, TokenLogprobs

_POLL_S = 0.002


class Turn:
    """Lets one thread at a time in."""

    def __init__(self) -> None:
        self._holder: dict[str, tuple[int, object]] = {}

    @contextmanager
    def taken(self, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Be the one that is in.

        wait: what to do to have another thread leave, which is then waited for; without it, others are turned away.

        Raises BusyError when another thread is in, or when this thread is and would wait for itself.
        """
        thread = threading.get_ident()
        me = (thread, object())
        try:
            # A lock could stay locked, if Ctrl-C came between locking it and taking note of that.
            while (holder := self._holder.setdefault("", me)) is not me:
                if wait is None:
                    raise BusyError("the runtime is busy in another thread; it serves one request at a time")
                if holder[0] == thread:
                    raise BusyError("the runtime cannot wait for a request of its own thread: end that one first")
                wait()
                time.sleep(_POLL_S)
            yield
        finally:
            if self._holder.get("") is me:
                del self._holder[""]


class Stream(Closing):
    """An answer as it is written: an iterator over pieces of text.

    Closing it, or starting another request in the same runtime, ends it early. So does `cancel`, from any thread:
    whoever waits for the next piece gets a CancelledError.

    logprobs: of the tokens so far, as in `Completion`; text may come later than its tokens.
    """

    def __init__(
        self,
        steps: Generator[str, None, Completion],
        turn: Turn,
        cancel: Callable[[], None],
        logprobs: Sequence[TokenLogprobs] | None = None,
    ) -> None:
        self.logprobs = logprobs
        self._steps = steps
        self._turn = turn
        self._cancel = cancel
        self._completion: Completion | None = None
        self._superseded = False

    @property
    def completion(self) -> Completion:
        """The whole answer with its figures. Raises ShiftKVError before the last piece was taken."""
        if not self._completion:
            raise ShiftKVError("the answer is not complete: iterate to the end first")
        return self._completion

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self._turn.taken():
            if self._superseded:
                raise ClosedError("the stream was ended: its runtime was closed or got another request")
            try:
                return next(self._steps)
            except StopIteration as end:
                self._completion = end.value or self._completion
        raise StopIteration

    def cancel(self) -> None:
        """End the answer, from any thread: what computes it raises CancelledError soon. It waits for nothing."""
        if not self._superseded and not self._completion:
            self._cancel()

    def close(self) -> None:
        """End the answer early; a second call does nothing. A thread that waits for its next piece is cancelled."""
        if self._superseded or self._completion:
            return
        with self._turn.taken(wait=self.cancel):
            self._steps.close()

    def supersede(self) -> None:
        """End the answer because its runtime goes on to something else; to be called in turn."""
        self._superseded = self._completion is None
        self._steps.close()
