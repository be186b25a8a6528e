"""How likely tokens were, against llama-cpp-python's own logprobs and a log-softmax in numpy."""

import numpy as np
import pytest
from llama_cpp import Llama

PROMPT = "What is on the picture? " * 3
NEAR = 0.03
"""Passes over one token and over many round differently."""

OPTIONS = (
    {},
    {"temperature": 1.5, "seed": 3, "top_k": 5},
    {"temperature": 1.0, "seed": 4, "repeat_penalty": 1.5, "logit_bias": {70: 3.0}},
    {"grammar": 'root ::= ([a-f] "-")+'},
)


@pytest.fixture(scope="module")
def stock(tiny):
    return Llama(str(tiny.text), n_ctx=256, n_threads=1, flash_attn=True, logits_all=True, verbose=False)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_logprobs_are_the_log_softmax_of_the_models_logits(runtime, stock, options, n):
    answer = runtime.generate(PROMPT, raw=True, max_tokens=16, logprobs=n, **options)
    model = runtime.engine.model
    by_text = {model.piece(token): token for token in range(model.n_vocab) if model.piece(token)}
    written = [by_text[entry.bytes] for entry in answer.logprobs]
    assert len(written) == answer.figures.generated_tokens == 16
    prompt = stock.tokenize(PROMPT.encode(), add_bos=False)
    stock.reset()
    stock.eval(prompt + written)
    logits = stock.scores[len(prompt) - 1 : len(prompt) + len(written) - 1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for entry, token, row in zip(answer.logprobs, written, expected, strict=True):
        assert entry.token == entry.bytes.decode(errors="replace")
        assert entry.logprob == pytest.approx(row[token], abs=NEAR)
        assert [other.logprob for other in entry.top] == pytest.approx(sorted(row)[::-1][:n], abs=NEAR)
        for other in entry.top:
            if other.bytes:
                assert other.logprob == pytest.approx(row[by_text[other.bytes]], abs=NEAR)
    if options and n:
        assert any(entry.logprob < entry.top[0].logprob for entry in answer.logprobs)


def test_they_are_those_of_llama_cpp_python(runtime, stock):
    theirs = stock.create_completion(PROMPT, max_tokens=12, temperature=0, logprobs=2, repeat_penalty=1.0)["choices"][0]
    answer = runtime.generate(PROMPT, raw=True, max_tokens=12, logprobs=2)
    assert answer.text == theirs["text"]
    assert [entry.logprob for entry in answer.logprobs] == pytest.approx(theirs["logprobs"]["token_logprobs"], abs=NEAR)
    for entry, others in zip(answer.logprobs, theirs["logprobs"]["top_logprobs"], strict=True):
        assert {other.token: pytest.approx(other.logprob, abs=NEAR) for other in entry.top} == others


def test_there_are_none_unless_they_are_asked_for(runtime):
    assert runtime.generate(PROMPT, max_tokens=2).logprobs is None
    stream = runtime.stream(PROMPT, max_tokens=2)
    assert stream.logprobs is None


def test_a_stream_has_those_of_the_tokens_so_far(runtime):
    stream = runtime.stream(PROMPT, max_tokens=6, logprobs=0)
    text, n = "", []
    for piece in stream:
        text += piece
        n.append(len(stream.logprobs))
        assert b"".join(entry.bytes for entry in stream.logprobs).startswith(text.encode())
    assert n == sorted(n)
    assert n[0] < 6 == len(stream.completion.logprobs)
    assert stream.completion.logprobs == tuple(stream.logprobs)


def test_an_answer_without_tokens_has_none(runtime, monkeypatch):
    monkeypatch.setattr(runtime.engine.model, "ends_generation", lambda token: True)
    assert runtime.generate(PROMPT, logprobs=3).logprobs == ()
