"""The seconds in the figures, against a clock that only native calls move on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator

import pytest
from support.speakers import SENTENCES, write_speaker

from edge_shiftkv import Runtime
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context, Model
from edge_shiftkv.native.mtmd import Projector
from edge_shiftkv.speculative.bridge import Bridge
from edge_shiftkv.speculative.options import DraftOptions

PROMPT = "What is on the picture? " * 3

FIGURES = {
    "prompt_tokens",
    "text_tokens",
    "image_tokens",
    "kept_tokens",
    "generated_tokens",
    "kv_bytes_prompt",
    "kv_bytes_kept",
    "type_k",
    "type_v",
    "image_encode_s",
    "prefill_s",
    "selection_s",
    "decode_s",
    "tokens_per_second",
    "draft",
}
DRAFT_FIGURES = {
    "rounds",
    "plain_rounds",
    "drafted",
    "accepted",
    "tokens_per_pass",
    "draft_s",
    "align_s",
    "verify_s",
}


class Clock:
    """In place of `time.perf_counter`: stands still but for the calls that are said to take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def takes(self, where: object, name: str, seconds: Callable[..., float] | float) -> list[float]:
        """Let a call take so many seconds, which may depend on its arguments; returns what its calls took."""
        original = getattr(where, name)
        took: list[float] = []

        def call(*arguments: object, **options: object) -> object:
            took.append(seconds(*arguments, **options) if callable(seconds) else seconds)
            self.now += took[-1]
            return original(*arguments, **options)

        self._monkeypatch.setattr(where, name, call)
        return took


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("kv_budget", [None, 20])
def test_seconds(runtime, tiny, clock, kv_budget):
    runtime.kv_budget = kv_budget
    lengths: Iterator[float] = itertools.chain([3.0, 5.0, 7.0])
    clock.takes(Projector, "encode", lambda *_: next(lengths))
    into_cache = clock.takes(Projector, "decode", 0.25)
    passes = clock.takes(Context, "decode", 2.0)
    clock.takes(shiftkv, "select", 11.0)
    clock.takes(shiftkv, "compact", 13.0)
    figures = runtime.generate(PROMPT, [tiny.picture] * 3, max_tokens=6).figures
    assert len(into_cache) == 3
    assert figures.image_encode_s == 3 + 5 + 7
    assert figures.selection_s == (0 if kv_budget is None else 11 + 13)
    assert figures.decode_s == 5 * 2
    assert figures.tokens_per_second == 5 / figures.decode_s
    assert figures.prefill_s == 3 + 5 + 7 + 3 * 0.25 + (len(passes) - 5) * 2
    assert len(passes) > 5


def test_a_stream_that_is_read_slowly_takes_no_longer(runtime, clock):
    clock.takes(Context, "decode", 2.0)
    stream = runtime.stream(PROMPT, max_tokens=6)
    for _ in stream:
        clock.now += 100
    figures = stream.completion.figures
    assert (figures.prefill_s, figures.decode_s) == (2, 10)


@pytest.mark.parametrize("rule", ["coupled", "tokentiming"])
def test_seconds_of_a_draft(tmp_path_factory, monkeypatch, clock, rule):
    folder = tmp_path_factory.mktemp("speakers")
    models: dict[Context, Model] = {}
    init = Context.__init__

    def watched(context: Context, model: Model, *arguments: object, **options: object) -> None:
        init(context, model, *arguments, **options)
        models[context] = model

    monkeypatch.setattr(Context, "__init__", watched)
    options = DraftOptions(3, rule)
    with Runtime(
        write_speaker("gpt-2", folder),
        n_threads=1,
        n_ctx=256,
        draft=write_speaker("llama-spm", folder),
        draft_options=options,
    ) as runtime:
        runtime.generate("The", raw=True, max_tokens=1, temperature=0.7)  # tables of the vocabularies are made once
        target = max(model.n_vocab for model in models.values())  # GPT-2's is the larger one
        passes = clock.takes(
            Context, "decode", lambda context, *_, **__: 100.0 if models[context].n_vocab == target else 1.0
        )
        bridged = clock.takes(Bridge, "proxies", 0.125)
        answer = runtime.generate(SENTENCES[0][:40], raw=True, max_tokens=16, temperature=0.7, seed=1)
    figures, draft = answer.figures, answer.figures.draft
    assert draft.rounds == passes.count(100.0) - 1  # the prompt's
    assert draft.verify_s == 100 * draft.rounds
    assert draft.draft_s == passes.count(1.0)
    assert draft.align_s == 0.125 * len(bridged)
    assert len(bridged) > 0
    assert figures.decode_s == draft.verify_s + draft.draft_s + draft.align_s
    assert figures.tokens_per_second == 15 / figures.decode_s
    assert draft.tokens_per_pass == 15 / draft.rounds


def test_figures_as_json(runtime, tiny, pair_of_speakers):
    runtime.kv_budget = 20
    cut = runtime.generate(PROMPT, [tiny.picture], max_tokens=6).figures
    with pair_of_speakers as drafting:
        drafted = drafting.generate("The river", raw=True, max_tokens=6).figures
    for figures in (cut, drafted):
        told = json.loads(json.dumps(figures.as_dict()))
        draft = told.pop("draft")
        assert {*told, "draft"} == FIGURES
        assert told == {name: getattr(figures, name) for name in FIGURES - {"draft"}}
        if figures.draft is None:
            assert draft is None
        else:
            assert set(draft) == DRAFT_FIGURES
            assert draft == {name: getattr(figures.draft, name) for name in DRAFT_FIGURES}
    # What is told is documented, and the other way round.
    for kind, names in ((type(cut), FIGURES), (type(drafted.draft), DRAFT_FIGURES)):
        assert {field.name for field in dataclasses.fields(kind)} == names
        assert all(name in (kind.__doc__ or "") for name in names)


@pytest.fixture
def pair_of_speakers(tiny):
    return Runtime(tiny.text, n_threads=1, draft=tiny.text, draft_options=DraftOptions(2))
