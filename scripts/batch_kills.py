"""Kills a batch run again and again, and has it go on: what `bench_batch.py kill` and the tests do."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def run_with_kills(command: Sequence[str], out: Path, times: int, rng: random.Random) -> tuple[int, int]:
    """Start a batch, and kill it and its child with SIGKILL, `times` times; then let it come to its end.

    Every other time it is killed at a random moment of its start; else when one to three rows more are in the file.

    command: a complete `edge-shiftkv batch` command, which writes to `out`.

    Returns how many runs were killed before they came to their end, and the exit status of the last one.
    """
    killed = 0
    for _ in range(times):
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
        killed += process.poll() is None
        with suppress(ProcessLookupError):  # it came to its end, and its child with it
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # returns when the child is gone, too
    return killed, subprocess.run(command).returncode


def _n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
