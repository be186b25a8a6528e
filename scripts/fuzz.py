"""Feed damaged files and odd prompts to the runtime; report what ends a process, hangs or raises what it should not.

    python scripts/fuzz.py --n 1000                     # 1,000 cases of each kind
    python scripts/fuzz.py --kind mmproj --n 10000 --jobs 2
    python scripts/fuzz.py --replay mmproj:4711         # one case, in this process

A case follows from its kind and seed alone. Cases run in worker processes; one that dies or hangs is replaced. Any
error of this package is a right answer to a damaged file, and so is a text; everything else is a finding. The exit
status is 1 where there is one.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import queue
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from gguf_damage import ARRAY, MMPROJ_CHANGES, STRING, TEXT_CHANGES, damage_bytes, damaged, parse

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "demo"
LIMIT_S = 20.0
MEMORY = 6 << 30  # address space of a worker: what asks for more is to be refused, not to swap


# --- cases

_NAMES = "<|im_start|> <|im_end|> </s> <s> [INST] <|eot_id|> <__media__> <image> <0x0A> <unk> %s%n"
_SIGNS = "\0 \ud800 \udfff \U0010ffff \ufeff \u202e e\u0301 👨\u200d👩\u200d👧 \x1b[2J \r\n \t \u2581 ﷺ Ａ 😀 中文 ß"
WORDS = (
    *(*_NAMES.split(" "), *_SIGNS.split(" ")),
    *(" ", "{{ messages }}", "{% for x in y %}", "\u0300" * 50, "a" * 300, "Hello", "1234567890"),
)


def _support(name: str) -> ModuleType:
    """A module of the tests that writes models."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module(f"support.{name}")


