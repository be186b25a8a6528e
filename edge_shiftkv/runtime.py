"""The runtime: a model, and requests to it."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from edge_shiftkv import openai
from edge_shiftkv.engine.engine import Engine, KeptContext, Progress
from edge_shiftkv.engine.prefilled import Prefilled, ScoringMethod
from edge_shiftkv.engine.slot import Decoder, Slot
from edge_shiftkv.errors import ClosedError, ContextOverflowError, PromptError, SettingError
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.images import ImageSource, load_image
from edge_shiftkv.prompts.messages import Message, parse_messages
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.request import Options, Request
from edge_shiftkv.results import Completion, Figures, FinishReason
from edge_shiftkv.sampling import Sampler
from edge_shiftkv.selection.methods import DEFAULT_METHOD, Method, method
from edge_shiftkv.selection.results import Selection
from edge_shiftkv.speculative.loop import Drafting
from edge_shiftkv.speculative.options import DraftOptions
from edge_shiftkv.stream import Stream, Turn
from edge_shiftkv.text import TextAssembler

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class Runtime:
    """A model, optionally with its vision encoder, that answers requests one at a time.

    Weights are loaded once. A prompt longer than `kv_budget` is read in a context of its own size, what the selection
    keeps of it is handed to a small one, and the large one is freed. The small one is kept for later requests, and
    grows when one needs more. A runtime is a context manager; `close` frees everything.

    `cancel` ends the request that is being answered, from any thread. A runtime does not survive a fork: start child
    processes with multiprocessing's "spawn".

    model: path of a GGUF file.
    mmproj: path of the GGUF file with its vision encoder and projector.
    kv_budget: KV pairs kept of a prompt per layer and KV head, at least 2; None keeps all. Can be set later.
    kv_method: how they are selected: a configuration, the name of one in `METHODS`, or a `ScoringMethod` of your own;
        None is "mixed". Can be set later.
    n_ctx: the most tokens of prompt and answer together; None takes what the model was trained with.
    type_k, type_v: how KV pairs are stored: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl.
    n_gpu_layers: layers (and KV caches of layers) on the GPU, where llama.cpp was built for one; -1 for all.
    n_threads: CPU threads; None takes all this process may use.
    allow_http: whether `image_url` parts and `images` may be fetched from http(s) addresses.
    draft: path of the GGUF file of a model that drafts for this one, with any vocabulary (speculative decoding).
    draft_options: how it is used. The attribute `drafting` has both; set to None or to another `Drafting` of the same
        engine, which its maker closes, it changes what later requests are drafted with.
    progress: is told what goes on ("model", "mmproj" and "draft" while they are loaded, "prompt" while one is read),
        how much of it is done, and of how much: bytes, or tokens.

    Raises ModelError when a file is missing, is not what it should be, or two do not fit; SettingError for a setting
    out of its range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        mmproj: str | os.PathLike[str] | None = None,
        *,
        kv_budget: int | None = None,
        kv_method: Method | ScoringMethod | str | None = None,
        n_ctx: int | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        n_gpu_layers: int = -1,
        n_threads: int | None = None,
        allow_http: bool = False,
        draft: str | os.PathLike[str] | None = None,
        draft_options: DraftOptions | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.kv_budget = kv_budget
        self.kv_method = kv_method
        if n_ctx is not None and n_ctx < 1:
            raise SettingError(f"n_ctx is {n_ctx}: it has to be >= 1, or None for the model's own")
        self._path = Path(model)
        self._allow_http = allow_http
        self._progress = progress
        self._turn = Turn()
        self._active: weakref.ref[Stream] | None = None
        with ExitStack() as resources:
            engine = self.engine = resources.enter_context(
                Engine(
                    *(model, mmproj),
                    type_k=type_k,
                    type_v=type_v,
                    n_gpu_layers=n_gpu_layers,
                    n_threads=n_threads,
                    progress=progress,
                )
            )
            self.drafting: Drafting | None = None
            if draft is not None:
                self.drafting = Drafting(Path(draft), engine, draft_options, progress)
                resources.callback(self.drafting.close)
            self._kept = KeptContext(engine)
            resources.callback(self._kept.close)
            # Also when it is dropped without close(), and at the interpreter's exit.
            self._free = weakref.finalize(self, resources.pop_all().close)
        self.n_ctx = n_ctx or engine.model.n_ctx_train

    @property
    def kv_budget(self) -> int | None:
        """KV pairs kept of a prompt per layer and KV head; None keeps all."""
        return self._kv_budget

    @kv_budget.setter
    def kv_budget(self, budget: int | None) -> None:
        if budget is not None and budget < 2:
            raise SettingError(f"kv_budget is {budget}: it has to be >= 2, or None to keep all")
        self._kv_budget = budget

    @property
    def kv_method(self) -> Method | ScoringMethod:
        """How the KV pairs to keep are selected; set to a name or None, it is that method's configuration."""
        return self._kv_method

    @kv_method.setter
    def kv_method(self, value: Method | ScoringMethod | str | None) -> None:
        self._kv_method = method(value) if isinstance(value, str) else value or method(DEFAULT_METHOD)

    def cancel(self) -> None:
        """End the request that is being answered, from any thread: there it raises CancelledError, within moments.

        A computation on the CPU ends within about 0.1 s, one on a GPU with the batch it is at. Without a request it
        does nothing. The runtime can be used on.
        """
        self.engine.interrupt.cancel()

    def close(self) -> None:
        """End a running stream and free everything; a second call does nothing.

        A request that another thread waits for is cancelled, and waited for.
        """
        with self._turn.taken(wait=self.cancel):
            self._end_active()
            self._free()

    def __reduce__(self) -> Any:
        raise TypeError("a runtime cannot be pickled: make one in the process that uses it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self, prompt: str, images: Sequence[ImageSource] = (), *, raw: bool = False, **options: Unpack[Options]
    ) -> Completion:
        """Answer a prompt.

        The model's chat template is applied to one user message: the pictures in their order, then the text. With
        raw=True there is no template: the model continues the text, with the pictures before it. Names of control
        tokens in the text are text in both cases.

        Raises PromptError for an empty prompt, and ContextOverflowError for one that does not fit n_ctx; SettingError
        for an option out of its range; ImageError for a picture that cannot be read or is too large; CancelledError
        after `cancel`, and TimeLimitError after `time_limit` seconds; BusyError when another thread is being answered;
        ShiftKVError when llama.cpp fails or the model's KV cache cannot be cut. The runtime can be used on after any
        of them.
        """
        stream = self.stream(prompt, images, raw=raw, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream(
        self, prompt: str, images: Sequence[ImageSource] = (), *, raw: bool = False, **options: Unpack[Options]
    ) -> Stream:
        """`generate`, piece by piece. What is wrong with the request is raised here, not by the stream."""
        if not prompt.strip() and not images:
            raise PromptError("the prompt is empty")
        pictures = [load_image(image, allow_http=self._allow_http) for image in images]
        text = (prompt,) if prompt else ()
        return self._stream(Conversation([Message("user", (*pictures, *text))], raw), options)

    @overload
    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> dict[str, Any]: ...

    @overload
    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Unpack[Options]
    ) -> Iterator[dict[str, Any]]: ...

    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Unpack[Options]
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Continue a conversation in the OpenAI schema: a ``chat.completion``, or an iterator of its chunks.

        `image_url` parts take paths, ``data:`` and ``file:`` URLs and PIL images, and http(s) URLs where the runtime
        allows them. The answer and the last chunk have the figures under "figures" next to "usage".

        Raises what `generate` raises, and PromptError for messages that are not in the schema.
        """
        conversation = Conversation(parse_messages(messages, allow_http=self._allow_http))
        answer = self._stream(conversation, options)
        if stream:
            return openai.chunks(answer, model=str(self._path))
        for _ in answer:
            pass
        return openai.completion(answer.completion, model=str(self._path))

    def _stream(self, conversation: Conversation, options: Options) -> Stream:
        request = Request.of(**options)
        interrupt = self.engine.interrupt
        with self._turn.taken():
            if not self._free.alive:
                raise ClosedError("the runtime is closed")
            request.sampling.check(self.engine.model.n_vocab)
            self._end_active()
            interrupt.begin(request.time_limit)
            prompt = self.engine.prompt(conversation)
            if prompt.n_tokens >= self.n_ctx:
                prompt.close()
                raise ContextOverflowError(
                    f"the prompt has {prompt.n_tokens} tokens ({prompt.n_image_tokens} of them visual) and leaves no "
                    f"room for an answer: n_ctx is {self.n_ctx}; shorten the prompt or raise n_ctx",
                    *(prompt.n_tokens, self.n_ctx),
                )
            stream = Stream(self._answer(prompt, conversation, request), self._turn, interrupt.cancel)
            self._active = weakref.ref(stream)
        return stream

    def _end_active(self) -> None:
        active = self._active() if self._active else None
        if active:
            active.supersede()
        self._active = None

    def _answer(self, prompt: Prompt, conversation: Conversation, request: Request) -> Generator[str, None, Completion]:
        model = self.engine.model
        room = self.n_ctx - prompt.n_tokens
        if request.max_tokens is not None:
            room = min(room, request.max_tokens)
        with closing(prompt), closing(Sampler(model, request.sampling)) as sampler, ExitStack() as ends:
            drafting = self.drafting
            begun = self._begin(prompt, sampler, room, drafting.n_pass if drafting else 1)
            prompt.close()  # its pictures are not needed any more
            decoder: Decoder
            if drafting:
                ends.callback(drafting.end)
                decoder = drafting.decoder(
                    begun.context, sampler, begun.position, conversation=conversation, prompt=prompt, room=room
                )
            else:
                decoder = Slot(begun.context, sampler, begun.position)
            assembler = TextAssembler(request.stop)
            token, n_tokens, pieces = begun.token, 0, []
            finish_reason: FinishReason = "stop"
            while not model.ends_generation(token):
                n_tokens += 1
                if text := assembler.push(model.piece(token)):
                    pieces.append(text)
                    yield text
                if assembler.stopped:
                    break
                if n_tokens == room:
                    finish_reason = "length"
                    break
                token = decoder.advance(token)
            if text := assembler.finish():
                pieces.append(text)
                yield text
        figures = replace(
            begun.figures,
            generated_tokens=n_tokens,
            decode_s=decoder.seconds,
            tokens_per_second=decoder.steps / decoder.seconds if decoder.steps else None,
            draft=decoder.figures,
        )
        return Completion("".join(pieces), finish_reason, figures, begun.selection)

    def _begin(self, prompt: Prompt, sampler: Sampler, room: int, n_pass: int) -> _Begun:
        """Read the prompt, draw the first token, and cut the KV cache where it is over the budget.

        n_pass: tokens that are decoded at once after it.
        """
        started = time.perf_counter()
        budget = self.kv_budget
        if budget is None or budget >= prompt.n_tokens:
            context = self._kept.get(prompt.n_tokens + room, self.engine.batch(prompt), n_pass)
            prefilled = self._read(prompt, context)
            token = sampler.sample(context)
            figures = _figures(prompt, prefilled, time.perf_counter() - started)
            if self.engine.model.has_kv_cache:
                kv_bytes = shiftkv.cache_size(context) * prompt.n_tokens // context.n_ctx
                figures = replace(figures, kv_bytes_prompt=kv_bytes, kv_bytes_kept=kv_bytes)
            return _Begun(context, prefilled.position, token, figures, None)
        kv_method = self.kv_method
        with closing(self.engine.context(prompt.n_tokens, self.engine.batch(prompt))) as large:
            prefilled = self._read(prompt, large, kv_method.n_query)
            token = sampler.sample(large)
            figures = _figures(prompt, prefilled, time.perf_counter() - started)
            started = time.perf_counter()
            selection = prefilled.select(kv_method, budget)
            # Sliding-window layers are handed over whole; llama.cpp gives them no more cells than the others.
            n_ctx = max(budget, min(self.engine.model.window, prompt.n_tokens)) + room
            context = self._kept.get(n_ctx, n_pass, n_pass)
            position = prefilled.hand_over(context)
            info = shiftkv.info(large)
        figures = replace(
            figures,
            kept_tokens=info.n_kept,
            kv_bytes_prompt=info.kv_bytes_prompt,
            kv_bytes_kept=info.kv_bytes_kept,
            selection_s=time.perf_counter() - started,
        )
        return _Begun(context, position, token, figures, selection)

    def _read(self, prompt: Prompt, context: Context, n_query: int = 0) -> Prefilled:
        progress = self._progress
        report = (lambda done, total: progress("prompt", done, total)) if progress else None
        return self.engine.read(prompt, context, n_query=n_query, report=report)


def _figures(prompt: Prompt, prefilled: Prefilled, prefill_s: float) -> Figures:
    """The figures of an answer that is not begun, with nothing cut."""
    return Figures(
        prompt_tokens=prompt.n_tokens,
        text_tokens=prompt.n_tokens - prompt.n_image_tokens,
        image_tokens=prompt.n_image_tokens,
        kept_tokens=prompt.n_tokens,
        generated_tokens=0,
        kv_bytes_prompt=None,
        kv_bytes_kept=None,
        image_encode_s=prefilled.image_encode_s,
        prefill_s=prefill_s,
        selection_s=0.0,
        decode_s=0.0,
        tokens_per_second=None,
    )


@dataclass(frozen=True)
class _Begun:
    """An answer whose first token is drawn: it goes on in `context` at `position`."""

    context: Context
    position: int
    token: int
    figures: Figures
    selection: Selection | None
