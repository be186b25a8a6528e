"""A prompt that has been read, and what can be done with its KV pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edge_shiftkv.errors import PromptError, ShiftKVError
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context
from edge_shiftkv.native.mtmd import ImageChunk, Projector, TextChunk
from edge_shiftkv.prompts.prompt import Continued, HeldChunk, Item, Prompt
from edge_shiftkv.selection.methods import Method
from edge_shiftkv.selection.results import ImageSpan, Selection

BATCH = 512
"""Tokens that a prompt is read in at a time."""

SPARE = 128
"""Tokens of a question, after which the queries before it are still there for the next one."""

Floats = npt.NDArray[np.float32]

Embedded = dict[Item, Floats]
"""Pictures' embeddings by their item in the prompt."""


def prefill_batch(prompt: Prompt | Continued, projector: Projector | None) -> int:
    """The batch size a context is to have for `prompt`."""
    return max(BATCH, least_batch(prompt, projector))


def least_batch(prompt: Prompt | Continued, projector: Projector | None) -> int:
    """The batch size a context needs for `prompt`: a picture whose tokens see each other has to fit in one batch."""
    whole = (
        chunk.n_tokens
        for chunk in prompt.chunks
        if isinstance(chunk, ImageChunk) and projector and projector.non_causal(chunk)
    )
    return max(whole, default=1)


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

    layers: the model layers that are cut, ascending; one at a time where a prompt is read layer by layer.
    n_tokens: tokens of the prompt.
    image_spans: where its visual tokens are.
    """

    def __init__(
        self,
        context: Context,
        n_tokens: int,
        image_spans: Sequence[ImageSpan],
        n_query: int,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.layers = shiftkv.layers(context) if layers is None else list(layers)
        self.n_tokens = n_tokens
        self.image_spans = tuple(image_spans)
        self._context = context
        self._n_query = n_query  # others may want more

    def keys(self, layer: int) -> Floats:
        """The keys of all tokens as attention sees them, [n_head_kv, n_tokens, n_embd_head]. Raises ShiftKVError."""
        keys: Floats = shiftkv.keys(self._context, layer).transpose(1, 0, 2)
        return keys

    def queries(self, layer: int) -> Floats:
        """The last queries as attention sees them, [n_query or less, n_head, n_embd_head]. Raises ShiftKVError."""
        return shiftkv.queries(self._context, layer)[-self._n_query :]

    def hidden(self, layer: int) -> Floats:
        """What the last queries were projected from, [n_query or less, n_embd]. Raises ShiftKVError."""
        return shiftkv.hidden(self._context, layer)[-self._n_query :]


@dataclass(frozen=True)
class Held:
    """What a context holds.

    items: as in `Prompt`.
    after: the number of tokens and the position after each item.
    image_spans: where visual tokens are.
    n_dropped: tokens that were cut.
    """

    items: tuple[Item, ...]
    after: tuple[tuple[int, int], ...]
    image_spans: tuple[ImageSpan, ...]
    n_dropped: int


class Prefilled:
    """What was read into a context, which has the logits after the last token.

    A prompt that begins like the one before goes on from there: only what differs is read. The context is the
    caller's. Ctrl-C and `Interrupt.cancel` end what these methods do; the context then holds what was read before.

    context: holds the KV pairs.
    n_query: queries of each layer that a selection may look at.
    n_tokens: tokens that were read.
    n_read: those of them that the last `read` had to read.
    n_dropped: those of them that were cut.
    position: the position after them; with M-RoPE less than n_tokens.
    image_spans: where visual tokens are.
    image_encode_s: seconds the vision encoder took in the last `read`.
    """

    def __init__(
        self,
        context: Context,
        projector: Projector | None = None,
        *,
        n_query: int = 0,
        n_spare: int = 0,
        embedded: Embedded | None = None,
    ) -> None:
        """Begin in an empty context.

        n_query: queries of each layer to capture, 1 to 512, which `select` needs; 0 captures nothing.
        n_spare: others to capture, so that those before may still be there after one went back so many tokens.
        embedded: pictures that need not be encoded; those that are, are added.

        Raises ShiftKVError for a model whose KV pairs cannot be selected.
        """
        self.context = context
        self.n_tokens = self.n_read = self.n_dropped = self.position = 0
        self.image_spans: list[ImageSpan] = []
        self.image_encode_s = 0.0
        self._projector = projector
        self._embedded = embedded
        self.n_query = n_query
        self._items: list[Item] = []
        self._after: list[tuple[int, int]] = []  # tokens and position after each item
        self._batches: dict[int, int] = {}  # first item -> the one after the last, of what was decoded at once
        self._n_fixed = 0  # items that cannot be gone back behind
        self._state: bytes | None = None  # after them, where a window would have forgotten it
        self._n_captured = min(n_query + n_spare, shiftkv.MAX_QUERY)
        self._first_captured = 0  # tokens before it have lost their queries
        if n_query:
            shiftkv.capture(context, self._n_captured)

    def read(
        self,
        prompt: Prompt | Continued,
        report: Callable[[int, int], None] | None = None,
        *,
        whole_batches: bool = True,
        n_items: int | None = None,
        most: int | None = None,
    ) -> None:
        """Hold just this prompt.

        report: is told how many tokens of how many are read, after each batch and each picture.
        whole_batches: take over only what was read in the batches that it would be read in now, so that all is as if
            nothing had been there: llama.cpp's arithmetic changes with the tokens in a batch. Else every common token.
        n_items: read only the first so many of its items, and have no logits then.
        most: take over so many items at most.

        Raises ImageError, ShiftKVError, CancelledError; PromptError where what was cut is not how this one begins.
        """
        n_items = len(prompt.items) if n_items is None else n_items
        n = self._go_back(self.n_reused(prompt, whole_batches=whole_batches, n_items=n_items, most=most))
        self.image_spans = prompt.image_spans
        self.image_encode_s = 0.0
        start = self.n_tokens
        first = 0
        for chunk in prompt.chunks:
            stop = min(first + _n_items(chunk), n_items)
            begin, first = max(first, n), first + _n_items(chunk)
            if begin >= stop:
                continue
            if isinstance(chunk, TextChunk):
                tokens = chunk.tokens[begin - first : stop - first or None]
                batches = self._read_batches(tokens, logits=stop == len(prompt.items))
            elif isinstance(chunk, ImageChunk):
                batches = self._read_image(chunk, prompt.items[begin])
            else:
                raise PromptError("what was read before a picture is gone and cannot be read again")
            for _ in batches:
                if report:
                    report(self.n_tokens, prompt.n_tokens)
        self.n_read = self.n_tokens - start

    def n_reused(
        self,
        prompt: Prompt | Continued,
        *,
        whole_batches: bool = False,
        n_items: int | None = None,
        most: int | None = None,
    ) -> int:
        """How many of a prompt's items `read` would take over."""
        n = self._n_same_batches(prompt) if whole_batches else self.n_common(prompt)
        n = min(n, len(prompt.items) if n_items is None else n_items, n if most is None else most)
        n = self._with_window(n, self._after[n - 1][0] if n and n == n_items else prompt.n_tokens)
        if whole_batches:
            n = max((stop for stop in self._batches.values() if stop <= n), default=0)
        return n if self._goes_back_to(n) else self._n_fixed

    def n_common(self, prompt: Prompt | Continued) -> int:
        """How many of a prompt's items are held and need not be read; its last token is read in any case."""
        n = 0
        for held, item in zip(self._items, prompt.items[:-1], strict=False):
            if held != item:
                break
            n += 1
        return n

    def _n_same_batches(self, prompt: Prompt | Continued) -> int:
        """The items of a prompt that are held and were read in batches as they would be now."""
        n, n_common, start = 0, self.n_common(prompt), 0
        for chunk in prompt.chunks:
            size = _n_items(chunk)
            for first in range(start, start + size, self.context.n_batch):
                stop = min(first + self.context.n_batch, start + size)
                if stop > n_common or self._batches.get(first) != stop:
                    return n
                n = stop
            start += size
        return n

    def can_read(self, prompt: Prompt | Continued) -> bool:
        """Whether the prompt begins like what cannot be read again, as it was cut."""
        return self.n_common(prompt) >= self._n_fixed

    def read_tokens(self, tokens: Sequence[int]) -> None:
        """Read tokens of text after what is held, with logits after the last one.

        Raises ShiftKVError, and CancelledError.
        """
        for _ in self._read_batches(tokens, logits=True):
            pass

    def wrote(self, tokens: Sequence[int]) -> None:
        """Note tokens that were decoded in the context after what is held."""
        for token in tokens:
            self._hold(token, 1, self.position + 1)

    def _hold(self, item: Item, n_tokens: int, position: int) -> None:
        self.n_tokens += n_tokens
        self.position = position
        self._first_captured = max(self._first_captured, self.n_tokens - self._n_captured)
        self._items.append(item)
        self._after.append((self.n_tokens, self.position))

    def _go_back(self, n: int) -> int:
        """Hold the first n items, or less of them if there is no other way; return how many."""
        if n < self._n_fixed:
            raise PromptError("the prompt does not begin like the one that was cut, which cannot be read again")
        if n == 0:
            self._first_captured = 0
            self.context.clear()
        elif n == self._n_fixed and self._state is not None:
            self.context.load_state(self._state)
        else:
            self.context.remove(self._after[n - 1][1])
        del self._items[n:], self._after[n:]
        self._batches = {first: stop for first, stop in self._batches.items() if stop <= n}
        self.n_tokens, self.position = self._after[-1] if n else (0, 0)
        return n

    def _goes_back_to(self, n: int) -> bool:
        return n in (0, len(self._items)) or self.context.goes_back_to(self._after[n - 1][1])

    def _with_window(self, n: int, n_tokens: int) -> int:
        """Less than n items, where queries that a selection from `n_tokens` tokens looks at are no longer there."""
        first = n_tokens - self.n_query
        if not self.n_query or first >= self._first_captured:
            return n
        while n and self._after[n - 1][0] > max(0, first):
            n -= 1
        return n if n >= self._n_fixed else self._n_fixed

    def _read_image(self, chunk: ImageChunk, item: Item) -> Iterator[None]:
        assert self._projector
        started = time.perf_counter()
        embeddings = None if self._embedded is None else self._embedded.get(item)
        if embeddings is None:
            embeddings = self._projector.embed(chunk, str(item))
            if self._embedded is not None:
                self._embedded[item] = embeddings = embeddings.copy()
        self.image_encode_s += time.perf_counter() - started
        position = self._projector.decode(self.context, chunk, embeddings, self.position)
        self._batches[len(self._items)] = len(self._items) + 1
        self._hold(item, chunk.n_tokens, position)
        yield

    def _read_batches(self, tokens: Sequence[int], *, logits: bool) -> Iterator[None]:
        n, n_batch = len(tokens), self.context.n_batch
        for start in range(0, n, n_batch):
            batch = tokens[start : start + n_batch]
            self.context.decode(batch, self.position, logits=logits and start + n_batch >= n)
            first = len(self._items)
            self.wrote(batch)
            self._batches[first] = len(self._items)
            yield

    def select(self, method: Method | ScoringMethod, budget: int, *, n_prompt: int = 0) -> Selection:
        """Choose `budget` KV pairs per layer and KV head to keep of all that was read; the cache stays as it is.

        n_prompt: rank only the first so many tokens; 0 ranks all. Then only methods that look at no queries can.

        Where something was cut before, what was left of it is ranked again, each KV pair as a token of the prompt. Of
        the pictures, those read since are in the selection, counted from 0.

        Raises ShiftKVError, and CancelledError.
        """
        n_prompt = n_prompt or self.n_tokens - self.n_dropped
        image_spans = self._spans_of_pairs()
        try:
            if isinstance(method, ScoringMethod):
                params = shiftkv.default_params(shiftkv.Method.RANDOM)
                params.budget, params.n_prompt = budget, n_prompt
                captured = Captured(self.context, n_prompt, image_spans, method.n_query)
                shiftkv.select_scores(self.context, params, method.scores(captured, budget))
            else:
                params = method.params(budget, self.context.model.architecture)
                params.n_prompt = n_prompt
                shiftkv.select(self.context, params)
            kept = shiftkv.kept(self.context)
        except ShiftKVError:
            self.context.interrupt.check()  # was it ended, or did it fail?
            raise
        return Selection(kept, n_prompt, image_spans)

    def _spans_of_pairs(self) -> list[ImageSpan]:
        """Where in the cache pictures are, as far as they were not cut."""
        if not self.n_dropped:
            return list(self.image_spans)
        n_cut, _ = self._after[self._n_fixed - 1]
        spans = [span for span in self.image_spans if span.start >= n_cut]
        return [
            replace(
                span,
                image=span.image - spans[0].image,
                start=span.start - self.n_dropped,
                stop=span.stop - self.n_dropped,
            )
            for span in spans
        ]

    def select_all(self) -> None:
        """Choose all that was read, which has to be captured. Raises ShiftKVError, and CancelledError."""
        params = shiftkv.default_params(shiftkv.Method.STREAMINGLLM)
        params.budget = max(2, self.n_tokens - self.n_dropped)
        try:
            shiftkv.select(self.context, params)
        except ShiftKVError:
            self.context.interrupt.check()
            raise

    def hand_over(self, context: Context, sequence: int = 0) -> int:
        """Copy the pairs of the last `select` into a sequence of another context, which holds nothing else then.

        Returns the position to go on at there. Raises ShiftKVError, and CancelledError.
        """
        try:
            after = shiftkv.compact(self.context, context, sequence)
        except ShiftKVError:
            context.interrupt.check()
            raise
        whole = shiftkv.info(self.context).n_prompt == self.n_tokens - self.n_dropped
        return self.position if whole else after

    def handed_over(self, context: Context, *, n_query: int = 0) -> Prefilled:
        """`hand_over`, and what is held there: the same, but that it cannot go back behind what was cut.

        Raises ShiftKVError, and CancelledError.
        """
        self.hand_over(context)
        n_kept = shiftkv.info(self.context).n_kept
        other = Prefilled.of(context, self._projector, self.held(), n_query=n_query)
        other.n_dropped += self.n_tokens - self.n_dropped - n_kept
        return other

    def moved(self, context: Context, *, n_query: int = 0) -> Prefilled:
        """The same in another context of the same model and KV types.

        n_query: queries to capture from now on.

        Raises ShiftKVError.
        """
        context.load_state(self.context.state())
        other = Prefilled.of(context, self._projector, self.held(), n_query=n_query)
        other._n_fixed, other._state = self._n_fixed, self._state
        return other

    @property
    def n_items(self) -> int:
        """How many of a prompt's items are held."""
        return len(self._items)

    def rewind(self) -> None:
        """Go back to what cannot be read again. Raises ShiftKVError."""
        self._go_back(self._n_fixed)

    def held(self) -> Held:
        """What is held, without its KV pairs."""
        return Held(tuple(self._items), tuple(self._after), tuple(self.image_spans), self.n_dropped)

    @classmethod
    def of(cls, context: Context, projector: Projector | None, held: Held, *, n_query: int = 0) -> Prefilled:
        """What a context holds already; it cannot go back behind that.

        n_query: queries to capture from now on. Raises ShiftKVError.
        """
        result = cls(context, projector, n_query=n_query)
        result._items, result._after = list(held.items), list(held.after)
        result.n_tokens, result.position = held.after[-1]
        result.image_spans, result.n_dropped = list(held.image_spans), held.n_dropped
        result._n_fixed = len(held.items)
        if context.model.window:
            result._state = context.state()
        return result


def _n_items(chunk: TextChunk | ImageChunk | HeldChunk) -> int:
    if isinstance(chunk, TextChunk):
        return len(chunk.tokens)
    return 1 if isinstance(chunk, ImageChunk) else chunk.n_items