@dataclass(eq=False)
class Bases:
    """The whole files that cases are made from, and the runtimes that are kept between cases."""

    folder: Path
    keep: Path | None = None
    runtimes: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str, data: bytes) -> Path:
        """Write a case's file; with `keep`, also there."""
        path = self.folder / name
        for one in (path, self.keep):
            if one:
                one.write_bytes(data)
        return path

    @cache  # noqa: B019 - one instance in a process
    def texts(self) -> list[bytes]:
        """Language models: the demo's, and random ones of many architectures and with every tokenizer."""
        tiny, by_spec = _support("tiny_models"), _support("gguf_random")
        spec = by_spec.Spec
        window = {"attention.sliding_window": 32}
        specs = [
            *(
                spec(),
                spec("qwen2"),
                spec("qwen3"),
                spec("phi3", n_layer=2),
                spec(rope_factors=True),
                spec("mpt", n_head_kv=4),
            ),
            spec("gemma2", meta={**window, "attn_logit_softcapping": 20.0}),
            spec("gemma3", n_layer=6, meta={**window, "attention.sliding_window_pattern": 2}),
            spec("qwen3vl", meta={"rope.dimension_sections": [6, 5, 5, 0], "n_deepstack_layers": 1}),
            spec(
                "qwen2",
                meta={
                    "rope.scaling.type": "yarn",
                    "rope.scaling.factor": 4.0,
                    "rope.scaling.original_context_length": 1024,
                },
            ),
            spec(
                "gpt-oss", meta={**window, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96}
            ),
            spec(
                "mamba",
                meta={"ssm.inner_size": 256, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 8},
            ),
        ]
        paths = [
            *[by_spec.write_model(one, self.folder) for one in specs],
            tiny.write_text_model(self.folder / "tiny.gguf"),
            tiny.write_text_model(self.folder / "tiny-qwen2vl.gguf", "qwen2vl"),
        ]
        files = [path.read_bytes() for path in paths]
        for tokenizer in (b"t5", b"rwkv", b"plamo2", b"bert", b"hybriddna", b"whitespace", b"gpt2"):
            file = parse(files[0])
            file.set("tokenizer.ggml.model", STRING, tokenizer)
            file.set("tokenizer.ggml.merges", ARRAY, [b"t h", b"th e"], STRING)
            if tokenizer == b"rwkv":
                tokens = file.find("tokenizer.ggml.tokens")
                assert tokens
                tokens.value = [b"\\x%02x" % i if i < 256 else b"tok%d" % i for i in range(len(tokens.value))]
            files.append(file.write())
        return files

    @cache  # noqa: B019
    def demo_text(self) -> bytes:
        return (DEMO / "demo-text-q8_0.gguf").read_bytes()

    @cache  # noqa: B019
    def tiny_text(self, architecture: str) -> Path:
        module = _support("tiny_models")
        path: Path = module.write_text_model(self.folder / f"for-mmproj-{architecture}.gguf", architecture)
        return path

    @cache  # noqa: B019
    def mmprojs(self) -> list[tuple[Path, bytes]]:
        """Vision encoders with their language models: the demo's, and random ones."""
        module = _support("tiny_models")
        llama, qwen = self.tiny_text("llama"), self.tiny_text("qwen2vl")
        tiled = {"pinpoints": ((112, 56), (56, 112))}
        others: tuple[tuple[str, Path, dict[str, Any]], ...] = (
            ("mlp", llama, {}),
            ("mlp", llama, tiled),
            ("gemma3", llama, {}),
            ("qwen2vl_merger", qwen, {}),
        )
        files = [(DEMO / "demo-text-q8_0.gguf", (DEMO / "demo-mmproj-f16.gguf").read_bytes())] * 4
        for i, (projector, text, options) in enumerate(others):
            path = module.write_mmproj(self.folder / f"mmproj-{i}.gguf", projector, **options)
            files.append((text, path.read_bytes()))
        return files

    @cache  # noqa: B019
    def picture(self) -> Any:
        from PIL import Image

        return Image.open(DEMO / "glyphs.png").convert("RGB").resize((150, 90))

    def runtime(self, name: str) -> Any:
        """A runtime that is loaded once: the demo with its mmproj, or a tiny one."""
        from edge_shiftkv import Runtime

        if name not in self.runtimes:
            if name == "demo":
                files = DEMO / "demo-text-q8_0.gguf", DEMO / "demo-mmproj-f16.gguf"
            else:
                text, mmproj = self.mmprojs()[4 if name == "tiny" else 5]
                files = text, self.folder / f"kept-{name}.gguf"
                files[1].write_bytes(mmproj)
            self.runtimes[name] = Runtime(*files, n_threads=1, n_ctx=1024)
        return self.runtimes[name]


def run_case(kind: str, seed: int, bases: Bases) -> str:
    """Run one case; return what came of it: ok, or an error of this package. Other errors pass through."""
    from edge_shiftkv import ShiftKVError

    rng = random.Random(f"{kind}:{seed}")
    try:
        CASES[kind](rng, bases)
    except ShiftKVError as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def text_case(rng: random.Random, bases: Bases) -> None:
    data = bases.demo_text() if rng.random() < 0.4 else rng.choice(bases.texts())
    path = bases.write("case.gguf", damaged(rng, data, TEXT_CHANGES))
    use_text_model(path, kv_budget=rng.choice((None, None, 8)), raw=rng.random() < 0.5)


def use_text_model(path: Path, kv_budget: int | None, raw: bool) -> None:
    """Load a language model and answer with it."""
    from edge_shiftkv import Runtime

    with Runtime(path, n_threads=1, n_ctx=128, kv_budget=kv_budget) as runtime:
        runtime.generate("Hello, wörld 12 <s>!\n the end of it", raw=raw, max_tokens=3, temperature=0.0)


def mmproj_case(rng: random.Random, bases: Bases) -> None:
    text, data = rng.choice(bases.mmprojs())
    path = bases.write("case.gguf", damaged(rng, data, MMPROJ_CHANGES))
    use_mmproj(text, path, bases, kv_budget=rng.choice((None, 8)))


