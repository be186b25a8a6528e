"""The server as a process: its socket, its end by signals, its log."""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_shiftkv.errors import SettingError
from edge_shiftkv.server.queue import Queue


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet. Raises SettingError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise SettingError(
            f"cannot serve at {host}, port {port}: {reason}; choose others with --host, --port"
        ) from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def url(listener: socket.socket) -> str:
    """The address of the page; with ``v1`` behind it, the base URL for OpenAI clients."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(app: FastAPI, queue: Queue, listener: socket.socket, *, log: bool) -> None:
    """Serve until SIGTERM or Ctrl-C: then what is being answered is finished; a second one ends at once.

    Lines with the addresses on stdout say that it is up. log: whether a line on stderr tells of each request.
    """
    config = uvicorn.Config(
        Log(app) if log else app,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
    )
    _Server(config, queue).run([listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, queue: Queue) -> None:
        super().__init__(config)
        self._queue = queue

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            print(f"listening on {url(listener)}v1\na page to try it: {url(listener)}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._queue.stop()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own has the process end by the signal in the end, not with status 0.
        if self.should_exit:  # whose connection is gone is not answered on
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        self.should_exit = True


class Log:
    """An ASGI application that tells of another's requests on stderr: method, path, status, tokens, seconds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        status, complete = 500, False
        state: dict[str, Any] = scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            complete = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            figures = state.get("figures")
            tokens = f" {figures['prompt_tokens']}+{figures['generated_tokens']} tokens" if figures else ""
            path = "".join(letter if letter.isprintable() else "?" for letter in scope["path"])
            print(
                f"{scope['method']} {path} {status if complete else 499}{tokens} {time.monotonic() - started:.2f} s",
                file=sys.stderr,
            )
