"""What can be asked of an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from edge_shiftkv.engine.prefilled import ScoringMethod
from edge_shiftkv.errors import SettingError
from edge_shiftkv.sampling import Sampling
from edge_shiftkv.selection.methods import DEFAULT_METHOD, Method, method


class Options(TypedDict, total=False):
    """The settings of a request. Sampling is explained at `Sampling`.

    max_tokens: the longest answer, in tokens (default 512); None goes on until n_ctx, and reserves KV cache for that.
    stop: text or texts that end the answer and are not part of it.
    time_limit: seconds that the request may take, from the call on; None, the default, sets no limit.
    kv_budget, kv_method: those of this request, in place of the runtime's.
    """

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    time_limit: float | None
    kv_budget: int | float | None
    kv_method: Method | ScoringMethod | str | None


Budget = int | float | None


def check_budget(budget: Budget) -> Budget:
    """The budget, which is a number of KV pairs, a share of the prompt, or None. Raises SettingError."""
    whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 2
    share = isinstance(budget, float) and (0 < budget < 1 or (budget >= 2 and budget.is_integer()))
    if budget is not None and not whole and not share:
        raise SettingError(
            f"kv_budget is {budget!r}: it has to be a number of KV pairs >= 2, a share of the prompt between 0 and 1, "
            "or None to keep all"
        )
    return budget


def budget_for(budget: Budget, n_tokens: int) -> int | None:
    """The KV pairs to keep of a prompt of `n_tokens`; None where that is all of them."""
    if budget is None:
        return None
    n = max(2, round(budget * n_tokens)) if budget < 1 else int(budget)
    return n if n < n_tokens else None


def method_of(value: Method | ScoringMethod | str | None) -> Method | ScoringMethod:
    """A method, by itself or by name; the default one for None. Raises SettingError for a name there is not."""
    return method(value) if isinstance(value, str) else value or method(DEFAULT_METHOD)


@dataclass(frozen=True)
class Request:
    """`Options` that were checked."""

    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    time_limit: float | None
    kv_budget: Budget
    kv_method: Method | ScoringMethod

    @classmethod
    def of(
        cls,
        *,
        kv_budget: Budget = None,
        kv_method: Method | ScoringMethod | str | None = None,
        max_tokens: int | None = 512,
        stop: str | Sequence[str] | None = None,
        time_limit: float | None = None,
        **sampling: Any,
    ) -> Request:
        """Check options, those of the runtime among them.

        Raises SettingError for one out of its range, TypeError for one that there is not.
        """
        if max_tokens is not None and max_tokens < 1:
            raise SettingError(f"max_tokens is {max_tokens}: it has to be >= 1, or None for no limit but n_ctx")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not all(stops):
            raise SettingError("a stop string is empty: it would end every answer at its start")
        if time_limit is not None and not (math.isfinite(time_limit) and time_limit > 0):
            raise SettingError(f"time_limit is {time_limit}: it has to be seconds > 0, or None for no limit")
        if unknown := sampling.keys() - Options.__annotations__:
            raise TypeError(f"unknown option {min(unknown)!r}: there are {', '.join(Options.__annotations__)}")
        return cls(
            *(Sampling(**sampling), max_tokens, stops, time_limit),
            kv_budget=check_budget(kv_budget),
            kv_method=method_of(kv_method),
        )
