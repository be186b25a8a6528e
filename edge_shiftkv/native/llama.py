"""llama.h: a model's weights and vocabulary, and contexts that decode with them."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from edge_shiftkv.errors import ModelError, PromptError, ShiftKVError
from edge_shiftkv.native import logs
from edge_shiftkv.native.calls import Handle, Interrupt, Loading, native_call
from edge_shiftkv.native.gguf_check import check_model

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20}
"""The types a KV cache can be stored in: llama.cpp's names and enum ggml_type."""

MAX_SEQUENCES = int(llama.llama_max_parallel_sequences())
"""The most sequences that a context can hold."""

_CELLS = 256  # a sequence has a multiple of it

# enum llama_token_attr
ATTR_UNKNOWN, _ATTR_CONTROL, ATTR_USER_DEFINED, ATTR_LSTRIP, ATTR_RSTRIP = 1 << 0, 1 << 3, 1 << 4, 1 << 7, 1 << 8

# Of the tokens that models' makers added, these are text: HTML's, and what is no name with brackets around it.
_HTML = re.compile(
    "</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|pre|p|br|hr|a|ul|ol|li"
    "|div|span)>"
)
_MARKER = re.compile(r"[<>\[\]{}].*[\w|].*[<>\[\]{}]", re.DOTALL)


def backend_without_device() -> str | None:
    """The GPU backend that the library was built for and sees no device of: everything runs on the CPU then."""
    if llama.llama_supports_gpu_offload():
        return None
    return next((name for name in ("CUDA", "Metal", "Vulkan") if _is_built_for(name)), None)


def _is_built_for(backend: str) -> bool:
    return any(Path(llama._base_path).glob(f"*ggml-{backend.lower()}.*"))


def small_kv_types(n_gpu_layers: int) -> tuple[str, str]:
    """The types of keys and values in which the same bytes hold the most pairs that answers are right with.

    Keys suffer more: a rounded one moves a whole weight. docs/howto/budgets.md has figures.
    """
    # Attention on Metal takes keys and values of one type only, and CUDA's is built for such, as a rule: others would
    # be computed on the CPU, or converted for every token.
    on_gpu = n_gpu_layers != 0 and llama.llama_supports_gpu_offload()
    alike = on_gpu and any(_is_built_for(backend) for backend in ("Metal", "CUDA"))
    return "q8_0", "q8_0" if alike else "q4_0"


