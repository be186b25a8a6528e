"""The commands that documentation pages show: found, and read by the programs' own parsers."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from edge_shiftkv import cli
from support.howto import ROOT

_FENCE = re.compile(r"^ *```(?P<kind>[^\n`]*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"<<'(\w+)'\n.*?^\1$", re.MULTILINE | re.DOTALL)
_SEPARATORS = {"|", "&&", ";", "||"}
_REDIRECTIONS = {">", "<", ">>", "<<"}


class Parsed(BaseException):
    """What a program's parser made of its arguments."""

    def __init__(self, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.parser = parser
        self.arguments = arguments


def fences(page: Path) -> list[tuple[str, str]]:
    """The blocks of code of a page: what stands behind the fence, and the text."""
    return [(block["kind"], block["text"]) for block in _FENCE.finditer(page.read_text(encoding="utf-8"))]


def spans(page: Path) -> list[str]:
    """The code within the text of a page, on one line each."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def statements(block: str) -> list[str]:
    """The statements of a shell's block: lines, with those that they go on in."""
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"<<{len(kept) - 1}<<"

    lines = _HEREDOC.sub(keep, block).replace("\\\n", " ").splitlines()
    whole = (re.sub(r"<<(\d+)<<", lambda mark: kept[int(mark[1])], line).strip() for line in lines)
    return [line for line in whole if line and not line.startswith("#")]


def commands(statement: str) -> Iterator[list[str]]:
    """The commands of a statement as words, without variables before them and without redirections."""
    lexer = shlex.shlex(_HEREDOC.sub("", statement), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command: list[str] = []
    words = iter([*lexer, ";"])
    for word in words:
        if word in _SEPARATORS:
            while command and re.match(r"[A-Z_]+=", command[0]):
                command.pop(0)
            if command:
                yield command
            command = []
        elif word in _REDIRECTIONS:
            next(words)
        else:
            command.append(word)


def parse(arguments: Sequence[str]) -> Parsed:
    """What `edge-shiftkv` makes of its arguments. Raises SystemExit where it takes them not."""
    return _parsed(lambda: cli.main(list(arguments)))


def parse_script(script: str, arguments: Sequence[str]) -> Parsed:
    """The same of a script of the repository, by its path there. Raises ImportError where what it needs is missing."""
    path = ROOT / script
    with (
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
    ):
        return _parsed(lambda: runpy.run_path(str(path), run_name="__main__"))


def _parsed(run: object) -> Parsed:
    parse_args = argparse.ArgumentParser.parse_args

    def spy(parser, *given):  # type: ignore[no-untyped-def]
        raise Parsed(parser, parse_args(parser, *given))

    with mock.patch.object(argparse.ArgumentParser, "parse_args", spy):
        try:
            run()  # type: ignore[operator]
        except Parsed as parsed:
            return parsed
    raise AssertionError("the arguments were not parsed")


def options_of(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """The options of each command of a parser that has commands."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: set(one._option_string_actions) for name, one in commands.choices.items()}
