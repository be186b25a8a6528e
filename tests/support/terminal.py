"""A program in a terminal, which is a real one to it: it has a keyboard, a size, and a screen that can be read."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pexpect
import pyte

ROWS, COLUMNS = 160, 160
_PROMPT = re.compile(r"(\d pictures? )?>( |$)")


class Terminal:
    """Runs ``edge-shiftkv`` in a terminal of ROWS x COLUMNS.

    shown: all bytes that it wrote.
    """

    def __init__(self, arguments: Sequence[object], state: Path, term: str = "xterm", cwd: Path | None = None) -> None:
        environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": term}
        self._child = pexpect.spawn(
            *(sys.executable, ["-m", "edge_shiftkv", *map(str, arguments)]),
            env=environment,
            dimensions=(ROWS, COLUMNS),
            cwd=cwd,
        )
        self._child.delaybeforesend = None
        self._screen = pyte.Screen(COLUMNS, ROWS)
        # Programs ask terminals where the cursor is.
        self._screen.write_process_input = lambda answer: self._child.send(answer)
        self._stream = pyte.ByteStream(self._screen)
        self._n_prompts = 0
        self._lines: list[str] | None = None
        self.shown = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close(force=True)

    @property
    def lines(self) -> list[str]:
        """What is on the screen, without the empty lines at its end."""
        if self._lines is None:
            self._lines = "\n".join(line.rstrip() for line in self._screen.display).rstrip().split("\n")
        return self._lines

    def press(self, keys: str | bytes) -> None:
        """Press keys."""
        self._child.send(keys)

    def wait(self, pattern: str, seconds: float = 60) -> None:
        """Wait for text on the screen."""
        self._until(lambda: re.search(pattern, "\n".join(self.lines)), pattern, seconds)

    def prompt(self) -> None:
        """Wait for the prompt."""
        self._until(lambda: len(self._prompts()) > self._n_prompts and self._at_prompt(), "the next prompt", 60)
        self._n_prompts = len(self._prompts())

    def enter(self, line: str) -> list[str]:
        """Type a line, and return the lines that were shown until the next prompt."""
        self.press(f"{line}\r")
        self.prompt()
        *_, before, after = self._prompts()
        return self.lines[before + 1 : after]

    def end(self) -> int:
        """Wait for the end, and return the exit status."""
        self._until(lambda: False, "the end", 60, ends=True)
        self._child.wait()
        return self._child.exitstatus

    def _prompts(self) -> list[int]:
        return [i for i, line in enumerate(self.lines) if _PROMPT.match(line)]

    def _at_prompt(self) -> bool:
        last = self.lines[-1]
        return bool(_PROMPT.fullmatch(last)) and self._screen.cursor.y == len(self.lines) - 1

    def _until(self, there, what: str, seconds: float, *, ends: bool = False) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            try:
                data = self._child.read_nonblocking(65536, timeout=max(0, deadline - time.monotonic()))
            except pexpect.EOF:
                if ends:
                    return
                raise AssertionError(f"ended before {what!r}:\n" + "\n".join(self.lines)) from None
            except pexpect.TIMEOUT:
                raise AssertionError(f"no {what!r}:\n" + "\n".join(self.lines)) from None
            self.shown += data
            self._stream.feed(data)
            self._lines = None
