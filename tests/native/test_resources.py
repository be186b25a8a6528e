"""Memory: what is taken is given back, and where there is not enough of it the caller gets a code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import Load
from support.gguf_random import Spec
from support.native import GPU_LAYERS, OK, Context, environment, params
from support.prompts import text

linux_cpu = pytest.mark.skipif(GPU_LAYERS > 0 or sys.platform != "linux", reason="reads /proc, of the CPU's memory")

MIB = 1 << 20


def in_a_fresh_process(script: str, folder: Path) -> str:
    """What it prints; whose heap has no holes that earlier tests left, for blocks to come from and go back to."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", HEAD + script, str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


HEAD = """
import ctypes, resource, sys
from pathlib import Path
from support.gguf_random import Spec
from support.native import OK, Context, Model, params
from support.prompts import text

def resident():  # bytes
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

ctypes.CDLL(None).mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD: else it grows with what is freed
"""

END_OF_A_CAPTURE = """
with Context(Model(Spec(n_layer=3, n_embd=8192, n_head=2, n_head_kv=1, n_ff=32), Path(sys.argv[1])), 256) as context:
    context.decode(text(60), 0)
    context.clear()
    before = resident()
    assert context.capture(n_query=512) == OK
    context.decode(text(60), 0)
    assert context.select(params(20, n_proxy=32)) == OK
    captured = resident()
    kept = context.all_kept()
    assert context.capture_end() == OK
    context.decode(text(1), 60)
    context.remove(start=60)
    ended = resident()
    assert context.all_kept() == kept
    assert context.compact() == OK
    assert context.cells()[0].k[0].heads(1)[0].shape[0] == 20
print(captured - before, ended - before)
"""


@linux_cpu
def test_the_end_of_a_capture_gives_its_rings_back(tmp_path: Path) -> None:
    rings = 3 * 513 * (8192 + 64) * 4
    captured, ended = map(int, in_a_fresh_process(END_OF_A_CAPTURE, tmp_path).split())
    assert captured > 0.9 * rings
    assert ended < 0.3 * rings


HAND_OVER = """
spec = Spec(n_layer=2, n_embd=64, n_head=8, n_head_kv=8, n_ff=32)
with Context(Model(spec, Path(sys.argv[1])), 2048, n_ubatch=64) as context:
    assert context.capture() == OK
    context.decode(text(2000), 0)
    before = resident()
    assert context.select(params(20, n_layer_repeat=0)) == OK
    selected = resident()
    assert context.compact() == OK
    context.decode(text(1), 2000)
print(selected - before, resident() - before)
"""


@linux_cpu
def test_a_hand_over_in_place_gives_the_selections_buffers_back(tmp_path: Path) -> None:
    with environment("LLAMA_SHIFTKV_GRAPH", "1"):  # which take more
        selected, handed_over = map(int, in_a_fresh_process(HAND_OVER, tmp_path).split())
    assert selected > 5 * MIB
    assert handed_over < 2.5 * MIB


@pytest.mark.parametrize("graph", [None, "1"], ids=["", "graph"])
def test_the_most_groups(load: Load, graph: str | None) -> None:
    """Each of one proxy."""
    spec = Spec(n_layer=1, n_embd=64, n_head=4, n_head_kv=4, n_ff=32)
    with environment("LLAMA_SHIFTKV_GRAPH", graph), Context(load(spec), 512) as context:
        assert context.capture() == OK
        context.decode(text(400), 0)
        assert context.select(params(20, n_proxy=4096, n_group=4096, n_layer_repeat=0)) == OK
        assert context.compact() == OK


OUT_OF_MEMORY = """
with Context(Model(Spec(n_layer=4, n_embd=8192, n_head=2, n_head_kv=1, n_ff=32), Path(sys.argv[1])), 256) as context:
    statuses = [context.capture()]
    context.decode(text(60), 0)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    for room in (16, 134, None):  # MiB; the proxies' noise takes 128
        resource.setrlimit(resource.RLIMIT_AS, (size + (room << 20), unlimited[1]) if room else unlimited)
        statuses.append(context.select(params(20, n_proxy=4096)))
    statuses.append(context.compact())
    print(statuses)
"""


@linux_cpu
def test_where_memory_runs_out_the_caller_gets_a_code(tmp_path: Path) -> None:
    """In the C++ code that throws, and in the backend that doesn't; with more of it the same call works."""
    assert in_a_fresh_process(OUT_OF_MEMORY, tmp_path) == "[0, -9, -9, 0, 0]\n"
