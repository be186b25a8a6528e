"""Pictures and text that are read once and asked about again and again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from typing_extensions import Unpack

from edge_shiftkv import session_file
from edge_shiftkv.answering import AnyPrompt, Beginning, Begun, Requests, begin, cut, too_long
from edge_shiftkv.budget import Budget, budget_for, check_budget
from edge_shiftkv.closing import Closing
from edge_shiftkv.engine.prefilled import BATCH, SPARE, Prefilled, ScoringMethod
from edge_shiftkv.errors import CancelledError, ClosedError, PromptError, SessionError, SettingError, ShiftKVError
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context
from edge_shiftkv.native.mtmd import ImageChunk
from edge_shiftkv.prompts.chat import Part
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.images import ImageSource
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.prompts.prompt import Continued, Head
from edge_shiftkv.request import Options, Request, method_of, takes_options
from edge_shiftkv.results import Completion
from edge_shiftkv.selection.methods import Method
from edge_shiftkv.selection.results import Selection
from edge_shiftkv.session_file import Saved
from edge_shiftkv.speculative.loop import Drafting
from edge_shiftkv.stream import Stream

_ROOM = 1024  # tokens for a question and its answer in the context that holds what they are about
_CUT_ROOM = 192  # the same for what was cut, of which many may be open; it grows when it has to
_QUESTIONS = ("A", "1")  # where their prompts differ, a question begins


class Session(Closing):
    """What was read once: `Runtime.session` makes it.

    Each `ask` is a question of its own about the same: it goes on from the uncut prompt, and gets its own cut. `reply`
    goes on where the last answer ended. `cut` cuts what was read before any question is known, and frees the rest;
    questions then go on from what was kept.

    A session has contexts of its own, which `close` frees; a context manager does that. It shares the runtime's model,
    and like everything else is served one request at a time.

    selection: what `cut` kept; None before.
    """

    def __init__(
        self,
        requests: Requests,
        about: list[Message],
        load: Callable[[Sequence[ImageSource]], list[Image.Image]],
        kv_budget: Budget,
        kv_method: Method | ScoringMethod,
    ) -> None:
        self.selection: Selection | None = None
        self._requests = requests
        self._load = load
        self._about = about
        self._kv_budget, self._kv_method = kv_budget, kv_method
        self._head = Head()
        self._base: Prefilled | None = None
        self._n_query = 0
        self._is_cut = self._is_loaded = False
        self._n_about = self._n_tokens = 0  # items and tokens
        self._small: Context | None = None  # in which cut answers are written
        self._last: Prefilled | None = None
        self._turns: list[Message] = []
        self._turns_head = Head()
        self._conversation = Conversation(about)
        self._closed = False

    @property
    def about(self) -> tuple[Message, ...]:
        """What was read; the pictures of a session from a file are stand-ins of one pixel."""
        return tuple(self._about)

    @property
    def n_tokens(self) -> int:
        """Tokens of what was read; each question adds its own."""
        return self._n_tokens

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of the session's KV caches, with their empty cells; None for models without a KV cache."""
        if not self._requests.engine.model.has_kv_cache:
            return None
        contexts = (self._base and self._base.context, self._small)
        return sum(shiftkv.cache_size(context) for context in contexts if context)

    @takes_options
    def ask(self, question: str, **options: Unpack[Options]) -> Completion:
        """Answer a question about what was read, as if it were the first.

        Raises what `Runtime.generate` raises, and SettingError for a kv_budget after `cut`.

        Example: ``page.ask("What is the total?", max_tokens=20, kv_budget=128).text``
        """
        return _whole(self.stream(question, **options))

    @takes_options
    def stream(self, question: str, **options: Unpack[Options]) -> Stream:
        """`ask`, piece by piece."""
        self._check_open()
        if self._is_cut and ("kv_budget" in options or "kv_method" in options):
            raise SettingError("the session was cut already: kv_budget and kv_method have no effect any more")
        return self._stream(self._asked(question), self._read_question, options)

    @takes_options
    def reply(self, text: str, images: Sequence[ImageSource] = (), **options: Unpack[Options]) -> Completion:
        """Go on after the last answer, which the model then knows, in the KV cache that it was written in.

        images: further pictures, before the text. With a budget, so much stays of this reply's prompt, beside what was
            there before it: each picture is cut once, for its first answer, and a conversation over many pictures stays
            small.

        Raises what `ask` raises, and PromptError where nothing was asked yet.
        """
        return _whole(self.stream_reply(text, images, **options))

    @takes_options
    def stream_reply(self, text: str, images: Sequence[ImageSource] = (), **options: Unpack[Options]) -> Stream:
        """`reply`, piece by piece."""
        self._check_open()
        if not self._turns:
            raise PromptError("there is no answer to reply to: ask first")
        pictures = self._load(images)
        return self._stream([*self._turns, Message("user", (*pictures, text))], self._read_reply, options)

    @takes_options
    def stream_again(self, **options: Unpack[Options]) -> Stream:
        """Another answer in the last one's place, piece by piece; `reply` then goes on from it.

        An answer to further pictures is given from what the session is about, with everything after it read anew.

        Raises what `reply` raises.
        """
        self._check_open()
        if not self._turns:
            raise PromptError("there is no answer to give again: ask first")
        messages = self._turns[:-1]
        is_first = len(messages) == len(self._about)
        return self._stream(messages, self._read_question if is_first else self._read_reply, options)

    def cut(self, budget: Budget = None, kv_method: Method | ScoringMethod | str | None = None) -> None:
        """Keep what fits `budget` of what was read, and free the rest.

        budget, kv_method: as in `Runtime`; by default the session's.

        Raises SettingError for a budget out of its range, or none, or one that all of it fits; ShiftKVError for a
        session that is cut already.
        """
        budget = check_budget(self._kv_budget if budget is None else budget)
        chosen = self._kv_method if kv_method is None else method_of(kv_method)
        if budget is None:
            raise SettingError("there is no budget to cut to: pass one")
        self._requests.now(lambda: self._cut(budget, chosen))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was read, or what was kept of it, to a file for `Runtime.load_session`.

        The file is complete or not there. It is only read with the same model, mmproj and KV types. Text of the
        session is in it; pictures are not, but what the model knows of them is.

        Raises ShiftKVError when it cannot be written.
        """
        self._requests.now(lambda: self._save(Path(path)))

    def close(self) -> None:
        """Free everything that was read; a second call does nothing."""
        self._closed = True
        small, self._small = self._small, None
        base, self._base = self._base, None
        for context in (small, base and base.context):
            if context:
                context.close()

    def _stream(self, messages: list[Message], read: Callable[[Any, Beginning], Begun], options: Options) -> Stream:
        settings: dict[str, Any] = {"kv_budget": self._kv_budget, **options}
        settings["kv_method"] = options.get("kv_method") or self._kv_method
        request = Request.of(**settings)

        conversation = self._conversation = Conversation(messages)
        last = self._last if read == self._read_reply else None
        head = Head()

        def make_prompt(conversation: Conversation) -> Continued:
            nonlocal head
            engine = self._requests.engine
            parts = conversation.parts(engine.template)
            prompt = self._continued(parts, self._turns_head if last else self._head, last)
            try:
                head = Head.of(prompt, parts, engine.model)
            except BaseException:
                prompt.close()
                raise
            return prompt

        def wrote(prefilled: Prefilled, text: str) -> None:
            self._last, self._turns = prefilled, [*messages, Message("assistant", (text,))]
            self._turns_head = head

        return self._requests.stream(conversation, request, read, make_prompt=make_prompt, wrote=wrote)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the session is closed")

    def _asked(self, question: str) -> list[Message]:
        *before, about = self._about
        return [*before, replace(about, content=(*about.content, question))]

    def _continued(self, parts: Sequence[Part], head: Head, holder: Prefilled | None = None) -> Continued:
        """The tokens of a prompt; pictures of a head, which is held already, are not looked at again."""
        engine = self._requests.engine
        holder = holder or (self._base if self._is_fixed else None)
        return Continued(
            *(head, parts, engine.model, engine.projector),
            n_dropped=holder.n_dropped if holder else 0,
        )

    def read(self) -> None:
        """Read what the session is about. Raises what `Runtime.session` does."""
        self._read_about(Request.of(kv_budget=self._kv_budget, kv_method=self._kv_method), 0)

    def restore(self, saved: Saved) -> None:
        """Hold what a file had. Raises SessionError."""
        engine = self._requests.engine
        n_cells = saved.held.after[-1][0] - saved.held.n_dropped
        context = self._new(n_cells + _CUT_ROOM, BATCH)
        try:
            context.load_state(saved.state)
            self._base = Prefilled.of(context, engine.projector, saved.held)
        except BaseException as error:
            context.close()
            if isinstance(error, ShiftKVError) and not isinstance(error, CancelledError):
                raise SessionError(f"the session could not be restored: {error}") from error
            raise
        self._head, self._is_cut, self._is_loaded = saved.head, saved.is_cut, True
        self._n_about, self._n_tokens = self._base.n_items, self._base.n_tokens

    def _read_about(self, request: Request, n_tokens: int) -> Prefilled:
        """What the session is about, in a context for `n_tokens` of it and after it, with the method's queries."""
        engine = self._requests.engine
        n_query = request.kv_method.n_query
        base = self._base
        if base:
            n_ctx = n_tokens - base.n_dropped
            fits = n_ctx <= base.context.n_ctx
            if fits and (self._is_fixed or self._n_query >= n_query):
                return base
            if self._is_fixed or (request.kv_budget is None and not fits):
                self._base = base.moved(self._new(n_ctx, base.context.n_batch))
                self._n_query = 0
                base.context.close()
                return self._base
            self._base = None
            base.context.close()
        conversations = [Conversation(self._asked(question)) for question in _QUESTIONS]
        parts, other_parts = (conversation.parts(engine.template) for conversation in conversations)
        with closing(engine.prompt(conversations[0])) as prompt:
            self._head = Head.of(prompt, parts, engine.model)
            other_items = Continued(self._head, other_parts, engine.model).items
            pairs = zip(prompt.items, other_items, strict=False)
            n = next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt.items) - 1)
            n_ctx = max(n_tokens, prompt.n_tokens + _ROOM)
            if prompt.n_tokens >= self._requests.n_ctx:
                raise too_long(prompt.n_tokens, self._requests.n_ctx)
            context = self._new(n_ctx, engine.batch(prompt))
            try:
                base = self._captured(context, n_query)
                base.read(prompt, self._requests.report, n_items=n)
            except BaseException:
                context.close()
                raise
        self._base, self._n_query = base, n_query
        self._n_about, self._n_tokens = n, base.n_tokens
        return base

    def _captured(self, context: Context, n_query: int) -> Prefilled:
        """Nothing yet in a context, with its queries captured if it can be cut."""
        projector = self._requests.engine.projector
        try:
            return Prefilled(context, projector, n_query=n_query, n_spare=SPARE)
        except ShiftKVError:
            if self._kv_budget is not None:
                raise
            return Prefilled(context, projector)

    def _read_question(self, prompt: AnyPrompt, beginning: Beginning) -> Begun:
        # Whatever was asked before, a question is read at once: else its bits would depend on that.
        return self._read_after(prompt, beginning, self._n_about)

    def _read_after(self, prompt: AnyPrompt, beginning: Beginning, most: int | None = None) -> Begun:
        """Go on from what the session is about, or from what came after it; `most`: take over so many items at most."""
        started = time.perf_counter()
        self._last = None
        request = beginning.request
        budget = None if self._is_cut else self._budget(request, prompt.n_tokens)
        if budget is not None and self._is_fixed:
            raise SettingError("the session came from a file, which has no queries to cut by: kv_budget has to be None")
        base = self._read_about(request, prompt.n_tokens + (beginning.room if budget is None else 0))
        if base.n_reused(prompt, most=most) >= prompt.n_head:
            base.read(prompt, self._requests.report, whole_batches=False, most=most)
        else:
            parts = self._conversation.parts(self._requests.engine.template)
            # The base does not hold the pictures of former turns, or has lost the queries of its own.
            with closing(self._continued(parts, self._head if self._is_fixed else Head())) as whole:
                base.read(whole, self._requests.report, whole_batches=False, most=most)
        begun = begin(prompt, base, beginning, started)
        return begun if budget is None else cut(begun, budget, beginning, self._hand_over)

    def _read_reply(self, prompt: AnyPrompt, beginning: Beginning) -> Begun:
        started = time.perf_counter()
        last, self._last = self._last, None
        if last is None or not last.can_read(prompt):
            return self._read_after(prompt, beginning)
        if any(isinstance(chunk, ImageChunk) for chunk in prompt.chunks):
            budget = self._budget(beginning.request, prompt.n_tokens - last.n_tokens)
            if budget is not None:
                return self._read_pictures(prompt, last, budget, beginning, started)
        if last.context is (self._base and self._base.context):
            return self._read_after(prompt, beginning)
        n_ctx = prompt.n_tokens - last.n_dropped + beginning.room
        if n_ctx > last.context.n_ctx:
            last = last.moved(self._new(n_ctx, last.context.n_batch))
            if self._small:
                self._small.close()
            self._small = last.context
        last.read(prompt, self._requests.report, whole_batches=False)
        return begin(prompt, last, beginning, started)

    def _read_pictures(
        self, prompt: AnyPrompt, last: Prefilled, budget: int, beginning: Beginning, started: float
    ) -> Begun:
        """Read a reply with pictures beside what is held, and keep `budget` KV pairs more."""
        engine = self._requests.engine
        n_held = last.n_tokens - last.n_dropped
        n_ctx = prompt.n_tokens - last.n_dropped
        with closing(engine.context(n_ctx, engine.batch(prompt))) as large:
            whole = last.moved(large, n_query=beginning.request.kv_method.n_query)
            whole.read(prompt, self._requests.report, whole_batches=False)
            return cut(begin(prompt, whole, beginning, started), n_held + budget, beginning, self._hand_over)

    def _hand_over(self, prefilled: Prefilled, n_ctx: int) -> Prefilled:
        return prefilled.handed_over(self._empty(n_ctx))

    def _empty(self, n_ctx: int) -> Context:
        """The context for a cut answer, empty; it has room for a reply, too."""
        small, self._small = self._small, None
        n_ctx += _ROOM
        if small and small.n_ctx >= n_ctx:
            small.clear()
        else:
            if small:
                small.close()
            small = self._new(n_ctx, BATCH)
        self._small = small
        return small

    def _new(self, n_ctx: int, n_batch: int) -> Context:
        """A context that answers can be written in, with a draft or without: that may change while it is open."""
        return self._requests.engine.context(n_ctx, n_batch, n_outputs=Drafting.n_pass)

    @property
    def _is_fixed(self) -> bool:
        """Whether what the session is about cannot be read again."""
        return self._is_cut or self._is_loaded

    def _budget(self, request: Request, n_tokens: int) -> int | None:
        return budget_for(request.kv_budget, n_tokens, self._requests.engine)

    def _cut(self, budget: Budget, method: Method | ScoringMethod) -> None:
        if self._is_fixed:
            raise ShiftKVError("the session was cut already, or came from a file: it cannot be cut again")
        request = Request.of(kv_budget=budget, kv_method=method)
        base = self._about_only(request)
        n_kept = self._budget(request, base.n_tokens)
        if n_kept is None:
            raise SettingError(
                f"kv_budget is {budget}: what was read has only {base.n_tokens} tokens, all of which it has room for"
            )
        selection = base.select(method, n_kept)
        window = min(base.context.model.window, base.n_tokens)
        context = self._new(max(n_kept, window) + _CUT_ROOM, BATCH)
        try:
            self._base = base.handed_over(context)
        except BaseException:
            context.close()
            raise
        base.context.close()
        self.selection, self._is_cut, self._last = selection, True, None

    def _about_only(self, request: Request) -> Prefilled:
        """What the session is about, and nothing after it."""
        base = self._read_about(request, 0)
        if self._is_fixed:
            base.rewind()
        elif base.n_items != self._n_about:
            engine = self._requests.engine
            with closing(engine.prompt(Conversation(self._asked(_QUESTIONS[0])))) as prompt:
                base.read(prompt, self._requests.report, whole_batches=False, n_items=self._n_about)
        return base

    def _save(self, path: Path) -> None:
        base = self._about_only(Request.of(kv_budget=self._kv_budget, kv_method=self._kv_method))
        self._last = None
        if not base.n_tokens:
            raise ShiftKVError("there is nothing to save: the session was made without pictures and text")
        session_file.write(
            path, self._requests.engine, self._about, base.held(), self._head, base.context.state(), is_cut=self._is_cut
        )


def _whole(stream: Stream) -> Completion:
    for _ in stream:
        pass
    return stream.completion
