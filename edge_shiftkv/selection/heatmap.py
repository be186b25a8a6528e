"""A picture of what a selection kept of a prompt's pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from edge_shiftkv.errors import ShiftKVError
from edge_shiftkv.selection.results import ImageSpan, Selection, guess_grid

_PANEL = 640  # pixels of a panel's longer side
_COLUMNS, _MIN_WIDTH = 3, 480
_MARGIN, _BAR, _TICK, _TITLE, _LABEL = 24, 28, 11, 26, 18
_INK, _PAPER, _GRID = (38, 38, 38), (255, 255, 255), (214, 208, 200)
# From none (paper) to most; the darkest still lets black text show through.
_COLOURS = np.array([[255, 255, 255], [255, 232, 190], [253, 190, 110], [244, 124, 70], [214, 62, 52]], float)


@dataclass(frozen=True)
class PatchMap:
    """How many (layer, KV head) pairs kept each patch of a picture.

    image: which picture of the prompt, from 0.
    part: "picture"; of a picture in tiles (LLaVA-1.6) "tiles", put together, or "overview".
    counts: shape [rows, columns].
    padded: whether the picture was padded on both sides to the shape of its patches; else they cover just the picture.
    """

    image: int
    part: str
    counts: npt.NDArray[np.int32]
    padded: bool


def patch_maps(selection: Selection, sizes: Sequence[tuple[int, int]]) -> list[PatchMap]:
    """The maps of a prompt's pictures, in their order; see `heatmap`, which draws them.

    sizes: the pictures' width and height, as `load_image` returns them.

    Raises ShiftKVError when the prompt had another number of pictures, or none.
    """
    n_images = len({span.image for span in selection.image_spans})
    if not n_images or n_images != len(sizes):
        raise ShiftKVError(f"the prompt had {n_images} pictures, {len(sizes)} were passed: there is nothing to draw")
    return [found for i, size in enumerate(sizes) for found in _maps(selection, i, size)]


def heatmap(selection: Selection, images: Sequence[Image.Image]) -> Image.Image:
    """Draw each picture of the prompt with every patch shaded by how many (layer, KV head) pairs kept it.

    images: the prompt's pictures as `load_image` returns them, in their order.

    Where a picture's shape is not the patches', it is taken to have been padded on both sides, as mtmd does for LLaVA.
    A tiled picture (LLaVA-1.6) gives two panels: its tiles put together, and its overview, which mtmd stretches.

    Raises ShiftKVError when the prompt had another number of pictures, or none.
    """
    maps = patch_maps(selection, [image.size for image in images])
    top = max(1, *(int(one.counts.max()) for one in maps))
    tiles = [(_label(one), _draw(one, images[one.image], top)) for one in maps]
    rows = [tiles[i : i + _COLUMNS] for i in range(0, len(tiles), _COLUMNS)]

    row_heights = [_LABEL + 8 + max(tile.height for _, tile in row) + _MARGIN for row in rows]
    width = max(_MIN_WIDTH, *(sum(tile.width + _MARGIN for _, tile in row) for row in rows))
    bar_width = _BAR + _TICK + _font(_LABEL).getlength(str(top)) + _MARGIN
    size = (_MARGIN + width + round(bar_width), _TITLE + 4 * _MARGIN + sum(row_heights))
    sheet = Image.new("RGB", size, _PAPER)
    _write(sheet, _MARGIN, _MARGIN, f"KV budget {selection.n_kept} of {selection.n_prompt} prompt tokens", _TITLE)
    y = _TITLE + 2 * _MARGIN
    for row, row_height in zip(rows, row_heights, strict=True):
        x = _MARGIN
        for label, tile in row:
            _write(sheet, x, y, label, _LABEL, tile.width)
            sheet.paste(tile, (x, y + _LABEL + 8))
            x += tile.width + _MARGIN
        y += row_height
    _draw_bar(sheet, (_MARGIN + width, _TITLE + 2 * _MARGIN + _LABEL + 8), rows[0][0][1].height, top)
    _write(
        sheet, _MARGIN, y, f"shade: how many of the {selection.n_heads} (layer, KV head) pairs kept the patch", _LABEL
    )
    return sheet


def _maps(selection: Selection, image: int, size: tuple[int, int]) -> list[PatchMap]:
    counts = selection.counts()
    spans = [span for span in selection.image_spans if span.image == image]
    width, height = size
    if len(spans) == 1:
        grid = _grid(counts, spans[0])
        # A grid as close to the picture's shape as whole patches allow (Qwen2-VL) covers it all.
        rows, columns = grid.shape
        return [PatchMap(image, "picture", grid, padded=abs(columns - rows * width / height) > 1)]
    *tiles, overview = spans
    columns, rows = guess_grid(len(tiles), width, height)
    mosaic = np.block([[_grid(counts, tiles[y * columns + x]) for x in range(columns)] for y in range(rows)])
    return [
        PatchMap(image, "tiles", mosaic, padded=True),
        PatchMap(image, "overview", _grid(counts, overview), padded=False),
    ]


def _grid(counts: npt.NDArray[np.int32], span: ImageSpan) -> npt.NDArray[np.int32]:
    return counts[span.start : span.stop].reshape(span.ny, span.nx)


def _label(one: PatchMap) -> str:
    rows, columns = one.counts.shape
    part = "" if one.part == "picture" else f", {one.part}"
    return f"image {one.image + 1}: {columns} x {rows} patches{part}"


def _draw(one: PatchMap, image: Image.Image, top: int) -> Image.Image:
    """The picture in faint grey, its patches shaded on a scale from 0 to `top`."""
    scale = _PANEL / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    rows, columns = one.counts.shape
    # The patches' area in pixels of the panel: larger than the panel where the picture was padded.
    side = max(width / columns, height / rows)
    area = (round(side * columns), round(side * rows)) if one.padded else (width, height)
    left, upper = (area[0] - width) // 2, (area[1] - height) // 2
    xs = (np.arange(left, left + width) * columns) // area[0]
    ys = (np.arange(upper, upper + height) * rows) // area[1]

    grey = image.convert("L").resize((width, height), Image.Resampling.LANCZOS)
    light = 0.35 + 0.65 * np.asarray(grey, float)[..., None] / 255
    shade = _colour(one.counts / top)[ys[:, None], xs[None, :]]
    pixels = shade * light
    if side >= 12:  # borders only where they leave something between them
        pixels[(np.diff(ys, prepend=ys[0]) > 0), :] = _GRID
        pixels[:, (np.diff(xs, prepend=xs[0]) > 0)] = _GRID
    tile = Image.fromarray(pixels.astype(np.uint8))
    ImageDraw.Draw(tile).rectangle((0, 0, width - 1, height - 1), outline=_INK)
    return tile


def _draw_bar(sheet: Image.Image, at: tuple[int, int], height: int, top: int) -> None:
    """The colour scale with numbers, upwards from 0."""
    x, y = at
    values = np.linspace(1, 0, height)[:, None].repeat(_BAR, axis=1)
    sheet.paste(Image.fromarray(_colour(values).astype(np.uint8)), (x, y))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((x, y, x + _BAR - 1, y + height - 1), outline=_INK)
    for value in range(0, top + 1, math.ceil(top / 8)):
        level = y + round((height - 1) * (1 - value / top))
        draw.line((x + _BAR, level, x + _BAR + _TICK - 5, level), _INK)
        draw.text((x + _BAR + _TICK, level), str(value), _INK, _font(_LABEL), anchor="lm")


def _colour(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values in [0, 1], any shape, to RGB in [0, 255], shape [..., 3]."""
    stops = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(values, stops, channel) for channel in _COLOURS.T], axis=-1)


def _write(sheet: Image.Image, x: int, y: int, text: str, size: int, width: int | None = None) -> None:
    """Write at (x, y), shortened to `width` pixels or else to what the sheet has."""
    width = width or sheet.width - x - _MARGIN
    shown = text
    while len(shown) > 3 and _font(size).getlength(shown) > width:
        shown = f"{shown[:-4]}..."
    ImageDraw.Draw(sheet).text((x, y), shown, _INK, _font(size))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
