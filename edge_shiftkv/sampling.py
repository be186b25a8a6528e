"""How the next token is drawn from a model's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as llama

from edge_shiftkv.errors import PromptError, ShiftKVError
from edge_shiftkv.native.llama import Context, Model

_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: llama.cpp draws one


@dataclass(frozen=True)
class Sampling:
    """The settings of llama.cpp's sampler chain, which applies them in the order top_k, top_p, min_p, temperature.

    temperature: 0 takes the most likely token, whatever the other settings are.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the most likely tokens that together have this probability; 1 keeps all.
    min_p: keep tokens with at least this share of the most likely one's probability; 0 keeps all.
    seed: the same seed draws the same tokens; None draws a seed.

    Raises PromptError when a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise PromptError(f"temperature is {self.temperature}: it has to be a finite number >= 0")
        if self.top_k < 0:
            raise PromptError(f"top_k is {self.top_k}: it has to be >= 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise PromptError(f"top_p is {self.top_p}: it has to be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise PromptError(f"min_p is {self.min_p}: it has to be in [0, 1]")
        if self.seed is not None and not 0 <= self.seed < _RANDOM_SEED:
            raise PromptError(f"seed is {self.seed}: it has to be in [0, {_RANDOM_SEED})")


class Sampler:
    """llama.cpp's sampler chain for one answer: it remembers its random state from token to token."""

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self._chain: Any = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        if suppressed := model.suppressed_tokens:
            biases = (llama.llama_logit_bias * len(suppressed))(
                *(llama.llama_logit_bias(token, -math.inf) for token in suppressed)
            )
            self._add(llama.llama_sampler_init_logit_bias(model.n_vocab, len(suppressed), biases))
        if sampling.temperature == 0:
            self._add(llama.llama_sampler_init_greedy())
            return
        self._add(llama.llama_sampler_init_top_k(sampling.top_k))
        self._add(llama.llama_sampler_init_top_p(sampling.top_p, 1))
        self._add(llama.llama_sampler_init_min_p(sampling.min_p, 1))
        self._add(llama.llama_sampler_init_temp(sampling.temperature))
        self._add(llama.llama_sampler_init_dist(_RANDOM_SEED if sampling.seed is None else sampling.seed))

    def close(self) -> None:
        """Free the chain."""
        chain, self._chain = self._chain, None
        if chain:
            llama.llama_sampler_free(chain)

    def sample(self, context: Context) -> int:
        """Draw a token from the logits after the last token that the context decoded."""
        if not self._chain:
            raise ShiftKVError("the sampler is closed")
        token: int = llama.llama_sampler_sample(self._chain, context.pointer, -1)
        return token

    def _add(self, sampler: Any) -> None:
        llama.llama_sampler_chain_add(self._chain, sampler)
