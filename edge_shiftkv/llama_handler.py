"""MM-ShiftKV for llama-cpp-python's own `Llama`: a chat handler.

handler = ShiftKVChatHandler(clip_model_path="mmproj.gguf", kv_budget=256)
llama = llama_cpp.Llama("text.gguf", n_ctx=4096, chat_handler=handler)
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import edge_shiftkv.native  # noqa: F401 - first: it says what to do where there is no library

# isort: split
import llama_cpp.llama_cpp as llama_h
from llama_cpp import Llama
from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler

from edge_shiftkv import chat_schema
from edge_shiftkv.answering import too_long
from edge_shiftkv.budget import Budget, PairBytes, budget_for
from edge_shiftkv.checks import check_number
from edge_shiftkv.engine.prefilled import Prefilled, ScoringMethod, least_batch
from edge_shiftkv.errors import PromptError, SettingError, ShiftKVError
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.calls import Interrupt
from edge_shiftkv.native.gguf_check import check_mmproj
from edge_shiftkv.native.llama import Context, Model
from edge_shiftkv.native.mtmd import Projector
from edge_shiftkv.prompts.chat import ChatTemplate
from edge_shiftkv.prompts.images import AllowHttp
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.request import CutSettings
from edge_shiftkv.selection.methods import Method
from edge_shiftkv.selection.results import Selection

_HIDDEN = -1  # stands where no prompt's first token can


class ShiftKVChatHandler(CutSettings):
    """Answers `Llama.create_chat_completion` on a KV cache that is cut after the prompt was read.

    It takes the place of the handler for pictures, or of none. The prompt is read into `Llama`'s context, cut there,
    and `Llama` writes the answer, with all that it has: streams, stop texts, grammars, `response_format`, tools,
    logprobs (with ``logits_all=True``), LoRA, a `draft_model`. Prompts are made with the GGUF's chat template, in which
    text of messages and tools is never read as control tokens.

    One handler may serve several `Llama`s. Between two tokens of an answer, and after it, a `Llama` looks as if it had
    been reset: nothing that was cut, and no picture, is ever taken for the beginning of another prompt. Text without a
    cut is left to `Llama` altogether, its reuse of common beginnings and its `set_cache` included.

    clip_model_path: the GGUF file of the vision encoder and projector; None for text only.
    kv_budget: KV pairs kept of a prompt per layer and KV head, the share of them, or bytes, as in `Runtime`; None keeps
        all. Bytes are of KV pairs as the `Llama` stores them: made with type_k=8 (q8_0), type_v=2 (q4_0) and
        flash_attn=True, it has 2.46 times the pairs in them that it has in f16. Can be set later.
    kv_method: how they are selected, as in `Runtime`. Can be set later.
    verbose: print a line for each prompt to stderr, where the `Llama` is verbose, too.
    use_gpu: run the vision encoder on the GPU, where llama.cpp was built for one.
    image_cache, allow_http, image_root: as in `Runtime`: MiB of pictures' embeddings that are kept, for each `Llama`,
        and which pictures messages may name.

    Raises ModelError for a file that is missing or no mmproj, SettingError for a setting out of its range. A request
    raises PromptError, ContextOverflowError and ImageError for what is wrong with its messages; ModelError where the
    mmproj is another model's; SettingError for a `Llama` that was made for embeddings, or whose batches are too small;
    ShiftKVError when the model's KV cache cannot be cut; ClosedError for a `Llama` that was closed.

    Example::

        handler = ShiftKVChatHandler(clip_model_path="mmproj.gguf", kv_budget=256)
        llama = Llama("text.gguf", n_ctx=4096, chat_handler=handler)
        llama.create_chat_completion(messages)["choices"][0]["message"]["content"]
        handler.selection  # what was kept
    """

    def __init__(
        self,
        clip_model_path: str | os.PathLike[str] | None = None,
        *,
        kv_budget: Budget = 256,
        kv_method: Method | ScoringMethod | str | None = None,
        verbose: bool = True,
        use_gpu: bool = True,
        image_cache: int = 64,
        allow_http: AllowHttp = False,
        image_root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.kv_budget = kv_budget
        self.kv_method = kv_method
        self.verbose = verbose
        self._clip_model_path = None if clip_model_path is None else Path(clip_model_path)
        if self._clip_model_path:
            check_mmproj(self._clip_model_path)
        self._use_gpu = use_gpu
        check_number("image_cache", image_cache, 0, note="MiB; 0 keeps no embeddings")
        self._image_cache = image_cache
        self._allow_http = allow_http
        self._image_root = None if image_root is None else Path(image_root)
        self._selection: Selection | None = None
        self._readers: weakref.WeakKeyDictionary[Llama, _Reader] = weakref.WeakKeyDictionary()

    @property
    def selection(self) -> Selection | None:
        """What was kept of the last prompt, as `heatmap` takes it; None where nothing was cut."""
        return self._selection

    def __call__(
        self,
        *,
        llama: Llama,
        messages: Sequence[Mapping[str, Any]],
        functions: Sequence[Mapping[str, Any]] | None = None,
        function_call: Any = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = None,
        **options: Any,
    ) -> Any:
        """What `Llama.create_chat_completion` calls."""
        if not messages:
            raise PromptError("messages is empty: a conversation needs at least one")
        wanted = options.get("response_format") or {}
        if wanted.get("type") == "json_schema":  # OpenAI's form, which llama-cpp-python would pass over
            schema = (wanted.get("json_schema") or {}).get("schema") or {}
            options["response_format"] = {"type": "json_object", "schema": schema}
        reader = self._reader(llama)
        if (tools or functions) and not reader.template.takes_tools and not _forced(tool_choice, function_call):
            raise PromptError(
                "the model's chat template has no place for tools: choose one with tool_choice, or use another model"
            )
        prompt = Prompt(
            reader.template.parts(
                [self._message(message) for message in messages],
                functions=functions,
                function_call=function_call,
                tools=tools,
                tool_choice=tool_choice,
            ),
            *(reader.model, reader.projector),
        )
        with closing(prompt):
            # llama-cpp-python's own handler does all but the prompt.
            handle: Any = chat_formatter_to_chat_completion_handler(
                lambda **_: ChatFormatterResponse(prompt="", added_special=True)
            )
            return handle(
                llama=_Completing(self, llama, reader, prompt),
                messages=messages,
                functions=functions,
                function_call=function_call,
                tools=tools,
                tool_choice=tool_choice,
                **options,
            )

    def _reader(self, llama: Llama) -> _Reader:
        reader = self._readers.get(llama)
        if reader is None:
            reader = _Reader(llama, self._clip_model_path, use_gpu=self._use_gpu, cache_bytes=self._image_cache << 20)
            self._readers[llama] = reader
        reader.context.check_open()
        if self.kv_budget is not None:
            _ = reader.pair_bytes  # which a model that cannot be cut has not
        return reader

    def _message(self, message: Mapping[str, Any]) -> Message:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"not a message with a role: {message!r}"[:200])
        content = message.get("content")
        read = {"role": "user", "content": "" if content is None else content}
        (parsed,) = chat_schema.parse_messages([read], allow_http=self._allow_http, image_root=self._image_root)
        fields = {
            name: value for name, value in message.items() if name not in ("role", "content") and value is not None
        }
        return Message(message["role"], parsed.content, fields)


def _forced(tool_choice: Any, function_call: Any) -> bool:
    """Whether the answer will be a call of a certain tool, or of none."""
    choice = function_call if tool_choice is None else tool_choice
    return isinstance(choice, Mapping) or choice == "none"


class _Reader:
    """What reads prompts into a `Llama`'s context. Freed with the `Llama`.

    Raises SettingError, ModelError, PromptError.
    """

    def __init__(self, llama: Llama, clip_model_path: Path | None, *, use_gpu: bool, cache_bytes: int) -> None:
        if llama.context_params.embeddings:
            raise SettingError("the Llama was made with embedding=True: one that chats needs embedding=False")
        self.interrupt = Interrupt()
        self.model = Model.borrowed(llama.model)
        self.template = ChatTemplate(self.model)
        self.projector: Projector | None = None
        if clip_model_path is not None:
            self.projector = Projector(
                *(clip_model_path, self.model),
                use_gpu=use_gpu,
                n_threads=llama.n_threads,
                cache_bytes=cache_bytes,
                interrupt=self.interrupt,
            )
            llama._stack.callback(self.projector.close)
        params = llama.context_params
        self.context = Context.borrowed(self.model, llama.ctx, params.type_k, params.type_v, self.interrupt)
        llama._stack.callback(self.context.close)
        self.answer: _Answer | None = None

    @cached_property
    def pair_bytes(self) -> PairBytes:
        """What a token's KV pairs take in the layers that are cut. Raises ShiftKVError for a model that cannot be."""
        shiftkv.capture(self.context)
        try:
            return shiftkv.pair_bytes(self.context)
        finally:
            shiftkv.capture_end(self.context)

    def read(
        self, prompt: Prompt, budget: int | None, method: Method | ScoringMethod
    ) -> tuple[Prefilled, Selection | None]:
        """Hold just this prompt, or `budget` KV pairs of it. Raises ImageError, ShiftKVError."""
        selection = None
        try:
            prefilled = Prefilled(self.context, self.projector, n_query=0 if budget is None else method.n_query)
            prefilled.read(prompt)
            if budget is not None:
                selection = prefilled.select(method, budget)
                prefilled.hand_over(self.context)
        finally:
            self.interrupt.begin()  # after Ctrl-C, it would end all that follows
            shiftkv.capture_end(self.context)
        return prefilled, selection


