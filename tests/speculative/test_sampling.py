"""Noise and filters against numpy, llama.cpp's samplers and exact probabilities."""

import ctypes
from contextlib import closing
from types import SimpleNamespace

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
import scipy.special
import scipy.stats

from edge_shiftkv import ShiftKVError
from edge_shiftkv.native.llama import Model
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


LANGUAGE = [a + b * n + c for a in "ab" for b in "cd" for n in (1, 2) for c in ("", "th", "the", "e")]
GBNF = 'root ::= [ab] ("c" "c"? | "d" "d"?) ("th" "e"? | "e")?'


@pytest.fixture(scope="module")
def letters(tiny):
    """A model with tokens for letters and for "th" and "the"."""
    with closing(Model(tiny.text, 0, vocab_only=True)) as model:
        yield model


def allowed_after(model, text):
    """The tokens with which a text of LANGUAGE goes on or, where it is one, ends."""
    result = set()
    for token in range(model.n_vocab):
        piece = model.piece(token).decode(errors="replace")
        if model.ends_generation(token):
            if text in LANGUAGE:
                result.add(token)
        elif piece and any(sentence.startswith(text + piece) for sentence in LANGUAGE):
            result.add(token)
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 0, "top_p": 0.5, "min_p": 0.0, "logit_bias": {97: -float("inf")}},
    ],
)
def test_a_grammar_takes_from_what_the_filters_leave(sampler, letters, options):
    """Or what they leave of all that it allows; and what is drawn is the best of them, with the noise."""
    n_narrowed = n_filtered_anew = 0
    for seed in range(40):
        ours = sampler(letters, grammar=GBNF, seed=seed, **options)
        free = sampler(letters, seed=seed, **options)
        text = ""
        for place in range(8):
            values = logits(1000 * seed + place, letters.n_vocab)
            values[[letters.tokenize(one)[0] for one in "abcde"]] += 3
            allowed = allowed_after(letters, text)
            left = free.choices(values)
            expected = {t: x for t, x in zip(left.tokens.tolist(), left.scores, strict=True) if t in allowed}
            expected = {token: score for token, score in expected.items() if score > -np.inf}
            n_narrowed += 0 < len(expected) < len(left.tokens)
            if not expected:
                n_filtered_anew += 1
                only = np.full_like(values, -np.inf)
                only[[*allowed]] = values[[*allowed]]
                left = free.choices(only)
                expected = {t: x for t, x in zip(left.tokens.tolist(), left.scores, strict=True) if x > -np.inf}
                if options["temperature"] == 0:
                    expected = {max(allowed, key=lambda token: values[token]): 0.0}
            choices = ours.choices(values)
            got = dict(zip(choices.tokens.tolist(), choices.scores, strict=True))
            assert got == pytest.approx(expected)
            tokens = np.array([*expected])
            best = int(tokens[np.argmax(np.array([*expected.values()]) + Noise(seed).gumbel(place, tokens))])
            if options["temperature"] == 0:
                best = tokens[0]
            token = ours.sample(SimpleNamespace(logits=lambda _, values=values: values))
            assert token == best
            free.accept(token)
            if letters.ends_generation(token):
                break
            text += letters.piece(token).decode()
        assert text in LANGUAGE
    assert n_filtered_anew > 5 or (options.get("top_p") == 1.0 and not options["top_k"])
    assert n_narrowed > 5 or options["temperature"] == 0


def test_what_a_grammar_does_not_allow_is_not_accepted(sampler, letters):
    ours = sampler(letters, grammar=GBNF)
    end = next(token for token in range(letters.n_vocab) if letters.ends_generation(token))
    for token in (end, letters.tokenize("x")[0], letters.control_tokens["<|im_start|>"][0]):
        with pytest.raises(ShiftKVError, match="the grammar does not allow"):
            ours.accept(token)
    for letter in "ac":
        ours.accept(letters.tokenize(letter)[0])
    ours.accept(end)
    assert ours.n_drawn == 3


@pytest.mark.parametrize("n", [0, 1, 3, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_a_log_softmax(sampler, letters, temperature, n):
    biased = {"logit_bias": {65: 5.0}, "repeat_penalty": 2.0}
    ours = sampler(letters, temperature=temperature, seed=2, logprobs=n, **biased)
    rows = [logits(place, letters.n_vocab) for place in range(12)]
    drawn = [ours.sample(SimpleNamespace(logits=lambda _, row=row: row)) for row in rows]
    assert len(ours.logprobs) == 12
    for row, token, entry in zip(rows, drawn, ours.logprobs, strict=True):
        expected = scipy.special.log_softmax(row.astype(np.float64))
        assert entry.logprob == pytest.approx(expected[token], rel=1e-9)
        assert entry.bytes == letters.piece(token)
        order = np.argsort(-expected)[:n]
        assert [other.bytes for other in entry.top] == [letters.piece(int(other)) for other in order]
        assert [other.logprob for other in entry.top] == pytest.approx(expected[order].tolist(), rel=1e-9)


def test_more_alternatives_than_tokens(sampler):
    model = SimpleNamespace(n_vocab=4, suppressed_tokens=[], piece=lambda token: b"abcd"[token : token + 1])
    ours = sampler(model, logprobs=20)
    ours.sample(SimpleNamespace(logits=lambda _: np.array([0, 3, 1, 2], np.float32)))
    assert [other.token for other in ours.logprobs[0].top] == ["b", "d", "c", "a"]
