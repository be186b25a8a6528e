"""What a selection takes beside the cache, and moves between host and device: graphs are laid out, not computed."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import pytest
from support.cases import Load
from support.gguf_random import Spec
from support.native import ARGUMENT, NOT_CAPTURING, OK, Context, Method, Model, c_select_size, environment, params
from support.prompts import text

MIB = 1 << 20

LLAVA = Spec(n_layer=1, n_embd=64, n_head=32, n_head_kv=32, d_head=128, n_ff=32)
"""The heads of a LLaVA-1.6 of 7B."""
QWEN = Spec(n_layer=1, n_embd=64, n_head=28, n_head_kv=4, d_head=128, n_ff=32)
"""The heads of Qwen2.5-VL-7B."""

SAMPLED = {"n_layer_repeat": 0}

SELECTIONS: dict[str, tuple[Method, dict[str, Any]]] = {
    "paper": (Method.SHIFTKV, SAMPLED),
    "most-proxies": (Method.SHIFTKV, SAMPLED | {"n_proxy": 4096, "n_group": 32}),
    "most-groups": (Method.SHIFTKV, SAMPLED | {"n_proxy": 4096, "n_group": 4096}),
    "one-group": (Method.SHIFTKV, SAMPLED | {"n_proxy": 4096, "n_group": 1}),
    "observed": (Method.SHIFTKV, SAMPLED | {"n_proxy": 256, "observed": 0.5, "n_pool": 5}),
    "snapkv": (Method.SNAPKV, {"n_window": 512}),
    "keydiff": (Method.KEYDIFF, {}),
    "expected": (Method.EXPECTED_ATTENTION, {}),
}
"""All that compute with the keys, and the settings that take most."""


def long_context(model: Model, n_prompt: int, type_kv: str = "q4_0") -> Context:
    """Room for a long prompt, with a cache as small as can be."""
    context = Context(model, n_prompt, type_k=type_kv, flash=True, n_ubatch=8)
    assert context.capture(n_query=512) == OK
    return context


@pytest.mark.parametrize("graph", [None, "1"], ids=["", "graph"])
@pytest.mark.parametrize(("spec", "n_prompt"), [(LLAVA, 32_768), (LLAVA, 131_072), (QWEN, 32_768), (QWEN, 131_072)])
def test_a_selection_takes_no_more_than_128_mib(load: Load, spec: Spec, n_prompt: int, graph: str | None) -> None:
    """The attention of 512 proxies of 32 heads over 131,072 keys alone would be 8 GiB."""
    with environment("LLAMA_SHIFTKV_GRAPH", graph), long_context(load(spec), n_prompt) as context:
        for name, (method, settings) in SELECTIONS.items():
            size = context.select_size(params(512, method, **settings), n_prompt)
            assert MIB < size <= 128 * MIB, (name, size / MIB)


def test_the_size_is_that_of_the_buffers(load: Load) -> None:
    """It grows with the proxies' queries, and with what is kept for each key."""
    with environment("LLAMA_SHIFTKV_GRAPH", "1"), long_context(load(LLAVA), 32_768) as context:
        few, many = (context.select_size(params(512, n_proxy=n, **SAMPLED), 32_768) for n in (512, 4096))
        assert many - few >= (4096 - 512) * 32 * 128 * 4
        short, long = (context.select_size(params(512, **SAMPLED), n) for n in (16_384, 32_768))
        assert long - short >= 16_384 * 32 * 4


def test_errors(load: Load) -> None:
    with Context(load(Spec())) as context:
        assert context.select_size(params(20), 100) == NOT_CAPTURING
        assert context.capture() == OK
        assert context.select_size(params(20), 100) > 0
        assert context.select_size(params(20, Method.STREAMINGLLM), 100) == 0
        for n_prompt in (0, 513):
            assert context.select_size(params(20), n_prompt) == ARGUMENT
        for wrong in (
            params(1),
            params(20, n_pool=2),
            params(20, n_group=0),
            params(20, Method.SNAPKV),
            params(20, -1),
        ):  # one query is captured
            assert context.select_size(wrong, 100) == ARGUMENT
        assert c_select_size(context.pointer, None, 100) == ARGUMENT
        # The context goes on as before.
        context.decode(text(100), 0)
        assert context.select(params(20)) == OK
        assert context.compact() == OK


# What a backend is asked to compute

COLUMNS_HIP = 16_384
"""ggml-cuda.cu: without CUB, ARGSORT's row has to fit into 64 KiB of shared memory."""
GRID = 65_535
"""softmax.cu: rows and matrices are the second and third dimension of a grid."""
RANGE = 128 * MIB
"""ggml-vulkan.cpp refuses tensors above maxStorageBufferRange: 128 MiB on Adreno, Mali and Mesa's software device."""


@dataclass(frozen=True)
class Tensor:
    """A type, four sizes, and the bytes from the first to the last number."""

    kind: str
    ne: tuple[int, ...]
    n_bytes: int


def operations(lines: list[str]) -> set[tuple[str, tuple[Tensor, ...]]]:
    """Operation, result and first operands of all nodes of a selection's graphs, from the library's log."""
    found = set()
    for line in lines:
        if match := re.match(r"select_size: computes (\w+) (.*)", line):
            tensors = re.findall(r"(\w+)\[([\d,]+)\]:(\d+)", match[2])
            found.add((match[1], tuple(Tensor(t, tuple(map(int, ne.split(","))), int(n)) for t, ne, n in tensors)))
    assert len(found) > 10
    return found


