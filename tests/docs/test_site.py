"""The documentation site: it builds without a warning, and shows what is there."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import howto, shell

import edge_shiftkv

ROOT = howto.ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that the site is built into."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def build(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def text(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8")))


def test_nothing_comes_from_elsewhere_when_it_is_viewed(site):
    loaded = (
        r'<(?:script|img|iframe)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*\brel="stylesheet"[^>]*//|@import|url\(http'
    )
    for page in site.rglob("*.html"):
        assert not re.search(loaded, page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\"?https?:|@import", sheet.read_text(encoding="utf-8")), sheet


def test_the_reference_has_all_that_is_public(site):
    page = (site / "reference.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'<h\d id="edge_shiftkv\.([\w.]+)"', page))
    assert {name.rpartition(".")[2] for name in shown} >= set(edge_shiftkv.__all__)
    # With its text, and not as a paragraph in which all parameters run into each other.
    assert re.search(r"<li>\s*<p><code>kv_budget</code>: KV pairs kept|<li><code>kv_budget</code>: KV pairs kept", page)


def test_the_command_line_is_what_the_program_says(site):
    page = text(site / "command-line.html")
    options = shell.options_of(shell.parse(["demo"]).parser)
    for name, known in options.items():
        assert f"usage: edge-shiftkv {name} " in page
        for option in known:
            assert option in page


def test_links_lead_to_pages_of_the_site(site):
    index = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="howto/chat.html"' in index
    assert 'href="performance.html#memory"' in index
    assert 'href="models/demo.html"' in index
    assert 'src="images/heatmap-page.png"' in index
    assert "(LICENSE)" not in index
    assert "<code>LICENSE</code>" in index
    demo = (site / "models" / "demo.html").read_text(encoding="utf-8")
    assert 'href="../quality.html"' in demo


def test_what_leads_nowhere_fails(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Page\n\n[a](nothing.md), [b](other.md#part), [c](../models/nothing.md)\n")
    (docs / "other.md").write_text("# Other\n")
    (docs / "left_out.md").write_text("# Not in the nav\n")
    settings = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[0]
    for ours in ("  - scripts/docs_site.py\n", "              - scripts/docs_docstrings.py\n"):
        assert ours in settings
        settings = settings.replace(ours, ours.replace("scripts", str(ROOT / "scripts")))
    settings = settings.replace(f"hooks:\n  - {ROOT}/scripts/docs_site.py\n", "")
    (tmp_path / "mkdocs.yml").write_text(f"{settings}\nnav:\n  - index.md\n  - other.md\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    for said in ("'nothing.md'", "'other.md#part'", "'../models/nothing.md'", "left_out.md"):
        assert said in done.stderr


def docstrings():
    spec = importlib.util.spec_from_file_location("docs_docstrings", ROOT / "scripts" / "docs_docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parameters_become_a_list():
    before = (
        "What it does: this.\n\na, b: first\n    and more.\nc: last: one.\n\nRaises X.\n\nExample::\n\n    a: int\n"
    )
    after = (
        "What it does: this.\n\n\n- `a`, `b`: first\n    and more.\n- `c`: last: one.\n\n"
        "Raises X.\n\nExample:\n\n    a: int"
    )
    assert docstrings().markdown(before) == after
    paragraph = "It takes\nnothing: at all.\n"
    assert docstrings().markdown(paragraph) == paragraph.strip()
