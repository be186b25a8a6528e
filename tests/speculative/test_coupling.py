"""The noise that a draft of another vocabulary draws with is the target's, token by token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from support.speakers import SENTENCES, write_speaker

from edge_shiftkv import Runtime
from edge_shiftkv.native.llama import Model
from edge_shiftkv.sampling import Noise
from edge_shiftkv.speculative.options import DraftOptions


@pytest.mark.parametrize(("target", "draft"), [("llama-spm", "gpt-2"), ("gpt-2", "llama-spm")])
def test_tokens_with_the_same_bytes_or_role_have_the_same_noise(tmp_path_factory, monkeypatch, target, draft):
    folder = tmp_path_factory.mktemp("speakers")
    paths = write_speaker(target, folder), write_speaker(draft, folder)
    asked: list[tuple[int, list[int]]] = []
    gumbel = Noise.gumbel

    def watched(noise: Noise, place: int, tokens: Any) -> Any:
        asked.append((noise.seed, tokens.tolist()))
        return gumbel(noise, place, tokens)

    monkeypatch.setattr(Noise, "gumbel", watched)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 5}
    with Runtime(paths[0], n_threads=1, n_ctx=256, draft=paths[1], draft_options=DraftOptions(3)) as runtime:
        runtime.generate(SENTENCES[0][:30], raw=True, max_tokens=12, **options)
    one, other = Model(paths[0], 0, vocab_only=True), Model(paths[1], 0, vocab_only=True)
    assert {seed for seed, _ in asked} == {5}
    drafts = [tokens for _, tokens in asked if max(tokens) >= one.n_vocab]
    assert drafts
    # Of tokens with the same bytes, the first one counts.
    first = {one.piece(token): token for token in reversed(range(one.n_vocab))}
    end = one.eot if one.eot is not None else one.eos
    expected = Counter(
        end if other.ends_generation(token) else first[other.piece(token)]
        for token in range(other.n_vocab)
        if other.ends_generation(token) or (other.piece(token) and other.piece(token) in first)
    )
    assert end in expected
    assert len(expected) > 5000
    for tokens in drafts:
        assert len(tokens) == other.n_vocab
        shared = [token for token in tokens if token < one.n_vocab]
        assert Counter(shared) == expected
        alone = [token for token in tokens if token >= one.n_vocab]
        assert len(np.unique(alone)) == len(alone)
    one.close()
    other.close()
