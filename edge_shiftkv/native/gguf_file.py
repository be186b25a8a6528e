"""What the header of a GGUF file says, read without trusting it."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NAME = 64  # GGML_MAX_NAME, with the zero at the end
_MAX_ITEMS = 1 << 30  # GGUF_MAX_ARRAY_ELEMENTS

# enum gguf_type
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
INTEGERS = frozenset({UINT8, INT8, UINT16, INT16, UINT32, INT32, UINT64, INT64})
_SCALARS = {
    kind: struct.Struct(f"<{code}")
    for kind, code in {
        **{UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i"},
        **{FLOAT32: "f", BOOL: "?", UINT64: "Q", INT64: "q", FLOAT64: "d"},
    }.items()
}
_U32, _U64 = _SCALARS[UINT32], _SCALARS[UINT64]

F32, F16, BF16 = 0, 1, 30
BLOCKS = {
    **{F32: (1, 4), F16: (1, 2), BF16: (1, 2)},
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36)},  # q4_0 .. q8_1
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},  # q2_K .. q8_K
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110)},  # iq2_xxs .. iq3_s
    **{22: (256, 82), 23: (256, 136), 29: (256, 56)},  # iq2_s, iq4_xs, iq1_m
    **{24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8)},  # i8, i16, i32, i64, f64
    **{34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18)},  # tq1_0 .. q2_0
}
"""enum ggml_type -> the numbers in a block, and its bytes."""


class GGUFError(ValueError):
    """A file whose header is damaged; the message says where."""


@dataclass(frozen=True)
class Array:
    """A list in the metadata: `n` items of GGUF type `kind`, the first one at byte `start` of the file."""

    kind: int
    n: int
    start: int


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry. `shape` begins with the fastest dimension; `offset` counts from the data's start."""

    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def n_dims(self) -> int:
        """The dimensions, but for those of size 1 at the end, as llama.cpp counts them."""
        return max([i + 1 for i, size in enumerate(self.shape) if size > 1], default=1)

    @property
    def n_rows(self) -> int:
        """The rows, of `shape[0]` numbers each."""
        return math.prod(self.shape[1:])

    @property
    def n_bytes(self) -> int:
        """The bytes of its data."""
        block, size = BLOCKS[self.type]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class Value:
    """A metadata value and its GGUF type. A list is an `Array`, of which the items stay in the file."""

    kind: int
    value: int | float | bytes | Array


@dataclass(frozen=True)
class Header:
    """All of a GGUF file but the tensors' data, which begins at byte `start`, and the items of lists."""

    metadata: dict[str, Value]
    tensors: dict[str, Tensor]
    start: int
    path: Path

    def text(self, key: str) -> str | None:
        """The string under a key, or None where there is no string."""
        entry = self.metadata.get(key)
        return entry.value.decode(errors="replace") if entry and isinstance(entry.value, bytes) else None

    def integer(self, key: str) -> int | None:
        """The integer under a key, or None where there is none."""
        entry = self.metadata.get(key)
        return int(entry.value) if entry and entry.kind in INTEGERS and isinstance(entry.value, int) else None

    def flag(self, key: str) -> bool:
        """Whether the value under a key is true."""
        entry = self.metadata.get(key)
        return entry is not None and entry.kind == BOOL and bool(entry.value)

    def array(self, key: str) -> Array | None:
        """The list under a key, or None where there is none."""
        entry = self.metadata.get(key)
        return entry.value if entry and isinstance(entry.value, Array) else None

    def numbers(self, array: Array) -> tuple[float, ...]:
        """The items of a list of numbers, read from the file."""
        scalar = _SCALARS[array.kind]
        with self.path.open("rb") as file:
            file.seek(array.start)
            return tuple(value for (value,) in scalar.iter_unpack(file.read(array.n * scalar.size)))

    def texts(self, array: Array) -> Iterator[str]:
        """The items of a list of strings, read from the file."""
        with self.path.open("rb") as file:
            file.seek(array.start)
            for _ in range(array.n):
                (size,) = _U64.unpack(file.read(_U64.size))
                yield file.read(size).decode(errors="replace")

    def rows(self, name: str, numbers: Sequence[int]) -> list[bytes]:
        """Some rows of a tensor as they are stored, read from the file."""
        tensor = self.tensors[name]
        size = tensor.n_bytes // tensor.n_rows
        with self.path.open("rb") as file:
            return [_at(file, self.start + tensor.offset + number * size, size) for number in numbers]


