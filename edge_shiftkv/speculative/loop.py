"""Decoding with a draft: rounds of draft, target pass and verification."""

from __future__ import annotations

import time
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from edge_shiftkv.engine.engine import Engine, Progress, loading
from edge_shiftkv.errors import ModelError
from edge_shiftkv.native.llama import Context, Model
from edge_shiftkv.native.mtmd import TextChunk
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.prompt import Continued, Prompt
from edge_shiftkv.results import DraftFigures
from edge_shiftkv.sampling import Sampler
from edge_shiftkv.speculative.draft import Draft
from edge_shiftkv.speculative.length import MOST, DraftLength
from edge_shiftkv.speculative.options import MOST_DRAFTED, DraftOptions
from edge_shiftkv.speculative.records import Drafted, Proposal
from edge_shiftkv.speculative.rules import Rule, rule_for
from edge_shiftkv.speculative.verify import verify

_MEASURED = (1, 2, 3, 4, 1, *range(5, MOST + 2), 1)  # tokens of the target's passes
_TIMES = 3  # at most
_MEASURING_S = 0.2  # after which it is not measured again


class Drafting:
    """A runtime's draft model and what is known of its worth, for all its answers.

    n_pass: the most tokens that the target decodes in one pass.
    draft: the draft model.

    Raises ModelError for a target that does not take tokens back, and what `Draft` raises.
    """

    n_pass = 1 + MOST_DRAFTED
    draft_class = Draft

    def __init__(
        self, path: Path, engine: Engine, options: DraftOptions | None = None, progress: Progress | None = None
    ) -> None:
        self._options = options or DraftOptions()
        self._target = engine.model
        if not self._target.has_kv_cache:
            raise ModelError("this model cannot be drafted for: its memory does not take tokens back; load it alone")
        self.draft = self.draft_class(
            *(path, self._target, self._options),
            n_gpu_layers=engine.n_gpu_layers,
            pack_weights=engine.pack_weights,
            n_threads=engine.n_threads,
            interrupt=engine.interrupt,
            progress=loading("draft", path, progress),
        )
        self._length = DraftLength(self._options.n_draft)
        if self._options.n_draft is None:
            for n_tokens, seconds in _pass_costs(self._target, engine.n_threads):
                self._length.pass_took(n_tokens, seconds)
            n_read, read_s, steps_s = self.draft.costs()
            for seconds in read_s:
                self._length.read(n_read, seconds)
            for seconds in steps_s:
                self._length.drafted(1, seconds)

    def close(self) -> None:
        """Free the draft model."""
        self.draft.close()

    def end(self) -> None:
        """Free what belongs to the last answer."""
        self.draft.end()

    def decoder(
        self,
        context: Context,
        sampler: Sampler,
        position: int,
        *,
        conversation: Conversation,
        prompt: Prompt | Continued,
        room: int,
    ) -> SpeculativeDecoder:
        """A decoder for the answer to `conversation`, which is `prompt` for the target, of up to `room` tokens."""
        last = prompt.chunks[-1]
        before = last.tokens if isinstance(last, TextChunk) else []
        rule = rule_for(sampler.sampling.temperature, self._options.rule)
        self.draft.begin(conversation, before, sampler.sampling, sampler.noise, room, rule)
        self._length.begin()
        return SpeculativeDecoder(
            *(context, sampler, position),
            model=self._target,
            draft=self.draft,
            length=self._length,
            rule=rule,
            room=room,
        )


def _pass_costs(target: Model, n_threads: int) -> list[tuple[int, float]]:
    """Measure the target's passes over few tokens: how many, and the seconds; those over one come first.

    All of them once and, if that does not take long, again.
    """
    readings = []
    tokens = (target.tokenize("The quick brown fox. ") * max(_MEASURED))[: max(_MEASURED)]
    with closing(Context(target, len(tokens), len(tokens), type_k="f16", type_v="f16", n_threads=n_threads)) as context:

        def took(n: int) -> float:
            started = time.perf_counter()
            context.clear()
            context.decode(tokens[:n], 0)
            context.logits()
            return time.perf_counter() - started

        took(1)  # which may read weights from disk
        began = time.perf_counter()
        for _ in range(_TIMES):
            readings += [(n, took(n)) for n in _MEASURED]
            if time.perf_counter() - began > _MEASURING_S:
                break
    return sorted(readings, key=lambda reading: reading[0] > 1)


