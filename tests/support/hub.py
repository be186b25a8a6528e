"""A stand-in for the Hugging Face hub: an HTTP server that answers what huggingface_hub asks of a model's files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it has, and what it was asked.

    models: "user/model" -> path in the repository -> file.
    gated: those whose files are not given.
    downloads: files of which bytes were sent.
    """

    url: str
    models: dict[str, dict[str, Path]]
    gated: set[str] = field(default_factory=set)
    downloads: list[str] = field(default_factory=list)


@contextmanager
def serving(models: dict[str, dict[str, Path]]) -> Iterator[Hub]:
    """Serve models on a port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", models)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._info(hub, match[1])
        elif match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/(?:main|{COMMIT})/(.+)", path):
            self._resolve(hub, match[1], match[2])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._file(hub, match[1], match[2])
        else:
            self._send(404, b"no such address")

    def _info(self, hub: Hub, repo: str) -> None:
        if repo not in hub.models:
            self._send(401, b'{"error": "Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [{"rfilename": name} for name in hub.models[repo]]
        body = {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": siblings}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, hub: Hub, repo: str, name: str) -> None:
        if repo in hub.gated:
            self._send(403, b"ask for access", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif name not in hub.models.get(repo, {}):
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            data = hub.models[repo][name].read_bytes()
            headers = {
                # Another host, as it is there.
                "Location": f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{repo}/{name}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(data)),
                "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            }
            self._send(302, b"", headers)

    def _file(self, hub: Hub, repo: str, name: str) -> None:
        data = hub.models[repo][name].read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, n = 200, len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or n - 1)
            data = data[first : last + 1]
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{n}"
        if self.command == "GET":
            hub.downloads.append(name)
        self._send(status, data, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
