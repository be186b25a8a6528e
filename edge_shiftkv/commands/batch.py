"""``edge-shiftkv batch``."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from edge_shiftkv.batch.jobs import JsonRows, PictureRows, Report, Stop, check_rows, run
from edge_shiftkv.batch.out_file import OutFile
from edge_shiftkv.batch.table import write_table
from edge_shiftkv.batch.worker import Answered, JobRow, Work
from edge_shiftkv.commands.settings import answers_depend_on, request_options, runtime_settings
from edge_shiftkv.errors import SettingError
from edge_shiftkv.request import Request
from edge_shiftkv.sampling import MAX_SEED

INTERRUPTED, SOME_ERRORS = 130, 3

_EVERY_S = 30.0  # between lines where there is no terminal


def main(arguments: argparse.Namespace) -> int:
    """Answer a file of requests, or pictures, into a file: 0 for all answered, 3 for some errors, 130 for Ctrl-C."""
    options = request_options(arguments)
    options["time_limit"] = arguments.row_timeout
    runtime = runtime_settings(arguments)
    Request.of(**{**options, "kv_budget": arguments.kv_budget, "kv_method": arguments.kv_method})
    if arguments.csv and arguments.csv.resolve() == arguments.out.resolve():
        raise SettingError("--csv is the same file as --out: name another one")
    rows = _rows(arguments)
    settings = {**answers_depend_on(runtime, options), "prompt": arguments.prompt}
    if arguments.seed is not None:
        settings["seed"] = arguments.seed
    keys = check_rows(islice(rows, arguments.limit))
    if arguments.heatmaps:
        _make_folder(arguments.heatmaps)
    drawn = {"seed": secrets.randbelow(MAX_SEED)}
    out = OutFile(*(arguments.out, settings, drawn), restart=arguments.restart, retry_errors=arguments.retry_errors)
    with closing(out):
        del options["seed"]
        work = Work(runtime, options, arguments.parallel, out.settings["seed"], arguments.heatmaps)
        progress = _Progress(len(keys), *out.count(keys))
        del keys
        if out.n_dropped:
            progress.note(f"{out.path}: {out.n_dropped} lines that could not be read were taken out")
        stop = Stop()
        with closing(progress), stop.counting():
            if progress.n_left:
                run(islice(rows, arguments.limit), out, work, stop, progress.report)
        out.sync(at_once=True)
        if arguments.csv:
            write_table(out.path, arguments.csv, _schema(options))
    progress.sum_up()
    if stop.n:
        return INTERRUPTED
    return SOME_ERRORS if progress.n_errors else 0


def _rows(arguments: argparse.Namespace) -> JsonRows | PictureRows:
    if bool(arguments.requests) == bool(arguments.images):
        raise SettingError("pass a file of requests, or --images with pictures")
    if arguments.images:
        if arguments.prompt is None:
            raise SettingError("--images needs a prompt: pass -p")
        if arguments.heatmaps and arguments.kv_budget is None:
            raise SettingError("heat maps show what a budget kept: pass --kv-budget, too, such as --kv-budget 1/8")
        return PictureRows(arguments.images, arguments.prompt, recursive=arguments.recursive)
    if arguments.prompt is not None or arguments.recursive:
        raise SettingError("-p and --recursive go with --images: a file's requests have their own prompts")
    return JsonRows(arguments.requests)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror or error}") from error


def _schema(options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    schema = options.get("json_schema")
    if isinstance(schema, str):
        schema = json.loads(schema)
    return schema if isinstance(schema, Mapping) else None


class _Progress:
    """Rows done, on stderr: a bar on a terminal, else a line every now and then."""

    def __init__(self, n_rows: int, n_done: int, n_errors: int) -> None:
        self.n_rows = n_rows
        self.n_done = self._n_before = n_done
        self.n_errors = n_errors
        self.report = Report(self._answered, self.note, self._idle)
        self._n_pictures = self._n_tokens = 0
        self._started = self._said = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=n_rows, initial=n_done, unit="row", dynamic_ncols=True, smoothing=0.05)

    @property
    def n_left(self) -> int:
        return self.n_rows - self.n_done

    def note(self, text: str) -> None:
        line = f"edge-shiftkv batch: {text}"
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def sum_up(self) -> None:
        before = f", {self._n_before} of them before" if self._n_before else ""
        n_answered = self.n_done - self.n_errors
        self._bar = None
        self.note(
            f"{self.n_done} of {self.n_rows} rows done{before}: {n_answered} answered, {self.n_errors} errors; "
            f"{self._rates()}; {tqdm.format_interval(self._seconds)}"
        )

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _answered(self, row: JobRow, answer: Answered) -> None:
        self.n_done += 1
        self.n_errors += answer.error is not None
        if answer.body:
            self._n_tokens += answer.body["usage"]["completion_tokens"]
            self._n_pictures += _n_pictures(row.body)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.n_errors} errors, {self._rates()}", refresh=False)
            self._bar.update()

    def _idle(self) -> None:
        if self._bar is not None or time.monotonic() - self._said < _EVERY_S:
            return
        self._said = time.monotonic()
        n_new = self.n_done - self._n_before
        left = tqdm.format_interval(self._seconds / n_new * self.n_left) if n_new else "?"
        self.note(f"{self.n_done} of {self.n_rows} rows, {self.n_errors} errors, {self._rates()}, {left} left")

    def _rates(self) -> str:
        seconds = max(self._seconds, 1e-9)
        return f"{self._n_tokens / seconds:.1f} tokens/s, {self._n_pictures / seconds * 3600:.0f} pictures/hour"


def _n_pictures(body: Any) -> int:
    contents: Sequence[Any] = [message.get("content") for message in body["messages"]]
    return sum(part["type"] == "image_url" for content in contents if isinstance(content, list) for part in content)