def _at(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def read_header(path: Path) -> Header:
    """Read the header: the time goes with its length, not with the file's.

    Raises GGUFError where the file is damaged or incomplete, and OSError where it cannot be read.

        header = read_header(Path("model.gguf"))
        header.integer("llama.block_count"), header.tensors["token_embd.weight"].shape
    """
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise GGUFError(f"not a GGUF file (it starts with {magic!r})")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return Header(*_Reader(data).header(), path)
            except struct.error as error:  # reading past the end
                raise GGUFError("an incomplete file: it ends within the header") from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._at = 4

    def header(self) -> tuple[dict[str, Value], dict[str, Tensor], int]:
        version = self._number(_U32)
        if version not in (2, 3):
            raise GGUFError(f"GGUF version {version}: 2 and 3 are known")
        n_tensors, n_pairs = self._number(_U64), self._number(_U64)
        metadata: dict[str, Value] = {}
        for _ in range(n_pairs):  # a count that is too large ends at the end of the file
            key = self._string().decode(errors="surrogateescape")
            if not key or key in metadata:
                raise GGUFError(f"the metadata has the key {key!r} twice" if key else "a metadata key is empty")
            metadata[key] = self._value(key)
        alignment = metadata.get("general.alignment", Value(UINT32, 32))
        if alignment.kind != UINT32 or not isinstance(alignment.value, int) or alignment.value.bit_count() != 1:
            raise GGUFError(f"general.alignment is {alignment.value!r}: it has to be a power of 2")
        tensors: dict[str, Tensor] = {}
        for _ in range(n_tensors):
            name = self._string().decode(errors="surrogateescape")
            if name in tensors or len(name) >= _MAX_NAME:
                raise GGUFError(
                    f"there are two tensors {name!r}" if name in tensors else f"the name {name!r} is too long"
                )
            tensors[name] = self._tensor(name)
        start = -(-self._at // alignment.value) * alignment.value
        expected = 0
        for name, tensor in tensors.items():
            if tensor.offset != expected:
                raise GGUFError(f"tensor {name!r} begins at byte {tensor.offset} of the data instead of {expected}")
            if start + tensor.offset + tensor.n_bytes > self._size:
                raise GGUFError(f"an incomplete file: it ends before the data of tensor {name!r} does")
            expected += -(-tensor.n_bytes // alignment.value) * alignment.value
        return metadata, tensors, start

    def _value(self, key: str) -> Value:
        kind = self._number(_U32)
        if kind == STRING:
            return Value(kind, self._string())
        if kind == ARRAY:
            kind, n = self._number(_U32), self._number(_U64)
            array = Array(kind, n, self._at)
            if kind == STRING:
                self._skip_strings(n)
            elif kind in _SCALARS and n <= _MAX_ITEMS:
                self._skip(n * _SCALARS[kind].size)
            else:
                raise GGUFError(f"the metadata's {key!r} is a list of {n} items of the GGUF type {kind}")
            return Value(ARRAY, array)
        if kind not in _SCALARS:
            raise GGUFError(f"the metadata's {key!r} has the unknown GGUF type {kind}")
        return Value(kind, self._number(_SCALARS[kind]))

    def _tensor(self, name: str) -> Tensor:
        n_dims = self._number(_U32)
        if n_dims > _MAX_DIMS:
            raise GGUFError(f"tensor {name!r} has {n_dims} dimensions; at most {_MAX_DIMS} are known")
        shape = tuple(self._number(_U64) for _ in range(n_dims))
        kind = self._number(_U32)
        if kind not in BLOCKS:
            raise GGUFError(f"tensor {name!r} has the unknown type {kind}")
        tensor = Tensor(shape or (1,), kind, self._number(_U64))
        if tensor.shape[0] % BLOCKS[kind][0]:
            raise GGUFError(f"tensor {name!r} of type {kind} has rows of {tensor.shape[0]} numbers")
        return tensor

    def _number(self, kind: struct.Struct) -> int:
        (value,) = kind.unpack_from(self._data, self._at)
        self._at += kind.size
        return value  # type: ignore[no-any-return]  # a float where `kind` is one

    def _string(self) -> bytes:
        size = self._number(_U64)
        start = self._at
        self._skip(size)
        return self._data[start : self._at]

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > self._size:
            raise GGUFError("an incomplete file: it ends within the header")

    def _skip_strings(self, n: int) -> None:
        """Walk over `n` strings; vocabularies have some 100,000, so this loop is what reading a header costs."""
        data, at, unpack = self._data, self._at, _U64.unpack_from
        for _ in range(n):
            at += 8 + unpack(data, at)[0]
            if at > self._size:
                break
        self._at = at
        self._skip(0)
