"""Control tokens: what only a template may write, and text that people wrote, kept apart from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from edge_shiftkv.errors import PromptError
from edge_shiftkv.native.llama import ATTR_LSTRIP, ATTR_RSTRIP, ATTR_UNKNOWN, ATTR_USER_DEFINED, Model
from edge_shiftkv.native.mtmd import Text

_SPACE = " \t\n\v\f\r"  # isspace(), which llama.cpp strips around some tokens
_ANCHORS = ("\n", "\ue000", "a")


class ControlTokens:
    """The names of a model's control tokens: found where a template wrote them, kept text where a person did.

    tokens: name -> (token, its attributes), as in `Model.control_tokens`.
    """

    def __init__(self, tokens: Mapping[str, tuple[int, int]]) -> None:
        self._tokens = tokens
        self._names = _Names(tokens)
        # llama.cpp finds these in all text, and ignores the others where it is told to.
        self._found_anywhere = _Names(name for name, (_, kind) in tokens.items() if kind & ATTR_USER_DEFINED)
        # Characters that a vocabulary does not know are no control tokens.
        self._ids = frozenset(token for token, kind in tokens.values() if not kind & ATTR_UNKNOWN)

    def break_up(self, text: str, mark: str) -> str:
        """Put `mark` where text becomes a name, whatever a template puts around it: after its first characters.

        mark: a random string that no one could have typed.
        """
        body = text.strip()  # what templates strip is still there to be stripped
        if not body:
            return text
        at = text.index(body)
        broken = self._names.first_letters.sub(rf"\g<0>{mark}", body)
        return _Typed(
            f"{text[:at]}{mark}{broken}{text[at + len(body) :]}", text, lambda part: self.break_up(part, mark)
        )

    def split(self, text: str, mark: str) -> list[Text]:
        """Split at the names that are whole, and remove the marks."""
        parts: list[Text] = []
        strip_next = False

        def add_plain(piece: str) -> None:
            plain = piece.replace(mark, "")
            parts.append(Text(plain.lstrip(_SPACE) if strip_next else plain))

        end = 0
        for start, name in self._names.find(text):
            if start < end:
                continue
            if start > end:
                add_plain(text[end:start])
            _, attributes = self._tokens[name]
            if attributes & ATTR_LSTRIP and parts and not parts[-1].special:
                parts[-1] = Text(parts[-1].text.rstrip(_SPACE))
            parts.append(Text(name, special=True))
            strip_next = bool(attributes & ATTR_RSTRIP)
            end = start + len(name)
        add_plain(text[end:])
        return [part for part in parts if part.text]

    def tokenize(self, part: Text, model: Model) -> list[int]:
        """The tokens of a part of a prompt: the control token of that name, or those of text with none among them.

        Raises PromptError when it cannot be tokenized.
        """
        if part.special:
            return [self._tokens[part.text][0]]
        text = part.text
        cuts = [0, *(start + 1 for start, _ in self._found_anywhere.find(text)), len(text)]
        tokens: list[int] = []
        for start, stop in pairwise(cuts):
            tokens += self._plain(text[start:stop], model, after_text=start > 0)
        return tokens

    def _plain(self, text: str, model: Model, *, after_text: bool) -> list[int]:
        tokens = _continued(text, model) if after_text else model.tokenize(text)
        if len(text) < 2 or self._ids.isdisjoint(tokens):
            return tokens
        # Merges led to one, as from a space that stands for a letter of its name.
        return [
            token for i, one in enumerate(text) for token in self._plain(one, model, after_text=after_text or i > 0)
        ]


class _Names:
    """Strings to look for in texts."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name for name in names if len(name) > 1}  # a shorter one cannot be broken up
        self._lengths = sorted({len(name) for name in self._names}, reverse=True)
        letters = re.escape("".join(sorted({name[0] for name in self._names})))
        self._first = re.compile(f"[{letters}]" if letters else "(?!)")
        self.first_letters = re.compile(self._first.pattern, re.IGNORECASE)  # as templates may change the case

    def find(self, text: str) -> Iterable[tuple[int, str]]:
        """Where names begin, and the longest that begins there; they may overlap."""
        for match in self._first.finditer(text):
            start = match.start()
            for length in self._lengths:
                if text[start : start + length] in self._names:
                    yield start, text[start : start + length]
                    break


def _continued(text: str, model: Model) -> list[int]:
    """The tokens of text that goes on: without the space that some tokenizers put before a text."""
    for anchor in _ANCHORS:
        before, whole = model.tokenize(anchor), model.tokenize(anchor + text)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    raise PromptError(f"the text could not be tokenized ({len(text)} characters)")


def _on_plain_text(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(self: _Typed, *arguments: Any, **options: Any) -> Any:
        return self._like(method(self._plain, *arguments, **options))

    return call


class _Typed(str):
    """Text with marks in it, which is searched and taken apart as if it had none: templates look for names in it.

    What is taken out of it is marked as well.
    """

    __slots__ = ("_break_up", "_plain")

    _break_up: Callable[[str], str]
    _plain: str

    def __new__(cls, marked: str, plain: str, break_up: Callable[[str], str]) -> _Typed:
        """Text with its marks, without, and what marks text."""
        self = super().__new__(cls, marked)
        self._plain = plain
        self._break_up = break_up
        return self

    def _like(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._break_up(value)
        if isinstance(value, list | tuple):
            return type(value)(map(self._like, value))
        return value

    for _name in (
        *("__contains__", "__getitem__", "__len__", "startswith", "endswith", "find", "rfind", "index", "count"),
        *("split", "rsplit", "splitlines", "partition", "rpartition", "strip", "lstrip", "rstrip"),
        *("removeprefix", "removesuffix", "replace", "lower", "upper", "title", "capitalize"),
    ):
        locals()[_name] = _on_plain_text(_name)
