"""`edge-shiftkv demo`: what it shows, writes and refuses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from demo_documents import make_document
from page_documents import make_page
from PIL import Image

from edge_shiftkv import cli
from edge_shiftkv.commands import demo as command
from edge_shiftkv.commands.demo import is_right

SEED = 2  # of the receipt
LABEL, COLUMN = 16, 28  # of a line of 100 columns: the label, and each of three columns


@dataclass
class Said:
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    def row(self, label: str) -> list[str]:
        """The three columns of a row."""
        line = next(line for line in self.lines if line[:LABEL].strip() == label)
        return [line[at : at + COLUMN].strip() for at in range(LABEL, LABEL + 3 * COLUMN, COLUMN)]

    def after(self, label: str) -> list[str]:
        """What stands behind a word, wherever a line begins with it."""
        return [line.removeprefix(label).strip() for line in self.lines if line.startswith(f"{label} ")]


Run = Callable[..., Said]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function: arguments of the demo to what it said, in an empty folder."""
    monkeypatch.setattr("edge_shiftkv.engine.engine.usable_cpus", lambda: 1)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("EDGE_SHIFTKV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: str) -> Said:
        return Said(cli.main(["demo", *arguments]), *capsys.readouterr())

    return call


@pytest.fixture
def tiny_demo(tiny: Any, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random model in the shipped one's place, for what does not depend on answers."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "demo-text-q8_0.gguf").symlink_to(tiny.text)
    (folder / "demo-mmproj-f16.gguf").symlink_to(tiny.mmproj)
    (folder / "document.png").symlink_to(tiny.picture)
    monkeypatch.setattr(command, "models_dir", lambda: folder)


def pixels(path: Path) -> npt.NDArray[np.int64]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int64)


def kib(text: str) -> int:
    return int(text.removesuffix(" KiB"))


def test_the_cut_answer_is_the_documents(demo: Path, run: Run, n_read: list[int]) -> None:
    values = make_document(10).values
    said = run()
    assert (said.status, said.err) == (0, "")
    assert said.row("answer")[:2] == [values["AREA"]] * 2
    # SnapKV is off by far: in every token at least 6 nats lie between what it writes and the next best.
    assert values["AREA"] not in said.row("answer")[2]
    assert said.row("which is") == ["right", "right", "wrong"]
    kept = [line.split(" of ") for line in said.row("KV pairs kept")]
    assert kept[0][0] == kept[0][1] == kept[1][1] == kept[2][1]
    assert kept[1] == kept[2]
    full, *cut = map(kib, said.row("KV cache"))
    assert cut[0] == cut[1]
    assert full / 9 < cut[0] <= full / 8 + 1
    assert said.row("keys, values in")[0] == "f16, f16"
    assert all(re.fullmatch(r"\d+\.\d{3} s, [1-9]\d* tokens", cell) for cell in said.row("decode"))

    question = said.after("question")[-1]
    assert question == "What is the value of ZMBZE?"
    assert said.after("answer")[-1] == f"{values['ZMBZE']}, right"
    assert re.search(r"\n +answered in \d+\.\d{3} s, \d+% of the first question's time\n", said.out)
    # The model's tokens are bytes; around the question are four that are none, and two line breaks.
    assert n_read[-1] <= len(question) + 6

    assert len(said.lines) <= 25
    assert max(len(line) for line in said.lines if not line.startswith("next ")) <= 100
    assert said.after("heat map")[0].startswith("kept.png ")
    shades = pixels(Path("kept.png"))
    coloured = shades.max(-1) - shades.min(-1) > 60
    assert 0.005 < coloured.mean() < 0.9


@pytest.mark.filterwarnings("ignore:keys are stored in f16:RuntimeWarning")
def test_a_second_run_leaves_the_heat_map_alone(tiny_demo: None, run: Run, tmp_path: Path) -> None:
    Path("kept.png").write_text("somebody's")
    said = run()
    assert (said.status, said.err) == (0, "")
    assert Path("kept.png").read_text() == "somebody's"
    assert said.after("heat map")[0].startswith("kept-2.png ")
    assert pixels(Path("kept-2.png")).std() > 1
    assert run().after("heat map")[0].startswith("kept-3.png ")
    assert run("--heatmap", "kept.png").status == 0
    assert pixels(Path("kept.png")).std() > 1
    Path("kept.png").unlink()
    Path("kept.png").symlink_to(tmp_path / "nowhere" / "a.png")
    said = run()
    assert (said.status, said.err) == (0, "")
    assert said.after("heat map")[0].startswith("not written: kept.png: ")
    said = run("--heatmap", str(tmp_path / "nowhere" / "b.png"))
    assert said.status == 1
    assert said.err.startswith(f"edge-shiftkv demo: {tmp_path / 'nowhere' / 'b.png'}: ")


def test_narrow_terminals(tiny_demo: None, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = run("--kv-budget", "20")
    assert max(len(line) for line in said.lines if not line.startswith(("next ", "picture "))) <= 80
    assert "kv_budget 20" in said.out
    assert "20 of " in said.out


def test_a_budget_for_everything_is_refused(tiny_demo: None, run: Run) -> None:
    said = run("--kv-budget", "900")
    assert said.status == 1
    assert re.fullmatch(r"edge-shiftkv demo: --kv-budget 900 has room for all \d+ tokens: .*\n", said.err)
    assert not Path("kept.png").exists()


@pytest.mark.filterwarnings("ignore:keys are stored in f16:RuntimeWarning")
def test_any_language_model_reads_the_receipt(tiny: Any, run: Run, tmp_path: Path) -> None:
    said = run("--model", str(tiny.text))
    assert said.status == 0
    assert "receipt.png" in said.after("picture")[0]
    total, first = make_page("receipt", SEED).facts["What is the total of this receipt?"], said.row("answer")
    assert said.row("which is") == ["right" if total[0] in answer else "wrong" for answer in first]
    kept, of = map(int, said.row("KV pairs kept")[1].split(" of "))
    assert 576 < of < 700
    assert kept < of / 2
    [mmproj] = (tmp_path / "cache" / "page-reader").iterdir()
    words = shlex.split(said.after("next")[0])
    assert words[:2] == ["edge-shiftkv", "chat"]
    for option, path in (("-m", tiny.text), ("--mmproj", mmproj), ("--image", command.receipt().picture)):
        assert Path(words[words.index(option) + 1]).resolve() == path.resolve()

    expected, written = gguf.GGUFReader(tiny.text), gguf.GGUFReader(mmproj)
    tokens = expected.fields["tokenizer.ggml.tokens"].contents()
    table = next(tensor.data for tensor in expected.tensors if tensor.name == "token_embd.weight")
    rows = next(tensor.data for tensor in written.tensors if tensor.name == "mm.2.weight")
    place = ord("7") - ord(" ")
    np.testing.assert_array_equal(rows[:, place], table[tokens.index("7")].astype(np.float16))
    del written
    changed = mmproj.stat().st_mtime_ns
    assert run("-m", str(tiny.text)).status == 0
    assert [path.stat().st_mtime_ns for path in mmproj.parent.iterdir()] == [changed]


def test_models_that_cannot_read_are_refused(run: Run, demo: Path, tmp_path: Path, tiny: Any) -> None:
    for model, message in (
        (tmp_path / "none.gguf", "No such file"),
        (demo / "document.png", "not a GGUF file"),
        (demo / "demo-mmproj-f16.gguf", "no language model"),
    ):
        said = run("-m", str(model))
        assert (said.status, said.out) == (1, "")
        assert said.err.startswith(f"edge-shiftkv demo: {model} ")
        assert message in said.err
    (tmp_path / "cache").write_text("a file in the folder's place")
    said = run("-m", str(tiny.text))
    assert said.status == 1
    assert said.err.startswith(f"edge-shiftkv demo: {tmp_path / 'cache' / 'page-reader'}: ")


def test_questions_are_about_what_the_pictures_say() -> None:
    document, asked = make_document(10), command.document()
    np.testing.assert_array_equal(pixels(asked.picture), document.image)
    for (question, value), label in ((asked.first, "AREA"), (asked.second, "ZMBZE")):
        wanted = document.ask("lookup", 0, label)
        assert (question, value) == (wanted.question, wanted.answer)
    page, asked = make_page("receipt", SEED), command.receipt()
    np.testing.assert_array_equal(pixels(asked.picture), np.asarray(page.picture()))
    known = dict((asked.first, asked.second))
    for number in range(len(page.rows) + len(page.facts)):
        item = page.ask("look-up", number)
        if (value := known.pop(item.question, None)) is not None:
            assert item.items == (value,)
    assert not known


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *(("654.92", True), ("It is 654.92.", True), ("$654.92", True), ("654.92\n", True), ("(654.92)", True)),
        *(("654.925", False), ("1654.92", False), ("654.9", False), ("3.654.92", False), ("654.92.1", False)),
        *(("", False), ("654,92", False), ("654x92", False), ("654.92-3", False)),
    ],
)
def test_right_is_the_value_and_nothing_longer(answer: str, right: bool) -> None:
    assert is_right(answer, "654.92") is right
