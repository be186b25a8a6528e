"""An mmproj with which any language model reads pages of one character a cell.

    python scripts/page_reader.py -m MODEL.gguf --out page-reader-mmproj.gguf [--cells 24]

The vision tower in models/page-reader switches on one unit for each character that it sees. What is added here is a
matrix from these units to the model's own embeddings of the characters: every cell of a page comes to the model as if
the character had been typed, and the last cell of each row as a line break. Nothing is trained for a model. Needs numpy
and gguf.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from page_pictures import CELL, CHARS, MAX_CELLS, VIT

from edge_shiftkv.errors import ModelError, ShiftKVError

UNITS = CHARS + "\n"  # of the projector's hidden layer

# llama.cpp scales the embeddings of tokens by the root of their width here, but not those of pictures.
_SCALED = ("gemma3", "gemma3n", "gemma4")

Floats = npt.NDArray[np.float32]


def write_mmproj(model: Path, dest: Path, cells: int = 24, vit: Path = VIT) -> None:
    """Write an mmproj for a language model that reads pages of `cells` x `cells` characters, 14 pixels each.

    Raises ModelError for a file that is no language model, and one that has no token for a character.
    """
    if not 2 <= cells <= MAX_CELLS:
        raise ModelError(f"pages of {cells} cells a side cannot be read: use 2 to {MAX_CELLS}")
    rows = character_rows(model)
    writer = gguf.GGUFWriter(dest, "clip")
    writer.add_name("edge_shiftkv page reader")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)  # the tanh form
    writer.add_uint32("clip.vision.image_size", cells * CELL)
    writer.add_uint32("clip.vision.patch_size", CELL)
    writer.add_uint32("clip.vision.projection_dim", rows.shape[1])
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    tower = gguf.GGUFReader(vit)
    for name in ("embedding_length", "feed_forward_length", "block_count", "attention.head_count"):
        writer.add_uint32(f"clip.vision.{name}", tower.fields[f"clip.vision.{name}"].contents())
    epsilon = "clip.vision.attention.layer_norm_epsilon"
    writer.add_float32(epsilon, tower.fields[epsilon].contents())
    # LLaVA's graph stops one layer early without it.
    writer.add_array("clip.vision.feature_layer", [tower.fields["clip.vision.block_count"].contents()])

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
        reader = gguf.GGUFReader(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model} cannot be read as a GGUF file: {error}") from error
    found = [tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    if not found or "tokenizer.ggml.tokens" not in reader.fields:
        raise ModelError(f"{model} is no language model: it has no token embeddings, or no vocabulary")
    bpe = reader.fields["tokenizer.ggml.model"].contents() == "gpt2"
    numbers = {text: i for i, text in reversed(list(enumerate(reader.fields["tokenizer.ggml.tokens"].contents())))}
    ids = []
    for char in UNITS:
        spelling = next((text for text in spellings(char, bpe) if text in numbers), None)
        if spelling is None:
            raise ModelError(
                f"{model} has no token for {char!r} alone, so that it cannot be given characters one by one"
            )
        ids.append(numbers[spelling])
    rows: Floats = gguf.quants.dequantize(found[0].data[ids], found[0].tensor_type).astype(np.float32)
    if reader.fields["general.architecture"].contents() in _SCALED:
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Write an mmproj that reads pages for a language model.")
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file of the language model")
    parser.add_argument("--out", type=Path, required=True, help="mmproj to write")
    parser.add_argument("--cells", type=int, default=24, help=f"of a page, a side, up to {MAX_CELLS} (default 24)")
    args = parser.parse_args()
    try:
        write_mmproj(args.model, args.out, args.cells)
    except ShiftKVError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
