"""A hook of MkDocs: pages that are not in docs/, and links between all of them.

README, changelog and the models' READMEs are pages of the site, too, and so is what ``edge-shiftkv ... --help`` prints.
Links in pages are as they are in the repository. What they lead to outside of the site is named instead.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "models/demo/README.md": "models/demo.md",
    "models/page-reader/README.md": "models/page-reader.md",
}
"""Files of the repository that are pages of the site beside those in docs/, and where."""

_LINK = re.compile(r"(?P<text>\[[^][]*\])\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")
_WIDTH = 100


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "command-line.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have the links of a page lead to pages of the site."""
    place = page.file.src_uri
    source = {page: source for source, page in PAGES.items()}.get(place, f"docs/{place}")
    return _LINK.sub(lambda link: _led(link, source, place), markdown)


def _led(link: re.Match[str], source: str, place: str) -> str:
    target = link["target"]
    if re.match(r"[a-z]+:", target):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (ROOT / path).exists():
        return link[0]  # MkDocs says so
    inside = PAGES.get(path, path.removeprefix("docs/"))
    if path not in PAGES and not path.startswith("docs/"):
        return f"{link['text'][1:-1]} (`{path}`)" if link["text"] != f"[{path}]" else f"`{path}`"
    relative = posixpath.relpath(inside, posixpath.dirname(place) or ".")
    return f"{link['text']}({relative}{link['anchor'] or ''})"


def command_line() -> str:
    """The page of the command line: what each command says of itself."""
    names = re.findall(r"^    (\w+) ", _help(), re.MULTILINE)
    parts = [f"## {name}\n\n```text\n{_help(name)}```\n" for name in names]
    return "# Command line\n\n" + "\n".join(parts)


def _help(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": str(_WIDTH), "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "edge_shiftkv", *command, "--help"]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment, cwd=ROOT).stdout
