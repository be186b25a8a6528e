"""Alignment of two token sequences of about the same text, by dynamic time warping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

_INFINITY = float("inf")


@dataclass(frozen=True)
class Alignment:
    """A warping path, from both first tokens to both last ones: every token is on it at least once.

    path: pairs (draft token, target token), each one step further than the one before in one or both.
    cost: the sum of the edit distances along the path, in bytes.
    """

    path: list[tuple[int, int]]
    cost: int

    def draft_of(self, target: int) -> list[int]:
        """The draft tokens that are aligned with a target token, ascending."""
        return [i for i, j in self.path if j == target]


def align(draft: Sequence[bytes], target: Sequence[bytes], *, band: int = 32) -> Alignment:
    """Align two sequences of tokens, given as their bytes; a space at their beginning does not count.

    The local cost is the edit distance, the moves are one step in one sequence or in both; of equal costs the move in
    both comes first. band: how far apart the two positions may be (Sakoe and Chiba), but at least the difference of
    the lengths. Source: TokenTiming (ACL 2026, 2026.acl-long.1983), its third step.

    Raises ValueError when a sequence is empty.
    """
    m, n = len(draft), len(target)
    if not (m and n):
        raise ValueError("there is nothing to align: a sequence is empty")
    band = max(band, abs(m - n))
    a, b = [token.lstrip(b" ") for token in draft], [token.lstrip(b" ") for token in target]
    # total[i + 1][j + 1]: the cheapest path from the first tokens to i and j
    total: list[list[float]] = [[_INFINITY] * (n + 1) for _ in range(m + 1)]
    total[0][0] = 0
    for i in range(m):
        above, row = total[i], total[i + 1]
        for j in range(max(0, i - band), min(n, i + band + 1)):
            before = min(above[j], above[j + 1], row[j])
            row[j + 1] = before + Levenshtein.distance(a[i], b[j])
    i, j = m - 1, n - 1
    path = [(i, j)]
    while i or j:
        _, i, j = min(
            (total[i][j], i - 1, j - 1) if i and j else (_INFINITY, i, j),
            (total[i][j + 1], i - 1, j) if i else (_INFINITY, i, j),
            (total[i + 1][j], i, j - 1) if j else (_INFINITY, i, j),
            key=lambda step: step[0],
        )
        path.append((i, j))
    return Alignment(path[::-1], int(total[m][n]))
