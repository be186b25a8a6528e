"""How far a model is loaded, or a prompt read."""

from __future__ import annotations

import sys

from tqdm import tqdm

_TEXTS = {
    "model": "loading the model",
    "mmproj": "loading the vision encoder",
    "draft": "loading the draft",
    "prompt": "reading",
}


class ProgressBar:
    """A line on stderr, where that is a terminal, which is gone when all is done: see `Runtime`'s `progress`."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._is_of: tuple[str, int] | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how much is done."""
        if self._bar is None or self._is_of != (what, total) or done < self._bar.n:
            self.close()
            if done < total:
                self._begin(what, total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done >= total:
                self.close()

    def close(self) -> None:
        """Take the line away."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def _begin(self, what: str, total: int) -> None:
        is_bytes = what != "prompt"
        self._is_of = what, total
        self._bar = tqdm(
            desc=_TEXTS[what],
            total=total,
            unit="B" if is_bytes else " tokens",
            unit_scale=is_bytes,
            unit_divisor=1024,
            bar_format="{desc}: {n_fmt} of {total_fmt}{unit}, {remaining} left",
            leave=False,
            disable=None,  # where stderr is no terminal
            file=sys.stderr,
        )
