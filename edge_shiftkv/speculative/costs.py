"""What passes over several tokens cost, learned from readings of which some are wrong."""

from __future__ import annotations

from collections import deque
from functools import cached_property
from statistics import median_low

_READINGS = 9  # the last ones, of each length
_OLD = 256  # plain passes, after which a reading has to be made again


class Recent:
    """The median of the last readings; the lower one of two, as what disturbs a reading makes it longer."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_READINGS)

    def add(self, value: float) -> None:
        """Take one more."""
        self._values.append(value)

    @property
    def value(self) -> float:
        """The median; 0.0 before there is a reading."""
        return median_low(self._values) if self._values else 0.0


class PassCosts:
    """What passes over 1 to `most` tokens cost, in passes over one: steps, as kernels take several columns at a time.

    The steps only go up: they are the isotonic regression of the readings with the least absolute error, in which a
    reading that was disturbed is outvoted by those of longer passes.

    Example: of the readings 1.3, 3.9, 1.4, 1.8 for 2 to 5 tokens the steps are 1.3, 1.4, 1.4, 1.8.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._readings: dict[int, deque[float]] = {}
        self._read_at: dict[int, float] = {}
        self._now = 0.0

    def add(self, n: int, cost: float) -> None:
        """Take a reading of a pass over `n` tokens, 2 or more."""
        self._readings.setdefault(n, deque(maxlen=_READINGS)).append(cost)
        self._read_at[n] = self._now
        self._forget_steps()

    def elapsed(self, n_passes: float) -> None:
        """The time of so many passes over one token went by."""
        self._now += n_passes
        self._forget_steps()

    def of(self, n: float, *, hopeful: bool = False) -> float:
        """The cost of a pass over n tokens, 1 to `most`; between two lengths in proportion.

        hopeful: what was not read for long counts as no more than the next shorter length: where a wrong reading keeps
            a length from being used, nothing else would tell.
        """
        steps = self._hopeful_steps if hopeful else self._steps
        n = min(n, self._most)
        below = min(int(n), self._most - 1)
        return steps[below - 1] + (n - below) * (steps[below] - steps[below - 1])

    @cached_property
    def _steps(self) -> list[float]:
        return self._fit(self._readings)

    @cached_property
    def _hopeful_steps(self) -> list[float]:
        return self._fit({n: some for n, some in self._readings.items() if self._now - self._read_at[n] < _OLD})

    def _forget_steps(self) -> None:
        self.__dict__.pop("_steps", None)
        self.__dict__.pop("_hopeful_steps", None)

    def _fit(self, readings: dict[int, deque[float]]) -> list[float]:
        """Costs of 1 to `most` tokens; a length without readings costs what the next shorter one does."""
        blocks: list[tuple[list[float], int]] = [([1.0], 1)]  # readings, and the lengths they are of
        for n in range(2, self._most + 1):
            pool, n_lengths = list(readings.get(n, ())), 1
            while len(blocks) > 1 and (not pool or median_low(pool) < median_low(blocks[-1][0])):
                before, n_before = blocks.pop()
                pool, n_lengths = before + pool, n_before + n_lengths
            blocks.append((pool or [1.0], n_lengths))
        return [max(1.0, median_low(pool)) for pool, n_lengths in blocks for _ in range(n_lengths)]
