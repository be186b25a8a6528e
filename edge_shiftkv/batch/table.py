"""A batch's answers as a table."""

from __future__ import annotations

import csv
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_shiftkv.batch.out_file import read_lines
from edge_shiftkv.errors import ShiftKVError


def write_table(out: Path, path: Path, schema: Mapping[str, Any] | None = None) -> None:
    """Write a CSV file of an out file's rows, in their order there; it is only moved to its place when it is complete.

    Its columns are custom_id, the answer, or with a schema its top-level properties, and the error. Objects and lists
    among them are JSON. An answer that was cut, and so is no JSON, is an error here.

    Raises ShiftKVError when it cannot be written.
    """
    names = list((schema or {}).get("properties") or ())
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with part.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["custom_id", *(names or ["answer"]), "error"])
            for _, entry in read_lines(out):
                if entry:
                    writer.writerow(_row(entry, names))
        part.replace(path)
    except OSError as error:
        raise ShiftKVError(f"{path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _row(entry: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    custom_id, error = entry["custom_id"], entry["error"]
    blank = [""] * max(1, len(names))
    if error:
        return [custom_id, *blank, f"{error['code']}: {error['message']}"]
    choice = entry["response"]["body"]["choices"][0]
    text: str = choice["message"]["content"]
    if not names:
        return [custom_id, text, ""]
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, Mapping):
        return [custom_id, *blank, f"the answer is not a whole JSON object (finish_reason {choice['finish_reason']})"]
    return [custom_id, *(_cell(answer.get(name)) for name in names), ""]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
