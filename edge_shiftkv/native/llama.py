"""llama.h: a model's weights and vocabulary, and contexts that decode with them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from edge_shiftkv.errors import ModelError, PromptError, ShiftKVError
from edge_shiftkv.native import logs
from edge_shiftkv.native.gguf_check import check_model

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "iq4_nl": 20}
"""The types a KV cache can be stored in: llama.cpp's names and enum ggml_type."""

_ATTR_UNKNOWN, _ATTR_CONTROL = 1 << 0, 1 << 3  # enum llama_token_attr
ATTR_LSTRIP, ATTR_RSTRIP = 1 << 7, 1 << 8


class Model:
    """The weights and the vocabulary of one GGUF file, or its vocabulary only.

    Raises ModelError when the file is missing, is not a GGUF file or cannot be loaded.
    """

    def __init__(self, path: Path, n_gpu_layers: int, *, vocab_only: bool = False) -> None:
        check_model(path)
        params = llama.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.vocab_only = vocab_only
        self._model: int | None = None
        self._pieces: dict[int, bytes] = {}
        with logs.native_call() as errors:
            self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ModelError(
                f"{path}: not a language model this llama.cpp can load, or an incomplete file{logs.explain(errors)}"
            )
        self._vocab = llama.llama_model_get_vocab(self._model)
        if llama.llama_model_has_encoder(self._model) or not llama.llama_model_has_decoder(self._model):
            self.close()
            raise ModelError(f"{path}: models with a text encoder are not supported, only those that continue a text")

    def close(self) -> None:
        """Free the weights; contexts made from them have to be closed before."""
        model, self._model = self._model, None
        if model:
            llama.llama_model_free(model)

    @property
    def pointer(self) -> int:
        """The `llama_model *`."""
        if not self._model:
            raise ShiftKVError("the model is closed")
        return self._model

    @cached_property
    def n_ctx_train(self) -> int:
        """The context length the model was trained with, in tokens."""
        return int(llama.llama_model_n_ctx_train(self.pointer))

    @cached_property
    def has_kv_cache(self) -> bool:
        """Whether all that the model remembers are KV pairs of tokens; other memories do not grow with the prompt."""
        return not (llama.llama_model_is_recurrent(self.pointer) or llama.llama_model_is_hybrid(self.pointer))

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
            if attributes & (_ATTR_CONTROL | _ATTR_UNKNOWN) or token == self.bos:
                result[self._token_text(token)] = token, attributes
        return result

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
        with logs.native_call():
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


class Context:
    """A KV cache of `n_ctx` tokens and the buffers to decode up to `n_batch` tokens at once, for one sequence.

    n_outputs: the most tokens of one `decode` that logits are wanted for.

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
    ) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_batch
        params.n_outputs_max = min(n_outputs, n_batch)  # the default has room for the logits of n_batch tokens
        params.swa_full = False  # sliding-window layers store their window only
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = KV_TYPES[type_k]
        params.type_v = KV_TYPES[type_v]
        self._context: int | None = None
        with logs.native_call() as errors:
            self._context = llama.llama_init_from_model(model.pointer, params)
        if not self._context:
            raise ShiftKVError(
                f"no context of {n_ctx} tokens with a {type_k}/{type_v} KV cache for this model: lower n_ctx or "
                f"choose other KV types{logs.explain(errors)}"
            )
        if not llama.llama_get_memory(self._context):
            self.close()
            raise ShiftKVError("this model has no memory of tokens before: it is not one that continues a text")
        self.n_ctx = llama.llama_n_ctx(self._context)
        self.n_batch = llama.llama_n_batch(self._context)
        self._n_vocab = model.n_vocab

    def close(self) -> None:
        """Free the KV cache and the buffers."""
        context, self._context = self._context, None
        if context:
            llama.llama_free(context)

    @property
    def pointer(self) -> int:
        """The `llama_context *`."""
        if not self._context:
            raise ShiftKVError("the context is closed")
        return self._context

    def clear(self) -> None:
        """Empty the KV cache."""
        llama.llama_memory_clear(llama.llama_get_memory(self.pointer), False)

    def remove(self, position: int) -> None:
        """Forget the tokens from `position` on. Raises ShiftKVError for a memory that cannot."""
        if not llama.llama_memory_seq_rm(llama.llama_get_memory(self.pointer), 0, position, -1):
            raise ShiftKVError("this model's memory does not take tokens back")

    def decode(self, tokens: Sequence[int], position: int, *, logits: int = 1) -> None:
        """Decode up to `n_batch` tokens from `position` on, with logits after each of the last `logits` tokens.

        Raises ShiftKVError when llama.cpp fails; the cache is then to be cleared.
        """
        n = len(tokens)
        batch = llama.llama_batch(
            n_tokens=n,
            token=(llama.llama_token * n)(*tokens),
            pos=(llama.llama_pos * n)(*range(position, position + n)),
            logits=(ctypes.c_int8 * n)(*[0] * (n - logits), *[1] * logits),
        )
        with logs.native_call() as errors:
            status = llama.llama_decode(self.pointer, batch)
        if status:
            raise ShiftKVError(f"llama_decode failed with status {status}{logs.explain(errors)}")

    def logits(self, output: int = -1) -> npt.NDArray[np.float32]:
        """The logits of one of the last `decode`'s outputs, [n_vocab]; a view that the next `decode` overwrites.

        output: counts tokens with logits, from the last one backwards: -1, -2, ...
        """
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.pointer, output), (self._n_vocab,))


def usable_cpus() -> int:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
