"""The draft model: kept in step with the answer, it proposes how the answer goes on."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_shiftkv.decoding import Prefill, prefill_batch
from edge_shiftkv.errors import ModelError, PromptError, ShiftKVError
from edge_shiftkv.native.llama import Context, Model
from edge_shiftkv.native.mtmd import Projector, TextChunk
from edge_shiftkv.prompts.chat import ChatTemplate
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.sampling import Noise, Sampler, Sampling
from edge_shiftkv.speculative.align import align
from edge_shiftkv.speculative.bridge import Bridge
from edge_shiftkv.speculative.verify import SAMPLING_RULES, Proposal, Rule, rule_for

MOST_DRAFTED = 16
"""The most tokens that can be drafted, and proposed, in a round."""

_BATCH = 512
_TAIL = 32  # tokens before a text that may have a say in its tokens
_REENCODED = 4  # tokens that may come out otherwise with the text after them
_TRIED = 4  # longer tokens in the place of the last one
_LONGEST_CHARACTER = 4  # bytes
_JUDGED = 16  # tokens of an answer that a draft is judged by
_SMALLEST_CONTEXT = 256
_STEP = 512  # contexts grow by multiples of it, as growing forgets what was read
_PADDING = 512  # tokens without text that one model of a family may have more than another
_ROOM = 2  # tokens of a draft per token of a target, for the answer


@dataclass(frozen=True)
class DraftOptions:
    """How a draft model is used.

    n_draft: tokens drafted in every round, 1 to 16; None drafts as many as pay, which may be none: some passes of the
        target are timed for that when the models are loaded.
    rule: how drafts are verified at a temperature: "coupled", the default, gives the answer that the target gives
        without a draft; "tokentiming" is the rule of the paper, which does not. Temperature 0 is always exact.
    mmproj: path of the draft's own vision encoder and projector; without one, it is given the text of a prompt only.
    min_confidence: a draft ends before a token that the draft model gives a lower probability.

    Raises ShiftKVError when a value is out of its range.
    """

    n_draft: int | None = None
    rule: Rule | None = None
    mmproj: str | os.PathLike[str] | None = None
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.n_draft is not None and not 1 <= self.n_draft <= MOST_DRAFTED:
            raise ShiftKVError(f"n_draft is {self.n_draft}: it has to be 1 to {MOST_DRAFTED}, or None for what pays")
        if self.rule is not None and self.rule not in SAMPLING_RULES:
            raise ShiftKVError(f"draft rule {self.rule!r} is not known: use one of {', '.join(SAMPLING_RULES)}")
        if not 0 <= self.min_confidence <= 1:
            raise ShiftKVError(f"min_confidence is {self.min_confidence}: it has to be in [0, 1]")


@dataclass(frozen=True)
class Drafted:
    """A draft, and what it took; by default none.

    n_drafted: tokens of the draft model in it.
    confidences: what the draft model gave each of them, and that of a token at which it ended for lack of confidence.
    n_read, reading_s: tokens that the draft model read before, at once, and the seconds; part of model_s.
    n_passes: the other passes of the draft model.
    model_s, bridge_s: seconds in the draft model, and from its tokens to the target's and back.
    """

    proposal: Proposal = field(default_factory=Proposal)
    n_drafted: int = 0
    confidences: Sequence[float] = ()
    n_read: int = 0
    n_passes: int = 0
    reading_s: float = 0.0
    model_s: float = 0.0
    bridge_s: float = 0.0


@dataclass(frozen=True)
class Judged:
    """What the draft model would have written, had it been asked.

    n, n_agreed: tokens of the answer that it was asked about, and those that it would have written, too.
    n_foreseen: those that it should have, by its confidence.
    n_read, seconds: tokens that it read, at once, and the time it all took.
    """

    n: int
    n_agreed: int
    n_foreseen: float
    n_read: int
    seconds: float


class Draft:
    """A model that drafts for another, whatever their vocabularies are.

    Keeps the tokens it has read from draft to draft and from answer to answer, as far as they stay the same. When a
    conversation outgrows its context, it goes on with the end of it.

    Raises ModelError for a file that is missing, or a model that cannot draft.
    """

    def __init__(self, path: Path, target: Model, options: DraftOptions, *, n_gpu_layers: int, n_threads: int) -> None:
        self._target = target
        self._options = options
        with ExitStack() as resources:
            self._model = Model(path, n_gpu_layers)
            resources.callback(self._model.close)
            if not self._model.has_kv_cache:
                raise ModelError(f"{path}: cannot draft, as its memory does not take tokens back: use another draft")
            self._projector: Projector | None = None
            if options.mmproj is not None:
                mmproj = Path(options.mmproj)
                self._projector = Projector(mmproj, self._model, use_gpu=n_gpu_layers != 0, n_threads=n_threads)
                resources.callback(self._projector.close)
            self._n_threads = n_threads
            try:
                self._cache = self._new_cache(_SMALLEST_CONTEXT, _BATCH)
            except ShiftKVError as error:
                raise ModelError(f"{path}: cannot draft: {error}") from error
            resources.callback(lambda: self._cache.close())
            if self._cache.pools:
                raise ModelError(f"{path}: cannot draft: it is an embedding model")
            self._template = ChatTemplate(self._model)
            self._shared = _share_vocabulary(self._model, target)
            if not self._shared:
                _ = self._model.sorted_pieces  # takes a while, once
            self._to_target = Bridge(self._model, target)
            self._to_draft = Bridge(target, self._model)
            self._resources = resources.pop_all()
        self._prompt: Prompt | None = None
        self._sampler: Sampler | None = None

    def close(self) -> None:
        """Free everything."""
        self.end()
        self._resources.close()

    def begin(
        self, conversation: Conversation, prompt: Sequence[int], sampling: Sampling, noise: Noise, room: int
    ) -> None:
        """Turn to a new answer of up to `room` tokens; nothing is read before `propose` needs it.

        prompt: the target's tokens before the answer, of which the last ones will do.
        noise: what the target draws with.
        """
        self._turn_to(prompt, sampling, noise)
        n_batch = _BATCH
        pictures = any(isinstance(part, Image.Image) for message in conversation.messages for part in message.content)
        if pictures and self._projector:
            self._prompt = self._with_pictures(conversation)
        if self._prompt:
            self._hold([])
            n_prompt = self._prompt.n_tokens
            n_batch = prefill_batch(self._prompt, self._projector)
        else:
            self._hold(self._text_tokens(conversation.without_images()))
            n_prompt = self._n_fixed
        self._grow(n_prompt + _ROOM * room + MOST_DRAFTED, n_batch)

    def begin_after(self, tokens: Sequence[int], room: int) -> None:
        """Turn to what continues tokens of the target, greedily.

        Control tokens that the draft does not have under the same name are left out.
        """
        self._turn_to(tokens, Sampling(), Noise(0))
        names = {token: name for name, (token, _) in self._target.control_tokens.items()}
        held = [] if self._model.bos is None else [self._model.bos]
        text = b""
        for token in tokens:
            known = self._model.control_tokens.get(names.get(token, ""))
            if not known:
                text += self._target.piece(token)
            else:
                held += self._to_draft.continue_(held[-_TAIL:], text)
                text = b""
                if held[-1:] != [known[0]]:  # as that of the beginning may be
                    held.append(known[0])
        held += self._to_draft.continue_(held[-_TAIL:], text)
        self._hold(held)
        self._grow(len(held) + _ROOM * room + MOST_DRAFTED, _BATCH)

    def end(self) -> None:
        """Free what belongs to the answer."""
        self._drop_pictures()
        sampler, self._sampler = self._sampler, None
        if sampler:
            sampler.close()

    def unread(self, answer: Sequence[int]) -> int:
        """About how many tokens have to be read before the next draft; `answer` are the target's tokens so far."""
        n = self._prompt.n_tokens if self._prompt else len(self._tokens) - self._cache.n_common(self._tokens)
        return n + len(answer) - self._n_taken

    def judge(self, answer: Sequence[int]) -> Judged:
        """Read what is new, which the next draft needs not do then, and tell how well it was foreseen.

        answer: the target's tokens so far.

        Raises ShiftKVError when llama.cpp fails.
        """
        started = time.perf_counter()
        self._keep_up(answer)
        n_read = self._read(0, _JUDGED)
        n_answer = len(self._tokens) - self._n_fixed
        places = self._places(answer)
        rule: Rule = "coupled" if self._rule == "coupled" else "greedy"
        n = n_agreed = 0
        n_foreseen = 0.0
        for i in range(1, min(_JUDGED, n_read, n_answer)):
            place = places.get(i)
            if place is None and rule == "coupled":  # the draw would have begun elsewhere
                continue
            token, confidence, _ = self._draw(self._cache.logits(-1 - i), place or 0, rule)
            n += 1
            n_agreed += token == self._tokens[-i]
            n_foreseen += confidence
        return Judged(n, n_agreed, n_foreseen, n_read, time.perf_counter() - started)

    def propose(self, answer: Sequence[int], n_draft: int, most: int, enough: float = 0.0) -> Drafted:
        """Draft how the answer goes on.

        answer: the target's tokens so far.
        n_draft: tokens to draft.
        most: tokens of the target to propose at most.
        enough: the draft ends when the probability that the target takes it all, by its confidence, is less.

        Raises ShiftKVError when llama.cpp fails.
        """
        started = time.perf_counter()
        self._keep_up(answer)
        bridge_s = time.perf_counter() - started
        started = time.perf_counter()
        n_read = self._read(n_draft)
        reading_s = model_s = time.perf_counter() - started
        overlap = len(self._text) - self._n_bytes
        longer = self._longer_last_token(answer) if n_read else None
        if longer:
            overlap = len(self._model.piece(self._tokens[-1]))
            self._cache.retract()
        drafted: list[int] = []
        chances: list[float] = []
        proposed: list[int] = []
        confidences: list[float] = []
        reach = 1.0
        n_passes = 0
        while n_read:
            started = time.perf_counter()
            if longer and not drafted:
                token, confidence, chance = longer
            else:
                token, confidence, chance = self._draw(self._cache.logits(), len(answer) + len(proposed), self._rule)
            model_s += time.perf_counter() - started
            confidences.append(confidence)
            reach *= confidence
            if confidence < self._options.min_confidence or reach < enough:
                break
            drafted.append(token)
            chances.append(chance)
            if len(drafted) == min(n_draft, most) or not self._model.piece(token):
                break
            started = time.perf_counter()
            self._cache.extend(token)
            n_passes += 1
            model_s += time.perf_counter() - started
            if self._rule == "coupled":  # the place of the next draw
                started = time.perf_counter()
                proposed = self._proxies(answer, drafted, overlap)
                bridge_s += time.perf_counter() - started
        started = time.perf_counter()
        proposed = self._proxies(answer, drafted, overlap)[:most]
        chances = self._transferred(drafted, proposed, chances) if self._rule == "tokentiming" else []
        bridge_s += time.perf_counter() - started
        return Drafted(
            Proposal(proposed, chances),
            n_drafted=len(drafted),
            confidences=confidences,
            n_read=n_read,
            n_passes=n_passes,
            reading_s=reading_s,
            model_s=model_s,
            bridge_s=bridge_s,
        )

    def costs(self) -> tuple[int, float, int, float]:
        """Measure: tokens read at once and the seconds, tokens read one by one and the seconds."""
        tokens = (self._model.tokenize("The quick brown fox. ") * _TAIL)[:_TAIL]
        self._cache.hold(tokens)
        self._cache.clear()
        started = time.perf_counter()
        self._cache.hold(tokens)
        self._cache.logits()
        at_once = time.perf_counter() - started
        started = time.perf_counter()
        for token in tokens[:4]:
            self._cache.extend(token)
            self._cache.logits()
        one_by_one = time.perf_counter() - started
        self._cache.clear()
        return len(tokens), at_once, 4, one_by_one

    def _drop_pictures(self) -> None:
        prompt, self._prompt = self._prompt, None
        if prompt:
            prompt.close()

    def _turn_to(self, prompt: Sequence[int], sampling: Sampling, noise: Noise) -> None:
        self.end()
        self._before = list(prompt[-_TAIL:])
        self._text = b""
        self._n_taken = 0
        self._rule = rule_for(sampling.temperature, self._options.rule)
        plain = replace(sampling, repeat_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None)
        self._sampler = Sampler(self._model, plain)
        self._noise = noise
        if self._rule == "coupled":
            _ = self._stand_ins  # takes a while, once
        self._own_noise = Noise(noise.seed ^ 1)  # for the rule whose draft is independent of the target
        self._n_drawn = 0

    def _hold(self, prompt: list[int]) -> None:
        """Begin with the tokens of a prompt, and no answer."""
        self._tokens = prompt
        self._n_fixed = len(prompt)
        self._n_bytes = 0
        if prompt and self._cache.n_before:
            self._cache.clear()

    def _with_pictures(self, conversation: Conversation) -> Prompt | None:
        """The prompt with its pictures, if the draft can take them."""
        try:
            prompt = Prompt(conversation.parts(self._template), self._model, self._projector)
        except PromptError:
            return None
        if 2 * prompt.n_tokens > self._model.n_ctx_train:
            prompt.close()
            return None
        return prompt

    def _text_tokens(self, conversation: Conversation) -> list[int]:
        try:
            parts = conversation.parts(self._template)
        except PromptError:  # the draft's template may know less roles than the target's
            text = "\n".join(str(part) for message in conversation.messages for part in message.content)
            parts = self._template.raw([], text)
        (chunk,) = Prompt(parts, self._model, None).chunks
        assert isinstance(chunk, TextChunk)
        return chunk.tokens

    def _grow(self, n_ctx: int, n_batch: int) -> None:
        """Have a context of at least `n_ctx` tokens, or of as many as the draft was trained with."""
        n_ctx = min(-(-n_ctx // _STEP) * _STEP, self._model.n_ctx_train)
        if self._cache.n_ctx < n_ctx or self._cache.n_batch < min(n_batch, n_ctx):
            self._cache.close()
            self._cache = self._new_cache(n_ctx, n_batch)

    def _new_cache(self, n_ctx: int, n_batch: int) -> _Cache:
        n_threads = self._n_threads
        return _Cache(
            Context(self._model, n_ctx, n_batch, type_k="f16", type_v="f16", n_threads=n_threads, n_outputs=_JUDGED)
        )

    def _keep_up(self, answer: Sequence[int]) -> None:
        """Let `_tokens` stand for the answer up to its last whole character."""
        new = answer[self._n_taken :]
        self._n_taken = len(answer)
        if self._shared:
            self._tokens += [token for token in new if token < self._model.n_vocab]
            return
        self._text += b"".join(map(self._target.piece, new))
        base = max(self._n_fixed, len(self._tokens) - _REENCODED)
        start = self._n_bytes - sum(len(self._model.piece(token)) for token in self._tokens[base:])
        tokens = self._to_draft.continue_(self._tokens[max(0, base - _TAIL) : base], self._text[start:])
        self._tokens[base:] = tokens
        self._n_bytes = start + sum(len(self._model.piece(token)) for token in tokens)
        if len(self._text) - self._n_bytes >= _LONGEST_CHARACTER:  # nothing in the draft's vocabulary stands for it
            self._n_bytes = len(self._text)
            self._n_fixed = len(self._tokens)

    def _longer_last_token(self, answer: Sequence[int]) -> tuple[int, float, float] | None:
        """A token that begins with the text of the last one read and is more likely, its confidence and probability.

        The end of a target's token can be in the middle of what the draft model knows as one token only: it would not
        go on from there as it should, as from a line feed that it only knows together with the spaces after it.
        """
        if self._shared or len(self._text) > self._n_bytes or len(self._tokens) <= max(1, self._n_fixed):
            return None
        last = self._tokens[-1]
        pieces, tokens = self._model.sorted_pieces
        piece = self._model.piece(last)
        start, stop = bisect_right(pieces, piece), bisect_right(pieces, piece + b"\xff" * _LONGEST_CHARACTER)
        if not piece or start == stop:
            return None
        candidates = tokens[start:stop]
        logits = self._cache.logits(-2)
        likely = candidates[logits[candidates] > logits[last]]
        for token in likely[np.argsort(-logits[likely])][:_TRIED]:
            if self._could_be(answer, self._model.piece(int(token)), len(piece)):
                weights = np.exp(logits[[last, *candidates]] - logits[token])
                chance = 1 / float(weights.sum())
                return int(token), chance, chance
        return None

    def _could_be(self, answer: Sequence[int], text: bytes, n_held: int) -> bool:
        """Whether the target would have written its last tokens, of which `n_held` bytes are, were `text` to follow.

        Had it a token that reaches further, it would have taken that one.
        """
        start, held = len(answer), b""
        while start and len(held) < n_held:
            start -= 1
            held = self._target.piece(answer[start]) + held
        before = [*self._before, *answer[max(0, start - _TAIL) : start]][-_TAIL:]
        tokens = self._to_target.continue_(before, held + text[n_held:])
        return tokens[: len(answer) - start] == list(answer[start:])

    def _places(self, answer: Sequence[int]) -> dict[int, int]:
        """The places in the answer where the last tokens held begin, counted from 1 backwards, as far as one does."""
        if self._shared:
            return {i: len(answer) - i for i in range(1, _JUDGED)}
        starts, n_bytes = {}, 0
        for place in range(len(answer) - 1, max(-1, len(answer) - 2 * _JUDGED), -1):
            n_bytes += len(self._target.piece(answer[place]))
            starts[n_bytes] = place
        n_bytes = len(self._text) - self._n_bytes
        places = {}
        for i, token in enumerate(reversed(self._tokens[-_JUDGED:]), 1):
            n_bytes += len(self._model.piece(token))
            if n_bytes in starts:
                places[i] = starts[n_bytes]
        return places

    def _proxies(self, answer: Sequence[int], drafted: Sequence[int], overlap: int) -> list[int]:
        """The target's tokens for the drafted ones, which begin with the last `overlap` bytes of the answer."""
        if self._shared:
            return [token for token in drafted if token < self._target.n_vocab]
        held = [*self._before, *answer[-_TAIL:]][-_TAIL:]
        return self._to_target.proxies(held, drafted, overlap=overlap)

    def _read(self, n_draft: int, n_outputs: int = 2) -> int:
        """Read what is new in `_tokens`, with logits after the last `n_outputs`; return how many tokens that were."""
        n_read = 0
        if self._prompt:
            n_read = self._prompt.n_tokens
            self._cache.prefill(self._prompt, self._projector)
            self._drop_pictures()
        if self._cache.n_before + len(self._tokens) + n_draft > self._cache.n_ctx:
            keep = self._cache.n_ctx // 2
            dropped = len(self._tokens) - keep
            bos = [] if self._model.bos is None else [self._model.bos]
            self._tokens = [*bos, *self._tokens[max(0, dropped) :]]
            self._n_fixed = max(0, self._n_fixed - max(0, dropped)) + len(bos)
            if self._cache.n_before:
                self._cache.clear()
        return n_read + self._cache.hold(self._tokens, n_outputs)

    def _draw(self, logits: npt.NDArray[np.float32], place: int, rule: Rule) -> tuple[int, float, float]:
        """The token drafted at `place` in the answer, the confidence that the target agrees, its probability."""
        if rule == "greedy":
            best = int(np.argmax(logits))
            chance = 1 / float(np.exp(logits - logits[best]).sum())
            return best, chance, chance
        assert self._sampler
        choices = self._sampler.choices(logits)
        if rule == "tokentiming":
            noise = self._own_noise.gumbel(self._n_drawn, choices.tokens)
            self._n_drawn += 1
        else:
            noise = self._noise.gumbel(place, self._stand_ins[choices.tokens])
        perturbed = choices.scores + noise
        best = int(np.argmax(perturbed))
        chance = float(choices.probabilities()[best])
        if rule == "tokentiming":
            return int(choices.tokens[best]), chance, chance
        return int(choices.tokens[best]), 1 / float(np.exp(perturbed - perturbed[best]).sum()), chance

    @cached_property
    def _stand_ins(self) -> npt.NDArray[np.int64]:
        """Draft token -> the target token with the same bytes or, for the end, role; or a number that is no token."""
        if self._shared:
            return np.arange(self._model.n_vocab)
        target = {}
        for token in reversed(range(self._target.n_vocab)):
            target[self._target.piece(token)] = token
        del target[b""]
        n = self._model.n_vocab
        result = np.arange(self._target.n_vocab, self._target.n_vocab + n)
        for token in range(n):
            if self._model.ends_generation(token):
                result[token] = (*self._to_target.proxies([], [token]), result[token])[0]
            else:
                result[token] = target.get(self._model.piece(token), result[token])
        return result

    def _transferred(self, drafted: Sequence[int], proposed: Sequence[int], chances: Sequence[float]) -> list[float]:
        """What the draft's probabilities say of each proposed token: the product over the tokens aligned with it."""
        if not proposed:
            return []
        pieces = [self._model.piece(token) for token in drafted]
        alignment = align(pieces, [self._target.piece(token) for token in proposed])
        return [float(np.prod([chances[i] for i in alignment.draft_of(j)])) for j in range(len(proposed))]


def _share_vocabulary(a: Model, b: Model) -> bool:
    """Whether the tokens of two models are the same, but for some at the end that no text has."""
    n = min(a.n_vocab, b.n_vocab)
    return (
        abs(a.n_vocab - b.n_vocab) <= _PADDING
        and a.control_tokens == b.control_tokens
        and all(a.piece(token) == b.piece(token) for token in range(n))
    )


class _Cache:
    """A context, and the tokens that are known to be in it.

    n_before: how many others are in it before them, of a prompt with pictures.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tokens: list[int] = []
        self._start = 0
        self.n_before = 0
        self.n_ctx = context.n_ctx
        self.n_batch = context.n_batch

    @property
    def pools(self) -> bool:
        """Whether the model makes one embedding of a text."""
        return int(llama.llama_pooling_type(self._context.pointer)) > 0

    def close(self) -> None:
        self._context.close()
        self.n_ctx = 0

    def clear(self) -> None:
        self._tokens.clear()
        self._start = self.n_before = 0
        self._context.clear()

    def logits(self, output: int = -1) -> npt.NDArray[np.float32]:
        return self._context.logits(output)

    def prefill(self, prompt: Prompt, projector: Projector | None) -> None:
        """Read a prompt with pictures."""
        self.clear()
        self._start = Prefill(self._context, prompt, projector).position
        self.n_before = prompt.n_tokens

    def n_common(self, tokens: Sequence[int]) -> int:
        """The length of the longest common prefix."""
        n = max(0, min(len(tokens), len(self._tokens)) - _TAIL)
        if self._tokens[:n] != tokens[:n]:
            n = 0
        while n < min(len(tokens), len(self._tokens)) and self._tokens[n] == tokens[n]:
            n += 1
        return n

    def hold(self, tokens: Sequence[int], n_outputs: int = 2) -> int:
        """Hold just these; return how many had to be read.

        There are logits after the last two, and after up to `n_outputs` of those that were read.
        """
        if not tokens:
            return 0
        n = n_common = max(0, min(self.n_common(tokens), len(tokens) - 2))
        del self._tokens[n:]
        self._context.remove(self._start + n)
        # In whole batches but for the first, so that those with logits are in one.
        while n < len(tokens):
            stop = n + ((len(tokens) - n - 1) % self.n_batch + 1)
            batch = tokens[n:stop]
            logits = min(n_outputs, len(batch)) if stop == len(tokens) else 0
            self._context.decode(batch, self._start + n, logits=logits)
            self._tokens += batch
            n = stop
        return len(tokens) - n_common

    def retract(self) -> None:
        """Forget the last one."""
        self._tokens.pop()
        self._context.remove(self._start + len(self._tokens))

    def extend(self, token: int) -> None:
        """Hold one more."""
        self._context.decode([token], self._start + len(self._tokens))
        self._tokens.append(token)
