"""The runtime: a model, and requests to it."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from edge_shiftkv import openai
from edge_shiftkv.decoding import Decoder, KeptContext, Prefill, prefill_batch
from edge_shiftkv.errors import PromptError, ShiftKVError
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import KV_TYPES, Context, Model, usable_cpus
from edge_shiftkv.native.mtmd import Projector
from edge_shiftkv.prompts.chat import ChatTemplate
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.images import AllowHttp, ImageSource, load_image
from edge_shiftkv.prompts.messages import Message, parse_messages
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.results import Completion, Figures, FinishReason
from edge_shiftkv.sampling import Sampler, Sampling
from edge_shiftkv.selection.methods import DEFAULT_METHOD, Method, method
from edge_shiftkv.selection.results import Selection
from edge_shiftkv.speculative.draft import DraftOptions
from edge_shiftkv.speculative.loop import Drafting, SpeculativeDecoder
from edge_shiftkv.text import TextAssembler

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class Options(TypedDict, total=False):
    """The settings of a request. Sampling is explained at `Sampling`.

    max_tokens: the longest answer, in tokens (default 512); None goes on until n_ctx, and reserves KV cache for that.
    stop: text or texts that end the answer and are not part of it.
    """

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None


@dataclass(frozen=True)
class _Request:
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]

    @classmethod
    def of(cls, *, max_tokens: int | None = 512, stop: str | Sequence[str] | None = None, **sampling: Any) -> _Request:
        if max_tokens is not None and max_tokens < 1:
            raise PromptError(f"max_tokens is {max_tokens}: it has to be >= 1, or None for no limit but n_ctx")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not all(stops):
            raise PromptError("a stop string is empty: it would end every answer at its start")
        if unknown := sampling.keys() - Options.__annotations__:
            raise TypeError(f"unknown option {min(unknown)!r}: there are {', '.join(Options.__annotations__)}")
        return cls(Sampling(**sampling), max_tokens, stops)


class _Turn:
    """Lets one thread at a time in, and turns others away."""

    def __init__(self) -> None:
        self._holder: dict[str, object] = {}

    @contextmanager
    def taken(self) -> Iterator[None]:
        me = object()
        try:
            # A lock could stay locked, if Ctrl-C came between locking it and taking note of that.
            if self._holder.setdefault("", me) is not me:
                raise ShiftKVError("the runtime is busy in another thread; it serves one request at a time")
            yield
        finally:
            if self._holder.get("") is me:
                del self._holder[""]


class Stream:
    """An answer as it is written: an iterator over pieces of text.

    Closing it, or starting another request in the same runtime, ends it early.
    """

    def __init__(self, steps: Generator[str, None, Completion], turn: _Turn) -> None:
        self._steps = steps
        self._turn = turn
        self._completion: Completion | None = None
        self._superseded = False

    @property
    def completion(self) -> Completion:
        """The whole answer with its figures. Raises ShiftKVError before the last piece was taken."""
        if not self._completion:
            raise ShiftKVError("the answer is not complete: iterate to the end first")
        return self._completion

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self._turn.taken():
            if self._superseded:
                raise ShiftKVError("the stream was ended: its runtime was closed or got another request")
            try:
                return next(self._steps)
            except StopIteration as end:
                self._completion = end.value or self._completion
        raise StopIteration

    def close(self) -> None:
        """End the answer early; a second call does nothing."""
        with self._turn.taken():
            self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _supersede(self) -> None:
        """End the answer because its runtime goes on to something else; to be called in turn."""
        self._superseded = self._completion is None
        self._steps.close()


class Runtime:
    """A model, optionally with its vision encoder, that answers requests one at a time.

    Weights are loaded once. KV caches are made per request, as large as it needs: a prompt longer than `kv_budget` is
    decoded in one, what the selection keeps of it is handed to a small one, and the large one is freed. The small one
    is kept for later requests. A runtime is a context manager; `close` frees everything.

    model: path of a GGUF file.
    mmproj: path of the GGUF file with its vision encoder and projector.
    kv_budget: KV pairs kept of a prompt per layer and KV head, at least 2; None keeps all. Can be set later.
    kv_method: how they are selected: a configuration, or the name of one in `METHODS`; None is "mixed". Can be set
        later.
    n_ctx: the most tokens of prompt and answer together; None takes what the model was trained with.
    type_k, type_v: how KV pairs are stored: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl.
    n_gpu_layers: layers (and KV caches of layers) on the GPU, where llama.cpp was built for one; -1 for all.
    n_threads: CPU threads; None takes all this process may use.
    allow_http: whether `image_url` parts and `images` may be fetched from http(s) addresses: True from public ones,
        "private" also from this machine's and private networks'.
    image_root: the folder that paths and ``file:`` URLs of pictures have to lead into, and relative ones start from;
        None, the default, takes any file. To be set where prompts come from others.
    draft: path of the GGUF file of a model that drafts for this one, with any vocabulary (speculative decoding).
    draft_options: how it is used.

    Raises ModelError when a file is missing, is not what it should be, or two do not fit; ShiftKVError for a setting
    out of its range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        mmproj: str | os.PathLike[str] | None = None,
        *,
        kv_budget: int | None = None,
        kv_method: Method | str | None = None,
        n_ctx: int | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        n_gpu_layers: int = -1,
        n_threads: int | None = None,
        allow_http: AllowHttp = False,
        image_root: str | os.PathLike[str] | None = None,
        draft: str | os.PathLike[str] | None = None,
        draft_options: DraftOptions | None = None,
    ) -> None:
        self.kv_budget = kv_budget
        self.kv_method = kv_method
        for name in (type_k, type_v):
            if name not in KV_TYPES:
                raise ShiftKVError(f"KV type {name!r} is not known: use one of {', '.join(KV_TYPES)}")
        if n_ctx is not None and n_ctx < 1:
            raise ShiftKVError(f"n_ctx is {n_ctx}: it has to be >= 1, or None for the model's own")
        if n_threads is not None and n_threads < 1:
            raise ShiftKVError(f"n_threads is {n_threads}: it has to be >= 1, or None for all")
        n_threads = n_threads or usable_cpus()
        self._path = Path(model)
        self._allow_http = allow_http
        self._image_root = None if image_root is None else Path(image_root)
        self._turn = _Turn()
        self._active: weakref.ref[Stream] | None = None
        with ExitStack() as resources:
            self._model = Model(self._path, n_gpu_layers)
            resources.callback(self._model.close)
            self._projector: Projector | None = None
            if mmproj is not None:
                self._projector = Projector(Path(mmproj), self._model, use_gpu=n_gpu_layers != 0, n_threads=n_threads)
                resources.callback(self._projector.close)
            self._template = ChatTemplate(self._model)
            self._drafting: Drafting | None = None
            if draft is not None:
                self._drafting = Drafting(
                    Path(draft), self._model, draft_options, n_gpu_layers=n_gpu_layers, n_threads=n_threads
                )
                resources.callback(self._drafting.close)
            # Tokens that are decoded at once, after the prompt.
            self._n_decode = self._drafting.n_pass if self._drafting else 1
            # Nothing below may refer to self, which would keep it alive.
            self._new_context = partial(
                Context,
                self._model,
                type_k=type_k,
                type_v=type_v,
                n_threads=n_threads,
                n_outputs=self._n_decode,
            )
            self._kept = KeptContext(self._new_context)
            resources.callback(self._kept.close)
            # Also when it is dropped without close(), and at the interpreter's exit.
            self._free = weakref.finalize(self, resources.pop_all().close)
        self.n_ctx = n_ctx or self._model.n_ctx_train

    @property
    def kv_budget(self) -> int | None:
        """KV pairs kept of a prompt per layer and KV head; None keeps all."""
        return self._kv_budget

    @kv_budget.setter
    def kv_budget(self, budget: int | None) -> None:
        if budget is not None and budget < 2:
            raise ShiftKVError(f"kv_budget is {budget}: it has to be >= 2, or None to keep all")
        self._kv_budget = budget

    @property
    def kv_method(self) -> Method:
        """How the KV pairs to keep are selected; set to a name or None, it is that method's configuration."""
        return self._kv_method

    @kv_method.setter
    def kv_method(self, value: Method | str | None) -> None:
        self._kv_method: Method = method(value) if isinstance(value, str) else value or method(DEFAULT_METHOD)

    def close(self) -> None:
        """End a running stream and free everything; a second call does nothing."""
        with self._turn.taken():
            self._end_active()
            self._free()

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

        Raises PromptError for an empty prompt, one that does not fit n_ctx, and options out of their range; ImageError
        for a picture that cannot be read or is too large; ShiftKVError when llama.cpp fails or the model's KV cache
        cannot be cut. The runtime can be used on after any of them.
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
        pictures = [load_image(image, allow_http=self._allow_http, image_root=self._image_root) for image in images]
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
        conversation = Conversation(parse_messages(messages, allow_http=self._allow_http, image_root=self._image_root))
        answer = self._stream(conversation, options)
        if stream:
            return openai.chunks(answer, model=str(self._path))
        for _ in answer:
            pass
        return openai.completion(answer.completion, model=str(self._path))

    def _stream(self, conversation: Conversation, options: Options) -> Stream:
        parts = conversation.parts(self._template)
        request = _Request.of(**options)
        with self._turn.taken():
            if not self._free.alive:
                raise ShiftKVError("the runtime is closed")
            request.sampling.check(self._model.n_vocab)
            prompt = Prompt(parts, self._model, self._projector)
            if prompt.n_tokens >= self.n_ctx:
                prompt.close()
                raise PromptError(
                    f"the prompt has {prompt.n_tokens} tokens ({prompt.n_image_tokens} of them visual) and leaves no "
                    f"room for an answer: n_ctx is {self.n_ctx}; shorten the prompt or raise n_ctx"
                )
            self._end_active()
            stream = Stream(self._answer(prompt, conversation, request, self.kv_budget), self._turn)
            self._active = weakref.ref(stream)
        return stream

    def _end_active(self) -> None:
        active = self._active() if self._active else None
        if active:
            active._supersede()
        self._active = None

    def _answer(
        self, prompt: Prompt, conversation: Conversation, request: _Request, budget: int | None
    ) -> Generator[str, None, Completion]:
        room = self.n_ctx - prompt.n_tokens
        if request.max_tokens is not None:
            room = min(room, request.max_tokens)
        with closing(prompt), closing(Sampler(self._model, request.sampling)) as sampler, ExitStack() as ends:
            begun = self._begin(prompt, sampler, room, budget)
            prompt.close()  # its pictures are not needed any more
            decoder: Decoder | SpeculativeDecoder
            if self._drafting:
                ends.callback(self._drafting.end)
                decoder = self._drafting.decoder(
                    begun.context, sampler, begun.position, conversation=conversation, prompt=prompt, room=room
                )
            else:
                decoder = Decoder(begun.context, sampler, begun.position)
            assembler = TextAssembler(request.stop)
            token, n_tokens, pieces = begun.token, 0, []
            finish_reason: FinishReason = "stop"
            while not self._model.ends_generation(token):
                n_tokens += 1
                if text := assembler.push(self._model.piece(token)):
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
            draft=decoder.figures if isinstance(decoder, SpeculativeDecoder) else None,
        )
        return Completion("".join(pieces), finish_reason, figures, begun.selection)

    def _begin(self, prompt: Prompt, sampler: Sampler, room: int, budget: int | None) -> _Begun:
        """Decode the prompt, draw the first token, and cut the KV cache where it is over the budget."""
        started = time.perf_counter()
        n_batch = prefill_batch(prompt, self._projector)
        if budget is None or budget >= prompt.n_tokens:
            context = self._kept.get(prompt.n_tokens + room, n_batch)
            prefill = Prefill(context, prompt, self._projector)
            token = sampler.sample(context)
            figures = self._figures(prompt, prefill, time.perf_counter() - started)
            if self._model.has_kv_cache:
                kv_bytes = shiftkv.cache_size(context) * prompt.n_tokens // context.n_ctx
                figures = replace(figures, kv_bytes_prompt=kv_bytes, kv_bytes_kept=kv_bytes)
            return _Begun(context, prefill.position, token, figures, None)
        with closing(self._new_context(prompt.n_tokens, n_batch)) as large:
            kv_method = self.kv_method
            shiftkv.capture(large, kv_method.n_query)
            prefill = Prefill(large, prompt, self._projector)
            token = sampler.sample(large)
            figures = self._figures(prompt, prefill, time.perf_counter() - started)
            started = time.perf_counter()
            shiftkv.select(large, kv_method.params(budget, self._model.architecture))
            # Sliding-window layers are handed over whole; llama.cpp gives them no more cells than the others.
            n_ctx = max(budget, min(self._model.window, prompt.n_tokens)) + room
            context = self._kept.get(n_ctx, self._n_decode)
            position = shiftkv.compact(large, context)
            selection = Selection(shiftkv.kept(large), prompt.n_tokens, prompt.image_spans)
            info = shiftkv.info(large)
        figures = replace(
            figures,
            kept_tokens=info.n_kept,
            kv_bytes_prompt=info.kv_bytes_prompt,
            kv_bytes_kept=info.kv_bytes_kept,
            selection_s=time.perf_counter() - started,
        )
        return _Begun(context, position, token, figures, selection)

    def _figures(self, prompt: Prompt, prefill: Prefill, prefill_s: float) -> Figures:
        """The figures of an answer that is not begun, with nothing cut."""
        return Figures(
            prompt_tokens=prompt.n_tokens,
            text_tokens=prompt.n_tokens - prompt.n_image_tokens,
            image_tokens=prompt.n_image_tokens,
            kept_tokens=prompt.n_tokens,
            generated_tokens=0,
            kv_bytes_prompt=None,
            kv_bytes_kept=None,
            image_encode_s=prefill.image_encode_s,
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