class Model(Handle):
    """The weights and the vocabulary of one GGUF file, or its vocabulary only: a `llama_model *`.

    Contexts made from it have to be closed before it is.

    pack_weights: whether weights may be copied into the order that a kernel of the CPU's is fastest with.
    progress: is given the share of the file that is loaded, 0 to 1, now and then.

    Raises ModelError when the file is missing, is not a GGUF file or cannot be loaded.
    """

    def __init__(
        self,
        path: Path,
        n_gpu_layers: int,
        *,
        vocab_only: bool = False,
        pack_weights: bool = True,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        check_model(path)
        params = llama.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.vocab_only = vocab_only
        params.use_extra_bufts = pack_weights
        loading = Loading(progress)
        params.progress_callback = llama.llama_progress_callback(loading)
        with native_call() as errors:
            super().__init__(
                "model", llama.llama_model_load_from_file(str(path).encode(), params), llama.llama_model_free
            )
        loading.check()
        if not self._pointer:
            raise ModelError(
                f"{path}: not a language model this llama.cpp can load, or an incomplete file{logs.explain(errors)}"
            )
        self._take()
        if llama.llama_model_has_encoder(self.pointer) or not llama.llama_model_has_decoder(self.pointer):
            self.close()
            raise ModelError(f"{path}: models with a text encoder are not supported, only those that continue a text")

    @property
    def vocab(self) -> Any:
        """The native vocabulary, a `llama_vocab *`. Raises ClosedError after `close`."""
        _ = self.pointer
        return self._vocab

    @classmethod
    def borrowed(cls, pointer: Any) -> Model:
        """A model that somebody else loaded and frees, after the last use of this."""
        self = cls.__new__(cls)
        Handle.__init__(self, "model", pointer, _leave)
        self._take()
        return self

    def _take(self) -> None:
        self._pieces: dict[int, bytes] = {}
        self._vocab = llama.llama_model_get_vocab(self.pointer)

    @cached_property
    def n_ctx_train(self) -> int:
        """The context length the model was trained with, in tokens."""
        return int(llama.llama_model_n_ctx_train(self.pointer))

    @cached_property
    def n_layer(self) -> int:
        """How many layers it has."""
        return int(llama.llama_model_n_layer(self.pointer))

    @cached_property
    def has_kv_cache(self) -> bool:
        """Whether all that the model remembers are KV pairs of tokens; other memories do not grow with the prompt."""
        return not (llama.llama_model_is_recurrent(self.pointer) or llama.llama_model_is_hybrid(self.pointer))

    @cached_property
    def n_embd_head_v(self) -> int:
        """The size of a head's value, in layers without a sliding window."""
        written = self._metadata(f"{self.architecture}.attention.value_length")
        if written is not None:
            return int(written)
        return int(llama.llama_model_n_embd(self.pointer) // llama.llama_model_n_head(self.pointer))

    @cached_property
    def window(self) -> int:
        """The tokens that sliding-window layers see; 0 for a model without such layers."""
        return int(llama.llama_model_n_swa(self.pointer))

    @cached_property
    def architecture(self) -> str:
        """``general.architecture`` of the GGUF."""
        return self._metadata("general.architecture") or ""

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the GGUF's chat template, if it has one."""
        template = llama.llama_model_chat_template(self.pointer, None)
        return template.decode(errors="replace") if template else None

    @cached_property
    def bos(self) -> int | None:
        """The token that a prompt of this model starts with, if any."""
        return llama.llama_vocab_bos(self._vocab) if llama.llama_vocab_get_add_bos(self._vocab) else None

    @cached_property
    def bos_text(self) -> str:
        """The beginning-of-sequence token as chat templates write it."""
        return self._token_text(llama.llama_vocab_bos(self._vocab))

    @cached_property
    def eos_text(self) -> str:
        """The end-of-sequence token as chat templates write it."""
        return self._token_text(llama.llama_vocab_eos(self._vocab))

    @cached_property
    def eos(self) -> int | None:
        """The token that ends a text, if there is one."""
        return self._end(llama.llama_vocab_eos(self._vocab))

    @cached_property
    def eot(self) -> int | None:
        """The token that ends a turn of a conversation, if there is one."""
        return self._end(llama.llama_vocab_eot(self._vocab))

    @cached_property
    def control_tokens(self) -> dict[str, tuple[int, int]]:
        """Text -> (token, its attributes) of the tokens that only a template may write."""
        result = {}
        for token in range(self.n_vocab):
            attributes = llama.llama_vocab_get_attr(self._vocab, token)
            if (
                attributes & (_ATTR_CONTROL | ATTR_UNKNOWN)
                or token in (self.bos, self.eos, self.eot)
                or (attributes & ATTR_USER_DEFINED and self._marks_a_place(self._token_text(token)))
            ):
                result[self._token_text(token)] = token, attributes
        return result

    def _marks_a_place(self, name: str) -> bool:
        """Whether a token that the model's makers added stands for more than its text, as `<think>` does.

        It does when the chat template writes it, or when it looks so. Runs of white space, letters that a vocabulary
        lacked, words and HTML are text.
        """
        name = name.strip(" \t\r\n\v\f▁")
        if len(name) < 2 or name.isalnum():
            return False
        if name in (self.chat_template or ""):
            return True
        return bool(_MARKER.fullmatch(name)) and not _HTML.fullmatch(name)

    @cached_property
    def suppressed_tokens(self) -> list[int]:
        """The tokens that the GGUF says are never to be sampled."""
        n = ctypes.c_int32()
        tokens = llama.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(n))
        return tokens[: n.value] if tokens else []

    @property
    def n_vocab(self) -> int:
        """The number of tokens in the vocabulary."""
        return int(llama.llama_vocab_n_tokens(self._vocab))

    def tokenize(self, text: str) -> list[int]:
        """The tokens of plain text: control tokens' names in it stay text, and none are added."""
        data = text.encode(errors="replace")
        n_max = len(data) + 2  # a token is a byte or more, but for a leading space some tokenizers add
        tokens = (llama.llama_token * n_max)()
        with native_call():
            n = llama.llama_tokenize(self._vocab, data, len(data), tokens, n_max, False, False)
        if n < 0:
            raise PromptError(f"the text could not be tokenized ({len(text)} characters)")
        return tokens[:n]

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for control tokens. They may end inside a character."""
        known = self._pieces.get(token)
        if known is not None:
            return known
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return self._pieces.setdefault(token, buffer.raw[:n])
            size = -n

    @cached_property
    def sorted_pieces(self) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """What `piece` gives for all tokens, sorted, and the tokens in this order, [n_vocab]."""
        pieces = sorted((self.piece(token), token) for token in range(self.n_vocab))
        return [piece for piece, _ in pieces], np.array([token for _, token in pieces])

    def ends_generation(self, token: int) -> bool:
        """Whether a token says that the answer is complete."""
        return bool(llama.llama_vocab_is_eog(self._vocab, token))

    def _end(self, token: int) -> int | None:
        return token if token >= 0 and self.ends_generation(token) else None

    def _token_text(self, token: int) -> str:
        return llama.llama_vocab_get_text(self._vocab, token).decode(errors="replace") if token >= 0 else ""

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        n = llama.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if n >= 0 else None


class Context(Handle):
    """A KV cache of `n_ctx` tokens and the buffers to decode up to `n_batch` tokens at once: a `llama_context *`.

    type_k, type_v: how KV pairs are stored: names in `KV_TYPES`.
    n_outputs: the most tokens of one `decode` that logits are wanted for.
    n_seq: sequences that it holds, 1 to `MAX_SEQUENCES`, each with `n_ctx` cells of its own: what is in one changes
        nothing in another.
    interrupt: ends what it computes.

    Raises ShiftKVError when the memory for it cannot be had or the model does not work with these KV types.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        n_batch: int,
        *,
        type_k: str,
        type_v: str,
        n_threads: int,
        n_outputs: int = 1,
        n_seq: int = 1,
        interrupt: Interrupt | None = None,
    ) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = -(-n_ctx // _CELLS) * _CELLS * n_seq  # which llama.cpp divides
        params.n_seq_max = n_seq
        params.kv_unified = False  # in one cache for all, other sequences' cells would change how sums are rounded
        params.n_batch = params.n_ubatch = n_batch
        params.n_outputs_max = min(n_outputs, n_batch)  # the default has room for the logits of n_batch tokens
        params.swa_full = False  # sliding-window layers store their window only
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = KV_TYPES[type_k]
        params.type_v = KV_TYPES[type_v]
        with native_call() as errors:
            super().__init__("context", llama.llama_init_from_model(model.pointer, params), llama.llama_free)
        if not self._pointer:
            raise ShiftKVError(
                f"no context of {n_ctx if n_seq == 1 else f'{n_seq} x {n_ctx}'} tokens with a {type_k}/{type_v} KV "
                f"cache for this model: lower n_ctx or choose other KV types{logs.explain(errors)}"
            )
        self._take(model, params.type_k, params.type_v, n_outputs, interrupt)

    @classmethod
    def borrowed(cls, model: Model, pointer: Any, type_k: int, type_v: int, interrupt: Interrupt) -> Context:
        """A context that somebody else made and frees, after the last use of this and before that of `interrupt`.

        type_k, type_v: what it was made with, enum ggml_type.

        Raises ShiftKVError for one without a memory.
        """
        self = cls.__new__(cls)
        Handle.__init__(self, "context", pointer, _leave)
        self._take(model, type_k, type_v, 1, interrupt)
        return self

    def _take(self, model: Model, type_k: int, type_v: int, n_outputs: int, interrupt: Interrupt | None) -> None:
        if not llama.llama_get_memory(self.pointer):
            self.close()
            raise ShiftKVError("this model has no memory of tokens before: it is not one that continues a text")
        self.resized()
        self.n_batch = int(llama.llama_n_batch(self.pointer))
        self.interrupt = interrupt or Interrupt()
        self.interrupt.watch(self.pointer)
        self.n_outputs = min(n_outputs, self.n_batch)
        self.model = model
        self.ggml_type_k, self.ggml_type_v = type_k, type_v

    def resized(self) -> None:
        """Learn how many tokens the cache has room for now."""
        self.n_ctx = int(llama.llama_n_ctx_seq(self.pointer))

    def clear(self) -> None:
        """Empty the KV cache."""
        llama.llama_memory_clear(llama.llama_get_memory(self.pointer), False)

    def remove(self, position: int, sequence: int = 0) -> None:
        """Forget a sequence's tokens from `position` on. Raises ShiftKVError for a memory that cannot, but for 0."""
        if not llama.llama_memory_seq_rm(llama.llama_get_memory(self.pointer), sequence, position, -1):
            raise ShiftKVError("this model's memory does not take tokens back")

    def goes_back_to(self, position: int) -> bool:
        """Whether `remove(position)` leaves all that decoding from there on needs.

        A memory of states cannot go back, and sliding windows forget what tokens before the last ones saw.
        """
        if not self.model.has_kv_cache:
            return False
        first = int(llama.llama_memory_seq_pos_min(llama.llama_get_memory(self.pointer), 0))
        return not self.model.window or first <= max(0, position - self.model.window)

    def state(self) -> bytes:
        """What the KV cache holds, for `load_state`. Raises ShiftKVError."""
        size = llama.llama_state_seq_get_size(self.pointer, 0)
        data = (ctypes.c_uint8 * size)()
        with native_call() as errors:
            n = llama.llama_state_seq_get_data(self.pointer, data, size, 0)
        if not n:
            raise ShiftKVError(f"the KV cache could not be read{logs.explain(errors)}")
        return bytes(memoryview(data)[:n])

    def load_state(self, state: bytes) -> None:
        """Hold what another context of the same model and KV types did. Raises ShiftKVError for what is no state."""
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        with native_call() as errors:
            n = llama.llama_state_seq_set_data(self.pointer, data, len(state), 0)
        if n != len(state):
            self.clear()
            raise ShiftKVError(f"the KV cache could not be loaded{logs.explain(errors)}")

    def decode(self, tokens: Sequence[int], position: int, *, logits: int = 1) -> None:
        """Decode up to `n_batch` tokens from `position` on, with logits after each of the last `logits` tokens.

        Raises ShiftKVError when llama.cpp fails, and CancelledError; the cache is then to be cleared.
        """
        n = len(tokens)
        self._decode(
            llama.llama_batch(
                n_tokens=n,
                token=(llama.llama_token * n)(*tokens),
                pos=(llama.llama_pos * n)(*range(position, position + n)),
                logits=(ctypes.c_int8 * n)(*[0] * (n - logits), *[1] * logits),
            )
        )

    def decode_rows(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """Decode tokens of several sequences at once, up to `n_batch` and `n_outputs`, with logits after each.

        rows: token, position and sequence; `logits(i)` are then those after the i-th of them.

        Raises ShiftKVError when llama.cpp fails, and CancelledError; the cache is then to be cleared.
        """
        n = len(rows)
        tokens, positions, sequences = zip(*rows, strict=True)
        of_row = [(llama.llama_seq_id * 1)(sequence) for sequence in sequences]
        self._decode(
            llama.llama_batch(
                n_tokens=n,
                token=(llama.llama_token * n)(*tokens),
                pos=(llama.llama_pos * n)(*positions),
                n_seq_id=(ctypes.c_int32 * n)(*[1] * n),
                seq_id=(ctypes.POINTER(llama.llama_seq_id) * n)(
                    *(ctypes.cast(one, ctypes.POINTER(llama.llama_seq_id)) for one in of_row)
                ),
                logits=(ctypes.c_int8 * n)(*[1] * n),
            )
        )

    def _decode(self, batch: Any) -> None:
        self.interrupt.check()
        with native_call() as errors:
            status = llama.llama_decode(self.pointer, batch)
        if status:
            self.interrupt.check()
            raise ShiftKVError(f"llama_decode failed with status {status}{logs.explain(errors)}")

    def logits(self, output: int = -1) -> npt.NDArray[np.float32]:
        """The logits of one of the last `decode`'s outputs, [n_vocab]; a view that the next `decode` overwrites.

        output: counts tokens with logits, from the last one backwards: -1, -2, ...; or the rows of `decode_rows`, from
            the first one: 0, 1, ...
        """
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.pointer, output), (self.model.n_vocab,))


def _leave(_pointer: Any) -> None:
    """Frees nothing: it is somebody else's."""


def usable_cpus() -> int:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
