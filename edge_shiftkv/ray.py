"""Rows of Ray Data, answered on as many machines as a cluster has: a class for `ray.data.Dataset.map_batches`.

Ray distributes rows and results, and starts again what died; here is what an actor does with the rows that it gets.
Needs ``pip install "edge-shiftkv[ray]"``.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

try:
    import pyarrow as pa
    import ray
except ImportError as error:
    raise ImportError(f'this module needs Ray: pip install "edge-shiftkv[ray]" ({error})') from error

from edge_shiftkv.batch.rows import filled_in, row_seed
from edge_shiftkv.errors import PromptError, SettingError, ShiftKVError
from edge_shiftkv.request import Options
from edge_shiftkv.results import Completion, Figures
from edge_shiftkv.runtime import Runtime

_KINDS = {"float": pa.float64(), "str": pa.string()}

_FIGURES = pa.struct(
    [
        (field.name, next((kind for name, kind in _KINDS.items() if name in str(field.type)), pa.int64()))
        for field in dataclasses.fields(Figures)
        if field.name != "draft"
    ]
)

ANSWER_COLUMNS = pa.schema(
    [("answer", pa.string()), ("finish_reason", pa.string()), ("error", pa.string()), ("figures", _FIGURES)]
)
"""What rows have after they were answered, beside what they came with."""


class Predictor:
    """Loads a model once and answers batches of rows: for `map_batches` with ``batch_format="pyarrow"``.

    A row goes out with the columns that it came with and those of ANSWER_COLUMNS: `answer` and `finish_reason`, null
    where there is no answer; `error`, the name of an error of `edge_shiftkv.errors` and what it says, null where there
    is an answer; and `figures`, the fields of `Figures`. What is wrong with a row is its own error.

    What is asked comes from one of `prompt`, `prompt_column` and `body_column`.

    runtime: what `Runtime` is made with, by name. Where it has no n_threads, they are the CPUs that Ray gave the actor.
    prompt: what is asked in each row.
    prompt_column: the column with what is asked.
    image_column: the column with the picture: a path or URL, a file's bytes, a struct of ``bytes`` and ``path`` as in
        datasets of Hugging Face, a list of these for several pictures, or null for none. Bytes do not go out again.
    keep_bytes: have them go out.
    body_column: the column with a body of OpenAI's chat API: JSON text, or a struct, in which null is as good as
        nothing.
    id_column: a column with a value of its own in each row. A row's seed then follows from that value and the seed in
        `options`, if there is one: done again, it draws the same.
    options: those of rows that do not say otherwise.
    n_parallel: answers written at a time; batches should have several times as many rows.

    Raises SettingError for settings that do not go together, and what `Runtime` raises.

    Example::

        dataset.map_batches(
            Predictor,
            fn_constructor_kwargs={
                "runtime": {"model": "text.gguf", "mmproj": "mmproj.gguf", "kv_budget": 128},
                "prompt": "What is the total?",
                "image_column": "path",
            },
            batch_format="pyarrow",
            batch_size=64,
            compute=ray.data.ActorPoolStrategy(size=10),
            num_cpus=16,
        )
    """

    def __init__(
        self,
        runtime: Mapping[str, Any],
        *,
        prompt: str | None = None,
        prompt_column: str | None = None,
        image_column: str | None = None,
        keep_bytes: bool = False,
        body_column: str | None = None,
        id_column: str | None = None,
        options: Options | None = None,
        n_parallel: int = 8,
    ) -> None:
        if sum(source is not None for source in (prompt, prompt_column, body_column)) != 1:
            raise SettingError("what is asked is not clear: pass one of prompt, prompt_column and body_column")
        if body_column and image_column:
            raise SettingError("bodies have their pictures in them: pass no image_column")
        self._prompt = prompt
        self._prompt_column = prompt_column
        self._image_column = image_column
        self._keep_bytes = keep_bytes
        self._body_column = body_column
        self._id_column = id_column
        self._options = options or Options()
        self._n_parallel = n_parallel
        self._runtime = Runtime(**{"n_threads": _cpus(), **runtime})

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer a batch of rows, in their order.

        Raises SettingError for a batch without a column that it should have, or with one that is made here.
        """
        self._check(batch)
        errors: list[ShiftKVError | None] = [None] * batch.num_rows
        answers: list[Completion | None] = [None] * batch.num_rows
        places, requests = [], []
        for place, row in enumerate(batch.select(self._columns).to_pylist()):
            try:
                requests.append(self._request(row))
                places.append(place)
            except ShiftKVError as error:
                errors[place] = error
        with self._runtime.generate_many(requests, n_parallel=self._n_parallel, ordered=False, **self._options) as many:
            for result in many:
                place = places[result.index]
                answers[place], errors[place] = result.completion, result.error
        return self._with(batch, answers, errors)

    def failed(self, batch: pa.Table, error: ShiftKVError) -> pa.Table:
        """The batch as it is when each of its rows is an error."""
        return self._with(batch, [None] * batch.num_rows, [error] * batch.num_rows)

    def _with(
        self, batch: pa.Table, answers: Sequence[Completion | None], errors: Sequence[ShiftKVError | None]
    ) -> pa.Table:
        if self._image_column and not self._keep_bytes and _has_bytes(batch.schema.field(self._image_column).type):
            batch = batch.drop_columns([self._image_column])
        columns = {
            "answer": [answer and answer.text for answer in answers],
            "finish_reason": [answer and answer.finish_reason for answer in answers],
            "error": [error and f"{type(error).__name__}: {error}" for error in errors],
            "figures": [answer and answer.figures.as_dict() for answer in answers],
        }
        for field in ANSWER_COLUMNS:
            batch = batch.append_column(field, pa.array(columns[field.name], field.type))
        return batch

    @property
    def _columns(self) -> list[str]:
        named = (self._prompt_column, self._image_column, self._body_column, self._id_column)
        return [name for name in named if name is not None]

    def _check(self, batch: Any) -> None:
        if not isinstance(batch, pa.Table):
            raise SettingError('batches are Arrow tables here: pass batch_format="pyarrow" to map_batches')
        there = ", ".join(batch.column_names)
        for name in self._columns:
            if name not in batch.column_names:
                raise SettingError(f"there is no column {name!r}: there are {there}")
        for name in ANSWER_COLUMNS.names:
            if name in batch.column_names:
                raise SettingError(f"there is a column {name!r} before the answers are: rename it")

    def _request(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What `Runtime.generate_many` takes. Raises ShiftKVError."""
        if self._body_column:
            request = _body(row[self._body_column])
        else:
            prompt = row[self._prompt_column] if self._prompt_column else self._prompt
            pictures = row[self._image_column] if self._image_column else None
            pictures = pictures if isinstance(pictures, list) else [] if pictures is None else [pictures]
            request = {"prompt": prompt, "images": [_picture(picture) for picture in pictures]}
        seed = self._options.get("seed")
        if self._id_column and seed is not None and seed != -1:
            request = {"seed": row_seed(seed, str(row[self._id_column])), **request}
        return request


def _cpus() -> int | None:
    """The CPUs that Ray gave this actor; None outside of one."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return None if context.get_actor_id() is None else int(context.get_assigned_resources().get("CPU", 0)) or 1


def _body(value: Any) -> dict[str, Any]:
    """A body, so that it goes before the options of all rows where it says something. Raises PromptError."""
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"the body is not JSON: {error}") from error
    else:
        value = _without_null(value)
    if not isinstance(value, Mapping):
        raise PromptError(f"the body is not a JSON object but {value!r}"[:200])
    if "messages" not in value:
        raise PromptError("the body has no messages")
    return filled_in(value)


def _without_null(value: Any) -> Any:
    """Without the fields that Arrow gives each struct of a column that has them in one."""
    if isinstance(value, Mapping):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_without_null(item) for item in value]
    return value


def _picture(value: Any) -> Any:
    """A path or URL; bytes are a ``data:`` URL, so that they are loaded when it is their turn."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return f"data:image/*;base64,{base64.b64encode(value).decode()}"
    return value


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _has_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_has_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
