"""The server's own web page: its files, and what it has to know before it may ask."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter, Response

from edge_shiftkv.server.errors import ApiError
from edge_shiftkv.server.settings import Settings

_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_HEADERS = {
    # Nothing from elsewhere, nothing inline, in nobody's frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def page(settings: Settings) -> APIRouter:
    """``/`` and what belongs to it; none of it needs a key."""
    router = APIRouter()
    folder = files("edge_shiftkv.server") / "web"

    for name, kind in _TYPES.items():
        path = "/" if name == "index.html" else f"/{name}"
        router.add_api_route(path, _sends((folder / name).read_bytes(), kind), methods=["GET"])

    @router.get("/page.json")
    async def about() -> Response:
        about = {"api_key": bool(settings.api_keys), "example": settings.example is not None}
        return Response(json.dumps(about), headers=_HEADERS, media_type="application/json")

    @router.get("/example.png")
    async def example() -> Response:
        if settings.example is None:
            raise ApiError(404, "there is no example for this model")
        return Response(settings.example.read_bytes(), headers=_HEADERS, media_type="image/png")

    return router


def _sends(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return send
