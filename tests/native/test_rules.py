"""The methods beside MM-ShiftKV against their numpy references: architectures, KV types, prompts and parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import reference, rules, selection
from support.cases import (
    ARCHITECTURES,
    FEW,
    GEMMA2,
    GEMMA3,
    HEAD_64,
    KV_TYPES,
    PROMPTS,
    QWEN2VL,
    SMALL_WINDOWS,
    VARIANTS,
    Case,
    Load,
    open_context,
    prefill,
)
from support.gguf_random import Spec
from support.native import OK, STALE, Context, Method, Model, environment, params
from support.prompts import text
from support.reference import Array, Ints
from support.rounding import of_logits
from support.rules import EXPECTED, RULES, SNAPKV, Rule

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def names(cases: list[Case]) -> pytest.MarkDecorator:
    """The table as a pytest parameter."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def check(model: Model, case: Case, rule: Rule, **settings: Any) -> None:
    with open_context(model, case) as context:
        assert context.capture(n_query=settings.get("n_window", rule.n_query)) == OK
        prefill(context, case)
        native = rule.params(case.budget, **settings)
        assert context.select(native) == OK
        rules.check(context, rule, native)


@pytest.mark.device
@pytest.mark.parametrize("flash", [False, True], ids=["", "flash"])
@every_rule
@names(ARCHITECTURES)
def test_every_architecture(load: Load, case: Case, rule: Rule, flash: bool) -> None:
    check(load(case.spec), replace(case, flash=flash), rule)


@pytest.mark.parametrize("rule", [SNAPKV, EXPECTED], ids=lambda rule: rule.name)
@names(VARIANTS)
def test_variants(load: Load, case: Case, rule: Rule) -> None:
    check(load(case.spec), case, rule)


@every_rule
@names(KV_TYPES)
def test_kv_types(load: Load, case: Case, rule: Rule) -> None:
    check(load(case.spec), case, rule)


@every_rule
def test_keys_that_are_not_rotated(load: Load, rule: Rule) -> None:
    with environment("LLAMA_ATTN_ROT_DISABLE", "1"):
        check(load(HEAD_64), Case("", HEAD_64, type_k="q8_0"), rule)