def use_mmproj(text: Path, mmproj: Path, bases: Bases, kv_budget: int | None) -> None:
    """Load a language model with a vision encoder and answer about a picture."""
    from edge_shiftkv import Runtime

    with Runtime(text, mmproj, n_threads=1, n_ctx=1024, kv_budget=kv_budget) as runtime:
        runtime.generate("the", [bases.picture()], raw=True, max_tokens=2, temperature=0.0)


def picture_case(rng: random.Random, bases: Bases) -> None:
    from PIL import Image

    kind = rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))
    mode = rng.choice(("RGB", "RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"))
    size = rng.choice(((1, 1), (2, 200), (17, 9), (64, 64), (150, 90), (300, 40)))
    image = bases.picture().resize(size)
    out = io.BytesIO()
    options: dict[str, Any] = {}
    if rng.random() < 0.2:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 77))
        options["exif"] = exif
    if kind == "TIFF":
        options["compression"] = rng.choice((None, "tiff_lzw", "jpeg", "packbits", "tiff_deflate", "group4"))
    try:
        image.convert(mode).save(out, kind, **options)
    except (OSError, ValueError, KeyError, SystemError, RuntimeError):  # a mode that this format does not have
        out = io.BytesIO()
        image.save(out, kind)
    data = out.getvalue()
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        data = damage_bytes(rng, data, rng.choice((64, 256, len(data)))) or b"\0"
    suffix = rng.choice((kind.lower(), kind.lower(), "png", "eps", ""))
    path = bases.write(f"case.{suffix}", data)
    try:
        runtime = bases.runtime(rng.choice(("demo", "tiny", "tiled")))
        runtime.kv_budget = rng.choice((None, 8))
        runtime.generate("the", [path], raw=True, max_tokens=1, temperature=0.0)
    finally:
        path.unlink()


def prompt_case(rng: random.Random, bases: Bases) -> None:
    runtime = bases.runtime(rng.choice(("demo", "demo", "tiny", "tiled")))
    runtime.kv_budget = rng.choice((None, 2, 8, 64))
    way = rng.randrange(6)
    if way == 0:
        prompt = "".join(
            chr(rng.choice((rng.randrange(0x110000), rng.randrange(256)))) for _ in range(rng.randint(0, 60))
        )
    elif way == 1:
        prompt = rng.randbytes(rng.randint(0, 200)).decode("utf-8", "surrogateescape")
    elif way == 2:
        prompt = rng.choice(WORDS) * rng.choice((0, 1, 7, 300, 20_000))
    else:
        prompt = rng.choice(("", " ")).join(rng.choices(WORDS, k=rng.randint(0, 12)))
    images = [bases.picture()] * rng.choice((0, 0, 0, 1, 2))
    options: dict[str, Any] = {
        "max_tokens": rng.choice((1, 2, 5)),
        "temperature": rng.choice((0.0, 1.0)),
        "seed": rng.getrandbits(31),
    }
    if rng.random() < 0.2:
        options["stop"] = rng.choice(WORDS)
    if rng.random() < 0.3:
        parts: list[Any] = [{"type": "text", "text": prompt}]
        roles = ("user", "assistant", "system", "tool", rng.choice(WORDS))
        messages = [
            {"role": rng.choice(roles), "content": rng.choice((prompt, parts, ""))} for _ in range(rng.randint(0, 4))
        ]
        runtime.create_chat_completion(messages, **options)
    else:
        runtime.generate(prompt, images, raw=rng.random() < 0.5, **options)


CASES = {"text": text_case, "mmproj": mmproj_case, "pictures": picture_case, "prompts": prompt_case}


def run_files(paths: Sequence[str], bases: Bases) -> str:
    """Load the files of a language model, or of one and its vision encoder, and answer; return what `run_case` does."""
    from edge_shiftkv import ShiftKVError

    try:
        if len(paths) == 1:
            use_text_model(Path(paths[0]), None, True)
        else:
            use_mmproj(Path(paths[0]), Path(paths[1]), bases, None)
    except ShiftKVError as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


# --- workers


@dataclass(frozen=True)
class Finding:
    """A case that did not end well."""

    case: str
    what: str
    detail: str


