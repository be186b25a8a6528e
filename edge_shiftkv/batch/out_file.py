"""The file of a batch's answers, and how a run goes on where another one ended.

A line is the answer to a row. It is written at once, so that nothing is lost with the process, and flushed to the disk
within a second: a power failure may cost the rows of that second, which are then answered again. A line counts when
its end is there. Beside the file there are ``NAME.run``, what the answers depend on, and ``NAME.lock``, an empty file
that is locked while a run writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edge_shiftkv.closing import Closing
from edge_shiftkv.errors import SettingError, ShiftKVError

_SYNC_S = 1.0
_FORMAT = 1


class OutFile(Closing):
    """Answers in a file, each row's once.

    path: the file. One that is there is gone on with, if its answers were made with the same settings.
    settings: what answers depend on, by name; JSON values.
    drawn: further settings: the first run's hold for those that go on with it.
    restart: throw away the answers that are there.
    retry_errors: throw away the rows that are errors, which are then to be done again.

    settings: also has those drawn, once the file is open.
    n_dropped: lines of the file that could not be read and were taken out; a torn last line is not counted.

    Raises SettingError where the settings are others or the file is not one of these, and ShiftKVError where another
    run writes to it or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        drawn: Mapping[str, Any],
        *,
        restart: bool = False,
        retry_errors: bool = False,
    ) -> None:
        self.path = path
        self.settings: Mapping[str, Any] = {**drawn, **settings}
        self.n_dropped = 0
        self._run_path = path.with_name(f"{path.name}.run")
        self._done: set[bytes] = set()
        self._errors: set[bytes] = set()
        self._synced, self._is_synced = time.monotonic(), True
        try:
            with ExitStack() as resources:
                self._lock(resources)
                if restart:
                    path.unlink(missing_ok=True)
                if path.exists() and path.stat().st_size:
                    self._go_on(settings, drawn, retry_errors)
                else:
                    written = {"format": _FORMAT, "settings": self.settings}
                    _replace(self._run_path, iter([json.dumps(written, indent=1).encode() + b"\n"]))
                self._file = resources.enter_context(path.open("ab", buffering=0))
                self._size = path.stat().st_size
                self._resources = resources.pop_all()
        except OSError as error:
            raise ShiftKVError(f"{error.filename or path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Flush and unlock the file; a second call does nothing. Raises ShiftKVError when flushing fails."""
        try:
            self.sync(at_once=True)
        finally:
            self._resources.close()

    def is_done(self, custom_id: str) -> bool:
        """Whether a row has its line."""
        return key_of(custom_id) in self._done

    def count(self, keys: AbstractSet[bytes]) -> tuple[int, int]:
        """How many of the rows that have these keys (see `key_of`) have their lines, and in how many it is an error."""
        return len(keys & self._done), len(keys & self._errors)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write a row's line. Raises ShiftKVError when it cannot be written: the file is then as it was."""
        line = _line(entry)
        try:
            n = self._file.write(line)
            if n != len(line):
                n += self._file.write(line[n:])  # raises what is wrong
            if n != len(line):
                raise OSError("the line could not be written")
        except OSError as error:
            with suppress(OSError):  # if not now, the next run cuts it off
                self._file.truncate(self._size)
            raise _failed(self.path, error) from error
        self._size += len(line)
        self._note(entry)
        self._is_synced = False
        self.sync()

    def sync(self, *, at_once: bool = False) -> None:
        """Flush what was written to the disk, if that was not done for a second. Raises ShiftKVError."""
        now = time.monotonic()
        if self._is_synced or (now - self._synced < _SYNC_S and not at_once):
            return
        self._synced, self._is_synced = now, True
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _failed(self.path, error) from error

    def _lock(self, resources: ExitStack) -> None:
        lock = FileLock(self.path.with_name(f"{self.path.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ShiftKVError(
                f"{self.path}: another run is writing to it: wait for it, or name another file"
            ) from None
        resources.callback(lock.release)

    def _go_on(self, settings: Mapping[str, Any], drawn: Mapping[str, Any], retry_errors: bool) -> None:
        advice = "name another file, or throw its answers away with --restart"
        try:
            run = json.loads(self._run_path.read_bytes())
            before = {name: run["settings"][name] for name in self.settings}
            is_known = run["format"] == _FORMAT
        except FileNotFoundError:
            raise SettingError(f"{self.path} is there, but no {self._run_path.name} of a batch: {advice}") from None
        except (ValueError, KeyError, TypeError):
            is_known = False
        if not is_known:
            raise SettingError(f"{self._run_path} is not of a batch of this version: {advice}")
        if others := [name for name in settings if before[name] != settings[name]]:
            differences = ", ".join(_difference(name, before[name], settings[name]) for name in others)
            raise SettingError(f"{self.path} was begun with other settings: {differences}; use the same ones, {advice}")
        self.settings = before
        self._recover(retry_errors)

    def _recover(self, retry_errors: bool) -> None:
        """Take out what does not count, and note what does."""
        end = position = 0
        is_whole = True  # what counts is one piece at the beginning
        for line, entry in read_lines(self.path):
            position += len(line)
            if entry is None or self.is_done(entry["custom_id"]) or (retry_errors and entry["error"]):
                self.n_dropped += entry is None and line.endswith(b"\n")
                continue
            is_whole &= end == position - len(line)
            end = position
            self._note(entry)
        if is_whole:
            if end < position:
                with self.path.open("r+b") as file:
                    file.truncate(end)
                    os.fsync(file.fileno())
            return
        done, self._done = self._done, set()
        _replace(self.path, self._counting(retry_errors))
        assert done == self._done

    def _counting(self, retry_errors: bool) -> Iterator[bytes]:
        for line, entry in read_lines(self.path):
            if entry and not self.is_done(entry["custom_id"]) and not (retry_errors and entry["error"]):
                self._done.add(key_of(entry["custom_id"]))
                yield line

    def _note(self, entry: Mapping[str, Any]) -> None:
        key = key_of(entry["custom_id"])
        self._done.add(key)
        if entry["error"]:
            self._errors.add(key)


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of an out file and what they say; None where that is no row's line, or one without its end."""
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
                is_row = isinstance(entry["custom_id"], str) and bool(entry["response"]) != bool(entry["error"])
            except (ValueError, TypeError, KeyError, RecursionError):
                is_row = False
            yield line, entry if is_row and line.endswith(b"\n") else None


def key_of(custom_id: str) -> bytes:
    """What stands for a row in memory: 16 bytes."""
    return hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()


def _line(entry: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # as names of files that are not UTF-8
        return json.dumps(entry).encode() + b"\n"


def _difference(name: str, before: Any, now: Any) -> str:
    if name in ("model", "mmproj") or any(isinstance(value, str | list | dict) for value in (before, now)):
        return f"another {name}"
    return f"{name} was {before}, now {now}"


def _replace(path: Path, lines: Iterator[bytes]) -> None:
    """Write a file beside its place and move it there when it is complete."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with part.open("xb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _failed(path: Path, error: OSError) -> ShiftKVError:
    return ShiftKVError(f"{path}: {error.strerror or error}; the rows in it are kept: run it again to go on")
