"""Answers with a draft are, token for token, those without: whole ones, of quantized models, also of the shipped one.

Where the kernels promise that the number of tokens in a pass changes no bit.
"""

import ctypes
import math

import llama_cpp.llama_cpp as llama
import pytest
from PIL import Image
from support import ggml_graph
from support.gguf_random import Spec, write_model

from edge_shiftkv import Runtime
from edge_shiftkv.speculative.options import DraftOptions

pytestmark = pytest.mark.skipif(
    not ggml_graph.has_avx2() or bool(ggml_graph.cpu_buffer_type("AMX")),
    reason="the promise is for AVX2 and AVX-512, and AMX's kernels are llama.cpp's own",
)

FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_1": 9, "Q8_0": 7, "IQ4_NL": 25, "Q2_K": 10, "Q4_K_M": 15}
ARCHITECTURES = {
    "llama": ("Q4_K_M", "Q4_1"),
    "qwen2": ("Q2_K", "Q5_1"),
    "gemma3": ("Q4_0",),
}
WINDOW = {"gemma3": {"n_layer": 6, "meta": {"attention.sliding_window": 32}}}
PROMPTS = ("the quick brown fox jumps over the lazy dog. ", "one, two, three, ", "There was once a king who had ")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A function: a model's path and a file type to the path of the quantized model."""
    folder = tmp_path_factory.mktemp("quantized")

    def quantized(source, file_type):
        path = folder / f"{source.stem}-{file_type}.gguf"
        if not path.exists():
            params = llama.llama_model_quantize_default_params()
            params.ftype, params.nthread = FILE_TYPES[file_type], 1
            assert llama.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)) == 0
        return path

    return quantized


def assert_same(drawn, model, drafts, requests, mmproj=None):
    """Ask for the answers without a draft and with each of these; return how many tokens were drafted and accepted."""
    settings = {"n_threads": 1, "n_ctx": 640}

    def answers(**draft):
        before = len(drawn)
        with Runtime(model, mmproj, **settings, **draft) as runtime:
            ends = dict.fromkeys({runtime.engine.model.eos, runtime.engine.model.eot} - {None}, -math.inf)
            figures = [runtime.generate(**request, logit_bias=ends).figures for request in requests]
        return [answer.tokens for answer in drawn[before:]], figures

    expected, _ = answers()
    assert all(len(tokens) >= 40 for tokens in expected)
    drafted = accepted = 0
    for draft in drafts:
        tokens, figures = answers(draft=draft, draft_options=DraftOptions(4))
        assert tokens == expected
        drafted += sum(figure.draft.drafted for figure in figures)
        accepted += sum(figure.draft.accepted for figure in figures)
    return drafted, accepted


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_the_shipped_model(demo, pair, quantized, drawn, file_type):
    source = demo / "demo-text-f16.gguf"
    with Image.open(demo / "document.png") as picture:
        requests = [{"prompt": "Read all.", "images": [picture.copy()], "max_tokens": 48}]
    requests += [{"prompt": prompt, "raw": True, "max_tokens": 48} for prompt in PROMPTS]
    drafts = [quantized(source, "Q2_K"), pair.stranger]
    drafted, accepted = assert_same(
        drawn, quantized(source, file_type), drafts, requests, demo / "demo-mmproj-f16.gguf"
    )
    assert 0 < accepted < drafted


@pytest.mark.parametrize(
    ("arch", "file_type"), [(arch, kind) for arch, kinds in ARCHITECTURES.items() for kind in kinds]
)
def test_architectures(tmp_path, pair, quantized, drawn, arch, file_type):
    spec = Spec(arch, **{"n_layer": 3, "n_embd": 256, "d_head": 64, "n_ff": 512, **WINDOW.get(arch, {})})
    source = write_model(spec, tmp_path)
    requests = [{"prompt": prompt * 8, "raw": True, "max_tokens": 64} for prompt in PROMPTS]
    drafts = [quantized(source, "Q8_0"), pair.stranger]
    drafted, accepted = assert_same(drawn, quantized(source, file_type), drafts, requests)
    assert 0 < accepted < drafted
