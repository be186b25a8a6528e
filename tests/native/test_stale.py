"""A captured sequence that something else was put in place of, token for token and cell for cell, is noticed."""

from __future__ import annotations

from collections.abc import Callable

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from support import selection
from support.cases import FEW, QWEN2VL, Case, Load, open_context, prefill, selected
from support.gguf_random import Spec
from support.native import NO_SELECTION, OK, STALE, Context, Image, params
from support.prompts import image, text

N_PROMPT = 100


def chosen(context: Context) -> int:
    return context.select(params(20, n_proxy=32))


def load_another(context: Context) -> None:
    """Another prompt's state, in the same cells."""
    context.remove(1)
    context.decode(text(N_PROMPT, 9), 0, seq=1)
    state = context.state(1)
    context.remove(1)
    context.load_state(state)


def load_the_same(context: Context) -> None:
    """Its own state: the same keys, but queries and statistics are not known to be theirs."""
    context.load_state(context.state())


def copy_another(context: Context) -> None:
    """Another sequence's pairs, in the same cells of its own stream or in others."""
    context.remove(1)
    context.decode(text(N_PROMPT, 9), 0, seq=1)
    context.remove(0)
    llama.llama_memory_seq_cp(context.memory, 1, 0, -1, -1)


def overwrite_and_take_over(context: Context) -> None:
    """Another sequence's tokens in the cells that the captured ones were in, which then go to its sequence."""
    context.remove(0)
    context.decode(text(N_PROMPT, 9), 0, seq=1)
    llama.llama_memory_seq_cp(context.memory, 1, 0, -1, -1)


Change = Callable[[Context], None]
CHANGES: list[Change] = [load_another, load_the_same, copy_another, overwrite_and_take_over]


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("more", [0, 100], ids=["", "after-more"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_replaced_sequence_is_stale(load: Load, change: Change, more: int, unified: bool) -> None:
    """In the positions of the captured one; `more` tokens were decoded and taken back before."""
    with Context(load(Spec()), n_seq_max=2, unified=unified) as context:
        assert context.capture() == OK
        context.decode(text(N_PROMPT), 0)
        assert chosen(context) == OK
        if more:
            context.capture_end()
            context.decode(text(more, 3), N_PROMPT)
            context.remove(start=N_PROMPT)
            assert context.capture() == OK
            context.remove(start=N_PROMPT - 1)
            context.decode(text(1, 4), N_PROMPT - 1)
            assert chosen(context) == OK
        before = context.cells()[0].positions
        change(context)
        assert np.array_equal(context.cells()[0].positions, before)
        assert context.compact(seq=1) == STALE
        assert chosen(context) == STALE
        context.clear()
        context.decode(text(N_PROMPT, 5), 0)
        assert chosen(context) == OK
        assert context.compact() == OK


def test_another_picture_in_place_of_the_captured_is_stale(load: Load) -> None:
    """The same text, the same grid, other embeddings: neither tokens nor positions differ."""
    spec = QWEN2VL
    pictures: list[Image] = [image(6, 5, spec.n_embd_image, seed) for seed in (1, 2)]
    states = []
    for picture in reversed(pictures):
        with Context(load(spec)) as context:
            assert context.capture() == OK
            context.prefill([text(10, 1), picture, text(10, 3)])
            assert chosen(context) == OK
            states.append(context.state())
            if picture is pictures[0]:
                context.load_state(states[0])
                assert chosen(context) == STALE
                assert context.compact() == NO_SELECTION


def test_a_token_after_a_loaded_state_is_enough(load: Load) -> None:
    """Then the last query is there, and only that token's statistics count."""
    with Context(load(Spec())) as context:
        assert context.capture(n_query=8) == OK
        context.decode(text(N_PROMPT), 0)
        context.load_state(context.state())
        context.decode(text(1, 4), N_PROMPT)
        assert context.select(selection.native_params(FEW, 30)) == OK
        assert len(context.hidden(0)) == 1
        assert selection.problems(context, selection.bounds(context, FEW, N_PROMPT + 1), 30) == []


def test_what_leaves_the_sequence_alone_does_not_matter(load: Load) -> None:
    """Saving it, copying it, other sequences that come and go, tails that are taken back, several selections."""
    case = Case("", n_prompt=N_PROMPT, context={"n_seq_max": 3})
    with open_context(load(Spec()), case) as context, selected(load(Spec()), Case("", n_prompt=N_PROMPT)) as expected:
        context.decode(text(30, 8), 0, seq=2)
        assert context.capture() == OK
        prefill(context, case)
        context.state()
        llama.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
        context.decode(text(20, 7), N_PROMPT, seq=1)
        context.remove(1)
        context.remove(2)
        context.decode(text(40, 6), 0, seq=2)
        for _ in range(2):
            assert context.select(selection.native_params(case.settings, case.budget)) == OK
            assert selection.problems(context, selection.bounds(expected, FEW, N_PROMPT), case.budget) == []
        assert context.compact(seq=1) == OK
        context.decode(text(10, 2), N_PROMPT)
        context.remove(start=N_PROMPT + 5)
        context.decode(text(1, 4), N_PROMPT + 5)
        assert context.select(selection.native_params(case.settings, case.budget)) == OK
        assert context.info().n_prompt == N_PROMPT + 6
        assert context.compact() == OK


def test_pairs_that_moved_after_the_selection_are_stale(load: Load) -> None:
    """A shift turns keys, though the cells are the same."""
    with Context(load(Spec())) as context, Context(load(Spec())) as other:
        assert context.capture() == OK
        context.decode(text(N_PROMPT), 0)
        context.remove(start=40, stop=50)
        assert chosen(context) == OK
        llama.llama_memory_seq_add(context.memory, 0, 20, 40, 10)
        assert context.compact(other) == STALE
        assert context.compact() == STALE


def test_what_is_handed_over_to_a_captured_sequence_was_not_captured(load: Load) -> None:
    """As many tokens, at the same positions and in the same cells as the destination has captured."""
    with Context(load(Spec())) as context, Context(load(Spec())) as destination:
        for one, seed in ((context, 0), (destination, 9)):
            assert one.capture() == OK
            one.decode(text(N_PROMPT, seed), 0)
        assert context.select(params(N_PROMPT)) == OK
        assert chosen(destination) == OK
        assert context.compact(destination) == OK
        assert destination.compact() == STALE
        assert chosen(destination) == STALE
        destination.decode(text(1), N_PROMPT)
        assert chosen(destination) == OK
