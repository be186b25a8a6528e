"""Conversations, as the runtime keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and text and RGB pictures in their order.

    fields: what else templates may read of it, such as ``tool_calls``: JSON values.
    """

    role: str
    content: tuple[str | Image.Image, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
