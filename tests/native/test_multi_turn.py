"""What happens on top of a compacted cache: taking tokens back, further turns, saving, shifting."""

from __future__ import annotations

from dataclasses import replace

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from support import selection
from support.cases import FEW, GEMMA3, QWEN2VL, Case, Load, open_context, selected
from support.gguf_random import Spec
from support.native import OK, STALE, Context, assert_same
from support.prompts import text
from support.reference import Array
from support.rounding import of_logits

CASES = [
    Case("llama", type_k="f32", type_v="f32"),
    Case("flash", flash=True),
    Case("quantized", type_k="q8_0", type_v="q4_0", flash=True),
    Case("gemma3", GEMMA3),
    Case("qwen2vl", QWEN2VL, images=True),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
in_place = pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "small"])


def continued(context: Context, tokens: list[int], position: int, seq: int = 0) -> Array:
    """The logits after each token."""
    return np.array([context.decode([token], position + i, seq) for i, token in enumerate(tokens)])


def compacted(context: Context, destination: Context) -> int:
    """Hand over; return the position that decoding goes on at."""
    n_past = context.last_position() + 1
    assert context.compact(destination) == OK
    assert destination.last_position() == n_past - 1
    return n_past


@pytest.mark.device
@in_place
@cases
def test_generated_tokens_are_taken_back(load: Load, case: Case, in_place: bool) -> None:
    model = load(case.spec)
    with selected(model, case) as context, open_context(model, case) as other:
        destination = context if in_place else other
        n_past = compacted(context, destination)
        first = continued(destination, text(6, 1), n_past)
        assert destination.remove(start=n_past + 2)
        assert destination.last_position() == n_past + 1
        assert not np.array_equal(continued(destination, text(4, 2), n_past + 2), first[2:])
        assert destination.remove(start=n_past)
        assert destination.last_position() == n_past - 1
        assert_same(continued(destination, text(6, 1), n_past), first)


@pytest.mark.device
@in_place
@cases
def test_second_turn(load: Load, case: Case, in_place: bool) -> None:
    """What is there after the first turn is a prompt like any other."""
    model = load(case.spec)
    budget, n_more = 50, 33
    with selected(model, case) as context, open_context(model, case) as other:
        destination = context if in_place else other
        n_past = compacted(context, destination)
        if not in_place:
            assert destination.capture() == OK
        assert destination.select(selection.native_params(case.settings, budget)) == STALE  # no new token yet
        destination.decode(text(n_more, 4), n_past)
        n_past += n_more
        assert destination.select(selection.native_params(case.settings, budget)) == OK
        info = destination.info()
        assert (info.n_prompt, info.n_kept) == (case.budget + n_more, budget)
        allowed = selection.bounds(destination, case.settings, n_past)
        assert selection.problems(destination, allowed, budget) == []

        source, kept = destination.cells()[0], destination.all_kept()
        compacted(destination, destination)
        after = destination.cells()[0]
        for index, heads in enumerate(kept.values()):
            for rows, rows_after in ((source.k[index], after.k[index]), (source.v[index], after.v[index])):
                before = rows.heads(len(heads))
                expected = np.array([row[tokens] for row, tokens in zip(before, heads, strict=True)])
                assert np.array_equal(rows_after.heads(len(heads)), expected)
        assert np.isfinite(destination.decode(text(3), n_past)).all()


@pytest.mark.device
@cases
def test_states_of_compacted_sequences(load: Load, case: Case) -> None:
    """Saved and loaded elsewhere, a compacted sequence gives the same logits."""
    model = load(case.spec)
    two = replace(case, context={**case.context, "n_seq_max": 2})
    with selected(model, case) as context, open_context(model, two) as other:
        n_past = compacted(context, context)
        state = context.state()
        expected = continued(context, text(4, 1), n_past)
        other.load_state(state, seq=1)
        assert other.last_position(1) == n_past - 1
        # Vision models with M-RoPE carry positions of their own.
        assert np.array_equal(other.cells(1)[0].positions[:, 0], np.sort(other.cells(1)[0].positions[:, 0]))
        tolerance = of_logits(case.type_k, case.flash)
        assert continued(other, text(4, 1), n_past, seq=1) == pytest.approx(expected, abs=tolerance)


@pytest.mark.device
@pytest.mark.parametrize("type_k", ["f32", "f16"])
def test_shifted_positions(load: Load, type_k: str) -> None:
    """Kept pairs are rotated by the shift, whatever token they belong to."""
    with selected(load(Spec()), Case("", type_k=type_k, type_v=type_k)) as context:
        n_past = compacted(context, context)
        expected = continued(context, text(4, 1), n_past)
        context.remove(start=n_past)
        llama.llama_memory_seq_add(context.memory, 0, 0, -1, -60)
        assert context.last_position() == n_past - 61
        # Half-precision keys are rounded once more.
        tolerance = of_logits(type_k) * (1 if type_k == "f32" else 2.5)
        assert continued(context, text(4, 1), n_past - 60) == pytest.approx(expected, abs=tolerance)


@pytest.mark.device
def test_selection_after_a_shift(load: Load) -> None:
    """A prompt that moved before its last token was decoded is ranked by its new keys and positions."""
    with Context(load(Spec())) as context:
        assert context.capture() == OK
        context.decode(text(100), 0)
        context.remove(start=20, stop=50)
        llama.llama_memory_seq_add(context.memory, 0, 50, -1, -30)
        context.decode(text(20, 1), 70)
        assert context.select(selection.native_params(FEW, 30)) == OK
        assert context.info().n_prompt == 90
        assert selection.problems(context, selection.bounds(context, FEW, 90), 30) == []


@pytest.mark.device
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("seq", [0, 1])
def test_selection_beside_another_sequence(load: Load, seq: int, unified: bool) -> None:
    """Cells of another sequence between the prompt's play no part."""
    with Context(load(Spec()), n_seq_max=2, unified=unified, n_ubatch=30, type_k="f16") as context:
        assert context.capture(seq) == OK
        both = [text(90, 1), text(90, 2)]
        for start in range(0, 90, 15):
            mixed = [(both[s][i], i, s) for i in range(start, start + 15) for s in (0, 1)]
            assert context.try_decode(*(list(column) for column in zip(*mixed, strict=True))) == 0
        assert context.select(selection.native_params(FEW, 30)) == OK
        assert selection.problems(context, selection.bounds(context, FEW, 90, seq), 30) == []
        assert context.compact(seq=seq) == OK


def test_prompts_one_after_the_other(load: Load) -> None:
    """The capture goes on over cleared caches; the last prompt's selection is as if it were the first."""
    model = load(Spec())
    settings = selection.native_params(FEW, 30)
    kept = []
    for prompts in ([3], [1, 2, 3]):
        with Context(model, n_ubatch=64) as context:
            assert context.capture() == OK
            for seed in prompts:
                context.clear()
                context.decode(text(100 + seed, seed), 0)
                assert context.select(settings) == OK
            kept.append(context.all_kept())
    assert kept[0] == kept[1]
