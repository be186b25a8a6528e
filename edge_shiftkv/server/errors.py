"""What went wrong, as OpenAI's API says it: a status, and an error object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from edge_shiftkv.errors import (
    CancelledError,
    ContextOverflowError,
    ImageError,
    PromptError,
    SettingError,
    ShiftKVError,
    TimeLimitError,
)

_RETRY_AFTER_S = 2
_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients go by it; they would try again after 408


@dataclass
class ApiError(Exception):
    """A request that is refused for what it is as HTTP, or because of the server's state."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


class FullError(ApiError):
    """No place is free."""

    def __init__(self, n_waiting: int) -> None:
        message = f"{n_waiting} requests wait already: try again later, or start the server with a larger --queue"
        super().__init__(503, message, "queue_full", None, {"retry-after": str(_RETRY_AFTER_S)})


class StoppingError(ApiError):
    """The server is about to end."""

    def __init__(self) -> None:
        super().__init__(503, "the server is stopping", "stopping", None, {"retry-after": str(_RETRY_AFTER_S)})


def api_error(error: Exception) -> ApiError:
    """The status and code for any error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers or {})
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client is gone", "cancelled")
    if not isinstance(error, ShiftKVError):
        return ApiError(500, "the server failed; its log says more", "internal_error")
    for kind, status, code, param in (
        (ContextOverflowError, 400, "context_length_exceeded", "messages"),
        (ImageError, 400, "invalid_image", "messages"),
        (PromptError, 400, "invalid_prompt", "messages"),
        (SettingError, 400, "invalid_value", None),
        (TimeLimitError, 408, "time_limit", None),
        (CancelledError, 499, "cancelled", None),
    ):
        if isinstance(error, kind):
            return ApiError(status, str(error), code, param, _NO_RETRY)
    return ApiError(500, str(error))


def error_object(refused: ApiError) -> dict[str, Any]:
    """``{"error": {...}}`` as OpenAI's API has it."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}
