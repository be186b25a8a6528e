"""The text bridge: from the tokens of one model to those of another, through the bytes both stand for."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cached_property

from edge_shiftkv.native.llama import Model

_TAIL_TOKENS, _TAIL_BYTES = 24, 64
_WORDS = 2  # of the text before, which decide how the text after is split into tokens
_ANCHORS = ("\n", "a", ".", "0")


class Bridge:
    """Carries text from the tokens of `source` to those of `destination`.

    Source: TokenTiming (ACL 2026, 2026.acl-long.1983), its second step, which re-encodes the draft's text; here as a
    continuation of what the other model holds.
    """

    def __init__(self, source: Model, destination: Model) -> None:
        self._source = source
        self._destination = destination

    def continue_(self, held: Sequence[int], text: bytes) -> list[int]:
        """Tokens of the destination that continue its own tokens `held` with `text`.

        The pieces of the result together are the text, or its beginning: an incomplete character at its end is left
        out, as is everything from bytes on that the vocabulary has no tokens for.
        """
        before = self._tail(held)
        open_bytes = _incomplete(before)
        text = _whole(text, open_bytes)
        if not text:
            return []
        tokens = self._after(before, text)
        if tokens is not None:
            return tokens
        # A token of the whole text would reach across the seam.
        if not open_bytes:
            return self._alone(text)
        n_rest = _length(open_bytes[0]) - len(open_bytes)
        if not self._byte_tokens.keys() >= set(text[:n_rest]):
            return []
        rest = [self._byte_tokens[byte] for byte in text[:n_rest]]
        return [*rest, *self.continue_([*held, *rest], text[n_rest:])]

    def proxies(self, held: Sequence[int], drafted: Sequence[int], overlap: int = 0) -> list[int]:
        """Tokens of the destination for `drafted` ones of the source, to continue `held`.

        An end token becomes the destination's end token of the same role, and is the last; at any other control token
        the result ends. overlap: bytes at the end of `held`, the beginning of a character, with which the drafted
        text begins again; where it does not, nothing is returned.
        """
        text = b""
        end = None
        for token in drafted:
            if self._source.ends_generation(token):
                end = token
                break
            piece = self._source.piece(token)
            if not piece:
                break
            text += piece
        if overlap and text[:overlap] != self._tail(held)[-overlap:]:
            return []
        text = text[overlap:]
        tokens = self.continue_(held, text)
        if end is None or sum(len(self._destination.piece(token)) for token in tokens) < len(text):
            return tokens
        last = self._end_of(end)
        return tokens if last is None else [*tokens, last]

    def _end_of(self, token: int) -> int | None:
        """The destination's end token for one of the source: of a text, or else of a turn."""
        of_turn, of_text = self._destination.eot, self._destination.eos
        ends_text = token == self._source.eos != self._source.eot is not None
        first, second = (of_text, of_turn) if ends_text else (of_turn, of_text)
        return second if first is None else first

    @cached_property
    def _byte_tokens(self) -> dict[int, int]:
        """Byte -> the destination's token that stands for it alone, where it has one."""
        n_vocab = self._destination.n_vocab
        pieces = ((self._destination.piece(token), token) for token in range(n_vocab))
        return {piece[0]: token for piece, token in pieces if len(piece) == 1}

    @cached_property
    def _has_prefix(self) -> bool:
        """Whether the destination's tokenizer puts a space before a text."""
        return self._pieces(self._destination.tokenize("a")) == b" a"

    def _tail(self, held: Sequence[int]) -> bytes:
        """The last words of what is held, back to the last control token at most."""
        pieces: list[bytes] = []
        n_words = n_bytes = 0
        for token in reversed(held[-_TAIL_TOKENS:]):
            piece = self._destination.piece(token)
            if not piece:
                break
            pieces.append(piece)
            n_bytes += len(piece)
            n_words += piece[:1].isspace()
            if n_words == _WORDS or n_bytes >= _TAIL_BYTES:
                break
        tail = b"".join(reversed(pieces))
        start = 0
        while start < len(tail) and 0x80 <= tail[start] < 0xC0:  # the end of a character
            start += 1
        return tail[start:]

    def _after(self, before: bytes, text: bytes) -> list[int] | None:
        """The tokens of `text` behind `before`, if they are apart; None if a token holds the end of one and the
        beginning of the other."""
        try:
            whole = (before + text).decode()
        except UnicodeDecodeError:
            return None
        if not before:
            return self._alone(text)
        n_before = len(before)
        if self._has_prefix:
            if whole.startswith(" "):
                whole = whole[1:]  # it comes back as the prefix
            else:
                n_before += 1
        return self._split(self._destination.tokenize(whole), n_before, text)

    def _alone(self, text: bytes) -> list[int]:
        """The tokens of `text` with nothing before it."""
        whole = text.decode()
        if not self._has_prefix:
            return self._split(self._destination.tokenize(whole), 0, text) or []
        if whole.startswith(" ") and whole[1:2] not in ("", " "):
            return self._split(self._destination.tokenize(whole[1:]), 0, text) or []
        for anchor in _ANCHORS:
            tokens = self._split(self._destination.tokenize(anchor + whole), 1 + len(anchor), text)
            if tokens is not None:
                return tokens
        return []

    def _split(self, tokens: Sequence[int], n_before: int, text: bytes) -> list[int] | None:
        """The tokens from byte `n_before` on that stand for `text` or its beginning; None if one goes across."""
        i = n_bytes = 0
        while n_bytes < n_before and i < len(tokens):
            n_bytes += len(self._destination.piece(tokens[i]))
            i += 1
        if n_bytes != n_before:
            return None
        result: list[int] = []
        start = 0
        for token in tokens[i:]:
            piece = self._destination.piece(token)
            if not piece or not text.startswith(piece, start):
                break
            result.append(token)
            start += len(piece)
        # Tokens of single bytes may have ended inside a character.
        while result and _incomplete(text[:start]):
            start -= len(self._destination.piece(result.pop()))
        return result

    def _pieces(self, tokens: Sequence[int]) -> bytes:
        return b"".join(map(self._destination.piece, tokens))


def _length(first: int) -> int:
    """The bytes of a character that begins with `first`, in UTF-8."""
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _incomplete(text: bytes) -> bytes:
    """The beginning of a character at the end of a text, if it has not all its bytes."""
    for n in range(1, min(3, len(text)) + 1):
        byte = text[-n]
        if byte >= 0xC0:
            return text[-n:] if _length(byte) > n else b""
        if byte < 0x80:
            break
    return b""


def _whole(text: bytes, before: bytes = b"") -> bytes:
    """The text up to its first incomplete or invalid character; `before` is the beginning of its first one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(before + text)
        pending = decoder.getstate()[0]
        return text[: len(text) - len(pending)] if len(pending) <= len(text) else b""
    except UnicodeDecodeError as error:
        return text[: max(0, error.start - len(before))]
