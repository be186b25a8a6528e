"""The hand-over: kept rows arrive bit for bit, wherever they go and whatever lies around them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from support import selection
from support.cases import FEW, GEMMA2, GEMMA3, QWEN2VL, SMALL_WINDOWS, Case, Load, selected
from support.gguf_random import Spec
from support.kv_state import Cells
from support.native import GPU_LAYERS, NO_SPACE, OK, Chunk, Context, Model, params
from support.prompts import image, text

N_PROMPT = 120
BUDGET = 40

LAYOUTS = {
    "f32": ("f32", "f32", False),
    "f16": ("f16", "f16", False),
    "bf16": ("bf16", "bf16", False),
    "q8_0-f16": ("q8_0", "f16", False),
    "f16-flash": ("f16", "f16", True),
    "bf16-flash": ("bf16", "bf16", True),
    "q8_0-flash": ("q8_0", "q8_0", True),
    "q4_0-flash": ("q4_0", "q4_0", True),
    "q8_0-q4_0-flash": ("q8_0", "q4_0", True),
}
"""Types of keys and values, and flash attention: without it, values are stored transposed."""

layouts = pytest.mark.parametrize(("type_k", "type_v", "flash"), LAYOUTS.values(), ids=LAYOUTS)
# A head of 32 or 96 quantized values is no multiple of 4 bytes.
head_sizes = pytest.mark.parametrize("d_head", [32, 64, 96])


def model_of(load: Load, d_head: int) -> Model:
    return load(Spec(n_layer=2, n_embd=64, n_head=2, n_head_kv=2, d_head=d_head, n_ff=32))


def check_arrived(source: Cells, kept: dict[int, list[list[int]]], arrived: Cells) -> None:
    """Every KV head holds its kept rows, in order; the cells carry the positions of the prompt's last tokens."""
    n_kept = len(next(iter(kept.values()))[0])
    assert np.array_equal(arrived.positions, source.positions[-n_kept:])
    assert len(source.k) == len(arrived.k) == len(kept)
    for index, heads in enumerate(kept.values()):
        for rows, rows_arrived in ((source.k, arrived.k), (source.v, arrived.v)):
            before = rows[index].heads(len(heads))
            after = rows_arrived[index].heads(len(heads))
            assert rows[index].type == rows_arrived[index].type
            for head, tokens in enumerate(heads):
                assert np.array_equal(after[head], before[head][tokens])


def prefilled(context: Context, seq: int = 0) -> Cells:
    """Decode a prompt and select; return the prompt's cells."""
    assert context.capture(seq) == OK
    context.decode(text(N_PROMPT), 0, seq)
    select(context)
    return context.cells(seq)[0]


def select(context: Context) -> None:
    assert context.select(params(BUDGET, n_proxy=64)) == OK
    # Otherwise there would be little to tell apart.
    assert len({tuple(head) for heads in context.all_kept().values() for head in heads}) > 2


