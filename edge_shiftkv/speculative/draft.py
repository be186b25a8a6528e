"""The draft model: kept in step with the answer, it proposes how the answer goes on."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_shiftkv.engine.prefilled import prefill_batch
from edge_shiftkv.errors import ModelError, PromptError, ShiftKVError
from edge_shiftkv.native.calls import Interrupt
from edge_shiftkv.native.llama import Context, Model
from edge_shiftkv.native.mtmd import Projector, TextChunk
from edge_shiftkv.prompts.chat import ChatTemplate
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.sampling import Noise, Sampler, Sampling
from edge_shiftkv.speculative.align import align
from edge_shiftkv.speculative.bridge import Bridge
from edge_shiftkv.speculative.options import MOST_DRAFTED, DraftOptions
from edge_shiftkv.speculative.prefix_cache import PrefixCache
from edge_shiftkv.speculative.records import Drafted, Judged, Proposal
from edge_shiftkv.speculative.rules import DraftSide, Drawn, Greedy, Rule, rule_for

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


@dataclass
class _Held:
    """What is known of the answer that is drafted for.

    before: the target's last tokens before it.
    rule: what drafts are verified by.
    tokens: the draft's tokens for prompt and answer; the first n_fixed of them are not encoded anew.
    text: the answer's bytes; n_taken of the target's tokens are in it, and n_bytes of it in `tokens`.
    """

    before: list[int]
    rule: Rule
    tokens: list[int] = field(default_factory=list)
    n_fixed: int = 0
    text: bytes = b""
    n_taken: int = 0
    n_bytes: int = 0


class Draft:
    """A model that drafts for another, whatever their vocabularies are.

    Keeps the tokens it has read from draft to draft and from answer to answer, as far as they stay the same. When a
    conversation outgrows its context, it goes on with the end of it.

    model: its weights and vocabulary.

    Raises ModelError for a file that is missing, or a model that cannot draft.
    """

    def __init__(
        self,
        path: Path,
        target: Model,
        options: DraftOptions,
        *,
        n_gpu_layers: int,
        n_threads: int,
        pack_weights: bool = True,
        interrupt: Interrupt | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self._target = target
        self._options = options
        self._interrupt = interrupt
        with ExitStack() as resources:
            self.model = Model(path, n_gpu_layers, pack_weights=pack_weights, progress=progress)
            resources.callback(self.model.close)
            if not self.model.has_kv_cache:
                raise ModelError(f"{path}: cannot draft, as its memory does not take tokens back: use another draft")
            self._projector: Projector | None = None
            if options.mmproj is not None:
                mmproj = Path(options.mmproj)
                self._projector = Projector(
                    *(mmproj, self.model), use_gpu=n_gpu_layers != 0, n_threads=n_threads, interrupt=interrupt
                )
                resources.callback(self._projector.close)
            self._n_threads = n_threads
            try:
                self._cache = self._new_cache(_SMALLEST_CONTEXT, _BATCH)
            except ShiftKVError as error:
                raise ModelError(f"{path}: cannot draft: {error}") from error
            resources.callback(lambda: self._cache.close())
            if self._cache.pools:
                raise ModelError(f"{path}: cannot draft: it is an embedding model")
            self._template = ChatTemplate(self.model)
            self._shared = _share_vocabulary(self.model, target)
            if not self._shared:
                _ = self.model.sorted_pieces  # takes a while, once
            self._to_target = Bridge(self.model, target)
            self._to_draft = Bridge(target, self.model)
            self._resources = resources.pop_all()
        self._held = _Held([], Greedy())
        self._prompt: Prompt | None = None
        self._sampler: Sampler | None = None

    def close(self) -> None:
        """Free everything."""
        self.end()
        self._resources.close()

    def begin(
        self,
        conversation: Conversation,
        prompt: Sequence[int],
        sampling: Sampling,
        noise: Noise,
        room: int,
        rule: Rule | None = None,
    ) -> None:
        """Turn to a new answer of up to `room` tokens; nothing is read before `propose` needs it.

        prompt: the target's tokens before the answer, of which the last ones will do.
        noise: what the target draws with.
        rule: what the draft is verified by; by default what the options say.
        """
        self._turn_to(prompt, sampling, noise, rule or rule_for(sampling.temperature, self._options.rule))
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
            n_prompt = self._held.n_fixed
        self._grow(n_prompt + _ROOM * room + MOST_DRAFTED, n_batch)

    def begin_after(self, tokens: Sequence[int], room: int) -> None:
        """Turn to what continues tokens of the target, greedily.

        Control tokens that the draft does not have under the same name are left out.
        """
        self._turn_to(tokens, Sampling(), Noise(0), Greedy())
        names = {token: name for name, (token, _) in self._target.control_tokens.items()}
        held = [] if self.model.bos is None else [self.model.bos]
        text = b""
        for token in tokens:
            known = self.model.control_tokens.get(names.get(token, ""))
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
        n = self._prompt.n_tokens if self._prompt else len(self._held.tokens) - self._cache.n_common(self._held.tokens)
        return n + len(answer) - self._held.n_taken

    def judge(self, answer: Sequence[int]) -> Judged:
        """Read what is new, which the next draft needs not do then, and tell how well it was foreseen.

        answer: the target's tokens so far.

        Raises ShiftKVError when llama.cpp fails.
        """
        started = time.perf_counter()
        self._keep_up(answer)
        n_read = self._read(0, _JUDGED)
        n_answer = len(self._held.tokens) - self._held.n_fixed
        places = self._places(answer)
        rule = self._held.rule.judging()
        n = n_agreed = 0
        for i in range(1, min(_JUDGED, n_read, n_answer)):
            place = places.get(i)
            if place is None and rule.needs_places:  # the draw would have begun elsewhere
                continue
            drawn = rule.draw(self._cache.logits(-1 - i), place or 0)
            n += 1
            n_agreed += drawn.token == self._held.tokens[-i]
        return Judged(n, n_agreed, n_read, time.perf_counter() - started)

    def propose(self, answer: Sequence[int], n_draft: int, most: int, enough: float = 0.0) -> Drafted:
        """Draft how the answer goes on.

        answer: the target's tokens so far.
        n_draft: tokens to draft.
        most: tokens of the target to propose at most.
        enough: the draft ends with the token at which the probability that the target takes it all, by its confidence,
            falls below this.

        Raises ShiftKVError when llama.cpp fails.
        """
        rule = self._held.rule
        started = time.perf_counter()
        self._keep_up(answer)
        bridge_s = time.perf_counter() - started
        started = time.perf_counter()
        n_read = self._read(n_draft)
        reading_s = model_s = time.perf_counter() - started
        overlap = len(self._held.text) - self._held.n_bytes
        longer = self._longer_last_token(answer) if n_read else None
        if longer:
            overlap = len(self.model.piece(self._held.tokens[-1]))
            self._cache.retract()
        drafted: list[int] = []
        chances: list[float] = []
        proposed: list[int] = []
        confidences: list[float] = []
        reach = 1.0
        n_passes = 0
        while n_read:
            started = time.perf_counter()
            first = longer if not drafted else None
            drawn = first or rule.draw(self._cache.logits(), len(answer) + len(proposed))
            model_s += time.perf_counter() - started
            confidences.append(drawn.confidence)
            reach *= drawn.confidence
            if drawn.confidence < self._options.min_confidence:
                break
            drafted.append(drawn.token)
            chances.append(drawn.probability)
            if len(drafted) == min(n_draft, most) or reach < enough or not self.model.piece(drawn.token):
                break
            started = time.perf_counter()
            self._cache.extend(drawn.token)
            n_passes += 1
            model_s += time.perf_counter() - started
            if rule.needs_places:
                started = time.perf_counter()
                proposed = self._proxies(answer, drafted, overlap)
                bridge_s += time.perf_counter() - started
        started = time.perf_counter()
        proposed = self._proxies(answer, drafted, overlap)[:most]
        chances = self._transferred(drafted, proposed, chances) if rule.needs_probabilities else []
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

    def costs(self) -> tuple[int, list[float], list[float]]:
        """Measure: how many tokens were read at once, the seconds of each time, and those of single tokens."""
        tokens = (self.model.tokenize("The quick brown fox. ") * _TAIL)[:_TAIL]
        self._cache.hold(tokens)

        def took(work: Callable[[], object]) -> float:
            started = time.perf_counter()
            work()
            self._cache.logits()  # waits for them
            return time.perf_counter() - started

        at_once = []
        for _ in range(3):
            self._cache.clear()
            at_once.append(took(lambda: self._cache.hold(tokens)))
        one_by_one = [took(partial(self._cache.extend, token)) for token in tokens[:7]]
        self._cache.clear()
        return len(tokens), at_once, one_by_one

    def _drop_pictures(self) -> None:
        prompt, self._prompt = self._prompt, None
        if prompt:
            prompt.close()

    def _turn_to(self, prompt: Sequence[int], sampling: Sampling, noise: Noise, rule: Rule) -> None:
        self.end()
        self._held = _Held(list(prompt[-_TAIL:]), rule)
        filters = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed)
        self._sampler = Sampler(self.model, filters)
        rule.begin(DraftSide(self._sampler, noise, lambda: self._stand_ins))

    def _hold(self, prompt: list[int]) -> None:
        """Begin with the tokens of a prompt, and no answer."""
        self._held.tokens = prompt
        self._held.n_fixed = len(prompt)
        if prompt and self._cache.n_before:
            self._cache.clear()

    def _with_pictures(self, conversation: Conversation) -> Prompt | None:
        """The prompt with its pictures, if the draft can take them."""
        try:
            prompt = Prompt(conversation.parts(self._template), self.model, self._projector)
        except PromptError:
            return None
        if 2 * prompt.n_tokens > self.model.n_ctx_train:
            prompt.close()
            return None
        return prompt

    def _text_tokens(self, conversation: Conversation) -> list[int]:
        try:
            parts = conversation.parts(self._template)
        except PromptError:  # the draft's template may know less roles than the target's
            text = "\n".join(str(part) for message in conversation.messages for part in message.content)
            parts = self._template.raw([], text)
        (chunk,) = Prompt(parts, self.model, None).chunks
        assert isinstance(chunk, TextChunk)
        return chunk.tokens

    def _grow(self, n_ctx: int, n_batch: int) -> None:
        """Have a context of at least `n_ctx` tokens, or of as many as the draft was trained with."""
        n_ctx = min(-(-n_ctx // _STEP) * _STEP, self.model.n_ctx_train)
        if self._cache.n_ctx < n_ctx or self._cache.n_batch < min(n_batch, n_ctx):
            self._cache.close()
            self._cache = self._new_cache(n_ctx, n_batch)

    def _new_cache(self, n_ctx: int, n_batch: int) -> PrefixCache:
        context = Context(
            *(self.model, n_ctx, n_batch),
            type_k="f16",
            type_v="f16",
            n_threads=self._n_threads,
            n_outputs=_JUDGED,
            interrupt=self._interrupt,
        )
        return PrefixCache(context)

    def _keep_up(self, answer: Sequence[int]) -> None:
        """Let `_tokens` stand for the answer up to its last whole character."""
        held = self._held
        new = answer[held.n_taken :]
        held.n_taken = len(answer)
        if self._shared:
            held.tokens += [token for token in new if token < self.model.n_vocab]
            return
        held.text += b"".join(map(self._target.piece, new))
        base = max(held.n_fixed, len(held.tokens) - _REENCODED)
        start = held.n_bytes - sum(len(self.model.piece(token)) for token in held.tokens[base:])
        tokens = self._to_draft.continue_(held.tokens[max(0, base - _TAIL) : base], held.text[start:])
        held.tokens[base:] = tokens
        held.n_bytes = start + sum(len(self.model.piece(token)) for token in tokens)
        if len(held.text) - held.n_bytes >= _LONGEST_CHARACTER:  # nothing in the draft's vocabulary stands for it
            held.n_bytes = len(held.text)
            held.n_fixed = len(held.tokens)

    def _longer_last_token(self, answer: Sequence[int]) -> Drawn | None:
        """A token that begins with the text of the last one read and is more likely.

        The end of a target's token can be in the middle of what the draft model knows as one token only: it would not
        go on from there as it should, as from a line feed that it only knows together with the spaces after it.
        """
        held = self._held
        if self._shared or len(held.text) > held.n_bytes or len(held.tokens) <= max(1, held.n_fixed):
            return None
        last = held.tokens[-1]
        pieces, tokens = self.model.sorted_pieces
        piece = self.model.piece(last)
        start, stop = bisect_right(pieces, piece), bisect_right(pieces, piece + b"\xff" * _LONGEST_CHARACTER)
        if not piece or start == stop:
            return None
        candidates = tokens[start:stop]
        logits = self._cache.logits(-2)
        likely = candidates[logits[candidates] > logits[last]]
        for token in likely[np.argsort(-logits[likely])][:_TRIED]:
            if self._could_be(answer, self.model.piece(int(token)), len(piece)):
                weights = np.exp(logits[[last, *candidates]] - logits[token])
                chance = 1 / float(weights.sum())
                return Drawn(int(token), chance, chance)
        return None

    def _could_be(self, answer: Sequence[int], text: bytes, n_held: int) -> bool:
        """Whether the target would have written its last tokens, of which `n_held` bytes are, were `text` to follow.

        Had it a token that reaches further, it would have taken that one.
        """
        start, held = len(answer), b""
        while start and len(held) < n_held:
            start -= 1
            held = self._target.piece(answer[start]) + held
        before = [*self._held.before, *answer[max(0, start - _TAIL) : start]][-_TAIL:]
        tokens = self._to_target.continue_(before, held + text[n_held:])
        return tokens[: len(answer) - start] == list(answer[start:])

    def _places(self, answer: Sequence[int]) -> dict[int, int]:
        """The places in the answer where the last tokens held begin, counted from 1 backwards, as far as one does."""
        held = self._held
        if self._shared:
            return {i: len(answer) - i for i in range(1, _JUDGED)}
        starts, n_bytes = {}, 0
        for place in range(len(answer) - 1, max(-1, len(answer) - 2 * _JUDGED), -1):
            n_bytes += len(self._target.piece(answer[place]))
            starts[n_bytes] = place
        n_bytes = len(held.text) - held.n_bytes
        places = {}
        for i, token in enumerate(reversed(held.tokens[-_JUDGED:]), 1):
            n_bytes += len(self.model.piece(token))
            if n_bytes in starts:
                places[i] = starts[n_bytes]
        return places

    def _proxies(self, answer: Sequence[int], drafted: Sequence[int], overlap: int) -> list[int]:
        """The target's tokens for the drafted ones, which begin with the last `overlap` bytes of the answer."""
        if self._shared:
            return [token for token in drafted if token < self._target.n_vocab]
        held = [*self._held.before, *answer[-_TAIL:]][-_TAIL:]
        return self._to_target.proxies(held, drafted, overlap=overlap)

    def _read(self, n_draft: int, n_outputs: int = 2) -> int:
        """Read what is new in `_tokens`, with logits after the last `n_outputs`; return how many tokens that were."""
        held = self._held
        n_read = 0
        if self._prompt:
            n_read = self._prompt.n_tokens
            self._cache.prefill(self._prompt, self._projector)
            self._drop_pictures()
        if self._cache.n_before + len(held.tokens) + n_draft > self._cache.n_ctx:
            keep = self._cache.n_ctx // 2
            dropped = len(held.tokens) - keep
            bos = [] if self.model.bos is None else [self.model.bos]
            held.tokens = [*bos, *held.tokens[max(0, dropped) :]]
            held.n_fixed = max(0, held.n_fixed - max(0, dropped)) + len(bos)
            if self._cache.n_before:
                self._cache.clear()
        return n_read + self._cache.hold(held.tokens, n_outputs)

    @cached_property
    def _stand_ins(self) -> npt.NDArray[np.int64]:
        """Draft token -> the target token with the same bytes or, for the end, role; or a number that is no token."""
        if self._shared:
            return np.arange(self.model.n_vocab)
        target = {}
        for token in reversed(range(self._target.n_vocab)):
            target[self._target.piece(token)] = token
        del target[b""]
        n = self.model.n_vocab
        result = np.arange(self._target.n_vocab, self._target.n_vocab + n)
        for token in range(n):
            if self.model.ends_generation(token):
                result[token] = (*self._to_target.proxies([], [token]), result[token])[0]
            else:
                result[token] = target.get(self.model.piece(token), result[token])
        return result

    def _transferred(self, drafted: Sequence[int], proposed: Sequence[int], chances: Sequence[float]) -> list[float]:
        """What the draft's probabilities say of each proposed token: the product over the tokens aligned with it."""
        if not proposed:
            return []
        pieces = [self.model.piece(token) for token in drafted]
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
