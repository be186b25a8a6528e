"""Models that are loaded once, and a record of what samplers draw."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from support.gguf_random import Spec, write_model

from edge_shiftkv import answering
from edge_shiftkv.engine import engine
from edge_shiftkv.native.llama import Model
from edge_shiftkv.sampling import Sampler
from edge_shiftkv.speculative import draft
from edge_shiftkv.speculative.length import DraftLength, Plan
from edge_shiftkv.speculative.records import Judged

TIE = 1e-3  # logits; passes over one token and over several differ by rounding


@dataclass
class Drawn:
    """The tokens of one answer, and how far each was above the second best, in logits with the noise of a draw."""

    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def assert_same_as(self, other: Drawn) -> bool:
        """Fail unless `other` drew the same, or did until two tokens were too close to tell apart, which gives True."""
        for i, (a, b) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if a != b:
                assert self.gaps[i] < TIE, f"token {i} is {b}, not {a}, which is {self.gaps[i]} ahead"
                return True
        assert len(self.tokens) == len(other.tokens)
        return False


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
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    """What targets draw from now on, answer by answer; without the end of a verified block that is not used."""
    answers: list[Drawn] = []

    class Recorder(Sampler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            answers.append(Drawn())

        def sample(self, outputs, output=-1):
            scores = self._adjusted(outputs.logits(output))
            if self.sampling.temperature > 0:
                choices = self.choices(outputs.logits(output))
                scores = choices.scores + self.noise.gumbel(self.n_drawn, choices.tokens)
            second, first = np.partition(np.append(scores, -np.inf), -2)[-2:]
            token = super().sample(outputs, output)
            answers[-1].tokens.append(token)
            answers[-1].gaps.append(float(first - second))
            return token

    monkeypatch.setattr(answering, "Sampler", Recorder)
    return answers


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
