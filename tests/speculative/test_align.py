"""Dynamic time warping against a search over all paths, and against alignments made by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from edge_shiftkv.speculative.align import align

BY_HAND = [
    ("one to one", ["The", " river", " runs"], ["The", " river", " runs"], [(0, 0), (1, 1), (2, 2)]),
    (
        "one to many",
        ["Everything", " waterfall", " underneath"],
        ["Everything", " water", "fall", " underneath"],
        [(0, 0), (1, 1), (1, 2), (2, 3)],
    ),
    (
        "many to one",
        ["Everything", " water", "fall", " underneath"],
        ["Everything", " waterfall", " underneath"],
        [(0, 0), (1, 1), (2, 1), (3, 2)],
    ),
    ("shifted space", ["x ", "= ", "1"], ["x", " =", " 1"], [(0, 0), (1, 1), (2, 2)]),
    ("one of each", ["a"], ["a"], [(0, 0)]),
]


def edit_distance(a: bytes, b: bytes) -> int:
    """The textbook's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            last, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, last + (x != y))
    return row[-1]


def paths(m: int, n: int) -> Iterator[list[tuple[int, int]]]:
    """All warping paths of two sequences."""
    if (m, n) == (1, 1):
        yield [(0, 0)]
        return
    for i, j in ((m - 1, n), (m, n - 1), (m - 1, n - 1)):
        if i and j:
            yield from ([*path, (m - 1, n - 1)] for path in paths(i, j))


def cost(path: list[tuple[int, int]], a: list[bytes], b: list[bytes]) -> int:
    return sum(edit_distance(a[i].lstrip(), b[j].lstrip()) for i, j in path)


@pytest.mark.parametrize("seed", range(60))
def test_no_path_is_cheaper(seed: int) -> None:
    rng = random.Random(seed)
    a, b = (
        ["".join(rng.choices(" abc", k=rng.randint(1, 4))).encode() for _ in range(rng.randint(1, 5))] for _ in range(2)
    )
    found = align(a, b)
    every = list(paths(len(a), len(b)))
    assert found.path in every
    assert found.cost == cost(found.path, a, b) == min(cost(path, a, b) for path in every)


@pytest.mark.parametrize(("a", "b", "path"), [row[1:] for row in BY_HAND], ids=[row[0] for row in BY_HAND])
def test_by_hand(a: list[str], b: list[str], path: list[tuple[int, int]]) -> None:
    assert align([text.encode() for text in a], [text.encode() for text in b]).path == path


def test_draft_tokens_of_a_target_token_are_those_on_the_path() -> None:
    found = align([b"Everything", b" water", b"fall", b" underneath"], [b"Everything", b" waterfall", b" underneath"])
    assert found.draft_of(1) == [1, 2]


def test_the_band_limits_the_path() -> None:
    a, b = [b"x"] * 3 + [b"abcdef"], [b"abcdef"] + [b"x"] * 3
    wide, narrow = align(a, b), align(a, b, band=0)
    assert narrow.path == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert wide.cost <= narrow.cost
    assert align([b"x"], [b"x"] * 9, band=0).path == [(0, j) for j in range(9)]


@pytest.mark.parametrize(("a", "b"), [([], [b"x"]), ([b"x"], [])])
def test_nothing_to_align(a: list[bytes], b: list[bytes]) -> None:
    with pytest.raises(ValueError, match="empty"):
        align(a, b)


@pytest.mark.parametrize(("m", "n"), [(3, 3), (2, 4), (4, 2)])
def test_of_equal_costs_a_step_in_both_comes_first(m: int, n: int) -> None:
    """As late as it can be: tokens are then aligned one to one, from the end on."""
    path = align([b"x"] * m, [b"x"] * n).path
    k = min(m, n)
    assert path[-k:] == [(m - k + i, n - k + i) for i in range(k)]
    assert len(path) == max(m, n)
