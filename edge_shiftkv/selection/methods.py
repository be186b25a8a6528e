"""The selection methods, as configurations: what is not here is decided by the model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from edge_shiftkv.errors import SettingError
from edge_shiftkv.native import shiftkv


class Method(Protocol):
    """How the KV pairs of a prompt are ranked."""

    @property
    def n_query(self) -> int:
        """The last queries of the prompt, per layer, that it looks at; 1 where it needs none."""
        ...

    def params(self, budget: int, architecture: str) -> shiftkv.Params:
        """The native parameters to keep `budget` KV pairs per layer and KV head in a model of this architecture."""
        ...


@dataclass(frozen=True)
class ShiftKV:
    """MM-ShiftKV: rank a prompt's KV pairs by the attention of proxies of the queries that decoding will ask.

    Source: Shu, Wu, Xie, Wang, Shou, "MM-ShiftKV: Decode-Aware Prefill-Stage KV Selection for Multimodal Large Language
    Models", Findings of ACL 2026 (2026.findings-acl.1447). The names are the paper's.

    gamma: expansion of the hidden state's standard deviation, which the proxies are drawn with.
    n_proxy: N, proxies per layer; a multiple of the number of groups, at most 4096.
    n_group: G, groups that vote; None takes the paper's: 32 for Qwen2-VL and its successors, 16 otherwise (LLaVA).
    n_stat: prompt tokens, counted from its end, that the hidden state's mean and standard deviation are taken over.
    n_layer_repeat: first layers whose proxies repeat the last hidden state instead of being drawn.
    n_repeat: proxies of such a layer.
    mass: share of a group's attention mass that the keys it votes for hold together, in (0, 1].
    seed: of the draws; the same prompt and seed keep the same pairs.

    What the paper does not have; the defaults change nothing:

    n_sink: first tokens of the prompt that are always kept.
    n_recent: last tokens of the prompt that are always kept; the paper keeps one.
    observed: share of the budget, in [0, 1), that goes to the best keys by the attention of the last real queries; the
        proxies' votes decide about the rest.
    window: how many real queries that are, at most 512.
    kernel: neighbouring keys that the scores are averaged over, an odd number, at most 63; where `observed` > 0 those
        by the real queries only.

    Raises SettingError when a value is out of its range.
    """

    gamma: float = 10.0
    n_proxy: int = 512
    n_group: int | None = None
    n_stat: int = 512
    n_layer_repeat: int = 2
    n_repeat: int = 16
    mass: float = 0.95
    seed: int = 0
    n_sink: int = 0
    n_recent: int = 1
    observed: float = 0.0
    window: int = 32
    kernel: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise SettingError(f"gamma is {self.gamma}: it has to be a finite number >= 0")
        if not 0 < self.mass <= 1:
            raise SettingError(f"mass is {self.mass}: it has to be in (0, 1]")
        groups = (16, 32) if self.n_group is None else (self.n_group,)
        if min(groups) < 1 or not 1 <= self.n_proxy <= shiftkv.MAX_PROXY or any(self.n_proxy % n for n in groups):
            multiple = f"a multiple of n_group ({self.n_group or '16 and 32'})"
            raise SettingError(f"n_proxy is {self.n_proxy}: it has to be {multiple} and at most {shiftkv.MAX_PROXY}")
        if min(self.n_stat, self.n_repeat) < 1 or self.n_layer_repeat < 0:
            raise SettingError("n_stat and n_repeat have to be >= 1, n_layer_repeat >= 0")
        if not 0 <= self.observed < 1:
            raise SettingError(f"observed is {self.observed}: it has to be in [0, 1)")
        _check_at_least(0, n_sink=self.n_sink)
        _check_at_least(1, n_recent=self.n_recent)
        _check_window(self.window)
        _check_kernel(self.kernel)
        _check_seed(self.seed)

    @property
    def n_query(self) -> int:
        """See `Method`: the last prompt query, or the window."""
        return self.window if self.observed else 1

    def params(self, budget: int, architecture: str) -> shiftkv.Params:
        """See `Method`."""
        return _params(
            "shiftkv",
            budget,
            n_proxy=self.n_proxy,
            n_group=self.n_group or (32 if architecture.startswith(("qwen2vl", "qwen3vl")) else 16),
            n_stat=self.n_stat,
            n_layer_repeat=self.n_layer_repeat,
            n_repeat=self.n_repeat,
            gamma=self.gamma,
            mass=self.mass,
            seed=self.seed,
            n_sink=self.n_sink,
            n_recent=self.n_recent,
            observed=self.observed,
            n_window=self.window,
            n_pool=self.kernel,
        )


@dataclass(frozen=True)
class StreamingLLM:
    """StreamingLLM: the first tokens of the prompt, and its last.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", section 3.2, arXiv:2309.17453;
    there the window moves on while decoding, here it is cut once.

    n_sink: first tokens that are kept, as far as the budget goes: the last token comes first.

    Raises SettingError when it is out of its range.
    """

    n_sink: int = 4

    def __post_init__(self) -> None:
        _check_at_least(0, n_sink=self.n_sink)

    @property
    def n_query(self) -> int:
        """See `Method`: none."""
        return 1

    def params(self, budget: int, architecture: str) -> shiftkv.Params:
        """See `Method`."""
        return _params("streamingllm", budget, n_sink=self.n_sink)


@dataclass(frozen=True)
class SnapKV:
    """SnapKV: rank by the mean attention of the prompt's last queries, which are kept themselves.

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", section 4, arXiv:2404.14469. A
    KV head's score is the mean over its query heads. Where the budget is less than the window, only the window's end is
    kept.

    window: last tokens of the prompt whose queries are looked at, at most 512, and whose KV pairs are kept.
    kernel: neighbouring keys that the scores are averaged over, an odd number, at most 63.

    Raises SettingError when a value is out of its range.
    """

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        _check_window(self.window)
        _check_kernel(self.kernel)

    @property
    def n_query(self) -> int:
        """See `Method`: the window."""
        return self.window

    def params(self, budget: int, architecture: str) -> shiftkv.Params:
        """See `Method`."""
        return _params("snapkv", budget, n_window=self.window, n_recent=self.window, n_pool=self.kernel)


@dataclass(frozen=True)
class KeyDiff:
    """KeyDiff: keep the keys that are least like the others, by cosine similarity with the mean of the normalised keys.

    Source: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-
    Constrained Environments", section 3, arXiv:2504.15364; there block by block, here once after prefill. It has no
    parameters.
    """

    @property
    def n_query(self) -> int:
        """See `Method`: none."""
        return 1

    def params(self, budget: int, architecture: str) -> shiftkv.Params:
        """See `Method`."""
        return _params("keydiff", budget)


@dataclass(frozen=True)
class ExpectedAttention:
    """Expected Attention: rank by the attention of normally distributed queries to come, times the value's norm.

    Source: Devoto, Jeblick, Jegou, "Expected Attention: KV Cache Compression by Estimating Attention from Future
    Queries Distribution", section 3, arXiv:2510.00636, with the defaults of its library, kvpress. That takes mean and
    covariance of the queries, before their rotation, from the whole prompt; here they are those of its last `n_window`
    tokens. A cap of the logits (Gemma 2) is left out.

    n_window: last tokens that the queries' mean and covariance are taken over, at most 512. They are captured in
        single precision, hidden state and query, in each layer.
    n_future: positions from the prompt's end on that the rotation of the queries is averaged over, at most 4096.
    n_sink: first tokens that are always kept, and whose queries and keys are left out of the statistics.

    Raises SettingError when a value is out of its range.
    """

    n_window: int = 512
    n_future: int = 512
    n_sink: int = 4

    def __post_init__(self) -> None:
        _check_window(self.n_window)
        if not 1 <= self.n_future <= shiftkv.MAX_PROXY:
            raise SettingError(f"n_future is {self.n_future}: it has to be in 1 .. {shiftkv.MAX_PROXY}")
        _check_at_least(0, n_sink=self.n_sink)

    @property
    def n_query(self) -> int:
        """See `Method`: the window."""
        return self.n_window

    def params(self, budget: int, architecture: str) -> shiftkv.Params:
        """See `Method`."""
        return _params("expected-attention", budget, n_window=self.n_window, n_future=self.n_future, n_sink=self.n_sink)


@dataclass(frozen=True)
class Random:
    """Keep KV pairs by chance, others in each layer and KV head: what any other method has to beat.

    seed: of the draws; the same prompt length and seed keep the same pairs.

    Raises SettingError when it is out of its range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    @property
    def n_query(self) -> int:
        """See `Method`: none."""
        return 1

    def params(self, budget: int, architecture: str) -> shiftkv.Params:
        """See `Method`."""
        return _params("random", budget, seed=self.seed)


