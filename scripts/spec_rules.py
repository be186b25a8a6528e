"""Acceptance and bias of the verification rules, on models small enough that every text's probability is known.

    python scripts/spec_rules.py    # prints a Markdown table

The models have four tokens and write three of them; their logits, for every text before, are random numbers. A draft is
the target itself, like it (its logits are 0.7 of the target's and 0.3 of another model's), or another model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import Row, markdown

from edge_shiftkv.sampling import Sampler, Sampling
from edge_shiftkv.speculative.records import Proposal
from edge_shiftkv.speculative.rules import SAMPLING_RULES, DraftSide, rule_for
from edge_shiftkv.speculative.verify import verify

Floats = npt.NDArray[np.float64]

N_VOCAB, N_TOKENS = 4, 3
MODEL: Any = SimpleNamespace(n_vocab=N_VOCAB, suppressed_tokens=[])


class Table:
    """A model of few tokens: the logits of the next one for every text of up to N_TOKENS tokens."""

    def __init__(self, seed: int) -> None:
        self._logits = np.random.default_rng(seed).standard_normal((N_VOCAB + 1,) * N_TOKENS + (N_VOCAB,))

    def __call__(self, text: Sequence[int]) -> npt.NDArray[np.float32]:
        """The logits after `text`, [N_VOCAB]."""
        place = (*text, *(N_VOCAB,) * (N_TOKENS - len(text)))
        logits: npt.NDArray[np.float32] = self._logits[place].astype(np.float32)
        return logits

    def blend(self, other: Table, share: float) -> Table:
        """This model, with a share of another."""
        result = Table(0)
        result._logits = (1 - share) * self._logits + share * other._logits
        return result


TARGET = Table(1)
DRAFTS = {"alike": TARGET.blend(Table(2), 0.3), "other": Table(3), "same": TARGET}


UNFILTERED: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def probabilities(sampling: Sampling) -> Floats:
    """The exact probability that the target writes a text, by its tokens; top_k and temperature are applied."""
    result = np.zeros((N_VOCAB,) * N_TOKENS)

    def step(text: list[int], p: float) -> None:
        if len(text) == N_TOKENS:
            result[tuple(text)] = p
            return
        logits = TARGET(text).astype(np.float64)
        kept = np.argsort(-logits)[: sampling.top_k or N_VOCAB]
        q = np.exp(logits[kept] / sampling.temperature)
        for token, share in zip(kept, q / q.sum(), strict=True):
            step([*text, int(token)], p * share)

    step([], 1.0)
    return result


def answer(
    sampling: Sampling, name: str | None, draft: Table | None, n_draft: int
) -> tuple[tuple[int, ...], int, int, int]:
    """A text by the rule of a name, the rounds it took, and how many tokens were proposed and accepted."""
    rule = rule_for(sampling.temperature, name)
    sampler, filters = Sampler(MODEL, sampling), Sampler(MODEL, sampling)
    rule.begin(DraftSide(filters, sampler.noise, lambda: np.arange(N_VOCAB)))
    text: list[int] = []
    rounds = proposed = accepted = 0
    while len(text) < N_TOKENS:
        drafted: list[int] = []
        chances: list[float] = []
        while draft and len(drafted) < min(n_draft, N_TOKENS - len(text) - 1):
            token, _, chance = rule.draw(draft([*text, *drafted]), len(text) + len(drafted))
            drafted.append(token)
            chances.append(chance)
        whole = [*text, *drafted]
        outputs = SimpleNamespace(logits=lambda output, whole=whole: TARGET(whole[: len(whole) + output + 1]))
        drawn = verify(outputs, sampler, Proposal(drafted, chances), rule, lambda _: False)
        proposed += len(drafted)
        accepted += sum(a == b for a, b in zip(drawn, drafted, strict=False))
        text += drawn
        rounds += 1
    sampler.close()
    filters.close()
    return tuple(text), rounds, proposed, accepted


def measure(rule: str, draft: Table | None, n_texts: int, n_draft: int = 2, **options: Any) -> tuple[Floats, float]:
    """How often each text was written, and the share of the proposed tokens that was accepted."""
    counts = np.zeros((N_VOCAB,) * N_TOKENS)
    n_proposed = n_accepted = 0
    for seed in range(n_texts):
        text, _, proposed, accepted = answer(Sampling(seed=seed, **options), rule, draft, n_draft)
        counts[text] += 1
        n_proposed += proposed
        n_accepted += accepted
    return counts, n_accepted / max(n_proposed, 1)


def distance(counts: npt.NDArray[Any], expected: Floats) -> float:
    """The total variation distance of what was counted from probabilities."""
    return float(np.abs(counts / counts.sum() - expected).sum() / 2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=40_000, metavar="N", help="texts per row (default: %(default)s)")
    n_texts = parser.parse_args().texts
    expected = probabilities(Sampling(temperature=1.0, **UNFILTERED))
    column = "Total variation distance from the target's distribution"
    # As far as exact draws of this number are from their own distribution.
    drawn = np.random.default_rng(0).multinomial(n_texts, expected.ravel())
    rows: list[Row] = [
        {"Rule": "exact draws", "Draft": "", "Accepted": "", column: f"{distance(drawn, expected.ravel()):.4f}"}
    ]
    for rule in SAMPLING_RULES:
        for name, draft in DRAFTS.items():
            counts, accepted = measure(rule, draft, n_texts, temperature=1.0, **UNFILTERED)
            off = f"{distance(counts, expected):.4f}"
            rows.append({"Rule": rule, "Draft": name, "Accepted": f"{accepted:.1%}", column: off})
    print(markdown(rows))


if __name__ == "__main__":
    main()
