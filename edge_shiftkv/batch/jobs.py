"""A batch from files to a file: which rows there are, and getting each answered."""

from __future__ import annotations

import glob
import hashlib
import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from edge_shiftkv.batch.out_file import OutFile, key_of
from edge_shiftkv.batch.worker import (
    Answered,
    Finish,
    GroupEnd,
    GroupOver,
    JobRow,
    Loaded,
    Message,
    More,
    Unusable,
    Work,
    Worker,
    WorkerDiedError,
)
from edge_shiftkv.errors import PromptError, ShiftKVError

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
"""What pictures in a folder are known by."""

_URL = "/v1/chat/completions"
_POLL_S = 0.2
_DEATHS = 8  # without an answer between them
_SILENCE_S = 30.0  # beside twice the time limit of a row


class JsonRows:
    """The rows of a file in OpenAI's batch format: an iterable, which reads the file anew each time.

    Raises PromptError, naming the line, for what is no such row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[JobRow]:
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_row(line, f"{self.path}:{number}")
        except OSError as error:
            raise PromptError(f"{self.path}: {error.strerror or error}") from error


def _json_row(line: bytes, where: str) -> JobRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, Mapping):
        raise PromptError(f"{where}: not a JSON object")
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise PromptError(f"{where}: custom_id is {custom_id!r:.200}: it has to be text that names the row")
    if not isinstance(row.get("body"), Mapping):
        raise PromptError(f"{where}: body has to be an object with messages, as for {_URL}")
    for name, only in (("method", "POST"), ("url", _URL)):
        if row.get(name, only) != only:
            raise PromptError(f"{where}: {name} is {row[name]!r:.200}: only {only} can be answered")
    return JobRow(custom_id, row["body"], where)


def check_rows(rows: Iterable[JobRow]) -> set[bytes]:
    """Read all rows; return what `key_of` gives for each. Raises PromptError, also for a custom_id that is there twice.

    Nothing should be answered before: a name that is there twice would be answered once.
    """
    keys: set[bytes] = set()
    for row in rows:
        key = key_of(row.custom_id)
        if key in keys:
            raise PromptError(f"{row.where}: custom_id {row.custom_id!r:.200} is there twice: give each row its own")
        keys.add(key)
    return keys


class PictureRows:
    """A row for each picture, in the order of their paths, with the same prompt; a row's custom_id is the path.

    sources: pictures, folders of pictures, and patterns such as ``scans/*.png``, where ``**`` is any folders.
    recursive: take what is in folders below folders, too.

    Raises PromptError for a source without a picture.
    """

    def __init__(self, sources: Sequence[str], prompt: str, *, recursive: bool = False) -> None:
        self._prompt = prompt
        self._paths = sorted({path for source in sources for path in _pictures(source, recursive)})

    def __iter__(self) -> Iterator[JobRow]:
        for path in self._paths:
            url = str(Path(path).absolute())  # which is no URL of another kind, whatever the name is
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self._prompt}]
            yield JobRow(path, {"messages": [{"role": "user", "content": parts}]}, path)


def _pictures(source: str, recursive: bool) -> list[str]:
    path = Path(source)
    if path.is_dir():
        inside = path.rglob("*") if recursive else path.iterdir()
        found = [str(entry) for entry in inside if entry.suffix.lower() in SUFFIXES and entry.is_file()]
    elif path.exists():
        found = [source]
    elif not glob.has_magic(source):
        raise PromptError(f"{source}: No such file or directory")
    else:
        found = [name for name in glob.glob(source, recursive=True) if Path(name).is_file()]  # noqa: PTH207
    if not found:
        hint = "; --recursive looks into folders below" if path.is_dir() and not recursive else ""
        raise PromptError(f"{source}: no picture there{hint}")
    return found


class Stop:
    """Counts Ctrl-C: the first asks a run to finish what it is at, the second to stop at once."""

    def __init__(self) -> None:
        self.n = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Take Ctrl-C, in the main thread, unless it is ignored."""
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
            yield
            return
        signal.signal(signal.SIGINT, self._count)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.n += 1


@dataclass(frozen=True)
class Report:
    """Is told how a run goes on.

    answered: a row was written.
    note: something that a person should know.
    idle: called a few times a second.
    """

    answered: Callable[[JobRow, Answered], None]
    note: Callable[[str], None]
    idle: Callable[[], None]


def run(rows: Iterable[JobRow], out: OutFile, work: Work, stop: Stop, report: Report) -> None:
    """Answer those of the rows that are not in `out`, in a process of its own, and write each there.

    A row that was at work when the process died is tried once more, alone, and is an error if it dies again. With a
    time limit for rows, a process that says nothing for more than twice as long is ended.

    Raises ShiftKVError where nothing can be answered or written, KeyboardInterrupt after a second Ctrl-C.
    """
    todo = (row for row in rows if not out.is_done(row.custom_id))
    _Run(todo, out, work, stop, report).run()


class _Run:
    def __init__(self, todo: Iterator[JobRow], out: OutFile, work: Work, stop: Stop, report: Report) -> None:
        self._todo = todo
        self._out = out
        self._work = work
        self._stop = stop
        self._report = report
        self._suspects: deque[JobRow] = deque()  # were at work when a process died
        self._at_work: dict[str, JobRow] = {}
        self._n_group = self._n_deaths = 0
        self._is_alone = self._is_loaded = self._is_over = self._is_told = False

    def run(self) -> None:
        while not self._is_over:
            try:
                with Worker(self._work) as worker:
                    self._serve(worker)
            except WorkerDiedError as death:
                if not self._is_loaded:
                    raise ShiftKVError(f"the process that loads the models ended with {death}") from death
                self._n_deaths += 1
                self._bury(death)
                if self._n_deaths == _DEATHS:
                    raise ShiftKVError(f"the process that answers ended with {death} again and again") from death
                self._is_over = self._stop.n > 0

    def _serve(self, worker: Worker) -> None:
        self._is_loaded = False
        self._begin_group()
        heard = time.monotonic()
        while not self._is_over:
            message = worker.receive(_POLL_S)
            if self._stop.n > 1:
                raise KeyboardInterrupt
            if self._stop.n and not self._is_told:
                self._is_told = True
                self._report.note("finishing the rows that are at work; Ctrl-C again stops at once")
            self._out.sync()
            self._report.idle()
            if message is not None:
                heard = time.monotonic()
                self._take(message, worker)
            elif self._is_loaded and time.monotonic() - heard > self._patience:
                raise WorkerDiedError(f"no sign of life for {self._patience:.0f} s")

    @property
    def _patience(self) -> float:
        limit = self._work.options.get("time_limit")
        return float("inf") if limit is None else 2 * limit + _SILENCE_S

    def _take(self, message: Message, worker: Worker) -> None:
        match message:
            case Loaded(n_parallel):
                self._is_loaded = True
                self._work = replace(self._work, n_parallel=n_parallel)
            case Unusable(reason):
                raise ShiftKVError(reason)
            case More():
                answer = self._next()
                if isinstance(answer, JobRow):
                    self._at_work[answer.custom_id] = answer
                    self._n_group += 1
                worker.send(answer)
            case Answered(custom_id):
                self._n_deaths = 0
                self._write(self._at_work.pop(custom_id), message)
            case GroupOver():
                self._is_over = self._stop.n > 0 or (self._n_group == 0 and not self._suspects)
                self._begin_group()

    def _begin_group(self) -> None:
        self._n_group, self._is_alone = 0, False

    def _next(self) -> JobRow | GroupEnd | Finish:
        if self._stop.n:
            return Finish()
        if self._n_group == 0 and self._suspects:
            self._is_alone = True
            return self._suspects.popleft()
        if self._is_alone:
            return GroupEnd()
        return next(self._todo, None) or GroupEnd()

    def _bury(self, death: WorkerDiedError) -> None:
        rows = list(self._at_work.values())
        self._at_work.clear()
        if not self._is_alone:
            self._suspects.extend(rows)
            self._report.note(f"the process that answers ended ({death}); {len(rows)} rows are tried again, one by one")
            return
        for row in rows:
            message = f"the process that answered it ended twice ({death})"
            self._write(row, Answered(row.custom_id, None, {"code": "crash", "message": message}))

    def _write(self, row: JobRow, answer: Answered) -> None:
        name = f"batch_req_{hashlib.sha256(row.custom_id.encode(errors='surrogatepass')).hexdigest()[:24]}"
        response = answer.body and {"status_code": 200, "request_id": name, "body": answer.body}
        self._out.add({"id": name, "custom_id": row.custom_id, "response": response, "error": answer.error})
        self._report.answered(row, answer)
