"""A conversation with a runtime, which goes on until it is cleared."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from edge_shiftkv import session_file
from edge_shiftkv.budget import Budget, check_budget
from edge_shiftkv.closing import Closing
from edge_shiftkv.engine.prefilled import ScoringMethod
from edge_shiftkv.errors import PromptError, SessionError
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.request import Options, method_of
from edge_shiftkv.results import Completion
from edge_shiftkv.selection.methods import Method
from edge_shiftkv.selection.results import Selection
from edge_shiftkv.session import Session
from edge_shiftkv.stream import Stream

if TYPE_CHECKING:
    from edge_shiftkv.runtime import Runtime


@dataclass(frozen=True)
class Picture:
    """A picture, and what the user called it."""

    name: str
    image: Image.Image


@dataclass(frozen=True)
class Turn:
    """A message that was answered."""

    text: str
    pictures: tuple[Picture, ...]
    answer: Completion


class Chat(Closing):
    """What was said so far, and what the next message is answered with.

    A message counts when its answer is complete. One whose answer was stopped or failed is forgotten by the model; its
    pictures are attached to the next message, and `again` asks it again.

    turns: the messages that count.
    attached: pictures for the next message.
    unfinished: a message whose answer was stopped or failed, if that was the last one; or "".
    system: the system message of the conversation.
    selection: what the latest cut in this conversation kept, None where nothing was cut; `pictures` are those of it.
    is_loaded: whether the conversation is about what was in a file.
    """

    def __init__(self, runtime: Runtime, options: Options, load: Callable[[str], Image.Image]) -> None:
        """Begin a conversation.

        options: of all answers.
        load: a picture from its path or address.
        """
        self.runtime = runtime
        self.turns: list[Turn] = []
        self.attached: list[Picture] = []
        self.unfinished = ""
        self.system = ""
        self.selection: Selection | None = None
        self.pictures: list[Picture] = []
        self.is_loaded = False
        self._options = options
        self._load = load
        self._session: Session | None = None
        self._read: list[Picture] = []  # what the session was made with
        self._n_again = 0
        self._cut_by: tuple[Budget, Method | ScoringMethod] | None = None

    def attach(self, names: list[str]) -> None:
        """Attach pictures to the next message: all of them, or none. Raises ImageError."""
        self.attached += [Picture(name, self._load(name)) for name in names]

    def set_budget(self, budget: Budget) -> None:
        """Set the budget of what is read from now on. Raises SettingError."""
        self.runtime.kv_budget = check_budget(budget)

    def set_method(self, name: str) -> None:
        """Set the method for what is read from now on. Raises SettingError."""
        self.runtime.kv_method = method_of(name)

    def ask(self, text: str) -> Generator[str, None, None]:
        """Answer a message, piece by piece. Raises what `Session.stream` does."""
        self.unfinished, self._n_again = text, 0
        yield from self._answer(text, self._asked)

    def again(self) -> Generator[str, None, None]:
        """Answer the last message again, in place of its answer if it has one; a seed is another one each time.

        Raises PromptError without a message, and what `ask` does.
        """
        if self.unfinished:
            yield from self.ask(self.unfinished)
            return
        if not self.turns:
            raise PromptError("there is no message to answer again")
        self._n_again += 1
        attached, self.attached = self.attached, list(self.turns[-1].pictures)
        try:
            yield from self._answer(self.turns[-1].text, self._asked_again)
        finally:
            self.attached = attached

    @property
    def repeats(self) -> bool:
        """Whether `again` would give the same answer."""
        if not self.turns or self.unfinished or self._options.get("temperature"):
            return False
        if len(self.turns) == 1:
            return self.is_loaded or self._cut_by == self._cut
        return not self.turns[-1].pictures

    @property
    def n_tokens(self) -> int:
        """Tokens that the conversation takes of the runtime's `n_ctx`: of what was cut, those that were kept."""
        figures = self.turns[-1].answer.figures if self.turns else None
        return figures.kept_tokens + figures.generated_tokens if figures else 0

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of the KV caches that the conversation holds; None where it holds none."""
        return self._session.kv_bytes if self._session else None

    def clear(self) -> None:
        """Begin anew, with the same settings; the system message stays."""
        self._forget()
        self.attached, self.unfinished, self.is_loaded = [], "", False

    def save(self, path: Path) -> list[Message]:
        """Write the system message and the first message's pictures as the model read them; return both.

        Raises SessionError where there is nothing to save, or the file is there and is no session.
        """
        if not self._session or not (self._read or self.is_loaded):
            raise SessionError(
                "nothing to save: a file holds the pictures of a conversation's first message, as the model read them"
            )
        if path.exists() and not session_file.is_session(path):
            raise SessionError(f"{path}: there is another file of that name, which is not a session")
        self._session.save(path)
        return list(self._session.about)

    def load(self, path: Path) -> list[Message]:
        """Begin a conversation about what a file has; return that. Raises SessionError, and keeps what was, then."""
        session = self.runtime.load_session(path)
        self.clear()
        self._session, self.is_loaded = session, True
        self.system = "".join(_text(message) for message in session.about if message.role == "system")
        return list(session.about)

    def close(self) -> None:
        """Free what was read."""
        self._forget()

    def _forget(self) -> None:
        session, self._session = self._session, None
        self.turns, self._read = [], []
        self.selection, self.pictures, self._cut_by = None, [], None
        if session:
            session.close()

    @property
    def _cut(self) -> tuple[Budget, Method | ScoringMethod]:
        return self.runtime.kv_budget, self.runtime.kv_method

    def _answer(self, text: str, begin: Callable[[str, Options], tuple[int, Stream]]) -> Generator[str, None, None]:
        options: Options = {**self._options}
        seed = options.get("seed")
        if seed is not None:
            options["seed"] = seed + self._n_again
        if not self.is_loaded:
            options["kv_budget"], options["kv_method"] = self._cut
        n_turns, stream = begin(text, options)
        with stream:
            yield from stream
        self.turns[n_turns:] = [Turn(text, tuple(self.attached), stream.completion)]
        self.attached, self.unfinished, self._cut_by = [], "", self._cut
        if selection := stream.completion.selection:
            self.selection = selection
            # Of pictures that were cut before, it knows nothing.
            n_pictures = len({span.image for span in selection.image_spans})
            pictures = [picture for turn in self.turns for picture in turn.pictures]
            self.pictures = pictures[len(pictures) - n_pictures :]

    def _asked(self, text: str, options: Options) -> tuple[int, Stream]:
        images = [picture.image for picture in self.attached]
        if self.turns and self._session:
            return len(self.turns), self._session.stream_reply(text, images, **options)
        if self.is_loaded and self._session:
            if images:
                raise PromptError("first ask about what was loaded; further pictures can go with later messages")
            return 0, self._session.stream(text, **options)
        if not self._session or self._read != self.attached:  # it is there after an answer that was stopped
            self._forget()
            self._session = self.runtime.session(images=images, system=self.system)
            self._read = list(self.attached)
        return 0, self._session.stream(text, **options)

    def _asked_again(self, _text: str, options: Options) -> tuple[int, Stream]:
        assert self._session
        return len(self.turns) - 1, self._session.stream_again(**options)


def _text(message: Message) -> str:
    return "".join(part for part in message.content if isinstance(part, str))
