"""Noise and filters against numpy, llama.cpp's samplers and exact probabilities."""

import ctypes
from types import SimpleNamespace

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
import scipy.stats

from edge_shiftkv.sampling import Choices, Noise, Sampler, Sampling

N = 1000
VOCABULARY = SimpleNamespace(n_vocab=N, suppressed_tokens=[])


def logits(seed, n=N):
    return (np.random.default_rng(seed).standard_normal(n) * 3).astype(np.float32)


@pytest.fixture
def sampler():
    samplers = []

    def make(model=VOCABULARY, **options):
        samplers.append(Sampler(model, Sampling(**options)))
        return samplers[-1]

    yield make
    for made in samplers:
        made.close()


def native(values, *chain, history=()):
    """What llama.cpp's samplers leave of logits: token -> logit."""
    head = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    for one in chain:
        llama.llama_sampler_chain_add(head, one)
    for token in history:
        llama.llama_sampler_accept(head, token)
    data = (llama.llama_token_data * len(values))(*((i, float(x), 0.0) for i, x in enumerate(values)))
    array = llama.llama_token_data_array(data, len(values), -1, False)
    llama.llama_sampler_apply(head, ctypes.byref(array))
    result = {array.data[i].id: array.data[i].logit for i in range(array.size)}
    llama.llama_sampler_free(head)
    return result


@pytest.mark.parametrize("along", ["tokens", "places", "seeds"])
def test_noise_is_uniform_and_independent_along_everything_it_depends_on(along):
    n = 20000
    if along == "tokens":
        u = Noise(3).uniform(7, np.arange(n))
    elif along == "places":
        noise = Noise(3)
        u = np.concatenate([noise.uniform(place, np.array([11])) for place in range(n)])
    else:
        u = np.concatenate([Noise(seed).uniform(7, np.array([11])) for seed in range(n)])
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4 / n**0.5
    assert len(np.unique(u)) == n
    assert 0 < u.min() < u.max() < 1


def test_gumbel_variates():
    assert scipy.stats.kstest(Noise(5).gumbel(1, np.arange(20000)), "gumbel_r").pvalue > 1e-3


def splitmix64(state):
    """The next output of Steele, Lea and Flood's generator, in whole numbers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize(("seed", "place", "token"), [(0, 0, 0), (1, 2, 3), (2**32 - 2, 10**6, 10**6), (5, 0, -1)])
def test_noise_is_the_same_on_every_machine(seed, place, token):
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # as published
    key = splitmix64(splitmix64(seed) + place) - 0x9E3779B97F4A7C15
    bits = splitmix64(key + token * 0x9E3779B97F4A7C15)
    assert Noise(seed).uniform(place, np.array([token]))[0] == ((bits >> 12) + 0.5) / 2**52


def test_noise_depends_on_nothing_else():
    tokens = np.arange(100)
    assert np.array_equal(Noise(1).uniform(2, tokens)[50:], Noise(1).uniform(2, tokens[50:]))
    assert Noise().seed != Noise().seed


@pytest.mark.parametrize("n", [300, 5000, 60000])
def test_bounds_find_what_all_noise_finds(n):
    noise = Noise(1)
    for place in range(40):
        choices = Choices(np.arange(n) * 2, logits(place, n).astype(np.float64) / (1 + place % 4))
        assert (
            noise.pick(place, choices)
            == choices.tokens[np.argmax(choices.scores + noise.gumbel(place, choices.tokens))]
        )


def test_draws_have_the_probabilities():
    scores = np.log([0.4, 0.3, 0.2, 0.07, 0.03])
    drawn = [Noise(seed).pick(3, Choices(np.arange(5), scores)) for seed in range(6000)]
    assert scipy.stats.chisquare(np.bincount(drawn, minlength=5), 6000 * np.exp(scores)).pvalue > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 0, "top_p": 0.7, "min_p": 0.0},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.1},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_filters(sampler, options):
    """Top-k, top-p and min-p, then temperature, in plain numpy."""
    settings = Sampling(temperature=0.7, seed=1, **options)
    values = logits(1)
    order = np.argsort(-values)
    if settings.top_k:
        order = order[: settings.top_k]
    p = np.exp(values[order].astype(np.float64))
    p /= p.sum()
    order = order[: np.searchsorted(np.cumsum(p), settings.top_p) + 1]
    order = order[values[order] >= values[order[0]] + np.log(max(settings.min_p, 1e-30))]
    expected = np.exp(values[order] / 0.7)
    choices = sampler(temperature=0.7, seed=1, **options).choices(values)
    got = dict(zip(choices.tokens.tolist(), choices.probabilities(), strict=True))
    assert sorted(got) == sorted(order.tolist())
    assert [got[token] for token in order] == pytest.approx(expected / expected.sum(), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_penalties_and_biases_of_llama_cpp(sampler, temperature):
    history = [int(token) for token in np.random.default_rng(2).integers(0, 40, 100)]
    biases = {3: 2.5, 4: -1.0, 5: -float("inf")}
    ours = sampler(
        SimpleNamespace(n_vocab=N, suppressed_tokens=[9]),
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repeat_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=-0.2,
        logit_bias=biases,
    )
    for token in history:
        ours.accept(token)
    values = logits(4)
    array = (llama.llama_logit_bias * 4)(*biases.items(), (9, -float("inf")))
    expected = native(
        values,
        llama.llama_sampler_init_logit_bias(N, 4, array),
        llama.llama_sampler_init_penalties(N, 64, 1.3, -0.2, 0.4),
        history=history,
    )
    choices = ours.choices(values)
    if temperature == 0:
        assert choices.tokens.tolist() == [max(expected, key=expected.get)]
    else:
        assert choices.scores == pytest.approx([expected[token] / 0.8 for token in choices.tokens], rel=1e-5)
    assert not np.isnan(choices.scores).any()


def test_a_draw_does_not_depend_on_how_many_were_made(sampler):
    outputs = SimpleNamespace(logits=lambda output: logits(-output))
    one, other = (sampler(temperature=1.0, seed=8) for _ in range(2))
    drawn = [one.sample(outputs, output) for output in (-3, -2, -1)]
    other.accept(drawn[0])
    other.accept(drawn[1])
    assert other.sample(outputs, -1) == drawn[2]
