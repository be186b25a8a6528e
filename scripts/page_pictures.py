"""Pictures of pages: one character a cell, in many typefaces, as a camera or a scanner might see them.

A page of n x n cells is a picture of 14 n pixels a side. Its text is drawn at twice the size from an atlas of glyphs,
then turned, sheared, scaled and blurred a little, halved, and put in ink on paper with noise. No corner moves further
than about a third of a cell, so that a patch of 14 pixels still sees its character.

Everything follows from the random stream that is passed in, numpy's frozen ``RandomState``. Needs numpy and pillow.

``python scripts/page_pictures.py --fonts FOLDER`` renders ``models/page-reader/glyphs.png`` anew from font files.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from edge_shiftkv.page_reader import CELL, CHARS

LINE_BREAK = len(CHARS)  # the number that the last cell of a row is read as
ATLAS = Path(__file__).resolve().parent.parent / "models" / "page-reader" / "glyphs.png"
_TILE = 2 * CELL  # pixels a side of a glyph in the atlas
_SHIFTS = tuple((dy, dx) for dy in (-2, -1, 0, 1, 2) for dx in (-2, -1, 0, 1, 2))

# (font file, size in pixels): a row of the atlas each. The Debian packages and licences are in models/page-reader.
TRAINED = (
    ("DejaVuSansMono.ttf", 24),
    ("DejaVuSansMono-Bold.ttf", 23),
    ("DejaVuSansMono-Oblique.ttf", 24),
    ("Cousine-Regular.ttf", 25),
    ("Cousine-Bold.ttf", 25),
    ("Cousine-Italic.ttf", 24),
    ("Hack-Regular.ttf", 23),
    ("FiraCode-Regular.ttf", 22),
    ("FiraCode-Light.ttf", 22),
    ("FiraCode-SemiBold.ttf", 21),
    ("JetBrainsMono-Regular.ttf", 22),
    ("JetBrainsMono-ExtraBold.ttf", 22),
    ("Anonymous Pro.ttf", 25),
    ("Anonymous Pro B.ttf", 25),
    ("Go-Mono.ttf", 23),
    ("Go-Mono-Bold.ttf", 23),
    ("B612Mono-Regular.otf", 21),
    ("agave-r-autohinted.ttf", 25),
    ("mononoki-Regular.ttf", 24),
    ("mononoki-Bold.ttf", 22),
    ("NotoSansMono-Regular.ttf", 22),
    ("NotoSansMono-Bold.ttf", 22),
    ("lmmono10-regular.otf", 25),
    ("lmmonolt10-bold.otf", 25),
    ("Monoid-Regular.ttf", 17),
    ("DejaVuSans.ttf", 22),
    ("DejaVuSerif.ttf", 21),
)
HELD_OUT = (  # never trained on
    ("Inconsolata.otf", 25),
    ("OxygenMono-Regular.ttf", 23),
    ("FantasqueSansMono-Regular.ttf", 25),
    ("Courier Prime.otf", 25),
)
FONTS = TRAINED + HELD_OUT

Bytes = npt.NDArray[np.uint8]


def render_atlas(folder: Path) -> Image.Image:
    """The atlas of glyphs: a row of tiles a font, a tile a character, all on one baseline, a free pixel around."""
    atlas = Image.new("L", (len(CHARS) * _TILE, len(FONTS) * _TILE))
    for row, (name, size) in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / name), size)
        for column, char in enumerate(CHARS):
            tile = Image.new("L", (_TILE - 2, _TILE - 2))
            ImageDraw.Draw(tile).text(((_TILE - 2) / 2, _TILE - 9), char, fill=255, font=font, anchor="ms")
            atlas.paste(tile, (column * _TILE + 1, row * _TILE + 1))
    return atlas


@functools.lru_cache(maxsize=1)
def _glyphs() -> Bytes:
    """Ink of every glyph under every shift, [fonts, shifts, characters, _TILE, _TILE]."""
    with Image.open(ATLAS) as picture:
        sheet = np.asarray(picture.convert("L"))
    tiles = sheet.reshape(len(FONTS), _TILE, len(CHARS), _TILE).transpose(0, 2, 1, 3)
    return np.stack([np.roll(tiles, shift, axis=(2, 3)) for shift in _SHIFTS], axis=1)


def numbers(lines: list[str], n_cells: int) -> Bytes:
    """The characters' numbers in each cell, [n_cells, n_cells]; the last cell of a line stays free.

    Raises ValueError for text that does not fit, or characters that are not printable ASCII.
    """
    if len(lines) > n_cells:
        raise ValueError(f"{len(lines)} lines do not fit on {n_cells}")
    cells = np.zeros((n_cells, n_cells), np.uint8)
    for row, line in enumerate(lines):
        if len(line) >= n_cells:
            raise ValueError(f"line {line!r} is longer than {n_cells - 1} characters")
        cells[row, : len(line)] = [CHARS.index(char) for char in line]
    return cells


def paint(rng: np.random.RandomState, cells: Bytes, fonts: range = range(len(TRAINED))) -> Bytes:
    """A picture of the cells' characters, [14 n, 14 n, 3], in one of the typefaces, by their numbers in FONTS."""
    n = len(cells)
    side = n * _TILE
    font = fonts[rng.randint(len(fonts))]
    shifts = _line_shifts(rng, n)
    tiles = _glyphs()[font, shifts, cells]  # [n, n, _TILE, _TILE]
    ink = Image.fromarray(np.ascontiguousarray(tiles.transpose(0, 2, 1, 3).reshape(side, side)))
    ink = ink.transform((side, side), Image.Transform.AFFINE, _affine(rng, side), Image.Resampling.BILINEAR)
    if rng.randint(2):
        ink = ink.filter(ImageFilter.GaussianBlur(rng.randint(4, 16) / 10))
    share = np.asarray(ink.reduce(2), np.float32)[..., None] / 255

    paper, colour = rng.randint(165, 256, size=3), rng.randint(0, 110, size=3)
    if rng.randint(10) == 0:  # light on dark
        paper, colour = colour, paper
    picture = paper + (colour - paper) * share
    if rng.randint(4) == 0:  # ruled
        picture[CELL - 1 :: CELL] += (colour - paper) / 6
    across, down = rng.randint(-14, 15, size=2)
    ramp = np.linspace(-1, 1, n * CELL, dtype=np.float32)
    picture += (across * ramp[None, :] + down * ramp[:, None])[..., None]  # uneven light
    spread = rng.randint(0, 20)
    picture += rng.randint(-spread, spread + 1, size=(n * CELL, n * CELL, 1))
    pixels: Bytes = picture.clip(0, 255).astype(np.uint8)
    return pixels


def _line_shifts(rng: np.random.RandomState, n: int) -> npt.NDArray[np.int64]:
    """Numbers of shifts, [n, n]: a line as a whole, or on one page in four every character by itself."""
    if rng.randint(4):
        return np.broadcast_to(rng.randint(0, len(_SHIFTS), size=(n, 1)), (n, n))
    return np.asarray(rng.randint(0, len(_SHIFTS), size=(n, n)))


def _affine(rng: np.random.RandomState, side: int) -> tuple[float, ...]:
    """Where a pixel comes from: turned, sheared and scaled by up to 1.2 pixels at the edges, and moved by up to 1."""
    turn, shear, wide, high = rng.randint(-100, 101, size=4) / 100 * 2.4 / (side / 2)
    right, down = rng.randint(-20, 21, size=2) / 10
    middle = side / 2
    a, b, c, d = 1 + wide, shear - turn, turn, 1 + high
    return (a, b, middle - a * middle - b * middle + right, c, d, middle - c * middle - d * middle + down)


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Render {ATLAS.name} anew.")
    parser.add_argument("--fonts", type=Path, required=True, help="folder with the font files")
    render_atlas(parser.parse_args().fonts).save(ATLAS, optimize=True)


if __name__ == "__main__":
    main()
