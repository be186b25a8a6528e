"""Requests as they come, made ready before it is their turn."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from edge_shiftkv.chat_schema import ChatRequest
from edge_shiftkv.errors import PromptError, SettingError, ShiftKVError
from edge_shiftkv.native.calls import Interrupt
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.images import ImageSource
from edge_shiftkv.request import Options, Request
from edge_shiftkv.sampling import MAX_SEED

_AHEAD = 4  # rows whose pictures are held before they are asked about
_POLL_S = 0.05
_CONTENT = ("prompt", "images", "raw")
_NULL_SAYS = ("max_tokens", "kv_budget")  # options in which null does not stand for the default
_BINDING = ("grammar", "json_schema")  # of which there can be one


@dataclass(frozen=True)
class Row:
    """A request as it was given, and its place among the others, from 0."""

    index: int
    given: Any


@dataclass(frozen=True)
class Ready:
    """A request that was checked, with its pictures loaded."""

    conversation: Conversation
    request: Request


def read_row(
    given: Any,
    asked: Callable[[str, Sequence[ImageSource], bool], Conversation],
    body: Callable[[Mapping[str, Any]], ChatRequest],
) -> tuple[Conversation, Options]:
    """What a request asks, its pictures loaded, and its own options.

    given: the request, if nothing is wrong with it: it may come from a file.
    asked: makes a conversation of prompt, images and raw.
    body: reads one with messages.

    Raises ShiftKVError, whatever is wrong.
    """
    if not isinstance(given, Mapping):
        raise PromptError(f"a request has to be a mapping with a prompt or with messages, not {given!r}"[:200])
    content = {name: given[name] for name in _CONTENT if name in given}
    if "messages" in given:
        if content:
            raise PromptError("a request with messages has its text and its pictures in them")
        chat = body(given)
        if chat.stream:
            raise SettingError("stream is true: of many requests, answers come whole")
        options: Any = {name: value for name, value in chat.options.items() if name in given or value is not None}
        return Conversation(chat.messages), options
    options = {name: value for name, value in given.items() if name not in _CONTENT}
    return asked(content.get("prompt", ""), content.get("images") or (), bool(content.get("raw"))), options


def filled_in(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request from a file, so that it goes before the options of all where it says something."""
    body = {name: value for name, value in body.items() if value is not None or name in _NULL_SAYS}
    if any(name in body for name in (*_BINDING, "response_format")):
        body = {**dict.fromkeys(_BINDING), **body}
    return body


def row_seed(seed: int, name: str) -> int:
    """The seed of one of many rows, which follows from the seed of all and from what names it."""
    drawn = hashlib.sha256(f"{seed} {name}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(drawn[:4], "big") % MAX_SEED


class Rows:
    """The rows of an iterator in their order. A few are taken from it ahead, and made ready in a thread.

    The iterator itself is only called where `more` is.

    error: what the iterator raised, which ends the rows.
    """

    def __init__(self, given: Iterator[Any], make_ready: Callable[[Any], Ready], interrupt: Interrupt) -> None:
        self.error: Exception | None = None
        self._make_ready = make_ready
        self._given = given
        self._interrupt = interrupt
        self._ahead: deque[tuple[Row, Future[Ready]]] = deque()
        self._n_taken = 0
        self._is_over = self._is_finished = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edge_shiftkv-rows")

    def more(self) -> bool:
        """Whether there is another row."""
        while not self._is_over and not self._is_finished and len(self._ahead) < _AHEAD:
            try:
                row = Row(self._n_taken, next(self._given))
            except StopIteration:
                self._is_over = True
            except Exception as error:  # what came before it is answered
                self._is_over, self.error = True, error
            else:
                self._n_taken += 1
                self._ahead.append((row, self._thread.submit(self.ready, row.given)))
        return bool(self._ahead) and not self._is_finished

    def take(self) -> tuple[Row, Callable[[], Ready]]:
        """The next row, and what gives it made ready, or raises what is wrong with it. Raises CancelledError."""
        row, future = self._ahead.popleft()
        while not wait([future], _POLL_S).done:
            self._interrupt.check()
        return row, future.result

    def ready(self, given: Any) -> Ready:
        """A request made ready. Raises ShiftKVError, whatever is wrong with it."""
        try:
            return self._make_ready(given)
        except ShiftKVError:
            raise
        except TypeError as error:
            raise SettingError(str(error)) from error
        except Exception as error:  # it may come from a file, and have anything in it
            raise PromptError(f"the request cannot be used: {error}") from error

    def finish(self) -> None:
        """Have no more rows; from any thread."""
        self._is_finished = True

    def close(self) -> None:
        """End the thread, which may still be at a picture."""
        self._thread.shutdown(wait=False, cancel_futures=True)
