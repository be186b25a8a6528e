"""What the tests read of a cache is in the order of the tokens, wherever their cells are."""

from __future__ import annotations

import numpy as np
from support.cases import GEMMA3, SMALL_WINDOWS, Load
from support.gguf_random import Spec
from support.native import OK, Context
from support.prompts import text


def test_cells_are_read_in_the_order_of_their_tokens(load: Load) -> None:
    """A cache of 256 cells for windows has just wrapped around: its first ones hold later tokens than its last ones."""
    n = 272
    model = load(GEMMA3)
    with (
        Context(model, 512, n_ubatch=32, swa_full=True) as large,
        Context(model, 512, n_ubatch=32, **SMALL_WINDOWS) as small,
    ):
        for start in range(0, n, 16):
            tokens = text(n)[start : start + 16]
            for context in (large, small):
                context.decode(tokens, start)
        (_, expected), (_, found) = large.cells(), small.cells()
        assert found.positions[-31:, 0].tolist() == list(range(n - 31, n))
        assert (np.diff(found.positions[:, 0]) == 1).all()
        for theirs, ours in zip(expected.k + expected.v, found.k + found.v, strict=True):
            # Sums over cells that lie elsewhere are rounded otherwise.
            difference = np.abs(ours.values(2)[:, -31:] - theirs.values(2)[:, -31:]).max()
            assert difference < 0.05 < np.abs(ours.values(2)[:, -31:-1] - theirs.values(2)[:, -30:]).max()


def test_values_are_read_by_token_whether_they_are_stored_so_or_not(load: Load) -> None:
    """With flash attention values are in rows, as keys are; without it, in columns."""
    model = load(Spec())
    with Context(model, flash=True, type_k="f32") as rows, Context(model, flash=False, type_k="f32") as columns:
        for context in (rows, columns):
            assert context.capture() == OK
            context.decode(text(50), 0)
        (a,), (b,) = rows.cells(), columns.cells()
        # The first layer's do not depend on attention.
        np.testing.assert_allclose(a.v[0].values(2), b.v[0].values(2), rtol=0, atol=1e-5)
        np.testing.assert_allclose(a.k[0].values(2), b.k[0].values(2), rtol=0, atol=1e-5)
        assert np.abs(a.v[0].values(2)).max() > 0.1
        expected = rows.keys(0).swapaxes(0, 1)
        np.testing.assert_array_equal(a.k[0].values(2), expected)
