"""Kills a batch run with SIGKILL again and again, has it go on, and compares with a run that was left alone.

``python scripts/batch_kills.py --times 100`` does so with the shipped model and documents that it draws; tests do it
with fewer kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from demo_documents import make_document


def run_with_kills(
    command: Sequence[str], out: Path, times: int, rng: random.Random, ended: Callable[[int], None]
) -> None:
    """Start a batch, and kill it and its child with SIGKILL, until that was done `times` times.

    Every other time it is killed at a random moment of its start; else when one to three rows more are in the file. A
    batch that comes to its end is begun anew; the last one is let come to it.

    command: a complete `edge-shiftkv batch` command, which writes to `out`.
    ended: is told the exit status of each batch, when its file is complete.
    """
    killed = 0
    while killed < times:
        # A session of its own: the process and its child are one group.
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr
        before = _n_lines(out)
        wait_s = rng.uniform(0.0, 1.2) if rng.random() < 0.5 else None
        more, then_s = rng.randint(1, 3), rng.uniform(0.0, 0.02)
        ends = time.monotonic() + (wait_s if wait_s is not None else 60.0)
        while process.poll() is None and time.monotonic() < ends:
            if wait_s is None and _n_lines(out) >= before + more:
                time.sleep(then_s)
                break
            time.sleep(0.001)
        is_over = process.poll() is not None
        killed += not is_over
        with suppress(ProcessLookupError):  # it came to its end, and its child with it
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # returns when the child is gone, too
        if is_over:
            ended(process.returncode)
            out.unlink()
            out.with_name(f"{out.name}.run").unlink()
    ended(subprocess.run(command, stderr=subprocess.DEVNULL).returncode)


def _n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def entries(path: Path) -> dict[str, Any]:
    """The lines of an out file by custom_id. Raises ValueError where one is there twice, or has no end."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = [json.loads(line) for line in lines]
    result = {entry["custom_id"]: entry for entry in found}
    if len(result) != len(found) or not all(line.endswith("\n") for line in lines):
        raise ValueError(f"{path}: {len(found)} lines, {len(result)} of them different rows")
    return result


def answers(path: Path) -> dict[str, Any]:
    """What an out file's rows say, without ids, the time, and figures that are seconds; errors are their codes."""
    result: dict[str, Any] = {}
    for name, entry in entries(path).items():
        if entry["error"]:
            result[name] = entry["error"]["code"]
        else:
            body = entry["response"]["body"]
            choice = body["choices"][0]
            answer = (choice["message"]["content"], choice["finish_reason"], body["usage"])
            result[name] = (*answer, body["figures"]["kept_tokens"], body["model"])
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill and compare; 1 where anything was lost, doubled or answered otherwise."""
    models = Path(__file__).resolve().parent.parent / "models" / "demo"
    parser = argparse.ArgumentParser(description="Kill a batch again and again and see what is lost.")
    parser.add_argument("-m", "--model", type=Path, default=models / "demo-text-q8_0.gguf", metavar="GGUF")
    parser.add_argument("--mmproj", type=Path, default=models / "demo-mmproj-f16.gguf", metavar="GGUF")
    parser.add_argument("--times", type=int, default=100, metavar="N", help="kills (100)")
    parser.add_argument("--rows", type=int, default=60, metavar="N", help="of a batch (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the documents and of when it is killed")
    options = parser.parse_args(arguments)
    n_rows = options.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requests = folder / "in.jsonl"
        requests.write_text("".join(_line(folder, i, options.seed) for i in range(n_rows)))
        command = [sys.executable, "-m", "edge_shiftkv", "batch", "-m", str(options.model)]
        command += [
            "--mmproj",
            str(options.mmproj),
            "--threads",
            "1",
            "--kv-budget",
            "96",
            "--parallel",
            "4",
            "--temperature",
            "1.2",
        ]
        command += ["--seed", str(options.seed), str(requests), "-o"]
        alone, killed = folder / "alone.jsonl", folder / "killed.jsonl"
        subprocess.run([*command, str(alone)], check=True, stderr=subprocess.DEVNULL)
        expected = answers(alone)
        are_right: list[bool] = []

        def ended(status: int) -> None:
            are_right.append(status == 0 and answers(killed) == expected)

        run_with_kills([*command, str(killed)], killed, options.times, random.Random(options.seed), ended)
    n = len(are_right)
    print(
        f"{options.times} runs killed; {sum(are_right)} of {n} batches of {n_rows} rows have every row once, as alone"
    )
    return int(not all(are_right))


def _line(folder: Path, i: int, seed: int) -> str:
    picture = folder / f"{i // 8}.png"
    if not picture.exists():
        make_document(seed + i // 8).pil_image().save(picture)
    parts = [
        {"type": "image_url", "image_url": {"url": str(picture)}},
        {"type": "text", "text": ("Read everything.", f"Read line {i % 16 + 1}.")[i % 2]},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8 + i % 24}
    return json.dumps({"custom_id": f"row {i}", "body": body}) + "\n"


if __name__ == "__main__":
    sys.exit(main())