@every_rule
@names(PROMPTS)
def test_prompts(load: Load, case: Case, rule: Rule) -> None:
    check(load(case.spec), case, rule)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (SNAPKV, {"n_pool": 1}),
        (SNAPKV, {"n_pool": 63}),
        (SNAPKV, {"n_window": 1, "n_recent": 1}),
        (SNAPKV, {"n_window": 32, "n_recent": 8, "n_sink": 4}),
        (SNAPKV, {"n_window": 32, "n_recent": 32, "budget": 20}),  # less than the window
        (SNAPKV, {"n_window": 512, "n_recent": 32}),  # more than the prompt
        (EXPECTED, {"n_window": 512, "n_future": 512}),
        (EXPECTED, {"n_window": 10, "n_future": 1}),
        (EXPECTED, {"n_future": 7, "n_sink": 0}),
        (EXPECTED, {"n_sink": 20, "n_recent": 10, "n_pool": 3}),
        (EXPECTED, {"n_sink": 200, "n_recent": 10}),  # sinks beyond the budget, and beyond the prompt
    ],
    ids=str,
)
def test_parameters(load: Load, rule: Rule, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    check(load(GEMMA2), Case("", GEMMA2, budget=settings.pop("budget", 40)), rule, **settings)


@every_rule
@pytest.mark.parametrize("budget", [2, 149])
def test_budgets(load: Load, rule: Rule, budget: int) -> None:
    check(load(Spec()), Case("", budget=budget), rule)


IN_CHUNKS = Spec(n_layer=1, n_embd=64, n_head=16, n_head_kv=2, d_head=16)


def test_the_largest_graph(load: Load) -> None:
    """The most positions, in numbers that halve badly, still fit the room that a small model's graphs have."""
    with open_context(load(IN_CHUNKS), Case("", flash=True, context={"n_ctx": 5376})) as context:
        assert context.capture(n_query=511) == OK
        context.decode(text(5003), 0)
        assert context.select(params(40, Method.EXPECTED_ATTENTION, n_window=511, n_future=4095)) == OK
        assert context.select(params(40, Method.KEYDIFF)) == OK


@pytest.mark.parametrize("rule", [SNAPKV, EXPECTED], ids=lambda rule: rule.name)
def test_more_weights_than_one_matrix_may_take(load: Load, rule: Rule) -> None:
    """512 queries of 8 heads over 5,000 keys are 78 MiB."""
    case = Case("", IN_CHUNKS, n_prompt=5000, flash=True, context={"n_ctx": 5120})
    check(load(IN_CHUNKS), case, rule, n_window=512)


@every_rule
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_beside_another_sequence(load: Load, rule: Rule, unified: bool) -> None:
    """Cells of another sequence between the prompt's play no part."""
    with Context(load(Spec()), n_seq_max=2, unified=unified, n_ubatch=30, type_k="f16") as context:
        assert context.capture(1, rule.n_query) == OK
        both = [text(90, 1), text(90, 2)]
        for start in range(0, 90, 15):
            mixed = [(both[s][i], i, s) for i in range(start, start + 15) for s in (0, 1)]
            assert context.try_decode(*(list(column) for column in zip(*mixed, strict=True))) == 0
        native = rule.params(30)
        assert context.select(native) == OK
        rules.check(context, rule, native, seq=1)


def test_tokens_taken_back_are_no_part_of_the_window(load: Load) -> None:
    with Context(load(Spec()), type_k="f16") as context:
        assert context.capture(n_query=16) == OK
        context.decode(text(100), 0)
        assert context.remove(start=95)
        context.decode(text(10, 1), 95)
        native = SNAPKV.params(30)
        assert context.select(native) == OK
        rules.check(context, SNAPKV, native)


# The comparison can fail


def shifted(score: rules.Score, **change: int) -> rules.Score:
    """The reference with other parameters than the library was given."""
    return lambda view, settings: score(view, {**settings, **change})


def transposed(score: rules.Score) -> rules.Score:
    """The reference with its KV heads exchanged."""

    def wrong(view: rules.View, settings: Any) -> tuple[Array, Array]:
        scores, tolerance = score(view, settings)
        return scores[::-1], tolerance[::-1]

    return wrong


@pytest.mark.parametrize(
    "rule",
    [
        *(replace(rule, score=transposed(rule.score)) for rule in RULES if rule.name != "streaming"),
        replace(SNAPKV, score=shifted(SNAPKV.score, n_window=15)),
        replace(EXPECTED, score=shifted(EXPECTED.score, n_window=39)),
        replace(EXPECTED, score=shifted(EXPECTED.score, n_future=99)),
        replace(EXPECTED, score=shifted(EXPECTED.score, n_sink=3)),
        replace(next(rule for rule in RULES if rule.name == "random"), score=shifted(rules.chance, seed=8)),
    ],
    ids=lambda rule: rule.name,
)
def test_wrong_references_are_noticed(load: Load, rule: Rule) -> None:
    case = Case("", budget=40)
    with open_context(load(case.spec), case) as context:
        assert context.capture(n_query=rule.n_query) == OK
        prefill(context, case)
        native = rule.params(case.budget)
        assert context.select(native) == OK
        with pytest.raises(AssertionError):
            rules.check(context, rule, native)


# Several selections from one prompt, and scores of the caller's


def full_capture(model: Model, case: Case) -> Context:
    """A context that has captured 40 queries of the case's prompt."""
    context = open_context(model, case)
    assert context.capture(n_query=40) == OK
    prefill(context, case)
    return context


def check_arrived(context: Context, destination: Context) -> None:
    """The destination holds the kept rows of the source, bit for bit."""
    source, arrived = context.cells()[0], destination.cells()[0]
    for index, heads in enumerate(context.all_kept().values()):
        for before, after in ((source.k[index], arrived.k[index]), (source.v[index], arrived.v[index])):
            expected = [row[tokens] for row, tokens in zip(before.heads(len(heads)), heads, strict=True)]
            assert np.array_equal(after.heads(len(heads)), expected)


@pytest.mark.device
@names([Case("llama"), Case("images", QWEN2VL, images=True), Case("q8_0", type_k="q8_0", type_v="q8_0", flash=True)])
def test_many_selections_from_one_prompt(load: Load, case: Case) -> None:
    """Each is as if it were the first, and can be handed over."""
    model = load(case.spec)
    shiftkv = Rule("shiftkv", Method.SHIFTKV, rules.streaming, settings={"n_proxy": 128})
    with full_capture(model, case) as context, open_context(model, case) as other:
        n_past = context.last_position() + 1
        for budget in (60, 25):
            for rule in (*RULES, shiftkv):
                native = rule.params(budget)
                assert context.select(native) == OK
                if rule is not shiftkv:
                    rules.check(context, rule, native)
                assert context.compact(other) == OK
                check_arrived(context, other)
                assert other.last_position() == n_past - 1
                assert np.isfinite(other.decode(text(3), n_past)).all()
        assert context.select(selection.native_params(FEW, 40)) == OK
        assert selection.problems(context, selection.bounds(context, FEW, n_past), 40) == []


def random_scores(context: Context, n_prompt: int) -> Array:
    spec = context.model.spec
    return np.random.default_rng(3).standard_normal((len(context.layers()), spec.n_head_kv, n_prompt)).astype("f4")


def kept(context: Context) -> Ints:
    return np.array([context.kept(layer) for layer in context.layers()])


def best(scores: Array, budget: int, n_sink: int = 0, n_recent: int = 1) -> Ints:
    """The tokens kept by scores [..., T]: the first, the last, and the best; of equal ones the first."""
    scores = scores.astype(np.float64)
    scores[..., :n_sink] = scores[..., scores.shape[-1] - n_recent :] = np.finfo(np.float64).max
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :budget], axis=-1)


