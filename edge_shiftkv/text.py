"""From sampled tokens to text as it can be shown."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Joins the bytes of tokens into text, holding back what later tokens may still change.

    A character split over tokens comes out whole, and text that may turn out to be the beginning of a stop string does
    not come out until it is known not to be. Stop strings are found across tokens and are not part of the text.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """Take the bytes of the next token; return the text that is final now. Sets `stopped` at a stop string."""
        self._held += self._decoder.decode(piece)
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        cut = len(self._held) - self._undecided()
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def finish(self) -> str:
        """Return what was held back, but for bytes that never became a character."""
        text, self._held = self._held, ""
        return text

    def _undecided(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if self._stop_begins_with(self._held[-n:]):
                return n
        return 0

    def _stop_begins_with(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)
