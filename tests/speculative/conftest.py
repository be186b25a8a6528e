"""Models that are loaded once, and a record of what samplers draw."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import llama_cpp.llama_cpp as llama_cpp
import pytest
from support.draws import Answers
from support.gguf_random import Spec, write_model

from edge_shiftkv import answering
from edge_shiftkv.engine import engine
from edge_shiftkv.native.llama import Model
from edge_shiftkv.speculative import draft
from edge_shiftkv.speculative.length import DraftLength, Plan
from edge_shiftkv.speculative.records import Judged


class _Shared(Model):
    def close(self) -> None:
        """Later; others use it, too."""


@pytest.fixture(scope="session")
def loaded() -> Iterator[Callable[..., Model]]:
    """Load a model, or return it: in place of `Model` where the tests of many pairs would load them again and again."""
    models: dict[Path, _Shared] = {}

    def load(path: Path, n_gpu_layers: int, **options: bool) -> Model:
        if path not in models:
            models[path] = _Shared(path, n_gpu_layers, **options)
        return models[path]

    yield load
    for model in models.values():
        Model.close(model)


@pytest.fixture
def share_models(loaded: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Model", loaded)
    monkeypatch.setattr(draft, "Model", loaded)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """What targets draw from now on."""
    answers = Answers()
    monkeypatch.setattr(answering, "Sampler", answers.sampler)
    return answers


@pytest.fixture
def token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes over several tokens compute what as many passes over one do, bit for bit, whatever kernels there are.

    For tests that compare whole texts; rounding is the business of those that use `drawn`. Contexts made before this
    are as they were.
    """
    make = llama_cpp.llama_init_from_model

    def one_at_a_time(model: object, params: llama_cpp.llama_context_params) -> object:
        params.n_ubatch = 1
        return make(model, params)

    monkeypatch.setattr(llama_cpp, "llama_init_from_model", one_at_a_time)


@dataclass(frozen=True)
class Pair:
    """Paths of random models of one vocabulary: a target, and drafts that agree with it often, always and never."""

    target: Path
    draft: Path
    same: Path
    stranger: Path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    target = write_model(Spec(), folder)
    # The weights of the first layers are the target's: an early exit.
    return Pair(target, write_model(Spec(n_layer=2), folder), target, write_model(Spec(seed=2), folder))


@pytest.fixture
def judged_only(monkeypatch: pytest.MonkeyPatch) -> list[Judged]:
    """What drafts are judged to be worth every 12 tokens, while none is used."""
    found: list[Judged] = []
    rounds = itertools.count(1)
    monkeypatch.setattr(DraftLength, "plan", lambda *_, **__: Plan(0, judge=next(rounds) % 12 == 0))
    monkeypatch.setattr(DraftLength, "judged", lambda _, judged: found.append(judged))
    return found
