"""A prompt that has been read, and what can be done with its KV pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edge_shiftkv.errors import ShiftKVError
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context
from edge_shiftkv.native.mtmd import ImageChunk, Projector, TextChunk
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.selection.methods import Method
from edge_shiftkv.selection.results import ImageSpan, Selection

BATCH = 512
"""Tokens that a prompt is read in at a time."""

Floats = npt.NDArray[np.float32]


def prefill_batch(prompt: Prompt, projector: Projector | None) -> int:
    """The batch size a context needs for `prompt`: a picture whose tokens see each other has to fit in one batch."""
    whole = (
        chunk.n_tokens
        for chunk in prompt.chunks
        if isinstance(chunk, ImageChunk) and projector and projector.non_causal(chunk)
    )
    return max(BATCH, *whole, 0)


@runtime_checkable
class ScoringMethod(Protocol):
    """A selection method written in Python: it scores the keys itself.

    Example, which keeps what the last query attends to::

        class LastQuery:
            n_query = 1

            def scores(self, captured, budget):
                result = {}
                for layer in captured.layers:
                    keys = captured.keys(layer)  # [n_head_kv, n, d]
                    query = captured.queries(layer)[-1].reshape(len(keys), -1, keys.shape[-1])
                    result[layer] = np.einsum("hgd,hnd->hn", query, keys)
                return result

        runtime.kv_method = LastQuery()
    """

    @property
    def n_query(self) -> int:
        """The last queries and hidden states of the prompt, per layer, that it looks at: 1 to 512."""
        ...

    def scores(self, captured: Captured, budget: int) -> Mapping[int, npt.ArrayLike]:
        """Layer -> scores [n_head_kv, n_tokens], higher is better; the last token is kept whatever its score is."""
        ...


class Captured:
    """What a method written in Python sees of a prompt.

    layers: the model layers that are cut, ascending.
    n_tokens: tokens of the prompt.
    image_spans: where its visual tokens are.
    """

    def __init__(self, context: Context, n_tokens: int, image_spans: Sequence[ImageSpan]) -> None:
        self.layers = shiftkv.layers(context)
        self.n_tokens = n_tokens
        self.image_spans = tuple(image_spans)
        self._context = context

    def keys(self, layer: int) -> Floats:
        """The keys of all tokens as attention sees them, [n_head_kv, n_tokens, n_embd_head]. Raises ShiftKVError."""
        keys: Floats = shiftkv.keys(self._context, layer).transpose(1, 0, 2)
        return keys

    def queries(self, layer: int) -> Floats:
        """The last queries as attention sees them, [n_query or less, n_head, n_embd_head]. Raises ShiftKVError."""
        return shiftkv.queries(self._context, layer)

    def hidden(self, layer: int) -> Floats:
        """What the last queries were projected from, [n_query or less, n_embd]. Raises ShiftKVError."""
        return shiftkv.hidden(self._context, layer)


class Prefilled:
    """A prompt, and perhaps more tokens, in a context that was empty and has the logits after the last one.

    The context is the caller's. Ctrl-C and `Interrupt.cancel` end what these methods do.

    context: holds the KV pairs.
    n_tokens: tokens that were read.
    position: the position after them; with M-RoPE less than n_tokens.
    image_spans: where visual tokens are.
    image_encode_s: seconds the vision encoder took.
    """

    def __init__(self, context: Context, projector: Projector | None = None, *, n_query: int = 0) -> None:
        """Begin to read.

        n_query: queries of each layer to capture, 1 to 512, which `select` needs; 0 captures nothing.

        Raises ShiftKVError for a model whose KV pairs cannot be selected.
        """
        self.context = context
        self.n_tokens = 0
        self.position = 0
        self.image_spans: list[ImageSpan] = []
        self.image_encode_s = 0.0
        self._projector = projector
        if n_query:
            shiftkv.capture(context, n_query)

    def read(self, prompt: Prompt, report: Callable[[int, int], None] | None = None) -> None:
        """Read a whole prompt, the first thing to be read.

        report: is told how many tokens of how many are read, after each batch and each picture.

        Raises ImageError, ShiftKVError and CancelledError; the context is then to be cleared.
        """
        self.image_spans = prompt.image_spans
        for i, chunk in enumerate(prompt.chunks):
            if isinstance(chunk, TextChunk):
                for _ in self._read_batches(chunk.tokens, logits=i + 1 == len(prompt.chunks)):
                    if report:
                        report(self.n_tokens, prompt.n_tokens)
            else:
                self._read_image(chunk)
                if report:
                    report(self.n_tokens, prompt.n_tokens)

    def read_tokens(self, tokens: Sequence[int]) -> None:
        """Read tokens of text, with logits after the last one. Raises ShiftKVError and CancelledError."""
        for _ in self._read_batches(tokens, logits=True):
            pass

    def _read_batches(self, tokens: Sequence[int], *, logits: bool) -> Iterator[None]:
        n, n_batch = len(tokens), self.context.n_batch
        for start in range(0, n, n_batch):
            stop = min(start + n_batch, n)
            self.context.decode(tokens[start:stop], self.position, logits=logits and stop == n)
            self.position += stop - start
            self.n_tokens += stop - start
            yield

    def _read_image(self, chunk: ImageChunk) -> None:
        assert self._projector
        started = time.perf_counter()
        self._projector.encode(chunk)
        self.image_encode_s += time.perf_counter() - started
        self.position = self._projector.decode(self.context, chunk, self.position)
        self.n_tokens += chunk.n_tokens

    def select(self, method: Method | ScoringMethod, budget: int, *, n_prompt: int = 0) -> Selection:
        """Choose `budget` KV pairs per layer and KV head to keep of all that was read; the cache stays as it is.

        n_prompt: rank only the first so many tokens; 0 ranks all. Then only methods that look at no queries can.

        Raises ShiftKVError, and CancelledError.
        """
        n_prompt = n_prompt or self.n_tokens
        try:
            if isinstance(method, ScoringMethod):
                params = shiftkv.default_params(shiftkv.Method.RANDOM)
                params.budget, params.n_prompt = budget, n_prompt
                captured = Captured(self.context, n_prompt, self.image_spans)
                shiftkv.select_scores(self.context, params, method.scores(captured, budget))
            else:
                params = method.params(budget, self.context.model.architecture)
                params.n_prompt = n_prompt
                shiftkv.select(self.context, params)
            kept = shiftkv.kept(self.context)
        except ShiftKVError:
            self.context.interrupt.check()  # was it ended, or did it fail?
            raise
        return Selection(kept, n_prompt, self.image_spans)

    def hand_over(self, context: Context) -> int:
        """Copy the pairs of the last `select` into another context, which holds nothing else then.

        Returns the position to go on at there. Raises ShiftKVError, and CancelledError.
        """
        try:
            after = shiftkv.compact(self.context, context)
        except ShiftKVError:
            context.interrupt.check()
            raise
        return self.position if shiftkv.info(self.context).n_prompt == self.n_tokens else after