def serve() -> None:
    """Run the cases named on stdin, one a line, KIND:SEED or files:PATH[:PATH]; a line of JSON for each on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(Path(folder))
        limit_memory()
        for line in sys.stdin:
            kind, *what = line.rstrip("\n").split(":")
            try:
                answer = {"ok": run_files(what, bases) if kind == "files" else run_case(kind, int(what[0]), bases)}
            except BaseException as error:
                answer = {"error": f"{type(error).__name__}: {error}", "at": _where(error)}
            print(json.dumps(answer), file=out, flush=True)


def limit_memory() -> None:
    """Have too large an allocation fail."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""


class Worker:
    """A process that runs cases until one of them ends it."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process is
        command = [sys.executable, __file__, "--serve"]
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # which a debugger would take its time for
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment
        )
        self.alive = True

    def run(self, case: str, limit_s: float) -> tuple[str, Finding | None]:
        """What came of the case, and what is wrong with that."""
        assert self._process.stdin and self._process.stdout
        start = self._log.seek(0, os.SEEK_END)
        self._process.stdin.write(f"{case}\n".encode())
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        if not ready:
            self.close()
            return "hang", Finding(case, "hang", f"no answer within {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(start)
            log = self._log.read(1 << 20).decode(errors="replace")
            self.close()
            name = signal.Signals(-status).name if status < 0 else f"exit {status}"
            return name, Finding(case, name, _told(log))
        answer = json.loads(line)
        if "error" in answer:
            return "error", Finding(case, answer["error"][:200], answer["at"])
        return answer["ok"], None

    def close(self) -> None:
        """End the process."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe:
                pipe.close()


def _told(log: str) -> str:
    """The line of a dying process that says why."""
    lines = [
        line
        for line in log.splitlines()
        if any(word in line for word in ("ASSERT", "what():", "abort", ".cpp:", ".c:", "rror"))
    ]
    return lines[0][-220:] if lines else ""


def fuzz(cases: Iterator[str], jobs: int, limit_s: float, report: Callable[[Finding], None]) -> Counter[str]:
    """Run the cases in `jobs` workers; return how many ended how."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    todo: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for case in cases:
        todo.put(case)
    for _ in range(jobs):
        todo.put(None)

    def work() -> None:
        with ExitStack() as ends:
            worker = Worker()
            ends.callback(lambda: worker.close())
            while (case := todo.get()) is not None:
                if not worker.alive:
                    worker = Worker()
                outcome, finding = worker.run(case, limit_s)
                with lock:
                    counts[outcome.partition(":")[0]] += 1
                    if finding:
                        report(finding)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(CASES), action="append", help="repeatable; default: all")
    parser.add_argument("--n", type=int, default=1000, help="cases of each kind (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="the first case's seed; the others' follow (default: 0)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the CPUs)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S", help=f"seconds for a case (default: {LIMIT_S})"
    )
    parser.add_argument("--replay", metavar="KIND:SEED", help="run one case in this process")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="with --replay: copy the damaged file there first")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return 0
    if options.replay:
        return replay(options.replay, options.keep)
    n_found = 0

    def report(finding: Finding) -> None:
        nonlocal n_found
        n_found += 1
        print(f"  {finding.case}: {finding.what} [{finding.detail}]", flush=True)

    for kind in options.kind or CASES:
        started = time.monotonic()
        cases = (f"{kind}:{seed}" for seed in range(options.seed, options.seed + options.n))
        counts = fuzz(cases, options.jobs, options.limit, report)
        ends = ", ".join(f"{n} {name}" for name, n in counts.most_common())
        print(f"{kind}: {counts.total()} cases in {time.monotonic() - started:.0f} s: {ends}", flush=True)
    print(f"{n_found} findings")
    return int(n_found > 0)


def replay(case: str, keep: Path | None) -> int:
    """Run one case here, where a debugger can see it."""
    kind, seed = case.split(":")
    with tempfile.TemporaryDirectory() as folder:
        bases = Bases(Path(folder), keep)
        limit_memory()
        print(run_case(kind, int(seed), bases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
