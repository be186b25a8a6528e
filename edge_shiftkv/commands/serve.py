"""``edge-shiftkv serve``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from edge_shiftkv._paths import models_dir
from edge_shiftkv.checks import check_number
from edge_shiftkv.commands.settings import load_runtime, request_options
from edge_shiftkv.errors import SettingError
from edge_shiftkv.request import Request
from edge_shiftkv.server.app import create_app
from edge_shiftkv.server.process import bind, is_loopback, serve
from edge_shiftkv.server.queue import Queue
from edge_shiftkv.server.settings import Settings

KEY_VARIABLE = "EDGE_SHIFTKV_API_KEY"


def main(arguments: argparse.Namespace) -> None:
    """Serve the model until SIGTERM or Ctrl-C."""
    keys = tuple(arguments.api_key or filter(None, [os.environ.get(KEY_VARIABLE)]))
    check_number("--queue", arguments.queue, 0, whole=True)
    check_number("--max-body", arguments.max_body, 0, above=True, note="MiB")
    check_number("--sessions", arguments.sessions, 1, whole=True)
    check_number("--session-idle", arguments.session_idle, 0, above=True, note="seconds")
    if not all(keys):
        raise SettingError("--api-key is empty")
    check_number("--port", arguments.port, 0, 65535, whole=True)
    defaults = request_options(arguments)
    Request.of(**{**defaults, "time_limit": arguments.time_limit})
    with bind(arguments.host, arguments.port) as listener:
        settings = Settings(
            model=arguments.hf_repo or Path(arguments.model).stem,
            defaults=defaults,
            time_limit=arguments.time_limit,
            max_body=int(arguments.max_body * 2**20),
            api_keys=keys,
            cors=tuple(arguments.cors),
            loopback=is_loopback(listener),
            sessions=arguments.sessions,
            session_idle=arguments.session_idle,
            example=_example(arguments.model),
        )
        with (
            load_runtime(arguments, keep_prompt=arguments.keep_prompt) as runtime,
            Queue(runtime, arguments.queue) as queue,
        ):
            if not settings.loopback and not keys:
                print(f"edge-shiftkv serve: whoever reaches {arguments.host} may ask: set --api-key", file=sys.stderr)
            serve(create_app(queue, settings), queue, listener, log=not arguments.quiet)


def _example(model: str | None) -> Path | None:
    """The picture that is shipped with the demo's model, if that is the one."""
    picture = models_dir() / "document.png"
    is_demo = model is not None and Path(model).resolve().parent == picture.resolve().parent
    return picture if is_demo and picture.is_file() else None
