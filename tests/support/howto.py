"""The examples of documentation pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OUTPUT = "# > "  # as ruff writes it


def program(page: Path) -> str:
    """The Python code of a page, block after block: one program.

    A block that begins indented goes on inside the one before. Blocks with more than "python" behind their fence, such
    as "```python server", are left to tests of their own.
    """
    return "\n".join(_BLOCK.findall(page.read_text()))


def promised(code: str) -> list[str]:
    """The lines that a program says it prints: in comments that begin with ``# > ``."""
    return [line.strip().removeprefix(_OUTPUT) for line in code.splitlines() if line.strip().startswith(_OUTPUT)]


def run(code: str, folder: Path) -> str:
    """What a program prints in a folder of its own, where the checkout's `models` are.

    Raises AssertionError when it fails.
    """
    (folder / "models").symlink_to(ROOT / "models", target_is_directory=True)
    script = folder / "page.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, script.name], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
