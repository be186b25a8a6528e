"""The values of the kept pairs refitted: attention to them comes nearer to what it was on the whole prompt.

Attention Matching (arXiv:2602.16284) without its bias of the keys: for reference queries, the kept pairs' values are
moved by ridge least squares so that attention over the kept pairs gives what attention over all pairs did. Keys, and
which pairs are kept, stay as a ranking chose them.
"""

from __future__ import annotations

import ctypes
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt
from kv_prototypes import Answered, Array, Prototype

from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.llama import Context

F16 = 1  # enum ggml_type
MARK = "+refit:"

Floats = npt.NDArray[np.floating[Any]]
References = tuple[Array, npt.NDArray[Any], Array]


class State:
    """A sequence's KV pairs, as llama_state_seq_get_data() gives them, in f16 and with flash attention.

    keys, values: of each layer, [n_cell, n_head_kv * n_embd_head]: what is written into them, `store` puts back.
    """

    def __init__(self, context: Context, sequence: int = 0) -> None:
        self._context, self._sequence = context, sequence
        self._data = (ctypes.c_uint8 * llama.llama_state_seq_get_size(context.pointer, sequence))()
        n = llama.llama_state_seq_get_data(context.pointer, self._data, len(self._data), sequence)
        assert n == len(self._data)
        self._offset = 8  # magic, sequence
        for _ in range(self._number()):  # streams, of which one holds the sequence
            if n_cell := self._number():
                for _ in range(n_cell):
                    self._offset += 4  # position
                    n_sequence = self._number()
                    self._offset += 4 * n_sequence
                is_transposed, n_layer = self._number(), self._number()
                assert not is_transposed
                self.keys = [self._rows(n_cell) for _ in range(n_layer)]
                self.values = [self._rows(n_cell) for _ in range(n_layer)]
        assert self._offset == len(self._data)

    def _number(self, dtype: type[np.generic] = np.uint32) -> int:
        (value,) = np.frombuffer(self._data, dtype, 1, self._offset)
        self._offset += value.nbytes
        return int(value)

    def _rows(self, n_cell: int) -> npt.NDArray[np.float16]:
        if self._number() != F16:
            raise SystemExit("values can be refitted in f16 only")
        n = self._number(np.uint64) // 2
        rows = np.frombuffer(self._data, np.float16, n_cell * n, self._offset).reshape(n_cell, n)
        self._offset += rows.nbytes
        return rows

    def bytes(self) -> bytes:
        """All of it."""
        return bytes(self._data)

    def store(self) -> None:
        """Put it back into the sequence."""
        n = llama.llama_state_seq_set_data(self._context.pointer, self._data, len(self._data), self._sequence)
        assert n == len(self._data)


def by_head(rows: npt.NDArray[np.float16], n_head_kv: int) -> Array:
    """[n_cell, n_head_kv * d] to [n_head_kv, n_cell, d]."""
    result: Array = rows.reshape(len(rows), n_head_kv, -1).transpose(1, 0, 2).astype(np.float32)
    return result


def attention_to(queries: Floats, positions: npt.NDArray[Any], keys: Floats, places: npt.NDArray[Any]) -> Array:
    """Weights of queries [n, n_head, d] over keys [n_head_kv, T, d]: [n_head_kv, heads of each * n, T].

    positions, places: of the queries [n] and the keys [n_head_kv, T]: none sees a later one, and a row is 0 where none
        is seen.
    """
    n, _, d = queries.shape
    grouped = queries.reshape(n, len(keys), -1, d).transpose(1, 2, 0, 3)
    logits = grouped @ keys.transpose(0, 2, 1)[:, None] / math.sqrt(d)
    logits = np.where(places[:, None, None] <= positions[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True, initial=-1e30))
    total = weights.sum(-1, keepdims=True)
    result: Array = weights / np.where(total, total, 1)
    return result.reshape(len(keys), -1, keys.shape[1])


