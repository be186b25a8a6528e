"""The server's paths: from HTTP to a request in the queue, and back."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from edge_shiftkv.errors import ShiftKVError
from edge_shiftkv.runtime import Runtime
from edge_shiftkv.selection.methods import METHODS
from edge_shiftkv.server.errors import ApiError, api_error, error_object
from edge_shiftkv.server.page import page
from edge_shiftkv.server.queue import Job, Queue
from edge_shiftkv.server.sessions import Sessions
from edge_shiftkv.server.settings import Settings

UPLOAD_S = 120.0
"""Seconds that a body may take to come."""

_DRAIN_S = 20.0  # and one of a request that is refused

_Work = Callable[[Runtime, dict[str, Any]], Iterable[dict[str, Any]]]
"""What is done with a body, in its turn."""

_CHUNKS = ("chat.completion.chunk",)
_NO_CACHE = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def create_app(queue: Queue, settings: Settings) -> FastAPI:
    """The ASGI application. Errors are OpenAI's error objects."""

    async def check_host(request: Request) -> None:
        if settings.loopback and not _names_loopback(request):
            name = request.headers.get("host", "")
            raise ApiError(403, f"this server answers to localhost only, not to {name[:100]!r}", "invalid_host")

    async def check_key(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        sent = given.strip().encode("latin-1")
        right = [hmac.compare_digest(sent, os.fsencode(key)) for key in settings.api_keys]
        if settings.api_keys and not (scheme.lower() == "bearer" and any(right)):
            reason = "a wrong API key" if given else "no API key: send it as Authorization: Bearer KEY"
            raise ApiError(401, reason, "invalid_api_key", None, {"www-authenticate": "Bearer"})

    app = FastAPI(title="edge_shiftkv", openapi_url=None, dependencies=[Depends(check_host)])
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    started = int(time.time())
    model = {
        **{"id": settings.model, "object": "model", "created": started, "owned_by": "edge_shiftkv"},
        **_abilities(queue.runtime),
    }
    sessions = Sessions(settings)

    async def serve(request: Request, work: _Work, end: Callable[[], object] = lambda: None) -> Response:
        job = queue.enter()
        job.on_end(end)
        try:
            body = {} if request.method == "DELETE" else await _body(request, settings.max_body)
            job.start(lambda runtime: work(runtime, body))
            return await _answer(request, job)
        except BaseException:
            job.cancel()
            raise

    def forget_later() -> None:
        forget = partial(queue.thread.submit, sessions.forget)
        asyncio.get_running_loop().call_later(settings.session_idle, forget)

    @app.get("/health")
    async def health() -> Response:
        about = {"status": "stopping" if queue.stopping else "ok", "requests": len(queue.jobs)}
        return _json(about, 503 if queue.stopping else 200)

    @v1.get("/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [model]})

    @v1.get("/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != settings.model:
            raise ApiError(404, f"the model {name!r} is not here: there is {settings.model!r}", "model_not_found")
        return _json(model)

    @v1.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await serve(request, lambda runtime, body: _chat(runtime, body, settings))

    @v1.post("/sessions")
    async def open_session(request: Request) -> Response:
        return await serve(request, lambda runtime, body: [sessions.open(runtime, body)], forget_later)

    @v1.post("/sessions/{name}/ask")
    async def ask(name: str, request: Request) -> Response:
        return await serve(request, lambda _, body: sessions.ask(name, body), forget_later)

    @v1.delete("/sessions/{name}")
    async def delete_session(name: str, request: Request) -> Response:
        return await serve(request, lambda *_: [sessions.delete(name)])

    app.include_router(v1)
    app.include_router(page(settings))
    for kind in (ApiError, ShiftKVError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _error_response)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"]
        )
    return app


def _chat(runtime: Runtime, body: dict[str, Any], settings: Settings) -> Iterable[dict[str, Any]]:
    """The answer to the body of a chat completion: one object, or chunks."""
    options = settings.completed(body)
    answer = runtime.create_chat_completion(options.pop("messages", ()), **options)
    return [answer] if isinstance(answer, dict) else answer


def _abilities(runtime: Runtime) -> dict[str, Any]:
    """What the model and its library can do, as it says itself: beside what OpenAI's API tells of a model."""
    named = (name for name, make in METHODS.items() if make() == runtime.kv_method)
    return {
        "images": runtime.engine.projector is not None,
        "kv_budget": runtime.kv_budget,
        "kv_method": next(named, None),
        "kv_methods": list(METHODS),
    }


async def _body(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object that a request brings. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # of which browsers ask before other sites' pages may send it
        raise ApiError(415, f"the body has to be application/json, not {kind[:100]!r}: set Content-Type", "not_json")
    data, n_bytes = bytearray(), 0
    try:
        with anyio.fail_after(UPLOAD_S):
            async for piece in request.stream():
                n_bytes += len(piece)
                if n_bytes <= max_bytes:
                    data += piece
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {UPLOAD_S:g} s", "upload_time") from None
    finally:
        request.state.body_awaited = True
    if n_bytes > max_bytes:
        raise ApiError(
            413, f"the body has more than {max_bytes / 2**20:g} MiB, which is this server's limit", "too_large"
        )
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", "not_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body has to be a JSON object", "not_json")
    return body


async def _answer(request: Request, job: Job) -> Response:
    """What a job gives: one object as JSON; chunks, of which it is told as they come, as events."""
    request.state.body_awaited = True  # by who watches
    watch = asyncio.create_task(_cancel_when_gone(request, job))
    job.on_end(watch.cancel)
    first = await anext(job)
    if first.get("object") in _CHUNKS:
        return StreamingResponse(_events(request, first, job), media_type="text/event-stream", headers=_NO_CACHE)
    _note(request, first)
    return _json(first)


async def _cancel_when_gone(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _events(request: Request, first: dict[str, Any], job: Job) -> AsyncIterator[bytes]:
    try:
        yield _event(first)
        async for chunk in job:
            _note(request, chunk)
            yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status is sent already
        yield _event(error_object(api_error(error)))
        if not isinstance(error, ShiftKVError | ApiError):
            raise
    finally:
        job.cancel()


async def _error_response(request: Request, error: Exception) -> Response:
    # Clients read an answer when they have sent all of the body: closing before that, it would be lost to them.
    if not getattr(request.state, "body_awaited", False):
        with anyio.move_on_after(_DRAIN_S), suppress(ClientDisconnect):
            async for _ in request.stream():
                pass
    refused = api_error(error)
    return _json(error_object(refused), refused.status, refused.headers)


def _note(request: Request, answer: dict[str, Any]) -> None:
    """Leave the figures of an answer for the log."""
    if "figures" in answer:
        request.state.figures = answer["figures"]


def _json(value: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_bytes(value), status, headers, media_type="application/json")


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _bytes(value) + b"\n\n"


def _bytes(value: dict[str, Any]) -> bytes:
    # What a client sent may come back with halves of surrogate pairs, which JSON has and UTF-8 has not.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _names_loopback(request: Request) -> bool:
    try:
        name = urllib.parse.urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
