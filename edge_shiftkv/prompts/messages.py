"""Conversations: as the runtime keeps them, and as the OpenAI schema writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from edge_shiftkv.errors import PromptError
from edge_shiftkv.prompts.images import load_image

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and text and RGB pictures in their order."""

    role: str
    content: tuple[str | Image.Image, ...]


def parse_messages(messages: Sequence[Mapping[str, Any]], *, allow_http: bool) -> list[Message]:
    """Read messages in the OpenAI schema; pictures may also be paths and PIL images.

    Raises PromptError for what is not in the schema, ImageError for a picture that cannot be read.
    """
    if not messages:
        raise PromptError("messages is empty: a conversation needs at least one")
    return [_message(message, allow_http) for message in messages]


def _message(message: Mapping[str, Any], allow_http: bool) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise PromptError(f"role {role!r} is not supported: use one of {', '.join(_ROLES)}")
    if isinstance(content, str):
        return Message(role, (content,))
    if not isinstance(content, Sequence):
        raise PromptError(f"the content of a message has to be a string or a list of parts, not {content!r}")
    return Message(role, tuple(_part(part, allow_http) for part in content))


def _part(part: Any, allow_http: bool) -> str | Image.Image:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    if kind == "image_url":
        source = part.get("image_url")
        if isinstance(source, Mapping):
            source = source.get("url")
        if isinstance(source, str | os.PathLike | Image.Image):
            return load_image(source, allow_http=allow_http)
    raise PromptError(f"not a text or image_url part: {part!r}"[:200])