def ridge_fit(old: Floats, weights: Floats, wanted: Floats, ridge: float) -> Array:
    """Values V [C, d] near the old ones, so that weights [m, C] @ V is near what is wanted, [m, d].

    ridge: what a change costs, in the mean diagonal of weights' Gram matrix.
    """
    x = weights.astype(np.float64)
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += max(ridge * gram.trace() / len(gram), 1e-12)
    result: Array = old + np.linalg.solve(gram, x.T @ (wanted - x @ old))
    return result


@dataclass(frozen=True)
class Refit:
    """How values are refitted.

    queries: the references: "real", the prompt's last n, or "proxies", n of them, drawn as in MM-ShiftKV.
    ridge: see `ridge_fit`.
    """

    queries: str = "real"
    n: int = 8
    ridge: float = 1.0

    @classmethod
    def of(cls, settings: str) -> Refit:
        """That of settings such as ``queries=real,ridge=0.1``."""
        values: dict[str, Any] = {}
        for setting in settings.split(","):
            name, value = setting.split("=")
            values[name] = value if name == "queries" else json.loads(value)
        return cls(**values)


class Whole:
    """A prompt in a context, and what attention to all of it gives."""

    def __init__(self, context: Context, path: Path, n_prompt: int) -> None:
        self.answered = Answered(context, path, n_prompt, 0)
        self.n_prompt = n_prompt
        layers, state = self.answered.layers, State(context)
        assert len(layers) == len(state.values)
        self.n_head_kv = {layer: shiftkv.shape(context, layer).n_head_kv for layer in layers}
        self.values = {
            layer: by_head(rows[:n_prompt], self.n_head_kv[layer])
            for layer, rows in zip(layers, state.values, strict=True)
        }
        self._found: dict[tuple[int, str, int], References] = {}

    def references(self, layer: int, kind: str, n: int) -> References:
        """Queries, their positions, and what attention to the prompt gives them: [n_head_kv, heads of each * n, d]."""
        if (layer, kind, n) not in self._found:
            self._found[layer, kind, n] = self._references(layer, kind, n)
        return self._found[layer, kind, n]

    def _references(self, layer: int, kind: str, n: int) -> References:
        if kind == "proxies":
            queries = Prototype(observed=0, n_proxy=n)._draw(self.answered, layer)
            positions = np.full(len(queries), self.n_prompt)
        else:
            queries = self.answered.queries(layer)[-n:]
            positions = np.arange(self.n_prompt - len(queries), self.n_prompt)
        keys = self.answered.keys(layer)
        places = np.broadcast_to(np.arange(self.n_prompt), keys.shape[:2])
        return queries, positions, attention_to(queries, positions, keys, places) @ self.values[layer]

    def fitted(self, refit: Refit, layer: int, kept: npt.NDArray[np.int32]) -> Array:
        """The values of the kept pairs [n_head_kv, C]: [n_head_kv, C, d]."""
        keys = np.take_along_axis(self.answered.keys(layer), kept[..., None], 1)
        old = np.take_along_axis(self.values[layer], kept[..., None], 1)
        queries, positions, wanted = self.references(layer, refit.queries, refit.n)
        heads = zip(old, attention_to(queries, positions, keys, kept), wanted, strict=True)
        return np.stack([ridge_fit(*head, refit.ridge) for head in heads]).astype(np.float32)

    def write(self, refit: Refit, kept: dict[int, npt.NDArray[np.int32]], context: Context, sequence: int = 0) -> None:
        """Overwrite the values of what was handed over into a sequence that holds nothing else."""
        state = State(context, sequence)
        for rows, layer in zip(state.values, self.answered.layers, strict=True):
            n_head_kv = self.n_head_kv[layer]
            old = np.take_along_axis(self.values[layer], kept[layer][..., None], 1)
            assert np.array_equal(by_head(rows, n_head_kv), old)
            rows[:] = self.fitted(refit, layer, kept[layer]).transpose(1, 0, 2).reshape(rows.shape)
        state.store()
