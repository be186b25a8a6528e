"""Prefill layer by layer: what it keeps, hands over and answers is what prefill with all layers does, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from support import selection
from support.cases import (
    FEW,
    GEMMA3,
    HEAD_64,
    MAMBA,
    MHA,
    PHI3,
    QWEN2,
    QWEN2VL,
    QWEN3,
    QWEN3VL,
    Case,
    Load,
    open_context,
    prefill,
)
from support.gguf_random import Spec
from support.native import (
    ARGUMENT,
    EMPTY,
    MISMATCH,
    NO_SPACE,
    NOT_CAPTURING,
    OK,
    STALE,
    UNSUPPORTED,
    Context,
    Method,
    Model,
    Params,
    c_by_layer,
    params,
)
from support.prompts import text
from support.reference import Array

QUANTIZED = {"type_k": "q8_0", "type_v": "q8_0", "flash": True}

CASES = [
    Case("llama"),
    Case("mha", MHA),
    Case("qwen2", QWEN2),
    Case("qwen3", QWEN3),
    Case("phi3", PHI3),
    Case("flash", flash=True),
    Case("phi3-flash-ubatch", PHI3, flash=True, n_ubatch=64),
    Case("ubatch-7", n_ubatch=7),
    Case("last-ubatch-of-1", n_ubatch=64, n_prompt=129),
    Case("more-cells", n_ubatch=64, n_prompt=400),
    Case("one-layer", Spec(n_layer=1)),
    Case("q8_0", **QUANTIZED),
    Case("q8_0-rotated", HEAD_64, **QUANTIZED, n_ubatch=64),
    Case("q8_0-keys", type_k="q8_0"),
    Case("all-kept", budget=150),
    Case("images", images=True, n_ubatch=32),
    Case("images-qwen2vl", QWEN2VL, images=True, flash=True, n_ubatch=32),
    Case("images-qwen3vl", QWEN3VL, images=True),
    # Shapes that differ by layer: three caches of one layer, and values that are padded.
    Case("openelm", Spec("openelm", kv_heads=[2, 4, 2], n_layer=3, n_head=4)),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@contextmanager
def contexts(model: Model, case: Case, n: int) -> Iterator[list[Context]]:
    """Empty contexts."""
    with ExitStack() as stack:
        yield [stack.enter_context(open_context(model, case)) for _ in range(n)]


def read_by_layer(context: Context, case: Case, settings: Params, destination: Context) -> None:
    """Read the case's prompt in a context that was told to, and hand over."""
    for left in reversed(range(case.spec.n_layer)):
        prefill(context, case)
        assert context.next_layer(settings, destination) == left


def continued(context: Context, position: int) -> Array:
    """The logits of some tokens more."""
    return np.array([context.decode([token], position + i) for i, token in enumerate(text(5, 7))])


@pytest.mark.device
@cases
def test_same_as_with_all_layers(load: Load, case: Case) -> None:
    model = load(case.spec)
    settings = selection.native_params(case.settings, case.budget)
    with contexts(model, case, 4) as (usual, usual_small, by_layer, small):
        assert usual.capture() == OK
        position = prefill(usual, case)
        logits = usual.logits()
        assert usual.select(settings) == usual.compact(usual_small) == OK

        assert by_layer.by_layer() == OK
        read_by_layer(by_layer, case, settings, small)
        np.testing.assert_array_equal(by_layer.logits(), logits)
        assert by_layer.all_kept() == usual.all_kept()
        # Each layer's inputs are uploaded anew.
        for name in {name for name, _ in usual.info()._fields_} - {"bytes_moved"}:
            assert getattr(by_layer.info(), name) == getattr(usual.info(), name), name
        if case.budget < case.n_prompt:
            for layer in usual.layers():
                np.testing.assert_array_equal(by_layer.scores(layer), usual.scores(layer))
        assert small.state() == usual_small.state()
        np.testing.assert_array_equal(continued(small, position), continued(usual_small, position))


