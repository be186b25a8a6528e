"""What native code allocates for a request is freed with it, each thing once, however the request ends."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support.ledger import Ledger
from support.memory import resident_bytes

from edge_shiftkv import PromptError, Runtime, ShiftKVError
from edge_shiftkv.sampling import Sampler, Sampling
from edge_shiftkv.speculative.options import DraftOptions

PROMPT = "What is on the picture? " * 3
SAMPLED = {"max_tokens": 8, "temperature": 1.0, "seed": 1}


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    gc.collect()
    yield Ledger(monkeypatch)


def finished(runtime, picture):
    runtime.generate(PROMPT, [picture], **SAMPLED)


def cut(runtime, picture):
    runtime.kv_budget = 24
    runtime.generate(PROMPT, [picture, picture], **SAMPLED)


def closed_early(runtime, picture):
    with runtime.stream(PROMPT, [picture], **SAMPLED) as stream:
        next(stream)


def never_begun(runtime, picture):
    with runtime.stream(PROMPT, [picture], **SAMPLED):
        pass


def superseded(runtime, picture):
    first = runtime.stream(PROMPT, [picture], **SAMPLED)
    next(first)
    second = runtime.stream(PROMPT, [picture], **SAMPLED)
    runtime.generate(PROMPT, **SAMPLED)
    for stream in (first, second):
        with pytest.raises(ShiftKVError, match="another request"):
            next(stream)


def chat_abandoned(runtime, picture):
    parts = [{"type": "image_url", "image_url": str(picture)}, {"type": "text", "text": PROMPT}]
    chunks = runtime.create_chat_completion([{"role": "user", "content": parts}], stream=True, **SAMPLED)
    for _ in range(3):
        next(chunks)
    chunks.close()


def too_long(runtime, picture):
    with pytest.raises(PromptError, match="leaves no room"):
        runtime.generate(PROMPT * 20, [picture], **SAMPLED)


def refused(runtime, picture):
    with pytest.raises(PromptError, match="there has to be text at its end"):
        runtime.generate("", [picture], raw=True, **SAMPLED)


def failing(runtime, picture):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_shiftkv.engine.slot.Slot.advance", _fail)
        patch.setattr("edge_shiftkv.speculative.loop.verify", _fail)
        with pytest.raises(ShiftKVError, match="out of order"):
            runtime.generate(PROMPT, [picture], **SAMPLED)


def failing_in_the_selection(runtime, picture):
    runtime.kv_budget = 24
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_shiftkv.native.shiftkv.select", _fail)
        with pytest.raises(ShiftKVError, match="out of order"):
            runtime.generate(PROMPT, [picture], **SAMPLED)


def _fail(*_: object, **__: object) -> None:
    raise ShiftKVError("out of order")


REQUESTS = [
    finished,
    cut,
    closed_early,
    never_begun,
    superseded,
    chat_abandoned,
    too_long,
    refused,
    failing,
    failing_in_the_selection,
]


@pytest.mark.parametrize("rule", [None, "coupled", "tokentiming"])
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.__name__)
def test_all_is_freed(tiny, ledger, request_, rule):
    drafting = {} if rule is None else {"draft": tiny.text, "draft_options": DraftOptions(3, rule, mmproj=tiny.mmproj)}
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, **drafting) as runtime:
        for _ in range(2):
            request_(runtime, tiny.picture)
            # Weights stay until the end, and the contexts that are kept for the next request.
            left = ledger.left()
            n_models = 1 if rule is None else 2
            assert (left.pop("model"), left.pop("mmproj")) == (n_models, n_models)
            assert left.pop("context", 0) <= n_models
            assert left == {}
    assert ledger.left() == {}
    if request_ in (finished, cut, closed_early, failing):
        assert ledger.made["sampler"] >= 2 * n_models
        assert ledger.made["chunks"] >= 2


def test_what_does_not_load_is_freed(tiny, tmp_path, ledger):
    for arguments in ((tiny.text, tiny.text), (tiny.text, tmp_path / "none.gguf")):
        with pytest.raises(ShiftKVError):
            Runtime(*arguments, n_threads=1)
        with pytest.raises(ShiftKVError):
            Runtime(tiny.text, tiny.mmproj, n_threads=1, draft=arguments[1] if arguments[1] != tiny.text else "none")
    assert ledger.made["model"] >= 4
    assert ledger.left() == {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_samplers_leave_no_memory_behind():
    """Many, as a chain takes some hundred bytes, which a thousand requests hide."""

    model: Any = SimpleNamespace(n_vocab=4, suppressed_tokens=[])

    def make(n: int) -> None:
        for seed in range(n):
            Sampler(model, Sampling(temperature=1.0, seed=seed)).close()

    make(1000)
    before = resident_bytes()
    make(20_000)
    assert resident_bytes() - before < 2 << 20
