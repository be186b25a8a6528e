"""What can be asked of an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from edge_shiftkv.errors import SettingError
from edge_shiftkv.sampling import Sampling


class Options(TypedDict, total=False):
    """The settings of a request. Sampling is explained at `Sampling`.

    max_tokens: the longest answer, in tokens (default 512); None goes on until n_ctx, and reserves KV cache for that.
    stop: text or texts that end the answer and are not part of it.
    time_limit: seconds that the request may take, from the call on; None, the default, sets no limit.
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


@dataclass(frozen=True)
class Request:
    """`Options` that were checked."""

    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    time_limit: float | None

    @classmethod
    def of(
        cls,
        *,
        max_tokens: int | None = 512,
        stop: str | Sequence[str] | None = None,
        time_limit: float | None = None,
        **sampling: Any,
    ) -> Request:
        """Check options. Raises SettingError for one out of its range, TypeError for one that does not exist."""
        if max_tokens is not None and max_tokens < 1:
            raise SettingError(f"max_tokens is {max_tokens}: it has to be >= 1, or None for no limit but n_ctx")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not all(stops):
            raise SettingError("a stop string is empty: it would end every answer at its start")
        if time_limit is not None and not (math.isfinite(time_limit) and time_limit > 0):
            raise SettingError(f"time_limit is {time_limit}: it has to be seconds > 0, or None for no limit")
        if unknown := sampling.keys() - Options.__annotations__:
            raise TypeError(f"unknown option {min(unknown)!r}: there are {', '.join(Options.__annotations__)}")
        return cls(Sampling(**sampling), max_tokens, stops, time_limit)
