"""Answers as they are written, and whose turn it is to write."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from edge_shiftkv.closing import Closing
from edge_shiftkv.errors import BusyError, ClosedError, ShiftKVError
from edge_shiftkv.results import Completion, TokenLogprobs
from edge_shiftkv.selection.results import Selection

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


Item = TypeVar("Item")
End = TypeVar("End")


class Running(Closing, Generic[Item, End]):
    """What a runtime does step by step: an iterator over what comes out of it.

    Closing it, or starting another request in the same runtime, ends it early. So does `cancel`, from any thread:
    whoever waits for the next step gets a CancelledError.
    """

    _what: str

    def __init__(self, steps: Generator[Item, None, End], turn: Turn, cancel: Callable[[], None]) -> None:
        self._steps = steps
        self._turn = turn
        self._cancel = cancel
        self._end: End | None = None
        self._is_complete = self._superseded = False

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._turn.taken():
            if self._superseded:
                raise ClosedError(f"the {self._what} was ended: its runtime was closed or got another request")
            is_over = inspect.getgeneratorstate(self._steps) == inspect.GEN_CLOSED
            try:
                return next(self._steps)
            except StopIteration as end:
                if not is_over:
                    self._end, self._is_complete = end.value, True
        raise StopIteration

    def cancel(self) -> None:
        """End it, from any thread: what computes it raises CancelledError soon. It waits for nothing."""
        if not self._superseded and not self._is_complete:
            self._cancel()

    def close(self) -> None:
        """End it early; a second call does nothing. A thread that waits for its next step is cancelled."""
        if self._superseded or self._is_complete:
            return
        with self._turn.taken(wait=self.cancel):
            self._steps.close()

    def supersede(self) -> None:
        """End it because its runtime goes on to something else; to be called in turn."""
        self._superseded = not self._is_complete
        self._steps.close()


class Stream(Running[str, Completion]):
    """An answer as it is written: an iterator over pieces of text; see `Running`.

    logprobs: of the tokens so far, as in `Completion`; text may come later than its tokens.
    """

    _what = "stream"

    def __init__(
        self,
        steps: Generator[str, None, Completion],
        turn: Turn,
        cancel: Callable[[], None],
        logprobs: Sequence[TokenLogprobs] | None = None,
        selection: Sequence[Selection] = (),
    ) -> None:
        super().__init__(steps, turn, cancel)
        self.logprobs = logprobs
        self._selection = selection  # empty until there is one

    @property
    def selection(self) -> Selection | None:
        """What was kept of the prompt, from the first piece on; None before, and where nothing was cut."""
        return self._selection[0] if self._selection else None

    @property
    def completion(self) -> Completion:
        """The whole answer with its figures. Raises ShiftKVError before the last piece was taken."""
        if not self._end:
            raise ShiftKVError("the answer is not complete: iterate to the end first")
        return self._end
