"""What can be asked of an answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ForwardRef, TypedDict, TypeVar, get_type_hints

from edge_shiftkv.budget import Budget, check_budget
from edge_shiftkv.checks import check_number, texts, unknown_option
from edge_shiftkv.engine.prefilled import ScoringMethod
from edge_shiftkv.errors import SettingError
from edge_shiftkv.sampling import Sampling
from edge_shiftkv.selection.methods import DEFAULT_METHOD, Method, method


class Options(TypedDict, total=False):
    """The settings of a request; `Sampling` explains those that say how tokens are drawn.

    None stands for the default, but for max_tokens and kv_budget, where it says more.

    max_tokens: the longest answer, in tokens (default 512); None or -1 goes on until n_ctx, and reserves KV cache for
        that.
    top_k, seed: also -1, which keeps all tokens, and draws a seed.
    stop: text or texts that end the answer and are not part of it.
    grammar: GBNF that the answer keeps to; json_schema: a JSON schema that it keeps to; at most one of the two.
    logprobs: 0 to 20: `Completion.logprobs` says how likely each token was, and as many alternatives; None does not.
    time_limit: seconds that the request may take, from the call on; None, the default, sets no limit.
    kv_budget, kv_method: those of this request, in place of the runtime's; a kv_budget of None keeps all. Bytes are of
        KV pairs as the runtime stores them.
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    grammar: str | None
    json_schema: Mapping[str, Any] | str | None
    logprobs: int | None
    stop: str | Sequence[str] | None
    time_limit: float | None
    kv_budget: int | float | str | None
    kv_method: Method | ScoringMethod | str | None


DEFAULT_MAX_TOKENS = 512

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _OfTheRuntime:
    def __repr__(self) -> str:
        return "<the runtime's>"


def takes_options(function: _Function) -> _Function:
    """Have a function's signature, and so its help, name the options that it takes as keywords, with their defaults."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(Sampling)}
    defaults |= {"max_tokens": DEFAULT_MAX_TOKENS, "kv_budget": _OfTheRuntime(), "kv_method": _OfTheRuntime()}
    signature = inspect.signature(function)
    *before, _ = signature.parameters.values()
    taken = get_type_hints(function)["options"].__args__[0].__annotations__
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=_written(hint))
        for name, hint in taken.items()
    ]
    vars(function)["__signature__"] = signature.replace(parameters=[*before, *named])
    return function


def _written(hint: Any) -> Any:
    return hint.__forward_arg__ if isinstance(hint, ForwardRef) else hint


def method_of(value: Method | ScoringMethod | str | None) -> Method | ScoringMethod:
    """A method, by itself or by name; the default one for None. Raises SettingError for a name there is not."""
    if value is None:
        return method(DEFAULT_METHOD)
    chosen = method(value) if isinstance(value, str) else value
    if not hasattr(chosen, "n_query"):
        raise SettingError(
            f"kv_method is {value!r}: it has to be a name in METHODS, a configuration or a method"[:1000]
        )
    return chosen


class CutSettings:
    """The budget and the method of what cuts prompts; checked when they are set."""

    @property
    def kv_budget(self) -> Budget:
        """KV pairs kept of a prompt per layer and KV head, the share of them, or bytes, as in `Runtime`; None: all."""
        return self._kv_budget

    @kv_budget.setter
    def kv_budget(self, budget: Budget) -> None:
        self._kv_budget = check_budget(budget)

    @property
    def kv_method(self) -> Method | ScoringMethod:
        """How the KV pairs to keep are selected; set to a name or None, it is that method's configuration."""
        return self._kv_method

    @kv_method.setter
    def kv_method(self, value: Method | ScoringMethod | str | None) -> None:
        self._kv_method = method_of(value)


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
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: str | Sequence[str] | None = None,
        time_limit: float | None = None,
        **sampling: Any,
    ) -> Request:
        """Check options, those of the runtime among them.

        Raises SettingError for one out of its range, TypeError for one that there is not.
        """
        if max_tokens == -1:
            max_tokens = None
        if max_tokens is not None:
            check_number("max_tokens", max_tokens, 1, whole=True, note="None or -1 has no limit but n_ctx")
        stops = texts("stop", stop)
        if not all(stops):
            raise SettingError("a stop string is empty: it would end every answer at its start")
        if time_limit is not None:
            check_number("time_limit", time_limit, 0, above=True, note="seconds; None sets no limit")
        if unknown := sampling.keys() - Options.__annotations__:
            raise TypeError(unknown_option(min(unknown), Options.__annotations__))
        given = {name: value for name, value in sampling.items() if value is not None}
        for name, stands_for in (("top_k", 0), ("seed", None)):
            if given.get(name) == -1:
                given[name] = stands_for
        return cls(
            *(Sampling(**given), max_tokens, stops, time_limit),
            kv_budget=check_budget(kv_budget),
            kv_method=method_of(kv_method),
        )
