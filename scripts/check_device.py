"""What this project does on the GPU of this machine: the tests for devices, then decoding, selection and short passes.

    edge-shiftkv build --cuda          # or --metal, --vulkan
    python scripts/check_device.py --out device.json
    python scripts/check_device.py --out device.json -m qwen2.5-1.5b.gguf --draft smollm2-135m.gguf --deepen 130
    GGML_VK_VISIBLE_DEVICES=0 python scripts/check_device.py --rehearse    # all steps in small, on a software device

Each step runs in a process of its own and has a share of --minutes; one that fails or takes longer is noted with what
it had measured by then, and the next one begins, with what is left of the time. Models have random weights and the
shape of LLaVA-7B's layers (3.6 GiB for all of them). What needs one that answers is left out without -m: many requests
at once, and, without --draft, drafts; for those, --deepen gives the target the cost of a larger one (deepen_gguf.py).
With --rehearse, every step is run on a small model with random weights: its figures say nothing of a device.
The file has every single measurement; what is printed are tables in Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_pass
import deepen_gguf
import harness
import llama_cpp
import synthetic_gguf

from edge_shiftkv.build import WHEEL_VERSION
from edge_shiftkv.doctor import probe

SCRIPTS = Path(__file__).resolve().parent
ALL = "99"  # layers on the device


@dataclass(frozen=True)
class Step:
    """A command that is run. `share` is its part of the time; `file` the option that names where its figures go."""

    name: str
    command: tuple[str, ...]
    share: float
    file: str | None = "--json"


@dataclass(frozen=True)
class Work:
    """How much the steps do: tests, and the options of scripts for which there is none here."""

    tests: tuple[str, ...]
    passes: tuple[str, ...]
    requests: tuple[str, ...]
    drafts: tuple[str, ...]


WORK = Work((".",), (), ("--requests", "8"), ("--prompts", "4", "--lengths", "4"))
REHEARSAL = Work(
    ("test_selection.py::test_architectures[llama-gqa-]", "test_handover.py::test_in_place[f16-32]"),
    ("--tokens", "1", "4", "32"),
    ("--requests", "2", "--slots", "2", "--prompt-tokens", "160", "--tokens", "8"),
    ("--prompts", "1", "--lengths", "2", "--tokens", "8"),
)


def rehearsed() -> dict[str, Any]:
    """The options of a rehearsal, but for those that are given."""
    model = harness.synthetic_model(2, synthetic_gguf.SMALL)
    return {"model": model, "draft": model, "deepen": 3, "tokens": [288], "rounds": 1, "minutes": 30.0}


def steps(options: argparse.Namespace) -> list[Step]:
    """All that is checked."""
    work = REHEARSAL if options.rehearse else WORK
    shape = (2, synthetic_gguf.SMALL) if options.rehearse else (options.layers, synthetic_gguf.LLAVA_7B)
    model = str(harness.synthetic_model(*shape))
    tokens = [str(n) for n in sorted(options.tokens)]
    chosen = options.test or [str(SCRIPTS.parent / "tests" / "native" / test) for test in work.tests]
    tests = ("-m", "pytest", "-q", "-m", "device", "-p", "no:cacheprovider", *chosen)
    methods = ("--methods", "mixed", "paper")
    on_device = ("-m", model, "--gpu-layers", ALL)
    rounds = ("--rounds", str(options.rounds))
    # bench_pass.py measures the installed library unless it is told another.
    library = ("--library", os.environ["LLAMA_CPP_LIB_PATH"]) if "LLAMA_CPP_LIB_PATH" in os.environ else ()
    found = [
        Step("Tests", tests, 0.35, file=None),
        Step("Decoding", (str(SCRIPTS / "bench_kv.py"), "decode", *on_device, "--tokens", *tokens, *rounds), 0.2),
        Step(
            "Selection",
            (str(SCRIPTS / "bench_kv.py"), "selection", *on_device, "--tokens", *tokens, *methods, *rounds),
            0.3,
        ),
        Step(
            "Passes over a few tokens",
            (str(SCRIPTS / "bench_pass.py"), *on_device, *rounds, *work.passes, *library),
            0.15,
        ),
    ]
    if options.model:
        batch = (str(SCRIPTS / "bench_batch.py"), "-m", str(options.model), *work.requests, *rounds)
        found.append(Step("Many requests at once", batch, 0.2, file="--out"))
    if options.draft:
        drafts = (
            *(str(SCRIPTS / "bench_spec.py"), "speed"),
            *("-m", str(deepened(options)), "--draft", str(options.draft), *work.drafts, "--gpu-layers", ALL),
        )
        found.append(Step("Drafts", drafts, 0.3, file="--out"))
    return found


def deepened(options: argparse.Namespace) -> Path:
    """The target of drafts: the model, or one that says the same for the cost of more layers."""
    model: Path = options.model
    if not options.deepen:
        return model
    # Another file of that name, or another version of it, is another model.
    version = hashlib.sha256(f"{model.resolve()} {model.stat().st_mtime_ns}".encode()).hexdigest()[:8]
    name = f"{model.stem}-{version}-{options.deepen}-layers"
    return harness.kept_model(name, lambda path: deepen_gguf.deepen(model, path, options.deepen))


def run(step: Step, seconds: float) -> dict[str, Any]:
    """What came of a step: also of one that was stopped."""
    started = time.monotonic()
    environment = {**os.environ, "EDGE_SHIFTKV_TEST_GPU_LAYERS": ALL}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+b") as output:
        figures = Path(folder) / "figures"
        command = [sys.executable, *step.command, *([step.file, str(figures)] if step.file else [])]
        # With processes of its own, all of which end with it.
        with subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            try:
                code = process.wait(seconds)
                status = f"exit status {code}" if code else ""
            except subprocess.TimeoutExpired:
                status = "took too long"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        output.seek(0)
        text = output.read().decode(errors="replace")
        measured = read_figures(figures, by_lines=step.file == "--out") if figures.exists() else {}
    return {"status": status, "seconds": time.monotonic() - started, "output": text[-8000:], "measured": measured}


def read_figures(path: Path, *, by_lines: bool) -> Any:
    """What a step has measured: JSON, or the list of what is JSON by lines."""
    return harness.read_lines(path) if by_lines else json.loads(path.read_text())


def table(measured: Any) -> str:
    """What a step that was stopped has measured, in short."""
    if isinstance(measured, dict) and measured.get("rows"):
        return harness.markdown(measured["rows"])
    if isinstance(measured, dict) and measured.get("seconds"):
        return bench_pass.table(
            {name: {int(n): times for n, times in of.items()} for name, of in measured["seconds"].items()}
        )
    if isinstance(measured, list):
        return f"{len(measured)} measurements are in the file."
    return "Nothing was measured."


def device() -> dict[str, Any]:
    """What is measured. Exits where the library has no device but the CPU."""
    llama_cpp.llama_backend_init()
    if not llama_cpp.llama_supports_gpu_offload():
        sys.exit(
            "the installed library sees no GPU: build it for one (edge-shiftkv build --cuda, --metal or --vulkan), "
            "and see that the device's driver is installed"
        )
    return {
        "devices": [device["description"] for device in probe.devices()],
        "library": WHEEL_VERSION,
        "system": llama_cpp.llama_print_system_info().decode(),
        "machine": platform.platform(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, and print what came out."""
    parser = argparse.ArgumentParser(description="Run tests and measurements on this machine's GPU.")
    parser.add_argument("--out", type=Path, default=Path("device.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all of it may take (%(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="of the model (32)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32256], help="of the prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--test", action="append", metavar="TEST", help="only these, as pytest names them; repeatable")
    parser.add_argument("-m", "--model", type=Path, metavar="GGUF", help="that answers, for requests and drafts")
    parser.add_argument("--draft", type=Path, metavar="GGUF", help="drafts for it")
    parser.add_argument("--deepen", type=int, metavar="LAYERS", help="of the target of drafts; as many as it has")
    parser.add_argument(
        "--rehearse", action="store_true", help="all steps in small: whether they run, within 30 minutes"
    )
    options = parser.parse_args(arguments)
    if options.rehearse:
        parser.set_defaults(**rehearsed())
        options = parser.parse_args(arguments)
    if not options.model and (options.draft or options.deepen):
        parser.error("--draft and --deepen need the model that is drafted for (-m)")
    for path in filter(None, (options.model, options.draft)):
        if not path.is_file():
            parser.error(f"{path} is no file")
    result: dict[str, Any] = {"device": device(), "steps": {}}
    return check(steps(options), 60 * options.minutes, result, options.out)


def check(chosen: Sequence[Step], seconds: float, result: dict[str, Any], out: Path) -> int:
    """Run steps one after the other, write and print what came of each; return 0 if all went well."""
    ends = time.monotonic() + seconds
    for i, step in enumerate(chosen):
        left = max(0.0, ends - time.monotonic())
        result["steps"][step.name] = found = run(step, left * step.share / sum(other.share for other in chosen[i:]))
        harness.write_json(out, result)
        print(f"## {step.name} ({found['seconds']:.0f} s)\n")
        if found["status"]:
            print(f"failed ({found['status']}):\n\n{table(found['measured'])}\n" if step.file else found["status"])
        print(found["output"] if step.file or found["status"] else found["output"].splitlines()[-1])
        print(flush=True)
    names = [step.name for step in chosen]
    for name, option in (("Many requests at once", "-m"), ("Drafts", "--draft")):
        if name not in names:
            print(f"## {name}\n\nleft out: needs a model that answers ({option})\n")
    return int(any(found["status"] for found in result["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
