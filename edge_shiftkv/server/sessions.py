"""Sessions over HTTP: pictures and text that are read once and asked about again and again."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from edge_shiftkv import chat_schema
from edge_shiftkv.checks import unknown_option
from edge_shiftkv.errors import ImageError, PromptError, SettingError
from edge_shiftkv.prompts.images import MAX_PIXELS, load_image
from edge_shiftkv.runtime import Runtime
from edge_shiftkv.selection.heatmap import patch_maps
from edge_shiftkv.selection.results import Selection
from edge_shiftkv.server.errors import ApiError
from edge_shiftkv.server.settings import Settings
from edge_shiftkv.session import Session

_OPTIONS = ("images", "text", "system", "kv_budget", "kv_method", "time_limit")


@dataclass
class _Open:
    session: Session
    sizes: list[tuple[int, int]]  # of its pictures
    used: float


class Sessions:
    """The sessions that are open. To be used in the runtime's thread only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open: OrderedDict[str, _Open] = OrderedDict()  # the one used last at its end

    def open(self, runtime: Runtime, body: Mapping[str, Any]) -> dict[str, Any]:
        """Read what a request brings, and tell the session's name and what reading took.

        Raises what `Runtime.session` does, and SettingError for what there is not.
        """
        if unknown := [name for name in body if name not in _OPTIONS]:
            raise SettingError(unknown_option(unknown[0], _OPTIONS)[:1000])
        started = time.perf_counter()
        text, system = (_text(name, body.get(name)) for name in ("text", "system"))
        images = _pictures(body.get("images"))
        if not images and not text.strip():
            raise PromptError("there is nothing to read: send images, text or both")
        options: dict[str, Any] = {name: body[name] for name in ("kv_budget",) if name in body}
        self.forget(most=self._settings.sessions - 1)
        session = runtime.session(
            *(text, images),
            system=system,
            kv_method=body.get("kv_method"),
            time_limit=self._settings.limited(body.get("time_limit")),
            **options,
        )
        name = secrets.token_urlsafe(16)
        self._open[name] = _Open(session, [image.size for image in images], time.monotonic())
        return {
            "id": name,
            "object": "session",
            "prompt_tokens": session.n_tokens,
            "kv_bytes": session.kv_bytes,
            "read_s": time.perf_counter() - started,
            "images": [{"width": image.width, "height": image.height} for image in images],
        }

    def ask(self, name: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The answer to a question: a chat completion, or its chunks, and the map of what was kept for it.

        Raises what `Session.ask` does, PromptError without a question, and ApiError where there is no such session.
        """
        given = self._settings.completed(body)
        if "messages" in given:
            raise SettingError("a session has its own messages: send a question")
        question = _text("question", given.pop("question", None))
        if not question.strip():
            raise PromptError("the question is empty")
        # The options are those of a chat completion.
        asked = chat_schema.read_body({**given, "messages": [{"role": "user", "content": question}]})
        model = asked.model or self._settings.model
        opened = self._find(name)
        try:
            answer = opened.session.stream(question, **asked.options)
            if asked.stream:
                chunks = chat_schema.chunks(answer, model, include_usage=asked.include_usage)
                yield next(chunks)  # the role, before anything is read
                yield {**next(chunks), "kept": _kept(answer.selection, opened.sizes)}
                yield from chunks
            else:
                for _ in answer:
                    pass
                whole = chat_schema.completion(answer.completion, model)
                yield {**whole, "kept": _kept(answer.selection, opened.sizes)}
        finally:
            opened.used = time.monotonic()

    def delete(self, name: str) -> dict[str, Any]:
        """Close a session. Raises ApiError where there is none of that name."""
        self._find(name).session.close()
        del self._open[name]
        return {"id": name, "object": "session", "deleted": True}

    def forget(self, most: int | None = None) -> None:
        """Close what was not used for long; `most`: and the others, but for the last so many."""
        oldest = time.monotonic() - self._settings.session_idle
        for name, opened in list(self._open.items()):
            if opened.used <= oldest or (most is not None and len(self._open) > most):
                self.delete(name)

    def _find(self, name: str) -> _Open:
        opened = self._open.get(name)
        if opened is None:
            raise ApiError(
                *(404, "this session is not open any more: it was deleted, made way for another, or was not used"),
                code="session_not_found",
            )
        self._open.move_to_end(name)
        return opened


def _text(name: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise SettingError(f"{name} is {value!r}: it has to be text"[:1000])
    return value or ""


def _pictures(sources: Any) -> list[Image.Image]:
    """The pictures of a session, which it holds: all of them together have no more pixels than one may have."""
    if sources is not None and not isinstance(sources, list):
        raise SettingError(f"images is {sources!r:.200}: it has to be a list of data: URLs")
    images: list[Image.Image] = []
    for source in sources or ():
        if not isinstance(source, str) or not source[:5].lower() == "data:":
            raise ImageError(f"{source!r:.100}: a session takes pictures as data: URLs, and no other")
        images.append(load_image(source, image_root=False))
        if sum(image.width * image.height for image in images) > MAX_PIXELS:
            raise ImageError(f"the pictures have more than {MAX_PIXELS // 1_000_000} million pixels together")
    return images


def _kept(selection: Selection | None, sizes: list[tuple[int, int]]) -> dict[str, Any] | None:
    """What was kept, in all and of each patch, for JSON; None where nothing was cut."""
    if selection is None:
        return None
    maps = patch_maps(selection, sizes) if sizes else []
    return {
        "prompt_tokens": selection.n_prompt,
        "kept_tokens": selection.n_kept,
        "heads": selection.n_heads,
        "maps": [
            {"image": one.image, "part": one.part, "padded": one.padded, "counts": one.counts.tolist()} for one in maps
        ],
    }