@pytest.mark.device
@pytest.mark.parametrize("method", list(Method), ids=lambda method: method.name)
def test_methods(load: Load, method: Method) -> None:
    """Those that look at queries find each layer's own, though all layers' have the same place."""
    case = Case("methods", n_ubatch=48)
    model = load(case.spec)
    settings = params(50, method, n_window=20, n_future=64, keep_scores=True)
    with contexts(model, case, 4) as (usual, usual_small, by_layer, small):
        assert usual.capture(n_query=20) == by_layer.by_layer(n_query=20) == OK
        prefill(usual, case)
        assert usual.select(settings) == usual.compact(usual_small) == OK
        read_by_layer(by_layer, case, settings, small)
        assert by_layer.all_kept() == usual.all_kept()
        assert small.state() == usual_small.state()


def test_scores_of_a_caller(load: Load) -> None:
    case = Case("scores", Spec(n_layer=3))
    model = load(case.spec)
    settings = params(30)
    scores = np.random.default_rng(0).normal(size=(3, case.spec.n_head_kv, case.n_prompt)).astype(np.float32)
    with contexts(model, case, 4) as (usual, usual_small, by_layer, small):
        assert usual.capture() == by_layer.by_layer() == OK
        prefill(usual, case)
        assert usual.select_scores(settings, scores) == usual.compact(usual_small) == OK
        for layer in range(3):
            prefill(by_layer, case)
            np.testing.assert_array_equal(by_layer.queries(layer), usual.queries(layer))
            np.testing.assert_array_equal(by_layer.keys(layer), usual.keys(layer))
            assert by_layer.next_layer(settings, small, scores=scores[layer]) == 2 - layer
        assert by_layer.all_kept() == usual.all_kept()
        assert small.state() == usual_small.state()


def test_into_a_sequence_among_others(load: Load) -> None:
    case = Case("sequences")
    model = load(case.spec)
    settings = params(40, n_proxy=128)
    with (
        contexts(model, case, 3) as (usual, usual_small, by_layer),
        Context(model, type_k="f16", n_seq_max=3, unified=False, n_ctx=3 * 256) as small,
    ):
        before = small.decode(text(20, 3), 0, 0)
        assert usual.capture() == by_layer.by_layer() == OK
        position = prefill(usual, case)
        assert usual.select(settings) == usual.compact(usual_small) == OK
        for _ in range(case.spec.n_layer):
            prefill(by_layer, case)
            assert by_layer.next_layer(settings, small, 2) >= 0
        assert small.cells(2) == usual_small.cells()
        assert small.last_position(2) == position - 1
        assert small.last_position(0) == 19
        small.remove(0, 19)
        np.testing.assert_allclose(small.decode(text(20, 3)[19:], 19, 0), before, rtol=0, atol=1e-4)


def test_cache_of_one_layer(load: Load) -> None:
    model = load(Spec(n_layer=5))
    with Context(model, 1024, type_k="f16") as usual, Context(model, 512, type_k="f16") as by_layer:
        assert by_layer.by_layer(1024) == OK
        assert by_layer.cache_size() * 5 == usual.cache_size()


@pytest.mark.parametrize("spec", [GEMMA3, MAMBA], ids=["sliding-windows", "no-cache"])
def test_models_that_cannot_be(load: Load, spec: Spec) -> None:
    with Context(load(spec)) as context:
        assert context.by_layer() == UNSUPPORTED


def test_several_sequences_cannot_be(load: Load) -> None:
    with Context(load(Spec()), n_seq_max=2) as context:
        assert context.by_layer() == UNSUPPORTED


