"""What the builder raises, and how it tells of its progress."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str], None]


class BuildError(RuntimeError):
    """The wheel could not be built or installed; the message is one line for the user."""


def print_line(text: str) -> None:
    """Print at once: a build that writes to a pipe or a file should be seen to advance, too."""
    print(text, flush=True)
