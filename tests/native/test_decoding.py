"""Decoding after the hand-over: like on a cache in which each KV head does not see the dropped pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.cases import (
    GEMMA2,
    GEMMA3,
    MHA,
    PHI3,
    QWEN2,
    QWEN2VL,
    QWEN3,
    QWEN3VL,
    SMALL_WINDOWS,
    Case,
    Load,
    open_context,
    prefill,
    selected,
)
from support.gguf_random import Spec
from support.kv_state import Cells
from support.native import GPU_LAYERS, OK, Context, Model, assert_same, params
from support.prompts import text
from support.reference import Array, Settings
from support.rounding import of_logits
from support.weights import Llama

N_PROMPT = 100
ANSWER = text(6, 3)

# A difference that is one: in multiples of the tolerance, which is wide on a device.
CLEAR = 3 if GPU_LAYERS else 10


def continued(context: Context, position: int, seq: int = 0) -> Array:
    """The logits after each of the answer's tokens."""
    return np.array([context.decode([token], position + i, seq) for i, token in enumerate(ANSWER)])


@pytest.mark.device
@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "small"])
@pytest.mark.parametrize("flash", [False, True], ids=["", "flash"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("spec", [MHA, Spec(), Spec(n_layer=1, n_head=6)], ids=["mha", "gqa", "one-layer"])
def test_like_a_mask_per_head(load: Load, spec: Spec, dtype: type[np.floating], flash: bool, in_place: bool) -> None:
    model = load(spec)
    options: dict[str, Any] = {"type_k": {np.float32: "f32", np.float16: "f16"}[dtype], "flash": flash}
    with Context(model, **options) as context, Context(model, 256, **options) as small:
        assert context.capture() == OK
        context.decode(text(N_PROMPT), 0)
        assert context.select(params(30, n_proxy=64)) == OK
        kept = context.all_kept()
        destination = context if in_place else small
        assert context.compact(destination) == OK
        logits = continued(destination, N_PROMPT)

    llama = Llama(model.weights, dtype)
    prompt = llama.forward(text(N_PROMPT), 0)
    visible = [np.zeros((spec.n_head_kv, N_PROMPT), bool) for _ in range(spec.n_layer)]
    for mask, heads in zip(visible, kept.values(), strict=True):
        np.put_along_axis(mask, np.array(heads), True, axis=1)
    expected = llama.forward(ANSWER, N_PROMPT, prompt.pairs, visible).logits
    tolerance = of_logits(options["type_k"], flash)
    assert logits == pytest.approx(expected, abs=tolerance)

    # It matters which pairs are seen: neither all of them nor others for a head lead to the same.
    everything = llama.forward(ANSWER, N_PROMPT, prompt.pairs).logits
    rolled = llama.forward(ANSWER, N_PROMPT, prompt.pairs, [np.roll(mask, 1, axis=0) for mask in visible]).logits
    assert np.abs(everything - expected).max() > CLEAR * tolerance
    assert np.abs(rolled - expected).max() > 3 * tolerance


KEEP_ALL = [
    Case("llama"),
    Case("qwen2", QWEN2, flash=True),
    Case("qwen3", QWEN3, n_ubatch=32),
    Case("phi3", PHI3),
    Case("gemma2", GEMMA2),
    Case("gemma3", GEMMA3),
    Case("gemma3-flash", GEMMA3, flash=True, n_ubatch=16),
    Case("gemma3-images", GEMMA3, images=True),
    Case("gemma2-small-windows", GEMMA2, n_ubatch=32, n_prompt=300, context=SMALL_WINDOWS),
    Case("gemma3-small-windows", GEMMA3, n_ubatch=32, n_prompt=300, context=SMALL_WINDOWS),
    Case("images", images=True, flash=True),
    Case("qwen2vl", QWEN2VL),
    Case("qwen2vl-images", QWEN2VL, images=True),
    Case("qwen3vl-images", QWEN3VL, images=True),
    Case("q8_0", type_k="q8_0", type_v="q8_0", flash=True),
    Case("q4_0", type_k="q4_0", type_v="q4_0", flash=True),
]


def visible(caches: list[Cells], n_past: int, window: int | None) -> list[Cells]:
    """What the token at n_past still sees: of a second cache, of layers with windows, the last cells only."""
    return [cells if i == 0 else cells.where(cells.positions[:, 0] > n_past - window) for i, cells in enumerate(caches)]


@pytest.mark.device
@pytest.mark.parametrize("budget", [0, 1000])
@pytest.mark.parametrize("case", KEEP_ALL, ids=lambda case: case.name)
def test_a_budget_of_the_whole_prompt_changes_nothing(load: Load, case: Case, budget: int) -> None:
    """Also in another context; `budget` is what it has beyond the prompt.

    There, a window's cells come to lie elsewhere, and kernels sum in the order of cells: what is decoded on them is
    compared bit for bit with what is decoded on the same cells put there by llama.cpp itself.
    """
    model = load(case.spec)
    window = case.spec.meta.get("attention.sliding_window")
    with open_context(model, case) as untouched:
        n_past = prefill(untouched, case)
        cells = visible(untouched.cells(), n_past, window)
        expected = continued(untouched, n_past)
    n_prompt = sum(len(chunk) if isinstance(chunk, list) else len(chunk.embeddings) for chunk in case.prompt())
    case = replace(case, budget=n_prompt + budget)
    with selected(model, case) as context, open_context(model, case) as other, open_context(model, case) as restored:
        info = context.info()
        assert (info.n_prompt, info.n_kept) == (n_prompt, n_prompt)
        assert context.compact(other) == OK
        assert other.cells() == cells
        state = other.state()
        restored.load_state(state)
        answer = continued(other, n_past)
        assert_same(answer, continued(restored, n_past))
        if window is None:
            assert_same(answer, expected)
        else:
            tolerance = 2 * rounding(model, case)
            assert answer == pytest.approx(expected, abs=tolerance)
            # A few tokens less are more than rounding.
            restored.load_state(state)
            restored.remove(start=n_past - 9, stop=n_past - 1)
            assert np.abs(continued(restored, n_past) - answer).max() > CLEAR * tolerance
        # Nothing moves in place.
        assert context.compact() == OK
        assert_same(continued(context, n_past), expected)


def rounding(model: Model, case: Case) -> float:
    """What a cache that rounds to half precision, and flash attention, change in the case's logits at all.

    Where sums run in another order they differ by less than a number in half precision can tell, but for a few numbers
    that become the next one. That is twice as far away as the farthest that rounding moves one.
    """
    results = []
    for variant in (case, replace(case, type_k="f32", type_v="f32", flash=False)):
        with open_context(model, variant) as context:
            results.append(continued(context, prefill(context, variant)))
    return float(np.abs(results[0] - results[1]).max())


@pytest.mark.parametrize(
    "case",
    [case for case in KEEP_ALL if case.name in ("llama", "gemma2", "qwen2vl-images")],
    ids=lambda case: case.name,
)
def test_bounds_are_twice_the_rounding(load: Load, case: Case) -> None:
    """The fixed bounds of other tests, where it would be too much to measure."""
    for flash in (False, True):
        found = rounding(load(case.spec), replace(case, type_k="f16", type_v="f16", flash=flash))
        assert of_logits("f16", flash) / 50 < 2 * found < of_logits("f16", flash)


@pytest.mark.device
def test_selecting_changes_nothing(load: Load) -> None:
    """Neither the cache nor the last logits, nor those of what is decoded next."""
    model = load(Spec())
    with Context(model) as untouched, Context(model) as context:
        expected = untouched.decode(text(N_PROMPT), 0)
        assert context.capture() == OK
        context.decode(text(N_PROMPT), 0)
        before = context.state()
        assert context.select(params(20)) == OK
        assert context.state() == before
        assert_same(context.logits(), expected)
        assert_same(continued(context, N_PROMPT), continued(untouched, N_PROMPT))


@pytest.mark.device
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_other_sequences_decode_as_before(load: Load, unified: bool) -> None:
    """The sequence beside a compacted one, and the source beside its compacted copy."""
    model = load(Spec())
    options: dict[str, Any] = {"n_seq_max": 3, "unified": unified}
    with Context(model, 768, **options) as untouched, Context(model, 768, **options) as context:
        for each in (untouched, context):
            assert each is untouched or context.capture(0) == OK
            each.decode(text(N_PROMPT), 0, 0)
            each.decode(text(50, 4), 0, 1)
        assert context.select(params(20)) == OK
        assert context.compact(seq=2) == OK
        for seq, n_past in ((0, N_PROMPT), (1, 50)):
            expected = continued(untouched, n_past, seq)
            assert continued(context, n_past, seq) == pytest.approx(expected, abs=of_logits("f32"))
        assert np.abs(continued(context, N_PROMPT, 2) - continued(untouched, N_PROMPT + 6, 0)).max() > 0.1


def test_settings_do_not_matter_when_all_is_kept(load: Load) -> None:
    with selected(load(Spec()), Case("", settings=Settings(n_proxy=16, gamma=0.0), budget=150)) as context:
        assert context.all_kept() == {layer: [list(range(150))] * 2 for layer in range(3)}
