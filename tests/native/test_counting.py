"""How many of what: shares of a budget, bytes of windows, and tokens that were captured since a cut."""

from __future__ import annotations

import numpy as np
import pytest
from support.cases import GEMMA2, GEMMA3, SMALL_WINDOWS, Case, Load, open_context, selected
from support.gguf_random import Spec
from support.native import OK, Context, Method, params
from support.prompts import text


@pytest.mark.parametrize(
    ("budget", "observed", "n_observed"), [(31, 0.5, 16), (30, 0.5, 15), (30, 0.33, 10), (30, 0.32, 10), (7, 0.9, 6)]
)
def test_the_observed_share_of_a_budget_is_rounded(load: Load, budget: int, observed: float, n_observed: int) -> None:
    """As many of the best by the last queries, whatever the proxies say; they choose the rest."""
    common = {"keep_scores": True, "n_proxy": 64, "n_window": 16}
    with open_context(load(Spec()), Case("")) as context:
        assert context.capture(n_query=16) == OK
        context.decode(text(150), 0)
        assert context.select(params(budget, Method.SNAPKV, **common, n_recent=1, n_pool=1)) == OK
        attention = {layer: context.scores(layer)[:, :-1] for layer in context.layers()}
        assert context.select(params(budget, **common, observed=observed)) == OK
        for layer, rows in attention.items():
            votes = context.scores(layer)
            for head, row in enumerate(rows):
                first = np.argsort(-row, kind="stable")[:n_observed]
                others = np.setdiff1d(np.arange(149), first)
                rest = others[np.argsort(-votes[head, others], kind="stable")][: budget - 1 - n_observed]
                assert context.kept(layer)[head].tolist() == sorted([*first, *rest, 149])


@pytest.mark.parametrize(("spec", "options"), [(GEMMA2, {}), (GEMMA3, SMALL_WINDOWS)], ids=["gemma2", "gemma3"])
def test_bytes_of_windows_are_those_of_the_tokens_in_question(load: Load, spec: Spec, options: dict[str, bool]) -> None:
    """Of a capture's first tokens, what was decoded after them is no part, in windows neither."""
    with Context(load(spec), 512, n_ubatch=32, **options) as context:
        assert context.capture() == OK
        context.decode(text(60), 0)
        full, window = context.cells()
        pair, in_window = (sum(rows.raw.shape[1] for rows in cells.k + cells.v) for cells in (full, window))
        for n_prompt in (60, 40, 50):
            assert context.select(params(20, Method.STREAMINGLLM, n_prompt=n_prompt)) == OK
            info = context.info()
            assert info.kv_bytes_prompt - info.kv_bytes_kept == (n_prompt - 20) * pair
            windows = info.kv_bytes_kept - 20 * pair
            assert windows % in_window == 0
            # The windows of 32 tokens are there, and what the cache still has before them may be.
            assert 32 <= windows // in_window <= n_prompt


@pytest.mark.parametrize("budget", [5, 40, 59])
def test_what_was_cut_in_place_counts_as_captured_no_more(load: Load, budget: int) -> None:
    """A kept pair lies in a cell that held another token: statistics and queries there are that one's."""
    n_more = 6
    case = Case("", n_prompt=60, budget=budget)
    with selected(load(Spec()), case) as context, open_context(load(Spec()), case) as other:
        assert context.compact() == OK
        context.decode(text(n_more, 4), 60)
        for layer in context.layers():
            everything = context.stats(layer, 512)
            assert everything == context.stats(layer, n_more)
            assert everything != context.stats(layer, n_more - 1)
        # With room for more queries than were decoded since.
        assert other.capture(n_query=32) == OK
        other.decode(text(60), 0)
        assert other.select(params(budget, Method.STREAMINGLLM)) == OK
        assert other.compact() == OK
        other.decode(text(n_more, 4), 60)
        for layer in other.layers():
            assert len(other.queries(layer)) == len(other.hidden(layer)) == n_more
