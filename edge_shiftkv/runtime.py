"""The runtime: a model, and requests to it."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal, get_args, overload

from PIL import Image
from typing_extensions import Unpack

from edge_shiftkv import chat_schema, hub, session_file
from edge_shiftkv.answering import Beginning, Begun, Requests, begin, cut, n_cells
from edge_shiftkv.batch.batch import Batch, Many
from edge_shiftkv.batch.rows import Ready, Rows, read_row
from edge_shiftkv.budget import Budget, budget_for, check_budget, is_in_bytes, most_pairs
from edge_shiftkv.checks import check_number
from edge_shiftkv.closing import Closing
from edge_shiftkv.engine.by_layer import check_by_layer
from edge_shiftkv.engine.engine import Engine, KeptContext, KeptPrompt, Progress, roomy
from edge_shiftkv.engine.prefilled import Prefilled, ScoringMethod
from edge_shiftkv.errors import PromptError, SettingError
from edge_shiftkv.native.llama import MAX_SEQUENCES, Context
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.images import AllowHttp, ImageRoot, ImageSource, load_image
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.request import CutSettings, Options, Request, method_of, takes_options
from edge_shiftkv.results import Completion
from edge_shiftkv.selection.methods import Method
from edge_shiftkv.session import Session
from edge_shiftkv.speculative.loop import Drafting
from edge_shiftkv.speculative.options import DraftOptions
from edge_shiftkv.stream import Stream, Turn

Prefill = Literal["by-batch", "by-layer"]


class Runtime(CutSettings, Closing):
    """A model, optionally with its vision encoder, that answers requests one at a time.

    Weights are loaded once. A prompt longer than `kv_budget` is read in a context of its own size, what the selection
    keeps of it is handed to a small one, and the large one is freed. The small one is kept for later requests, and
    grows when one needs more. A runtime is a context manager; `close` frees everything.

    `cancel` ends the request that is being answered, from any thread. A runtime does not survive a fork: start child
    processes with multiprocessing's "spawn".

    model: path of a GGUF file.
    mmproj: path of the GGUF file with its vision encoder and projector.
    kv_budget: KV pairs kept of a prompt per layer and KV head, at least 2; or the share of them, between 0 and 1; None
        keeps all. Or text: bytes for what is kept of a prompt, over all layers that are cut, such as "64MiB" (kB, MB
        and GB are powers of ten); or a share such as "1/8" of the bytes that the prompt's KV pairs in those layers take
        in f16. As many pairs are kept as fit these, at least 2. Layers with sliding windows are not cut, and do not
        count. Can be set later.
    kv_method: how they are selected: a configuration, the name of one in `METHODS`, or a `ScoringMethod` of your own;
        None is "mixed". Can be set later.
    n_ctx: the most tokens of prompt and answer together; None or 0 takes what the model was trained with.
    type_k, type_v: how keys and values are stored: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl. It holds for
        all that is read and written, prompts before they are cut among it. None is f16, but for a runtime that is made
        with a budget in bytes: there it is q8_0 for keys and q4_0 for values, which has 2.46 times the pairs in the
        same bytes; on CUDA and Metal, where attention is for keys and values of one type, q8_0 for both, 1.88 times.
        Where llama.cpp has no cache of these types for a model, as for heads whose size is no multiple of 32, a
        RuntimeWarning says so, and it is f16. `Figures` have the types. A budget in bytes that is set later, or with a
        request, is for KV pairs as they are stored then.
    n_gpu_layers: layers (and KV caches of layers) on the GPU, where llama.cpp was built for one; -1 for all.
    pack_weights: whether weights for the CPU may be copied into the order that its kernels are fastest with. The copy
        takes as much memory as those weights; without it, they are read from the mapped file, and passes over several
        tokens (drafts, `generate_many`, prompts) take longer.
    n_threads: CPU threads; None or -1 takes all this process may use.
    keep_prompt: whether the large context stays, too: a request that begins like the one before, as the next turn of a
        conversation does, then only reads what is new. It costs the memory of a whole prompt's KV pairs. Without a
        budget there is only one context, which stays in any case.
    prefill: "by-layer" takes a prompt that is cut through the whole of a layer before the next one: only one layer's KV
        pairs of the whole prompt exist at a time, beside what is kept of the others, and the result is the same. Of
        models whose layers have full attention and read nothing but what the layer before made; without `keep_prompt`,
        and without sessions, which keep whole prompts. "by-batch", the default, takes a part of the prompt through all
        layers before the next one.
    image_cache: MiB of pictures' embeddings that are kept, those used last: such a picture is not encoded again.
    allow_http: whether `image_url` parts and `images` may be fetched from http(s) addresses: True from public ones,
        "private" also from this machine's and private networks'.
    image_root: the folder that paths and ``file:`` URLs of pictures have to lead into, and relative ones start from;
        None, the default, takes any file, and False none. To be set where prompts come from others.
    draft: path of the GGUF file of a model that drafts for this one, with any vocabulary (speculative decoding).
    draft_options: how it is used.
    progress: is told what goes on ("model", "mmproj" and "draft" while they are loaded, "prompt" while one is read),
        how much of it is done, and of how much: bytes, or tokens.

    Raises ModelError when a file is missing, is not what it should be, or two do not fit; SettingError for a setting
    out of its range, two that exclude each other, or bytes that 2 KV pairs do not fit; ShiftKVError for a model that
    cannot be read by layer, or cut to bytes.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        mmproj: str | os.PathLike[str] | None = None,
        *,
        kv_budget: Budget = None,
        kv_method: Method | ScoringMethod | str | None = None,
        n_ctx: int | None = None,
        type_k: str | None = None,
        type_v: str | None = None,
        n_gpu_layers: int = -1,
        pack_weights: bool = True,
        n_threads: int | None = None,
        keep_prompt: bool = False,
        prefill: Prefill = "by-batch",
        image_cache: int = 64,
        allow_http: AllowHttp = False,
        image_root: str | os.PathLike[str] | Literal[False] | None = None,
        draft: str | os.PathLike[str] | None = None,
        draft_options: DraftOptions | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.kv_budget = kv_budget
        self.kv_method = kv_method
        if n_ctx is not None:
            check_number("n_ctx", n_ctx, 0, whole=True, note="None or 0 is the model's own")
        if prefill not in get_args(Prefill):
            raise SettingError(f"prefill is {prefill!r}: it has to be one of {', '.join(get_args(Prefill))}")
        by_layer = prefill == "by-layer"
        if by_layer and keep_prompt:
            raise SettingError("keep_prompt keeps the KV pairs of whole prompts, which prefill='by-layer' never has")
        self._path = Path(model)
        self._allow_http = allow_http
        self._image_root: ImageRoot = None if image_root is None else image_root is not False and Path(image_root)
        with ExitStack() as resources:
            engine = self.engine = resources.enter_context(
                Engine(
                    *(model, mmproj),
                    type_k=type_k,
                    type_v=type_v,
                    small_kv=is_in_bytes(kv_budget),
                    n_gpu_layers=n_gpu_layers,
                    pack_weights=pack_weights,
                    n_threads=n_threads,
                    image_cache=image_cache,
                    progress=progress,
                )
            )
            most_pairs(kv_budget, engine)  # so that errors come now
            drafting: Drafting | None = None
            if draft is not None:
                drafting = Drafting(Path(draft), engine, draft_options, progress)
                resources.callback(drafting.close)
            if by_layer:
                check_by_layer(engine)
            n_ctx = n_ctx or engine.model.n_ctx_train
            self._requests = Requests(engine, n_ctx, drafting, progress, by_layer=by_layer)
            self._kept = KeptContext(engine)
            resources.callback(self._kept.close)
            self._prefilled: Prefilled | None = None  # in the kept context, if it was not cut
            self._keep_prompt = keep_prompt
            self._uncut = KeptPrompt(engine)
            resources.callback(self._uncut.close)
            sessions = self._sessions = weakref.WeakSet[Session]()
            resources.callback(_close_all, sessions)
            # Also when it is dropped without close(), and at the interpreter's exit.
            self._free = weakref.finalize(self, resources.pop_all().close)

    @classmethod
    def from_pretrained(
        cls, repo: str, file: str | None = None, *, mmproj: str | None = hub.AUTO, **settings: Any
    ) -> Runtime:
        """A runtime of a model of the Hugging Face hub, which is downloaded first, or found in the cache.

        repo, file, mmproj: as in `hub.fetch`: "user/model" or "user/model:quant"; the model's file or a pattern for
            it; the same for the mmproj, which is found by itself if there is one, and left out with None.
        settings: those of the runtime.

        Raises HubError where the files cannot be had, and what the runtime raises.

        Example::

            Runtime.from_pretrained("ggml-org/SmolVLM-500M-Instruct-GGUF:Q8_0", kv_budget=256)
        """
        files = hub.fetch(repo, file, mmproj)
        return cls(files.model, files.mmproj, **settings)

    @property
    def n_ctx(self) -> int:
        """The most tokens of prompt and answer together."""
        return self._requests.n_ctx

    @property
    def drafting(self) -> Drafting | None:
        """What drafts, if anything. Another one of the same engine may be set, which its maker closes; or None."""
        return self._requests.drafting

    @drafting.setter
    def drafting(self, drafting: Drafting | None) -> None:
        self._requests.drafting = drafting

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
        self._requests.close(self._free)

    def __reduce__(self) -> Any:
        raise TypeError("a runtime cannot be pickled: make one in the process that uses it")

    @takes_options
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

        The options are those of `Options`: what they are for is there and at `Sampling`.

        Example: ``runtime.generate("What is the total?", ["receipt.png"], max_tokens=20).text``
        """
        stream = self.stream(prompt, images, raw=raw, **options)
        for _ in stream:
            pass
        return stream.completion

    @takes_options
    def stream(
        self, prompt: str, images: Sequence[ImageSource] = (), *, raw: bool = False, **options: Unpack[Options]
    ) -> Stream:
        """`generate`, piece by piece. What is wrong with the request is raised here, not by the stream."""
        return self._stream(self._asked(prompt, images, raw), options)

    @takes_options
    def generate_many(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        n_parallel: int = 8,
        ordered: bool = True,
        **options: Unpack[Options],
    ) -> Batch:
        """Answer many requests, several of them at a time: an iterator over `BatchResult`.

        Prompts are read one by one; the answers to `n_parallel` of them are written side by side, a token of each in
        one pass over the weights. Requests are taken from the iterator as they are needed, a few of them ahead, so it
        may be endless. Those that follow each other about the same picture read it once.

        requests: a mapping each, of what `generate` takes by name (prompt, images, raw and options), or what
            `create_chat_completion` does (messages and so on), but that its answers come whole.
        n_parallel: answers written at a time, 1 to 256. Each has a KV cache for the longest that was met of what a
            prompt keeps and its max_tokens. Models whose KV pairs cannot be handed over, as those of recurrent models,
            write one at a time.
        ordered: give results in the order of the requests; else each as soon as it is there.
        options: those of requests that do not say otherwise; a time_limit counts from when a request is begun.

        What is wrong with one request is its result's error, and the others are answered. What the iterator raises is
        raised after the last answer. Closing the batch, another request to the runtime, `cancel` and Ctrl-C end it.
        When a pass over the weights fails, those in it are each tried again, alone.

        An answer is the one that `generate` gives, seed for seed, where the arithmetic of a token does not depend on
        what is computed beside it. On x86 CPUs that is so for up to 17 answers at a time, with no more threads than
        attention heads; on AMX it was not tried. Elsewhere sums may be rounded otherwise, and an answer may differ
        where two tokens are almost equally likely.

        Raises SettingError for an option out of its range, or with a draft, which writes one answer at a time;
        BusyError.

        Example::

            rows = [{"prompt": "What is the total?", "images": [path]} for path in paths]
            for result in runtime.generate_many(rows, max_tokens=32):
                print(paths[result.index], result.error or result.completion.text)
        """
        if not (isinstance(n_parallel, int) and 1 <= n_parallel <= MAX_SEQUENCES):
            raise SettingError(f"n_parallel is {n_parallel}: it has to be 1 to {MAX_SEQUENCES}")
        if self.drafting:
            raise SettingError("a draft writes one answer at a time: set `runtime.drafting = None` to write many")
        n_vocab = self.engine.model.n_vocab
        self._request(options).sampling.check(n_vocab)

        def ready(given: Any) -> Ready:
            conversation, own = read_row(given, self._asked, self._body)
            request = self._request({**options, **own})
            request.sampling.check(n_vocab)
            return Ready(conversation, request)

        def make(turn: Turn, cancel: Callable[[], None]) -> Batch:
            rows = Rows(iter(requests), ready, self.engine.interrupt)
            return Batch(Many(self._requests, rows, n_parallel, ordered=ordered), turn, cancel)

        return self._requests.start(make)

    def session(
        self,
        text: str = "",
        images: Sequence[ImageSource] = (),
        *,
        system: str = "",
        kv_budget: Budget | Literal["runtime"] = "runtime",
        kv_method: Method | ScoringMethod | str | None = None,
        time_limit: float | None = None,
    ) -> Session:
        """Read pictures and text once, to ask about them again and again: see `Session`.

        text, images: what the questions are about; in a prompt the pictures come first, then the text. Without either
            it is an empty conversation.
        system: a system message.
        kv_budget, kv_method: what `Session.ask` cuts to, unless it is told otherwise; by default the runtime's.
        time_limit: seconds that reading may take; None sets no limit.

        Raises what `generate` raises.

        Example::

            with runtime.session(images=["invoice.png"]) as page:
                print(page.ask("What is the total?").text)
                print(page.ask("And the date?").text)
                print(page.reply("Are you sure?").text)
        """
        if time_limit is not None:
            check_number("time_limit", time_limit, 0, above=True, note="seconds; None sets no limit")
        pictures = self._load(images)
        content: tuple[str | Image.Image, ...] = (*pictures, text) if text else tuple(pictures)
        about = [*([Message("system", (system,))] if system else []), Message("user", content)]
        session = self._new_session(about, kv_budget, kv_method)
        self._requests.now(session.read, time_limit)
        return session

    def load_session(
        self,
        path: str | os.PathLike[str],
        *,
        kv_budget: Budget | Literal["runtime"] = "runtime",
        kv_method: Method | ScoringMethod | str | None = None,
    ) -> Session:
        """A session that `Session.save` wrote: nothing is read again.

        One that was not cut keeps everything: what a cut would go by is not in the file, and kv_budget has to be None.

        Raises SessionError for a file that is damaged, altered, or of another model, mmproj or KV types.
        """
        saved = session_file.read(Path(path), self.engine)
        session = self._new_session(saved.about, kv_budget if saved.is_cut else None, kv_method)
        self._requests.now(lambda: session.restore(saved))
        return session

    def _new_session(
        self,
        about: list[Message],
        kv_budget: Budget | Literal["runtime"],
        kv_method: Method | ScoringMethod | str | None,
    ) -> Session:
        if self._requests.by_layer:
            raise SettingError("a session keeps the KV pairs of whole prompts, which prefill='by-layer' never has")
        budget = self.kv_budget if kv_budget == "runtime" else check_budget(kv_budget)
        method = self.kv_method if kv_method is None else method_of(kv_method)
        session = Session(self._requests, about, self._load, budget, method)
        self._sessions.add(session)
        return session

    @overload
    def create_chat_completion(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False] | None = False,
        **options: Unpack[chat_schema.Body],
    ) -> dict[str, Any]: ...

    @overload
    def create_chat_completion(
        self, /, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Unpack[chat_schema.Body]
    ) -> Iterator[dict[str, Any]]: ...

    @takes_options
    def create_chat_completion(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool | None = False,
        **options: Unpack[chat_schema.Body],
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answer a conversation in the OpenAI schema: a ``chat.completion``, or an iterator of its chunks.

        It takes what clients send, ``create_chat_completion(**body)``: beside the options of a request what
        `chat_schema.Body` has. `image_url` parts take paths, ``data:`` and ``file:`` URLs and PIL images, and http(s)
        URLs where the runtime allows them. Roles are system, developer (the same), user, assistant and tool. The last
        message cannot be the assistant's: answers are not continued. The answer and the last chunk have the figures
        under "figures" next to "usage".

        Raises what `generate` raises, PromptError for messages that are not in the schema, and SettingError for what
        is not supported.

        Example::

            reply = runtime.create_chat_completion(
                [{"role": "user", "content": "Name a colour."}],
                response_format={"type": "json_schema", "json_schema": {"schema": {"enum": ["red", "green"]}}},
            )
            reply["choices"][0]["message"]["content"]
        """
        asked = self._body({"messages": messages, "stream": stream, **options})
        answer = self._stream(Conversation(asked.messages), asked.options)
        model = str(self._path) if asked.model is None else asked.model
        if asked.stream:
            return chat_schema.chunks(answer, model, include_usage=asked.include_usage)
        for _ in answer:
            pass
        return chat_schema.completion(answer.completion, model)

    def _load(self, images: Sequence[ImageSource]) -> list[Image.Image]:
        if isinstance(images, str | bytes | os.PathLike | Image.Image) or not isinstance(images, Sequence):
            hint = f"images=[{str(images)!r:.200}]" if isinstance(images, str | os.PathLike) else "images=[picture]"
            raise PromptError(f"images has to be a list of pictures: pass {hint}")
        return [load_image(image, allow_http=self._allow_http, image_root=self._image_root) for image in images]

    def _asked(self, prompt: str, images: Sequence[ImageSource] = (), raw: bool = False) -> Conversation:
        """What `generate` is asked, its pictures loaded."""
        if not isinstance(prompt, str):
            hint = "; messages go to create_chat_completion" if isinstance(prompt, Sequence) else ""
            raise PromptError(f"the prompt has to be text, not {prompt!r:.200}{hint}")
        if not prompt.strip() and not images:
            raise PromptError("the prompt is empty")
        pictures = self._load(images)
        text = (prompt,) if prompt else ()
        return Conversation([Message("user", (*pictures, *text))], raw)

    def _body(self, body: Mapping[str, Any]) -> chat_schema.ChatRequest:
        """What a client asks in the OpenAI schema, its pictures loaded."""
        return chat_schema.read_body(body, allow_http=self._allow_http, image_root=self._image_root)

    def _stream(self, conversation: Conversation, options: Options) -> Stream:
        return self._requests.stream(conversation, self._request(options), self._read)

    def _request(self, options: Options) -> Request:
        settings: dict[str, Any] = {"kv_budget": self.kv_budget, **options}
        settings["kv_method"] = options.get("kv_method") or self.kv_method
        return Request.of(**settings)

    def _read(self, prompt: Prompt, beginning: Beginning) -> Begun:
        """Read the prompt, draw the first token, and cut the KV cache where it is over the budget."""
        started = time.perf_counter()
        request, n_batch = beginning.request, self.engine.batch(prompt)
        budget = budget_for(request.kv_budget, prompt.n_tokens, self.engine)
        if budget is None:
            context = self._kept.get(roomy(prompt.n_tokens + beginning.room), n_batch, beginning.n_pass)
            if self._prefilled is None or self._prefilled.context is not context:
                context.clear()
                self._prefilled = Prefilled(context, self.engine.projector)
            self._prefilled.read(prompt, self._requests.report)
            return begin(prompt, self._prefilled, beginning, started)

        def small(n_ctx: int) -> Context:
            context = self._kept.get(n_ctx, beginning.n_pass, beginning.n_pass)
            context.clear()
            self._prefilled = None
            return context

        if self._requests.by_layer:
            context = small(n_cells(self.engine.model, prompt.n_tokens, budget, beginning.room))
            return self._requests.begin_by_layer(prompt, budget, beginning, started, context)

        def hand_over(uncut: Prefilled, n_ctx: int) -> Prefilled:
            return uncut.handed_over(small(n_ctx))

        n_query = request.kv_method.n_query
        if self._keep_prompt:
            uncut = self._uncut.read(prompt, n_query, self._requests.report)
            return cut(begin(prompt, uncut, beginning, started), budget, beginning, hand_over)
        with closing(self.engine.context(prompt.n_tokens, n_batch)) as large:
            uncut = self.engine.read(prompt, large, n_query=n_query, report=self._requests.report)
            return cut(begin(prompt, uncut, beginning, started), budget, beginning, hand_over)


def _close_all(sessions: weakref.WeakSet[Session]) -> None:
    for session in list(sessions):
        session.close()
