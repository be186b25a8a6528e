"""The OpenAI chat schema: requests are read from it, answers are written in it.

`read_body` takes what clients of OpenAI's API, llama.cpp's server and llama-cpp-python send. Answers are as
llama-cpp-python gives them, with the figures next to "usage".
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from edge_shiftkv.checks import check_number, unknown_option
from edge_shiftkv.errors import PromptError, SettingError
from edge_shiftkv.prompts.images import AllowHttp, ImageRoot, ImageSource, load_image
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.request import Options
from edge_shiftkv.results import Completion, TokenLogprob, TokenLogprobs
from edge_shiftkv.stream import Stream

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

_NO_TOOLS = "tools are not supported: describe them in a message, and ask for JSON with response_format"
# What is not supported, values of it that ask for nothing, and what to do.
_UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one answer a request: send as many requests, with a seed each"),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none",), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none",), _NO_TOOLS),
    "audio": ((), "answers are text: leave it out"),
    "modalities": (([], ["text"]), "answers are text: leave it out, or pass ['text']"),
    "prediction": ((), "load the runtime with a draft instead"),
    "moderation": ((), "nothing is moderated here: leave it out"),
    "web_search_options": ((), "nothing is searched here: leave it out"),
}

_Load = Callable[[ImageSource], Image.Image]


class Body(Options, total=False):
    """`Options`, and what else a request in the OpenAI schema may have beside messages.

    logprobs is true or false here; top_logprobs is the number of alternatives, 0 to 20.

    model: any name; answers have it.
    stream_options: {"include_usage": true} ends the chunks with one that has usage and figures, and no choices.
    max_completion_tokens: max_tokens by its newer name.
    response_format: {"type": "text"}, {"type": "json_object"} for any JSON object, or one of a schema:
        {"type": "json_schema", "json_schema": {"schema": ...}} or {"type": "json_object", "schema": ...}.
    user, metadata, store, service_tier, safety_identifier, prompt_cache_key, prompt_cache_options,
    prompt_cache_retention, reasoning_effort, verbosity, parallel_tool_calls: have no effect.
    n, tools, tool_choice, functions, function_call, audio, modalities, prediction, moderation, web_search_options: only
        with values that ask for nothing, as n=1 and tool_choice="none".
    """

    model: str | None
    stream_options: Mapping[str, Any] | None
    max_completion_tokens: int | None
    response_format: Mapping[str, Any] | None
    top_logprobs: int | None
    user: str | None
    metadata: Mapping[str, Any] | None
    store: bool | None
    service_tier: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    prompt_cache_options: Mapping[str, Any] | None
    prompt_cache_retention: str | None
    reasoning_effort: str | None
    verbosity: str | None
    parallel_tool_calls: bool | None
    n: int | None
    tools: Sequence[Any] | None
    tool_choice: Any
    functions: Sequence[Any] | None
    function_call: Any
    audio: Any
    modalities: Sequence[str] | None
    prediction: Any
    moderation: Any
    web_search_options: Any


@dataclass(frozen=True)
class ChatRequest:
    """What a body asks for.

    messages: the conversation, its pictures loaded.
    options: for `Request.of`, which checks them.
    stream: whether the answer is wanted as `chunks`, or as one `completion`.
    include_usage: whether the chunks are to end with one for usage; see `chunks`.
    model: the name that the answer is to have; None where the body has none.
    """

    messages: Sequence[Message]
    options: Options
    stream: bool = False
    include_usage: bool = False
    model: str | None = None


def read_body(body: Mapping[str, Any], *, allow_http: AllowHttp = False, image_root: ImageRoot = None) -> ChatRequest:
    """Read a request: "messages", and what `Body` has.

    None is as good as nothing, but for max_tokens and kv_budget, where `Options` says what it means.

    allow_http, image_root: as in `load_image`.

    Raises PromptError for messages that are not in the schema, ImageError for a picture that cannot be read, and
    SettingError for what there is not, is not supported, or is of the wrong kind.

    Example::

        request = read_body({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20, "stream": True})
    """
    if not isinstance(body, Mapping):
        raise SettingError(f"the body is not a JSON object but {body!r}"[:1000])
    taken = ("messages", "stream", *Body.__annotations__)
    if unknown := [name for name in body if name not in taken]:
        raise SettingError(unknown_option(unknown[0], taken)[:2000])
    for name, (harmless, advice) in _UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or value not in harmless):
            raise SettingError(f"{name}={value!r:.200} is not supported: {advice}")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise SettingError(f"model is {model!r}: it has to be text"[:1000])
    options: dict[str, Any] = {name: body[name] for name in Options.__annotations__ if name in body}
    options |= _max_tokens(body)
    options["logprobs"] = _logprobs(body)
    options["logit_bias"] = _logit_bias(body.get("logit_bias"))
    schema = _schema(body.get("response_format"))
    if schema is not None:
        if options.get("grammar") is not None or options.get("json_schema") is not None:
            raise SettingError("response_format cannot be had together with grammar or json_schema: pass one of them")
        options["json_schema"] = schema
    return ChatRequest(
        parse_messages(body.get("messages", ()), allow_http=allow_http, image_root=image_root),
        Options(**options),  # type: ignore[typeddict-item]
        stream=_flag("stream", body.get("stream")),
        include_usage=_flag(
            "include_usage", _object("stream_options", body.get("stream_options")).get("include_usage")
        ),
        model=model,
    )


def _flag(name: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise SettingError(f"{name} is {value!r}: it has to be true or false"[:1000])
    return bool(value)


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise SettingError(f"{name} is {value!r}: it has to be a JSON object"[:1000])
    return value or {}


def _max_tokens(body: Mapping[str, Any]) -> dict[str, Any]:
    newer, older = body.get("max_completion_tokens"), body.get("max_tokens")
    if newer is None:
        return {}
    if older is not None and older != newer:
        raise SettingError(f"max_completion_tokens is {newer!r} and max_tokens {older!r}: pass one of them"[:1000])
    return {"max_tokens": newer}


def _logprobs(body: Mapping[str, Any]) -> int | None:
    n = body.get("top_logprobs")
    if not _flag("logprobs", body.get("logprobs")):
        if n is not None:
            raise SettingError("top_logprobs are only there with logprobs=true")
        return None
    if n is not None:
        check_number("top_logprobs", n, 0, 20, whole=True)
    return int(n or 0)


def _logit_bias(biases: Any) -> Any:
    """Biases by token; names in JSON are text."""
    if not isinstance(biases, Mapping):
        return biases
    return {
        int(token) if isinstance(token, str) and token.isdecimal() and len(token) < 12 else token: bias
        for token, bias in biases.items()
    }


def _schema(response_format: Any) -> Mapping[str, Any] | None:
    """The JSON schema that an answer is to keep to, if any."""
    wanted = _object("response_format", response_format)
    kind = wanted.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return _object("the schema of response_format", wanted.get("schema")) or {"type": "object"}
    if kind == "json_schema":
        named = _object("the json_schema of response_format", wanted.get("json_schema"))
        if named.get("schema") is not None:
            return _object("the schema of response_format", named["schema"])
        raise SettingError(
            'response_format has no schema: pass {"type": "json_schema", "json_schema": {"schema": ...}}'
        )
    raise SettingError(f"response_format has the type {kind!r}: use text, json_object or json_schema"[:1000])


def parse_messages(
    messages: Sequence[Mapping[str, Any]], *, allow_http: AllowHttp = False, image_root: ImageRoot = None
) -> list[Message]:
    """Read messages in the OpenAI schema; pictures may also be paths and PIL images.

    A developer's message is a system message. The last message cannot be the assistant's: answers are not continued.

    allow_http, image_root: as in `load_image`.

    Raises PromptError for what is not in the schema, ImageError for a picture that cannot be read.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise PromptError(
            f'messages is {messages!r:.200}: it has to be a list, as in [{{"role": "user", "content": "Hello"}}]'
        )
    if not messages:
        raise PromptError("messages is empty: a conversation needs at least one")
    load = partial(load_image, allow_http=allow_http, image_root=image_root)
    result = [_message(message, load) for message in messages]
    if result[-1].role == "assistant":
        raise PromptError(
            "the last message is the assistant's, and answers are not continued: end with what is to be answered, or "
            "continue text with generate(..., raw=True)"
        )
    return result


