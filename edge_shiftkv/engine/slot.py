"""From token to token."""

from __future__ import annotations

import time
from typing import Protocol

from edge_shiftkv.native.llama import Context
from edge_shiftkv.results import DraftFigures
from edge_shiftkv.sampling import Sampler


class Written(Protocol):
    """What it took to write an answer.

    steps: passes after the prompt.
    seconds: time they took.
    """

    steps: int
    seconds: float

    @property
    def figures(self) -> DraftFigures | None:
        """What a draft did; None without one."""
        ...


class Decoder(Written, Protocol):
    """What writes an answer: a `Slot`, or one with the help of a draft."""

    def advance(self, token: int) -> int:
        """Decode the token drawn last and draw the next one. Raises ShiftKVError."""
        ...


class Slot:
    """A place in a context where an answer is written.

    position: of the next token; `Prefilled.position` or what `Prefilled.hand_over` returned, at first.
    """

    figures = None

    def __init__(self, context: Context, sampler: Sampler, position: int) -> None:
        self.position = position
        self.steps = 0
        self.seconds = 0.0
        self._context = context
        self._sampler = sampler

    def advance(self, token: int) -> int:
        """Decode the token drawn last and draw the next one. Raises ShiftKVError."""
        started = time.perf_counter()
        self._context.decode([token], self.position)
        following = self._sampler.sample(self._context)
        self.position += 1
        self.steps += 1
        self.seconds += time.perf_counter() - started
        return following
