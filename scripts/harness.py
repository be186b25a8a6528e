"""What the benches share: options, prompts, models, rounds, processes, and tables and files of figures.

Nothing here needs the patched library: bench_pass.py measures the stock one, too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import synthetic_gguf

from edge_shiftkv.build import default_cache_dir

if TYPE_CHECKING:
    from typing_extensions import Self

    from edge_shiftkv.native.llama import Model

MIB = 1 << 20

Row = dict[str, Any]
"""A table's row by heading; `ROUNDS`, which is not printed, has the single measurements."""

ROUNDS = "rounds"

Item = TypeVar("Item")

_N_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

_OPTIONS: dict[str, dict[str, Any]] = {
    "--budget": {"type": int, "default": 256, "help": "KV pairs kept per layer and KV head (%(default)s)"},
    "--cpu-time": {
        "dest": "clock",
        "action": "store_const",
        "const": time.process_time,
        "default": time.perf_counter,
        "help": "measure CPU time of one thread, not wall time",
    },
    "--gpu-layers": {"type": int, "default": 0, "help": "layers on the GPU (%(default)s)"},
    "--json": {"type": Path, "metavar": "FILE", "help": "write all single measurements there, as they come"},
    "--mmproj": {"type": Path, "metavar": "GGUF", "help": "the model's vision encoder and projector"},
    "--rounds": {"type": int, "default": 3, "help": "measurements of each (%(default)s)"},
    "--stock": {"type": Path, "metavar": "FOLDER", "help": "the stock library's files, to compare with"},
    "--threads": {"type": int, "default": _N_CPUS, "help": "CPU threads (all)"},
}


def add_options(parser: argparse.ArgumentParser, *names: str, **defaults: Any) -> None:
    """Add options that several benches have; `defaults` are those that are others here, by what they are stored as."""
    for name in names:
        parser.add_argument(name, **_OPTIONS[name])
    parser.set_defaults(**defaults)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the option that a bench cannot do without."""
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="GGUF", help="a language model")


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; the CPU time is that of one thread."""
    options = parser.parse_args(arguments)
    if getattr(options, "clock", None) is time.process_time:
        options.threads = 1
    return options


def clock_name(options: argparse.Namespace) -> str:
    """What is measured."""
    return "CPU time" if options.clock is time.process_time else "wall time"


def first_tokens(model: Model, n_tokens: int, start: int = 0) -> list[int]:
    """Tokens of Python source, which repeats itself, from its `start`-th token on."""
    source = "\n".join(Path(module).read_text() for module in (argparse.__file__, multiprocessing.__file__))
    tokens = model.tokenize(source)
    return [tokens[(start + i) % len(tokens)] for i in range(n_tokens)]


def first_text(model: Model, n_tokens: int, start: int = 0) -> str:
    """What these tokens say; tokenized again, they may be some more."""
    return b"".join(map(model.piece, first_tokens(model, n_tokens, start))).decode(errors="ignore")


def synthetic_model(n_layer: int, shape: synthetic_gguf.Shape = synthetic_gguf.LLAVA_7B) -> Path:
    """A model with random weights."""
    return kept_model(f"{shape.name}-{n_layer}-layers", lambda path: synthetic_gguf.write(path, n_layer, shape))


def kept_model(name: str, write: Callable[[Path], None]) -> Path:
    """A model that is made for benches: in the build's cache directory, written unless it is there."""
    path = default_cache_dir() / "bench" / f"{name}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        write(part)
        part.replace(path)
    return path


def turned(items: Iterable[Item], i: int) -> list[Item]:
    """The order of a round: the i-th begins with the i-th item."""
    order = list(items)
    i %= len(order)
    return order[i:] + order[:i]


def seconds(function: Callable[..., object], *arguments: Any) -> float:
    """What a call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def resident(what: str) -> int:
    """Bytes of this process in memory: RssAnon those that are no mapped files', VmHWM the peak of all."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit("this needs Linux, whose /proc tells resident memory")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(fields[what].split()[0])


class Process:
    """A process that answers a line with a line, beside this one; a context manager.

    library: folder of the llama.cpp that it loads, by default the installed one.
    """

    def __init__(self, command: Sequence[str], library: Path | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "LLAMA_CPP_LIB_PATH"}
        if library:
            environment["LLAMA_CPP_LIB_PATH"] = str(library.absolute())
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def read(self) -> str:
        """The next line that it writes."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the measuring process ended with status {self._process.wait()}")
        return line

    def ask(self, text: str) -> str:
        """What it answers."""
        assert self._process.stdin
        print(text, file=self._process.stdin, flush=True)
        return self.read()


def stock_library(folder: Path) -> Path:
    """The folder of a stock library. Exits where it has none, or a patched one."""
    files = list(folder.glob("*llama.*"))
    if not files:
        raise SystemExit(f"--stock: {folder} has no library of llama.cpp")
    if any(b"llama_shiftkv_select" in file.read_bytes() for file in files):
        raise SystemExit(f"--stock: the library in {folder} is a patched one")
    return folder


def ratio(over: Sequence[float], under: Sequence[float], form: str = ".3f") -> str:
    """The median and the quartiles of the rounds' ratios."""
    low, middle, high = np.quantile(np.divide(over, under), (0.25, 0.5, 0.75))
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def markdown(rows: Sequence[Row], *, numbers: bool = False) -> str:
    """The rows as a table, with the headings of the first one; what another one lacks is left empty.

    numbers: whether all columns but the first are set to the right.
    """
    headings = [heading for heading in rows[0] if heading != ROUNDS]
    rules = ["---", *["---:" if numbers else "---"] * (len(headings) - 1)]
    return "\n".join(map(table_line, [headings, rules, *([row.get(name, "") for name in headings] for row in rows)]))


def table_line(cells: Iterable[object]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def write_json(path: Path, value: object) -> None:
    """Write what is whole whenever the process ends, or leave what is there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


class JsonLines:
    """A file of results, one a line, which a run goes on with where another one ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()  # where it cannot be written, this is the time to say so
        drop_torn_line(path)
        self.rows: list[Row] = read_lines(path)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, and write it."""
        self.rows.append(dict(row))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def drop_torn_line(path: Path) -> None:
    """Cut off what was being written when a run was ended."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def read_lines(path: Path) -> list[Any]:
    """What stands in a file of JSON lines; one that is being written is left out."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
