"""Bad input is refused with a message that says what was wrong, and the runtime serves the next request."""

import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support import tiny_models

from edge_shiftkv import ContextOverflowError, ImageError, ModelError, PromptError, Runtime, SettingError

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
        ({"n_ctx": -1}, "n_ctx is -1"),
        ({"n_ctx": "512"}, "n_ctx is '512'"),
        ({"n_threads": 0}, "n_threads is 0"),
        ({"n_threads": 1.5}, "n_threads is 1.5"),
        ({"kv_method": 3}, "kv_method is 3"),
        ({"type_k": "f17"}, "KV type 'f17' is not known: use one of f32, f16"),
    ],
)
def test_settings_out_of_range(tiny, setting, message):
    with pytest.raises(SettingError, match=message):
        Runtime(tiny.text, **setting)


def test_a_chat_template_that_is_no_template(tmp_path):
    path = tiny_models.write_text_model(tmp_path / "model.gguf", template="{% for %}")
    with pytest.raises(PromptError, match="the chat template in the GGUF is broken"):
        Runtime(path)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% macro a() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ " + "(" * 9999 + ")" * 9999 + " }}",
    ],
    ids=["loops", "times", "macros", "brackets"],
)
def test_a_chat_template_that_would_not_end(tmp_path, source):
    path = tiny_models.write_text_model(tmp_path / "model.gguf", template=source)
    with pytest.raises(PromptError, match="chat template"):
        Runtime(path)


