"""Sessions in files.

A file has a first line that names the format, a line of JSON that describes what follows, what llama.cpp saves of a KV
cache, and a sha256 of it all. It is written beside its place and moved there when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from edge_shiftkv.engine.engine import Engine
from edge_shiftkv.engine.prefilled import Held
from edge_shiftkv.errors import SessionError
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.prompts.prompt import Head
from edge_shiftkv.selection.results import ImageSpan

_MAGIC = b"edge_shiftkv session 1\n"
_HASH_BYTES = 32


@dataclass(frozen=True)
class Saved:
    """What a file has.

    about: the session's messages; pictures in them are stand-ins.
    state: what llama.cpp saved.
    """

    about: list[Message]
    held: Held
    head: Head
    state: bytes
    is_cut: bool


def write(
    path: Path, engine: Engine, about: Sequence[Message], held: Held, head: Head, state: bytes, *, is_cut: bool
) -> None:
    """Write a session. Raises SessionError when that fails; there is then no file, or the one that was there before."""
    header = {
        **_made_for(engine),
        "is_cut": is_cut,
        "about": [{"role": message.role, "content": [_part(part) for part in message.content]} for message in about],
        "items": held.items,
        "after": held.after,
        "image_spans": [[span.image, span.start, span.stop, span.nx, span.ny] for span in held.image_spans],
        "n_dropped": held.n_dropped,
        "n_head": len(head.items),
        "state_bytes": len(state),
    }
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    digest = hashlib.sha256()
    try:
        with part.open("xb") as file:
            for data in (_MAGIC, json.dumps(header, separators=(",", ":")).encode() + b"\n", state):
                digest.update(data)
                file.write(data)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SessionError(f"{path}: {error.strerror or error}") from error


def is_session(path: Path) -> bool:
    """Whether a file begins as a session does."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read(path: Path, engine: Engine) -> Saved:
    """Read a session for an engine. Raises SessionError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SessionError(f"{path}: {error.strerror or error}") from error
    if not data.startswith(_MAGIC):
        kind = "of another version" if data.startswith(_MAGIC[:20]) else "not a session file"
        raise SessionError(f"{path}: {kind}")
    body, digest = data[:-_HASH_BYTES], data[-_HASH_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise SessionError(f"{path}: the file is incomplete or was altered; save the session again")
    line, _, state = body[len(_MAGIC) :].partition(b"\n")
    try:
        return _saved(path, json.loads(line), state, engine)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SessionError(f"{path}: the file is damaged: {error!r}") from error


def _saved(path: Path, header: dict[str, Any], state: bytes, engine: Engine) -> Saved:
    for key, value in _made_for(engine).items():
        if header[key] != value:
            raise SessionError(f"{path}: saved with another {_NAMES[key]}; load it with the one it was saved with")
    items = tuple(header["items"])
    spans = tuple(ImageSpan(*span) for span in header["image_spans"])
    after = tuple((n_tokens, position) for n_tokens, position in header["after"])
    n_head = header["n_head"]
    return Saved(
        [Message(message["role"], tuple(map(_unpart, message["content"]))) for message in header["about"]],
        Held(items, after, spans, header["n_dropped"]),
        Head(items[:n_head], after[n_head - 1][0], spans) if n_head else Head(),
        state,
        header["is_cut"],
    )


_NAMES = {
    "model": "model",
    "mmproj": "mmproj",
    "type_k": "type of keys (type_k)",
    "type_v": "type of values (type_v)",
    "template": "chat template",
}


def _made_for(engine: Engine) -> dict[str, str | None]:
    """What a KV cache is only good for."""
    return {
        "model": file_hash(engine.path),
        "mmproj": file_hash(engine.mmproj_path) if engine.mmproj_path else None,
        "type_k": engine.type_k,
        "type_v": engine.type_v,
        "template": hashlib.sha256((engine.model.chat_template or "").encode()).hexdigest(),
    }


def file_hash(path: Path) -> str:
    """The sha256 of a file, which is computed again only when its size or its time of change is another."""
    status = path.stat()
    return _file_hash(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=32)
def _file_hash(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _part(part: str | Image.Image) -> dict[str, str]:
    # Pictures are told apart by the items.
    return {"text": part} if isinstance(part, str) else {}


def _unpart(part: dict[str, str]) -> str | Image.Image:
    return part["text"] if "text" in part else Image.new("RGB", (1, 1))
