"""A sequence's KV pairs, read from what llama_state_seq_get_data() writes."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float32]


@dataclass
class Rows:
    """One row of bytes per cell: a layer's keys or values of all KV heads, in one storage type."""

    type: gguf.GGMLQuantizationType
    raw: Bytes

    def heads(self, n_head: int) -> Bytes:
        """The bytes by head, [n_head, n_cell, bytes]."""
        return self.raw.reshape(len(self.raw), n_head, -1).swapaxes(0, 1)

    def values(self, n_head: int) -> Array:
        """The numbers they stand for, [n_head, n_cell, d_head]."""
        raw = np.ascontiguousarray(self.heads(n_head))
        if self.type == gguf.GGMLQuantizationType.F32:
            return raw.view(np.float32)
        if self.type == gguf.GGMLQuantizationType.F16:
            return raw.view(np.float16).astype(np.float32)
        return gguf.quants.dequantize(raw, self.type).astype(np.float32)


@dataclass(eq=False)
class Cells:
    """A sequence's cells in one cache, in the order of its tokens. Layers are counted as the cache does."""

    positions: npt.NDArray[np.int32]
    """[n_cell, 3]: position, and M-RoPE's row and column."""
    k: list[Rows]
    v: list[Rows]

    def where(self, chosen: npt.NDArray[np.bool_]) -> Cells:
        """Some of the cells."""
        return Cells(
            self.positions[chosen],
            [Rows(rows.type, rows.raw[chosen]) for rows in self.k],
            [Rows(rows.type, rows.raw[chosen]) for rows in self.v],
        )

    def __eq__(self, other: object) -> bool:
        """Whether they hold the same, bit for bit."""
        return (
            isinstance(other, Cells)
            and np.array_equal(self.positions, other.positions)
            and [(rows.type, rows.raw.tobytes()) for rows in (*self.k, *self.v)]
            == [(rows.type, rows.raw.tobytes()) for rows in (*other.k, *other.v)]
        )


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def number(self, dtype: type[np.generic] = np.uint32) -> int:
        value = np.frombuffer(self.data, dtype, 1, self.offset)[0]
        self.offset += value.nbytes
        return int(value)

    def take(self, n: int) -> Bytes:
        value = np.frombuffer(self.data, np.uint8, n, self.offset)
        self.offset += n
        return value


def parse(data: bytes, *, has_extent: bool) -> list[Cells]:
    """Parse a state: one entry per cache. `has_extent` says whether cells carry M-RoPE's positions."""
    reader = _Reader(data)
    reader.take(8)  # magic, sequence
    caches = []
    while reader.offset < len(data):
        streams = [_stream(reader, has_extent) for _ in range(reader.number())]
        (cells,) = [stream for stream in streams if stream is not None]
        caches.append(cells)
    return caches


def _stream(reader: _Reader, has_extent: bool) -> Cells | None:
    n = reader.number()
    if n == 0:
        return None
    positions = np.zeros((n, 3), np.int32)
    for i in range(n):
        positions[i, 0] = reader.number(np.int32)
        n_seq = reader.number()
        if has_extent:  # x, y, token
            positions[i, 2], positions[i, 1], _ = (reader.number(np.int32) for _ in range(3))
        for _ in range(n_seq):
            reader.number(np.int32)
    transposed = reader.number()
    n_layer = reader.number()
    k = [_rows(reader, n) for _ in range(n_layer)]
    v = [(_columns if transposed else _rows)(reader, n) for _ in range(n_layer)]
    order = np.lexsort(positions.T[::-1])
    for rows in (*k, *v):
        rows.raw = rows.raw[order]
    return Cells(positions[order], k, v)


def _rows(reader: _Reader, n: int) -> Rows:
    kind = gguf.GGMLQuantizationType(reader.number())
    size = reader.number(np.uint64)
    return Rows(kind, reader.take(n * size).reshape(n, size))


def _columns(reader: _Reader, n: int) -> Rows:
    kind = gguf.GGMLQuantizationType(reader.number())
    size, n_embd = reader.number(), reader.number()
    return Rows(kind, reader.take(n * size * n_embd).reshape(n_embd, n, size).swapaxes(0, 1).reshape(n, -1))