@pytest.mark.device
@names([Case("llama"), Case("gemma2", GEMMA2), Case("q8_0", type_k="q8_0", type_v="q8_0", flash=True)])
@pytest.mark.parametrize(("n_sink", "n_recent"), [(0, 1), (4, 10)])
def test_scores_of_the_caller(load: Load, case: Case, n_sink: int, n_recent: int) -> None:
    with full_capture(load(case.spec), case) as context:
        scores = random_scores(context, case.n_prompt)
        native = params(40, n_sink=n_sink, n_recent=n_recent, keep_scores=True)
        assert context.select_scores(native, scores) == OK
        assert np.array_equal(kept(context), best(scores, 40, n_sink, n_recent))
        for index, layer in enumerate(context.layers()):
            inner = slice(n_sink, case.n_prompt - n_recent)
            assert np.array_equal(context.scores(layer)[:, inner], scores[index, :, inner])
            assert np.isposinf(context.scores(layer)[:, :n_sink]).all()
            assert np.isposinf(context.scores(layer)[:, inner.stop :]).all()


def test_equal_and_infinite_scores_of_the_caller(load: Load) -> None:
    """Of equal scores the earlier tokens' count more; -inf is kept only where nothing else is left."""
    case = Case("")
    with full_capture(load(case.spec), case) as context:
        scores = np.zeros((3, 2, 150), np.float32)
        scores[..., :100] = -np.inf
        scores[..., 120] = np.inf
        assert context.select_scores(params(40), scores) == OK
        assert np.array_equal(kept(context), np.broadcast_to([*range(100, 139), 149], (3, 2, 40)))
        assert context.select_scores(params(20), scores) == OK
        assert np.array_equal(kept(context), np.broadcast_to([*range(100, 118), 120, 149], (3, 2, 20)))
        assert context.select_scores(params(60), scores) == OK
        assert np.array_equal(kept(context), np.broadcast_to([*range(10), *range(100, 150)], (3, 2, 60)))


@names([Case("llama"), Case("gemma3", GEMMA3), Case("qwen2vl", QWEN2VL, images=True)])
@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "small"])
def test_the_first_tokens_of_what_was_captured(load: Load, case: Case, in_place: bool) -> None:
    """An answer was decoded before the selection: what is kept of the prompt goes on as if it had not been."""
    model = load(case.spec)
    answer = text(12, 5)
    results = []
    for decode_before in (False, True):
        with full_capture(model, case) as context, open_context(model, case) as other:
            n_past, n_prompt = context.last_position() + 1, len(context.keys(context.layers()[0]))
            if decode_before:
                context.decode(answer, n_past)
            scores = random_scores(context, n_prompt)
            assert context.select_scores(params(40, n_prompt=n_prompt), scores) == OK
            assert (context.info().n_prompt, context.info().n_kept) == (n_prompt, 40)
            assert np.array_equal(kept(context), best(scores, 40))
            destination = context if in_place else other
            assert context.compact(destination) == OK
            assert destination.last_position() == n_past - 1
            results.append(destination.decode(answer[:3], n_past))
    assert results[1] == pytest.approx(results[0], abs=of_logits(case.type_k))


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "small"])
def test_all_of_the_first_tokens(load: Load, in_place: bool) -> None:
    """A budget that keeps all of the prompt still leaves out what was decoded after it."""
    case = Case("")
    with full_capture(load(Spec()), case) as context, open_context(load(Spec()), case) as other:
        before = context.cells()[0]
        context.decode(text(12, 5), 150)
        assert context.select(params(200, Method.KEYDIFF, n_prompt=150)) == OK
        destination = context if in_place else other
        assert context.compact(destination) == OK
        after = destination.cells()[0]
        assert np.array_equal(after.positions, before.positions)
        assert all(np.array_equal(a.raw, b.raw) for a, b in zip(after.k + after.v, before.k + before.v, strict=True))


