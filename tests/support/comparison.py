"""Compares the native ranking with the reference's, up to rounding.

Two computations of the same masses differ a little. A key may therefore have one vote more or less in a group where
the mass of the keys before it is as good as at the threshold, and keys of as good as equal scores may change places.
All other keys must agree: `Bounds` says which votes and scores each key may have, `problems` what lies outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from support.reference import Array, Ints, Ranking

_ULP = 2.0**-23


@dataclass(frozen=True)
class Bounds:
    """The votes and scores that keys may have, each [Hkv, T - 1]."""

    votes_min: Ints
    votes_max: Ints
    last: Array
    tolerance: Array
    """Of the part of the score that is no vote."""

    @property
    def score_min(self) -> Array:
        """The lowest score."""
        return self.votes_min + self.last - self.tolerance

    @property
    def score_max(self) -> Array:
        """The highest score."""
        return self.votes_max + self.last + self.tolerance

    def must_keep(self, budget: int) -> npt.NDArray[np.bool_]:
        """The keys that fewer than budget - 1 others can reach."""
        rivals = [(np.sort(hi), lo) for hi, lo in zip(self.score_max, self.score_min, strict=True)]
        # A key's own highest score is among those counted.
        counts = [len(hi) - np.searchsorted(hi, lo, side="left") - 1 for hi, lo in rivals]
        return np.array(counts) < budget - 1

    def must_drop(self, budget: int) -> npt.NDArray[np.bool_]:
        """The keys that budget - 1 others or more are above for sure."""
        rivals = [(np.sort(lo), hi) for hi, lo in zip(self.score_max, self.score_min, strict=True)]
        counts = [len(lo) - np.searchsorted(lo, hi, side="right") for lo, hi in rivals]
        return np.array(counts) >= budget - 1


def relative(ranking: Ranking, epsilon: float) -> Ranking:
    """An error of `epsilon` of each mass, and of each weight of the last query."""
    return Ranking(epsilon * ranking.mass, epsilon * ranking.last)


def bounds(ranking: Ranking, share: float, error: Ranking) -> Bounds:
    """What the ranking allows if each mass, and each weight of the last query, is off by up to its `error`."""
    low = np.zeros(ranking.last.shape, int)
    high = np.zeros(ranking.last.shape, int)
    for head, groups in enumerate(zip(ranking.mass, error.mass, strict=True)):
        for mass, off in zip(*groups, strict=True):
            least, most = mass - off, mass + off
            # The mass before a key is that of the keys above it: at most of all that may be, at least of all that are.
            before_max = _sum_from(most, least) - most
            before_min = _sum_from(least, np.nextafter(most, np.inf))
            low[head] += before_max < share * least.sum()
            high[head] += before_min < share * most.sum()
    return Bounds(low, high, ranking.last, error.last + _ULP * (1 + high))


def _sum_from(values: Array, lowest: Array) -> Array:
    """The sum of the values that are at least as high as each of `lowest`."""
    ascending = np.sort(values)
    sums = np.concatenate([ascending[::-1].cumsum()[::-1], [0.0]])
    return sums[np.searchsorted(ascending, lowest, side="left")]


def problems(limits: Bounds, budget: int, kept: Ints, scores: Array | None) -> list[str]:
    """In which way the kept tokens [Hkv, C] and the scores [Hkv, T] contradict the reference; empty if in none."""
    found = []
    n_key = limits.last.shape[1]
    if not (np.all(np.diff(kept, axis=1) > 0) and np.all(kept[:, -1] == n_key) and kept.shape[1] == budget):
        found.append(f"the kept tokens are no {budget} different ones, ascending, with the last: {kept}")
    is_kept = np.zeros((len(kept), n_key + 1), bool)
    np.put_along_axis(is_kept, kept, True, axis=1)
    for name, wrong in (
        ("not kept", limits.must_keep(budget) & ~is_kept[:, :-1]),
        ("kept", limits.must_drop(budget) & is_kept[:, :-1]),
    ):
        found += [f"head {head}: {name}: {np.flatnonzero(row).tolist()}" for head, row in enumerate(wrong) if row.any()]
    if scores is not None:
        found += _score_problems(limits, scores)
        # The kept tokens are the best by the library's own scores.
        best = np.sort(scores, axis=1)[:, -budget:]
        if not np.array_equal(np.sort(np.take_along_axis(scores, kept, axis=1), axis=1), best):
            found.append("the kept tokens do not have the best scores")
    return found


def _score_problems(limits: Bounds, scores: Array) -> list[str]:
    found = []
    if not np.all(np.isposinf(scores[:, -1])):
        found.append("the last token's score is not infinite")
    votes = np.rint(scores[:, :-1] - limits.last)
    rest = scores[:, :-1] - votes
    for name, wrong in (
        ("votes", (votes < limits.votes_min) | (votes > limits.votes_max)),
        ("attention of the last query", np.abs(rest - limits.last) > limits.tolerance),
    ):
        found += [
            f"head {head}: {name} of {int(row.sum())} of {row.size} keys: {scores[head, :-1][row][:4]}, expected "
            f"{limits.score_min[head][row][:4]} to {limits.score_max[head][row][:4]}"
            for head, row in enumerate(wrong)
            if row.any()
        ]
    return found


def undecided(limits: Bounds, budget: int) -> float:
    """The share of keys that a comparison says nothing about: neither to be kept nor to be dropped for sure."""
    return float(np.mean(~limits.must_keep(budget) & ~limits.must_drop(budget)))


def uncertain(limits: Bounds) -> float:
    """The share of keys whose number of votes is not certain."""
    return float(np.mean(limits.votes_max > limits.votes_min))
