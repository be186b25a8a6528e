"""``edge-shiftkv chat``."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

from PIL import Image

from edge_shiftkv.chat import commands
from edge_shiftkv.chat.conversation import Chat
from edge_shiftkv.chat.progress import ProgressBar
from edge_shiftkv.chat.terminal import Pipe, Place, Terminal
from edge_shiftkv.commands.settings import allow_http, load_runtime, request_options
from edge_shiftkv.errors import ContextOverflowError, ShiftKVError
from edge_shiftkv.prompts.images import load_image

_STOPPED = "(stopped: the model forgets this message; /regen answers it again)"


def main(arguments: argparse.Namespace) -> int:
    """Talk until the end of the input. Returns the exit status: 1 where a message of a pipe was not answered."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with closing(ProgressBar()) as progress, load_runtime(arguments, progress) as runtime:
        progress.close()

        def load(name: str) -> Image.Image:
            return load_image(name, allow_http=allow_http(arguments), image_root=arguments.image_root)

        with Chat(runtime, request_options(arguments), load) as chat:
            chat.system = arguments.system
            chat.attach(arguments.image)
            if not is_terminal:
                return 0 if _talk(chat, Pipe(), arguments.prompt) else 1
            terminal = Terminal(progress)
            terminal.note(_title(arguments, chat))
            _talk(chat, terminal, arguments.prompt)
            return 0


def _talk(chat: Chat, place: Place, line: str | None) -> bool:
    """Answer messages, `line` first, until there are no more. Returns whether nothing went wrong."""
    all_well, stopped = True, False
    while True:
        try:
            if stopped:
                stopped = False
                place.note(_STOPPED if chat.unfinished else "(stopped)")
            text, line = (place.read(len(chat.attached)) if line is None else line).strip(), None
            if text:
                commands.run(chat, text, place)
        except (EOFError, commands.Quit):
            return all_well
        except ContextOverflowError as error:
            all_well = False
            place.error(f"{error}; /clear begins a new conversation")
        except ShiftKVError as error:
            all_well = False
            place.error(str(error))
        except KeyboardInterrupt:
            if isinstance(place, Pipe):
                raise
            stopped = True


def _title(arguments: argparse.Namespace, chat: Chat) -> str:
    draft = f", drafts by {Path(arguments.draft).name}" if arguments.draft else ""
    pictures = "" if chat.runtime.engine.projector else ", without pictures (no --mmproj)"
    return (
        f"{chat.runtime.engine.path.name}{draft}{pictures}; budget: {commands.budget_text(chat)}, "
        f"method {commands.method_text(chat)}\n/help lists the commands, Ctrl-D ends."
    )
