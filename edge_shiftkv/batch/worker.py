"""A process that answers rows: what ends it by a fault of native code, or hangs, does not end the run.

It is a child of the process that reads the rows and owns the files. It asks for rows one by one, and sends each answer
as it is there. Rows come in groups, each answered as one `Runtime.generate_many`; most runs have one group.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from edge_shiftkv import chat_schema
from edge_shiftkv.batch.batch import BatchResult
from edge_shiftkv.batch.parallel import choose_parallel
from edge_shiftkv.batch.rows import filled_in, row_seed
from edge_shiftkv.closing import Closing
from edge_shiftkv.errors import (
    ContextOverflowError,
    ImageError,
    PromptError,
    SettingError,
    ShiftKVError,
    TimeLimitError,
)
from edge_shiftkv.request import Options
from edge_shiftkv.runtime import Runtime
from edge_shiftkv.selection.heatmap import heatmap
from edge_shiftkv.selection.results import Selection

_CODES: tuple[tuple[type[ShiftKVError], str], ...] = (
    (ImageError, "image"),
    (ContextOverflowError, "context_overflow"),
    (PromptError, "prompt"),
    (SettingError, "setting"),
    (TimeLimitError, "time_limit"),
)


@dataclass(frozen=True)
class Work:
    """What a worker is to do.

    runtime: what `Runtime` is made with, by name.
    options: those of rows that do not say otherwise.
    n_parallel: answers written at a time, or "auto".
    seed: rows' seeds follow from it and their custom_id.
    heatmaps: the folder for heat maps.
    """

    runtime: Mapping[str, Any]
    options: Options
    n_parallel: int | Literal["auto"]
    seed: int
    heatmaps: Path | None = None


@dataclass(frozen=True)
class JobRow:
    """A request of a batch; what is wrong with its body, if anything, is found when it is its turn.

    where: what errors call the place that it came from.
    """

    custom_id: str
    body: Mapping[str, Any]
    where: str = ""


class Loaded(NamedTuple):
    """The models are loaded."""

    n_parallel: int


class Unusable(NamedTuple):
    """Nothing can be answered: why."""

    reason: str


class More(NamedTuple):
    """Asks for a row; the answer is a JobRow, or one of the two below."""


class GroupEnd(NamedTuple):
    """There are no more rows in this group."""


class Finish(NamedTuple):
    """There are no more rows, and those that were not begun are not wanted."""


class Answered(NamedTuple):
    """A row's answer: a ``chat.completion``, or an error with code and message."""

    custom_id: str
    body: dict[str, Any] | None
    error: dict[str, str] | None


class GroupOver(NamedTuple):
    """All answers of a group were sent."""


Message = Loaded | Unusable | More | Answered | GroupOver


class WorkerDiedError(Exception):
    """The process is no more."""


class Worker(Closing):
    """The process, as its parent sees it."""

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, work), daemon=True)
        with _without_ctrl_c():
            self._process.start()
        theirs.close()

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None when there is none for so many seconds. Raises WorkerDiedError."""
        try:
            if not multiprocessing.connection.wait([self._connection], timeout):
                return None
            message: Message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        return message

    def send(self, answer: JobRow | GroupEnd | Finish) -> None:
        """Answer a `More`. Raises WorkerDiedError."""
        try:
            self._connection.send(answer)
        except OSError as error:
            raise self._died() from error

    def close(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()
        self._process.kill()
        self._process.join()

    def _died(self) -> WorkerDiedError:
        self._process.join()
        code = self._process.exitcode or 0
        return WorkerDiedError(signal.Signals(-code).name if code < 0 else f"status {code}")


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Have a process that is started not be told of Ctrl-C, from its very beginning."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows: it ignores it a little later
        yield
        return
    resource_tracker.ensure_running()  # whose start would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(connection: Connection, work: Work) -> None:
    """What the process does: load the models and answer rows, group by group, until its parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with Runtime(**work.runtime) as runtime:
            n_parallel = work.n_parallel
            if n_parallel == "auto":
                n_parallel = choose_parallel(runtime.engine, runtime.n_ctx, runtime.kv_budget, work.options)
            connection.send(Loaded(n_parallel))
            while True:
                _answer_group(connection, runtime, work, n_parallel)
                connection.send(GroupOver())
    except ShiftKVError as error:
        connection.send(Unusable(str(error)))
    except (EOFError, ConnectionError):  # the parent is gone
        pass


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _answer_group(connection: Connection, runtime: Runtime, work: Work, n_parallel: int) -> None:
    names: dict[int, str] = {}  # of the rows that are not answered

    def rows() -> Iterator[Any]:
        for index in count():
            connection.send(More())
            row = connection.recv()
            if isinstance(row, Finish):
                batch.finish()
            if not isinstance(row, JobRow):
                return
            names[index] = row.custom_id
            yield {"seed": row_seed(work.seed, row.custom_id), **filled_in(row.body)}

    with runtime.generate_many(rows(), n_parallel=n_parallel, ordered=False, **work.options) as batch:
        for result in batch:
            connection.send(_answered(names.pop(result.index), result, work))


def _answered(custom_id: str, result: BatchResult, work: Work) -> Answered:
    completion = result.completion
    if completion is None:
        code = next((code for kind, code in _CODES if isinstance(result.error, kind)), "model")
        return Answered(custom_id, None, {"code": code, "message": str(result.error)})
    if work.heatmaps and completion.selection and completion.figures.image_tokens:
        _save_heatmap(work.heatmaps / heatmap_name(custom_id), completion.selection, result.request, work.runtime)
    model = result.request.get("model") or os.fspath(work.runtime["model"])
    return Answered(custom_id, chat_schema.completion(completion, model), None)


def heatmap_name(custom_id: str) -> str:
    """The name of a row's heat map: what is safe of its custom_id, and a hash that tells it from others."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", custom_id).strip("-")[-80:]
    digest = hashlib.sha256(custom_id.encode(errors="surrogatepass")).hexdigest()
    return f"{safe or 'row'}-{digest[:8]}.png"


def _save_heatmap(path: Path, selection: Selection, body: Mapping[str, Any], runtime: Mapping[str, Any]) -> None:
    """Draw what was kept. Raises ShiftKVError when it cannot be written; a picture that is gone by now has no map."""
    where = {name: runtime[name] for name in ("allow_http", "image_root")}
    try:
        messages = chat_schema.parse_messages(body["messages"], **where)
    except PromptError:
        return
    pictures = [part for message in messages for part in message.content if isinstance(part, Image.Image)]
    sheet = heatmap(selection, pictures)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with part.open("xb") as file:
            sheet.save(file, "PNG")
        part.replace(path)
    except OSError as error:
        raise ShiftKVError(f"{path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