@dataclass(frozen=True)
class Published:
    """A method by its name in the library, with its published settings: for one that has no class of its own here.

    Raises SettingError when the library has no such method.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in shiftkv.METHODS:
            raise SettingError(f"{self.name!r} is no method of the library, which has {', '.join(shiftkv.METHODS)}")

    @property
    def n_query(self) -> int:
        """See `Method`: as the library says."""
        return shiftkv.n_query(_params(self.name, budget=2))

    def params(self, budget: int, architecture: str) -> shiftkv.Params:
        """See `Method`."""
        return _params(self.name, budget)


_CONFIGURATIONS: dict[str, Callable[[], Method]] = {
    "streamingllm": StreamingLLM,
    "snapkv": SnapKV,
    "keydiff": KeyDiff,
    "expected-attention": ExpectedAttention,
    "random": Random,
}

METHODS: dict[str, Callable[[], Method]] = {
    "mixed": lambda: ShiftKV(n_proxy=256, observed=0.25, window=8, kernel=9),
    "paper": ShiftKV,
    **{
        name: _CONFIGURATIONS.get(name, functools.partial(Published, name))
        for name in shiftkv.METHODS
        if name != "shiftkv"
    },
}
"""The methods by name: those of the library. "paper" is MM-ShiftKV as published; "mixed" gives a share of its budget to
what the last real queries attend to, which docs/quality.md found better; the others have their own defaults."""

DEFAULT_METHOD = "mixed"


def method(name: str) -> Method:
    """The method of a name in `METHODS`. Raises SettingError for another."""
    if name not in METHODS:
        raise SettingError(f"KV method {name!r} is not known: use one of {', '.join(METHODS)}")
    return METHODS[name]()


def _params(name: str, budget: int, **settings: Any) -> shiftkv.Params:
    """The published settings of a method but for the budget and `settings`."""
    params: shiftkv.Params = shiftkv.default_params(shiftkv.METHODS[name])
    params.budget = budget
    for setting, value in settings.items():
        setattr(params, setting, value)
    return params


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 32:
        raise SettingError(f"seed is {seed}: it has to be in [0, 2**32)")


def _check_window(window: int) -> None:
    if not 1 <= window <= shiftkv.MAX_QUERY:
        raise SettingError(f"the window is {window}: it has to be in 1 .. {shiftkv.MAX_QUERY}")


def _check_kernel(kernel: int) -> None:
    if kernel % 2 != 1 or not 1 <= kernel <= shiftkv.MAX_POOL:
        raise SettingError(f"kernel is {kernel}: it has to be an odd number in 1 .. {shiftkv.MAX_POOL}")


def _check_at_least(lowest: int, **values: int) -> None:
    for name, value in values.items():
        if not lowest <= value < 1 << 32:
            raise SettingError(f"{name} is {value}: it has to be >= {lowest}")
