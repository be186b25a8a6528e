"""Models shared by the native tests, written and loaded once per run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cases import Load
from support.gguf_random import Spec
from support.native import Model


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """Write and load a random model: the same one for the same spec."""
    folder = tmp_path_factory.mktemp("models")
    models: dict[str, Model] = {}

    def get(spec: Spec) -> Model:
        if spec.name not in models:
            models[spec.name] = Model(spec, folder)
        return models[spec.name]

    yield get
    for model in models.values():
        model.close()
