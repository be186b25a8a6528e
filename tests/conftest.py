"""Models for the tests: tiny ones with random weights, and the shipped one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import tiny_models

from edge_shiftkv._paths import models_dir

if sys.platform == "win32":  # they need terminals, signals and limits of POSIX
    collect_ignore = [
        *("batch/test_jobs.py", "batch/test_ray.py", "chat/test_terminal.py", "native/test_resources.py"),
        *("prompts/test_images.py", "prompts/test_template.py"),
    ]


@dataclass(frozen=True)
class Tiny:
    """Paths of random models: LLaVA-1.5's kind, 1.6's (tiled), and Qwen2-VL's (M-RoPE); and of a picture."""

    text: Path
    mmproj: Path
    tiled_mmproj: Path
    qwen_text: Path
    qwen_mmproj: Path
    picture: Path


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    picture = folder / "noise.png"
    Image.fromarray(noise).save(picture)
    return Tiny(
        text=tiny_models.write_text_model(folder / "text.gguf"),
        mmproj=tiny_models.write_mmproj(folder / "mmproj.gguf"),
        tiled_mmproj=tiny_models.write_mmproj(folder / "tiled.gguf", pinpoints=((112, 56), (56, 112), (112, 112))),
        qwen_text=tiny_models.write_text_model(folder / "qwen.gguf", "qwen2vl"),
        qwen_mmproj=tiny_models.write_mmproj(folder / "qwen-mmproj.gguf", "qwen2vl_merger"),
        picture=picture,
    )


# The tests that need no library, the builder's, do not import the runtime through these fixtures.
@pytest.fixture(scope="session")
def shared_runtime(tiny: Tiny) -> Iterator[object]:
    from edge_shiftkv import Runtime

    with Runtime(tiny.text, tiny.mmproj, n_threads=1, image_cache=0) as runtime:
        yield runtime


@pytest.fixture
def runtime(shared_runtime):
    """The LLaVA-1.5 kind, with the full KV cache."""
    yield shared_runtime
    shared_runtime.kv_budget = None


@pytest.fixture(scope="session")
def demo() -> Path:
    """The folder of the shipped model."""
    folder = models_dir()
    if not (folder / "document.png").is_file():
        pytest.skip("the demo model is not there")
    return folder


@pytest.fixture
def n_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens that each prompt had to be read for."""
    from edge_shiftkv.engine.prefilled import Prefilled

    seen: list[int] = []
    read = Prefilled.read

    def spy(self: Prefilled, *arguments: Any, **options: Any) -> None:
        read(self, *arguments, **options)
        seen.append(self.n_read)

    monkeypatch.setattr(Prefilled, "read", spy)
    return seen
