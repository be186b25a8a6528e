"""A runtime that reads layer by layer answers as one that reads by batches, and says no to what it cannot do."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from support.gguf_random import Spec, write_model

from edge_shiftkv import CancelledError, DraftOptions, Runtime, SettingError, ShiftKVError, cli
from edge_shiftkv.engine.by_layer import read_by_layer
from edge_shiftkv.engine.prefilled import Prefilled
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.mtmd import Projector
from edge_shiftkv.selection.methods import METHODS, ShiftKV

PROMPT = "What is on the picture? " * 3
LONG = "Four score and seven years ago our fathers brought forth a new nation. " * 9  # two batches


class LastQuery:
    """Scores keys by their product with the last query."""

    n_query = 4

    def scores(self, captured, _budget):
        result = {}
        for layer in captured.layers:
            keys, query = captured.keys(layer), captured.queries(layer)[-1]
            result[layer] = np.einsum("hgd,hnd->hn", query.reshape(len(keys), -1, keys.shape[-1]), keys)
        return result


def kept(selection):
    """Layer, KV head -> what was kept."""
    n_heads = selection.n_heads // len(selection.layers)
    return {(layer, h): selection.kept(layer, h).tolist() for layer in selection.layers for h in range(n_heads)}


def same(usual, by_layer):
    """Both answers, their selections and figures, but for the time they took."""
    assert by_layer.text == usual.text
    assert by_layer.logprobs == usual.logprobs
    assert kept(by_layer.selection) == kept(usual.selection)
    assert by_layer.selection.image_spans == usual.selection.image_spans
    mine, others = by_layer.figures.as_dict(), usual.figures.as_dict()
    for name in mine:
        if not name.endswith("_s") and name not in ("tokens_per_second", "draft"):
            assert mine[name] == others[name], name


@pytest.fixture(scope="module")
def pair(tiny):
    with (
        Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24) as usual,
        Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24, prefill="by-layer", image_cache=0) as by_layer,
    ):
        yield usual, by_layer


def both(pair, *arguments, **options):
    return [runtime.generate(*arguments, max_tokens=20, logprobs=3, **options) for runtime in pair]


@pytest.mark.parametrize("kv_method", [*METHODS, LastQuery()], ids=[*METHODS, "own"])
def test_methods(pair, tiny, kv_method):
    same(*both(pair, PROMPT, [tiny.picture], kv_method=kv_method))


def test_batches_and_shares(pair, tiny):
    for budget in (0.5, 30, 600):
        usual, by_layer = both(pair, LONG, [tiny.picture, tiny.picture], kv_budget=budget)
        assert usual.figures.prompt_tokens > 600
        same(usual, by_layer)


@pytest.mark.parametrize("budget", [None, 5000])
def test_what_is_not_cut_is_read_as_ever(pair, budget):
    usual, by_layer = both(pair, PROMPT, kv_budget=budget)
    assert by_layer.selection is None
    assert by_layer.text == usual.text


def test_answers_one_after_the_other(pair, tiny):
    """Cut and uncut, long and short, at a temperature: nothing of the one before is left."""
    for prompt, options in ((PROMPT, {}), (PROMPT, {"kv_budget": None}), (LONG, {}), (PROMPT, {"temperature": 1.0})):
        usual, by_layer = both(pair, prompt, [tiny.picture], seed=3, **options)
        assert by_layer.text == usual.text


@pytest.mark.parametrize("kv_types", [("f16", "f16"), ("q8_0", "q8_0"), ("f32", "bf16")], ids=str)
def test_the_shipped_model(demo, kv_types):
    settings = {"mmproj": demo / "demo-mmproj-f16.gguf", "type_k": kv_types[0], "type_v": kv_types[1]}
    answers = []
    for prefill in ("by-batch", "by-layer"):
        with Runtime(demo / "demo-text-q8_0.gguf", **settings, prefill=prefill, kv_budget=64) as runtime:
            answers.append(runtime.generate("Read everything.", [demo / "document.png"], max_tokens=60, logprobs=2))
    same(*answers)


def test_positions_of_pictures(tiny):
    """With M-RoPE a picture has fewer positions than tokens."""
    answers = []
    for prefill in ("by-batch", "by-layer"):
        with Runtime(tiny.qwen_text, tiny.qwen_mmproj, prefill=prefill, kv_budget=20, n_threads=1) as runtime:
            answers.append(runtime.generate(PROMPT, [tiny.picture], max_tokens=20, logprobs=2))
    same(*answers)


def test_a_picture_is_encoded_once(pair, tiny, monkeypatch):
    encoded = []
    encode = Projector.encode
    monkeypatch.setattr(Projector, "encode", lambda self, chunk: encoded.append(chunk) or encode(self, chunk))
    answer = pair[1].generate(PROMPT, [tiny.picture], max_tokens=2)
    assert len(encoded) == 1
    assert answer.figures.image_encode_s > 0


def test_only_one_layer_is_there_at_a_time(pair, monkeypatch):
    sizes = []
    next_layer = shiftkv.next_layer

    def spy(context, *arguments):
        sizes.append((shiftkv.cache_size(context), context.n_ctx))
        return next_layer(context, *arguments)

    monkeypatch.setattr(shiftkv, "next_layer", spy)
    pair[1].generate(LONG, max_tokens=2)
    n_layer = pair[0].engine.model.n_layer
    with closing(pair[0].engine.context(sizes[0][1])) as usual:
        assert [size * n_layer for size, _ in sizes] == [shiftkv.cache_size(usual)] * n_layer


def test_many(pair, tiny):
    requests = [{"prompt": f"{PROMPT}{i}", "images": [tiny.picture] * (i % 2)} for i in range(5)]
    requests.append({"prompt": PROMPT, "kv_budget": None})
    answers = [list(runtime.generate_many(requests, n_parallel=3, max_tokens=12, logprobs=2)) for runtime in pair]
    for usual, by_layer in zip(*answers, strict=True):
        if usual.completion.selection:
            same(usual.completion, by_layer.completion)
        assert by_layer.completion.text == usual.completion.text


def test_with_a_draft(tiny):
    answers = []
    for prefill in ("by-batch", "by-layer"):
        with Runtime(
            *(tiny.text, tiny.mmproj),
            draft=tiny.text,
            draft_options=DraftOptions(n_draft=3),
            prefill=prefill,
            kv_budget=24,
            n_threads=1,
        ) as runtime:
            answers.append(runtime.generate(PROMPT, [tiny.picture], max_tokens=20, logprobs=2))
    same(*answers)


def test_progress(tiny):
    told = []

    def progress(what, done, total):
        if what == "prompt":
            told.append((done, total))

    with Runtime(tiny.text, n_threads=1, kv_budget=24, prefill="by-layer", progress=progress) as runtime:
        n = runtime.generate(LONG, max_tokens=2).figures.prompt_tokens
    done = [done for done, _ in told]
    assert done == sorted(set(done))
    assert told[-1] == (n, n)
    assert len(told) == runtime.engine.model.n_layer * 2


@pytest.mark.parametrize("n_before", [0, 1, 2, 3])
def test_cancelled_in_any_layer(pair, tiny, monkeypatch, n_before):
    by_layer = pair[1]
    expected = by_layer.generate(LONG, [tiny.picture], max_tokens=12)
    seen = []
    read = Prefilled._read_batches

    def spy(self, tokens, *, logits):
        for _ in read(self, tokens, logits=logits):
            seen.append(1)
            if len(seen) == n_before + 1:
                by_layer.cancel()
            yield

    monkeypatch.setattr(Prefilled, "_read_batches", spy)
    with pytest.raises(CancelledError):
        by_layer.generate(LONG, [tiny.picture], max_tokens=12)
    monkeypatch.undo()
    same_again = by_layer.generate(LONG, [tiny.picture], max_tokens=12)
    assert same_again.text == expected.text


def test_a_method_that_fails(pair):
    class Wrong(LastQuery):
        def scores(self, captured, budget):
            return {layer: rows[:, 1:] for layer, rows in super().scores(captured, budget).items()}

    expected = pair[1].generate(PROMPT, max_tokens=8).text
    with pytest.raises(ShiftKVError, match="of a layer could not be selected"):
        pair[1].generate(PROMPT, max_tokens=8, kv_method=Wrong())
    assert pair[1].generate(PROMPT, max_tokens=8).text == expected


def test_what_keeps_whole_prompts_is_refused(pair, tiny):
    with pytest.raises(SettingError, match="keep_prompt"):
        Runtime(tiny.text, prefill="by-layer", keep_prompt=True)
    with pytest.raises(SettingError, match="session"):
        pair[1].session("A text.")
    with pytest.raises(SettingError, match=r"'layerwise'.*by-batch, by-layer"):
        Runtime(tiny.text, prefill="layerwise")


def test_models_with_windows_are_refused(tmp_path: Path):
    """Before a prompt is read."""
    model = write_model(Spec("gemma3", n_layer=6, meta={"attention.sliding_window": 32}), tmp_path)
    with pytest.raises(ShiftKVError, match=r"layer by layer: .* sliding window"):
        Runtime(model, prefill="by-layer")


def test_command_line(tiny, capsys, monkeypatch):
    read = []
    monkeypatch.setattr(
        "edge_shiftkv.answering.read_by_layer",
        lambda *arguments, **options: read.append(1) or read_by_layer(*arguments, **options),
    )
    arguments = ["run", "-m", str(tiny.text), "-p", PROMPT, "-n", "8", "--kv-budget", "24", "--threads", "1"]
    assert cli.main(arguments) == 0
    expected = capsys.readouterr().out
    assert not read
    assert cli.main([*arguments, "--prefill", "by-layer"]) == 0
    assert capsys.readouterr().out == expected
    assert read


def test_settings_of_the_method(pair):
    same(*both(pair, LONG, kv_method=ShiftKV(seed=5, n_proxy=64)))
