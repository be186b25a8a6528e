"""A draft of any vocabulary for llama-cpp-python's own `Llama`.

draft = LlamaDraft("smollm2.gguf", target="qwen2.5.gguf")
llama = llama_cpp.Llama("qwen2.5.gguf", draft_model=draft)
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import edge_shiftkv.native  # noqa: F401 - first: it says what to do where there is no library

# isort: split
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from edge_shiftkv.closing import Closing
from edge_shiftkv.native.llama import Model, usable_cpus
from edge_shiftkv.speculative.draft import Draft
from edge_shiftkv.speculative.options import MOST_DRAFTED, DraftOptions

_ROOM = 512  # tokens of an answer after which the draft model may have to read again


class LlamaDraft(Closing, LlamaDraftModel):
    """Drafts with a GGUF model whose vocabulary may differ from the target's.

    The draft model reads the text of the target's tokens, with the control tokens that both models know by the same
    name. It takes its most likely tokens; `Llama` accepts those that it draws, too. Temperature 0 gets most of it.
    With any draft_model, `Llama` needs an n_batch of at least its n_ctx, or logits_all=True. A context manager; `close`
    frees the draft model.

    draft: path of the draft model's GGUF file.
    target: path of the GGUF file that `Llama` loads; only its vocabulary is read.
    n_draft: tokens to draft, 1 to 16.
    n_gpu_layers, n_threads: as in `Llama`, for the draft model; None takes all threads that the process may use.

    Raises ModelError for a file that is missing, or a model that cannot draft; ShiftKVError for an n_draft out of its
    range.
    """

    def __init__(
        self,
        draft: str | os.PathLike[str],
        target: str | os.PathLike[str],
        *,
        n_draft: int = 4,
        n_gpu_layers: int = -1,
        n_threads: int | None = None,
    ) -> None:
        self._n_draft = n_draft
        options = DraftOptions(n_draft=n_draft)
        with ExitStack() as resources:
            self._target = Model(Path(target), 0, vocab_only=True)
            resources.callback(self._target.close)
            self._draft = Draft(
                *(Path(draft), self._target, options),
                n_gpu_layers=n_gpu_layers,
                n_threads=n_threads or usable_cpus(),
            )
            resources.callback(self._draft.close)
            self._resources = resources.pop_all()
        self._ids: list[int] = []
        self._n_prompt = 0

    def close(self) -> None:
        """Free the draft model."""
        self._resources.close()

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        """Propose tokens of the target that continue `input_ids`, its tokens so far; both are [n]."""
        ids = [int(token) for token in input_ids]
        if not self._ids or ids[: len(self._ids)] != self._ids:
            self._n_prompt = len(ids)
            self._draft.begin_after(ids, _ROOM)
        self._ids = ids
        drafted = self._draft.propose(ids[self._n_prompt :], self._n_draft, MOST_DRAFTED)
        return np.array(drafted.proposal.tokens, np.intc)
