import base64
import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image

from edge_shiftkv import PromptError, SettingError, ShiftKVError, chat_schema

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
        (
            [{"role": "robot", "content": "x"}],
            "role 'robot' is not supported: use one of system, developer, user, assist",
        ),
        ([{"role": ["user"], "content": "x"}], "role"),
        ("text", r'it has to be a list, as in \[{"role": "user"'),
        ({"role": "user", "content": "x"}, "it has to be a list"),
        (None, "it has to be a list"),
        (["x"], "a message has to be an object with role and content, not 'x'"),
        ([{"role": "user", "content": b"x"}], "a string or a list of parts, not b'x'"),
        ([{"role": "tool", "content": None}], "not None"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "answers are not continued"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "tool_calls in a message"),
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


MESSAGES = [{"role": "user", "content": "Hello"}]


def valid(answer):
    """An answer as the openai package reads it, or an error for a value of a wrong kind."""
    return ChatCompletion.model_validate_json(json.dumps(answer), strict=True)


def valid_chunk(chunk):
    return ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)


@pytest.mark.parametrize("logprobs", [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}])
def test_the_openai_package_reads_answers_and_chunks(runtime, logprobs):
    answer = valid(runtime.create_chat_completion(MESSAGES, max_tokens=6, model="some/model", **logprobs))
    assert answer.model == "some/model"
    (choice,) = answer.choices
    chunks = [
        valid_chunk(chunk)
        for chunk in runtime.create_chat_completion(MESSAGES, max_tokens=6, model="m", stream=True, **logprobs)
    ]
    assert {chunk.model for chunk in chunks} == {"m"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    if not logprobs:
        assert choice.logprobs is None
        assert all(chunk.choices[0].logprobs is None for chunk in chunks)
        return
    content = choice.logprobs.content
    assert len(content) == answer.usage.completion_tokens == 6
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == choice.message.content
    assert {len(entry.top_logprobs) for entry in content} == {logprobs.get("top_logprobs", 0)}
    parts = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert [entry for part in parts for entry in part] == content
    assert len(parts) > 1


def test_chunks_have_the_logprobs_of_text_that_is_held_back(runtime):
    """Tokens that may begin a stop string come with later text, or with the end."""
    text = runtime.generate("Hello", max_tokens=6).text
    options = {"max_tokens": 6, "logprobs": True, "stop": [text[:2] + "\0", text[4:6]]}
    whole = runtime.create_chat_completion(MESSAGES, **options)["choices"][0]
    chunks = list(runtime.create_chat_completion(MESSAGES, stream=True, **options))
    parts = [chunk["choices"][0]["logprobs"]["content"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [entry for part in parts for entry in part] == whole["logprobs"]["content"]
    assert chunks[-1]["choices"][0]["logprobs"]
    assert whole["message"]["content"] == text[:4]


@pytest.mark.parametrize("wanted", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for(runtime, wanted):
    chunks = list(runtime.create_chat_completion(MESSAGES, max_tokens=4, stream=True, stream_options=wanted))
    for chunk in chunks:
        valid_chunk(chunk)
    *others, last = chunks
    assert last["usage"]["completion_tokens"] == last["figures"]["generated_tokens"] == 4
    if wanted and wanted["include_usage"]:
        assert last["choices"] == []
        assert others[-1]["choices"][0]["finish_reason"] == "length"
        assert all(chunk["usage"] is None and "figures" not in chunk for chunk in others)
    else:
        assert last["choices"][0]["finish_reason"] == "length"
        assert all("usage" not in chunk for chunk in others)


def test_what_changes_nothing_is_taken(runtime):
    body = {
        "model": "gpt-4o",
        "messages": MESSAGES,
        "n": 1,
        "stream": False,
        "temperature": None,
        "top_p": None,
        "seed": 7,
        "stop": None,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "none",
        "functions": None,
        "function_call": "none",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "logprobs": False,
        "max_completion_tokens": 5,
    }
    answer = runtime.create_chat_completion(**json.loads(json.dumps(body)))
    assert answer["usage"]["completion_tokens"] == 5
    plain = runtime.create_chat_completion(MESSAGES, max_tokens=5)
    assert answer["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"n": 2}, "n=2 is not supported: one answer a request"),
        ({"n": True}, "n=True"),
        ({"tools": [{"type": "function"}]}, "tools=.*not supported: describe them in a message"),
        ({"tool_choice": "auto"}, "tool_choice='auto'"),
        ({"functions": [{"name": "f"}]}, "functions="),
        ({"audio": {"voice": "x"}}, "audio="),
        ({"modalities": ["text", "audio"]}, "modalities="),
        ({"prediction": {"type": "content"}}, "prediction="),
        ({"model": 3}, "model is 3"),
        ({"stream": "yes"}, "stream is 'yes': it has to be true or false"),
        ({"stream_options": True}, "stream_options is True"),
        ({"stream_options": {"include_usage": 1}}, "include_usage is 1"),
        ({"logprobs": 3}, "logprobs is 3: it has to be true or false"),
        ({"top_logprobs": 3}, "top_logprobs are only there with logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "pass one of them"),
        ({"max_completion_tokens": "4"}, "max_tokens is '4'"),
        ({"logit_bias": {"x": 1}}, "logit_bias for token 'x'"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias for token '999"),
        ({"logit_bias": {"7": "1"}}, "the logit_bias of token 7 is '1'"),
        ({"response_format": "json"}, "response_format is 'json'"),
        ({"response_format": {"type": "xml"}}, "the type 'xml': use text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format has no schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format has no schema"),
        ({"response_format": {"type": "json_object", "schema": [1]}}, "the schema of response_format is"),
        ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, "pass one of them"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "JSON schema cannot"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(runtime, option, message):
    with pytest.raises(SettingError, match=message):
        runtime.create_chat_completion(MESSAGES, **option)
    assert runtime.generate("Hello", max_tokens=1).text


def test_read_body_says_what_a_body_asks_for(tiny):
    message = {"role": "user", "content": [image_part(tiny.picture.name), TEXT]}
    body = {"messages": [message], "stream": True, "stream_options": {"include_usage": True}, "model": "m", "user": "u"}
    body |= {"max_completion_tokens": 9, "logit_bias": {"7": 1}, "logprobs": True, "top_logprobs": 2, "min_p": 0.5}
    body["response_format"] = {"type": "json_object", "schema": {"enum": [1]}}
    asked = chat_schema.read_body(body, image_root=tiny.picture.parent)
    assert (asked.stream, asked.include_usage, asked.model) == (True, True, "m")
    ((picture, text),) = [message.content for message in asked.messages]
    assert (picture.size, text) == ((150, 90), TEXT["text"])
    options = {"max_tokens": 9, "logit_bias": {7: 1}, "logprobs": 2, "min_p": 0.5, "json_schema": {"enum": [1]}}
    assert asked.options == options
    with pytest.raises(SettingError, match="not a JSON object"):
        chat_schema.read_body([body])
    with pytest.raises(PromptError, match="messages is empty"):
        chat_schema.read_body({"model": "m"})


def test_a_bias_by_name_is_the_bias_of_the_token(runtime):
    token = 65
    content = runtime.create_chat_completion(MESSAGES, max_tokens=3, logit_bias={str(token): 1000})["choices"][0]
    assert content["message"]["content"] == runtime.engine.model.piece(token).decode() * 3


def test_a_developer_is_the_system_and_a_tool_is_what_the_template_makes_of_it(runtime):
    def n_tokens(*messages):
        return runtime.create_chat_completion(messages, max_tokens=1)["usage"]["prompt_tokens"]

    user = MESSAGES[0]
    assert n_tokens({"role": "developer", "content": "x"}, user) == n_tokens({"role": "system", "content": "x"}, user)
    # The template writes the role as it is: as many bytes.
    tool = n_tokens(user, {"role": "assistant", "content": None, "tool_calls": None}, {"role": "tool", "content": "18"})
    assert tool == n_tokens(user, {"role": "assistant", "content": ""}, {"role": "user", "content": "18"})


def test_json_by_response_format(runtime):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    for wanted in (
        {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}},
        {"type": "json_object", "schema": schema},
    ):
        choice = runtime.create_chat_completion(MESSAGES, response_format=wanted, max_tokens=200)["choices"][0]
        assert json.loads(choice["message"]["content"])["a"] in ("x", "y")
        assert choice["finish_reason"] == "stop"
    text = runtime.create_chat_completion(MESSAGES, response_format={"type": "json_object"}, max_tokens=2)
    assert text["choices"][0]["message"]["content"].startswith("{")
