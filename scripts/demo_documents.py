"""Synthetic documents for the demo model: pictures of short forms, with questions and their exact answers.

A document is a ruled sheet of 16 x 16 cells of 14 x 14 pixels, one character a cell, so that each of the 256 patches of
the demo model's vision tower sees one cell. Some of the 16 lines hold ``LABEL value``, one or two hold words only, the
others are blank. Four tasks are asked about it:

``lookup``
    the value that belongs to a label, e.g. ``What is the value of TOTAL?`` -> ``48.20``
``line``
    what stands on a line, counted from 1 at the top, blank lines included, e.g. ``Read line 7.`` -> ``TOTAL 48.20``
``values``
    all values from top to bottom, separated by one space
``transcribe``
    all lines that are not blank, from top to bottom, separated by newlines; gaps inside a line count as one space

Everything follows from a seed, through integer arithmetic and numpy's frozen ``RandomState`` stream only, so that a
seed gives the same picture on every machine. Needs numpy and pillow.

``python scripts/demo_documents.py --seed 7 --out document.png`` writes a picture and prints its questions;
``--make-atlas`` renders ``models/demo/glyphs.png`` anew from the fonts installed on this machine.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRID = 16  # cells a side
CELL = 14  # pixels a side of a cell
SIZE = GRID * CELL  # pixels a side of a picture
CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-"  # the glyph of CHARS[i] has the number i + 1; 0 is a blank cell
TASKS = ("lookup", "line", "values", "transcribe")
ATLAS = Path(__file__).resolve().parent.parent / "models" / "demo" / "glyphs.png"

# (file below /usr/share/fonts/truetype, size in points): one row of the atlas each.
FONTS = (
    ("dejavu/DejaVuSansMono.ttf", 15),
    ("dejavu/DejaVuSansMono-Bold.ttf", 15),
    ("dejavu/DejaVuSans.ttf", 12),
    ("dejavu/DejaVuSerif.ttf", 11),
)

_LABELS = (
    "TOTAL TAX NET DATE REF ITEM CODE UNIT PRICE QTY ORDER BATCH LOT SIZE MASS TEMP ROOM FLOOR DESK GATE SEAT TRAIN "
    "BUS FARE ZONE AREA STOCK SHELF BIN PART MODEL SERIAL METER GAS WATER POWER FUEL RENT FEES BONUS SALARY HOURS "
    "RATE LOAN CREDIT DEBIT SUM COUNT INDEX PAGE FILE CASE CLAIM POLICY TICKET PHONE FAX PIN KEY LOCK BOX CRATE LOAD "
    "AXLE SPEED WIND RAIN LEVEL DEPTH WIDTH HEIGHT ANGLE VOLT AMP PULSE DOSE WARD BED AGE YEAR MONTH WEEK DAY GRADE "
    "SCORE POINTS RANK TEAM LANE LAP RACE"
)
LABELS = tuple(_LABELS.split())
_WORDS = (
    "THANK YOU PAID CASH CARD COPY DRAFT FINAL URGENT CHECK SIGN HERE NOTES TERMS APPLY OPEN CLOSED SEE BACK NEXT "
    "VISIT AGAIN STAMP OFFICE NORTH SOUTH EAST WEST HOME WORK SHOP STORE MARKET CITY TOWN ROAD STREET BRIDGE RIVER "
    "GARDEN BLUE GREEN WHITE BLACK SMALL LARGE FRESH LOCAL"
)
WORDS = tuple(_WORDS.split())
WORDINGS = {
    "lookup": ("What is the value of {}?", "What is {}?", "Give the value of {}.", "Look up {}."),
    "line": ("Read line {}.", "What is on line {}?", "What does line {} say?"),
    "values": ("List all values.", "List the values.", "What are all the values?"),
    "transcribe": ("Read everything.", "Read the whole page.", "Write down all of the text."),
}


@dataclass(frozen=True)
class Question:
    """One question about a document and the one right answer."""

    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Document:
    """A drawn document.

    Attributes:
        seed: the seed it was made from.
        image: the picture, uint8 ``[SIZE, SIZE, 3]``.
        cells: the glyph number of each cell, uint8 ``[GRID, GRID]`` (0 = blank).
        lines: line number (from 1) -> text, for the lines that are not blank, from top to bottom.
        values: label -> value, from top to bottom.
    """

    seed: int
    image: np.ndarray
    cells: np.ndarray
    lines: dict[int, str]
    values: dict[str, str]

    def ask(self, task: str, wording: int = 0, subject: int | str = "") -> Question:
        """The question of ``task`` in one of its wordings; ``subject`` is the label (lookup) or line number (line)."""
        if task == "lookup":
            answer = self.values[str(subject)]
        elif task == "line":
            answer = self.lines[int(subject)]
        elif task == "values":
            answer = " ".join(self.values.values())
        elif task == "transcribe":
            answer = "\n".join(self.lines.values())
        else:
            raise ValueError(f"unknown task {task!r}, expected one of {TASKS}")
        return Question(task, WORDINGS[task][wording].format(subject), answer)

    def questions(self) -> list[Question]:
        """Every question that can be asked, each in a wording that follows from the seed."""
        rng = np.random.RandomState(self.seed ^ 0x5EED)
        asked = [("lookup", label) for label in self.values] + [("line", number) for number in self.lines]
        asked += [("values", ""), ("transcribe", "")]
        return [self.ask(task, int(rng.randint(len(WORDINGS[task]))), subject) for task, subject in asked]

    def pil_image(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.image)


def render_atlas(font_root: Path = Path("/usr/share/fonts/truetype")) -> Image.Image:
    """Renders the glyph atlas: one row of cells a font, one cell a character, a free pixel around each glyph."""
    atlas = Image.new("L", (len(CHARS) * CELL, len(FONTS) * CELL))
    for row, (name, size) in enumerate(FONTS):
        font = ImageFont.truetype(str(font_root / name), size)
        for column, char in enumerate(CHARS):
            cell = Image.new("L", (CELL - 2, CELL - 2))
            # Centred across; all characters share a baseline near the bottom of the cell.
            ImageDraw.Draw(cell).text(((CELL - 2) / 2, CELL - 3), char, fill=255, font=font, anchor="ms")
            atlas.paste(cell, (column * CELL + 1, row * CELL + 1))
    return atlas


@functools.lru_cache(maxsize=1)
def load_glyphs() -> np.ndarray:
    """Ink of every glyph under every jitter, int32 ``[fonts, 9, 1 + len(CHARS), CELL, CELL]`` in 0..255."""
    with Image.open(ATLAS) as picture:
        sheet = np.asarray(picture.convert("L"), dtype=np.int32)
    cells = sheet.reshape(len(FONTS), CELL, len(CHARS), CELL).transpose(0, 2, 1, 3)
    cells = np.concatenate([np.zeros_like(cells[:, :1]), cells], axis=1)
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return np.stack([np.roll(cells, shift, axis=(2, 3)) for shift in shifts], axis=1)


def _draw_value(rng: np.random.RandomState) -> str:
    """A value of 3 to 6 characters: a whole number, an amount with cents, or a dashed number."""
    kind = rng.randint(4)
    if kind < 2:
        digits = rng.randint(3, 7)
        return str(rng.randint(10 ** (digits - 1), 10**digits))
    if kind == 2:
        return f"{rng.randint(1, 1000)}.{rng.randint(100):02d}"
    return f"{rng.randint(10, 100)}-{rng.randint(10, 1000)}"


def _draw_label(rng: np.random.RandomState) -> str:
    """A label of 2 to 6 capitals: a word, or, as often, random letters."""
    if rng.randint(2):
        return LABELS[rng.randint(len(LABELS))]
    return "".join(CHARS[letter] for letter in rng.randint(0, 26, size=rng.randint(3, 6)))


def _paint(rng: np.random.RandomState, cells: np.ndarray) -> np.ndarray:
    """Paints glyph numbers ``[GRID, GRID]`` as uint8 ``[SIZE, SIZE, 3]``: font, jitter, ink, paper, rules and noise."""
    jitter = rng.randint(0, 9, size=(GRID, GRID))
    tiles = load_glyphs()[rng.randint(len(FONTS)), jitter, cells]  # [GRID, GRID, CELL, CELL]
    ink = tiles.transpose(0, 2, 1, 3).reshape(SIZE, SIZE, 1)
    paper_colour = rng.randint(200, 256, size=3)
    ink_colour = rng.randint(0, 100, size=3)
    if rng.randint(8) == 0:  # light on dark
        paper_colour, ink_colour = ink_colour, paper_colour
    picture = paper_colour + (ink_colour - paper_colour) * ink // 255
    if rng.randint(2):  # faint rules between the lines
        picture[CELL - 1 :: CELL] += (ink_colour - paper_colour) // 6
    spread = rng.randint(0, 25)
    picture += rng.randint(-spread, spread + 1, size=(SIZE, SIZE, 1))
    pixels: np.ndarray = picture.clip(0, 255).astype(np.uint8)
    return pixels


def make_document(seed: int) -> Document:
    """Makes the document of ``seed`` (0 to 2**32 - 1)."""
    rng = np.random.RandomState(seed)
    value_rows, word_rows = rng.randint(3, 7), rng.randint(1, 3)
    rows = np.sort(rng.permutation(GRID)[: value_rows + word_rows])
    kinds = rng.permutation(value_rows + word_rows) < value_rows
    margin, layout = rng.randint(3), rng.randint(3)

    cells = np.zeros((GRID, GRID), dtype=np.uint8)
    lines: dict[int, str] = {}
    values: dict[str, str] = {}

    def write(row: int, column: int, text: str) -> None:
        for offset, char in enumerate(text):
            cells[row, column + offset] = CHARS.index(char) + 1

    for row, is_value in zip(rows.tolist(), kinds, strict=True):
        if is_value:
            label = _draw_label(rng)
            while label in values:
                label = _draw_label(rng)
            value = _draw_value(rng)
            values[label] = value
            # The value follows the label, or starts in one column, or ends in one column.
            column = (margin + len(label) + 1, margin + 7, GRID - margin - len(value))[layout]
            write(row, margin, label)
            write(row, column, value)
            lines[row + 1] = f"{label} {value}"
        else:
            words = [WORDS[word] for word in rng.randint(0, len(WORDS), size=rng.randint(1, 3))]
            write(row, margin, words[0])
            if len(words) > 1:
                write(row, margin + len(words[0]) + 1, words[1])
            lines[row + 1] = " ".join(words)
    return Document(seed, _paint(rng, cells), cells, lines, values)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a demo document, or the glyph atlas.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the picture (png)")
    parser.add_argument("--make-atlas", action="store_true", help=f"render {ATLAS.name} anew")
    args = parser.parse_args()
    if args.make_atlas:
        render_atlas().save(ATLAS, optimize=True)
        return
    document = make_document(args.seed)
    if args.out:
        document.pil_image().save(args.out, optimize=True)
    for item in document.questions():
        print(f"{item.task:10s} {item.question!r} -> {item.answer!r}")


if __name__ == "__main__":
    main()