class SpeculativeDecoder:
    """Writes on from `position` in a context, as an `engine.Slot` does, with the help of a draft.

    Tokens come out one by one. Those that a round accepted and nobody asked for are dropped with the decoder, and not
    counted; the context may hold them.

    room: tokens the answer may have.
    steps: calls of `advance`.
    seconds: time they took.
    """

    def __init__(
        self,
        context: Context,
        sampler: Sampler,
        position: int,
        *,
        model: Model,
        draft: Draft,
        length: DraftLength,
        rule: Rule,
        room: int,
    ) -> None:
        self._context = context
        self._sampler = sampler
        self._position = position
        self._model = model
        self._draft = draft
        self._length = length
        self._rule = rule
        self._answer: list[int] = []
        self._room = room
        self._ready: deque[tuple[int, bool]] = deque()
        self._drafted = self._accepted = self._rounds = self._plain_rounds = 0
        self._draft_s = self._align_s = self._verify_s = 0.0
        self.steps = 0
        self.seconds = 0.0

    @property
    def figures(self) -> DraftFigures:
        """What drafting did so far."""
        return DraftFigures(
            rounds=self._rounds,
            plain_rounds=self._plain_rounds,
            drafted=self._drafted,
            accepted=self._accepted,
            tokens_per_pass=self.steps / self._rounds if self._rounds else None,
            draft_s=self._draft_s,
            align_s=self._align_s,
            verify_s=self._verify_s,
        )

    def advance(self, token: int) -> int:
        """Take the token drawn last and give the next one. Raises ShiftKVError."""
        started = time.perf_counter()
        if self.steps == 0:
            self._answer.append(token)
        if not self._ready:
            self._round(token)
        following, accepted = self._ready.popleft()
        self._accepted += accepted
        self.steps += 1
        self.seconds += time.perf_counter() - started
        return following

    def _round(self, token: int) -> None:
        started = time.perf_counter()
        remaining = self._room - self._sampler.n_drawn
        plan = self._length.plan(remaining=remaining, unread=lambda: self._draft.unread(self._answer))
        drafted = Drafted()
        if plan.judge:
            judged = self._draft.judge(self._answer)
            self._draft_s += judged.seconds
            self._length.judged(judged)
            started = time.perf_counter()
            plan = self._length.plan(remaining=remaining, unread=lambda: self._draft.unread(self._answer))
        if plan.n_draft:
            most = min(self._length.most, remaining - 1)
            drafted = self._draft.propose(self._answer, plan.n_draft, most, plan.enough)
            if not self._length.is_worth(drafted):
                drafted = replace(drafted, proposal=Proposal())
        proposed = drafted.proposal.tokens
        passing = time.perf_counter()
        self._context.decode([token, *proposed], self._position, logits=len(proposed) + 1)
        self._context.logits()  # waits for them
        pass_s = time.perf_counter() - passing
        drawn = verify(self._context, self._sampler, drafted.proposal, self._rule, self._model.ends_generation)
        n_accepted = sum(a == b for a, b in zip(drawn, proposed, strict=False))
        self._position += 1 + n_accepted
        if n_accepted < len(proposed):
            self._context.remove(self._position)
        self._ready.extend((token, i < n_accepted) for i, token in enumerate(drawn))
        self._answer += drawn
        ended = time.perf_counter()
        self._rounds += 1
        self._plain_rounds += not proposed
        self._drafted += len(proposed)
        self._draft_s += drafted.model_s
        self._align_s += drafted.bridge_s
        self._verify_s += ended - passing
        self._length.passed(drafted, len(drawn), pass_s=pass_s, round_s=ended - started)
