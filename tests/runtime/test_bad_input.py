"""Bad input is refused with a message that says what was wrong, and the runtime serves the next request."""

import math

import numpy as np
import pytest
from support import tiny_models

from edge_shiftkv import ImageError, ModelError, PromptError, Runtime, ShiftKVError

PROMPT = "What is on the picture? " * 3


def test_no_such_model(tmp_path):
    with pytest.raises(ModelError, match=r"none\.gguf: No such file"):
        Runtime(tmp_path / "none.gguf")


def test_a_model_that_is_no_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("hello")
    with pytest.raises(ModelError, match=r"model\.gguf: not a GGUF file \(it starts with b'hell'\)"):
        Runtime(path)


@pytest.mark.parametrize("n_bytes", [4, 3000, 100_000])
def test_an_incomplete_model(tiny, tmp_path, n_bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny.text.read_bytes()[:n_bytes])
    with pytest.raises(ModelError, match="incomplete file"):
        Runtime(path)


def test_random_bytes_after_the_magic(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + np.random.default_rng(0).bytes(5000))
    with pytest.raises(ModelError, match=r"model\.gguf: GGUF version \d+: 2 and 3 are known"):
        Runtime(path)


def test_an_mmproj_in_place_of_the_model(tiny):
    with pytest.raises(ModelError, match="CLIP cannot be used as main model"):
        Runtime(tiny.mmproj)


def test_no_such_mmproj(tiny, tmp_path):
    with pytest.raises(ModelError, match=r"none\.gguf: No such file"):
        Runtime(tiny.text, tmp_path / "none.gguf")


def test_a_model_in_place_of_the_mmproj(tiny):
    with pytest.raises(ModelError, match=r"text\.gguf: not the mmproj of this model"):
        Runtime(tiny.text, tiny.text)


def test_the_mmproj_of_another_model(tiny, tmp_path):
    other = tiny_models.write_mmproj(tmp_path / "other.gguf", n_embd_text=128)
    with pytest.raises(ModelError, match=r"n_embd = 64\) and mmproj \(n_embd = 128"):
        Runtime(tiny.text, other)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kv_budget": 1}, "kv_budget is 1"),
        ({"kv_budget": -3}, "kv_budget is -3"),
        ({"n_ctx": 0}, "n_ctx is 0"),
        ({"n_threads": 0}, "n_threads is 0"),
        ({"type_k": "f17"}, "KV type 'f17' is not known: use one of f32, f16"),
    ],
)
def test_settings_out_of_range(tiny, setting, message):
    with pytest.raises(ShiftKVError, match=message):
        Runtime(tiny.text, **setting)


def test_a_chat_template_that_is_no_template(tmp_path):
    path = tiny_models.write_text_model(tmp_path / "model.gguf", template="{% for %}")
    with pytest.raises(PromptError, match="the chat template in the GGUF is broken"):
        Runtime(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"repeat_penalty": 0}, "repeat_penalty is 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"logit_bias": {0: math.nan}}, "a logit_bias is not a number"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias for token 1000000"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias for token '7'"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
    ],
)
def test_options_out_of_range(runtime, options, message):
    with pytest.raises(PromptError, match=message):
        runtime.generate(PROMPT, **options)
    assert runtime.generate(PROMPT, max_tokens=1).text


def test_an_option_that_there_is_not(runtime):
    with pytest.raises(TypeError, match="unknown option 'mirostat': there are max_tokens, temperature"):
        runtime.create_chat_completion([{"role": "user", "content": "x"}], mirostat=2)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt(runtime, prompt):
    with pytest.raises(PromptError, match="the prompt is empty"):
        runtime.stream(prompt)
    assert runtime.generate(PROMPT, max_tokens=1).text


def test_a_raw_prompt_that_ends_with_a_picture(runtime, tiny):
    with pytest.raises(PromptError, match="there has to be text at its end"):
        runtime.generate("", [tiny.picture], raw=True)


def test_a_picture_without_a_question_is_a_prompt_for_a_template(runtime, tiny):
    assert runtime.generate("", [tiny.picture], max_tokens=1).text


@pytest.mark.parametrize("kv_budget", [None, 16])
def test_a_prompt_longer_than_the_context(runtime, tiny, kv_budget):
    runtime.kv_budget = kv_budget
    with pytest.raises(PromptError, match=r"the prompt has \d+ tokens \(16 of them visual\).*n_ctx is 1024; shorten"):
        runtime.stream(PROMPT * 20, [tiny.picture])
    assert runtime.generate(PROMPT, max_tokens=1).text


def test_pictures_for_a_model_without_an_mmproj(tiny):
    with Runtime(tiny.text, n_threads=1) as runtime:
        with pytest.raises(PromptError, match="without an mmproj"):
            runtime.stream(PROMPT, [tiny.picture])
        assert runtime.generate(PROMPT, max_tokens=1).text


def test_a_picture_that_is_none(runtime, tiny):
    with pytest.raises(ImageError, match=r"text\.gguf: not a picture"):
        runtime.stream(PROMPT, [tiny.picture, tiny.text])
    assert runtime.generate(PROMPT, max_tokens=1).text


@pytest.mark.parametrize("prompt", ["nul \0 byte", "lone surrogate \ud800", "emoji 😀", "‮right to left"])
def test_any_text_is_a_prompt(runtime, prompt):
    assert runtime.generate(prompt, max_tokens=1).text
