"""The patched library, as long as nothing is cut, against the stock one built from the same source.

The model is not quantized: products with quantized weights have kernels of their own, which round differently.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_shiftkv import Runtime

PROMPTS = ("TOTAL 12.50\nTAX 1", "a line that the model has never seen, ", "7 7 7 7 " * 40)


def run(library: str | None, demo: Path) -> dict[str, Any]:
    environment = dict(os.environ)
    if library:
        environment["LLAMA_CPP_LIB_PATH"] = library
    script = Path(__file__).with_name("greedy.py")
    files = (demo / "demo-text-f16.gguf", demo / "demo-mmproj-f16.gguf", demo / "document.png")
    command = [sys.executable, str(script), *map(str, files), *PROMPTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def stock(demo: Path) -> dict[str, Any]:
    library = os.environ.get("EDGE_SHIFTKV_STOCK_LIB")
    if not library:
        pytest.skip("EDGE_SHIFTKV_STOCK_LIB is not set: scripts/dev.py test builds the stock library and sets it")
    result = run(library, demo)
    assert not result["patched"]
    return result


def test_same_tokens_and_logits_as_stock(stock: dict[str, Any], demo: Path) -> None:
    ours = run(None, demo)
    assert ours["patched"]
    # Otherwise the two would only agree up to rounding.
    assert ours["kernels"] == stock["kernels"]
    assert ours["answers"] == stock["answers"]


def test_the_runtime_without_a_budget_answers_as_stock(stock: dict[str, Any], demo: Path) -> None:
    with Runtime(demo / "demo-text-f16.gguf", n_ctx=1024, n_threads=2) as runtime:
        texts = [runtime.generate(prompt, raw=True, max_tokens=24, temperature=0.0).text for prompt in PROMPTS]
    assert texts == [answer["text"] for answer in stock["answers"][: len(PROMPTS)]]
