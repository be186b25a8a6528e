"""The folder that all builds of a user share, and what is thrown away of it.

    sdist/          the sdist, checked against its hash
    tools/<hash>/   the build backend (and cmake and ninja where the machine lacks them)
    src/, build/    one source tree and one CMake tree; a build only rewrites files that differ, so ninja recompiles
                    only what a changed patch or option touches
    wheels/<key>/   finished wheels by a hash of everything that goes into them
    build.log       what the compiler said last

A folder's time is that of its last use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import platformdirs

from edge_shiftkv.build.errors import Report

_KEPT = 3  # wheels of each variant: a developer goes back and forth between patches
_UNUSED_S = 60 * 24 * 3600
_VARIANT = "variant.json"
_TEMPORARY = ("wheel-", "hook-", "tools-", "sdist-")


def default_cache_dir() -> Path:
    """The directory all builds of this user share."""
    override = os.environ.get("EDGE_SHIFTKV_CACHE")
    return Path(override).absolute() if override else Path(platformdirs.user_cache_dir("edge_shiftkv", appauthor=False))


def find_wheel(cache: Path, key: str) -> Path | None:
    """The finished wheel for a key, which counts as used now."""
    folder = cache / "wheels" / key
    mark_used(folder)
    return only_wheel(folder)


def add_wheel(cache: Path, key: str, folder: Path, variant: object) -> Path:
    """Take in a folder with a finished wheel, and throw away what it replaces; returns the wheel's new path.

    variant: what was chosen for this wheel, of whichever patches: a few of each are kept.
    """
    (folder / _VARIANT).write_text(json.dumps(variant), encoding="utf-8")
    finished = cache / "wheels" / key
    finished.parent.mkdir(exist_ok=True)
    shutil.rmtree(finished, ignore_errors=True)
    folder.replace(finished)
    mark_used(finished)
    _prune(cache)
    wheel = only_wheel(finished)
    assert wheel is not None
    return wheel


def only_wheel(folder: Path) -> Path | None:
    """The wheel in a folder."""
    return next(folder.glob("*.whl"), None)


def mark_used(folder: Path) -> None:
    """Note that a folder was used, if it is there and this user's."""
    with suppress(OSError):
        os.utime(folder)


def sha256(path: Path) -> str:
    """The hash of a file, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def temporary(cache: Path, what: str) -> Iterator[Path]:
    """A folder within the cache, from which finished things can be moved to their place; `what` is of _TEMPORARY."""
    with tempfile.TemporaryDirectory(dir=cache, prefix=what) as work:
        yield Path(work)


@contextmanager
def locked(cache: Path, report: Report) -> Iterator[None]:
    """Keep other builds away from the shared trees; the lock goes with the process, however that ends.

    What builds that were killed left behind is removed first.
    """
    lock = filelock.FileLock(cache / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report("waiting for another build to finish")
        lock.acquire()
    try:
        for folder in _folders(cache):
            if folder.name.startswith(_TEMPORARY):
                shutil.rmtree(folder, ignore_errors=True)
        yield
    finally:
        lock.release()


def _prune(cache: Path) -> None:
    """Remove wheels and tools that nobody used for long, and of each variant all but the wheels used last."""
    horizon = time.time() - _UNUSED_S
    variants: Counter[str] = Counter()
    for folder in sorted(_folders(cache / "wheels"), key=_used, reverse=True):
        variant = _variant(folder)
        variants[variant] += 1
        if variants[variant] > _KEPT or _used(folder) < horizon:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in _folders(cache / "tools"):
        if _used(folder) < horizon:
            shutil.rmtree(folder, ignore_errors=True)


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _variant(folder: Path) -> str:
    try:
        return (folder / _VARIANT).read_text(encoding="utf-8")
    except OSError:  # of an older edge_shiftkv
        return ""