class _Completing:
    """A `Llama` as llama-cpp-python's chat handler uses it, whose prompt is this one whatever is passed."""

    def __init__(self, handler: ShiftKVChatHandler, llama: Llama, reader: _Reader, prompt: Prompt) -> None:
        self._handler, self._llama, self._reader, self._prompt = handler, llama, reader, prompt
        self.verbose = llama.verbose

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Nothing: the prompt is tokenized."""
        return []

    def create_completion(self, prompt: list[int], *, stream: bool, max_tokens: int | None, **options: Any) -> Any:
        """`Llama.create_completion` after the prompt."""
        handler, llama, reader, read = self._handler, self._llama, self._reader, self._prompt
        handler._selection = None
        n_ctx = min(reader.context.n_ctx, len(llama.input_ids))  # llama.cpp may have rounded it up
        if read.n_tokens >= n_ctx:
            raise too_long(read.n_tokens, n_ctx, read.n_image_tokens)
        budget = budget_for(handler.kv_budget, read.n_tokens, reader)
        if handler.verbose and llama.verbose:
            kept = "all" if budget is None else budget
            print(f"ShiftKVChatHandler: {read.n_tokens} tokens in the prompt, {kept} kept", file=sys.stderr)
        if budget is None and not read.image_spans:
            tokens = [item for item in read.items if isinstance(item, int)]
            return llama.create_completion(tokens, stream=stream, max_tokens=max_tokens, **options)

        self._check_batches()
        reader.answer = None  # of whatever was there before, nothing is left
        llama.n_tokens, llama._requires_eval = 0, True
        prefilled, handler._selection = reader.read(read, budget, handler.kv_method)
        ids = _ids(prefilled, reader.model)
        reader.answer = answer = _Answer(llama, reader, ids)
        # llama.cpp has room for so many cells; `Llama` itself counts positions, which M-RoPE has less of than tokens.
        room = n_ctx - max(len(ids), budget or read.n_tokens)
        max_tokens = room if max_tokens is None or max_tokens <= 0 else min(max_tokens, room)
        with answer.going_on():
            written: Any = llama.create_completion(ids, stream=stream, max_tokens=max_tokens, **options)
        if stream:
            return answer.chunks(written)
        usage = written["usage"]
        usage["prompt_tokens"] = read.n_tokens
        usage["total_tokens"] = read.n_tokens + usage["completion_tokens"]
        return written

    def _check_batches(self) -> None:
        llama, reader = self._llama, self._reader
        least = least_batch(self._prompt, reader.projector)
        if least > llama_h.llama_n_ubatch(llama.ctx):
            raise SettingError(
                f"a picture of {least} tokens has to be read at once: make the Llama with n_batch and n_ubatch of at "
                f"least {least}"
            )
        if llama._logits_all and len(llama.scores) < reader.context.n_ctx:
            raise SettingError("with a draft_model, Llama needs an n_batch of at least its n_ctx, or logits_all=True")


class _Answer:
    """An answer that a `Llama` writes after a prompt of ours; at all other times the `Llama` does not know of either.

    ids: stand for the prompt's positions.
    """

    def __init__(self, llama: Llama, reader: _Reader, ids: list[int]) -> None:
        self._llama, self._reader = llama, reader
        self._array = llama.input_ids
        self._array[: len(ids)] = ids
        self._first, self._n_tokens = ids[0], len(ids)
        self._array[0] = _HIDDEN
        if llama._logits_all:
            llama.scores[: len(ids) - 1] = 0
            llama.scores[len(ids) - 1] = reader.context.logits()
        self._requires_eval = False

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Let the `Llama` know of the answer. Raises ShiftKVError when it did something else since."""
        llama = self._llama
        if (
            self._reader.answer is not self
            or llama.input_ids is not self._array
            or llama.n_tokens
            or self._array[0] != _HIDDEN
        ):
            raise ShiftKVError("the stream has ended: the Llama was used for something else since")
        cache, llama.cache = llama.cache, None  # it goes by tokens, which pictures have none of
        llama.n_tokens, llama._requires_eval = self._n_tokens, self._requires_eval
        self._array[0] = self._first
        try:
            yield
        finally:
            self._n_tokens, self._requires_eval = llama.n_tokens, llama._requires_eval
            self._array[0] = _HIDDEN
            llama.n_tokens, llama._requires_eval = 0, True
            llama.cache = cache

    def chunks(self, chunks: Iterator[Any]) -> Iterator[Any]:
        """What the `Llama` writes, piece by piece."""
        while True:
            with self.going_on():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


def _ids(prefilled: Prefilled, model: Model) -> list[int]:
    """A token for each position: where a picture is, one without a text."""
    no_text = model.eos if model.eos is not None else 0
    held = prefilled.held()
    ids: list[int] = []
    for item, (_, position) in zip(held.items, held.after, strict=True):
        ids += [item] if isinstance(item, int) else [no_text] * (position - len(ids))
    return ids
