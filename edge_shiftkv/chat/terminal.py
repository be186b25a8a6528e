"""Where a chat takes place: a terminal with its line editor, or a pipe."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import is_done
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.utils import is_dumb_terminal

from edge_shiftkv.chat.commands import COMMANDS, Screen
from edge_shiftkv.chat.progress import ProgressBar
from edge_shiftkv.selection.methods import METHODS

_TAKE_PATHS = ("/image", "/save", "/load", "/heatmap")


class Place(Screen, Protocol):
    """Where messages come from, and what is said of them goes to."""

    def read(self, n_attached: int) -> str:
        """The next message. Raises EOFError at the end; KeyboardInterrupt, if that is not how a chat is ended here."""

    def error(self, text: str) -> None:
        """Show what was wrong."""


class Terminal:
    """A terminal: messages are edited, and have a history; answers are shown without the control characters in them."""

    def __init__(self, progress: ProgressBar) -> None:
        self._progress = progress
        # prompt_toolkit knows dumb terminals when it reads, but not before.
        output = PlainTextOutput(sys.stdout) if is_dumb_terminal() else None
        with create_app_session(output=output):
            self._session: PromptSession[str] = PromptSession(
                history=_history(),
                completer=CommandCompleter(),
                complete_while_typing=False,
                multiline=True,
                prompt_continuation=lambda _width, _line, n_wraps: "" if n_wraps else "... ",
                key_bindings=_keys(),
            )

    def read(self, n_attached: int) -> str:
        """See `Place`. Ctrl-C clears the line, and twice in a row is the end."""
        pictures = {0: "", 1: "1 picture "}.get(n_attached, f"{n_attached} pictures ")
        try:
            text = self._session.prompt(f"{pictures}> ")
        except KeyboardInterrupt:
            self.note("(Ctrl-C again or Ctrl-D ends the chat)")
            try:
                text = self._session.prompt(f"{pictures}> ")
            except KeyboardInterrupt:
                raise EOFError from None
        return _valid(text)

    def note(self, text: str) -> None:
        """See `Screen`."""
        self._progress.close()
        print(printable(text), flush=True)

    def error(self, text: str) -> None:
        """See `Place`."""
        self.note(text)

    def answer(self, pieces: Generator[str, None, None]) -> None:
        """See `Screen`."""
        try:
            _write(pieces, self._show)
        finally:
            self._progress.close()

    def _show(self, piece: str) -> str:
        self._progress.close()
        return printable(piece)


class Pipe:
    """No terminal: a line of stdin is a message, one that ends with a backslash goes on in the next; stdout has the
    answers alone, and stderr the rest."""

    def __init__(self) -> None:
        for stream in (sys.stdin, sys.stdout):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]

    def read(self, n_attached: int) -> str:
        """See `Place`."""
        lines = []
        while line := sys.stdin.readline():
            lines.append(line.rstrip("\r\n"))
            if not lines[-1].endswith("\\"):
                break
            lines[-1] = lines[-1][:-1]
        if not lines:
            raise EOFError
        return "\n".join(lines)

    def note(self, text: str) -> None:
        """See `Screen`."""
        print(text, file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """See `Place`."""
        self.note(f"edge-shiftkv chat: {text}")

    def answer(self, pieces: Generator[str, None, None]) -> None:
        """See `Screen`."""
        _write(pieces, str)


class CommandCompleter(Completer):
    """Completes commands, the paths after some of them, and the names of methods."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """See prompt_toolkit."""
        text = document.text_before_cursor
        name, space, argument = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            yield from _beginning_with(name, COMMANDS)
        elif name == "/method":
            yield from _beginning_with(argument, METHODS)
        elif name == "/budget":
            yield from _beginning_with(argument, ("all",))
        elif name in _TAKE_PATHS:
            yield from self._path(argument, event)

    def _path(self, argument: str, event: CompleteEvent) -> Iterator[Completion]:
        # Within a word, a space has a backslash before it.
        word = argument.replace("\\ ", "\0").rpartition(" ")[2].replace("\0", " ")
        for found in self._paths.get_completions(Document(word), event):
            yield Completion(found.text.replace(" ", "\\ "), found.start_position, found.display)


def _write(pieces: Generator[str, None, None], form: Callable[[str], str]) -> None:
    """Print an answer. However it ends, it is closed, and the next line is free."""
    end = ""
    with closing(pieces):
        try:
            for piece in pieces:
                print(form(piece), end="", flush=True)
                end = "\n"
            end = "\n"
        finally:
            print(end=end, flush=True)


def _beginning_with(text: str, names: Iterable[str]) -> Iterator[Completion]:
    for name in names:
        if name.startswith(text):
            yield Completion(name, -len(text))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=~is_done)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _PrivateHistory(FileHistory):
    """Messages of earlier chats, in a file that is the user's alone; what cannot be written is only lost there."""

    def store_string(self, string: str) -> None:
        """See prompt_toolkit."""
        try:
            super().store_string(_valid(string))
        except OSError:
            return


def _history() -> History:
    path = user_state_path("edge_shiftkv") / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        Path(path).chmod(0o600)
        path.read_bytes()
    except OSError:
        return InMemoryHistory()
    return _PrivateHistory(path)


def _valid(text: str) -> str:
    """Text that can be written: what was typed may have bytes that are no characters."""
    return text.encode(errors="replace").decode()


def printable(text: str) -> str:
    """Text whose characters do nothing to a terminal but line breaks and tabs."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs") else "\ufffd" for letter in text
    )
