"""How many answers to write at a time on a machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import psutil

from edge_shiftkv.budget import Budget, most_pairs
from edge_shiftkv.engine.engine import Engine
from edge_shiftkv.errors import ShiftKVError
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context
from edge_shiftkv.request import Options

MOST = 16
_GAIN = 1.1  # that twice as many answers have to bring
_STEPS = 3
_UNKNOWN_PROMPT = 2048  # tokens that are taken to be kept where no budget says it


def choose_parallel(
    engine: Engine, n_ctx: int, budget: Budget, options: Options, *, clock: Callable[[], float] = time.perf_counter
) -> int:
    """The answers to write at a time, 1 to `MOST`.

    A few passes over 1, 2, 4, ... tokens are timed: twice as many are written as long as that brings a tenth more
    tokens a second, and their KV caches fit half of the memory that is free.

    n_ctx, budget, options: say how long a slot is.
    clock: seconds.
    """
    kept = most_pairs(budget, engine) or _UNKNOWN_PROMPT
    n_cells = min(n_ctx, kept + (options.get("max_tokens") or n_ctx))
    best, best_rate, n = 1, 0.0, 1
    while n <= MOST:
        try:
            with closing(engine.context(n_cells, n, n_outputs=n, n_seq=n)) as context:
                rate = n / min(_step(context, n, position, clock) for position in range(_STEPS))
                is_last = (
                    engine.model.has_kv_cache
                    and 2 * shiftkv.cache_size(context) > psutil.virtual_memory().available / 2
                )
        except ShiftKVError:  # no memory, or a model that has no such context
            break
        if rate < _GAIN * best_rate:
            break
        best, best_rate, n = n, rate, 2 * n
        if is_last:
            break
    return best


def _step(context: Context, n: int, position: int, clock: Callable[[], float]) -> float:
    started = clock()
    context.decode_rows([(0, position, sequence) for sequence in range(n)])
    context.logits(0)  # waits for it
    return clock() - started
