"""The runtime with each selection method, and what scripts read and rank by themselves."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from edge_shiftkv import Runtime, SettingError, ShiftKVError, cli
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context, Model
from edge_shiftkv.selection.methods import METHODS, Random, ShiftKV, SnapKV, StreamingLLM

PROMPT = "What is on the picture? " * 3
BUDGET = 24


@pytest.fixture
def cut(runtime):
    """The LLaVA-1.5 kind with a small budget."""
    method = runtime.kv_method
    runtime.kv_budget = BUDGET
    yield runtime
    runtime.kv_method = method


# The native method, the queries to capture for it, and what differs from its published settings.
NATIVE = {
    "mixed": (shiftkv.Method.SHIFTKV, 8, {"n_proxy": 256, "observed": 0.25, "n_window": 8, "n_pool": 9}),
    "paper": (shiftkv.Method.SHIFTKV, 1, {}),
    "streamingllm": (shiftkv.Method.STREAMINGLLM, 1, {}),
    "snapkv": (shiftkv.Method.SNAPKV, 32, {}),
    "keydiff": (shiftkv.Method.KEYDIFF, 1, {}),
    "expected-attention": (shiftkv.Method.EXPECTED_ATTENTION, 512, {}),
    "random": (shiftkv.Method.RANDOM, 1, {}),
}


def kept_natively(path, prompt, name):
    """The kept tokens by layer, and the four tokens after the first one, by the library alone."""
    kind, n_query, settings = NATIVE[name]
    options = {"type_k": "f16", "type_v": "f16", "n_threads": 1}
    with closing(Model(path, 0)) as model:
        tokens = model.tokenize(prompt)
        with closing(Context(model, len(tokens), 512, **options)) as large:
            shiftkv.capture(large, n_query)
            large.decode(tokens, 0)
            drawn = [int(np.argmax(large.logits()))]
            params = shiftkv.default_params(kind)
            params.budget = BUDGET
            for setting, value in settings.items():
                setattr(params, setting, value)
            shiftkv.select(large, params)
            with closing(Context(model, BUDGET + 5, 1, **options)) as small:
                position = shiftkv.compact(large, small)
                kept = {layer: rows.tolist() for layer, rows in shiftkv.kept(large).items()}
                assert position == len(tokens)
                for i in range(4):
                    small.decode(drawn[-1:], position + i)
                    drawn.append(int(np.argmax(small.logits())))
        return kept, b"".join(map(model.piece, drawn)).decode()


def test_every_method_keeps_what_the_library_does_with_its_settings(cut, tiny):
    assert NATIVE.keys() == METHODS.keys()
    found = {}
    for name in METHODS:
        cut.kv_method = name
        answer = cut.generate(PROMPT, raw=True, max_tokens=5)
        assert answer.figures.kept_tokens == BUDGET
        assert answer.figures.generated_tokens == 5
        selection = answer.selection
        found[name] = {layer: [selection.kept(layer, head).tolist() for head in range(2)] for layer in selection.layers}
        assert (found[name], answer.text) == kept_natively(tiny.text, PROMPT, name), name
    # No two of them are the same, so that none can stand in for another.
    assert len({repr(kept) for kept in found.values()}) == len(METHODS)
    cut.kv_method = None
    answer = cut.generate(PROMPT, raw=True, max_tokens=1)
    assert [answer.selection.kept(layer, 1).tolist() for layer in range(3)] == [found["mixed"][i][1] for i in range(3)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_pictures(cut, tiny, name):
    cut.kv_method = name
    answer = cut.generate(PROMPT, [tiny.picture], max_tokens=5)
    assert (answer.figures.kept_tokens, answer.figures.generated_tokens) == (BUDGET, 5)
    assert answer.selection.counts().sum() == 6 * BUDGET


def test_methods_keep_what_they_say(cut, tiny):
    def kept(method):
        cut.kv_method = method
        selection = cut.generate(PROMPT, [tiny.picture], max_tokens=1).selection
        return selection.n_prompt, [selection.kept(layer, head).tolist() for layer in range(3) for head in range(2)]

    n, streaming = kept(StreamingLLM(n_sink=3))
    assert streaming == [[0, 1, 2, *range(n - BUDGET + 3, n)]] * 6
    assert all(set(range(n - 10, n)) <= set(tokens) for tokens in kept(SnapKV(window=10))[1])
    mixed = kept(ShiftKV(n_sink=2, n_recent=5, observed=0.5, window=10, kernel=3))[1]
    assert all({0, 1, *range(n - 5, n)} <= set(tokens) for tokens in mixed)
    assert kept(Random(1)) == kept(Random(1)) != kept(Random(2))


def test_methods_by_name(tiny, cut):
    with Runtime(tiny.text, kv_method="snapkv", n_threads=1) as runtime:
        assert runtime.kv_method == SnapKV()
    with pytest.raises(SettingError, match="'h2o' is not known"):
        Runtime(tiny.text, kv_method="h2o", n_threads=1)
    cut.kv_method = "random"
    with pytest.raises(SettingError, match="'h2o' is not known"):
        cut.kv_method = "h2o"
    assert cut.kv_method == Random()
    cut.kv_method = None
    assert cut.kv_method == METHODS["mixed"]()


def test_the_command_line_takes_a_name(tiny, cut, capsys):
    common = ["run", "-m", str(tiny.text), "--mmproj", str(tiny.mmproj), "--image", str(tiny.picture), "-n", "12"]
    common += ["-p", PROMPT, "--threads", "1", "--kv-budget", str(BUDGET)]
    assert cli.main([*common, "--kv-method", "streamingllm"]) == 0
    cut.kv_method = "streamingllm"
    assert capsys.readouterr().out == f"{cut.generate(PROMPT, [tiny.picture], max_tokens=12).text}\n"
    assert cli.main([*common, "--kv-method", "h2o"]) == 1
    assert "KV method 'h2o' is not known: use one of mixed, paper," in capsys.readouterr().err


@pytest.fixture
def context(tiny) -> Iterator[Context]:
    """80 tokens captured with 10 queries."""
    with closing(Model(tiny.text, 0)) as model:
        options = {"type_k": "f32", "type_v": "f32", "n_threads": 1}
        with closing(Context(model, 128, 128, **options)) as result:
            shiftkv.capture(result, 10)
            result.decode(range(20, 100), 0)
            yield result


def test_rankings_of_scripts(context):
    """Scores of the caller's, from the keys and queries that the library gives."""
    assert shiftkv.layers(context) == [0, 1, 2]
    assert shiftkv.shape(context, 1) == (4, 2, 16)
    scores = {}
    for layer in shiftkv.layers(context):
        keys, queries = shiftkv.keys(context, layer), shiftkv.queries(context, layer)
        assert (keys.shape, queries.shape) == ((80, 2, 16), (10, 4, 16))
        assert shiftkv.hidden(context, layer).shape == (10, 64)
        logits = np.einsum("thd,rhgd->hgrt", keys, queries.reshape(10, 2, 2, 16)) / 4
        logits[..., np.arange(80) > np.arange(70, 80)[:, None]] = -np.inf
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores[layer] = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=(1, 2))
    params = SnapKV(window=10, kernel=1).params(20, "llama")
    params.keep_scores = True
    shiftkv.select(context, params)
    kept, native = shiftkv.kept(context), shiftkv.scores(context)
    for layer, rows in scores.items():
        assert native[layer][:, :70] == pytest.approx(rows[:, :70], rel=1e-3)
    shiftkv.select_scores(context, params, scores)
    for layer, tokens in shiftkv.kept(context).items():
        assert np.array_equal(tokens, kept[layer])


def test_errors_of_rankings(context):
    params = StreamingLLM().params(20, "llama")
    with pytest.raises(ShiftKVError, match="a pointer is null or a parameter is out of range"):
        shiftkv.select_scores(context, params, {layer: np.zeros((2, 79)) for layer in range(3)})
    with pytest.raises(ShiftKVError, match="captured are 10"):
        shiftkv.select(context, SnapKV().params(20, "llama"))
    shiftkv.select(context, params)
    with pytest.raises(ShiftKVError, match="nothing was selected"):
        shiftkv.scores(context)
    with pytest.raises(ShiftKVError, match="out of range"):
        shiftkv.shape(context, 3)
