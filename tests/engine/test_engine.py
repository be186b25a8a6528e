"""The steps of an answer, put together by hand."""

from contextlib import closing

import numpy as np
import pytest

from edge_shiftkv import ClosedError, Runtime, SettingError, ShiftKVError
from edge_shiftkv.engine import Engine, Slot
from edge_shiftkv.prompts.images import load_image
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.sampling import Sampler, Sampling
from edge_shiftkv.selection.methods import method

PROMPT = "What is on the picture? " * 3
BUDGET = 24
N = 16


@pytest.fixture
def engine(tiny):
    with Engine(tiny.text, tiny.mmproj, n_threads=1) as engine:
        yield engine


def asked(engine, tiny):
    return closing(engine.prompt([Message("user", (load_image(tiny.picture), PROMPT))]))


def write(engine, context, sampler, token, position):
    """The text of N tokens, of which the first was drawn."""
    slot, pieces = Slot(context, sampler, position), [engine.model.piece(token)]
    for _ in range(N - 1):
        token = slot.advance(token)
        pieces.append(engine.model.piece(token))
    return b"".join(pieces).decode(errors="replace")


@pytest.mark.parametrize("name", [None, "mixed", "keydiff"])
def test_the_steps_give_the_runtimes_answer(engine, tiny, name):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=BUDGET if name else None, kv_method=name) as runtime:
        expected = runtime.generate(PROMPT, [tiny.picture], max_tokens=N)
    with asked(engine, tiny) as prompt, closing(Sampler(engine.model, Sampling())) as sampler:
        room = 0 if name else N
        with closing(engine.context(prompt.n_tokens + room, engine.batch(prompt))) as large:
            prefilled = engine.read(prompt, large, n_query=method(name).n_query if name else 0)
            assert prefilled.n_tokens == prompt.n_tokens == expected.figures.prompt_tokens
            token = sampler.sample(large)
            if name is None:
                text = write(engine, large, sampler, token, prefilled.position)
            else:
                selection = prefilled.select(method(name), BUDGET)
                assert (selection.kept(1, 0) == expected.selection.kept(1, 0)).all()
                with closing(engine.context(BUDGET + N, 1)) as small:
                    text = write(engine, small, sampler, token, prefilled.hand_over(small))
    assert text == expected.text


def test_one_prompt_is_selected_from_again_and_again(engine, tiny):
    """By other methods, with other budgets, handed over to contexts of their own."""
    texts = {}
    with asked(engine, tiny) as prompt, closing(engine.context(prompt.n_tokens)) as large:
        prefilled = engine.read(prompt, large, n_query=32)
        first = large.logits().copy()
        for name, budget in (("mixed", 16), ("snapkv", 40), ("mixed", 40), ("mixed", 16)):
            prefilled.select(method(name), budget)
            with closing(engine.context(budget + N, 1)) as small, closing(Sampler(engine.model, Sampling())) as sampler:
                token = int(first.argmax())
                texts.setdefault((name, budget), set()).add(
                    write(engine, small, sampler, token, prefilled.hand_over(small))
                )
    assert [len(found) for found in texts.values()] == [1, 1, 1]


def test_tokens_read_after_the_prompt_are_ranked_only_if_asked_for(engine, tiny):
    with asked(engine, tiny) as prompt, closing(engine.context(prompt.n_tokens + 8)) as large:
        prefilled = engine.read(prompt, large, n_query=1)
        prefilled.read_tokens(engine.model.tokenize("abc"))
        assert prefilled.n_tokens == prompt.n_tokens + 3
        assert prefilled.select(method("keydiff"), 16).n_prompt == prompt.n_tokens + 3
        selection = prefilled.select(method("keydiff"), 16, n_prompt=prompt.n_tokens)
        assert selection.n_prompt == prompt.n_tokens
        assert selection.kept(0, 0).max() == prompt.n_tokens - 1
        with closing(engine.context(32, 1)) as small:
            assert prefilled.hand_over(small) == prefilled.position - 3
        prefilled.select(method("keydiff"), 16)
        with closing(engine.context(32, 1)) as small:
            assert prefilled.hand_over(small) == prefilled.position


class KeyDiffInPython:
    """KeyDiff, as in the paper's section 3."""

    n_query = 1

    def scores(self, captured, budget):
        result = {}
        for layer in captured.layers:
            keys = captured.keys(layer)
            keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
            anchor = keys.mean(1, keepdims=True)
            result[layer] = -(keys * anchor).sum(-1) / np.linalg.norm(anchor, axis=-1)
            assert result[layer].shape == (2, captured.n_tokens)
            assert captured.hidden(layer).shape == (1, 64)
            assert captured.queries(layer).shape == (1, 4, 16)
        assert [span.stop - span.start for span in captured.image_spans] == [16]
        return result


def test_a_method_can_be_written_in_python(tiny):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=BUDGET, kv_method="keydiff") as runtime:
        native = runtime.generate(PROMPT, [tiny.picture], max_tokens=N)
        runtime.kv_method = KeyDiffInPython()
        ours = runtime.generate(PROMPT, [tiny.picture], max_tokens=N)
        assert ours.text == native.text
        for layer in native.selection.layers:
            for head in range(2):
                assert (ours.selection.kept(layer, head) == native.selection.kept(layer, head)).all()
        runtime.kv_method = LastOnly()
        assert runtime.generate(PROMPT, [tiny.picture], max_tokens=N).selection.kept(0, 0).tolist() != (
            native.selection.kept(0, 0).tolist()
        )


class LastOnly:
    n_query = 1

    def scores(self, captured, budget):
        return {layer: np.tile(np.arange(captured.n_tokens), (2, 1)) for layer in captured.layers}


class Wrong:
    n_query = 1

    def __init__(self, value):
        self._value = value

    def scores(self, captured, budget):
        return {layer: self._value(captured.n_tokens) for layer in captured.layers}


@pytest.mark.parametrize("value", [lambda n: np.zeros((1, n)), lambda n: np.full((2, n), np.nan)])
def test_wrong_scores_are_refused(tiny, value):
    with Runtime(tiny.text, n_threads=1, kv_budget=BUDGET, kv_method=Wrong(value)) as runtime:
        with pytest.raises(ShiftKVError, match="the KV selection failed"):
            runtime.generate(PROMPT, max_tokens=2)
        runtime.kv_method = "mixed"
        assert runtime.generate(PROMPT, max_tokens=2).text


def test_what_is_closed_says_so(tiny):
    engine = Engine(tiny.text, n_threads=1)
    context = engine.context(64)
    context.close()
    engine.close()
    with pytest.raises(ClosedError, match="the context is closed"):
        context.decode([1], 0)
    with pytest.raises(ClosedError, match="the model is closed"):
        engine.context(64)


def test_settings_out_of_range(tiny):
    with pytest.raises(SettingError, match="n_threads is 0"):
        Engine(tiny.text, n_threads=0)
    assert issubclass(SettingError, ValueError)


def test_drafts_can_be_exchanged(tiny):
    from edge_shiftkv.speculative.loop import Drafting
    from edge_shiftkv.speculative.options import DraftOptions

    with Runtime(tiny.text, n_threads=1) as runtime:
        alone = runtime.generate(PROMPT, max_tokens=N)
        assert alone.figures.draft is None
        with closing(Drafting(tiny.text, runtime.engine, DraftOptions(n_draft=3))) as drafting:
            runtime.drafting = drafting
            helped = runtime.generate(PROMPT, max_tokens=N)
            assert helped.figures.draft.accepted > 0
            runtime.drafting = None
            assert runtime.generate(PROMPT, max_tokens=N).figures.draft is None
