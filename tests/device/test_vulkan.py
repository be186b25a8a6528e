"""The tests that concern a device, once more on ggml's Vulkan backend; Mesa's software device will do.

A device that is not the CPU shows what a host hides: reading device memory through a pointer, or an op a backend lacks.
It takes a software device seconds to compute what a CPU does in milliseconds: each path is gone once. On a real GPU all
tests marked `device` can be run, with EDGE_SHIFTKV_TEST_GPU_LAYERS.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import synthetic_gguf

TESTS = Path(__file__).resolve().parents[1]

# Scores over quantized keys are left out: Vulkan quantizes the queries for them, which is coarser than the bounds.
# Selection after a prefill with flash attention, too: Mesa 22.3 frees a buffer twice there, in a thread of its own.
CASES = (
    # The capture: of tokens, of embeddings, with M-RoPE, of a fused projection, of queries for rotated keys.
    "test_capture.py::test_first_layer[qwen3]",
    "test_capture.py::test_first_layer[phi3]",
    "test_capture.py::test_first_layer[images]",
    "test_capture.py::test_first_layer[qwen2vl-images]",
    "test_capture.py::test_first_layer[rotated]",
    # Every method's graph; MM-ShiftKV's with M-RoPE, and with windows and soft-capped attention, too.
    "test_selection.py::test_architectures[llama-gqa-]",
    "test_selection.py::test_architectures[gemma2-]",
    "test_selection.py::test_architectures[qwen2vl-]",
    "test_rules.py::test_every_architecture[llama-gqa-streaming-]",
    "test_rules.py::test_every_architecture[llama-gqa-snapkv-]",
    "test_rules.py::test_every_architecture[llama-gqa-keydiff-]",
    "test_rules.py::test_every_architecture[llama-gqa-expected-]",
    "test_rules.py::test_every_architecture[llama-gqa-random-]",
    "test_rules.py::test_scores_of_the_caller[0-1-llama]",
    "test_rules.py::test_keys_are_those_in_the_cache[q8_0]",
    # Moving rows: values transposed and not, in every type, by the device's graph and through the host.
    "test_handover.py::test_in_place[f32-32]",
    "test_handover.py::test_in_place[f16-32]",
    "test_handover.py::test_in_place[bf16-32]",
    "test_handover.py::test_in_place[f16-flash-32]",
    "test_handover.py::test_in_place[q8_0-f16-64]",
    "test_handover.py::test_in_place[q8_0-flash-64]",
    "test_handover.py::test_in_place[q4_0-flash-32]",
    "test_handover.py::test_other_sequence[f16-32-streams]",
    "test_handover.py::test_smaller_context[f16-32]",
    "test_handover.py::test_streams_of_another_context[q8_0-flash-to-streams]",
    "test_handover.py::test_fragmented_destination[f16-32-3]",
    "test_handover.py::test_interleaved_source[f16-flash-32-1]",
    "test_handover.py::test_images_and_windows[512-gemma2]",
    # Decoding on what was moved, and selecting from it again.
    "test_decoding.py::test_like_a_mask_per_head[gqa-f16--small]",
    "test_decoding.py::test_like_a_mask_per_head[gqa-f16--in-place]",
    "test_multi_turn.py::test_second_turn[llama-in-place]",
    "test_multi_turn.py::test_second_turn[gemma3-small]",
)

COUNT_DEVICES = """
import llama_cpp
llama_cpp.llama_backend_init()
assert llama_cpp.llama_supports_gpu_offload(), "ggml sees no Vulkan device"
"""

TELL_OF_FLASH_ATTENTION = """
import ctypes, sys
import llama_cpp as llama
llama.llama_backend_init()
log = llama.llama_log_callback(lambda level, text, data: "Flash Attention" in (line := text.decode()) and print(line))
llama.llama_log_set(log, ctypes.c_void_p())
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
llama.llama_init_from_model(model, llama.llama_context_default_params())
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


@pytest.fixture(scope="module")
def output(environment: dict[str, str], request: pytest.FixtureRequest) -> str:
    """What pytest prints of all chosen cases, in one process: it takes the device seconds to compile the shaders.

    Mesa 22.3 now and then crashes in its device's own thread, also in a plain prefill. The cases that did not end run
    again, three times at most: what is wrong in this library would end them again. A case that fails is not repeated.
    """
    items = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    left = [item.callspec.params["case"] for item in items if hasattr(item, "callspec")]
    printed = ""
    for _ in range(4):
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
        command += [f"{TESTS / 'native'}/{case}" for case in left]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
        printed += done.stdout + done.stderr
        left = [case for case in left if not _ended(case, done.stdout)]
        if not left or done.returncode >= 0:
            break
    return printed


def _ended(case: str, output: str) -> bool:
    return re.search(rf"^tests/native/{re.escape(case)} (PASSED|FAILED|ERROR)", output, re.MULTILINE) is not None


def test_there_is_a_device(environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_device_the_cpu_answers_and_it_is_said(environment: dict[str, str]) -> None:
    demo = TESTS.parent / "models" / "demo" / "demo-text-q8_0.gguf"
    command = [sys.executable, "-m", "edge_shiftkv", "run", "-m", str(demo), "-p", "7 7", "--max-tokens", "2"]
    for driver, said in (({"VK_ICD_FILENAMES": "/none"}, True), ({}, False)):
        done = subprocess.run(command, env={**environment, **driver}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("built for Vulkan here and finds no such device" in done.stderr) == said
    on_the_cpu = [*command, "--gpu-layers", "0"]  # as was asked for
    done = subprocess.run(on_the_cpu, env={**environment, "VK_ICD_FILENAMES": "/none"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_model_of_a_rehearsal_needs_no_flash_attention(environment: dict[str, str], tmp_path: Path) -> None:
    """In which Mesa 22.3 crashes: what scripts/check_device.py --rehearse runs has to do without."""
    model = tmp_path / "small.gguf"
    synthetic_gguf.write(model, 1, synthetic_gguf.SMALL)
    command = [sys.executable, "-c", TELL_OF_FLASH_ATTENTION, str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "Flash Attention not supported, set to disabled" in done.stdout, done.stderr


@pytest.mark.parametrize("case", CASES)
def test_on_the_device(output: str, case: str) -> None:
    passed = re.search(rf"^tests/native/{re.escape(case)} PASSED", output, re.MULTILINE)
    if not passed:
        name = re.escape(case.partition("::")[2])
        own = re.search(rf"^_+ (ERROR at \w+ of )?{name} _+$.*?(?=^(___|===))", output, re.MULTILINE | re.DOTALL)
        pytest.fail(own[0] if own else f"{case} did not end:\n{output[-6000:]}", pytrace=False)
