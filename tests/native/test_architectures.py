"""Models whose layers are unlike each other or unlike Llama's: few tensors, KV heads that vary, no rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import rules, selection
from support.cases import Case, Load, open_context, prefill, selected
from support.gguf_random import Spec
from support.native import NO_SELECTION, OK, UNSUPPORTED, Context, Method, params
from support.prompts import text
from support.rules import RULES, Rule

SMALL: dict[str, Any] = {"n_embd": 64, "n_head": 2, "n_head_kv": 1, "n_ff": 32}
WHOLE: dict[str, Any] = {"n_embd": 64, "n_head": 2, "n_head_kv": 2, "n_ff": 32}

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def names(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# Of heads of 64, quantized keys and values are stored rotated, which takes further nodes.
ROTATED: dict[str, Any] = {"n_embd": 128, "n_head": 2, "n_head_kv": 1, "d_head": 64, "n_ff": 32}

FEW_TENSORS = [
    Case("phi3-32-q8_0", Spec("phi3", n_layer=32, **ROTATED), type_k="q8_0", type_v="q8_0", flash=True),
    Case("phi3-40-f16", Spec("phi3", n_layer=40, **SMALL)),
    Case("falcon-32-q8_0", Spec("falcon", n_layer=32, **ROTATED), type_k="q8_0", type_v="q8_0", flash=True),
]


@names(FEW_TENSORS)
def test_graphs_of_layers_with_few_tensors_have_room_for_the_capture(load: Load, case: Case) -> None:
    with open_context(load(case.spec), case) as context:
        context.decode(text(5), 0)  # graphs from before the capture are there
        context.clear()
        for n_query in (1, 512):
            assert context.capture(n_query=n_query) == OK
            prefill(context, case)
            for method in (Method.SHIFTKV, Method.EXPECTED_ATTENTION)[:n_query]:
                assert context.select(params(case.budget, method, n_proxy=4096, n_group=16)) == OK
                assert len(context.layers()) == case.spec.n_layer
            assert context.compact() == OK
            assert np.isfinite(context.decode(text(1), case.n_prompt)).all()
            context.clear()


WINDOWS = {
    "attention.sliding_window": 32,
    "attention.sliding_window_pattern": [True, True, False] * 2,
    "attention.key_length_swa": 32,
    "attention.value_length_swa": 32,
    "rope.dimension_count_swa": 32,
    "embedding_length_per_layer_input": 0,
}
# Gemma 4's kind: the window layers, of other heads, are wider.
GEMMA4 = Spec("gemma4", n_layer=6, d_head=48, kv_heads=(4, 4, 1) * 2, rope_factors=True, meta=WINDOWS)

PADDED = [
    Case("openelm", Spec("openelm", kv_heads=(2, 4, 2))),
    Case("deci", Spec("deci", kv_heads=(1, 4, 2))),
    Case("deci-without-attention", Spec("deci", n_layer=4, kv_heads=(1, 0, 4, 2))),
    Case("gemma4", GEMMA4),
]


@pytest.mark.device
@pytest.mark.parametrize("flash", [False, True], ids=["", "flash"])
@pytest.mark.parametrize("where", ["in-place", "small", "fragmented"])
@names(PADDED)
def test_kv_heads_that_vary_arrive(load: Load, case: Case, where: str, flash: bool) -> None:
    """Without flash attention the widest layer decides how many rows values are stored in."""
    model = load(case.spec)
    options: dict[str, Any] = {"type_k": "f16", "flash": flash}
    with Context(model, 512, **options) as context, Context(model, 256, n_seq_max=2, **options) as other:
        assert context.capture() == OK
        context.decode(text(case.n_prompt), 0)
        assert context.select(params(case.budget, n_proxy=64)) == OK
        source, kept = context.cells(), context.all_kept()
        if where == "fragmented":
            seqs = [i % 2 for i in range(256)]
            assert other.try_decode(text(256, 5), [i // 2 for i in range(256)], seqs) == 0
            other.remove(0)
        destination = context if where == "in-place" else other
        assert context.compact(destination) == OK
        arrived = destination.cells()
        windows = case.spec.meta.get("attention.sliding_window_pattern", [False] * case.spec.n_layer)
        full = [il for il, window in enumerate(windows) if not window]
        assert list(kept) == [il for il in full if case.spec.layer_kv_heads(il)]
        for layer, heads in kept.items():
            assert len(heads) == case.spec.layer_kv_heads(layer)
            assert len({tuple(head) for head in heads}) == len(heads)
            for rows, rows_arrived in ((source[0].k, arrived[0].k), (source[0].v, arrived[0].v)):
                before = rows[full.index(layer)].heads(len(heads))
                after = rows_arrived[full.index(layer)].heads(len(heads))
                for head, tokens in enumerate(heads):
                    assert np.array_equal(after[head], before[head][tokens]), (layer, head)
        for window, window_arrived in zip(source[1:], arrived[1:], strict=True):
            seen = window.positions[:, 0] > case.n_prompt - 32
            seen |= where == "in-place"
            for rows, rows_arrived in zip(window.k + window.v, window_arrived.k + window_arrived.v, strict=True):
                assert np.array_equal(rows_arrived.raw, rows.raw[seen])


@pytest.mark.parametrize("flash", [False, True], ids=["", "flash"])
@names(PADDED[:2])
def test_bytes_of_kv_heads_that_vary(load: Load, case: Case, flash: bool) -> None:
    with selected(load(case.spec), Case("", case.spec, n_prompt=150, flash=flash)) as context:
        rows = [rows for cells in context.cells() for rows in cells.k + cells.v]
        assert context.info().kv_bytes_prompt == sum(r.raw.nbytes for r in rows)


def check_rule(load: Load, case: Case, rule: Rule) -> None:
    with open_context(load(case.spec), case) as context:
        assert context.capture(n_query=rule.n_query) == OK
        prefill(context, case)
        native = rule.params(case.budget)
        assert context.select(native) == OK
        rules.check(context, rule, native)


def check_shiftkv(load: Load, case: Case) -> None:
    with selected(load(case.spec), case) as context:
        allowed = selection.bounds(context, case.settings, case.n_prompt)
        assert selection.problems(context, allowed, case.budget) == []
        assert context.compact() == OK
        assert np.isfinite(context.decode(text(1), case.n_prompt)).all()


@every_rule
@names(PADDED[:2])
def test_every_rule_with_kv_heads_that_vary(load: Load, case: Case, rule: Rule) -> None:
    check_rule(load, case, rule)


@names(PADDED[:2])
def test_proxies_with_kv_heads_that_vary(load: Load, case: Case) -> None:
    check_shiftkv(load, case)


COHERE2 = {"attention.sliding_window": 32, "logit_scale": 0.5}
NO_ROPE = [
    Case("smollm3", Spec("smollm3", n_layer=4)),
    Case("cohere2", Spec("cohere2", n_layer=8, meta=COHERE2)),
    Case("gpt2", Spec("gpt2", n_head_kv=4)),
    Case("starcoder", Spec("starcoder", n_head_kv=1)),
    Case("exaone4", Spec("exaone4", n_layer=64, **WHOLE)),
]


@pytest.mark.parametrize("flash", [False, True], ids=["", "flash"])
@every_rule
@names(NO_ROPE)
def test_every_rule_in_layers_without_rotation(load: Load, case: Case, rule: Rule, flash: bool) -> None:
    check_rule(load, Case("", case.spec, flash=flash), rule)


@names(NO_ROPE)
def test_proxies_in_layers_without_rotation(load: Load, case: Case) -> None:
    check_shiftkv(load, case)


def test_layers_that_share_kv_pairs_are_refused(load: Load) -> None:
    """Queries of the layers that read another's pairs would not count: Gemma 3n, and Gemma 4 E2B and E4B."""
    spec = Spec(**{**GEMMA4.__dict__, "meta": {**WINDOWS, "attention.shared_kv_layers": 3}})
    with Context(load(spec), type_k="f16") as context:
        assert context.capture() == UNSUPPORTED
        assert np.isfinite(context.decode(text(20), 0)).all()
        assert context.compact() == NO_SELECTION
