"""Drafts for llama-cpp-python's `Llama` that say what they did."""

from __future__ import annotations

from typing import Any

from edge_shiftkv.speculative.llama_draft import LlamaDraft


class Counting(LlamaDraft):
    """Counts what it proposes."""

    n_calls = n_proposed = 0

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
        proposed = super().__call__(input_ids, **kwargs)
        self.n_calls += 1
        self.n_proposed += len(proposed)
        return proposed
