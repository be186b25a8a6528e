"""Products with weights that are packed for several columns: what they give, and that the number of columns, threads
and the CPU's instructions change no bit of it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from support import ggml_graph
from support.ggml_graph import Weights
from support.gguf_random import Spec, write_model

SCALES = {
    **{Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,), Kind.IQ4_NL: (0,)},
    **{Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)},
    Kind.IQ4_XS: (0,),
}
"""Where a block's float16 factors are, by type."""

SMALL = [kind for kind in SCALES if gguf.GGML_QUANT_SIZES[kind][0] == 32]
"""Types of blocks of 32 values; the others' have 256."""

SHAPES = [(16, 256), (48, 512), (1536, 256), (16, 8960), (32, 1536)]

types = pytest.mark.parametrize("kind", SCALES, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def columns_type() -> Iterator[int]:
    found = ggml_graph.cpu_buffer_type("CPU_COLUMNS")
    if not ggml_graph.has_avx2():
        pytest.skip("there are kernels for AVX2 and AVX-512")
    assert found
    yield found


def random_rows(kind: Kind, n_rows: int, n_values: int, factors: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows of blocks in which all bits are random, with factors taken from these."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n_rows, n_values // block, size), np.uint8)
    for at in SCALES[kind]:
        chosen = rng.choice(factors.astype(np.float16), blocks.shape[:2])
        blocks[..., at : at + 2] = chosen[..., None].view(np.uint8)
    return blocks.reshape(n_rows, -1)


def shapes(kind: Kind) -> list[tuple[int, int]]:
    return SHAPES + [(16, 32), (48, 96), (32, 576)] * (kind in SMALL)


def real_columns(n: int, n_values: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, n_values)).astype(np.float32)


@types
def test_integers(kind: Kind, columns_type: int) -> None:
    """Where no step has to be rounded, the product is that of whole numbers."""
    for n_rows, n_values in shapes(kind):
        rows = random_rows(kind, n_rows, n_values, np.array([1.0, 0.5, -1.0]))
        rng = np.random.default_rng(n_values)
        # 127 in each block: it is rounded to whole numbers.
        blocks = rng.integers(-5, 6, (7, n_values // 32, 32)).astype(np.float32)
        blocks[..., 3] = rng.choice([-127.0, 127.0], blocks.shape[:2])
        columns = blocks.reshape(7, n_values)
        exact = columns.astype(np.float64) @ gguf.quants.dequantize(rows, kind).astype(np.float64).T
        assert np.abs(exact).max() < 1 << 23
        with closing(Weights(kind, rows, columns_type)) as weights:
            assert np.array_equal(weights.multiply(columns), exact)


@types
def test_extremes(kind: Kind, columns_type: int) -> None:
    """All bits set, or none but the highest of each byte, times the largest numbers of a column."""
    n_values = 256
    _, size = gguf.GGML_QUANT_SIZES[kind]
    columns = np.full((3, n_values), 127.0, np.float32) * np.array([[1.0], [-1.0], [1.0]], np.float32)
    columns[2, ::2] *= -1.0
    for byte in (0xFF, 0x80, 0x7F, 0x00):
        rows = np.full((16, n_values // gguf.GGML_QUANT_SIZES[kind][0], size), byte, np.uint8)
        for at in SCALES[kind]:
            rows[..., at : at + 2] = np.full(1, 2.0**-8, np.float16).view(np.uint8)
        rows = rows.reshape(16, -1)
        exact = columns.astype(np.float64) @ gguf.quants.dequantize(rows, kind).astype(np.float64).T
        with closing(Weights(kind, rows, columns_type)) as weights:
            assert np.array_equal(weights.multiply(columns), exact)


@types
def test_real_numbers(kind: Kind, columns_type: int) -> None:
    """Up to the rounding of sums, what llama.cpp's own kernel for one column gives, and near the true product."""
    plain_type = ggml_graph.cpu_buffer_type(None)
    assert plain_type
    for n_rows, n_values in shapes(kind):
        rows = random_rows(kind, n_rows, n_values, np.random.default_rng(2).normal(size=64) / 100)
        columns = real_columns(4, n_values)
        columns[3] = 0.0
        columns[2, :32] = 0.0
        matrix = gguf.quants.dequantize(rows, kind).astype(np.float64)
        with closing(Weights(kind, rows, columns_type)) as weights, closing(Weights(kind, rows, plain_type)) as plain:
            ours = weights.multiply(columns)
            theirs = np.concatenate([plain.multiply(columns[i : i + 1]) for i in range(len(columns))])
        size = np.abs(columns).astype(np.float64) @ np.abs(matrix).T
        assert not ours[3].any()
        # llama.cpp rounds the sum that these types' minimums are multiplied with to float16.
        rounding = 2.0**-11 if kind in (Kind.Q4_1, Kind.Q5_1) else 1e-6
        assert np.abs(ours - theirs).max() <= rounding * size.max()
        assert np.abs(ours - columns @ matrix.T).max() <= 5e-3 * size.max()


@types
@pytest.mark.parametrize("n_rows, n_values", [(48, 512), (16, 8960), (256, 256)])
def test_the_number_of_columns_changes_no_bit(kind: Kind, n_rows: int, n_values: int, columns_type: int) -> None:
    rows = random_rows(kind, n_rows, n_values, np.random.default_rng(3).normal(size=64))
    columns = real_columns(33, n_values)
    with closing(Weights(kind, rows, columns_type)) as weights:
        alone = np.concatenate([weights.multiply(columns[i : i + 1]) for i in range(len(columns))])
        for n in [*range(2, 18), 33]:
            first = 33 - n
            for begin in {0, first // 2, first}:
                together = weights.multiply(columns[begin : begin + n], n_threads=1 + n % 3)
                assert together.tobytes() == alone[begin : begin + n].tobytes(), (n, begin)
        in_planes = weights.multiply(columns[:30].reshape(5, 6, n_values), 2)
        assert in_planes.tobytes() == alone[:30].tobytes()


@types
def test_threads_change_no_bit(kind: Kind, columns_type: int) -> None:
    rows = random_rows(kind, 400, 512, np.random.default_rng(4).normal(size=64))
    columns = real_columns(19, 512)
    with closing(Weights(kind, rows, columns_type)) as weights:
        alone = weights.multiply(columns)
        for n_threads in range(2, 9):
            assert weights.multiply(columns, n_threads).tobytes() == alone.tobytes()


@types
def test_instructions_change_no_bit(kind: Kind, columns_type: int) -> None:
    """The kernels for this CPU and the ones in plain C++, which take each column by itself."""
    for n_rows, n_values in shapes(kind):
        rows = random_rows(kind, n_rows, n_values, np.random.default_rng(5).normal(size=64))
        columns = real_columns(9, n_values)
        with closing(Weights(kind, rows, columns_type)) as weights:
            reference = weights.multiply(columns, 2, reference=True)
            assert weights.multiply(columns, 2).tobytes() == reference.tobytes()


@types
def test_weights_take_the_bytes_they_took(kind: Kind, columns_type: int) -> None:
    rows = random_rows(kind, 64, 768, np.ones(1))
    with closing(Weights(kind, rows, columns_type)) as weights:
        assert rows.nbytes <= weights.buffer_size < rows.nbytes + 128


@pytest.mark.parametrize(
    "kind, shape, taken",
    [
        (Kind.Q4_K, (256, 48), True),
        (Kind.Q4_K, (256, 40), False),
        (Kind.Q4_K, (256, 16, 4), False),
        (Kind.IQ3_S, (256, 48), False),
        (Kind.F16, (256, 48), False),
        (Kind.Q8_0, (32, 16), True),
        (Kind.Q8_0, (32, 8), False),
    ],
)
def test_what_is_taken(kind: Kind, shape: tuple[int, ...], taken: bool, columns_type: int) -> None:
    """What is not goes where it went before."""
    assert ggml_graph.supports(kind, shape, columns_type) == taken
    assert not ggml_graph.supports(kind, shape, columns_type, look_up=True)


def test_a_pass_over_several_tokens_gives_the_bits_of_single_ones(columns_type: int, tmp_path: Path) -> None:
    """Of a whole model, also of more tokens than a draft has."""
    if ggml_graph.cpu_buffer_type("AMX"):
        pytest.skip("on CPUs with AMX its kernels come first")
    plain = write_model(Spec(n_embd=512, n_ff=1024), tmp_path)
    path = tmp_path / "q4_k.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    assert not llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(settings))
    n_read = 20
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, flash_attn=True, logits_all=True, verbose=False)
    tokens = [int(token) for token in np.random.default_rng(6).integers(3, model.n_vocab(), n_read + 33)]
    model.eval(tokens[:n_read])
    for token in tokens[n_read:]:
        model.eval([token])
    alone = model.scores[n_read : len(tokens)].copy()
    assert len(np.unique(alone.argmax(axis=1))) > 1
    for n in (2, 3, 4, 5, 8, 13, 16, 33):
        model.n_tokens = n_read
        model.eval(tokens[n_read : n_read + n])
        assert model.scores[n_read : n_read + n].tobytes() == alone[:n].tobytes(), n
