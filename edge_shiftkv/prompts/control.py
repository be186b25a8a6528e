"""Control tokens: what only a template may write, and text that people wrote, kept apart from it."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, pairwise
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
        return MarkedText(f"{text[:at]}{mark}{broken}{text[at + len(body) :]}", mark)

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


def _of_plain_text(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(self: MarkedText, *arguments: Any) -> Any:
        return method(self._plain, *arguments)

    call.__name__ = name
    return call


def _of_marked_text(name: str) -> Callable[..., MarkedText]:
    method = getattr(str, name)

    def call(self: MarkedText) -> MarkedText:
        return MarkedText(method(self), self._mark)

    call.__name__ = name
    return call


class MarkedText(str):
    """Text with marks in it, which is searched and taken apart as if it had none: templates look for names in it.

    What is taken out of it keeps the marks, and has one at its beginning.
    """

    __slots__ = ("_mark", "_places", "_plain")

    _mark: str
    _plain: str
    _places: list[int]
    """Where the marks are in the plain text, in order."""

    def __new__(cls, text: str, mark: str) -> MarkedText:
        """The text with its marks."""
        self = super().__new__(cls, text)
        pieces = str.split(text, mark)
        self._mark = mark
        self._plain = "".join(pieces)
        self._places = list(accumulate(map(len, pieces[:-1])))
        return self

    def _part(self, start: int, stop: int) -> str:
        plain = self._plain[start:stop]
        if not plain.strip():
            return plain
        # Also those at its ends: behind the first letter of what may become a name, and before a text.
        places = self._places[bisect_left(self._places, start) : bisect_right(self._places, stop)]
        cuts = [start, *dict.fromkeys([start, *places]), stop]
        return MarkedText(self._mark.join(self._plain[i:j] for i, j in pairwise(cuts)), self._mark)

    def _parts(self, pieces: Iterable[str], between: int) -> list[str]:
        """What the plain text's pieces are with marks, of which each comes `between` characters after the other."""
        parts, start = [], 0
        for piece in pieces:
            parts.append(self._part(start, start + len(piece)))
            start += len(piece) + between
        return parts

    def __eq__(self, other: object) -> bool:
        return self._plain == (other._plain if isinstance(other, MarkedText) else other)

    def __ne__(self, other: object) -> bool:  # which str has of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self._plain)

    def __getitem__(self, key: Any) -> str:
        characters = range(len(self._plain))[key]
        if isinstance(characters, int):
            return self._part(characters, characters + 1)
        if characters.step == 1:
            return self._part(characters.start, max(characters.start, characters.stop))
        return MarkedText("".join(self._part(i, i + 1) for i in characters), self._mark)

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        if sep is not None:
            return self._parts(self._plain.split(sep, maxsplit), len(sep))
        parts, start = [], 0
        for piece in self._plain.split(None, maxsplit):
            start = self._plain.index(piece, start)
            parts.append(self._part(start, start + len(piece)))
            start += len(piece)
        return parts

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> list[str]:
        return self.split() if sep is None else self._parts(self._plain.rsplit(sep, maxsplit), len(sep))

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._parts(self._plain.splitlines(keepends=True), 0)
        return lines if keepends else [line.rstrip("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029") for line in lines]

    def partition(self, sep: str) -> tuple[str, str, str]:
        before, between, after = self._parts(self._plain.partition(sep), 0)
        return before, between, after

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        before, between, after = self._parts(self._plain.rpartition(sep), 0)
        return before, between, after

    def lstrip(self, chars: str | None = None) -> str:
        return self._part(len(self._plain) - len(self._plain.lstrip(chars)), len(self._plain))

    def rstrip(self, chars: str | None = None) -> str:
        return self._part(0, len(self._plain.rstrip(chars)))

    def strip(self, chars: str | None = None) -> str:
        start = len(self._plain) - len(self._plain.lstrip(chars))
        return self._part(start, max(start, len(self._plain.rstrip(chars))))

    def removeprefix(self, prefix: str) -> str:
        return self._part(len(prefix), len(self._plain)) if self._plain.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> str:
        return self._part(0, len(self._plain) - len(suffix)) if suffix and self._plain.endswith(suffix) else self

    def replace(self, old: str, new: str, count: Any = -1) -> str:
        pieces = self._plain.split(old, count) if old else ["", *self._plain, ""]
        return MarkedText(str.join(new, self._parts(pieces, len(old))), self._mark)

    for _name in ("__contains__", "__len__", "startswith", "endswith", "find", "rfind", "index", "rindex", "count"):
        locals()[_name] = _of_plain_text(_name)
    for _name in ("lower", "upper", "title", "capitalize", "casefold", "swapcase"):
        locals()[_name] = _of_marked_text(_name)
