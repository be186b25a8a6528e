"""Answers that are written side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass

from edge_shiftkv.answering import Answer, Begun
from edge_shiftkv.batch.rows import Row
from edge_shiftkv.engine.engine import Engine
from edge_shiftkv.errors import CancelledError, ShiftKVError
from edge_shiftkv.native.calls import late
from edge_shiftkv.native.llama import Context
from edge_shiftkv.results import DraftFigures
from edge_shiftkv.sampling import Sampler


@dataclass
class Job:
    """An answer that is being written.

    begun: what it goes on from, but for its KV pairs, which are in a slot.
    position: of the next token.
    token: the one drawn last, which is not decoded yet.
    is_retry: whether the row failed before, beside others.
    steps, seconds: passes that it had a part in, and the time they took.
    error: what ended it, if anything did.
    """

    row: Row
    begun: Begun
    sampler: Sampler
    answer: Answer
    position: int
    token: int
    deadline: float | None
    time_limit: float | None
    is_retry: bool
    steps: int = 0
    seconds: float = 0.0
    figures: DraftFigures | None = None
    error: ShiftKVError | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to decode."""
        return self.error is not None or self.answer.finish_reason is not None


class Slots:
    """A context of several sequences, which are the slots, and the answers that are written in them.

    n: how many there are.
    """

    def __init__(self, engine: Engine, n: int) -> None:
        self.n = n
        self._engine = engine
        self._context: Context | None = None
        self._jobs: dict[int, Job] = {}

    @property
    def jobs(self) -> list[Job]:
        """What is being written."""
        return list(self._jobs.values())

    @property
    def free(self) -> int | None:
        """The first slot where nothing is written, if there is one: llama.cpp decodes neighbours in one pass."""
        return next((slot for slot in range(self.n) if slot not in self._jobs), None)

    def fits(self, n_cells: int) -> bool:
        """Whether a slot has so many cells."""
        return self._context is not None and self._context.n_ctx >= n_cells

    def reserve(self, n_cells: int) -> Context:
        """The context, its slots with `n_cells` cells at least; it grows only when nothing is written in it.

        Raises ShiftKVError when the memory for it cannot be had.
        """
        if self._context is None or self._context.n_ctx < n_cells:
            assert not self._jobs
            self.close()
            self._context = self._engine.context(n_cells, self.n, n_outputs=self.n, n_seq=self.n)
        return self._context

    def put(self, slot: int, job: Job) -> None:
        """Go on with an answer in a slot, which holds what it goes on from."""
        self._jobs[slot] = job

    def step(self) -> None:
        """Decode a token of each answer and draw the next ones.

        Raises ShiftKVError when llama.cpp fails, and CancelledError: nothing in the slots can be gone on with then.
        """
        assert self._context
        now = time.monotonic()
        for job in self._jobs.values():
            if job.deadline is not None and now >= job.deadline:
                job.error = late(job.time_limit or 0.0)
        rows = [(slot, job) for slot, job in sorted(self._jobs.items()) if not job.is_over]
        if not rows:
            return
        started = time.perf_counter()
        self._context.decode_rows([(job.token, job.position, slot) for slot, job in rows])
        for i, (_, job) in enumerate(rows):
            job.position += 1
            job.steps += 1
            try:
                job.token = job.sampler.sample(self._context, i)
            except CancelledError:
                raise
            except ShiftKVError as error:
                job.error = error
            else:
                job.answer.push(job.token)
        seconds = time.perf_counter() - started
        for _, job in rows:
            job.seconds += seconds

    def ended(self) -> list[Job]:
        """The answers that are over, which free their slots."""
        over = [slot for slot, job in sorted(self._jobs.items()) if job.is_over]
        for slot in over:
            if self._context:
                self._context.remove(0, slot)
        jobs = [self._jobs.pop(slot) for slot in over]
        for job in jobs:
            job.sampler.close()
        return jobs

    def close(self) -> None:
        """End all answers and free the context; `reserve` makes a new one."""
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.sampler.close()
        context, self._context = self._context, None
        if context:
            context.close()
