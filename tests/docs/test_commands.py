"""Every command that README and docs/ show is taken by its program, and runs where it is about the shipped model."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import howto, shell

ROOT = howto.ROOT
README = ROOT / "README.md"
HOWTO = [README, *sorted((ROOT / "docs" / "howto").glob("*.md"))]
PAGES = [*HOWTO, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").glob("*/README.md"))]

# What stands behind fences: what runs as Python, or is shown to tests of its own, and what people type.
KINDS = {"python", "python server", "python cluster", "sh", "sh session", "json", "text"}

# Programs of others; with the options of them that pages name beside blocks of code.
OTHERS = {
    ".",
    "cat",
    "cd",
    "cp",
    "curl",
    "docker",
    "find",
    "git",
    "mkdir",
    "patch",
    "pip",
    "pipx",
    "printf",
    "ray",
    "sed",
    "tar",
    "mkdocs",
    "ruff",
}
OTHER_OPTIONS = {"--build-arg", "--force-reinstall", "--strict", "--install"}
MODULES = {"pytest", "mypy", "venv", "build"}

# One thread, which is quickest for a model as small.
SHIM = f"""#!{sys.executable}
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
from edge_shiftkv.cli import main
if __name__ == "__main__":  # processes that are spawned read this, too
    sys.exit(main())
"""

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def typed(page: Path) -> Iterator[str]:
    """The statements that a page has people type."""
    for kind, text in shell.fences(page):
        if kind == "sh" or (not kind and text.startswith(("python ", "edge-shiftkv "))):
            yield from shell.statements(text)


@by_page
def test_commands_are_taken_by_their_programs(page):
    for statement in typed(page):
        for command in shell.commands(statement):
            check(command)


def check(command: list[str]) -> None:
    """Raise unless its program takes a command."""
    program, *arguments = command
    name = Path(program).name or program
    try:
        if name == "edge-shiftkv":
            shell.parse(arguments)
        elif name in ("python", "python3"):
            check_python(arguments)
        elif name == "pip":
            check_extras(arguments)
        else:
            assert name in OTHERS, f"{name} is not known here"
    except SystemExit as error:
        raise AssertionError(f"{' '.join(command)}: not taken") from error


def check_python(arguments: list[str]) -> None:
    first, *others = arguments
    if first == "-m" and others[0] == "edge_shiftkv":
        shell.parse(others[1:])
    elif first == "-m":
        assert others[0] in MODULES
    elif first == "scripts/dev.py":
        check_dev(others)
    else:
        try:
            shell.parse_script(first, others)
        except ModuleNotFoundError as error:
            assert error.name in ("torch", "transformers")  # the training's, which is not installed


def check_dev(arguments: list[str]) -> None:
    name, *others = arguments
    if name == "demo":
        shell.parse(["demo", *others])
        return
    assert name == "test"
    if others:
        assert others[0] == "--build"
        assert others[1] in script("dev").BUILDS


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def extras() -> set[str]:
    section = (
        (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    )
    return set(re.findall(r"^(\w+) = ", section, re.MULTILINE))


def check_extras(arguments: list[str]) -> None:
    for argument in arguments:
        if found := re.search(r"\[(.*)\]", argument):
            assert set(found[1].split(",")) <= extras()


@by_page
def test_the_text_names_options_that_there_are(page):
    parser = shell.parse(["demo"]).parser
    options = shell.options_of(parser)
    known = set().union(*options.values()) | OTHER_OPTIONS | options_of_scripts()
    for code in shell.spans(page):
        if "=" in code and code.startswith("CMAKE_ARGS"):
            continue
        name, *words = code.split()
        if name == "edge-shiftkv" and words and words[0] in options:
            if {"-m", "-hf"} & set(words):
                check(next(shell.commands(code)))
            wanted = options[words[0]]
        else:
            wanted = known
        named = re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)
        assert set(named) <= wanted, (code, set(named) - wanted)
        if name == "edge-shiftkv" and words:
            assert words[0] in {*options, "COMMAND", "..."}, code


@functools.cache
def options_of_scripts() -> set[str]:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.py"))
    return set(re.findall(r'"(--[a-z-]+)"', text))


@by_page
def test_blocks_are_of_kinds_that_are_tested(page):
    kinds = {kind for kind, _ in shell.fences(page)}
    assert kinds <= ({*KINDS, ""} if page not in HOWTO else KINDS)
    for kind, text in shell.fences(page):
        if kind == "json":
            json.loads(text)


@pytest.fixture
def folder(demo, tmp_path):
    """Where statements run: with the checkout's `models`, a folder of scans, and the command."""
    (tmp_path / "models").symlink_to(ROOT / "models", target_is_directory=True)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.png").write_bytes((demo / "document.png").read_bytes())
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "edge-shiftkv").write_text(SHIM)
    (bin_folder / "edge-shiftkv").chmod(0o755)
    return tmp_path


def runs(statement: str) -> bool:
    """Whether a statement is about the shipped model alone, and ends by itself."""
    for program, *arguments in shell.commands(statement):
        shipped = arguments[:1] == ["demo"] or (
            arguments[:1] in (["run"], ["batch"], ["chat"])
            and any(word.startswith("models/demo/") and word.endswith(".gguf") for word in arguments)
        )
        if program not in ("cat", "printf") and not (Path(program).name == "edge-shiftkv" and shipped):
            return False
    return True


@pytest.mark.parametrize("page", [page for page in HOWTO if any(map(runs, typed(page)))], ids=lambda page: page.stem)
def test_commands_about_the_shipped_model_run(page, folder):
    lines = [statement for statement in typed(page) if runs(statement)]
    path = os.pathsep.join([str(folder / ".venv" / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_wrong_is_found(tmp_path):
    """The checks themselves, with pages that are wrong in one thing each."""
    page = tmp_path / "page.md"
    for wrong in (
        "```sh\nedge-shiftkv run -m a.gguf -p x --kv-buget 3\n```\n",
        "```sh\nedge-shiftkv run -m a.gguf \\\n    -p x --top-k many\n```\n",
        "```sh\nprintf x | edge-shiftkv chat\n```\n",
        "```sh\nA=b edge-shiftkv sreve -m a.gguf\n```\n",
        '```sh\npip install "edge-shiftkv[hubs]"\n```\n',
        "```sh\npython scripts/page_reader.py -m a.gguf --outt b.gguf\n```\n",
        "```sh\npython3 scripts/dev.py test --build avx3\n```\n",
        "```sh\nedgeshiftkv run\n```\n",
    ):
        page.write_text(wrong)
        with pytest.raises(AssertionError):
            test_commands_are_taken_by_their_programs(page)
    for wrong in (
        "Say `--kv-buget 3`.",
        "`edge-shiftkv chat --port 1`",
        "`edge-shiftkv chta`",
        "``` a\n```\n`--nothing`",
    ):
        page.write_text(wrong)
        with pytest.raises(AssertionError):
            test_the_text_names_options_that_there_are(page)
    for wrong in ("```bash\nls\n```\n", "```json\n{'a': 1}\n```\n"):
        page.write_text(wrong)
        with pytest.raises((AssertionError, ValueError)):
            test_blocks_are_of_kinds_that_are_tested(page)


def test_statements_are_found():
    block = "# a\nA=1 x 'a b' \\\n  -c | y > z && w\ncat > f <<'END'\none | two\nEND\nlast # no\n"
    found = shell.statements(block)
    assert [list(shell.commands(statement)) for statement in found] == [
        [["x", "a b", "-c"], ["y"], ["w"]],
        [["cat"]],
        [["last"]],
    ]
    assert found[1] == "cat > f <<'END'\none | two\nEND"
