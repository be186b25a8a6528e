"""The rules that drafts are verified by.

Two of the three give what the target would have given alone, whatever is proposed. A rule is one class: what the draft
draws, and what the target makes of it; a new one goes into `SAMPLING_RULES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_shiftkv.sampling import Choices, Ints, Noise, Outputs, Sampler

SamplingRule = Literal["coupled", "tokentiming"]


class Drawn(NamedTuple):
    """A token of the draft model, the confidence that the target agrees, and the probability that the draft gave it."""

    token: int
    confidence: float
    probability: float


@dataclass(frozen=True)
class DraftSide:
    """What a draft is drawn with, for one answer.

    sampler: the draft's filters.
    noise: what the target draws with.
    stand_ins: gives, for each token of the draft, [n_vocab], the target's token of the same bytes, or a number that is
        no token; the first call may take a while.
    """

    sampler: Sampler
    noise: Noise
    stand_ins: Callable[[], Ints]


class Rule(ABC):
    """How the tokens of one answer are drafted and verified.

    needs_places: whether a draft's draw depends on its place in the answer.
    needs_probabilities: whether `take` looks at the probability that the draft gave a token.
    """

    needs_places = False
    needs_probabilities = False

    def begin(self, side: DraftSide) -> None:
        """Begin to draft an answer."""
        self.side = side

    @abstractmethod
    def draw(self, logits: npt.NDArray[np.float32], place: int) -> Drawn:
        """The token drafted at a place of the answer, by the draft's logits, [n_vocab]."""

    def take(self, sampler: Sampler, outputs: Outputs, output: int, proposed: int, probability: float) -> int:
        """The answer's next token: the proposed one if it is accepted; by default what the target draws itself."""
        return sampler.sample(outputs, output)

    def judging(self) -> Rule:
        """The rule that a draft which was not asked is judged by, against what the target wrote; by default this."""
        return self


class Greedy(Rule):
    """At temperature 0: a proposal is accepted while it is the most likely token."""

    def draw(self, logits: npt.NDArray[np.float32], place: int) -> Drawn:
        """See `Rule`."""
        best = int(np.argmax(logits))
        chance = 1 / float(np.exp(logits - logits[best]).sum())
        return Drawn(best, chance, chance)


class Coupled(Rule):
    """The draft draws with the noise that the target draws with, and is accepted while both drew the same.

    The noise depends on the place in the answer only, so that the target draws as it does without a draft. Daliri,
    Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding", arXiv:2408.07978.
    """

    needs_places = True

    def begin(self, side: DraftSide) -> None:
        """See `Rule`."""
        super().begin(side)
        self._stand_ins = side.stand_ins()

    def draw(self, logits: npt.NDArray[np.float32], place: int) -> Drawn:
        """See `Rule`."""
        choices = self.side.sampler.choices(logits)
        perturbed = choices.scores + self.side.noise.gumbel(place, self._stand_ins[choices.tokens])
        best = int(np.argmax(perturbed))
        confidence = 1 / float(np.exp(perturbed - perturbed[best]).sum())
        return Drawn(int(choices.tokens[best]), confidence, float(choices.probabilities()[best]))


class TokenTiming(Rule):
    """For comparison: accepts with probability min(1, p/q), where q is carried over from the draft's tokens.

    What is accepted was not drawn from q, so the answers are not distributed as the target's own. Xiao, Fu, Xie, Shou,
    "TokenTiming: A Dynamic Alignment Method for Universal Speculative Decoding Model Pairs", arXiv:2510.15545.
    """

    needs_probabilities = True

    def begin(self, side: DraftSide) -> None:
        """See `Rule`."""
        super().begin(side)
        self._noise = Noise(side.noise.seed ^ 1)  # the draft is independent of the target
        self._n_drawn = 0

    def draw(self, logits: npt.NDArray[np.float32], place: int) -> Drawn:
        """See `Rule`."""
        choices = self.side.sampler.choices(logits)
        best = int(np.argmax(choices.scores + self._noise.gumbel(self._n_drawn, choices.tokens)))
        self._n_drawn += 1
        chance = float(choices.probabilities()[best])
        return Drawn(int(choices.tokens[best]), chance, chance)

    def take(self, sampler: Sampler, outputs: Outputs, output: int, proposed: int, probability: float) -> int:
        """Take `proposed` with probability min(1, p/q), else draw from the rest of p: TokenTiming's step 5.

        q is known for the proposed token only, so of p - q only the place of that token is not p.
        """
        choices = sampler.choices(outputs.logits(output))
        token = self._accepted_or_other(sampler, choices, proposed, probability)
        sampler.accept(token)
        return token

    def judging(self) -> Rule:
        """Its draws are independent of the target's: how often they agree says little."""
        return Greedy()

    def _accepted_or_other(self, sampler: Sampler, choices: Choices, proposed: int, q: float) -> int:
        tokens = choices.tokens
        p = float(choices.probabilities()[tokens == proposed].sum())
        # No token has this number: a variate that the draws below do not use.
        if q * sampler.noise.uniform(sampler.n_drawn, np.array([-1]))[0] < p:
            return proposed
        rest = tokens != proposed
        return sampler.noise.pick(sampler.n_drawn, Choices(tokens[rest], choices.scores[rest]))


SAMPLING_RULES: dict[str, type[Rule]] = {"coupled": Coupled, "tokentiming": TokenTiming}
"""The rules for a temperature above 0, by name."""


def rule_for(temperature: float, name: str | None) -> Rule:
    """The rule for one answer; without a name "coupled"."""
    return Greedy() if temperature == 0 else SAMPLING_RULES[name or "coupled"]()
