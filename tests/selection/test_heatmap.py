import numpy as np
import pytest
from PIL import Image

from edge_shiftkv import ImageSpan, Runtime, Selection, ShiftKVError, heatmap

RED = (214, 62, 52)


def selection_of(kept, spans, n_prompt=100):
    return Selection({0: np.array([kept], np.int32)}, n_prompt, spans)


def panel(sheet, width=640, height=640):
    """The pixels of the first panel, which stands below title and label."""
    return np.asarray(sheet)[100 : 100 + height, 24 : 24 + width]


def test_a_patch_that_was_kept_is_red():
    # 2 x 2 patches from token 10 on; token 12 is the lower left one.
    sheet = heatmap(selection_of([12, 99], [ImageSpan(0, 10, 14, 2, 2)]), [Image.new("RGB", (64, 64), "white")])
    pixels = panel(sheet)
    assert tuple(pixels[480, 160]) == RED
    for y, x in ((160, 160), (160, 480), (480, 480)):
        assert tuple(pixels[y, x]) == (255, 255, 255)


def test_the_picture_is_faintly_there():
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (0, 0, 32, 64))
    pixels = panel(heatmap(selection_of([99], [ImageSpan(0, 10, 14, 2, 2)]), [image]))
    assert 60 < pixels[160, 100].mean() < 120
    assert pixels[160, 540].mean() == 255


def test_a_picture_that_was_padded_to_a_square():
    # 200 x 100 pixels: of 4 x 4 patches, the upper and the lower row saw padding only.
    kept = [10 + 4 * row + column for row in (0, 3) for column in range(4)]
    sheet = heatmap(selection_of([*kept, 99], [ImageSpan(0, 10, 26, 4, 4)]), [Image.new("RGB", (200, 100), "white")])
    inside = panel(sheet, 640, 320)[4:-4, 4:-4]
    assert tuple(inside[40, 40]) == (255, 255, 255)
    assert not (inside == RED).all(axis=-1).any()


def test_a_grid_of_the_pictures_shape_covers_it():
    sheet = heatmap(selection_of([10, 99], [ImageSpan(0, 10, 18, 4, 2)]), [Image.new("RGB", (205, 100), "white")])
    assert tuple(panel(sheet)[50, 50]) == RED


def test_one_panel_for_each_picture_three_in_a_row():
    spans = [ImageSpan(i, 10 * i, 10 * i + 4, 2, 2) for i in range(4)]
    images = [Image.new("RGB", (64, 64)), *[Image.new("RGB", (20, 64))] * 3]
    sheets = [heatmap(selection_of([10, 99], spans[:n]), images[:n]) for n in range(1, 5)]
    widths, heights = ([sheet.size[axis] for sheet in sheets] for axis in (0, 1))
    assert np.diff(widths).tolist() == [200 + 24, 200 + 24, 0]
    assert np.diff(heights).tolist() == [0, 0, 640 + 50]


@pytest.mark.parametrize("n_images", [0, 2])
def test_the_wrong_number_of_pictures(n_images):
    with pytest.raises(ShiftKVError, match=f"had 1 pictures, {n_images} were passed"):
        heatmap(selection_of([10, 99], [ImageSpan(0, 10, 14, 2, 2)]), [Image.new("RGB", (64, 64))] * n_images)


def test_a_prompt_without_pictures():
    with pytest.raises(ShiftKVError, match="had 0 pictures"):
        heatmap(selection_of([10, 99], []), [])


def test_a_tiled_picture_has_its_tiles_and_its_overview(tiny):
    with Runtime(tiny.text, tiny.tiled_mmproj, n_threads=1, kv_budget=20) as runtime:
        selection = runtime.generate("What is it?", [tiny.picture], max_tokens=1).selection
    image = Image.open(tiny.picture)
    whole = heatmap(selection_of([99], [ImageSpan(0, 10, 14, 2, 2)]), [image])
    assert heatmap(selection, [image]).width == whole.width + 640 + 24


def test_each_picture_is_shaded_by_what_was_kept_of_it():
    # 2 x 2 patches each: the upper left one of the first picture, the lower right one of the second, all of the third.
    spans = [ImageSpan(i, 10 * (i + 1), 10 * (i + 1) + 4, 2, 2) for i in range(3)]
    sheet = heatmap(selection_of([10, 23, 30, 31, 32, 33, 99], spans), [Image.new("RGB", (64, 64), "white")] * 3)
    corners = [(160, 160), (160, 480), (480, 160), (480, 480)]
    shaded = [[tuple(np.asarray(sheet)[100 + y, 24 + i * (640 + 24) + x]) == RED for y, x in corners] for i in range(3)]
    assert shaded == [[True, False, False, False], [False, False, False, True], [True] * 4]


def test_the_shade_grows_with_the_number_of_heads_that_kept_a_patch():
    # Five heads of one layer; patch 0 was kept by all of them, 1 by three, 2 by one, 3 by none.
    kept = np.array([[10, 11, 12], [10, 11, 98], [10, 11, 98], [10, 97, 98], [10, 97, 98]], np.int32)
    span = ImageSpan(0, 10, 14, 2, 2)
    sheet = heatmap(Selection({3: kept}, 100, [span]), [Image.new("RGB", (64, 64), "white")])
    blue = [int(panel(sheet)[y, x][2]) for y, x in ((160, 160), (160, 480), (480, 160), (480, 480))]
    assert blue[0] == RED[2]
    assert blue[0] < blue[1] < blue[2] < blue[3] == 255


def test_tiles_are_put_together_row_by_row():
    """Three columns of two tiles with 2 x 2 patches each; of the fourth tile, the first of the lower row, one patch."""
    spans = [ImageSpan(0, 10 + 4 * i, 14 + 4 * i, 2, 2) for i in range(7)]
    kept = 10 + 4 * 3 + 1  # its upper right patch
    sheet = heatmap(selection_of([kept, 99], spans), [Image.new("RGB", (300, 200), "white")])
    # 6 x 4 patches on 640 x 427 pixels
    pixels = panel(sheet, 640, 427)
    red = {(y, x) for y in range(4) for x in range(6) if tuple(pixels[53 + 107 * y, 53 + 107 * x]) == RED}
    assert red == {(2, 1)}
