"""Many requests, and their answers as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from edge_shiftkv.answering import Answer, Beginning, Begun, Requests, begin, cut, n_cells
from edge_shiftkv.batch.rows import Ready, Row, Rows
from edge_shiftkv.batch.slots import Job, Slots
from edge_shiftkv.budget import budget_for
from edge_shiftkv.engine.engine import KeptPrompt
from edge_shiftkv.engine.prefilled import Prefilled
from edge_shiftkv.errors import CancelledError, ShiftKVError, TimeLimitError
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.request import Request
from edge_shiftkv.results import Completion, TokenLogprobs
from edge_shiftkv.sampling import Sampler
from edge_shiftkv.stream import Running, Turn

_WINDOW = 4  # times the slots: rows that may be begun before a first one is answered, where results keep their order


@dataclass(frozen=True)
class BatchResult:
    """What came of a request: an answer or an error.

    index: its place among the requests, from 0.
    request: as it was given.
    completion: the answer; its decode_s is the time of the passes that it shared with others.
    error: why there is none.
    """

    index: int
    request: Any
    completion: Completion | None = None
    error: ShiftKVError | None = None


class Batch(Running[BatchResult, None]):
    """Many requests that are answered: an iterator over `BatchResult`; see `Running`."""

    _what = "batch"

    def __init__(self, many: Many, turn: Turn, cancel: Callable[[], None]) -> None:
        super().__init__(many.results(), turn, cancel)
        self._many = many

    def finish(self) -> None:
        """Begin no more requests: the results of those that were begun are the last. From any thread."""
        self._many.rows.finish()


@dataclass(frozen=True)
class _Opened:
    """A row in tokens."""

    row: Row
    request: Request
    prompt: Prompt
    budget: int | None
    room: int
    is_retry: bool


class Many:
    """Answers rows, `n_parallel` of them at a time.

    rows: what is to be answered.
    ordered: whether results come in the order of the rows; else each as soon as it is there.
    """

    def __init__(self, requests: Requests, rows: Rows, n_parallel: int, *, ordered: bool) -> None:
        self.rows = rows
        self._requests = requests
        self._engine = engine = requests.engine
        self._ordered = ordered
        self._slots = Slots(engine, n_parallel if engine.can_cut else 1)
        self._kept = KeptPrompt(engine)
        self._waiting: _Opened | None = None  # until slots that are too small for it are empty
        self._retries: deque[Row] = deque()
        self._n_begun = self._n_given = 0
        self._results: dict[int, BatchResult] = {}

    def results(self) -> Generator[BatchResult, None, None]:
        """The results. Raises CancelledError, and at the end what the iterator over the requests raised."""
        with ExitStack() as ends:
            ends.callback(self.rows.close)
            ends.callback(self._kept.close)
            ends.callback(self._slots.close)
            ends.callback(self._close_waiting)
            while True:
                yield from self._given_out()
                self._engine.interrupt.check()
                if self._may_begin():
                    self._begin_next()
                elif self._slots.jobs:
                    self._step()
                else:
                    break
        if self.rows.error:
            raise self.rows.error

    def _given_out(self) -> Iterator[BatchResult]:
        while self._results:
            index = self._n_given if self._ordered else next(iter(self._results))
            if index not in self._results:
                return
            self._n_given += 1
            yield self._results.pop(index)

    def _may_begin(self) -> bool:
        jobs = self._slots.jobs
        if self._waiting or self._retries:
            return not jobs
        if self._slots.free is None or any(job.is_retry for job in jobs):
            return False
        if self._ordered and self._n_begun - self._n_given >= _WINDOW * self._slots.n:
            return False
        return self.rows.more()

    def _begin_next(self) -> None:
        """Begin a row, or find that it has to wait."""
        opened, self._waiting = self._waiting, None
        row = opened.row if opened else None
        try:
            if opened is None:
                is_retry = bool(self._retries)
                if is_retry:
                    row = self._retries.popleft()
                    ready = self.rows.ready(row.given)
                else:
                    row, result = self.rows.take()
                    self._n_begun += 1
                    ready = result()
                opened = self._opened(row, ready, is_retry)
            if self._slots.jobs and not self._slots.fits(self._n_cells(opened)):
                self._waiting = opened
                return
            with closing(opened.prompt):
                self._begin(opened)
        except ShiftKVError as error:
            if row is None or _ends_all(error):
                raise
            self._failed(row, error)
        self._take_ended()

    def _opened(self, row: Row, ready: Ready, is_retry: bool) -> _Opened:
        request, prompt = ready.request, self._engine.prompt(ready.conversation)
        with ExitStack() as failed:
            failed.callback(prompt.close)
            budget = budget_for(request.kv_budget, prompt.n_tokens, self._engine)
            room = self._requests.room(prompt, request)
            failed.pop_all()
        return _Opened(row, request, prompt, budget, room, is_retry)

    def _begin(self, opened: _Opened) -> None:
        """Read a prompt, draw the first token, and have what is kept in a slot."""
        request, interrupt = opened.request, self._engine.interrupt
        started, limit = time.perf_counter(), request.time_limit
        deadline = None if limit is None else time.monotonic() + limit
        interrupt.limit(limit)
        with ExitStack() as failed:
            sampler = Sampler(self._engine.model, request.sampling)
            failed.callback(sampler.close)
            begun, slot = self._in_slot(opened, Beginning(request, sampler, opened.room, 1), started)
            interrupt.check()
            failed.pop_all()
        interrupt.limit(None)
        logprobs: list[TokenLogprobs] | None = None if request.sampling.logprobs is None else []
        answer = Answer(self._engine.model, request, sampler, opened.room, logprobs)
        answer.push(begun.token)
        self._slots.put(
            slot,
            Job(
                *(opened.row, begun, sampler, answer, begun.prefilled.position, begun.token),
                *(deadline, limit, opened.is_retry),
            ),
        )

    def _in_slot(self, opened: _Opened, beginning: Beginning, started: float) -> tuple[Begun, int]:
        engine, budget = self._engine, opened.budget
        if budget is not None and self._requests.by_layer:
            context, slot = self._slots.reserve(self._n_cells(opened)), self._slots.free
            assert slot is not None
            return self._requests.begin_by_layer(opened.prompt, budget, beginning, started, context, slot), slot
        n_query = opened.request.kv_method.n_query if budget is not None else int(engine.can_cut)
        prefilled = self._kept.read(opened.prompt, n_query, self._requests.report)
        begun = begin(opened.prompt, prefilled, beginning, started)
        context, slot = self._slots.reserve(self._n_cells(opened)), self._slots.free
        assert slot is not None

        def hand_over(prefilled: Prefilled, _n_ctx: int) -> Prefilled:
            prefilled.hand_over(context, slot)
            return prefilled

        if budget is not None:
            begun = cut(begun, budget, beginning, hand_over)
        elif engine.can_cut:
            prefilled.select_all()
            prefilled.hand_over(context, slot)
        else:
            context.load_state(prefilled.context.state())
        return begun, slot

    def _n_cells(self, opened: _Opened) -> int:
        if opened.budget is None:
            return opened.prompt.n_tokens + opened.room
        return n_cells(self._engine.model, opened.prompt.n_tokens, opened.budget, opened.room)

    def _step(self) -> None:
        try:
            self._slots.step()
        except ShiftKVError as error:
            if _ends_all(error):
                raise
            jobs = sorted(self._slots.jobs, key=lambda job: job.row.index)
            self._slots.close()
            for job in jobs:
                if job.error or job.is_retry:
                    self._failed(job.row, job.error or error)
                else:
                    self._retries.append(job.row)
        self._take_ended()

    def _take_ended(self) -> None:
        for job in self._slots.ended():
            if job.error:
                self._failed(job.row, job.error)
            else:
                self._done(BatchResult(job.row.index, job.row.given, job.answer.completion(job.begun, job)))

    def _failed(self, row: Row, error: ShiftKVError) -> None:
        self._engine.interrupt.limit(None)
        link: BaseException | None = error
        while link:
            link.__traceback__ = None  # its frames hold pictures
            link = link.__cause__ or link.__context__
        self._done(BatchResult(row.index, row.given, error=error))

    def _done(self, result: BatchResult) -> None:
        self._results[result.index] = result

    def _close_waiting(self) -> None:
        if self._waiting:
            self._waiting.prompt.close()


def _ends_all(error: ShiftKVError) -> bool:
    return isinstance(error, CancelledError) and not isinstance(error, TimeLimitError)
