import base64
import json

import pytest
from PIL import Image

from edge_shiftkv import PromptError, ShiftKVError, chat_schema

TEXT = {"type": "text", "text": "What is on it?"}


def image_part(source):
    return {"type": "image_url", "image_url": source}


def test_the_schema_of_an_answer(runtime, tiny):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image_part({"url": str(tiny.picture), "detail": "high"}), TEXT]},
    ]
    answer = runtime.create_chat_completion(messages, max_tokens=6)
    json.dumps(answer)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert isinstance(answer["created"], int)
    assert answer["model"] == str(tiny.text)
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 6
    assert answer["figures"]["image_tokens"] == 16


def test_the_schema_of_chunks(runtime):
    messages = [{"role": "user", "content": "Hello"}]
    whole = runtime.create_chat_completion(messages, max_tokens=6)
    first, *middle, last = runtime.create_chat_completion(messages, max_tokens=6, stream=True)
    for chunk in (first, *middle, last):
        json.dumps(chunk)
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["id"] == first["id"]
    assert first["choices"][0]["delta"] == {"role": "assistant"}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle)
    assert text == whole["choices"][0]["message"]["content"]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in (first, *middle))
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert last["usage"] == whole["usage"]
    assert last["figures"]["generated_tokens"] == 6


def test_a_conversation_equals_the_same_prompt(runtime, tiny):
    chat = runtime.create_chat_completion(
        [{"role": "user", "content": [image_part(str(tiny.picture)), TEXT]}], max_tokens=8
    )
    answer = runtime.generate(TEXT["text"], [tiny.picture], max_tokens=8)
    assert chat["choices"][0]["message"]["content"] == answer.text


def test_a_picture_can_be_a_path_a_url_or_a_pil_image(runtime, tiny):
    encoded = base64.b64encode(tiny.picture.read_bytes()).decode()
    with Image.open(tiny.picture) as picture:
        sources = [
            tiny.picture,
            str(tiny.picture),
            tiny.picture.as_uri(),
            f"data:image/png;base64,{encoded}",
            picture,
        ]
        answers = {
            runtime.create_chat_completion([{"role": "user", "content": [image_part(part), TEXT]}], max_tokens=8)[
                "choices"
            ][0]["message"]["content"]
            for source in sources
            for part in (source, {"url": source})
        }
    assert len(answers) == 1


def test_turns_before_the_last_count(runtime):
    one = [{"role": "user", "content": "Hello"}]
    three = [*one, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Again"}]
    short, long = (runtime.create_chat_completion(messages, max_tokens=1) for messages in (one, three))
    assert long["usage"]["prompt_tokens"] > short["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ([{"role": "robot", "content": "x"}], "role 'robot' is not supported: use one of system, user, assistant"),
        ([{"content": "x"}], "role None"),
        ([{"role": "user"}], "not None"),
        ([{"role": "user", "content": [{"type": "video_url"}]}], "not a text or image_url part"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "not a text or image_url part"),
        ([{"role": "user", "content": ["x"]}], "not a text or image_url part"),
        ([{"role": "user", "content": [image_part("http://127.0.0.1/x.png")]}], "allow_http=True"),
        ([{"role": "user", "content": [image_part("no.png")]}], "no.png: No such file"),
    ],
)
def test_what_is_not_in_the_schema_is_refused(runtime, messages, message, stream):
    with pytest.raises(PromptError, match=message):
        runtime.create_chat_completion(messages, stream=stream)
    assert runtime.generate("Hello", max_tokens=1).text


@pytest.mark.parametrize("n_chunks", [1, 3])
def test_an_abandoned_stream_is_ended(runtime, n_chunks):
    """Not only forgotten: something else may still hold the stream, and with it what the answer needs."""
    stream = runtime.stream("Hello", max_tokens=16)
    chunks = chat_schema.chunks(stream, model="a model")
    for _ in range(n_chunks):
        next(chunks)
    chunks.close()
    assert list(stream) == []
    with pytest.raises(ShiftKVError, match="not complete"):
        _ = stream.completion


def test_a_stream_that_fails_is_ended(runtime, monkeypatch):
    stream = runtime.stream("Hello", max_tokens=16)
    chunks = chat_schema.chunks(stream, model="a model")
    next(chunks)
    with monkeypatch.context() as patch:
        patch.setattr("edge_shiftkv.engine.slot.Slot.advance", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(chunks)
    assert list(stream) == []
    assert runtime.generate("Hello", max_tokens=1).text


def test_usage_counts_the_whole_prompt_also_where_it_was_cut(runtime):
    messages = [{"role": "user", "content": "What is on the picture? " * 3}]
    whole = runtime.create_chat_completion(messages, max_tokens=6)["usage"]
    runtime.kv_budget = 24
    answer = runtime.create_chat_completion(messages, max_tokens=6)
    *_, last = runtime.create_chat_completion(messages, max_tokens=6, stream=True)
    assert answer["figures"]["kept_tokens"] == 24 < whole["prompt_tokens"]
    assert answer["usage"] == last["usage"] == whole
    assert whole["total_tokens"] == whole["prompt_tokens"] + whole["completion_tokens"]
