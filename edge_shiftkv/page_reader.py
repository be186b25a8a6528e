"""An mmproj with which any language model reads pages of one character a cell.

The vision tower in models/page-reader switches on one unit for each character that it sees. What is added here is a
matrix from these units to the model's own embeddings of the characters: every cell of a page comes to the model as if
the character had been typed, and the last cell of each row as a line break. Nothing is trained for a model.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from edge_shiftkv._paths import page_reader_dir
from edge_shiftkv.build import default_cache_dir
from edge_shiftkv.errors import ModelError, ShiftKVError
from edge_shiftkv.native.gguf_file import STRING, read_header

CELL = 14  # pixels a side of a cell
MAX_CELLS = 32  # cells a side of a page
CHARS = "".join(map(chr, range(32, 127)))  # the number of a character is its place here; 0 is a blank
UNITS = CHARS + "\n"  # of the projector's hidden layer

# llama.cpp scales the embeddings of tokens by the root of their width here, but not those of pictures.
_SCALED = ("gemma3", "gemma3n", "gemma4")

VIT = page_reader_dir() / "vit-f16.gguf"
_TABLE = "token_embd.weight"

_SIZES = (
    "clip.vision.embedding_length",
    "clip.vision.feed_forward_length",
    "clip.vision.block_count",
    "clip.vision.attention.head_count",
)
_EPSILON = "clip.vision.attention.layer_norm_epsilon"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tower:
    """The sizes of a vision tower, as GGUF files have them."""

    width: int
    n_ff: int
    n_layer: int
    n_head: int
    epsilon: float

    @classmethod
    def read(cls, reader: gguf.GGUFReader) -> Tower:
        """Those that a file says."""
        return cls(*(reader.fields[key].contents() for key in (*_SIZES, _EPSILON)))

    def add(self, writer: gguf.GGUFWriter) -> None:
        """Have a file say them."""
        for key, value in zip(_SIZES, (self.width, self.n_ff, self.n_layer, self.n_head), strict=True):
            writer.add_uint32(key, value)
        writer.add_float32(_EPSILON, self.epsilon)


def mmproj_writer(dest: Path, name: str, side: int, n_embd: int, tower: Tower) -> gguf.GGUFWriter:
    """An mmproj of LLaVA-1.5's kind, all but its tensors: pictures of `side` x `side` pixels, in patches of `CELL`.

    n_embd: of the language model.
    """
    writer = gguf.GGUFWriter(dest, "clip")
    writer.add_name(name)
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)  # the tanh form
    writer.add_uint32("clip.vision.image_size", side)
    writer.add_uint32("clip.vision.patch_size", CELL)
    writer.add_uint32("clip.vision.projection_dim", n_embd)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    tower.add(writer)
    # LLaVA's graph stops one layer early without it.
    writer.add_array("clip.vision.feature_layer", [tower.n_layer])
    return writer


def write_mmproj(model: Path, dest: Path, cells: int = 24) -> None:
    """Write an mmproj for a language model that reads pages of `cells` x `cells` characters, 14 pixels each.

    Raises ModelError for a file that is no language model, and one that has no token for a character; ShiftKVError
    where it cannot be written.
    """
    if not 2 <= cells <= MAX_CELLS:
        raise ModelError(f"pages of {cells} cells a side cannot be read: use 2 to {MAX_CELLS}")
    _write(character_rows(model), dest, cells)


def fitted(model: Path) -> Path:
    """The mmproj for a language model, in this user's cache, for pages of 24 x 24 characters.

    Raises ModelError as `write_mmproj` does, and ShiftKVError where the cache cannot be written.
    """
    rows = character_rows(model)
    digest = hashlib.sha256(rows.tobytes() + VIT.read_bytes()).hexdigest()[:12]  # all that the file is made of
    dest = default_cache_dir() / "page-reader" / f"{model.stem}-{digest}.gguf"
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShiftKVError(f"{dest.parent}: {error.strerror or error}") from error
    if not dest.exists():
        _write(rows, dest, 24)
    return dest


def _write(rows: Floats, dest: Path, cells: int) -> None:
    """Write the mmproj of a language model whose `character_rows` these are: it is complete or not there."""
    part = dest.with_name(f".{dest.name}.{secrets.token_hex(8)}")
    try:
        _write_gguf(rows, part, cells)
        part.replace(dest)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ShiftKVError(f"{dest}: {error.strerror or error}") from error


def _write_gguf(rows: Floats, dest: Path, cells: int) -> None:
    tower = gguf.GGUFReader(VIT)
    writer = mmproj_writer(dest, "edge_shiftkv page reader", cells * CELL, rows.shape[1], Tower.read(tower))
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in tower.tensors}
    row, column, last = (tensors.pop(f"v.position_embd.{part}") for part in ("row", "column", "last"))
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.add_tensor("v.position_embd.weight", positions(row, column, last, cells))
    writer.add_tensor("mm.2.weight", np.ascontiguousarray(rows.T).astype(np.float16))
    writer.add_tensor("mm.2.bias", np.zeros(rows.shape[1], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def positions(row: Floats, column: Floats, last: Floats, cells: int) -> Floats:
    """Position embeddings of a page, [cells * cells, width], of those of a row, a column and the last column."""
    places = row[:cells, None] + column[None, :cells]
    places[:, -1] += last
    flat: Floats = places.reshape(cells * cells, -1)
    return flat


def character_rows(model: Path) -> Floats:
    """The embeddings of `UNITS`, [units, n_embd], as a language model's first layer sees them. Raises ModelError."""
    try:
        header = read_header(model)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ModelError(f"{model} cannot be read as a GGUF file: {reason}") from error
    table, vocabulary = header.tensors.get(_TABLE), header.array("tokenizer.ggml.tokens")
    if not table or not vocabulary or vocabulary.kind != STRING:
        raise ModelError(f"{model} is no language model: it has no token embeddings, or no vocabulary")
    bpe = header.text("tokenizer.ggml.model") == "gpt2"
    wanted = {spelling for char in UNITS for spelling in spellings(char, bpe)}
    numbers: dict[str, int] = {}
    for number, text in enumerate(header.texts(vocabulary)):
        if text in wanted:
            numbers.setdefault(text, number)
    ids = []
    for char in UNITS:
        spelling = next((text for text in spellings(char, bpe) if text in numbers), None)
        if spelling is None:
            raise ModelError(
                f"{model} has no token for {char!r} alone, so that it cannot be given characters one by one"
            )
        ids.append(numbers[spelling])
    if max(ids) >= table.n_rows:
        raise ModelError(f"{model} is damaged: it has {vocabulary.n} tokens, and embeddings of {table.n_rows}")
    stored = np.frombuffer(b"".join(header.rows(_TABLE, ids)), np.uint8).reshape(len(ids), -1)
    kind = gguf.GGMLQuantizationType(table.type)
    try:
        rows: Floats = gguf.quants.dequantize(stored, kind).astype(np.float32)
    except NotImplementedError as error:
        raise ModelError(f"{model} has its token embeddings in {kind.name}, which cannot be read: {error}") from error
    if header.text("general.architecture") in _SCALED:
        rows *= np.sqrt(np.float32(rows.shape[1]))
    return rows


def spellings(char: str, bpe: bool) -> Iterator[str]:
    """How a vocabulary may write a token of one character: byte-level BPE, or SentencePiece with its byte tokens."""
    if bpe:
        # GPT-2 moves bytes that do not print behind 255.
        yield char if "!" <= char <= "~" else chr(256 + ord(char))
    else:
        yield "\u2581" if char == " " else char
        yield f"<0x{ord(char):02X}>"
