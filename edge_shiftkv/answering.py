"""How an answer comes about: whose turn it is, and what is written when a prompt was read."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from edge_shiftkv.engine.engine import Engine, Progress
from edge_shiftkv.engine.prefilled import Prefilled
from edge_shiftkv.engine.slot import Decoder, Slot
from edge_shiftkv.errors import ClosedError, ContextOverflowError
from edge_shiftkv.grammar import Grammar
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.prompt import Continued, Prompt
from edge_shiftkv.request import Request
from edge_shiftkv.results import Completion, Figures, FinishReason, TokenLogprobs
from edge_shiftkv.sampling import Sampler
from edge_shiftkv.selection.results import Selection
from edge_shiftkv.speculative.loop import Drafting
from edge_shiftkv.stream import Stream, Turn
from edge_shiftkv.text import TextAssembler


@dataclass(frozen=True)
class Begun:
    """An answer whose first token is drawn.

    prefilled: what it goes on from.
    """

    prefilled: Prefilled
    token: int
    figures: Figures
    selection: Selection | None = None


AnyPrompt = Prompt | Continued

Read = Callable[[Any, "Beginning"], Begun]
"""Reads a prompt and draws the first token of its answer."""


@dataclass(frozen=True)
class Beginning:
    """What an answer is begun with.

    room: tokens that it may have.
    n_pass: tokens that are decoded at once after the prompt.
    """

    request: Request
    sampler: Sampler
    room: int
    n_pass: int


class Requests:
    """Answers requests to one engine, one at a time.

    n_ctx: the most tokens of prompt and answer together.
    drafting: what drafts for the engine, if anything does.
    """

    def __init__(self, engine: Engine, n_ctx: int, drafting: Drafting | None, progress: Progress | None) -> None:
        self.engine = engine
        self.n_ctx = n_ctx
        self.drafting = drafting
        self._progress = progress
        self._turn = Turn()
        self._active: weakref.ref[Stream] | None = None
        self._closed = False

    def stream(
        self,
        conversation: Conversation,
        request: Request,
        read: Read,
        *,
        make_prompt: Callable[[Conversation], AnyPrompt] | None = None,
        wrote: Callable[[Prefilled, str], None] | None = None,
    ) -> Stream:
        """The answer to a conversation.

        make_prompt: makes its tokens; by default the engine does.
        wrote: is told what the context holds after an answer that came to its end, and its text.

        Raises what is wrong with the request: PromptError, ContextOverflowError, SettingError, BusyError, ClosedError.
        """
        interrupt = self.engine.interrupt
        with self._turn.taken():
            self._check_open()
            request.sampling.check(self.engine.model.n_vocab)
            if request.sampling.gbnf:
                Grammar(self.engine.model, request.sampling.gbnf).close()  # so that errors come now
            self._end_active()
            interrupt.begin(request.time_limit)
            prompt = (make_prompt or self.engine.prompt)(conversation)
            if self._room(prompt) < 1:
                prompt.close()
                n_held = prompt.n_tokens - prompt.n_dropped
                if n_held < self.n_ctx:  # it is the model that knows no more positions
                    raise too_long(prompt.n_tokens, max(self.n_ctx, self.engine.model.n_ctx_train))
                raise too_long(n_held, self.n_ctx, prompt.n_image_tokens)
            logprobs: list[TokenLogprobs] | None = None if request.sampling.logprobs is None else []
            steps = self._answer(prompt, conversation, request, read, wrote, logprobs)
            stream = Stream(steps, self._turn, interrupt.cancel, logprobs)
            self._active = weakref.ref(stream)
        return stream

    def now(self, work: Callable[[], None]) -> None:
        """Do something that is no answer. Raises BusyError, ClosedError, and what `work` does."""
        with self._turn.taken():
            self._check_open()
            self._end_active()
            self.engine.interrupt.begin()
            work()

    def close(self, free: Callable[[], None]) -> None:
        """End the request that is answered, wait for it, and free what it uses."""
        with self._turn.taken(wait=self.engine.interrupt.cancel):
            self._end_active()
            self._closed = True
            free()

    def _room(self, prompt: AnyPrompt) -> int:
        """The tokens that an answer may have, by the KV pairs that there are and the positions that the model knows."""
        n_positions = max(self.n_ctx, self.engine.model.n_ctx_train)
        return min(self.n_ctx + prompt.n_dropped, n_positions) - prompt.n_tokens

    def report(self, done: int, total: int) -> None:
        """Tell how much of a prompt is read."""
        if self._progress:
            self._progress("prompt", done, total)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the runtime is closed")

    def _end_active(self) -> None:
        active = self._active() if self._active else None
        if active:
            active.supersede()
        self._active = None

    def _answer(
        self,
        prompt: AnyPrompt,
        conversation: Conversation,
        request: Request,
        read: Read,
        wrote: Callable[[Prefilled, str], None] | None,
        logprobs: list[TokenLogprobs] | None,
    ) -> Generator[str, None, Completion]:
        model, drafting = self.engine.model, self.drafting
        room = self._room(prompt)
        if request.max_tokens is not None:
            room = min(room, request.max_tokens)
        with closing(prompt), closing(Sampler(model, request.sampling)) as sampler, ExitStack() as ends:
            begun = read(prompt, Beginning(request, sampler, room, drafting.n_pass if drafting else 1))
            prompt.close()  # its pictures are not needed any more
            prefilled = begun.prefilled
            decoder: Decoder
            if drafting:
                ends.callback(drafting.end)
                decoder = drafting.decoder(
                    *(prefilled.context, sampler, prefilled.position),
                    conversation=conversation,
                    prompt=prompt,
                    room=room,
                )
            else:
                decoder = Slot(prefilled.context, sampler, prefilled.position)
            assembler = TextAssembler(request.stop)
            token, tokens, pieces = begun.token, [], []
            finish_reason: FinishReason = "stop"
            while not model.ends_generation(token):
                tokens.append(token)
                if logprobs is not None:
                    logprobs.append(sampler.logprobs[len(tokens) - 1])
                if text := assembler.push(model.piece(token)):
                    pieces.append(text)
                    yield text
                if assembler.stopped:
                    break
                if len(tokens) == room:
                    finish_reason = "length"
                    break
                token = decoder.advance(token)
            if text := assembler.finish():
                pieces.append(text)
                yield text
        text = "".join(pieces)
        prefilled.wrote(tokens[: decoder.steps])  # the last one was drawn only
        if wrote:
            wrote(prefilled, text)
        figures = replace(
            begun.figures,
            generated_tokens=len(tokens),
            decode_s=decoder.seconds,
            tokens_per_second=decoder.steps / decoder.seconds if decoder.steps else None,
            draft=decoder.figures,
        )
        noted = None if logprobs is None else tuple(logprobs)
        return Completion(text, finish_reason, figures, begun.selection, noted)


def too_long(n_tokens: int, n_ctx: int, n_image_tokens: int = 0) -> ContextOverflowError:
    """The error for a prompt without room for an answer."""
    visual = f" ({n_image_tokens} of them visual)" if n_image_tokens else ""
    return ContextOverflowError(
        f"the prompt has {n_tokens} tokens{visual} and leaves no room for an answer: n_ctx is {n_ctx}; shorten the "
        "prompt or raise n_ctx",
        *(n_tokens, n_ctx),
    )


def begin(prompt: AnyPrompt, prefilled: Prefilled, beginning: Beginning, started: float) -> Begun:
    """Draw the first token after a prompt of which nothing is cut; `started` is when reading it began."""
    token = beginning.sampler.sample(prefilled.context)
    figures = Figures(
        prompt_tokens=prompt.n_tokens,
        text_tokens=prompt.n_tokens - prompt.n_image_tokens,
        image_tokens=prompt.n_image_tokens,
        kept_tokens=prompt.n_tokens - prefilled.n_dropped,
        generated_tokens=0,
        kv_bytes_prompt=None,
        kv_bytes_kept=None,
        image_encode_s=prefilled.image_encode_s,
        prefill_s=time.perf_counter() - started,
        selection_s=0.0,
        decode_s=0.0,
        tokens_per_second=None,
    )
    context = prefilled.context
    if context.model.has_kv_cache:
        size = shiftkv.cache_size(context)
        before, after = (size * n // context.n_ctx for n in (prompt.n_tokens, figures.kept_tokens))
        figures = replace(figures, kv_bytes_prompt=before, kv_bytes_kept=after)
    return Begun(prefilled, token, figures)


def cut(begun: Begun, budget: int, beginning: Beginning, small: Callable[[int], Context]) -> Begun:
    """Go on in a small context, with what the request's method keeps.

    small: gives an empty context for so many tokens.
    """
    started = time.perf_counter()
    prefilled = begun.prefilled
    selection = prefilled.select(beginning.request.kv_method, budget)
    # Sliding-window layers are handed over whole; llama.cpp gives them no more cells than the others.
    n_ctx = max(budget, min(prefilled.context.model.window, prefilled.n_tokens)) + beginning.room
    after = prefilled.handed_over(small(n_ctx))
    info = shiftkv.info(prefilled.context)
    figures = replace(
        begun.figures,
        kept_tokens=info.n_kept,
        kv_bytes_prompt=info.kv_bytes_prompt,
        kv_bytes_kept=info.kv_bytes_kept,
        selection_s=time.perf_counter() - started,
    )
    return Begun(after, begun.token, figures, selection)
