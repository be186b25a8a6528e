"""Files that are whole whenever the process that writes them ends."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, or leave what is there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
