"""Wrong calls: each gives its code, changes nothing and leaves the context as usable as it was."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from support import native
from support.cases import GEMMA3, MAMBA, Case, Load, open_context, selected
from support.gguf_random import Spec
from support.native import (
    ARGUMENT,
    EMPTY,
    MISMATCH,
    NO_SELECTION,
    NO_SPACE,
    NOT_CAPTURING,
    OK,
    STALE,
    UNSUPPORTED,
    Context,
    Method,
    environment,
    params,
)
from support.prompts import text

from edge_shiftkv.native.shiftkv import METHODS

N_PROMPT = 60
SPEC = Spec(n_layer=2, n_embd=64)


@pytest.fixture
def context(load: Load) -> Iterator[Context]:
    """A context with two sequences."""
    with Context(load(SPEC), n_seq_max=2) as result:
        yield result


@pytest.fixture
def captured(context: Context) -> Context:
    """With a prompt captured in sequence 0."""
    assert context.capture() == OK
    context.decode(text(N_PROMPT), 0)
    return context


@pytest.fixture
def chosen(captured: Context) -> Context:
    """With a selection of 20."""
    assert select(captured) == OK
    return captured


def select(context: Context, **others: Any) -> int:
    return context.select(params(**{"budget": 20, "n_proxy": 32, "keep_scores": True} | others))


def check_works(context: Context) -> None:
    """A whole round, in every sequence anew."""
    context.clear()
    assert context.capture() == OK
    context.decode(text(N_PROMPT, 1), 0)
    assert select(context) == OK
    assert context.compact() == OK
    assert np.all(np.isfinite(context.decode(text(1), N_PROMPT)))


@pytest.mark.parametrize("seq", [-1, 2, 1000])
def test_capture_of_no_sequence(context: Context, seq: int) -> None:
    assert context.capture(seq) == ARGUMENT
    check_works(context)


@pytest.mark.parametrize("n_query", [0, 513])
def test_capture_of_too_many_or_no_queries(context: Context, n_query: int) -> None:
    assert context.capture(0, n_query) == ARGUMENT
    check_works(context)


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0},
        {"budget": 1},
        {"n_group": 0},
        {"n_proxy": 0},
        {"n_proxy": 8},
        {"n_proxy": 40},
        {"n_proxy": 1 << 20},
        {"n_proxy": 2**32 - 16},
        {"n_stat": 0},
        {"n_repeat": 0},
        {"n_repeat": 1 << 31},
        {"gamma": -1.0},
        {"gamma": float("nan")},
        {"gamma": float("inf")},
        {"mass": 0.0},
        {"mass": -0.5},
        {"mass": 1.5},
        {"mass": float("nan")},
        {"observed": -0.1},
        {"observed": 1.0},
        {"observed": float("nan")},
        {"observed": 0.5, "n_window": 0},
        {"observed": 0.5, "n_window": 2},
        {"method": -1},
        {"method": len(METHODS)},
        {"n_recent": 0},
        {"n_pool": 0},
        {"n_pool": 4},
        {"n_pool": 65},
        {"n_prompt": N_PROMPT - 1},
        {"n_prompt": N_PROMPT + 1},
        {"method": Method.RANDOM, "n_prompt": N_PROMPT + 1},
        {"method": Method.SNAPKV, "n_window": 0},
        {"method": Method.SNAPKV, "n_window": 2},
        {"method": Method.SNAPKV, "n_window": 1, "n_prompt": N_PROMPT - 1},
        {"method": Method.EXPECTED_ATTENTION, "n_window": 0},
        {"method": Method.EXPECTED_ATTENTION, "n_window": 2},
        {"method": Method.EXPECTED_ATTENTION, "n_window": 1, "n_future": 0},
        {"method": Method.EXPECTED_ATTENTION, "n_window": 1, "n_future": 4097},
    ],
    ids=str,
)
def test_parameters_out_of_range(chosen: Context, wrong: dict[str, Any]) -> None:
    kept = chosen.all_kept()
    assert select(chosen, **wrong) == ARGUMENT
    assert chosen.all_kept() == kept
    check_works(chosen)


@pytest.mark.parametrize("budget", [2, N_PROMPT, 2**32 - 1])
def test_budgets_in_range(captured: Context, budget: int) -> None:
    assert select(captured, budget=budget) == OK
    assert captured.info().n_kept == min(budget, N_PROMPT)


def test_null_pointers(chosen: Context) -> None:
    out = (ctypes.c_float * 1024)()
    this, array, size = chosen.pointer, ctypes.addressof(out), len(out)
    settings = params(20)
    calls = [
        (native.c_capture, None, 0, 1),
        (native.c_capture_end, None),
        (native.c_select, None, ctypes.addressof(settings)),
        (native.c_select, this, None),
        (native.c_select_scores, None, ctypes.addressof(settings), array, size),
        (native.c_select_scores, this, None, array, size),
        (native.c_select_scores, this, ctypes.addressof(settings), None, size),
        (native.c_compact, None, this, 0),
        (native.c_compact, this, None, 0),
        (native.c_get_info, None, array),
        (native.c_get_info, this, None),
        (native.c_get_layers, None, array, size),
        (native.c_get_shape, None, 0, array),
        (native.c_get_shape, this, 0, None),
        (native.c_get_kept, None, 0, 0, array, size),
        (native.c_get_kept, this, 0, 0, None, size),
        (native.c_get_scores, None, 0, 0, array, size),
        (native.c_get_scores, this, 0, 0, None, size),
        (native.c_get_stats, None, 0, 512, array),
        (native.c_get_stats, this, 0, 512, None),
        (native.c_get_hidden, None, 0, array, size),
        (native.c_get_hidden, this, 0, None, size),
        (native.c_get_queries, None, 0, array, size),
        (native.c_get_queries, this, 0, None, size),
        (native.c_get_keys, None, 0, array, size),
        (native.c_get_keys, this, 0, None, size),
        (native.c_cache_size, None),
    ]
    for function, *arguments in calls:
        assert function(*arguments) == ARGUMENT, (function, arguments)
    check_works(chosen)


SCORES = np.zeros((2, 2, N_PROMPT), np.float32)


@pytest.mark.parametrize("size", [0, SCORES.size - 1, SCORES.size + 1])
def test_scores_of_another_size(chosen: Context, size: int) -> None:
    kept = chosen.all_kept()
    assert chosen.select_scores(params(20), np.zeros(size, np.float32)) == ARGUMENT
    assert chosen.select_scores(params(20, n_prompt=N_PROMPT - 1), SCORES) == ARGUMENT
    assert chosen.all_kept() == kept
    check_works(chosen)


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 1, N_PROMPT - 1)])
def test_scores_that_are_nan(chosen: Context, place: tuple[int, ...]) -> None:
    kept = chosen.all_kept()
    scores = SCORES.copy()
    scores[place] = np.nan
    assert chosen.select_scores(params(20), scores) == ARGUMENT
    assert chosen.all_kept() == kept
    check_works(chosen)


def test_scores_with_parameters_out_of_range(chosen: Context) -> None:
    for wrong in ({"budget": 1}, {"n_recent": 0}, {"n_pool": 2}, {"n_prompt": N_PROMPT + 1}):
        assert chosen.select_scores(params(**({"budget": 20} | wrong)), SCORES) == ARGUMENT
    check_works(chosen)


def test_infinite_scores_of_both_signs_have_no_mean(captured: Context) -> None:
    scores = SCORES.copy()
    scores[1, 1, 10:12] = np.inf, -np.inf
    assert captured.select_scores(params(20), scores) == OK
    assert captured.select_scores(params(20, n_pool=3), scores) == ARGUMENT
    assert captured.compact() == NO_SELECTION
    check_works(captured)


def test_select_without_capture(context: Context) -> None:
    assert select(context) == NOT_CAPTURING
    assert context.select_scores(params(20), SCORES) == NOT_CAPTURING
    out = np.empty(3, np.int32)
    assert native.c_get_layers(context.pointer, out.ctypes.data, 3) == NOT_CAPTURING
    assert native.c_get_shape(context.pointer, 0, out.ctypes.data) == NOT_CAPTURING
    context.decode(text(N_PROMPT), 0)
    assert select(context) == NOT_CAPTURING
    assert context.capture_end() == OK
    check_works(context)


def test_select_after_the_end_of_the_capture(captured: Context) -> None:
    assert captured.capture_end() == OK
    assert captured.capture_end() == OK
    assert select(captured) == NOT_CAPTURING
    check_works(captured)


def test_nothing_decoded(context: Context) -> None:
    assert context.capture() == OK
    assert select(context) == EMPTY
    out = np.empty(64, np.float32)
    assert native.c_get_stats(context.pointer, 0, 1, out.ctypes.data) == EMPTY
    assert native.c_get_hidden(context.pointer, 0, out.ctypes.data, 64) == EMPTY
    check_works(context)


def test_another_sequence_decoded(context: Context) -> None:
    assert context.capture(0) == OK
    context.decode(text(N_PROMPT), 0, seq=1)
    assert select(context) == EMPTY
    check_works(context)


def test_cleared(captured: Context) -> None:
    captured.clear()
    assert select(captured) == EMPTY
    check_works(captured)


def test_decoded_before_the_capture(context: Context) -> None:
    context.decode(text(N_PROMPT), 0)
    assert context.capture() == OK
    assert select(context) == STALE
    check_works(context)


def test_last_token_taken_back(captured: Context) -> None:
    assert captured.remove(start=N_PROMPT - 1)
    assert select(captured) == STALE
    captured.decode(text(1, 4), N_PROMPT - 1)
    assert select(captured) == OK
    check_works(captured)


def test_moved_after_the_last_token(captured: Context) -> None:
    """The last query was captured at another distance from the keys."""
    captured.remove(start=0, stop=30)
    llama.llama_memory_seq_add(captured.memory, 0, 30, -1, -10)
    assert select(captured) == STALE
    captured.decode(text(1), N_PROMPT - 10)
    assert select(captured) == OK
    check_works(captured)


def test_decoded_outside_of_the_capture(captured: Context) -> None:
    assert captured.capture_end() == OK
    captured.decode(text(2), N_PROMPT)
    assert captured.capture() == OK
    assert select(captured) == STALE
    captured.decode(text(1), N_PROMPT + 2)
    assert select(captured) == OK
    check_works(captured)


def test_a_failed_selection_replaces_the_last(chosen: Context) -> None:
    assert chosen.remove(start=N_PROMPT - 1)
    assert select(chosen) == STALE
    assert chosen.compact() == NO_SELECTION
    check_works(chosen)


@pytest.mark.parametrize("seq", [-1, 2])
def test_hand_over_to_no_sequence(chosen: Context, seq: int) -> None:
    assert chosen.compact(seq=seq) == ARGUMENT
    assert chosen.compact() == OK


def test_hand_over_without_selection(captured: Context, load: Load) -> None:
    with Context(load(SPEC)) as other:
        assert other.compact(captured) == NO_SELECTION
        assert captured.compact(other) == NO_SELECTION
        assert captured.compact() == NO_SELECTION
    check_works(captured)


def decode_more(context: Context) -> None:
    context.decode(text(1), N_PROMPT)


def take_back(context: Context) -> None:
    context.remove(start=N_PROMPT - 3)


def take_out(context: Context) -> None:
    context.remove(start=10, stop=12)


def replace_last(context: Context) -> None:
    context.remove(start=N_PROMPT - 1)
    context.decode(text(1, 4), N_PROMPT - 1)


def replace_all(context: Context) -> None:
    context.clear()
    context.decode(text(N_PROMPT, 4), 0)


def replace_last_uncaptured(context: Context) -> None:
    context.capture_end()
    replace_last(context)


def capture_again(context: Context) -> None:
    context.capture()


def capture_other(context: Context) -> None:
    context.capture(seq=1)


def load_other(context: Context) -> None:
    context.decode(text(N_PROMPT, 4), 0, seq=1)
    state = context.state(1)
    context.remove(1)
    context.load_state(state)


def compact_in_place(context: Context) -> None:
    assert context.compact() == OK


CHANGES: list[Callable[[Context], None]] = [
    decode_more,
    take_back,
    take_out,
    replace_last,
    replace_all,
    replace_last_uncaptured,
    capture_again,
    capture_other,
    load_other,
    compact_in_place,
    Context.clear,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_hand_over_after_the_cache_has_changed(chosen: Context, load: Load, change: Callable[[Context], None]) -> None:
    change(chosen)
    with Context(load(SPEC)) as other:
        other.decode(text(10, 5), 0)
        before, state = chosen.state(), other.state()
        assert chosen.compact(other) == STALE
        assert chosen.compact() == STALE
        assert chosen.compact(seq=1) == STALE
        assert other.state() == state
        assert chosen.state() == before
        check_works(other)
    check_works(chosen)


def test_hand_over_after_the_end_of_the_capture(chosen: Context) -> None:
    kept = chosen.all_kept()
    assert chosen.capture_end() == OK
    assert chosen.all_kept() == kept
    assert chosen.compact() == OK


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (Spec(n_layer=2, n_embd=64, seed=7), {}),
        (SPEC, {"type_k": "f16"}),
        (SPEC, {"type_v": "f16"}),
        (SPEC, {"flash": True}),
        (SPEC, {"type_k": "q8_0", "type_v": "q8_0", "flash": True}),
        (MAMBA, {}),
    ],
    ids=["model", "keys", "values", "flash", "quantized", "mamba"],
)
def test_hand_over_to_another_kind_of_cache(chosen: Context, load: Load, spec: Spec, options: dict[str, Any]) -> None:
    with Context(load(spec), **options) as other:
        other.decode(text(10, 5), 0)
        state = other.state()
        assert chosen.compact(other) == MISMATCH
        assert other.state() == state
    assert chosen.compact() == OK


def test_hand_over_to_keys_that_are_not_rotated(load: Load) -> None:
    spec = Spec(n_layer=2, n_head=2, n_head_kv=1, d_head=64)
    case = Case("", spec, type_k="q8_0")
    with environment("LLAMA_ATTN_ROT_DISABLE", "1"):
        other = open_context(load(spec), case)
    with other, selected(load(spec), case) as context:
        assert context.compact(other) == MISMATCH


@pytest.mark.parametrize("n_free", [0, 19, 20])
def test_hand_over_to_a_full_context(chosen: Context, load: Load, n_free: int) -> None:
    with Context(load(SPEC), 256, n_seq_max=2) as other:
        other.decode(text(256 - n_free - 5, 5), 0, seq=1)
        other.decode(text(5, 6), 0, seq=0)  # counts as free: it is replaced
        states = [other.state(seq) for seq in (0, 1)]
        if n_free + 5 < 20:
            assert chosen.compact(other) == NO_SPACE
            assert [other.state(seq) for seq in (0, 1)] == states
        else:
            assert chosen.compact(other) == OK
            assert other.state(1) == states[1]
        check_works(other)


def test_reading_without_a_selection(captured: Context) -> None:
    out = np.empty(1024, np.int32)
    pointer, array = captured.pointer, out.ctypes.data
    assert native.c_get_info(pointer, array) == NO_SELECTION
    assert native.c_get_kept(pointer, 0, 0, array, 1024) == NO_SELECTION
    assert native.c_get_scores(pointer, 0, 0, array, 1024) == NO_SELECTION


def test_reading_what_is_not_there(chosen: Context) -> None:
    out = np.zeros(4096, np.float32)
    pointer, array = chosen.pointer, out.ctypes.data
    for layer, head in ((-1, 0), (2, 0), (0, -1), (0, 2)):
        assert native.c_get_kept(pointer, layer, head, array, 4096) == ARGUMENT
        assert native.c_get_scores(pointer, layer, head, array, 4096) == ARGUMENT
    for layer in (-1, 2):
        assert native.c_get_stats(pointer, layer, 512, array) == ARGUMENT
        assert native.c_get_hidden(pointer, layer, array, 4096) == ARGUMENT
        assert native.c_get_queries(pointer, layer, array, 4096) == ARGUMENT
        assert native.c_get_keys(pointer, layer, array, 4096) == ARGUMENT
        assert native.c_get_shape(pointer, layer, array) == ARGUMENT
    assert native.c_get_stats(pointer, 0, 0, array) == ARGUMENT
    assert native.c_get_layers(pointer, array, 1) == NO_SPACE
    assert native.c_get_kept(pointer, 0, 0, array, 19) == NO_SPACE
    assert native.c_get_scores(pointer, 0, 0, array, N_PROMPT - 1) == NO_SPACE
    assert native.c_get_hidden(pointer, 0, array, 63) == NO_SPACE
    assert native.c_get_queries(pointer, 0, array, 127) == NO_SPACE
    assert native.c_get_keys(pointer, 0, array, N_PROMPT * 64 - 1) == NO_SPACE
    assert not out.any()


def test_layers_with_windows_cannot_be_read(load: Load) -> None:
    with selected(load(GEMMA3), Case("")) as context:
        assert context.layers() == [1, 3, 5]
        out = np.empty(4096, np.float32)
        assert native.c_get_kept(context.pointer, 0, 0, out.ctypes.data, 4096) == ARGUMENT
        assert native.c_get_hidden(context.pointer, 0, out.ctypes.data, 4096) == ARGUMENT


def test_scores_only_if_asked_for(captured: Context) -> None:
    out = np.empty(N_PROMPT, np.float32)
    for others in ({"keep_scores": False}, {"budget": N_PROMPT}):
        assert select(captured, **others) == OK
        assert native.c_get_scores(captured.pointer, 0, 0, out.ctypes.data, N_PROMPT) == NO_SELECTION


def test_reading_what_was_not_captured(context: Context) -> None:
    out = np.empty(64, np.float32)

    def statuses() -> set[int]:
        return {
            native.c_get_stats(context.pointer, 0, 1, out.ctypes.data),
            native.c_get_hidden(context.pointer, 0, out.ctypes.data, 64),
            native.c_get_queries(context.pointer, 0, out.ctypes.data, 64),
            native.c_get_keys(context.pointer, 0, out.ctypes.data, 64),
        }

    assert statuses() == {NOT_CAPTURING}
    context.capture()
    context.decode(text(9), 0)
    context.remove(start=5)
    assert statuses() == {STALE}
    context.capture_end()
    assert statuses() == {NOT_CAPTURING}


SINKS = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 96, "attention.sliding_window": 32}
UNSUPPORTED_MODELS = {
    "recurrent": MAMBA,
    "encoder-decoder": Spec("t5", n_head_kv=4, meta={"attention.relative_buckets_count": 32}),
    "alibi": Spec("mpt", n_head_kv=4, meta={"attention.max_alibi_bias": 8.0}),
    "sinks": Spec("gpt-oss", n_layer=2, meta=SINKS),
    "no-memory": Spec("llada"),
}


@pytest.mark.parametrize("spec", UNSUPPORTED_MODELS.values(), ids=UNSUPPORTED_MODELS)
@pytest.mark.parametrize("flash", [False, True], ids=["", "flash"])
def test_models_that_cannot_be_cut(load: Load, spec: Spec, flash: bool) -> None:
    """They are refused before prefill and decode as ever afterwards."""
    model = load(spec)
    results = []
    for capture in (False, True):
        with Context(model, flash=flash) as context:
            if capture:
                assert context.capture() == UNSUPPORTED
                assert context.capture() == UNSUPPORTED
                assert select(context) == NOT_CAPTURING
                assert context.compact() == NO_SELECTION
            if spec.arch != "t5":  # would have to be encoded first
                results.append(context.decode(text(20), 0))
            if capture:
                assert select(context) == NOT_CAPTURING
    assert spec.arch == "t5" or np.array_equal(*results)


def test_batches_of_one_token_cannot_be_captured(load: Load) -> None:
    with Context(load(SPEC), n_ubatch=1) as context:
        assert context.capture() == UNSUPPORTED
        context.decode(text(5), 0)


def test_statuses_have_sentences() -> None:
    sentences = {native.c_status_str(status) for status in range(-9, 1)}
    assert len(sentences) == 10
    assert native.c_status_str(5) == native.c_status_str(0)
    assert native.c_status_str(-10) not in sentences
