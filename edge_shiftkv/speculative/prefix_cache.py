"""What a draft model has read."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from edge_shiftkv.engine.prefilled import Prefilled
from edge_shiftkv.native.llama import Context
from edge_shiftkv.native.mtmd import Projector
from edge_shiftkv.prompts.prompt import Prompt

_COMPARED_SINGLY = 32  # tokens at the end: the others are compared at once


class PrefixCache:
    """A context, and the tokens that are known to be in it: what two prompts have in common is read once.

    n_before: how many others are in it before them, of a prompt with pictures.
    n_ctx, n_batch: the context's.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tokens: list[int] = []
        self._start = 0
        self.n_before = 0
        self.n_ctx = context.n_ctx
        self.n_batch = context.n_batch

    @property
    def pools(self) -> bool:
        """Whether the model makes one embedding of a text."""
        return int(llama.llama_pooling_type(self._context.pointer)) > 0

    def close(self) -> None:
        """Free the context."""
        self._context.close()
        self.n_ctx = 0

    def clear(self) -> None:
        """Forget everything."""
        self._tokens.clear()
        self._start = self.n_before = 0
        self._context.clear()

    def logits(self, output: int = -1) -> npt.NDArray[np.float32]:
        """See `Context.logits`."""
        return self._context.logits(output)

    def prefill(self, prompt: Prompt, projector: Projector | None) -> None:
        """Read a prompt with pictures."""
        self.clear()
        prefilled = Prefilled(self._context, projector)
        prefilled.read(prompt)
        self._start = prefilled.position
        self.n_before = prompt.n_tokens

    def n_common(self, tokens: Sequence[int]) -> int:
        """The length of the longest common prefix."""
        n = max(0, min(len(tokens), len(self._tokens)) - _COMPARED_SINGLY)
        if self._tokens[:n] != tokens[:n]:
            n = 0
        while n < min(len(tokens), len(self._tokens)) and self._tokens[n] == tokens[n]:
            n += 1
        return n

    def hold(self, tokens: Sequence[int], n_outputs: int = 2) -> int:
        """Hold just these; return how many had to be read.

        There are logits after the last two, and after up to `n_outputs` of those that were read.
        """
        if not tokens:
            return 0
        n = n_common = max(0, min(self.n_common(tokens), len(tokens) - 2))
        del self._tokens[n:]
        self._context.remove(self._start + n)
        # In whole batches but for the first, so that those with logits are in one.
        while n < len(tokens):
            stop = n + ((len(tokens) - n - 1) % self.n_batch + 1)
            batch = tokens[n:stop]
            logits = min(n_outputs, len(batch)) if stop == len(tokens) else 0
            self._context.decode(batch, self._start + n, logits=logits)
            self._tokens += batch
            n = stop
        return len(tokens) - n_common

    def retract(self) -> None:
        """Forget the last one."""
        self._tokens.pop()
        self._context.remove(self._start + len(self._tokens))

    def extend(self, token: int) -> None:
        """Hold one more."""
        self._context.decode([token], self._start + len(self._tokens))
        self._tokens.append(token)
