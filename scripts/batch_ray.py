"""Answer a folder of pictures, a Parquet or a JSONL file on all machines of a Ray cluster, and go on where a run ended.

    python scripts/batch_ray.py --images /shared/scans -p "What is the total?" -o /shared/totals
        -m /models/text.gguf --mmproj /models/mmproj.gguf --kv-budget 128 --actors 10 --threads 16
    python scripts/batch_ray.py /shared/pages.parquet --image-column page --prompt-column question -o /shared/out ...
    python scripts/batch_ray.py /shared/requests.jsonl -o /shared/out ...    # OpenAI's batch format

The output is a folder of Parquet (or --jsonl) files of some rows each, in no order. A file is there when it is
complete. A run on a folder that has some leaves out the rows in them, and is refused where the answers would be others:
those of another model, or with other settings. See docs/howto/many-machines.md.

Exit status: 0 all rows are answered, 3 some are errors, 1 the run could not go on, 130 interrupted.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import logging
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
import ray
import ray.data
from filelock import FileLock, Timeout
from tqdm import tqdm

from edge_shiftkv.batch.jobs import JsonRows, PictureRows, check_rows
from edge_shiftkv.batch.worker import JobRow
from edge_shiftkv.cli import add_model, add_sampling, at_least_one
from edge_shiftkv.commands.batch import INTERRUPTED, SOME_ERRORS
from edge_shiftkv.commands.settings import answers_depend_on, request_options, runtime_settings
from edge_shiftkv.errors import PromptError, SettingError, ShiftKVError
from edge_shiftkv.native.gguf_check import check_mmproj, check_model
from edge_shiftkv.ray import ANSWER_COLUMNS, Predictor
from edge_shiftkv.request import Options, Request
from edge_shiftkv.sampling import MAX_SEED

FAILED = 1

_DEATHS = 2  # of actors at some rows, before these are done one by one


class Out:
    """A folder of answered rows, on storage that all machines have at the same place. It can be pickled.

    place: a path, or a URL that pyarrow knows, such as ``s3://bucket/answers``.
    id_column: the column whose values name rows.
    suffix: "parquet" or "jsonl".
    """

    def __init__(self, place: str, id_column: str, suffix: str) -> None:
        if "://" not in place:
            place = str(Path(place).absolute())
        self.files, self._folder = pa.fs.FileSystem.from_uri(place)
        self._id_column = id_column
        self._suffix = suffix
        self.files.create_dir(f"{self._folder}/_tries", recursive=True)

    def lock(self) -> FileLock | None:
        """The lock of a run that writes; None where the storage has none."""
        if isinstance(self.files, pa.fs.LocalFileSystem):
            return FileLock(f"{self._folder}/_lock", blocking=False)
        return None

    def write(self, rows: pa.Table) -> None:
        """Write rows into a file, which is there when it has them all. The same rows are the same file."""
        self._put(f"part-{self._name(rows)}.{self._suffix}", self._encoded(rows))

    def rows(self) -> Iterator[tuple[str, str | None]]:
        """The rows that there are: id and error."""
        for path in self._parts():
            for row in self._read(path, [self._id_column, "error"]).to_pylist():
                yield str(row[self._id_column]), row["error"]

    def drop_errors(self) -> None:
        """Take out the rows that are errors."""
        for path in self._parts():
            rows = self._read(path)
            good = rows.filter(pa.compute.is_null(rows["error"]))
            if good.num_rows < rows.num_rows:
                if good.num_rows:
                    self._put(Path(path).name, self._encoded(good))
                else:
                    self.files.delete_file(path)

    def is_begun(self) -> bool:
        """Whether there are files of answers, in whatever format."""
        return any(Path(path).name.startswith("part-") for path in self._paths())

    def settings(self) -> dict[str, Any] | None:
        """What the answers that are there were made with."""
        try:
            with self.files.open_input_stream(f"{self._folder}/_settings.json") as file:
                return dict(json.loads(file.read()))
        except FileNotFoundError:
            return None

    def keep_settings(self, settings: Mapping[str, Any]) -> None:
        self._put("_settings.json", json.dumps(settings, indent=1).encode())

    def clear(self) -> None:
        """Take away what runs that were ended left behind."""
        self.files.delete_dir_contents(f"{self._folder}/_tries")
        for path in self._paths():
            if Path(path).name.startswith("_new-"):
                self.files.delete_file(path)

    def n_tries(self, rows: pa.Table) -> int:
        """How often these rows were begun and not ended; counts this time, too."""
        name = self._name(rows)
        with self.files.open_output_stream(f"{self._folder}/_tries/{name}-{secrets.token_hex(8)}"):
            pass
        return len(self._tries(name))

    def forget_tries(self, rows: pa.Table) -> None:
        for path in self._tries(self._name(rows)):
            self.files.delete_file(path)

    def _tries(self, name: str) -> list[str]:
        return [path for path in self._paths("/_tries") if Path(path).name.startswith(f"{name}-")]

    def _name(self, rows: pa.Table) -> str:
        return hashlib.sha256(json.dumps(rows[self._id_column].to_pylist(), default=str).encode()).hexdigest()[:32]

    def _parts(self) -> list[str]:
        found = self._paths()
        return sorted(path for path in found if Path(path).match(f"part-*.{self._suffix}"))

    def _paths(self, below: str = "") -> list[str]:
        return [info.path for info in self.files.get_file_info(pa.fs.FileSelector(self._folder + below))]

    def _read(self, path: str, columns: list[str] | None = None) -> pa.Table:
        if self._suffix == "parquet":
            return pq.read_table(path, columns=columns, filesystem=self.files)
        with self.files.open_input_stream(path) as file:
            rows = [json.loads(line) for line in file.read().splitlines()]
        wanted = columns or list(rows[0])
        types = {field.name: field.type for field in ANSWER_COLUMNS}
        return pa.table({name: pa.array([row[name] for row in rows], types.get(name)) for name in wanted})

    def _encoded(self, rows: pa.Table) -> bytes:
        if self._suffix == "parquet":
            buffer = pa.BufferOutputStream()
            pq.write_table(rows, buffer)
            return bytes(buffer.getvalue())
        lines = (json.dumps(row, ensure_ascii=False, default=_written) + "\n" for row in rows.to_pylist())
        return "".join(lines).encode()

    def _put(self, name: str, data: bytes) -> None:
        new = f"{self._folder}/_new-{secrets.token_hex(8)}"
        with self.files.open_output_stream(new) as file:
            file.write(data)
        self.files.move(new, f"{self._folder}/{name}")


def _written(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


class Worker:
    """Answers rows and writes them; gives back how many there were, how many errors and tokens.

    Rows at which actors died again and again are done one by one, and one at which an actor dies then is an error.
    """

    def __init__(self, out: Out, leave_out: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._out = out
        self._leave_out = leave_out
        self._predict = Predictor(**settings)

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self._out.n_tries(rows) <= _DEATHS:
            answered = self._predict(rows)
        else:
            answered = pa.concat_tables([self._alone(rows.slice(i, 1)) for i in range(rows.num_rows)])
        self._out.write(answered.drop_columns(list(self._leave_out)))
        self._out.forget_tries(rows)
        n_errors = rows.num_rows - answered["error"].null_count
        n_tokens = sum(figures["generated_tokens"] for figures in answered["figures"].to_pylist() if figures)
        return pa.table({"rows": [rows.num_rows], "errors": [n_errors], "tokens": [n_tokens]})

    def _alone(self, row: pa.Table) -> pa.Table:
        if self._out.n_tries(row) == 1:
            answered = self._predict(row)
            self._out.forget_tries(row)
            return answered
        return self._predict.failed(row, ShiftKVError("the process that answered it ended again and again"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except ray.exceptions.RayError as error:
        ours = re.findall(r"edge_shiftkv\.errors\.\w+: (.+)", str(error))
        return _say(ours[-1] if ours else f"the cluster could not go on: {error}")
    except ShiftKVError as error:
        return _say(str(error))
    except OSError as error:
        return _say(f"{error.filename or arguments.out}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("batch_ray: interrupted; run it again to go on", file=sys.stderr)
        return INTERRUPTED


def _say(text: str) -> int:
    print(f"batch_ray: {text}", file=sys.stderr)
    return FAILED


def _run(arguments: argparse.Namespace) -> int:
    options = request_options(arguments)
    options["time_limit"] = arguments.row_timeout
    runtime = {**runtime_settings(arguments), "n_threads": arguments.threads}
    Request.of(**{**options, "kv_budget": arguments.kv_budget, "kv_method": arguments.kv_method})
    check_model(Path(runtime["model"]))  # here, where it is one line
    if runtime["mmproj"]:
        check_mmproj(Path(runtime["mmproj"]))
    source = _source(arguments)
    out = Out(arguments.out, source.id_column, "jsonl" if arguments.jsonl else "parquet")
    with ExitStack() as resources:
        if lock := out.lock():
            try:
                resources.enter_context(lock)
            except Timeout:
                raise ShiftKVError(f"{arguments.out}: another run is writing to it: wait for it") from None
        ids = source.ids()
        options["seed"] = _go_on(out, arguments, runtime, options, source)
        out.clear()
        if arguments.retry_errors:
            out.drop_errors()
        done = dict(out.rows())
        n_before = sum(name in done for name in ids)
        if n_before < len(ids):
            settings = {**source.columns, "runtime": runtime, "options": options, "n_parallel": arguments.parallel}
            _connect(arguments, source)
            every = 0.1 if sys.stderr.isatty() else 30.0
            progress = tqdm(total=len(ids), initial=n_before, unit="row", mininterval=every)
            _answer(arguments, source, out, settings, set(done), progress)
        errors = {name for name, error in out.rows() if error}
    n_errors = sum(name in errors for name in ids)
    print(f"batch_ray: {len(ids)} rows, {n_before} of them before; {n_errors} are errors", file=sys.stderr)
    return SOME_ERRORS if n_errors else 0


def _go_on(out: Out, arguments: argparse.Namespace, runtime: Mapping[str, Any], options: Options, source: Rows) -> int:
    """Check that the answers that are there are like those that are to come; return the seed of both."""
    settings = {
        **answers_depend_on(runtime, options),
        **source.columns,
        "prompt": arguments.prompt,
        "format": "jsonl" if arguments.jsonl else "parquet",
    }
    before = out.settings()
    if before is None:
        if out.is_begun():
            raise SettingError(f"{arguments.out} has answers, but not what they were made with: name another folder")
        seed = secrets.randbelow(MAX_SEED) if arguments.seed is None else arguments.seed
        out.keep_settings({**settings, "seed": seed})
        return int(seed)
    if arguments.seed is not None:
        settings["seed"] = arguments.seed
    if others := [name for name, value in settings.items() if before.get(name) != value]:
        raise SettingError(
            f"{arguments.out} was begun with other settings ({', '.join(others)}): use the same ones, or name another "
            "folder"
        )
    return int(before["seed"])


def _connect(arguments: argparse.Namespace, source: Rows) -> None:
    """Join the cluster, or begin one. Raises SettingError where it is too small: a run would wait forever."""
    if not ray.is_initialized():
        ray.init(address=arguments.address, log_to_driver=False, logging_level=logging.WARNING)
    logger = logging.getLogger("ray.data")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if handler.name == "console":  # Ray's own
            handler.addFilter(_is_no_error)
    ray.data.DataContext.get_current().enable_progress_bars = False
    there = ray.cluster_resources()
    for name, each, more in (("CPU", arguments.threads, source.n_cpus), ("GPU", arguments.gpus, 0)):
        needed = arguments.actors * each + more
        if there.get(name, 0) < needed:
            reads = ", with one that reads the file" if more else ""
            raise SettingError(
                f"--actors {arguments.actors} need {needed:g} {name}s{reads}: the cluster has {there.get(name, 0):g}"
            )


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR  # what ends the run is told once, by `main`


def _answer(
    arguments: argparse.Namespace,
    source: Rows,
    out: Out,
    settings: Mapping[str, Any],
    done: set[str],
    progress: tqdm[Any],
) -> None:
    """Have all rows answered that are not done."""
    counts = source.dataset(done, arguments.rows_per_file).map_batches(
        Worker,
        fn_constructor_args=[out, source.leave_out, settings],
        batch_format="pyarrow",
        batch_size=arguments.rows_per_file,
        compute=ray.data.ActorPoolStrategy(size=arguments.actors),
        num_cpus=arguments.threads,
        num_gpus=arguments.gpus,
    )
    n_errors = n_tokens = 0
    with progress:
        for count in counts.iter_rows():
            n_errors += count["errors"]
            n_tokens += count["tokens"]
            progress.set_postfix_str(f"{n_errors} errors, {n_tokens} tokens", refresh=False)
            progress.update(count["rows"])


class Source:
    """Rows that are known before the run, with their bodies."""

    n_cpus = 0
    id_column = "custom_id"
    columns: Mapping[str, Any] = {"body_column": "body", "id_column": "custom_id"}
    leave_out = ("body",)

    def __init__(self, rows: Iterable[JobRow]) -> None:
        check_rows(rows)
        try:
            self._rows = pa.Table.from_pylist(
                [{"custom_id": row.custom_id, "body": json.dumps(row.body)} for row in rows], _ROW
            )
        except UnicodeEncodeError as error:
            raise PromptError(f"{error.object!r:.200} is not UTF-8, as names of rows have to be") from error

    def ids(self) -> list[str]:
        """The names of all rows."""
        return [str(name) for name in self._rows[self.id_column].to_pylist()]

    def dataset(self, done: set[str], n_rows: int) -> ray.data.Dataset:
        """The rows that are not done, in blocks of `n_rows`."""
        rows = without(self._rows, self.id_column, done)
        return ray.data.from_arrow([rows.slice(i, n_rows) for i in range(0, rows.num_rows, n_rows)])


_ROW = pa.schema([("custom_id", pa.string()), ("body", pa.string())])


class ParquetSource:
    """Rows that Ray reads, as pictures may be in them."""

    n_cpus = 1  # that reads
    leave_out = ()

    def __init__(self, path: str, id_column: str, columns: dict[str, Any]) -> None:
        self.id_column = id_column
        self.columns = {**columns, "id_column": id_column}
        self._path = path

    def ids(self) -> list[str]:
        """The names of all rows. Raises PromptError for no such file, and for a name that is there twice."""
        try:
            table = pyarrow.dataset.dataset(self._path, format="parquet").to_table([self.id_column])
        except pa.ArrowException as error:
            raise PromptError(f"{self._path}: {str(error).splitlines()[0]}") from error
        ids = [str(value) for value in table[self.id_column].to_pylist()]
        if len(set(ids)) < len(ids):
            name = Counter(ids).most_common(1)[0][0]
            raise PromptError(f"{self._path}: {self.id_column} {name!r:.200} is there twice: give each row its own")
        return ids

    def dataset(self, done: set[str], n_rows: int) -> ray.data.Dataset:
        rows = ray.data.read_parquet(self._path)
        if done:
            rows = rows.map_batches(partial(without, id_column=self.id_column, done=done), batch_format="pyarrow")
        return rows.repartition(target_num_rows_per_block=n_rows)


Rows = Source | ParquetSource


def without(rows: pa.Table, id_column: str, done: set[str]) -> pa.Table:
    """The rows that are not done."""
    return rows.filter(pa.array([str(value) not in done for value in rows[id_column].to_pylist()], pa.bool_()))


def _source(arguments: argparse.Namespace) -> Rows:
    if bool(arguments.rows) == bool(arguments.images):
        raise SettingError("pass a file of rows, or --images with a folder of pictures")
    if arguments.images:
        if arguments.prompt is None:
            raise SettingError("--images needs a prompt: pass -p")
        return Source(PictureRows(arguments.images, arguments.prompt, recursive=arguments.recursive))
    if Path(arguments.rows).suffix == ".jsonl":
        if arguments.prompt is not None:
            raise SettingError("the requests of a JSONL file have their own prompts: -p is for others")
        return Source(JsonRows(Path(arguments.rows)))
    columns = {name: getattr(arguments, name) for name in ("prompt", "prompt_column", "image_column", "body_column")}
    return ParquetSource(arguments.rows, arguments.id_column, columns)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", metavar="FILE", help="rows: Parquet, or .jsonl in OpenAI's batch format")
    parser.add_argument(
        "--images", nargs="+", metavar="PICTURE", help="pictures, folders, or patterns such as 'scans/*.png'; with -p"
    )
    parser.add_argument("--recursive", action="store_true", help="take what is in folders below folders, too")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="what is asked in each row")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="answers; what is there is gone on with")
    parser.add_argument("--jsonl", action="store_true", help="write JSONL in place of Parquet")
    group = parser.add_argument_group("columns of Parquet files")
    group.add_argument("--id-column", default="id", metavar="NAME", help="what names rows (default: id)")
    group.add_argument("--prompt-column", metavar="NAME", help="what is asked")
    group.add_argument("--image-column", metavar="NAME", help="the picture: a path, its bytes, or a list of these")
    group.add_argument("--body-column", metavar="NAME", help="bodies of OpenAI's chat API")
    add_model(parser)
    parser.set_defaults(threads=1)
    add_sampling(parser)
    group = parser.add_argument_group("cluster")
    group.add_argument("--address", metavar="HOST:PORT", help="of Ray's head (default: this machine's cluster, if any)")
    group.add_argument(
        "--actors", type=at_least_one, required=True, metavar="N", help="copies of the model, --threads each"
    )
    group.add_argument("--gpus", type=float, default=0.0, metavar="N", help="GPUs of each (default: 0)")
    group.add_argument(
        "--parallel", type=at_least_one, default=8, metavar="N", help="answers that each writes at a time"
    )
    group.add_argument(
        "--rows-per-file",
        type=at_least_one,
        default=64,
        metavar="N",
        help="rows that are given out and written together",
    )
    group.add_argument("--row-timeout", type=float, metavar="SECONDS", help="a row that takes longer is an error")
    group.add_argument("--retry-errors", action="store_true", help="do the rows again that are errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
