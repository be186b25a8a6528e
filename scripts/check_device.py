"""What this project does on the GPU of this machine: the tests for devices, then decoding, selection and short passes.

    edge-shiftkv build --cuda          # or --metal, --vulkan
    python scripts/check_device.py --out device.json

Each step runs in a process of its own and has a share of --minutes; one that fails or takes longer is noted, and the
next one begins. The models have random weights and the shape of LLaVA-7B's layers (3.6 GiB for all of them). The file
has every single measurement; what is printed are tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_kv
import llama_cpp

from edge_shiftkv.build import WHEEL_VERSION
from edge_shiftkv.doctor import probe

SCRIPTS = Path(__file__).resolve().parent
ALL = "99"  # layers on the device


@dataclass(frozen=True)
class Step:
    """A command that is run. `share` is its part of the time; `table` whether it writes to the file after --json."""

    name: str
    command: tuple[str, ...]
    share: float
    table: bool = True


def steps(options: argparse.Namespace) -> list[Step]:
    """All that is checked."""
    model = str(bench_kv.synthetic_model(options.layers))
    tokens = [str(n) for n in options.tokens]
    chosen = options.test or [str(SCRIPTS.parent / "tests" / "native")]
    tests = ("-m", "pytest", "-q", "-m", "device", "-p", "no:cacheprovider", *chosen)
    methods = ("--methods", "mixed", "paper")
    on_device = ("-m", model, "--gpu-layers", ALL)
    rounds = ("--rounds", str(options.rounds))
    return [
        Step("Tests", tests, 0.4, table=False),
        Step("Decoding", (str(SCRIPTS / "bench_kv.py"), "decode", *on_device, "--tokens", *tokens, *rounds), 0.2),
        Step(
            "Selection",
            (str(SCRIPTS / "bench_kv.py"), "selection", *on_device, "--tokens", *tokens, *methods, *rounds),
            0.25,
        ),
        Step("Passes over a few tokens", (str(SCRIPTS / "bench_pass.py"), *on_device, *rounds), 0.15),
    ]


def run(step: Step, seconds: float) -> dict[str, Any]:
    """What came of a step."""
    started = time.monotonic()
    environment = {**os.environ, "EDGE_SHIFTKV_TEST_GPU_LAYERS": ALL}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rows.json"
        command = [sys.executable, *step.command, *(["--json", str(table)] if step.table else [])]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
            status, output = f"exit status {done.returncode}" if done.returncode else "", done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            status, output = "took too long", (error.stdout or b"").decode(errors="replace")
        found = json.loads(table.read_text()) if table.exists() else {}
    return {"status": status, "seconds": time.monotonic() - started, "output": output[-8000:], "measured": found}


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
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"device": device(), "steps": {}}
    for step in steps(options):
        result["steps"][step.name] = found = run(step, 60 * options.minutes * step.share)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"## {step.name} ({found['seconds']:.0f} s)\n")
        if found["status"]:
            print(f"failed ({found['status']}):\n")
        print(found["output"] if step.table or found["status"] else found["output"].splitlines()[-1])
        print(flush=True)
    return int(any(found["status"] for found in result["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
