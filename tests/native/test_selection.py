"""The selection against the numpy reference: architectures, KV types, prompts and parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import comparison, selection
from support.cases import (
    ARCHITECTURES,
    FEW,
    HEAD_64,
    KV_TYPES,
    PROMPTS,
    VARIANTS,
    Case,
    Load,
    selected,
)
from support.gguf_random import Spec
from support.native import GPU_LAYERS, Model, environment
from support.reference import Settings

PARAMETERS = [
    Case("groups-32", settings=Settings(n_group=32)),
    Case("groups-1", settings=Settings(n_proxy=64, n_group=1)),
    Case("groups-of-1", settings=Settings(n_proxy=24, n_group=24)),
    Case("groups-of-5", settings=Settings(n_proxy=80, n_group=16)),
    Case("gamma-0", settings=replace(FEW, gamma=0.0)),
    Case("gamma-1", settings=replace(FEW, gamma=1.0)),
    Case("mass-half", settings=replace(FEW, mass=0.5)),
    Case("n-stat-1", settings=replace(FEW, n_stat=1)),
    Case("all-sampled", settings=replace(FEW, n_layer_repeat=0)),
    Case("all-repeated", settings=replace(FEW, n_layer_repeat=9, n_repeat=5)),
    Case("seed", settings=replace(FEW, seed=3_000_000_019)),
    Case("budget-2", budget=2),
    Case("budget-of-all-but-1", budget=149),
    # More attention weights than the 64 MiB that one matrix of them may take.
    Case(
        "in-chunks",
        Spec(n_layer=1, n_embd=64, n_head=16, n_head_kv=2, d_head=16),
        Settings(n_proxy=4096, n_layer_repeat=0),
        n_prompt=600,
        context={"n_ctx": 768},
    ),
    # More keys than are held as integers at a time.
    Case(
        "heads-in-parts",
        Spec(n_layer=1, n_embd=64, n_head=32, n_head_kv=32, d_head=128, n_ff=32),
        Settings(n_proxy=32, n_layer_repeat=0),
        n_prompt=2300,
        context={"n_ctx": 2304},
    ),
]


def check(model: Model, case: Case) -> None:
    """Compare scores and kept tokens of all layers; both must leave little open."""
    with selected(model, case) as context:
        n_past = context.last_position() + 1
        for activation in selection.activations(case.spec):
            allowed = selection.bounds(context, case.settings, n_past, activation=activation)
            problems = selection.problems(context, allowed, case.budget)
            if not problems:
                break
        assert problems == []
    # Within a device's wide bounds more may change places.
    for limits in () if GPU_LAYERS else allowed.values():
        assert comparison.undecided(limits, case.budget) <= max(0.05, 2 / limits.last.shape[1])
        assert comparison.uncertain(limits) <= 0.2


def names(cases: list[Case]) -> pytest.MarkDecorator:
    """The table as a pytest parameter."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.mark.device
@pytest.mark.parametrize("flash", [False, True], ids=["", "flash"])
@names(ARCHITECTURES)
def test_architectures(load: Load, case: Case, flash: bool) -> None:
    check(load(case.spec), replace(case, flash=flash))


@pytest.mark.device
@names(VARIANTS)
def test_variants(load: Load, case: Case) -> None:
    check(load(case.spec), case)


@pytest.mark.device
@names(KV_TYPES)
def test_kv_types(load: Load, case: Case) -> None:
    check(load(case.spec), case)


def test_keys_that_are_not_rotated(load: Load) -> None:
    with environment("LLAMA_ATTN_ROT_DISABLE", "1"):
        check(load(HEAD_64), Case("", HEAD_64, type_k="q8_0"))


@pytest.mark.device
@names(PROMPTS)
def test_prompts(load: Load, case: Case) -> None:
    check(load(case.spec), case)


@names(PARAMETERS)
def test_parameters(load: Load, case: Case) -> None:
    check(load(case.spec), case)
