"""What targets draw with a draft, against what they draw by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_shiftkv.native.llama import Model
from edge_shiftkv.sampling import Outputs, Sampler, Sampling
from support.rounding import of_logits

TIE = of_logits("f16", flash=True)
"""How far apart two tokens' logits may be for passes over one token and over several to disagree on the better one."""


def max_ties(n: int) -> int:
    """How many of n tokens may be others for rounding.

    Passes differ by some 1e-3. The best two of these models' logits, whose standard deviation is about 1, are that near
    to each other once in 300 tokens: four in 49 would be a chance of 3 in 100,000. A mistake makes far more.
    """
    return 3 + n // 50


@dataclass
class Drawn:
    """The tokens of one answer, and how far each was behind the best one, in logits with the noise of a draw."""

    tokens: list[int] = field(default_factory=list)
    behind: list[float] = field(default_factory=list)


class Answers(list[Drawn]):
    """What targets draw, answer by answer; without the end of a verified block that is not used."""

    _dictated: Sequence[int] = ()
    """What the next answer is to say, while it is told how far behind the best tokens that is."""

    def sampler(self, model: Model, sampling: Sampling) -> Sampler:
        """A sampler whose draws are recorded."""
        self.append(Drawn())
        return _Recorder(model, sampling, self)

    def dictation(self) -> Sequence[int]:
        """The next token of the answer if that is not to be drawn."""
        return self._dictated[len(self[-1].tokens) :][:1]

    def assert_same(self, expected: Drawn, answer: Drawn, alone: Callable[[], object]) -> int:
        """Fail unless `answer` has the tokens that the target draws by itself; return how many it drew for rounding.

        alone: asks for the answer without a draft once more. After a token that rounding decided the two say different
        things, so all that `answer` says is then dictated to the target, which draws behind the same tokens.
        """
        if answer.tokens == expected.tokens:
            return 0
        self._dictated = answer.tokens
        try:
            alone()
        finally:
            self._dictated = ()
        told = self.pop()
        assert told.tokens == answer.tokens, "the answer ends elsewhere"
        wrong = {i: gap for i, gap in enumerate(told.behind) if gap >= TIE}
        assert not wrong, f"tokens that are this far behind the best: {wrong}"
        ties = max(1, sum(gap > 0 for gap in told.behind))
        assert ties <= max_ties(len(told.tokens)), f"{ties} of {len(told.tokens)} tokens are not the best"
        return ties


class _Recorder(Sampler):
    def __init__(self, model: Model, sampling: Sampling, answers: Answers) -> None:
        super().__init__(model, sampling)
        self._answers = answers

    def sample(self, outputs: Outputs, output: int = -1) -> int:
        logits = outputs.logits(output)
        adjusted = self._adjusted(logits).astype(np.float64)
        if self.sampling.temperature > 0:
            place, choices = self.n_drawn, self.choices(logits)
            scores = adjusted / self.sampling.temperature
            lowest = choices.scores.min()  # filters keep what is most likely
            # Whether those by the border are among the choices may be for rounding to say.
            rivals = choices.tokens[choices.scores >= lowest + TIE]
        else:
            scores, lowest, rivals = adjusted, -np.inf, np.arange(len(adjusted))
        drawn = self._answers[-1]
        if dictation := self._answers.dictation():
            (token,) = dictation
            self.accept(token)
        else:
            token = super().sample(outputs, output)
        keys = np.append(rivals, token)
        noisy = scores[keys]
        if self.sampling.temperature > 0:
            noisy = noisy + self.noise.gumbel(place, keys)
        drawn.tokens.append(token)
        drawn.behind.append(float(max(noisy.max() - noisy[-1], lowest - scores[token], 0.0)))
        return token
