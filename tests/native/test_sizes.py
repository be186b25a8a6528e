"""The bytes that the library reports."""

from __future__ import annotations

from typing import Any

import pytest
from support.cases import GEMMA3, MAMBA, SMALL_WINDOWS, Case, Load, selected
from support.gguf_random import Spec
from support.native import ARGUMENT, UNSUPPORTED, Context, c_cache_size

BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Of an element in storage."""

SPEC = Spec(n_layer=3, n_head_kv=2, d_head=32)
ROW = 2 * 32
"""Elements of a token's keys in one layer, and of its values."""


@pytest.mark.device
@pytest.mark.parametrize(
    ("type_k", "type_v", "flash"),
    [("f32", "f32", False), ("f16", "f16", False), ("q8_0", "q4_0", True), ("q4_0", "f16", True)],
)
@pytest.mark.parametrize("n_ctx", [256, 1024])
@pytest.mark.parametrize("options", [{}, {"n_seq_max": 4}, {"n_seq_max": 4, "unified": False}], ids=str)
def test_cache_size(load: Load, type_k: str, type_v: str, flash: bool, n_ctx: int, options: dict[str, Any]) -> None:
    with Context(load(SPEC), n_ctx, type_k=type_k, type_v=type_v, flash=flash, **options) as context:
        n_cell = max(n_ctx, 1024) if options.get("unified") is False else n_ctx  # at least 256 for each of 4
        assert context.cache_size() == n_cell * 3 * ROW * (BYTES[type_k] + BYTES[type_v])


@pytest.mark.device
def test_cache_size_with_windows(load: Load) -> None:
    """3 layers attend to all tokens; the windows of the other 3 need 256 cells."""
    with Context(load(GEMMA3), 1024, type_k="f16", n_ubatch=32, **SMALL_WINDOWS) as context:
        assert context.cache_size() == 3 * (1024 + 256) * ROW * 2 * BYTES["f16"]


def test_cache_size_without_a_kv_cache(load: Load) -> None:
    assert c_cache_size(None) == ARGUMENT
    for spec in (Spec("llada"), MAMBA):  # no memory; states
        with Context(load(spec)) as context:
            assert context.cache_size() == UNSUPPORTED


@pytest.mark.device
@pytest.mark.parametrize(
    ("type_k", "type_v", "flash"),
    [("f32", "f32", False), ("f16", "f16", True), ("q8_0", "q4_0", True), ("q8_0", "f16", False)],
)
def test_bytes_of_the_pairs(load: Load, type_k: str, type_v: str, flash: bool) -> None:
    case = Case("", SPEC, type_k=type_k, type_v=type_v, flash=flash, n_prompt=150, budget=40)
    with selected(load(SPEC), case) as context:
        info = context.info()
        pair = 3 * ROW * (BYTES[type_k] + BYTES[type_v])
        assert (info.n_prompt, info.n_kept, info.n_layer) == (150, 40, 3)
        assert (info.kv_bytes_prompt, info.kv_bytes_kept) == (150 * pair, 40 * pair)
        # They are what the rows take that a saved state holds.
        assert sum(rows.raw.nbytes for cells in context.cells() for rows in cells.k + cells.v) == 150 * pair


@pytest.mark.device
def test_bytes_of_the_pairs_with_windows(load: Load) -> None:
    """The windows are kept whole: their bytes count the same before and after."""
    with selected(load(GEMMA3), Case("", GEMMA3, n_prompt=150, budget=40)) as context:
        info = context.info()
        pair = 3 * ROW * 2 * BYTES["f16"]
        assert (info.n_prompt, info.n_kept, info.n_layer) == (150, 40, 3)
        assert info.kv_bytes_prompt - info.kv_bytes_kept == (150 - 40) * pair
        window = info.kv_bytes_kept - 40 * pair
        assert 32 * pair <= window <= 150 * pair
