"""The rules on models small enough to enumerate, drafted for by others."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from spec_rules import (
    DRAFTS,
    MODEL,
    N_TOKENS,
    N_VOCAB,
    TARGET,
    UNFILTERED,
    answer,
    distance,
    measure,
    probabilities,
)

from edge_shiftkv.sampling import Choices, Noise, Sampler, Sampling
from edge_shiftkv.speculative.records import Proposal
from edge_shiftkv.speculative.rules import Coupled, Greedy, rule_for
from edge_shiftkv.speculative.verify import verify

N_TEXTS = 6000


def p_value(counts, expected):
    possible = expected > 0
    assert not counts[~possible].any()
    return scipy.stats.chisquare(counts[possible], counts.sum() * expected[possible]).pvalue


@pytest.mark.parametrize(("temperature", "top_k"), [(0.7, 0), (1.0, 0), (1.0, 3)])
def test_coupled_draws_from_the_targets_distribution(temperature, top_k):
    options = {**UNFILTERED, "temperature": temperature, "top_k": top_k}
    counts, _ = measure("coupled", DRAFTS["alike"], N_TEXTS, **options)
    assert p_value(counts, probabilities(Sampling(**options))) > 1e-3


def test_coupled_gives_one_text_for_a_seed_with_any_draft_or_none():
    for seed in range(300):
        sampling = Sampling(temperature=1.0, seed=seed, **UNFILTERED)
        texts = {
            answer(sampling, "coupled", draft, n_draft)[0] for draft in (None, *DRAFTS.values()) for n_draft in (1, 2)
        }
        assert len(texts) == 1


def test_coupled_accepts_as_often_as_the_theorem_says():
    """At least (1 - TV) / (1 + TV), for the first token; Daliri, Musco, Suresh 2024."""
    sampling = Sampling(temperature=1.0, **UNFILTERED)
    for name, draft in DRAFTS.items():
        p, q = (np.exp(logits) / np.exp(logits).sum() for logits in (TARGET([]), draft([])))
        variation = np.abs(p - q).sum() / 2
        accepted = 0
        for seed in range(2000):
            noise = Noise(seed)
            picks = [noise.pick(0, Choices(np.arange(N_VOCAB), np.log(x))) for x in (p, q)]
            accepted += picks[0] == picks[1]
        assert accepted / 2000 > (1 - variation) / (1 + variation) - 0.03, name
        assert (accepted == 2000) == (name == "same")
    assert isinstance(rule_for(sampling.temperature, None), Coupled)


def test_the_chi_square_catches_wrong_rules():
    options = {**UNFILTERED, "temperature": 1.0}
    expected = probabilities(Sampling(**options))
    # What the draft says is taken as it is.
    wrong = np.zeros_like(expected)
    for seed in range(N_TEXTS):
        noise, text = Noise(seed), []
        while len(text) < N_TOKENS:
            model = DRAFTS["alike"] if len(text) < 2 else TARGET
            text.append(noise.pick(len(text), Choices(np.arange(N_VOCAB), model(text).astype(np.float64))))
        wrong[tuple(text)] += 1
    assert p_value(wrong, expected) < 1e-6
    # The temperature is forgotten.
    assert p_value(measure("coupled", None, N_TEXTS, **{**options, "temperature": 0.7})[0], expected) < 1e-6


def test_tokentiming_is_biased_and_by_how_much():
    """The replacement does not know all of q: what the draft likes most comes too often."""
    options = {**UNFILTERED, "temperature": 1.0}
    expected = probabilities(Sampling(**options))
    exact, _ = measure("coupled", DRAFTS["other"], N_TEXTS, **options)
    biased, _ = measure("tokentiming", DRAFTS["other"], N_TEXTS, **options)
    assert p_value(biased, expected) < 1e-6
    assert distance(exact, expected) < 0.05 < distance(biased, expected)
    # With the target itself as draft, p/q is 1: all is accepted, and nothing is biased.
    unbiased, accepted = measure("tokentiming", DRAFTS["same"], N_TEXTS, **options)
    assert accepted == 1
    assert p_value(unbiased, expected) > 1e-3


def test_greedy_takes_the_most_likely_tokens():
    sampling = Sampling()
    assert isinstance(rule_for(sampling.temperature, "tokentiming"), Greedy)
    expected = []
    for _ in range(N_TOKENS):
        expected.append(int(np.argmax(TARGET(expected))))
    for draft in (None, *DRAFTS.values()):
        text, rounds, _, accepted = answer(sampling, None, draft, 2)
        assert list(text) == expected
        assert rounds + accepted == N_TOKENS


def test_nothing_is_drawn_after_the_end():
    sampler = Sampler(MODEL, Sampling())
    outputs = SimpleNamespace(logits=lambda output: np.array([0, 1, 0, 0], np.float32))
    assert verify(outputs, sampler, Proposal([1, 1, 1]), Greedy(), lambda token: token == 1) == [1]
    assert verify(outputs, sampler, Proposal([1, 1, 1]), Greedy(), lambda token: False) == [1, 1, 1, 1]
    assert verify(outputs, sampler, Proposal([1, 2, 1]), Greedy(), lambda token: False) == [1, 1]
    assert verify(outputs, sampler, Proposal(), Greedy(), lambda token: False) == [1]
    assert sampler.n_drawn == 8
