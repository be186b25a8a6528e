"""How the server behaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_shiftkv.request import Options

# Options of a request, and the defaults that they stand for.
_REPLACES = {
    "max_completion_tokens": ("max_tokens",),
    "response_format": ("grammar", "json_schema"),
    "grammar": ("json_schema",),
    "json_schema": ("grammar",),
}


@dataclass(frozen=True)
class Settings:
    """How the server behaves.

    model: the model's name in answers, unless the request has one; any name is taken.
    defaults: how answers are written where a request does not say.
    time_limit: the most seconds that an answer may take, not counting the wait for its turn; None sets no limit.
    max_body: bytes of a request's body.
    api_keys: one of them has to come as ``Authorization: Bearer``; none, and nothing has to.
    cors: the origins of web pages that may ask; "*" for any.
    loopback: whether the server is to be reached from this machine only. Then it answers to names of this machine
        only: a web page whose own name leads here (DNS rebinding) is turned away.
    sessions: how many may be open; the one that was not used for longest makes way for another.
    session_idle: seconds after which a session is closed that nobody asks.
    example: a picture that the page offers to try the model with.
    """

    model: str
    defaults: Options
    time_limit: float | None = None
    max_body: int = 32 << 20
    api_keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    loopback: bool = True
    sessions: int = 4
    session_idle: float = 900.0
    example: Path | None = None

    def completed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What a request asks for, with the defaults of what it does not say."""
        # null asks for the default, but for a budget, which has it keep everything.
        given = {name: value for name, value in body.items() if value is not None or name == "kv_budget"}
        replaced = {name for new, old in _REPLACES.items() if new in given for name in old}
        options: dict[str, Any] = {name: value for name, value in self.defaults.items() if name not in replaced}
        options |= {"model": self.model, **given}
        options["time_limit"] = self.limited(given.get("time_limit"))
        return options

    def limited(self, asked: Any) -> Any:
        """The time limit of a request that asks for one, or for none: never more than the server's."""
        limit = self.time_limit
        if limit is not None and (asked is None or (isinstance(asked, int | float) and not asked < limit)):
            return limit
        return asked
