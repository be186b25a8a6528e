"""The rule of the paper: what a draft's probabilities say of the target's tokens, and how those are verified."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from support.speakers import SENTENCES, write_speaker

from edge_shiftkv import Runtime
from edge_shiftkv.native.llama import Context, Model
from edge_shiftkv.sampling import Sampler, Sampling
from edge_shiftkv.speculative import loop
from edge_shiftkv.speculative.bridge import Bridge
from edge_shiftkv.speculative.options import DraftOptions
from edge_shiftkv.speculative.records import Proposal
from edge_shiftkv.speculative.rules import TokenTiming
from edge_shiftkv.speculative.verify import verify

UNFILTERED: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}

Round = tuple[list[int], list[int], list[bytes], list[float]]


def edit_distance(a: bytes, b: bytes) -> int:
    """Wagner and Fischer's."""
    d = np.zeros((len(a) + 1, len(b) + 1), int)
    d[:, 0], d[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            d[i + 1, j + 1] = min(d[i, j + 1] + 1, d[i + 1, j] + 1, d[i, j] + (x != y))
    return int(d[-1, -1])


def warping_path(draft: list[bytes], target: list[bytes]) -> list[tuple[int, int]]:
    """Dynamic time warping; of equal costs a step in both comes first, then one in the draft."""
    m, n = len(draft), len(target)
    cost = np.array([[edit_distance(a.lstrip(b" "), b.lstrip(b" ")) for b in target] for a in draft], float)
    total = np.full((m + 1, n + 1), np.inf)
    total[0, 0] = 0
    for i in range(m):
        for j in range(n):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    path = [(m, n)]
    while path[-1] != (1, 1):
        i, j = path[-1]
        path.append(min([(i - 1, j - 1), (i - 1, j), (i, j - 1)], key=lambda at: total[at]))
    return [(i - 1, j - 1) for i, j in reversed(path)]


def transferred(draft: list[bytes], chances: list[float], target: list[bytes]) -> list[float]:
    """q of each of the target's tokens: the product of the probabilities of the draft's tokens aligned with it."""
    q = np.ones(len(target))
    for i, j in warping_path(draft, target):
        q[j] *= chances[i]
    return q.tolist()


class Observer:
    """Sees the tokens that a draft model holds, those it drafts, and what is proposed for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: dict[Context, Model] = {}
        self.held: dict[Context, list[int]] = {}
        self.drafted: tuple[list[int], int] = ([], 0)
        self.rounds: list[tuple[list[int], list[int], int, Proposal]] = []
        self.target: Model | None = None
        init, decode, remove, clear = Context.__init__, Context.decode, Context.remove, Context.clear
        proxies, verifying = Bridge.proxies, loop.verify

        def observed_init(context: Context, model: Model, *arguments: Any, **options: Any) -> None:
            init(context, model, *arguments, **options)
            self.models[context], self.held[context] = model, []

        def observed_decode(context: Context, tokens: Any, position: int, **options: Any) -> None:
            decode(context, tokens, position, **options)
            assert position == len(self.held[context])
            self.held[context] += tokens

        def observed_remove(context: Context, position: int) -> None:
            remove(context, position)
            del self.held[context][position:]

        def observed_clear(context: Context) -> None:
            clear(context)
            self.held[context] = []

        def observed_proxies(bridge: Bridge, held: Any, drafted: Any, overlap: int = 0) -> list[int]:
            self.drafted = list(drafted), overlap
            return proxies(bridge, held, drafted, overlap)

        def observed_verify(outputs: Any, sampler: Sampler, proposal: Proposal, *rest: Any) -> list[int]:
            # The draft's context grows: the last one counts.
            *_, context = (context for context, model in self.models.items() if model is not self.models[outputs])
            self.rounds.append((list(self.held[context]), *self.drafted, proposal))
            self.target = self.models[outputs]
            return verifying(outputs, sampler, proposal, *rest)

        monkeypatch.setattr(Context, "__init__", observed_init)
        monkeypatch.setattr(Context, "decode", observed_decode)
        monkeypatch.setattr(Context, "remove", observed_remove)
        monkeypatch.setattr(Context, "clear", observed_clear)
        monkeypatch.setattr(Bridge, "proxies", observed_proxies)
        monkeypatch.setattr(loop, "verify", observed_verify)


def test_probabilities_are_transferred_along_the_alignment(tmp_path_factory, monkeypatch):
    """From what the draft model holds in every round, its logits are computed anew, and all that follows in numpy."""
    folder = tmp_path_factory.mktemp("speakers")
    n = n_one_to_many = n_many_to_one = 0
    for names in (("qwen2", "phi-3"), ("falcon", "llama-spm"), ("llama-spm", "gpt-2")):
        target, draft = (write_speaker(name, folder) for name in names)
        with monkeypatch.context() as patch:
            rounds = observed_rounds(patch, target, draft)
        for texts, chances, proposed, q in with_chances(draft, rounds):
            # Not in one batch with what went before, as the draft model read them.
            assert q == pytest.approx(transferred(texts, chances, proposed), rel=0.02)
            path = warping_path(texts, proposed)
            n_one_to_many += len({i for i, _ in path}) < len(path)
            n_many_to_one += len({j for _, j in path}) < len(path)
            n += 1
    assert n > 100
    assert n_one_to_many > 40
    assert n_many_to_one > 0  # a product of more than one


TEMPERATURE = 0.8


def observed_rounds(patch: pytest.MonkeyPatch, target: Path, draft: Path) -> list[Round]:
    """What the draft held and drafted, what was proposed, and with which probabilities."""
    observer = Observer(patch)
    options = {"raw": True, "max_tokens": 24, "temperature": TEMPERATURE, **UNFILTERED}
    with Runtime(target, n_threads=1, n_ctx=512, draft=draft, draft_options=DraftOptions(4, "tokentiming")) as runtime:
        for seed, sentence in enumerate(SENTENCES):
            runtime.generate(sentence[: len(sentence) // 2], seed=seed, **options)
        assert observer.target
        piece = observer.target.piece
        return [
            (held, drafted, [*map(piece, proposal.tokens)], list(proposal.probabilities))
            for held, drafted, overlap, proposal in observer.rounds
            if proposal.tokens and overlap == 0 and all(map(piece, proposal.tokens))  # no end
        ]


def with_chances(
    draft: Path, rounds: list[Round]
) -> Iterator[tuple[list[bytes], list[float], list[bytes], list[float]]]:
    """The drafted tokens as bytes and their probabilities by softmax, and what was proposed."""
    with (
        closing(Model(draft, 0)) as model,
        closing(Context(model, 512, 512, type_k="f16", type_v="f16", n_threads=1, n_outputs=8)) as context,
    ):
        for held, drafted, proposed, q in rounds:
            texts = [model.piece(token) for token in drafted]
            if b"" in texts:  # the draft ended
                continue
            # All but the last drafted token were read, to draft the next one.
            assert held[len(held) - len(drafted) + 1 :] == drafted[:-1]
            context.clear()
            context.decode(held, 0, logits=len(drafted))
            chances = []
            for i, token in enumerate(drafted):
                logits = context.logits(i - len(drafted)).astype(np.float64) / TEMPERATURE
                weights = np.exp(logits - logits.max())
                chances.append(float(weights[token] / weights.sum()))
            yield texts, chances, proposed, q


@pytest.mark.parametrize("q", [0.1, 0.35, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("proposed", [0, 1, 2, 3])
def test_a_proposed_token_is_taken_or_replaced_by_one_of_the_others(proposed, q):
    """With probability min(1, p/q), else p without it; in the place of the next token, p as it is."""
    n = 2500
    p = np.array([0.45, 0.3, 0.2, 0.05])
    following = np.array([0.1, 0.2, 0.3, 0.4])
    rows = np.log([p, following]).astype(np.float32)
    outputs = SimpleNamespace(logits=lambda output: rows[output])
    model: Any = SimpleNamespace(n_vocab=4, suppressed_tokens=[])
    first, second = np.zeros(4), np.zeros(4)
    for seed in range(n):
        sampler = Sampler(model, Sampling(temperature=1.0, seed=seed, **UNFILTERED))
        drawn = verify(outputs, sampler, Proposal([proposed], [q]), TokenTiming(), lambda _: False)
        first[drawn[0]] += 1
        assert len(drawn) == (2 if drawn[0] == proposed else 1)
        if len(drawn) == 2:
            second[drawn[1]] += 1
        assert sampler.n_drawn == len(drawn)
        sampler.close()
    taken = min(1.0, p[proposed] / q)
    expected = (1 - taken) * p / (1 - p[proposed])
    expected[proposed] = taken
    possible = expected > 0
    assert not first[~possible].any()
    if possible.sum() > 1:
        assert scipy.stats.chisquare(first[possible], n * expected[possible]).pvalue > 1e-3
    assert scipy.stats.chisquare(second, second.sum() * following).pvalue > 1e-3


def test_a_replacement_is_filtered_as_any_token_is():
    rows = np.log(np.array([[0.4, 0.3, 0.2, 0.1]])).astype(np.float32)
    outputs = SimpleNamespace(logits=lambda output: rows[-1])
    model: Any = SimpleNamespace(n_vocab=4, suppressed_tokens=[])
    drawn = set()
    for seed in range(300):
        sampler = Sampler(model, Sampling(temperature=1.0, seed=seed, top_k=3, top_p=1.0, min_p=0.0))
        # Token 3 is not among the three most likely: it cannot be taken, whatever the draft says.
        drawn.add(verify(outputs, sampler, Proposal([3], [0.01]), TokenTiming(), lambda _: False)[0])
        sampler.close()
    assert drawn == {0, 1, 2}
