"""A model, loaded, and what answers are made with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path

from edge_shiftkv.budget import PairBytes
from edge_shiftkv.checks import check_number
from edge_shiftkv.closing import Closing
from edge_shiftkv.engine.prefilled import BATCH, SPARE, Prefilled, prefill_batch
from edge_shiftkv.errors import SettingError, ShiftKVError
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.calls import Interrupt
from edge_shiftkv.native.llama import (
    KV_TYPES,
    Context,
    Model,
    backend_without_device,
    small_kv_types,
    usable_cpus,
)
from edge_shiftkv.native.mtmd import Projector
from edge_shiftkv.prompts.chat import ChatTemplate
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.prompts.prompt import Continued, Prompt

_MIB = 1 << 20

Progress = Callable[[str, int, int], None]
"""Is told what goes on, how much of it is done, and of how much."""


class Engine(Closing):
    """A model with its vision encoder and chat template, and the contexts that it reads and writes in.

    A context manager; `close` frees the files. Contexts made here have to be closed before.

    model, mmproj, n_gpu_layers, pack_weights, n_threads, image_cache: as in `Runtime`.
    type_k, type_v: how KV pairs are stored; None is f16, or with `small_kv` the small types that `Runtime` takes for
        budgets in bytes.
    progress: is told how many bytes of how many are loaded of "model" and "mmproj", now and then.

    Raises ModelError when a file is missing, is not what it should be, or two do not fit; SettingError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        mmproj: str | os.PathLike[str] | None = None,
        *,
        type_k: str | None = None,
        type_v: str | None = None,
        small_kv: bool = False,
        n_gpu_layers: int = -1,
        pack_weights: bool = True,
        n_threads: int | None = None,
        image_cache: int = 0,
        progress: Progress | None = None,
    ) -> None:
        for name in (type_k, type_v):
            if name is not None and name not in KV_TYPES:
                raise SettingError(f"KV type {name!r} is not known: use one of {', '.join(KV_TYPES)}")
        if n_threads is None or n_threads == -1:
            n_threads = usable_cpus()
        check_number("n_threads", n_threads, 1, whole=True, note="None or -1 takes all")
        check_number("image_cache", image_cache, 0, note="MiB; 0 keeps no embeddings")
        self.path, self.mmproj_path = Path(model), None if mmproj is None else Path(mmproj)
        self.type_k, self.type_v = type_k or "f16", type_v or "f16"
        self.n_gpu_layers = n_gpu_layers
        self.pack_weights = pack_weights
        self.n_threads = n_threads
        self.interrupt = Interrupt()

        if n_gpu_layers and (backend := backend_without_device()):
            warnings.warn(
                f"llama.cpp is built for {backend} here and finds no such device (is its driver installed?): "
                "the model runs on the CPU",
                RuntimeWarning,
                stacklevel=2,
            )
        with ExitStack() as resources:
            self.model = Model(
                *(Path(model), n_gpu_layers),
                pack_weights=pack_weights,
                progress=loading("model", model, progress),
            )
            resources.callback(self.model.close)
            self.projector: Projector | None = None
            if mmproj is not None:
                self.projector = Projector(
                    *(Path(mmproj), self.model),
                    use_gpu=n_gpu_layers != 0,
                    n_threads=self.n_threads,
                    cache_bytes=image_cache * _MIB,
                    interrupt=self.interrupt,
                    progress=loading("mmproj", mmproj, progress),
                )
                resources.callback(self.projector.close)
            self.template = ChatTemplate(self.model)
            if small_kv and None in (type_k, type_v):
                self._choose_small_types(type_k, type_v)
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self._resources.close()

    def prompt(self, conversation: Conversation | Sequence[Message]) -> Prompt:
        """The tokens that a conversation is for this model. Raises PromptError when its template refuses it."""
        if not isinstance(conversation, Conversation):
            conversation = Conversation(conversation)
        return Prompt(conversation.parts(self.template), self.model, self.projector)

    def context(self, n_ctx: int, n_batch: int = BATCH, *, n_outputs: int = 1, n_seq: int = 1) -> Context:
        """An empty context of `n_ctx` tokens, to be closed by the caller.

        n_batch: tokens decoded at once, at most.
        n_outputs: tokens of one `decode` that logits are wanted for, at most.
        n_seq: sequences, each with `n_ctx` tokens.

        Raises ShiftKVError when the memory for it cannot be had.
        """
        return Context(
            *(self.model, n_ctx, n_batch),
            type_k=self.type_k,
            type_v=self.type_v,
            n_threads=self.n_threads,
            n_outputs=n_outputs,
            n_seq=n_seq,
            interrupt=self.interrupt,
        )

    def _choose_small_types(self, type_k: str | None, type_v: str | None) -> None:
        """Store what is left to choose in small types, if llama.cpp makes contexts of this model with them."""
        chosen = self.type_k, self.type_v
        small_k, small_v = small_kv_types(self.n_gpu_layers)
        self.type_k, self.type_v = type_k or small_k, type_v or small_v
        try:
            self.context(1, 2).close()
        except ShiftKVError as error:
            self.type_k, self.type_v = chosen
            warnings.warn(
                f"keys are stored in {chosen[0]}, values in {chosen[1]}, of which a budget in bytes has fewer: {error}",
                RuntimeWarning,
                stacklevel=4,
            )

    @cached_property
    def pair_bytes(self) -> PairBytes:
        """What a token's KV pairs take in the layers that are cut.

        Raises ShiftKVError for a model whose KV pairs cannot be cut, and without the memory to find out.
        """
        with closing(self.context(1, 2)) as context:
            shiftkv.capture(context)
            return shiftkv.pair_bytes(context)

    @cached_property
    def can_cut(self) -> bool:
        """Whether KV pairs of this model can be selected and handed over. Raises ShiftKVError without the memory."""
        with closing(self.context(1, 2)) as context:
            try:
                shiftkv.capture(context)
            except ShiftKVError:
                return False
        return True

    def batch(self, prompt: Prompt | Continued) -> int:
        """The batch size of a context that a prompt is to be read in."""
        return prefill_batch(prompt, self.projector)

    def read(
        self,
        prompt: Prompt,
        context: Context,
        *,
        n_query: int = 0,
        report: Callable[[int, int], None] | None = None,
    ) -> Prefilled:
        """Read a prompt into an empty context: see `Prefilled` and its `read`."""
        prefilled = Prefilled(context, self.projector, n_query=n_query)
        prefilled.read(prompt, report)
        return prefilled


