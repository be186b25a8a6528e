"""Verification: which proposed tokens become the answer.

Two of the three rules give what the target would have given alone, whatever is proposed:

greedy: at temperature 0; a proposal is accepted while it is the most likely token.
coupled: the target draws as it does without a draft, with noise that depends on the place in the answer only; the draft
    draws with the same noise, and is accepted while it drew the same. Daliri, Musco, Suresh, "Coupling without
    Communication and Drafter-Invariant Speculative Decoding", arXiv:2408.07978.
tokentiming: for comparison; accepts with probability min(1, p/q), where q is carried over from the draft's tokens. What
    is accepted was not drawn from q, so the answers are not distributed as the target's own. Xiao, Fu, Xie, Shou,
    "TokenTiming: A Dynamic Alignment Method for Universal Speculative Decoding Model Pairs", arXiv:2510.15545.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_shiftkv.sampling import Choices, Outputs, Sampler

Rule = Literal["greedy", "coupled", "tokentiming"]
SAMPLING_RULES: tuple[Rule, ...] = ("coupled", "tokentiming")


@dataclass(frozen=True)
class Proposal:
    """Tokens of the target that a draft proposes.

    probabilities: that the draft gave them, one for each; used by the rule "tokentiming" only.
    """

    tokens: Sequence[int] = ()
    probabilities: Sequence[float] = ()


def rule_for(temperature: float, rule: Rule | None) -> Rule:
    """The rule that a request is verified by."""
    return "greedy" if temperature == 0 else rule or "coupled"


def verify(
    outputs: Outputs, sampler: Sampler, proposal: Proposal, rule: Rule, ends: Callable[[int], bool]
) -> list[int]:
    """Draw the answer's next tokens: the proposed ones that are accepted, then one of the target's own.

    outputs: has logits after the answer's last token and after each proposed one.
    ends: whether a token ends the answer; nothing is drawn after it.

    Returns 1 to len(proposal.tokens) + 1 tokens, of which all but the last were proposed.
    """
    drawn: list[int] = []
    n = len(proposal.tokens)
    for i in range(n + 1):
        proposed = proposal.tokens[i] if i < n else None
        output = i - n - 1
        if proposed is not None and rule == "tokentiming":
            token = _rejection(sampler, sampler.choices(outputs.logits(output)), proposed, proposal.probabilities[i])
            sampler.accept(token)
        else:
            token = sampler.sample(outputs, output)
        drawn.append(token)
        if token != proposed or ends(token):
            break
    return drawn


def _rejection(sampler: Sampler, choices: Choices, proposed: int, q: float) -> int:
    """Take `proposed` with probability min(1, p/q), else draw from the rest of p: TokenTiming's step 5.

    q is known for the proposed token only, so of p - q only the place of that token is not p.
    """
    tokens = choices.tokens
    p = float(choices.probabilities()[tokens == proposed].sum())
    # No token has this number: a variate that the draws below do not use.
    if q * sampler.noise.uniform(sampler.n_drawn, np.array([-1]))[0] < p:
        return proposed
    rest = tokens != proposed
    return sampler.noise.pick(sampler.n_drawn, Choices(tokens[rest], choices.scores[rest]))
