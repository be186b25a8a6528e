"""``edge-shiftkv serve`` as a process of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# An answer of 900 tokens then takes longer than any test waits; and nobody waits for a body.
_SLOWLY = """
import time
import edge_shiftkv.server.app as app
app.UPLOAD_S = 2.0
from edge_shiftkv.engine.slot import Slot
advance = Slot.advance
Slot.advance = lambda *arguments: (time.sleep(0.1), advance(*arguments))[1]
"""
_COMMAND = "import sys; from edge_shiftkv.cli import main; sys.exit(main(sys.argv[1:]))"


class Server:
    """A running server.

    url: what OpenAI clients call its base URL.
    """

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self._log = log
        self.port = int(url.rsplit(":")[-1].partition("/")[0])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def send(self, body: object, path: str = "/v1/chat/completions", **headers: str) -> socket.socket:
        """Post a body, and return the socket that the answer comes from."""
        return self.raw("POST", path, json.dumps(body).encode(), **{"Content-Type": "application/json", **headers})

    def raw(self, method: str, path: str, data: bytes = b"", **headers: object) -> socket.socket:
        lines = {"Host": f"127.0.0.1:{self.port}", "Content-Length": len(data), "Connection": "close"}
        lines |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        connection = self.connect()
        connection.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        return connection

    def holds(self, n_requests: int) -> None:
        """Wait until it has so many requests."""
        while json.loads(answer(self.raw("GET", "/health"))[2])["requests"] != n_requests:
            assert self.process.poll() is None, self.log()

    def log(self, n_lines: int = 0) -> list[str]:
        """The log's lines, when there are so many."""
        while len(lines := self._log.read_text().splitlines()) < n_lines:
            assert self.process.poll() is None, lines
        return lines

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read all of an answer to ``Connection: close``: status, headers, body without its transfer coding."""
    with connection:
        data = b""
        while piece := connection.recv(1 << 16):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        rest, body = body, b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
    return int(first.split()[1]), headers, body


def error(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and error object of an answer."""
    status, _, body = answer(connection)
    return status, json.loads(body)["error"]


@contextmanager
def serving(*arguments: object, slowly: bool = False) -> Iterator[Server]:
    """Run ``edge-shiftkv serve`` on a free port."""
    code = _SLOWLY + _COMMAND if slowly else _COMMAND
    command = [sys.executable, "-c", code, "serve", "--threads", "1", "--port", "0", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("w") as err:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
        watchdog = threading.Timer(600, process.kill)
        watchdog.start()
        try:
            ready = process.stdout.readline() if process.stdout else ""
            assert ready.startswith("listening on "), log.read_text()
            yield Server(process, ready.split()[-1], log)
        finally:
            watchdog.cancel()
            process.kill()
            process.communicate()
