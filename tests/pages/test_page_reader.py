"""The page reader's mmproj: a language model's own rows behind units that each see one character."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from page_documents import KINDS, make_page
from page_pictures import LINE_BREAK, numbers, paint
from PIL import Image
from support import tiny_models

from edge_shiftkv.engine import Engine
from edge_shiftkv.errors import ModelError
from edge_shiftkv.native.mtmd import ImageChunk
from edge_shiftkv.page_reader import CHARS, UNITS, VIT, character_rows, positions, write_mmproj
from edge_shiftkv.prompts.messages import Message

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
Floats = npt.NDArray[np.float32]


def tensors(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    return {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def demo_rows(demo: Path) -> Floats:
    """The demo model's embeddings of the units, from q8_0 by hand: 32 weights behind a scale; its tokens are bytes."""
    blocks = tensors(demo / "demo-text-q8_0.gguf")["token_embd.weight"].reshape(288, -1, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    weights = (scales * blocks[..., 2:].view(np.int8)).reshape(288, -1)
    return weights[[*range(32, 127), ord("\n")]]


@pytest.fixture(scope="module")
def mmproj(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page-reader") / "mmproj.gguf"
    write_mmproj(demo / "demo-text-q8_0.gguf", path)
    return path


def test_rows_are_the_language_models_own(demo: Path, mmproj: Path) -> None:
    rows = demo_rows(demo)
    assert rows.shape == (len(UNITS), 192)
    np.testing.assert_array_equal(character_rows(demo / "demo-text-q8_0.gguf"), rows)
    written = tensors(mmproj)
    np.testing.assert_array_equal(written["mm.2.weight"], rows.T.astype(np.float16))
    assert not written["mm.2.bias"].any()


def test_rows_of_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    path = tiny_models.write_text_model(tmp_path / "text.gguf", sentencepiece=True)
    reader = gguf.GGUFReader(path)
    spelled = reader.fields["tokenizer.ggml.tokens"].contents()
    rows = character_rows(path)
    table = tensors(path)["token_embd.weight"].astype(np.float32)
    for unit, char in ((0, " "), (33, "A"), (16, "0"), (LINE_BREAK, "\n")):
        named = [text for text in ("\u2581" if char == " " else char, f"<0x{ord(char):02X}>") if text in spelled]
        np.testing.assert_array_equal(rows[unit], table[spelled.index(named[0])])


def test_positions_are_a_row_a_column_and_the_last_one() -> None:
    rng = np.random.default_rng(0)
    row, column, last = (rng.normal(size=shape).astype(np.float32) for shape in ((32, 5), (32, 5), (5,)))
    places = positions(row, column, last, 24)
    assert places.shape == (24 * 24, 5)
    np.testing.assert_array_equal(places[24 * 3 + 7], row[3] + column[7])
    np.testing.assert_array_equal(places[24 * 3 + 23], row[3] + column[23] + last)


def test_what_is_no_language_model_is_refused(tmp_path: Path, mmproj: Path) -> None:
    with pytest.raises(ModelError, match="no language model"):
        write_mmproj(mmproj, tmp_path / "out.gguf")
    (tmp_path / "text.txt").write_text("not a model at all")
    with pytest.raises(ModelError, match="cannot be read"):
        write_mmproj(tmp_path / "text.txt", tmp_path / "out.gguf")
    with pytest.raises(ModelError, match="33 cells"):
        write_mmproj(tmp_path / "text.txt", tmp_path / "out.gguf", 33)
    command = [sys.executable, str(SCRIPTS / "page_reader.py"), "-m", "nowhere.gguf", "--out", "out.gguf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.gguf").exists()


def hidden(engine: Engine, picture: Image.Image, rows: Floats) -> Floats:
    """The projector's hidden layer after its GELU, [cells, units], from what llama.cpp's encoder gives out."""
    with closing(engine.prompt([Message("user", (picture, "?"))])) as prompt:
        chunk = next(chunk for chunk in prompt.chunks if isinstance(chunk, ImageChunk))
        assert engine.projector
        embeddings = np.array(engine.projector.embed(chunk, "picture"))
    # The rows are independent, so that what they were weighted with can be solved for.
    units: Floats = np.linalg.lstsq(rows.T.astype(np.float16).astype(np.float32), embeddings.T, rcond=None)[0].T
    return units


def wanted(cells: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    units = cells.astype(np.int64)
    units[:, -1] = LINE_BREAK
    return units.reshape(-1)


def test_every_character_switches_its_unit_on(demo: Path, mmproj: Path) -> None:
    rows = demo_rows(demo)
    cells = numbers([CHARS[i : i + 23] for i in range(1, len(CHARS), 23)], 24)
    right = []
    with Engine(demo / "demo-text-q8_0.gguf", mmproj, n_threads=1) as engine:
        for seed in range(6):
            picture = Image.fromarray(paint(np.random.RandomState(seed), cells))
            units = hidden(engine, picture, rows)
            right.append(units.argmax(-1) == wanted(cells))
            one_hot = np.eye(len(UNITS))[wanted(cells)]
            assert np.square(units - one_hot).sum(-1).mean() < 0.15  # of 1 that a blank picture would have
    inked = wanted(cells) < LINE_BREAK
    inked &= wanted(cells) > 0
    assert np.mean([hits[inked].mean() for hits in right]) > 0.97
    assert np.mean([hits[~inked].mean() for hits in right]) > 0.995


@pytest.mark.parametrize("n_cells", [24, 32])
def test_pages_are_nearest_to_their_characters(demo: Path, tmp_path: Path, n_cells: int) -> None:
    write_mmproj(demo / "demo-text-q8_0.gguf", tmp_path / "mmproj.gguf", n_cells)
    rows = demo_rows(demo)
    right = []
    with Engine(demo / "demo-text-q8_0.gguf", tmp_path / "mmproj.gguf", n_threads=1) as engine:
        for kind in KINDS[:: 1 if n_cells == 24 else 3]:
            page = make_page(kind, 5, n_cells)
            with closing(engine.prompt([Message("user", (page.picture(), "?"))])) as prompt:
                chunk = next(chunk for chunk in prompt.chunks if isinstance(chunk, ImageChunk))
                assert chunk.n_tokens == n_cells**2
                assert engine.projector
                embeddings = np.array(engine.projector.embed(chunk, kind))
            distances = np.square(embeddings[:, None] - rows[None]).sum(-1)
            units = wanted(numbers(list(page.lines), n_cells))
            right.append((distances.argmin(-1) == units)[units > 0].mean())
    assert np.mean(right) > 0.96


def test_the_tower_is_no_mmproj_by_itself(demo: Path) -> None:
    assert not any(name.startswith("mm.2") for name in tensors(VIT))
    with pytest.raises(ModelError):
        Engine(demo / "demo-text-q8_0.gguf", VIT)