@pytest.mark.parametrize("n_prompt", [4096, 32_768, 131_072])
@pytest.mark.parametrize("spec", [LLAVA, QWEN], ids=["llava", "qwen"])
def test_shapes_are_within_what_backends_take(
    load: Load, caplog: pytest.LogCaptureFixture, spec: Spec, n_prompt: int
) -> None:
    """But for the exceptions here, which the scheduler computes on the CPU."""
    kv_type = "q4_0"
    with environment("LLAMA_SHIFTKV_GRAPH", "1"), long_context(load(spec), n_prompt, kv_type) as context:
        with caplog.at_level(logging.DEBUG, "edge_shiftkv.llama_cpp"):
            for method, settings in SELECTIONS.values():
                assert context.select_size(params(512, method, **settings), n_prompt) > 0
        for operation, tensors in operations(caplog.messages):
            result, *operands = tensors
            if operation in ("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"):
                continue
            if operation == "SOFT_MAX":
                assert operands[0].ne[1] <= GRID and operands[0].ne[2] <= GRID
            if operation == "ARGSORT":
                # Once for each KV head, not for each group: it has to order what is kept.
                assert result.ne[1] <= spec.n_head_kv
                assert result.ne[0] <= COLUMNS_HIP or n_prompt > COLUMNS_HIP
            if operation == "GET_ROWS" and operands[0].ne[0] == 1:
                assert result.ne[1] == 1, "rows of one number: the least score only"
            # Keys and values by head lie among those of all heads: a view of nearly the whole layer.
            numbers = [t for t in tensors if t.kind != kv_type]
            assert all(t.n_bytes <= RANGE for t in numbers), (operation, tensors)


# What crosses the bus


@pytest.mark.parametrize("name", [name for name in SELECTIONS if not name.startswith(("most", "one"))])
def test_what_moves_is_a_thousandth_of_the_cache(load: Load, name: str) -> None:
    """By 28 layers and 4,000 tokens: of each layer next to nothing, and a few numbers per key once."""
    n_prompt, method, settings = 1000, *SELECTIONS[name]
    moved = {}
    for n_layer in (3, 5):
        spec = Spec(n_layer=n_layer, n_embd=64, n_head=12, n_head_kv=2, d_head=128, n_ff=32)
        with environment("LLAMA_SHIFTKV_GRAPH", "1"), Context(load(spec), 1024, type_k="f16", flash=True) as context:
            assert context.capture(n_query=512) == OK
            context.decode(text(n_prompt), 0)
            settings = settings | {"n_window": min(settings.get("n_window", 32), 32)}
            for _ in range(2):  # the noise stays on the device
                assert context.select(params(128, method, **settings)) == OK
            moved[n_layer] = context.info().bytes_moved
            row = context.info().kv_bytes_prompt / n_layer / n_prompt
    of_a_layer = (moved[5] - moved[3]) / 2
    once = moved[3] - 3 * of_a_layer
    assert 0 < of_a_layer <= 1024
    # For each key its place in the prompt, and its row where a rule looks at keys or values one by one.
    assert once + 3000 * 2 * 4 + 28 * of_a_layer <= 28 * 4000 * row / 1000


def test_noise_moves_once(load: Load) -> None:
    with environment("LLAMA_SHIFTKV_GRAPH", "1"), Context(load(Spec())) as context:
        assert context.capture() == OK
        context.decode(text(100), 0)
        moved = []
        for seed in (0, 0, 1):
            assert context.select(params(20, seed=seed)) == OK
            moved.append(context.info().bytes_moved)
        assert moved[0] - moved[1] == moved[2] - moved[1] == 512 * 128 * 4


def test_scores_move_only_when_asked_for(load: Load) -> None:
    """And then count as asked for, not as moved."""
    with environment("LLAMA_SHIFTKV_GRAPH", "1"), Context(load(Spec())) as context:
        assert context.capture() == OK
        context.decode(text(300), 0)
        moved = []
        for keep_scores in (False, True):
            assert context.select(params(20, Method.KEYDIFF, keep_scores=keep_scores)) == OK
            moved.append(context.info().bytes_moved)
        assert moved[0] == moved[1]


# Both ways to compute


@pytest.mark.parametrize("isa", ["vnni", "avx512", "avx2", "plain"])
@pytest.mark.parametrize("type_k", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_the_kernel_and_the_graph_agree(load: Load, type_k: str, isa: str) -> None:
    """Scores but for the rounding of queries by the graph; each set of instructions where the CPU has it."""
    spec = Spec(
        "gemma2",
        n_layer=4,
        n_head=6,
        n_head_kv=2,
        meta={"attention.sliding_window": 32, "attn_logit_softcapping": 20.0},
    )
    found = []
    for variables in ({"LLAMA_SHIFTKV_GRAPH": "1"}, {"LLAMA_SHIFTKV_ISA": isa}):
        ((name, value),) = variables.items()
        with environment(name, value), Context(load(spec), type_k=type_k, flash=True) as context:
            assert context.capture(n_query=32) == OK
            context.decode(text(333), 0)
            assert context.select(params(40, n_proxy=96, observed=0.4, n_layer_repeat=1, keep_scores=True)) == OK
            found.append((context.all_kept(), [context.scores(layer) for layer in context.layers()]))
    (graph, graph_scores), (kernel, kernel_scores) = found
    n_same = n_all = 0
    for layer in graph:
        for a, b in zip(graph[layer], kernel[layer], strict=True):
            n_same += len(set(a) & set(b))
            n_all += len(a)
    assert n_same >= 0.97 * n_all
    for a, b in zip(graph_scores, kernel_scores, strict=True):
        off = abs(a[:, :-1] - b[:, :-1])
        assert (off > 0.01).mean() <= {"f32": 0.005, "f16": 0.02}.get(type_k, 0.1)  # a vote more or less
