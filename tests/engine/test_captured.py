"""What a method written in Python sees does not depend on what else was captured."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from edge_shiftkv.engine import Engine, Prefilled
from edge_shiftkv.prompts.messages import Message

N_QUERY = 6


class Looking:
    n_query = N_QUERY

    def __init__(self):
        self.seen = []

    def scores(self, captured, budget):
        self.seen.append([(captured.queries(layer), captured.hidden(layer)) for layer in captured.layers])
        return {layer: np.ones((2, captured.n_tokens)) for layer in captured.layers}


@pytest.mark.parametrize(("n_query", "n_spare"), [(N_QUERY, 0), (N_QUERY, 20), (N_QUERY + 9, 0)])
def test_a_method_sees_the_queries_that_it_asked_for(tiny, n_query, n_spare):
    looking = Looking()
    with Engine(tiny.text, n_threads=1) as engine, closing(engine.context(256)) as context:
        for options in ({"n_query": N_QUERY}, {"n_query": n_query, "n_spare": n_spare}):
            context.clear()
            prefilled = Prefilled(context, **options)
            with closing(engine.prompt([Message("user", ("What is on the picture?",))])) as prompt:
                prefilled.read(prompt)
            prefilled.select(looking, 8)
    expected, seen = looking.seen
    for one, other in zip(expected, seen, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert len(mine) == N_QUERY
            assert np.array_equal(mine, theirs)