def test_wrong_use(load: Load) -> None:
    case = Case("errors")
    model = load(case.spec)
    settings = params(40, n_proxy=128)
    with contexts(model, case, 3) as (context, small, other), Context(model, type_k="f32") as unlike:
        assert context.next_layer(settings, small) == NOT_CAPTURING
        for arguments in (
            (None, 512, 1),
            (context.pointer, 0, 1),
            (context.pointer, 512, 0),
            (context.pointer, 512, 513),
        ):
            assert c_by_layer(*arguments) == ARGUMENT
        assert context.by_layer() == OK
        assert context.by_layer() == ARGUMENT  # is so already
        assert context.capture() == UNSUPPORTED
        assert context.next_layer(settings, small) == EMPTY
        prefill(context, case)
        assert context.select(settings) == UNSUPPORTED
        assert context.next_layer(settings, context) == ARGUMENT
        assert context.next_layer(settings, small, 1) == ARGUMENT
        assert context.next_layer(params(40, n_prompt=20), small) == ARGUMENT
        assert context.next_layer(params(1), small) == ARGUMENT
        assert context.next_layer(settings, unlike) == MISMATCH
        assert context.next_layer(params(40, Method.SNAPKV), small) == ARGUMENT  # 1 query was captured
        assert context.next_layer(settings, small) == case.spec.n_layer - 1
        assert small.last_position() == -1  # nothing is there before all is
        assert context.try_decode([1, 2, 3], [5, 6, 7], [0] * 3) != OK  # not how the prompt began
        assert context.try_decode(text(100), range(100), [0] * 100) == OK
        assert context.next_layer(settings, small) == STALE  # a part of the prompt only
        assert context.try_decode(text(case.n_prompt)[100:], range(100, case.n_prompt), [0] * 50) == OK
        assert context.next_layer(settings, other) == ARGUMENT
        assert context.next_layer(params(41, n_proxy=128), small) == ARGUMENT
        assert context.next_layer(settings, small) == case.spec.n_layer - 2


def test_nothing_is_read_after_the_last_layer(load: Load) -> None:
    case = Case("end", Spec(n_layer=2))
    settings = params(40, n_proxy=128)
    with contexts(load(case.spec), case, 2) as (context, small):
        assert context.by_layer() == OK
        read_by_layer(context, case, settings, small)
        state = small.state()
        assert context.try_decode([1], [150], [0]) != OK
        assert context.next_layer(settings, small) == ARGUMENT
        assert context.compact(small) == UNSUPPORTED
        assert small.state() == state


def test_destination_is_too_small_or_written_to(load: Load) -> None:
    case = Case("room")
    model = load(case.spec)
    with contexts(model, case, 2) as (context, other), Context(model, 256, type_k="f16") as small:
        assert context.by_layer() == other.by_layer() == OK
        small.decode(text(230), 0)
        prefill(context, case)
        settings = params(100, n_proxy=128)
        assert small.remove(0)
        assert context.next_layer(settings, small) == case.spec.n_layer - 1
        small.decode(text(200), 0)
        prefill(context, case)
        assert context.next_layer(settings, small) == STALE
    with contexts(model, case, 1) as (context,), Context(model, 256, type_k="f16", n_seq_max=2) as small:
        small.decode(text(230), 0, 1)
        assert context.by_layer() == OK
        prefill(context, case)
        assert context.next_layer(params(100, n_proxy=128), small) == NO_SPACE


@pytest.mark.parametrize("method", [Method.SHIFTKV, Method.STREAMINGLLM], ids=["graph", "host"])
def test_longer_than_the_batch(load: Load, method: Method) -> None:
    """A prompt that the context could not have held before its cache was replaced."""
    case = Case("long", n_prompt=700, settings=FEW)
    model = load(case.spec)
    settings = params(60, method)
    with (
        Context(model, 1024, type_k="f16") as usual,
        contexts(model, case, 3) as (by_layer, small, usual_small),
    ):
        assert usual.capture() == by_layer.by_layer(1024) == OK
        position = prefill(usual, case)
        assert usual.select(settings) == usual.compact(usual_small) == OK
        read_by_layer(by_layer, case, settings, small)
        np.testing.assert_array_equal(by_layer.logits(), usual.logits())
        assert small.state() == usual_small.state()
        np.testing.assert_array_equal(continued(small, position), continued(usual_small, position))
