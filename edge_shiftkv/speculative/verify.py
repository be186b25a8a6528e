"""Verification: which proposed tokens become the answer."""

from __future__ import annotations

from collections.abc import Callable

from edge_shiftkv.sampling import Outputs, Sampler
from edge_shiftkv.speculative.records import Proposal
from edge_shiftkv.speculative.rules import Rule


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
    probabilities = proposal.probabilities or [1.0] * n
    for i, (proposed, probability) in enumerate(zip(proposal.tokens, probabilities, strict=True)):
        token = rule.take(sampler, outputs, i - n - 1, proposed, probability)
        drawn.append(token)
        if token != proposed or ends(token):
            return drawn
    drawn.append(sampler.sample(outputs, -1))
    return drawn
