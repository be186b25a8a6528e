"""How an answer comes about: whose turn it is, and what is written when a prompt was read."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from edge_shiftkv.budget import most_pairs
from edge_shiftkv.engine.by_layer import context_by_layer, read_by_layer
from edge_shiftkv.engine.engine import Engine, Progress
from edge_shiftkv.engine.prefilled import Prefilled
from edge_shiftkv.engine.slot import Decoder, Slot, Written
from edge_shiftkv.errors import ClosedError, ContextOverflowError
from edge_shiftkv.grammar import Grammar
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import KV_TYPES, Context, Model
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.prompt import Continued, Prompt
from edge_shiftkv.request import Request
from edge_shiftkv.results import Completion, Figures, FinishReason, TokenLogprobs
from edge_shiftkv.sampling import Sampler
from edge_shiftkv.selection.results import Selection
from edge_shiftkv.speculative.loop import Drafting
from edge_shiftkv.stream import Running, Stream, Turn
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

Active = TypeVar("Active", bound=Running[Any, Any])

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
    by_layer: whether prompts that are cut are read layer by layer.
    """

    def __init__(
        self,
        engine: Engine,
        n_ctx: int,
        drafting: Drafting | None,
        progress: Progress | None,
        *,
        by_layer: bool = False,
    ) -> None:
        self.engine = engine
        self.n_ctx = n_ctx
        self.drafting = drafting
        self.by_layer = by_layer
        self._progress = progress
        self._turn = Turn()
        self._active: weakref.ref[Running[Any, Any]] | None = None
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

        def start(turn: Turn, cancel: Callable[[], None]) -> Stream:
            self.engine.interrupt.limit(request.time_limit)
            most_pairs(request.kv_budget, self.engine)  # so that errors come now
            prompt = (make_prompt or self.engine.prompt)(conversation)
            logprobs: list[TokenLogprobs] | None = None if request.sampling.logprobs is None else []
            selection: list[Selection] = []
            room = self.room(prompt, request)
            steps = self._answer(prompt, room, conversation, request, read, wrote, logprobs, selection)
            return Stream(steps, turn, cancel, logprobs, selection)

        self._check_open()
        request.sampling.check(self.engine.model.n_vocab)
        if request.sampling.gbnf:
            Grammar(self.engine.model, request.sampling.gbnf).close()  # so that errors come now
        return self.start(start)

    def start(self, make: Callable[[Turn, Callable[[], None]], Active]) -> Active:
        """What `make` makes of whose turn it is and of what cancels it, in place of what ran before.

        Raises BusyError, ClosedError, and what `make` does.
        """
        interrupt = self.engine.interrupt
        with self._turn.taken():
            self._check_open()
            self._end_active()
            interrupt.begin()
            active = make(self._turn, interrupt.cancel)
            self._active = weakref.ref(active)
        return active

    def room(self, prompt: AnyPrompt, request: Request) -> int:
        """The tokens that an answer may have, by the KV pairs that there are and the positions that the model knows.

        Closes the prompt and raises ContextOverflowError where there are none.
        """
        n_positions = max(self.n_ctx, self.engine.model.n_ctx_train)
        room = min(self.n_ctx + prompt.n_dropped, n_positions) - prompt.n_tokens
        if room < 1:
            prompt.close()
            n_held = prompt.n_tokens - prompt.n_dropped
            if n_held < self.n_ctx:  # it is the model that knows no more positions
                raise too_long(prompt.n_tokens, n_positions)
            raise too_long(n_held, self.n_ctx, prompt.n_image_tokens)
        return room if request.max_tokens is None else min(room, request.max_tokens)

    def now(self, work: Callable[[], None], time_limit: float | None = None) -> None:
        """Do something that is no answer. Raises BusyError, ClosedError, and what `work` does."""
        with self._turn.taken():
            self._check_open()
            self._end_active()
            self.engine.interrupt.begin(time_limit)
            work()

    def begin_by_layer(
        self,
        prompt: Prompt,
        budget: int,
        beginning: Beginning,
        started: float,
        destination: Context,
        sequence: int = 0,
    ) -> Begun:
        """Read a prompt layer by layer and cut it into a sequence, and draw the first token; as `begin` and `cut`."""
        engine, method = self.engine, beginning.request.kv_method
        with closing(context_by_layer(engine, prompt.n_tokens, engine.batch(prompt), method.n_query)) as context:
            read = read_by_layer(
                *(engine, prompt, context, destination, method, budget),
                sequence=sequence,
                report=self.report,
            )
            begun = begin(prompt, read.prefilled, beginning, started)
        figures = replace(
            _cut_figures(begun.figures, read.info, read.selection_s),
            prefill_s=begun.figures.prefill_s - read.selection_s,
        )
        held = Prefilled.of(destination, engine.projector, read.prefilled.held())
        held.n_dropped = prompt.n_tokens - read.info.n_kept
        return Begun(held, begun.token, figures, read.selection)

    def close(self, free: Callable[[], None]) -> None:
        """End the request that is answered, wait for it, and free what it uses."""
        with self._turn.taken(wait=self.engine.interrupt.cancel):
            self._end_active()
            self._closed = True
            free()

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
        room: int,
        conversation: Conversation,
        request: Request,
        read: Read,
        wrote: Callable[[Prefilled, str], None] | None,
        logprobs: list[TokenLogprobs] | None,
        selection: list[Selection],
    ) -> Generator[str, None, Completion]:
        model, drafting = self.engine.model, self.drafting
        with closing(prompt), closing(Sampler(model, request.sampling)) as sampler, ExitStack() as ends:
            begun = read(prompt, Beginning(request, sampler, room, drafting.n_pass if drafting else 1))
            prompt.close()  # its pictures are not needed any more
            if begun.selection:
                selection.append(begun.selection)
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
            answer, token = Answer(model, request, sampler, room, logprobs), begun.token
            while True:
                if text := answer.push(token):
                    yield text
                if answer.finish_reason:
                    break
                token = decoder.advance(token)
        prefilled.wrote(answer.tokens[: decoder.steps])  # the last one was drawn only
        completion = answer.completion(begun, decoder)
        if wrote:
            wrote(prefilled, completion.text)
        return completion