def _message(message: Mapping[str, Any], load: _Load) -> Message:
    if not isinstance(message, Mapping):
        raise PromptError(f"a message has to be an object with role and content, not {message!r:.200}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise PromptError(f"role {role!r:.200} is not supported: use one of {', '.join(_ROLES)}")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise PromptError(f"{name} in a message are not supported: write what they say into its content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return Message(_ROLES[role], (content,))
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        raise PromptError(f"the content of a message has to be a string or a list of parts, not {content!r:.200}")
    return Message(_ROLES[role], tuple(_part(part, load) for part in content))


def _part(part: Any, load: _Load) -> str | Image.Image:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    if kind == "image_url":
        source = part.get("image_url")
        if isinstance(source, Mapping):
            source = source.get("url")
        if isinstance(source, str | os.PathLike | Image.Image):
            return load(source)
    raise PromptError(f"not a text or image_url part: {part!r}"[:200])


def completion(answer: Completion, model: str) -> dict[str, Any]:
    """The answer as a ``chat.completion`` object."""
    message = {"role": "assistant", "content": answer.text}
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _token_logprobs(answer.logprobs),
        "finish_reason": answer.finish_reason,
    }
    return {**_head("chat.completion", model), "choices": [choice], **_usage(answer)}


def chunks(answer: Stream, model: str, *, include_usage: bool = False) -> Iterator[dict[str, Any]]:
    """The answer as ``chat.completion.chunk`` objects: the role, the text, and an end with the reason.

    include_usage: whether usage and figures come after it, in a chunk without choices as in OpenAI's API; without it
        the chunk with the reason has them.
    """
    head = _head("chat.completion.chunk", model)
    if include_usage:
        head["usage"] = None
    n_given = 0

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        nonlocal n_given
        new = answer.logprobs and answer.logprobs[n_given:]
        n_given += len(new or ())
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": _token_logprobs(new or None),
            "finish_reason": finish_reason,
        }
        return {**head, "choices": [choice]}

    with answer:
        yield chunk({"role": "assistant"})
        for text in answer:
            yield chunk({"content": text})
        last = chunk({}, answer.completion.finish_reason)
        usage = _usage(answer.completion)
        if include_usage:
            yield last
            yield {**head, "choices": [], **usage}
        else:
            yield {**last, **usage}


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4()}", "object": kind, "created": int(time.time()), "model": model}


def _token_logprobs(entries: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
    if entries is None:
        return None

    def written(entry: TokenLogprob) -> dict[str, Any]:
        return {"token": entry.token, "bytes": list(entry.bytes), "logprob": entry.logprob}

    content = [{**written(entry), "top_logprobs": [written(other) for other in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def _usage(answer: Completion) -> dict[str, Any]:
    figures = answer.figures
    usage = {
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.generated_tokens,
        "total_tokens": figures.prompt_tokens + figures.generated_tokens,
    }
    return {"usage": usage, "figures": figures.as_dict()}
