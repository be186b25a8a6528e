"""The tests that concern a device, once more on ggml's Vulkan backend; Mesa's software device will do.

A device that is not the CPU shows what a host hides: reading device memory through a pointer, or an op a backend lacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

# A software device takes seconds for a case: of the tests marked `device`, those that reach every graph and layout.
# Scores over quantized keys are left out: Vulkan quantizes the queries for them, which is coarser than the bounds.
# Selection after a prefill with flash attention, too: Mesa 22.3 frees a buffer twice there, in a thread of its own.
SELECTED = (
    "test_first_layer or (test_architectures and not flash) or test_in_place or test_like_a_mask_per_head"
    " or (test_second_turn and not quantized) or (test_many_selections and llama)"
)

COUNT_DEVICES = """
import llama_cpp
llama_cpp.llama_backend_init()
assert llama_cpp.llama_supports_gpu_offload(), "ggml sees no Vulkan device"
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    library = os.environ.get("EDGE_SHIFTKV_VULKAN_LIB")
    if not library:
        pytest.skip("EDGE_SHIFTKV_VULKAN_LIB is not set: scripts/dev.py test sets it where Vulkan can be installed")
    return {
        **os.environ,
        "LLAMA_CPP_LIB_PATH": library,
        "EDGE_SHIFTKV_TEST_GPU_LAYERS": "99",
        "GGML_VK_VISIBLE_DEVICES": "0",
    }


def test_there_is_a_device(environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_device_tests_pass_there(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-v", "-m", "device", "-k", SELECTED, "-p", "no:cacheprovider"]
    command.append(str(TESTS / "native"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[:4000]