class Answer:
    """An answer as it grows, token by token.

    tokens: those that are part of it.
    finish_reason: why it ended; None before.
    logprobs: is given those of its tokens, where they are wanted.
    """

    def __init__(
        self,
        model: Model,
        request: Request,
        sampler: Sampler,
        room: int,
        logprobs: list[TokenLogprobs] | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._model = model
        self._sampler = sampler
        self._room = room
        self._logprobs = logprobs
        self._assembler = TextAssembler(request.stop)
        self._pieces: list[str] = []

    def push(self, token: int) -> str:
        """Take the token drawn last; return the text that is final now."""
        text = ""
        if self._model.ends_generation(token):
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            if self._logprobs is not None:
                self._logprobs.append(self._sampler.logprobs[len(self.tokens) - 1])
            text = self._assembler.push(self._model.piece(token))
            if self._assembler.stopped:
                self.finish_reason = "stop"
            elif len(self.tokens) == self._room:
                self.finish_reason = "length"
        if self.finish_reason:
            text += self._assembler.finish()
        self._pieces.append(text)
        return text

    def completion(self, begun: Begun, written: Written) -> Completion:
        """The whole answer, which is at its end."""
        assert self.finish_reason
        figures = replace(
            begun.figures,
            generated_tokens=len(self.tokens),
            decode_s=written.seconds,
            tokens_per_second=written.steps / written.seconds if written.steps else None,
            draft=written.figures,
        )
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        return Completion("".join(self._pieces), self.finish_reason, figures, begun.selection, logprobs)


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
        type_k=None,
        type_v=None,
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
        names = {number: name for name, number in KV_TYPES.items()}
        type_k, type_v = names[context.ggml_type_k], names[context.ggml_type_v]
        figures = replace(figures, kv_bytes_prompt=before, kv_bytes_kept=after, type_k=type_k, type_v=type_v)
    return Begun(prefilled, token, figures)


def n_cells(model: Model, n_tokens: int, budget: int, room: int) -> int:
    """The tokens of a context for an answer of `room` tokens after a prompt that is cut to a budget."""
    # Sliding-window layers are handed over whole; llama.cpp gives them no more cells than the others.
    return max(budget, min(model.window, n_tokens)) + room


def cut(begun: Begun, budget: int, beginning: Beginning, hand_over: Callable[[Prefilled, int], Prefilled]) -> Begun:
    """Go on with what the request's method keeps.

    hand_over: copies it to where there is room for so many tokens, and returns what is held there.
    """
    started = time.perf_counter()
    prefilled = begun.prefilled
    selection = prefilled.select(beginning.request.kv_method, budget)
    n_ctx = n_cells(prefilled.context.model, prefilled.n_tokens, budget, beginning.room)
    after = hand_over(prefilled, n_ctx)
    figures = _cut_figures(begun.figures, shiftkv.info(prefilled.context), time.perf_counter() - started)
    return Begun(after, begun.token, figures, selection)


def _cut_figures(figures: Figures, info: shiftkv.Info, selection_s: float) -> Figures:
    return replace(
        figures,
        kept_tokens=info.n_kept,
        kv_bytes_prompt=info.kv_bytes_prompt,
        kv_bytes_kept=info.kv_bytes_kept,
        selection_s=selection_s,
    )
