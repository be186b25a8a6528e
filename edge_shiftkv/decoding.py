"""From a prompt to the next token, and from token to token."""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_shiftkv.native.llama import Context
from edge_shiftkv.native.mtmd import ImageChunk, Projector, TextChunk
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.sampling import Sampler

_BATCH = 512


def prefill_batch(prompt: Prompt, projector: Projector | None) -> int:
    """The batch size a context needs for `prompt`: a picture whose tokens see each other has to fit in one batch."""
    whole = (
        chunk.n_tokens
        for chunk in prompt.chunks
        if isinstance(chunk, ImageChunk) and projector and projector.non_causal(chunk)
    )
    return max(_BATCH, *whole, 0)


class KeptContext:
    """A context that is kept from request to request, as long as it fits the next one.

    make: makes a context for a number of tokens and a batch size.
    """

    def __init__(self, make: Callable[[int, int], Context]) -> None:
        self._make = make
        self._context: Context | None = None

    def get(self, n_ctx: int, n_batch: int) -> Context:
        """Return an empty context of at least `n_ctx` tokens. Raises ShiftKVError."""
        context = self._context
        # One with larger batches would do, but its buffers are many times those of a context that only decodes.
        if context is None or context.n_ctx < n_ctx or context.n_batch != min(n_batch, context.n_ctx):
            self.close()
            context = self._context = self._make(n_ctx, n_batch)
        context.clear()
        return context

    def close(self) -> None:
        """Free the context; `get` makes a new one."""
        context, self._context = self._context, None
        if context:
            context.close()


class Prefill:
    """Decodes a whole prompt in an empty context, which then has the logits after its last token.

    position: the position after the prompt; with M-RoPE less than its number of tokens.
    image_encode_s: seconds the vision encoder took.

    Raises ImageError and ShiftKVError.
    """

    def __init__(self, context: Context, prompt: Prompt, projector: Projector | None) -> None:
        self.position = 0
        self.image_encode_s = 0.0
        for i, chunk in enumerate(prompt.chunks):
            if isinstance(chunk, TextChunk):
                self._text(context, chunk, is_last=i + 1 == len(prompt.chunks))
            else:
                assert projector
                self._image(context, chunk, projector)

    def _text(self, context: Context, chunk: TextChunk, *, is_last: bool) -> None:
        n = len(chunk.tokens)
        for start in range(0, n, context.n_batch):
            stop = min(start + context.n_batch, n)
            context.decode(chunk.tokens[start:stop], self.position, logits=is_last and stop == n)
            self.position += stop - start

    def _image(self, context: Context, chunk: ImageChunk, projector: Projector) -> None:
        started = time.perf_counter()
        projector.encode(chunk)
        self.image_encode_s += time.perf_counter() - started
        self.position = projector.decode(context, chunk, self.position)


class Decoder:
    """Writes on from `position` in a context.

    steps: calls of `advance`.
    seconds: time they took.
    """

    def __init__(self, context: Context, sampler: Sampler, position: int) -> None:
        self._context = context
        self._sampler = sampler
        self._position = position
        self.steps = 0
        self.seconds = 0.0

    def advance(self, token: int) -> int:
        """Decode the token drawn last and draw the next one. Raises ShiftKVError."""
        started = time.perf_counter()
        self._context.decode([token], self._position)
        following = self._sampler.sample(self._context)
        self._position += 1
        self.steps += 1
        self.seconds += time.perf_counter() - started
        return following
