"""The same prompt and seed give the same kept tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import comparison, selection
from support.cases import QWEN2VL, Case, Load, selected
from support.gguf_random import Spec
from support.native import OK

CASES = [Case("llama"), Case("images", QWEN2VL, images=True), Case("q8_0", type_k="q8_0", type_v="q8_0", flash=True)]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.device
@cases
def test_repeated(load: Load, case: Case) -> None:
    """In the same context, and in another."""
    kept = []
    for _ in range(2):
        with selected(load(case.spec), case) as context:
            kept.append(context.all_kept())
            assert context.select(selection.native_params(case.settings, case.budget)) == OK
            kept.append(context.all_kept())
    assert kept[1:] == kept[:1] * 3


@pytest.mark.device
@cases
def test_seeds_differ(load: Load, case: Case) -> None:
    with selected(load(case.spec), case) as context:
        first = context.all_kept()
        other = replace(case.settings, seed=1)
        assert context.select(selection.native_params(other, case.budget)) == OK
        second = context.all_kept()
        layers = context.layers()
        # The first two layers use no noise.
        assert [first[layer] == second[layer] for layer in layers] == [True, True, False]
        assert context.select(selection.native_params(case.settings, case.budget)) == OK
        assert context.all_kept() == first


@pytest.mark.device
@pytest.mark.parametrize("n_ubatch", [64, 17])
@cases
def test_the_split_of_the_prompt(load: Load, case: Case, n_ubatch: int) -> None:
    """Batches of other sizes round differently; no more than that may show.

    With a quantized cache, queries are rounded to eight bits in batches of less than 64 tokens.
    """
    with selected(load(case.spec), case) as whole:
        allowed = selection.bounds(whole, case.settings, whole.last_position() + 1)
        kept = whole.all_kept()
    with selected(load(case.spec), replace(case, n_ubatch=n_ubatch)) as split:
        for layer, limits in allowed.items():
            if case.type_k == "f16":
                wider = replace(limits, tolerance=10 * limits.tolerance)
                assert comparison.problems(wider, case.budget, split.kept(layer), None) == []
            same = np.mean([len(set(a) & set(b)) for a, b in zip(kept[layer], split.kept(layer).tolist(), strict=True)])
            assert same >= (0.97 if case.type_k == "f16" else 0.9) * case.budget


def test_seeds_up_to_32_bits(load: Load) -> None:
    """A seed beyond the sign bit is another seed."""
    model = load(Spec())
    kept = []
    for seed in (0, 2**31, 2**32 - 1):
        with selected(model, replace(Case(""), settings=replace(Case("").settings, seed=seed))) as context:
            kept.append(context.kept(2).tolist())
    assert kept[0] != kept[1] != kept[2] != kept[0]
