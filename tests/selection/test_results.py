from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from edge_shiftkv import ImageSpan, Runtime, Selection, ShiftKV
from edge_shiftkv.native.mtmd import ImageChunk, Text, TextChunk
from edge_shiftkv.prompts.prompt import Prompt
from edge_shiftkv.selection.results import guess_grid

PROMPT = "What is on the picture? " * 3


@pytest.fixture
def selection():
    kept = {4: np.array([[0, 3, 5], [3, 4, 5]], np.int32), 2: np.array([[1, 3, 5], [2, 3, 5]], np.int32)}
    return Selection(kept, 6, [ImageSpan(0, 1, 3, 2, 1), ImageSpan(1, 4, 5, 1, 1), ImageSpan(1, 3, 4, 1, 1)])


def test_what_was_kept(selection):
    assert selection.layers == (2, 4)
    assert (selection.n_prompt, selection.n_kept, selection.n_heads) == (6, 3, 4)
    assert selection.kept(4, 1).tolist() == [3, 4, 5]
    assert selection.counts().tolist() == [1, 1, 1, 4, 1, 4]
    assert selection.image_counts(0).tolist() == [1, 1]
    assert selection.image_counts(1).tolist() == [1, 4]


def test_what_is_not_there(selection):
    with pytest.raises(KeyError):
        selection.kept(3, 0)
    with pytest.raises(IndexError):
        selection.kept(4, 2)
    with pytest.raises(IndexError, match="no image 2"):
        selection.image_counts(2)


@pytest.mark.parametrize(
    ("n_tokens", "size", "grid"),
    [
        (576, (640, 480), (24, 24)),
        (2, (300, 100), (2, 1)),
        (2, (100, 300), (1, 2)),
        (6, (300, 200), (3, 2)),
        (12, (100, 300), (2, 6)),
        (7, (100, 200), (1, 7)),
    ],
)
def test_grids_of_models_that_do_not_tell(n_tokens, size, grid):
    assert guess_grid(n_tokens, *size) == grid


def test_a_request_says_what_it_kept(runtime, tiny):
    runtime.kv_budget = 24
    selection = runtime.generate(PROMPT, [tiny.picture], max_tokens=1).selection
    assert selection.layers == (0, 1, 2)
    assert selection.n_heads == 6
    for layer in selection.layers:
        for head in range(2):
            kept = selection.kept(layer, head)
            assert kept.dtype == np.int32
            assert len(kept) == 24
            assert (np.diff(kept) > 0).all()
            assert kept[-1] == selection.n_prompt - 1
    assert selection.counts().sum() == 6 * 24
    (span,) = selection.image_spans
    assert (span.nx, span.ny, span.stop - span.start) == (4, 4, 16)
    assert (selection.image_counts(0) == selection.counts()[span.start : span.stop]).all()


def test_the_seed_decides_what_is_kept(tiny):
    def kept(seed):
        with Runtime(tiny.text, n_threads=1, kv_budget=24, kv_method=ShiftKV(seed=seed)) as runtime:
            return runtime.generate(PROMPT, max_tokens=1).selection.kept(2, 0).tolist()

    assert kept(1) == kept(1)
    assert len({tuple(kept(seed)) for seed in range(4)}) > 1


def test_m_rope_models_tell_their_grid(tiny):
    with Runtime(tiny.qwen_text, tiny.qwen_mmproj, n_threads=1, kv_budget=20) as runtime:
        selection = runtime.generate(PROMPT, [tiny.picture, tiny.picture], max_tokens=1).selection
    first, second = selection.image_spans
    assert (first.nx, first.ny) == (5, 3)  # 150 x 90 pixels, 28 x 28 a token
    assert (second.image, second.stop - second.start) == (1, 15)
    assert second.start > first.stop


def test_a_tiled_picture_has_a_span_for_each_tile(tiny):
    with Runtime(tiny.text, tiny.tiled_mmproj, n_threads=1, kv_budget=20) as runtime:
        selection = runtime.generate(PROMPT, [tiny.picture], max_tokens=1).selection
    assert [span.image for span in selection.image_spans] == [0] * 5
    assert selection.image_counts(0).shape == (5 * 16,)


@pytest.mark.parametrize(("size", "grid"), [((100, 300), (2, 6)), ((300, 100), (6, 2))])
def test_grids_have_the_shape_of_their_picture(size, grid):
    """Twelve tokens whose rows mtmd does not tell, between text; and a picture whose rows it does."""
    pictures = [Image.new("RGB", size), Image.new("RGB", size)]
    chunks = [TextChunk([1, 9]), ImageChunk(0, 12, 12, 1, 0), ImageChunk(1, 8, 4, 2, 0), TextChunk([9])]
    projector = SimpleNamespace(tokenize=lambda parts: SimpleNamespace(items=chunks, close=lambda: None))
    # Token 9 stands in for the text around the pictures.
    model = SimpleNamespace(control_tokens={}, tokenize=lambda text: {"x": [7], "y": [8]}.get(text, [9]))
    prompt = Prompt([Text("x"), *pictures, Text("y")], model, projector)
    assert prompt.items[:2] == [1, 7]
    assert prompt.items[-1] == 8
    assert prompt.image_spans == [ImageSpan(0, 2, 14, *grid), ImageSpan(1, 14, 22, 4, 2)]
    assert (prompt.n_tokens, prompt.n_image_tokens) == (23, 20)


def test_layers_may_have_different_numbers_of_heads():
    kept = {0: np.array([[0, 2]], np.int32), 3: np.array([[0, 2], [1, 2], [0, 2]], np.int32)}
    selection = Selection(kept, 3, [ImageSpan(0, 0, 2, 2, 1)])
    assert (selection.n_heads, selection.n_kept, selection.layers) == (4, 2, (0, 3))
    assert selection.counts().tolist() == [3, 1, 4]
    assert selection.image_counts(0).tolist() == [3, 1]
