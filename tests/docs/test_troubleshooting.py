"""The messages that docs/troubleshooting.md explains are those of the source."""

from __future__ import annotations

import ast
import functools
import re

import pytest
from support import howto

PAGE = howto.ROOT / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"^### `(.*)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
_HOLE = "\0"


@functools.cache
def templates() -> list[str]:
    """The texts of the source, with a hole where something is filled in."""
    found = []
    for path in sorted((howto.ROOT / "edge_shiftkv").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else _HOLE for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_in_the_source(message: str) -> bool:
    """Whether a text of the source has the parts of a message, in their order."""
    parts = [part for part in (part.strip(" :") for part in message.split("…")) if part]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(template) for template in templates())


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_source(message):
    assert is_in_the_source(message)


def test_there_are_enough_and_none_is_there_twice():
    assert len(MESSAGES) == len(set(MESSAGES)) >= 20


def test_other_messages_are_not():
    assert not is_in_the_source("the prompt is far too long")
    assert not is_in_the_source("leaves no room for an answer: … the prompt has")
