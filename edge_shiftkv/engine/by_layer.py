"""Reading a prompt layer by layer, of which only the kept KV pairs ever exist together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_shiftkv.engine.engine import Engine
from edge_shiftkv.engine.prefilled import Captured, Embedded, Prefilled, ScoringMethod
from edge_shiftkv.errors import ShiftKVError
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.selection.methods import Method
from edge_shiftkv.selection.results import Selection


@dataclass(frozen=True)
class ReadByLayer:
    """A prompt that was read so.

    prefilled: in its context are the logits after the last token, and no KV pairs that anything can be done with.
    info: of the selection.
    selection_s: seconds that selecting and handing over took, part of the reading.
    """

    prefilled: Prefilled
    selection: Selection
    info: shiftkv.Info
    selection_s: float


def context_by_layer(engine: Engine, n_ctx: int, n_batch: int, n_query: int) -> Context:
    """A context that a prompt of `n_ctx` tokens can be read in by `read_by_layer`, to be closed by the caller.

    n_query: the last queries of each layer that the selection looks at.

    Raises ShiftKVError for a model that cannot be read so, and when the memory cannot be had.
    """
    # Its cache has all layers, of so many tokens as are decoded at once, until it is replaced.
    context = engine.context(n_batch, n_batch)
    try:
        shiftkv.by_layer(context, n_ctx, n_query)
    except BaseException:
        context.close()
        raise
    return context


def check_by_layer(engine: Engine) -> None:
    """Raise ShiftKVError for a model that cannot be read layer by layer."""
    context_by_layer(engine, 1, 2, 1).close()


def read_by_layer(
    engine: Engine,
    prompt: Prompt,
    context: Context,
    destination: Context,
    method: Method | ScoringMethod,
    budget: int,
    *,
    sequence: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> ReadByLayer:
    """Take the whole prompt through one layer after the other; of each, what is kept goes to the destination at once.

    What is kept, and the logits, are those of `Prefilled.read`, `select` and `hand_over`. A `ScoringMethod` is asked
    for one layer at a time.

    context: of `context_by_layer`, for this prompt; it can be read in once.
    destination, sequence: where the kept pairs go. Nothing may be decoded there meanwhile.
    report: is told how many tokens of how many are read, where a layer counts as its share of each.

    Raises what `Prefilled.read` and `select` do. The destination then holds nothing in this sequence.
    """
    model, n_layer = context.model, context.model.n_layer
    embedded: Embedded = {}
    encode_s = selection_s = 0.0
    for layer in range(n_layer):

        def report_layer(done: int, total: int, layer: int = layer) -> None:
            if report:
                report((layer * total + done) // n_layer, total)

        prefilled = Prefilled(context, engine.projector, embedded=embedded)
        prefilled.read(prompt, report_layer)
        encode_s += prefilled.image_encode_s
        started = time.perf_counter()
        try:
            if isinstance(method, ScoringMethod):
                params = shiftkv.default_params(shiftkv.Method.RANDOM)
                params.budget = budget
                scores = None
                if layer in shiftkv.layers(context):
                    seen = Captured(context, prompt.n_tokens, prompt.image_spans, method.n_query, layers=[layer])
                    scores = method.scores(seen, budget)[layer]
            else:
                params, scores = method.params(budget, model.architecture), None
            n_left = shiftkv.next_layer(context, params, destination, sequence, scores)
            assert n_left == n_layer - layer - 1
        except ShiftKVError:
            context.interrupt.check()  # was it ended, or did it fail?
            raise
        selection_s += time.perf_counter() - started
    prefilled.image_encode_s = encode_s
    selection = Selection(shiftkv.kept(context), prompt.n_tokens, prompt.image_spans)
    return ReadByLayer(prefilled, selection, shiftkv.info(context), selection_s)
