"""What a token gets does not depend on what is decoded with it, up to 17 tokens: not a bit of its logits.

On the CPU, whatever the weights, the KV cache and the architecture are, as long as there are no more threads than
heads.
"""

import ctypes
import logging
import re
from contextlib import closing

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from support import ggml_graph
from support.gguf_random import Spec, write_model

from edge_shiftkv.native.llama import Context, Model

pytestmark = pytest.mark.skipif(bool(ggml_graph.cpu_buffer_type("AMX")), reason="AMX's kernels are llama.cpp's own")

MOST = 17  # a draft of 16, and the token before it
FILE_TYPES = {  # enum llama_ftype
    **{"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "IQ4_NL": 25},
    **{"IQ4_XS": 30, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18},
}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma3": {"n_layer": 6, "meta": {"attention.sliding_window": 32}},
}
LONG = 600  # tokens before: attention over a cache of 512 and more is what llama.cpp splits
CASES = [
    *(("llama", file_type, "f16", 40) for file_type in FILE_TYPES),
    *((name, "Q4_K_M", type_kv, 40) for name in ARCHITECTURES for type_kv in ("f16", "q8_0")),
    *(("llama", "F16", type_kv, LONG) for type_kv in ("f16", "f32", "q8_0")),
    *((name, "Q4_K_M", "f16", LONG) for name in ARCHITECTURES),
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A function: the architecture and the file's type to the path of a model of random weights."""
    folder = tmp_path_factory.mktemp("models")

    def quantized(arch, file_type):
        path = folder / f"{arch}-{file_type}.gguf"
        if not path.exists():
            spec = Spec(arch, **{"n_layer": 2, "n_embd": 256, "d_head": 64, "n_ff": 512, **ARCHITECTURES[arch]})
            source = write_model(spec, folder)
            params = llama.llama_model_quantize_default_params()
            params.ftype, params.nthread = FILE_TYPES[file_type], 1
            assert llama.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)) == 0
        return path

    return quantized


@pytest.fixture(scope="module")
def load(quantized):
    """The same to the loaded model."""
    models = {}

    def load(arch, file_type):
        if (arch, file_type) not in models:
            models[arch, file_type] = Model(quantized(arch, file_type), 0)
        return models[arch, file_type]

    yield load
    for model in models.values():
        model.close()


def context(model, type_kv="f16", **options):
    settings = {"n_threads": 2, "n_outputs": MOST, **options}
    return closing(Context(model, 1024, 512, type_k=type_kv, type_v=type_kv, **settings))


def drawn(model, n, seed=0):
    return [int(token) for token in np.random.default_rng(seed).integers(3, model.n_vocab, n)]


def read(context, tokens):
    for start in range(0, len(tokens), 512):
        context.decode(tokens[start : start + 512], start)


@pytest.mark.parametrize(("arch", "file_type", "type_kv", "n_before"), CASES)
def test_passes_over_several_tokens(load, arch, file_type, type_kv, n_before):
    assert_nothing_depends_on_the_others(load(arch, file_type), type_kv, n_before)


@pytest.mark.parametrize("file_type", ["Q4_0", "Q8_0", "Q2_K", "Q4_K_M"])
def test_passes_with_weights_that_are_not_packed(quantized, file_type):
    with closing(Model(quantized("llama", file_type), 0, pack_weights=False)) as model:
        assert_nothing_depends_on_the_others(model, "f16", 40)


def test_weights_are_packed_or_not(quantized, caplog):
    """And a model says the same, up to rounding."""
    logits = []
    for pack_weights in (True, False):
        caplog.clear()
        with caplog.at_level(logging.INFO, "edge_shiftkv.llama_cpp"):
            model = Model(quantized("qwen2", "Q4_K_M"), 0, pack_weights=pack_weights)
        with closing(model):
            buffers = [re.search(r"(\S+) model buffer size", message) for message in caplog.messages]
            packed = {found[1] for found in buffers if found} - {"CPU", "CPU_Mapped"}
            assert bool(packed) == (pack_weights and bool(ggml_graph.has_avx2())), packed
            with context(model) as read_by:
                read(read_by, drawn(model, 40))
                logits.append(read_by.logits().copy())
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.05 * logits[0].std()


def assert_nothing_depends_on_the_others(model, type_kv, n_before):
    tokens = drawn(model, n_before + MOST)
    before, after = tokens[:n_before], tokens[n_before:]
    with context(model, type_kv) as one_by_one, context(model, type_kv) as together:
        read(one_by_one, before)
        read(together, before)
        expected = []
        for i, token in enumerate(after):
            one_by_one.decode([token], n_before + i)
            expected.append(one_by_one.logits().copy())
        assert len({logits.tobytes() for logits in expected}) == MOST
        for n in (2, 3, 5, 8, 11, MOST):
            if model.window:
                together.clear()
                read(together, before)
            else:
                together.remove(n_before)
            together.decode(after[:n], n_before, logits=n)
            for i in range(n):
                assert np.array_equal(together.logits(i - n), expected[i]), f"token {i} of {n}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sequences_beside_each_other(load, arch):
    """Of different lengths, and however many there are."""
    model = load(arch, "Q4_K_M")
    sequences = [drawn(model, n, seed=n) for n in (40, 530, 9, 260)]
    n_steps = 4
    expected = []
    for tokens in sequences:
        with context(model) as alone:
            for start in range(0, len(tokens), MOST):  # a prompt of many tokens is read otherwise
                alone.decode(tokens[start : start + MOST], start)
            expected.append([])
            for i, token in enumerate(drawn(model, n_steps, seed=1)):
                alone.decode([token], len(tokens) + i)
                expected[-1].append(alone.logits().copy())
    with context(model, n_seq=len(sequences)) as together:
        for sequence, tokens in enumerate(sequences):
            rows = [(token, i, sequence) for i, token in enumerate(tokens)]
            for start in range(0, len(rows), MOST):
                together.decode_rows(rows[start : start + MOST])
        for i, token in enumerate(drawn(model, n_steps, seed=1)):
            together.decode_rows([(token, len(tokens) + i, s) for s, tokens in enumerate(sequences)])
            for s in range(len(sequences)):
                assert np.array_equal(together.logits(s), expected[s][i]), f"step {i}, sequence {s}"