def loading(what: str, path: str | os.PathLike[str], progress: Progress | None) -> Callable[[float], None] | None:
    """Tells `progress` of a file that is loaded, given the share of it that is."""
    if not progress:
        return None
    return lambda share: progress(what, int(share * Path(path).stat().st_size), Path(path).stat().st_size)


class KeptContext:
    """An engine's context that is kept from request to request, as long as it fits the next one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._context: Context | None = None

    def get(self, n_ctx: int, n_batch: int, n_outputs: int = 1) -> Context:
        """Return a context of at least `n_ctx` tokens, which holds what it held; see `Engine.context`.

        Raises ShiftKVError.
        """
        context = self._context
        if context is None or not self._fits(context, n_ctx, n_batch, n_outputs):
            self.close()
            context = self._context = self._engine.context(n_ctx, n_batch, n_outputs=n_outputs)
        return context

    def close(self) -> None:
        """Free the context; `get` makes a new one."""
        context, self._context = self._context, None
        if context:
            context.close()

    def _fits(self, context: Context, n_ctx: int, n_batch: int, n_outputs: int) -> bool:
        # One with larger batches would do, but its buffers are many times those of a context that only decodes.
        same_batch = context.n_batch == min(n_batch, context.n_ctx)
        return context.n_ctx >= n_ctx and same_batch and context.n_outputs == min(n_outputs, context.n_batch)


class KeptPrompt:
    """Reads one prompt after the other in a context that stays: only what differs from the one before is read.

    What it holds is as if each prompt had been read anew: see `Prefilled.read`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._context = KeptContext(engine)
        self._prefilled: Prefilled | None = None

    def read(self, prompt: Prompt, n_query: int, report: Callable[[int, int], None] | None = None) -> Prefilled:
        """Hold a prompt, with the last queries that a selection needs. Raises what `Prefilled` and its `read` do."""
        context = self._context.get(roomy(prompt.n_tokens), self._engine.batch(prompt))
        prefilled = self._prefilled
        if prefilled is None or prefilled.context is not context or prefilled.n_query < n_query:
            self._prefilled = None
            context.clear()
            n_spare = SPARE if n_query else 0
            prefilled = Prefilled(context, self._engine.projector, n_query=n_query, n_spare=n_spare)
            self._prefilled = prefilled
        prefilled.read(prompt, report)
        return prefilled

    def close(self) -> None:
        """Free the context; `read` makes a new one."""
        self._prefilled = None
        self._context.close()


def roomy(n_ctx: int) -> int:
    """A little more, so that a conversation can grow: what a context held is read again when it gets too small."""
    step = max(256, 1 << max(0, n_ctx.bit_length() - 3))
    return -(-n_ctx // step) * step
