"""Conversations, as the runtime keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and text and RGB pictures in their order."""

    role: str
    content: tuple[str | Image.Image, ...]