def test_windows_that_have_moved_on(load: Load) -> None:
    """What was decoded after the prompt may have taken the cells of its last window."""
    case = Case("", GEMMA3, n_ubatch=32, n_prompt=400, context={**SMALL_WINDOWS, "n_ctx": 1024})
    with full_capture(load(GEMMA3), case) as context, open_context(load(GEMMA3), case) as other:
        for n_more, status in ((3, OK), (300, STALE)):
            context.decode(text(n_more, 5), context.last_position() + 1)
            assert context.select(params(40, Method.STREAMINGLLM, n_prompt=400)) == OK
            assert context.compact(other) == status
        assert context.compact() == STALE


@pytest.mark.device
@names(
    [
        Case("f32", type_k="f32", type_v="f32"),
        Case("f16", n_ubatch=64),
        Case("bf16", type_k="bf16", type_v="bf16"),
        Case("q8_0", HEAD_64, type_k="q8_0"),
        Case("q4_0", type_k="q4_0"),
        Case("gemma3", GEMMA3),
        Case("qwen2vl", QWEN2VL, images=True),
    ]
)
def test_keys_are_those_in_the_cache(load: Load, case: Case) -> None:
    with full_capture(load(case.spec), case) as context:
        context.decode(text(5, 5), context.last_position() + 1)
        for index, layer in enumerate(context.layers()):
            assert np.array_equal(
                context.keys(layer).swapaxes(0, 1), context.cells()[0].k[index].values(case.spec.n_head_kv)
            )
            assert context.shape(layer) == (case.spec.n_head, case.spec.n_head_kv, case.spec.d_head)


def test_attention_of_what_is_read_is_snapkvs(load: Load) -> None:
    """Queries and keys as read give the native scores: rankings can be made outside."""
    case = Case("", HEAD_64, type_k="q8_0")
    with full_capture(load(HEAD_64), case) as context:
        native = params(40, Method.SNAPKV, n_window=1, n_recent=1, n_pool=1, keep_scores=True)
        assert context.select(native) == OK
        for layer in context.layers():
            query = selection.rounded(context.queries(layer)[-1:], case.type_k)
            scores = reference.attention(query, context.keys(layer).swapaxes(0, 1), HEAD_64.d_head**-0.5)[0]
            np.testing.assert_allclose(context.scores(layer)[:, :-1], scores[:, :-1], rtol=selection.EPSILON, atol=1e-7)


# What MM-ShiftKV has beyond its paper


@pytest.mark.device
@pytest.mark.parametrize(
    "options",
    [
        {"n_sink": 4},
        {"n_recent": 12},
        {"n_pool": 5},
        {"observed": 0.5},
        {"observed": 0.26, "n_window": 40},
        {"observed": 0.99, "n_sink": 4, "n_recent": 6},
        {"observed": 0.5, "n_sink": 4, "n_recent": 6, "n_pool": 3},
    ],
    ids=str,
)
def test_options_beyond_the_paper(load: Load, options: dict[str, Any]) -> None:
    """They combine the paper's scores, SnapKV's, and tokens that are always kept."""
    budget, n_window = 40, options.get("n_window", 32)
    with full_capture(load(Spec()), Case("")) as context:
        plain = {"keep_scores": True, "n_proxy": 128}
        scores = {}
        for method, others in ((Method.SHIFTKV, {}), (Method.SNAPKV, {"n_window": n_window})):
            assert context.select(params(budget, method, **plain, **others | {"n_recent": 1, "n_pool": 1})) == OK
            scores[method] = np.array([context.scores(layer) for layer in context.layers()])
        assert context.select(params(budget, **plain, **options)) == OK
        for index, layer in enumerate(context.layers()):
            for head, tokens in enumerate(context.kept(layer).tolist()):
                pools = {Method.SNAPKV: options.get("n_pool", 1)}
                pools[Method.SHIFTKV] = 1 if "observed" in options else pools[Method.SNAPKV]
                proxies, observed = (
                    smooth(scores[method][index, head], pools[method], 150 - options.get("n_recent", 1))
                    for method in (Method.SHIFTKV, Method.SNAPKV)
                )
                forced = [*range(options.get("n_sink", 0)), *range(150 - options.get("n_recent", 1), 150)]
                chosen = list(forced)
                n_observed = min(round(options.get("observed", 0) * budget), budget - len(forced))
                for ranks, n in ((observed, n_observed), (proxies, budget - len(forced) - n_observed)):
                    rest = [token for token in np.argsort(-ranks, kind="stable").tolist() if token not in chosen]
                    chosen += rest[:n]
                assert tokens == sorted(chosen), (layer, head)


def smooth(scores: Array, kernel: int, n: int) -> Array:
    """The first n scores averaged over their neighbours, in the library's order of additions."""
    padded = np.pad(scores[:n], kernel // 2).astype(np.float32)
    total = np.zeros(n, np.float32)
    for shift in range(kernel):
        total += padded[shift : shift + n]
    return total / np.float32(kernel)