def test_a_chat_template_that_would_not_end_for_some_conversations(tmp_path):
    source = (
        "{% set n = namespace(a='x') %}{% for m in messages %}{{ m['content'] }}"
        "{% if m['content'] == 'two' %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    with Runtime(tiny_models.write_text_model(tmp_path / "model.gguf", template=source), n_threads=1) as runtime:
        messages = [{"role": "user", "content": PROMPT}]
        assert runtime.create_chat_completion(messages, max_tokens=1)["choices"]
        with pytest.raises(PromptError, match="no use: a text is longer than 16 million characters"):
            runtime.create_chat_completion([*messages, {"role": "user", "content": "two"}], max_tokens=1)
        assert runtime.create_chat_completion(messages, max_tokens=1)["choices"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0}, "top_p is 0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"seed": -2}, "seed is -2"),
        ({"repeat_penalty": 0}, "repeat_penalty is 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"logit_bias": {0: math.nan}}, "the logit_bias of token 0 is nan"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias for token 1000000"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias for token '7'"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"time_limit": 0}, "time_limit is 0"),
        ({"time_limit": math.nan}, "time_limit is nan"),
        ({"max_tokens": -2}, "max_tokens is -2"),
        ({"max_tokens": "5"}, "max_tokens is '5'"),
        ({"max_tokens": 2.0}, "max_tokens is 2.0: it has to be a whole number"),
        ({"temperature": "0.7"}, "temperature is '0.7': it has to be a finite number"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_k": 3.5}, "top_k is 3.5: it has to be a whole number"),
        ({"top_p": "1"}, "top_p is '1'"),
        ({"min_p": [0.1]}, "min_p is"),
        ({"seed": "1"}, "seed is '1'"),
        ({"seed": 2**32 - 1}, "seed is 4294967295"),
        ({"repeat_penalty": "1"}, "repeat_penalty is '1'"),
        ({"presence_penalty": b"0"}, "presence_penalty is b'0'"),
        ({"time_limit": "1"}, "time_limit is '1'"),
        ({"logit_bias": [1, 2]}, "logit_bias is"),
        ({"logit_bias": {1: "x"}}, "the logit_bias of token 1 is 'x'"),
        ({"logit_bias": {True: 1.0}}, "logit_bias for token True"),
        ({"kv_budget": "128"}, "kv_budget is '128'"),
        ({"kv_budget": 12.5}, "kv_budget is 12.5"),
        ({"kv_method": 7}, "kv_method is 7"),
        ({"stop": 3}, "stop is 3: it has to be text or a list of texts"),
        ({"stop": ["a", 1]}, "stop is"),
        ({"stop": b"x"}, "stop is b'x'"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": True}, "logprobs is True"),
    ],
)
def test_options_out_of_range(runtime, options, message):
    with pytest.raises(SettingError, match=message):
        runtime.generate(PROMPT, **options)
    assert runtime.generate(PROMPT, max_tokens=1).text


def test_an_option_that_there_is_not(runtime):
    with pytest.raises(TypeError, match="unknown option 'mirostat': there are max_tokens, temperature"):
        runtime.generate("x", mirostat=2)
    with pytest.raises(TypeError, match=r"unknown option 'max_token': did you mean max_tokens[?] there are max_tokens"):
        runtime.generate("?", max_token=3)
    with pytest.raises(SettingError, match="unknown option 'mirostat': there are messages, stream, max_tokens"):
        runtime.create_chat_completion([{"role": "user", "content": "x"}], mirostat=2)


def test_none_is_the_default_and_minus_one_what_llama_cpp_means(runtime):
    """Among them is the runtime's method, in the place of a request's."""
    plain = {"max_tokens": 8, "temperature": 1.0, "seed": 3}
    names = ("top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop")
    nothing = dict.fromkeys((*names, "time_limit", "grammar", "json_schema", "logprobs", "kv_method"))
    expected = runtime.generate(PROMPT, **plain)
    assert runtime.generate(PROMPT, **plain, **nothing).text == expected.text
    unlimited = {**plain, "top_k": 0, "min_p": 0.0, "top_p": 1.0}
    assert runtime.generate(PROMPT, **{**unlimited, "top_k": -1}).text == runtime.generate(PROMPT, **unlimited).text
    drawn = {runtime.generate(PROMPT, **{**unlimited, "seed": -1, "temperature": 3.0}).text for _ in range(4)}
    assert len(drawn) > 1
    long = runtime.generate("abc", raw=True, max_tokens=-1, logit_bias={1: 1000.0})
    assert long.figures.generated_tokens + long.figures.prompt_tokens == runtime.n_ctx
    method, runtime.kv_method, runtime.kv_budget = runtime.kv_method, "streamingllm", 16
    try:
        kept = runtime.generate(PROMPT, max_tokens=1, kv_method=None).selection.kept(0, 0).tolist()
        assert kept == runtime.generate(PROMPT, max_tokens=1, kv_method="streamingllm").selection.kept(0, 0).tolist()
        assert kept != runtime.generate(PROMPT, max_tokens=1, kv_method="mixed").selection.kept(0, 0).tolist()
    finally:
        runtime.kv_method = method


def test_a_runtime_with_the_models_own_context_and_all_threads(tiny, monkeypatch):
    monkeypatch.setattr("edge_shiftkv.engine.engine.usable_cpus", lambda: 3)
    with Runtime(tiny.text, n_ctx=0, n_threads=-1) as runtime:
        assert (runtime.n_ctx, runtime.engine.n_threads) == (1024, 3)


@pytest.mark.parametrize(
    ("prompt", "images", "error", "message"),
    [
        ("x", "a.png", PromptError, r"pass images=\['a.png'\]"),
        ("x", Path("a.png"), PromptError, r"pass images=\['a.png'\]"),
        ("x", b"a.png", PromptError, "images has to be a list"),
        ("x", PIL.Image.new("RGB", (4, 4)), PromptError, "images has to be a list"),
        ("x", 7, PromptError, "images has to be a list"),
        ("x", [7], ImageError, "a picture has to be a path, a URL or a PIL image, not int"),
        ([{"role": "user", "content": "x"}], [], PromptError, "messages go to create_chat_completion"),
        (7, [], PromptError, "the prompt has to be text, not 7"),
        (None, ["a.png"], PromptError, "the prompt has to be text, not None"),
    ],
)
def test_what_is_no_prompt_and_no_list_of_pictures(runtime, prompt, images, error, message):
    with pytest.raises(error, match=message):
        runtime.generate(prompt, images)
    assert runtime.generate(PROMPT, max_tokens=1).text


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
    message = r"the prompt has \d+ tokens \(16 of them visual\).*n_ctx is 1024; shorten"
    with pytest.raises(ContextOverflowError, match=message) as caught:
        runtime.stream(PROMPT * 20, [tiny.picture])
    assert caught.value.n_ctx == 1024 < caught.value.n_tokens
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


def test_pictures_out_of_their_folder(tiny, tmp_path):
    inside = {"image_root": tiny.picture.parent}
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": tiny.picture.name}}]}
    message["content"].append({"type": "text", "text": PROMPT})
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, **inside) as runtime:
        assert runtime.create_chat_completion([message], max_tokens=1)["choices"]
        assert runtime.generate(PROMPT, [tiny.picture], max_tokens=1).text
        told = []
        for url in ("/etc/hostname", "/etc/none", "file:///etc/hostname", "../none", "none.png"):
            message["content"][0]["image_url"]["url"] = url
            with pytest.raises(ImageError) as error:
                runtime.create_chat_completion([message])
            told.append(str(error.value).removeprefix(url))
            with pytest.raises(ImageError, match="no such file in the folder that pictures may be in"):
                runtime.generate(PROMPT, [url])
        assert set(told) == {": no such file in the folder that pictures may be in"}
        assert runtime.generate(PROMPT, max_tokens=1).text


@pytest.mark.parametrize("allow_http", [False, True])
def test_no_pictures_from_private_networks(tiny, allow_http):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, allow_http=allow_http) as runtime:
        with pytest.raises(ImageError, match=r"allow_http=True|allow_http='private'"):
            runtime.stream(PROMPT, ["http://169.254.169.254/latest/meta-data"])
        assert runtime.generate(PROMPT, max_tokens=1).text


@pytest.mark.parametrize("prompt", ["nul \0 byte", "lone surrogate \ud800", "emoji 😀", "‮right to left"])
def test_any_text_is_a_prompt(runtime, prompt):
    assert runtime.generate(prompt, max_tokens=1).text
