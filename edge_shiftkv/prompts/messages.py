"""Conversations: as the runtime keeps them, and as the OpenAI schema writes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from edge_shiftkv.errors import PromptError
from edge_shiftkv.prompts.images import AllowHttp, ImageSource, load_image

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and text and RGB pictures in their order."""

    role: str
    content: tuple[str | Image.Image, ...]


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