def fill(context: Context, block: int, first: int, last: int) -> None:
    """Fill the first 256 cells with blocks of two sequences by turns."""
    seqs = [first if i // block % 2 == 0 else last for i in range(256)]
    positions = [seqs[:i].count(seq) for i, seq in enumerate(seqs)]
    assert context.try_decode(text(256, 5), positions, seqs) == 0


@pytest.mark.device
@head_sizes
@layouts
def test_in_place(load: Load, type_k: str, type_v: str, flash: bool, d_head: int) -> None:
    with Context(model_of(load, d_head), type_k=type_k, type_v=type_v, flash=flash) as context:
        source = prefilled(context)
        kept = context.all_kept()
        assert context.compact() == OK
        check_arrived(source, kept, context.cells()[0])


@pytest.mark.device
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@head_sizes
@layouts
def test_other_sequence(load: Load, type_k: str, type_v: str, flash: bool, d_head: int, unified: bool) -> None:
    options: dict[str, Any] = {"n_seq_max": 3, "unified": unified}
    with Context(model_of(load, d_head), 768, type_k=type_k, type_v=type_v, flash=flash, **options) as context:
        context.decode(text(20, 8), 0, seq=2)  # replaced
        source = prefilled(context, seq=1)
        before = context.state(1)
        assert context.compact(seq=2) == OK
        check_arrived(source, context.all_kept(), context.cells(2)[0])
        assert context.state(1) == before
        assert context.last_position(2) == N_PROMPT - 1


@pytest.mark.device
@head_sizes
@layouts
def test_smaller_context(load: Load, type_k: str, type_v: str, flash: bool, d_head: int) -> None:
    model = model_of(load, d_head)
    options: dict[str, Any] = {"type_k": type_k, "type_v": type_v, "flash": flash}
    with Context(model, 1024, **options) as context, Context(model, 256, **options) as small:
        small.decode(text(20, 8), 0)  # replaced
        source = prefilled(context)
        before = context.state()
        assert context.compact(small) == OK
        check_arrived(source, context.all_kept(), small.cells()[0])
        assert context.state() == before


@pytest.mark.device
@pytest.mark.parametrize(("unified", "others"), [(True, False), (False, True)], ids=["to-streams", "from-streams"])
@layouts
def test_streams_of_another_context(
    load: Load, type_k: str, type_v: str, flash: bool, unified: bool, others: bool
) -> None:
    """One of the two contexts has a cache per sequence."""
    model = model_of(load, 64)
    options: dict[str, Any] = {"type_k": type_k, "type_v": type_v, "flash": flash, "n_seq_max": 2}
    with (
        Context(model, 512, unified=unified, **options) as context,
        Context(model, 512, unified=others, **options) as other,
    ):
        other.decode(text(30, 8), 0, seq=0)
        before = other.state(0)
        source = prefilled(context, seq=1)
        assert context.compact(other, seq=1) == OK
        check_arrived(source, context.all_kept(), other.cells(1)[0])
        assert other.state(0) == before


@pytest.mark.device
@pytest.mark.parametrize("block", [1, 3, 16])
@head_sizes
@layouts
def test_fragmented_destination(load: Load, type_k: str, type_v: str, flash: bool, d_head: int, block: int) -> None:
    """The free cells are holes between those of another sequence, which stays as it is."""
    model = model_of(load, d_head)
    options: dict[str, Any] = {"type_k": type_k, "type_v": type_v, "flash": flash}
    with Context(model, 512, **options) as context, Context(model, 256, n_seq_max=2, **options) as full:
        fill(full, block, 0, 1)
        full.remove(0)
        before = full.state(1)
        source = prefilled(context)
        assert context.compact(full) == OK
        check_arrived(source, context.all_kept(), full.cells()[0])
        assert full.state(1) == before


@pytest.mark.device
@pytest.mark.parametrize("seq", [0, 1])
@head_sizes
@layouts
def test_interleaved_source(load: Load, type_k: str, type_v: str, flash: bool, d_head: int, seq: int) -> None:
    """The prompt's cells lie between those of another sequence, in which the kept rows stay."""
    options: dict[str, Any] = {"type_k": type_k, "type_v": type_v, "flash": flash, "n_seq_max": 2}
    with Context(model_of(load, d_head), 256, **options) as context:
        assert context.capture(seq) == OK
        fill(context, 2, 0, 1)
        select(context)
        source, other = context.cells(seq)[0], context.state(1 - seq)
        assert context.compact(seq=seq) == OK
        check_arrived(source, context.all_kept(), context.cells(seq)[0])
        assert context.state(1 - seq) == other


@pytest.mark.parametrize("n_ctx", [256, 512])
def test_shared_cells_are_not_overwritten(load: Load, n_ctx: int) -> None:
    """A sequence that shares the prompt's cells keeps them: in place needs cells of its own then."""
    with Context(model_of(load, 32), n_ctx, n_seq_max=2) as context:
        source = prefilled(context)
        llama.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
        if n_ctx == 256:
            context.decode(text(100, 3), N_PROMPT, seq=1)
        shared = context.state(1)
        status = context.compact()
        assert context.state(1) == shared
        if n_ctx == 256:
            assert status == NO_SPACE
            assert context.last_position() == N_PROMPT - 1
        else:
            assert status == OK
            check_arrived(source, context.all_kept(), context.cells()[0])


@pytest.mark.device
@pytest.mark.parametrize(
    "case",
    [
        Case("llama", images=True),
        Case("qwen2vl", QWEN2VL, images=True),
        Case("gemma2", GEMMA2, images=True),
        Case("gemma3", GEMMA3, images=True),
        Case("gemma3-small-windows", GEMMA3, n_prompt=400, context=SMALL_WINDOWS),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("n_ubatch", [512, 64])  # non-causal images need room for themselves
def test_images_and_windows(load: Load, case: Case, n_ubatch: int) -> None:
    """Cells take M-RoPE's positions along; window layers are handed over as they are."""
    model = load(case.spec)
    case = replace(case, n_ubatch=n_ubatch)
    with selected(model, case) as context, Context(model, 256, type_k="f16", **case.context) as small:
        n_past = context.last_position() + 1
        source = context.cells()
        assert context.compact(small) == OK
        arrived = small.cells()
        check_arrived(source[0], context.all_kept(), arrived[0])
        for window, window_arrived in zip(source[1:], arrived[1:], strict=True):
            # What the next token still sees.
            seen = window.positions[:, 0] > n_past - case.spec.meta["attention.sliding_window"]
            assert np.array_equal(window_arrived.positions, window.positions[seen])
            for rows, rows_arrived in zip(window.k + window.v, window_arrived.k + window_arrived.v, strict=True):
                assert np.array_equal(rows_arrived.raw, rows.raw[seen])


@pytest.mark.device
def test_in_place_leaves_windows_alone(load: Load) -> None:
    with Context(load(GEMMA3), type_k="f16") as context:
        source = prefilled(context)
        window = context.cells()[1]
        kept = context.all_kept()
        assert context.compact() == OK
        full, window_after = context.cells()
        check_arrived(source, kept, full)
        for rows, rows_after in zip(window.k + window.v, window_after.k + window_after.v, strict=True):
            assert np.array_equal(rows.raw, rows_after.raw)


@pytest.mark.device
@pytest.mark.parametrize("n_prompt", [20, 100, 400])
def test_windows_that_one_long_sequence_fills(load: Load, n_prompt: int) -> None:
    """What it no longer sees makes room, as for tokens that are decoded; both sequences go on as they do there."""
    model = load(GEMMA3)
    options: dict[str, Any] = {"type_k": "f16", "n_seq_max": 4, "n_ubatch": 32, **SMALL_WINDOWS}
    with (
        Context(model, 1024, **options) as context,
        Context(model, 2048, **options) as destination,
        Context(model, 2048, **options) as expected,
    ):
        for one in (destination, expected):
            one.decode(text(1000, 1), 0, seq=0)
        assert context.capture() == OK
        context.decode(text(n_prompt), 0)
        assert context.select(params(n_prompt)) == OK
        for seq in (1, 2):
            assert context.compact(destination, seq) == OK
            expected.decode(text(n_prompt), 0, seq)
            # No gaps: of what the long sequence holds, what is older than the oldest pair it lost is gone, too.
            first = llama.llama_memory_seq_pos_min(destination.memory, 0)
            assert 1000 - first <= 256 - seq * min(n_prompt, 31)
        for seq, position in ((1, n_prompt), (2, n_prompt), (0, 1000)):
            logits = [
                [one.decode([t], position + i, seq) for i, t in enumerate(text(3, 4))]
                for one in (destination, expected)
            ]
            assert logits[0] == pytest.approx(np.array(logits[1]), abs=2e-2 if GPU_LAYERS else 1e-3)


@pytest.mark.device
def test_windows_with_room_elsewhere_stay(load: Load) -> None:
    """Nothing is taken from another sequence where there are empty cells."""
    model = load(GEMMA3)
    options: dict[str, Any] = {"type_k": "f16", "n_seq_max": 4, "n_ubatch": 32, **SMALL_WINDOWS}
    with Context(model, 512, **options) as context, Context(model, 512, **options) as destination:
        destination.decode(text(150, 1), 0, seq=0)
        before = destination.state(0)
        assert llama.llama_memory_seq_pos_min(destination.memory, 0) == 0
        prefilled(context)
        assert context.compact(destination, 1) == OK
        assert destination.state(0) == before
        assert llama.llama_memory_seq_pos_min(destination.memory, 0) == 0


@pytest.mark.device
@pytest.mark.parametrize(("nx", "ny"), [(10, 10), (12, 3), (3, 12), (1, 1)])
def test_a_prompt_that_ends_in_a_picture(load: Load, nx: int, ny: int) -> None:
    """In M-RoPE the position after it is that after its rows and columns; proxies and decoding go on there."""
    model = load(QWEN2VL)
    prompt: list[Chunk] = [text(40, 1), image(nx, ny, QWEN2VL.n_embd_image, 2)]
    n_past, n_prompt = 40 + max(nx, ny), 40 + nx * ny
    with Context(model, type_k="f32") as context, Context(model, type_k="f32") as small:
        assert context.capture() == OK
        assert context.prefill(prompt) == n_past
        assert context.select(selection.native_params(FEW, 30)) == OK
        assert context.info().n_past == n_past
        assert selection.problems(context, selection.bounds(context, FEW, n_past), 30) == []
        assert context.select(params(n_prompt)) == OK
        assert context.compact(small) == OK
        assert context.info().n_past == n_past
        expected = context.decode(text(1, 4), n_past)
        assert small.decode(text(1, 4), n_past) == pytest.approx(expected, abs=2e-2 if GPU_LAYERS else 1e-3)
