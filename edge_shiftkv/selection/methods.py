"""The selection methods, as configurations: what is not here is decided by the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_shiftkv.errors import PromptError
from edge_shiftkv.native import shiftkv

_MAX_PROXY = 4096  # llama-shiftkv.h


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

    Raises PromptError when a value is out of its range.
    """

    gamma: float = 10.0
    n_proxy: int = 512
    n_group: int | None = None
    n_stat: int = 512
    n_layer_repeat: int = 2
    n_repeat: int = 16
    mass: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise PromptError(f"gamma is {self.gamma}: it has to be a finite number >= 0")
        if not 0 < self.mass <= 1:
            raise PromptError(f"mass is {self.mass}: it has to be in (0, 1]")
        groups = (16, 32) if self.n_group is None else (self.n_group,)
        if min(groups) < 1 or not 1 <= self.n_proxy <= _MAX_PROXY or any(self.n_proxy % n for n in groups):
            multiple = f"a multiple of n_group ({self.n_group or '16 and 32'})"
            raise PromptError(f"n_proxy is {self.n_proxy}: it has to be {multiple} and at most {_MAX_PROXY}")
        if min(self.n_stat, self.n_repeat) < 1 or self.n_layer_repeat < 0:
            raise PromptError("n_stat and n_repeat have to be >= 1, n_layer_repeat >= 0")
        if not 0 <= self.seed < 1 << 32:
            raise PromptError(f"seed is {self.seed}: it has to be in [0, 2**32)")

    def params(self, budget: int, architecture: str) -> shiftkv.Params:
        """The native parameters to keep `budget` KV pairs per layer and KV head in a model of this architecture."""
        n_group = self.n_group or (32 if architecture.startswith(("qwen2vl", "qwen3vl")) else 16)
        return shiftkv.Params(
            budget=budget,
            n_proxy=self.n_proxy,
            n_group=n_group,
            n_stat=self.n_stat,
            n_layer_repeat=self.n_layer_repeat,
            n_repeat=self.n_repeat,
            gamma=self.gamma,
            mass=self.mass,
            seed=self.seed,
        )
