"""What a line that begins with a slash does."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from edge_shiftkv.budget import read_budget
from edge_shiftkv.chat.conversation import Chat
from edge_shiftkv.commands.figures import LABEL_WIDTH, figure_rows, mebibytes, save_heatmap
from edge_shiftkv.errors import PromptError, SettingError
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.selection.methods import METHODS


class Screen(Protocol):
    """Where things are shown."""

    def note(self, text: str) -> None:
        """Show what is no part of an answer."""

    def answer(self, pieces: Generator[str, None, None]) -> None:
        """Show an answer as it comes, and end it when that ends."""


class Quit(Exception):  # noqa: N818 - it is no error
    """The end of the chat."""


@dataclass(frozen=True)
class Command:
    """usage: its name and what may follow. text: what it does. run: does it, with what followed."""

    usage: str
    text: str
    run: Callable[[Chat, str, Screen], None]


def run(chat: Chat, line: str, screen: Screen) -> None:
    """Do what a line says: answer it, or run the command that it names.

    Raises ShiftKVError for what is wrong, with the chat as it was; Quit.
    """
    if not line.startswith("/"):
        answer(chat, line, screen)
    elif line.startswith("//"):
        answer(chat, line[1:], screen)
    else:
        name, argument = (*line.split(maxsplit=1), "")[:2]
        if name not in COMMANDS:
            raise PromptError(_unknown(name, line))
        COMMANDS[name].run(chat, argument.strip(), screen)


def answer(chat: Chat, text: str, screen: Screen) -> None:
    """Answer a message."""
    _show(chat, chat.ask(text), screen)


def paths(argument: str) -> list[str]:
    """Paths as people write and terminals drop them: quoted, with escaped spaces, below ``~``, or as they are.

    Raises PromptError for a quote that does not end.
    """
    whole = os.path.expanduser(argument)  # noqa: PTH111 - it may be an address, which Path would change
    if Path(whole).is_file():
        return [whole]
    try:
        words = shlex.split(argument, posix=os.name == "posix")
    except ValueError as error:
        raise PromptError(f"{argument}: a quote does not end; write \\' for one that is part of a name") from error
    return [os.path.expanduser(word if os.name == "posix" else word.strip("\"'")) for word in words]  # noqa: PTH111


def _unknown(name: str, line: str) -> str:
    if Path(paths(line)[0]).is_file():
        return f"to attach a picture: /image {line}"
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else "/help lists them."
    return f"{name} is no command; {hint} For a message that begins with a slash, write two."


def _show(chat: Chat, pieces: Generator[str, None, None], screen: Screen) -> None:
    screen.answer(pieces)
    figures = chat.turns[-1].answer
    if figures.finish_reason == "length":
        screen.note(f"(the answer ended at {figures.figures.generated_tokens} tokens: -n sets how long it may be)")


def _one_path(argument: str, usage: str) -> Path:
    names = paths(argument)
    if len(names) != 1:
        raise PromptError(f"write {usage}; a path with spaces in quotes")
    return Path(names[0])


def _image(chat: Chat, argument: str, screen: Screen) -> None:
    if argument:
        chat.attach(paths(argument))
    names = ", ".join(picture.name for picture in chat.attached)
    screen.note(f"attached to the next message: {names or 'nothing; write /image PATH'}")


_FROM_NOW_ON = "; what was read before stays as it is"


def _budget(chat: Chat, argument: str, screen: Screen) -> None:
    if argument:
        _check_not_loaded(chat, "budget")
        try:
            budget = None if argument == "all" else read_budget(argument)
        except SettingError as error:
            raise SettingError(
                f"{argument} is no budget: write a number of KV pairs, a share of them such as 0.25, bytes such as "
                "64MiB, a share of the bytes such as 1/8, or all"
            ) from error
        chat.set_budget(budget)
    screen.note(f"budget: {budget_text(chat)}" + (_FROM_NOW_ON if argument and chat.turns else ""))


def _method(chat: Chat, argument: str, screen: Screen) -> None:
    if argument:
        _check_not_loaded(chat, "method")
        chat.set_method(argument)
    screen.note(
        f"method: {method_text(chat)}"
        + (f"; there are {', '.join(METHODS)}" if not argument else _FROM_NOW_ON if chat.turns else "")
    )


def _check_not_loaded(chat: Chat, what: str) -> None:
    if chat.is_loaded:
        raise SettingError(f"what was loaded cannot be cut again: /clear begins a new conversation with another {what}")


def _stats(chat: Chat, _argument: str, screen: Screen) -> None:
    rows = figure_rows(chat.turns[-1].answer.figures) if chat.turns else []
    n_pictures = sum(len(turn.pictures) for turn in chat.turns)
    n_written = sum(turn.answer.figures.generated_tokens for turn in chat.turns)
    rows += [
        ("conversation", f"{_count(len(chat.turns), 'message')}, {_count(n_pictures, 'picture')}"),
        ("written", f"{n_written} tokens in all answers"),
        ("context", f"{chat.n_tokens} of {chat.runtime.n_ctx} tokens"),
        ("memory", f"{mebibytes(chat.kv_bytes or 0)} of KV caches"),
    ]
    screen.note("\n".join(f"{label:{LABEL_WIDTH}}{text}".rstrip() for label, text in rows))


def _heatmap(chat: Chat, argument: str, _screen: Screen) -> None:
    path = _one_path(argument, "/heatmap PATH")
    if any(_is_same_file(path, picture.name) for picture in chat.pictures):
        raise PromptError(f"{path}: that is the picture itself; write another name")
    save_heatmap(chat.selection, [picture.image for picture in chat.pictures], path)


def _is_same_file(path: Path, name: str) -> bool:
    try:
        return path.samefile(name)
    except (OSError, ValueError):
        return False


def _clear(chat: Chat, _argument: str, screen: Screen) -> None:
    chat.clear()
    screen.note("a new conversation")


def _regen(chat: Chat, _argument: str, screen: Screen) -> None:
    if chat.repeats:
        screen.note("(at temperature 0 it is the same answer; start the chat with --temperature 0.7 for others)")
    _show(chat, chat.again(), screen)


def _save(chat: Chat, argument: str, screen: Screen) -> None:
    path = _one_path(argument, "/save FILE")
    screen.note(f"{path}: saved {_contents(chat.save(path))}; questions, answers and later pictures are not in it")


def _load(chat: Chat, argument: str, screen: Screen) -> None:
    path = _one_path(argument, "/load FILE")
    screen.note(f"{path}: a new conversation about {_contents(chat.load(path))}")


def _contents(about: list[Message]) -> str:
    n_pictures = sum(isinstance(part, Image.Image) for message in about for part in message.content)
    texts = [part for message in about for part in message.content if isinstance(part, str)]
    return " and ".join([_count(n_pictures, "picture"), *(f'"{text[:60]}"' for text in texts)])


def _system(chat: Chat, argument: str, screen: Screen) -> None:
    if argument:
        attached = chat.attached
        chat.clear()
        chat.system = "" if argument == "none" else argument
        chat.attached = attached
    shown = f'system message: "{chat.system}"' if chat.system else "no system message"
    screen.note(f"a new conversation, {shown}" if argument else shown)


def _help(_chat: Chat, _argument: str, screen: Screen) -> None:
    screen.note(
        "\n".join(f"{command.usage:{_USAGE_WIDTH}}{command.text}" for command in COMMANDS.values())
        + "\n\nA message that begins with a slash is written with two. A backslash at the end of a line, or Alt-Enter, "
        "begins\nanother line of the message. Ctrl-C ends an answer, Ctrl-D the chat."
    )


def _quit(_chat: Chat, _argument: str, _screen: Screen) -> None:
    raise Quit


def budget_text(chat: Chat) -> str:
    """The budget, for people."""
    budget, engine = chat.runtime.kv_budget, chat.runtime.engine
    if budget is None:
        return "all of the prompt's KV pairs"
    if isinstance(budget, str):
        what = "of the prompt's bytes in f16" if "/" in budget else "of KV pairs"
        return f"{budget} {what}, keys in {engine.type_k}, values in {engine.type_v}"
    return f"{budget:g} of the prompt's KV pairs" if budget < 1 else f"{budget} KV pairs per layer and KV head"


def method_text(chat: Chat) -> str:
    """The method's name."""
    method = chat.runtime.kv_method
    return next((name for name, known in METHODS.items() if known() == method), type(method).__name__)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


COMMANDS = {
    command.usage.split()[0]: command
    for command in (
        Command("/image PATH...", "attach pictures to the next message", _image),
        Command(
            "/budget [N|0.25|64MiB|all]",
            "KV pairs kept per layer and KV head, the share of them, or bytes",
            _budget,
        ),
        Command("/method [NAME]", "how they are chosen; without a name: the names", _method),
        Command("/stats", "figures of the last answer and of the conversation", _stats),
        Command("/heatmap PATH", "draw what was kept of the pictures", _heatmap),
        Command("/regen", "answer the last message again", _regen),
        Command("/clear", "begin a new conversation", _clear),
        Command("/system [TEXT|none]", "begin one with a system message", _system),
        Command("/save FILE", "save the first message's pictures as the model read them", _save),
        Command("/load FILE", "begin a conversation about what was saved", _load),
        Command("/help", "this list", _help),
        Command("/quit", "end the chat, as Ctrl-D does", _quit),
    )
}
_USAGE_WIDTH = 2 + max(len(command.usage) for command in COMMANDS.values())
