"""The OpenAI chat schema: messages are read from it, answers are written in it.

Answers are as llama-cpp-python gives them, with the figures next to "usage".
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from edge_shiftkv.errors import PromptError
from edge_shiftkv.prompts.images import AllowHttp, ImageSource, load_image
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.results import Completion
from edge_shiftkv.stream import Stream

_ROLES = ("system", "user", "assistant")

_Load = Callable[[ImageSource], Image.Image]


def parse_messages(
    messages: Sequence[Mapping[str, Any]], *, allow_http: AllowHttp = False, image_root: Path | None = None
) -> list[Message]:
    """Read messages in the OpenAI schema; pictures may also be paths and PIL images.

    allow_http, image_root: as in `load_image`.

    Raises PromptError for what is not in the schema, ImageError for a picture that cannot be read.
    """
    if not messages:
        raise PromptError("messages is empty: a conversation needs at least one")
    load = partial(load_image, allow_http=allow_http, image_root=image_root)
    return [_message(message, load) for message in messages]


def _message(message: Mapping[str, Any], load: _Load) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise PromptError(f"role {role!r} is not supported: use one of {', '.join(_ROLES)}")
    if isinstance(content, str):
        return Message(role, (content,))
    if not isinstance(content, Sequence):
        raise PromptError(f"the content of a message has to be a string or a list of parts, not {content!r}")
    return Message(role, tuple(_part(part, load) for part in content))


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
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    return {**_head("chat.completion", model), "choices": [choice], **_usage(answer)}


def chunks(answer: Stream, model: str) -> Iterator[dict[str, Any]]:
    """The answer as ``chat.completion.chunk`` objects: the role, the text, and an end with reason and figures."""
    head = _head("chat.completion.chunk", model)

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "choices": [choice]}

    with answer:
        yield chunk({"role": "assistant"})
        for text in answer:
            yield chunk({"content": text})
        yield {**chunk({}, answer.completion.finish_reason), **_usage(answer.completion)}


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4()}", "object": kind, "created": int(time.time()), "model": model}


def _usage(answer: Completion) -> dict[str, Any]:
    figures = answer.figures
    usage = {
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.generated_tokens,
        "total_tokens": figures.prompt_tokens + figures.generated_tokens,
    }
    return {"usage": usage, "figures": figures.as_dict()}
