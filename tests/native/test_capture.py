"""What prefill leaves behind for the selection: statistics, the last hidden state and the last queries."""

from __future__ import annotations

import numpy as np
import pytest
from support import reference
from support.cases import GEMMA2, GEMMA3, PHI3, QWEN2, QWEN2VL, QWEN3, QWEN3VL, Case, Load
from support.gguf_random import Spec
from support.native import GPU_LAYERS, OK, STALE, Context, Image, assert_same, params
from support.prompts import text
from support.reference import Array
from support.weights import Llama, Weights

TOLERANCE = 1e-2 if GPU_LAYERS else 1e-4
"""Of values around 1, by a few layers computed in single precision."""

FLASH_TOLERANCE = 1e-2
"""The same with flash attention, which computes with half-precision keys and values."""

N_PROMPT = 90


def check(context: Context, layer: int, hidden: Array, n_stat: int = 512, tolerance: float = TOLERANCE) -> None:
    """Statistics and last hidden state are those of the hidden states [T, n_embd]."""
    expected = reference.statistics(hidden, n_stat)
    assert context.stats(layer, n_stat) == pytest.approx(expected, abs=tolerance)
    assert context.hidden(layer)[-1] == pytest.approx(hidden[-1], abs=tolerance)


def check_queries(
    context: Context, layer: int, hidden: Array, n: int, n_past: int, tolerance: float = TOLERANCE
) -> None:
    """The queries are those of the last n hidden states."""
    positions = np.arange(n_past - n, n_past)
    expected = context.model.weights.queries(layer, hidden[-n:], positions, rotated=context.rotated)
    assert context.hidden(layer) == pytest.approx(hidden[-n:], abs=tolerance)
    queries = context.queries(layer)
    assert queries.shape == expected.shape
    assert queries == pytest.approx(expected, abs=10 * tolerance)


def first_hidden(weights: Weights, case: Case) -> Array:
    """The hidden states of the first layer that is cut if that is layer 0."""
    n_embd = case.spec.n_embd
    parts = [
        chunk.embeddings[:, :n_embd] if isinstance(chunk, Image) else weights.embed(list(chunk))
        for chunk in case.prompt()
    ]
    return weights.attention_input(0, np.concatenate(parts))


@pytest.mark.device
@pytest.mark.parametrize("n_ubatch", [512, 32, 7])
@pytest.mark.parametrize("flash", [False, True])
def test_all_layers(load: Load, flash: bool, n_ubatch: int) -> None:
    model = load(Spec())
    tokens = text(N_PROMPT)
    hidden = Llama(model.weights, np.float32).forward(tokens, 0).hidden
    tolerance = FLASH_TOLERANCE if flash else TOLERANCE
    with Context(model, flash=flash, n_ubatch=n_ubatch) as context:
        assert context.capture(n_query=5) == OK
        context.prefill([tokens])
        for layer in range(model.spec.n_layer):
            for n_stat in (1, 50, N_PROMPT, 10_000):
                check(context, layer, hidden[layer], n_stat, tolerance)
            check_queries(context, layer, hidden[layer], 5, N_PROMPT, tolerance)


GEMMA3_FULL = Spec("gemma3")
"""Without sliding windows, so that layer 0 is cut."""

ARCHITECTURES = [
    Case("qwen2", QWEN2),
    Case("qwen3", QWEN3),
    Case("phi3", PHI3),
    Case("qwen2vl", QWEN2VL),
    Case("gemma3", GEMMA3_FULL),
    Case("images", images=True),
    Case("qwen2vl-images", QWEN2VL, images=True),
    Case("qwen3vl-images", QWEN3VL, images=True),
    Case("gemma3-images", GEMMA3_FULL, images=True),
    Case("rotated", Spec(n_head=2, n_head_kv=1, d_head=64), type_k="q8_0"),
]


@pytest.mark.device
@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
def test_first_layer(load: Load, case: Case) -> None:
    model = load(case.spec)
    hidden = first_hidden(model.weights, case)
    with Context(model, type_k=case.type_k, type_v="f16", n_ubatch=32) as context:
        assert context.capture(n_query=3) == OK
        n_past = context.prefill(case.prompt())
        check(context, 0, hidden)
        check(context, 0, hidden, 40)
        check_queries(context, 0, hidden, 3, n_past)


@pytest.mark.device
@pytest.mark.parametrize("spec", [Spec(), QWEN2VL, GEMMA2, GEMMA3], ids=lambda spec: spec.arch)
def test_capture_does_not_change_the_logits(load: Load, spec: Spec) -> None:
    model = load(spec)
    results = []
    for capture in (False, True):
        with Context(model, n_ubatch=32) as context:
            if capture:
                assert context.capture(n_query=8) == OK
            logits = [context.decode(text(N_PROMPT), 0)]
            logits += [context.decode([token], N_PROMPT + i) for i, token in enumerate(text(3, 9))]
            results.append(np.array(logits))
    assert_same(*results)


@pytest.mark.parametrize(("n_prompt", "n_query"), [(1, 64), (2, 64), (20, 64), (70, 64), (100, 33), (150, 512)])
def test_query_rings(load: Load, n_prompt: int, n_query: int) -> None:
    model = load(Spec())
    hidden = model.weights.attention_input(0, model.weights.embed(text(n_prompt)))
    with Context(model, n_ubatch=16) as context:
        assert context.capture(n_query=n_query) == OK
        context.prefill([text(n_prompt)])
        check_queries(context, 0, hidden, min(n_prompt, n_query), n_prompt)


def test_tokens_taken_back(load: Load) -> None:
    model = load(Spec())
    kept, other = text(60), text(5, 7)
    hidden = model.weights.attention_input(0, model.weights.embed(kept[:57] + other))
    with Context(model) as context:
        assert context.capture(n_query=8) == OK
        context.prefill([kept])
        assert context.remove(start=57)
        assert context.select(params(8)) == OK
        check_queries(context, 0, hidden[:57], 5, 57)  # the last three of the ring of eight are gone
        context.decode(other, 57)
        check(context, 0, hidden)
        check_queries(context, 0, hidden, 8, 62)  # as if they had never been
        assert context.remove(start=50)
        assert context.select(params(8)) == STALE  # the last token's query is gone
        context.decode(kept[50:52], 50)
        check_queries(context, 0, model.weights.attention_input(0, model.weights.embed(kept[:52])), 2, 52)


def test_tokens_before_the_capture_do_not_count(load: Load) -> None:
    model = load(Spec())
    tokens = text(80)
    hidden = model.weights.attention_input(0, model.weights.embed(tokens))
    with Context(model) as context:
        context.decode(tokens[:30], 0)
        assert context.capture(n_query=64) == OK
        context.decode(tokens[30:], 30)
        check(context, 0, hidden[30:])
        check_queries(context, 0, hidden, 50, 80)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("seq", [0, 1])
def test_one_of_two_sequences(load: Load, seq: int, unified: bool) -> None:
    """Two sequences in the same batches: only one is captured."""
    model = load(Spec())
    both = [text(40, 1), text(40, 2)]
    hidden = Llama(model.weights, np.float32).forward(both[seq], 0).hidden
    with Context(model, n_seq_max=2, unified=unified, n_ubatch=24) as context:
        assert context.capture(seq, 4) == OK
        for start in range(0, 40, 10):
            mixed = [(both[s][i], i, s) for i in range(start, start + 10) for s in (0, 1)]
            assert context.try_decode(*(list(column) for column in zip(*mixed, strict=True))) == 0
        for layer in range(model.spec.n_layer):
            check(context, layer, hidden[layer])
            check_queries(context, layer, hidden[layer], 4, 40)
