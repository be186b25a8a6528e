"""Damaged files and odd requests end in an error of this package, never in the end of the process or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
from support import gguf_random, tiny_models
from support.gguf_random import Spec

from edge_shiftkv import ModelError
from edge_shiftkv.native.gguf_check import check_mmproj

pytest.importorskip("resource", reason="the fuzzer limits its workers' memory, which needs POSIX")

import fuzz
from gguf_damage import ARRAY, FLOAT32, STRING, UINT32, File, Tensor, parse

Damage = Callable[[File], None]
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def worker() -> Iterator[Callable[[str], str]]:
    """Runs a case in another process, which is replaced when it dies; fails the test then, else returns the outcome."""
    kept: list[fuzz.Worker] = []

    def run(case: str) -> str:
        if not kept or not kept[-1].alive:
            kept.append(fuzz.Worker())
        outcome, finding = kept[-1].run(case, LIMIT_S)
        assert finding is None, finding
        return outcome

    yield run
    for one in kept:
        one.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("malformed")


def tensor(file: File, name: str) -> Tensor:
    return next(one for one in file.tensors if one.name == name.encode())


def reshape(name: str, *shape: int) -> Damage:
    def damage(file: File) -> None:
        tensor(file, name).shape = list(shape)

    return damage


def retype(name: str, kind: gguf.GGMLQuantizationType) -> Damage:
    def damage(file: File) -> None:
        tensor(file, name).type = kind

    return damage


def drop(name: str) -> Damage:
    def damage(file: File) -> None:
        file.tensors.remove(tensor(file, name))

    return damage


def put(key: str, kind: int, value: object, item: int = 0) -> Damage:
    def damage(file: File) -> None:
        file.set(key, kind, value, item)

    return damage


def double_token(file: File) -> None:
    tokens = file.find("tokenizer.ggml.tokens")
    assert tokens
    tokens.value[7] = tokens.value[8]


def no_bytes(file: File) -> None:
    """No token is a byte, so that text with other letters has none."""
    tokens = file.find("tokenizer.ggml.tokens")
    assert tokens
    tokens.value = [b"other%d" % i if token.startswith(b"<0x") else token for i, token in enumerate(tokens.value)]


def no_vocabulary(file: File) -> None:
    file.set("tokenizer.ggml.model", STRING, b"none")
    file.set("llama.vocab_size", UINT32, gguf_random.N_VOCAB)


def quantized_patches(file: File) -> None:
    file.set("clip.vision.patch_size", UINT32, 32)
    file.set("clip.vision.image_size", UINT32, 128)
    embeddings = tensor(file, "v.patch_embd.weight")
    embeddings.shape, embeddings.type = [32, 32, 3, 32], TYPES.Q8_0


TYPES = gguf.GGMLQuantizationType
QWEN2VL = Spec("qwen2vl", meta={"rope.dimension_sections": [6, 5, 5, 0]})
GEMMA3 = Spec("gemma3", n_layer=6, meta={"attention.sliding_window": 32, "attention.sliding_window_pattern": 2})

MAMBA = Spec(
    "mamba",
    meta={"ssm.inner_size": 256, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 8},
)

TEXT_DEFECTS = [
    pytest.param(MAMBA, retype("blk.0.ssm_d", TYPES.F16), "ModelError.*'blk.0.ssm_d'.*F32", id="ssm-d-f16"),
    pytest.param(
        Spec(rope_factors=True, n_head=2, d_head=64),
        retype("rope_freqs.weight", TYPES.Q8_0),
        "ModelError.*'rope_freqs.weight' is a vector of the block type 8",
        id="rope-factors-q8_0",
    ),
    pytest.param(Spec(), double_token, r"ModelError.*id_to_token\.size\(\) == token_to_id\.size\(\)", id="token-twice"),
    pytest.param(Spec(), no_bytes, "PromptError: the text could not be tokenized", id="no-byte-tokens"),
    pytest.param(Spec(), no_vocabulary, "ModelError.*no vocabulary", id="no-vocabulary"),
    pytest.param(Spec(), put("llama.block_count", UINT32, 1 << 20), "ModelError.*n_layer_all", id="a-million-layers"),
    pytest.param(Spec(), retype("blk.2.ffn_up.weight", TYPES.I32), "ModelError.*cannot be multiplied", id="integers"),
    pytest.param(Spec(), retype("blk.2.ffn_up.weight", TYPES.Q8_1), "ModelError.*cannot be multiplied", id="q8_1"),
    pytest.param(Spec(), retype("output_norm.weight", TYPES.F16), "ModelError.*norms, biases.*F32", id="norm-f16"),
    pytest.param(
        *(Spec("qwen2"), retype("blk.0.attn_q.bias", TYPES.BF16), "ModelError.*norms, biases.*F32"),
        id="bias-bf16",
    ),
    pytest.param(
        *(Spec(), put("llama.attention.layer_norm_rms_epsilon", FLOAT32, -1.0), "ModelError.*at least 0"), id="epsilon"
    ),
    pytest.param(
        *(Spec("phi3"), put("phi3.rope.dimension_count", UINT32, 64), "ShiftKVError.*n_dims"), id="rope-beyond-the-head"
    ),
    pytest.param(GEMMA3, put("gemma3.rope.dimension_count_swa", UINT32, 0), "ok", id="rope-of-nothing"),
    pytest.param(
        QWEN2VL,
        put("qwen2vl.rope.dimension_sections", ARRAY, [0, 0, 0, 4], UINT32),
        r"ModelError.*dimension_sections is \[0, 0, 0, 4\]",
        id="no-sections",
    ),
    pytest.param(
        QWEN2VL,
        put("qwen2vl.rope.dimension_sections", ARRAY, [60, 5, 5, 0], UINT32),
        "ModelError.*for heads of 32",
        id="sections-beyond-the-head",
    ),
]


@pytest.mark.parametrize(("spec", "damage", "expected"), TEXT_DEFECTS)
def test_a_damaged_language_model(worker, folder, spec, damage, expected, request):
    """Each of these ended the process, or never ended, before it was checked."""
    file = parse(gguf_random.write_model(spec, folder).read_bytes())
    damage(file)
    file.lay_out()
    path = folder / f"{request.node.callspec.id}.gguf"
    path.write_bytes(file.write())
    assert_outcome(worker(f"files:{path}"), expected)


VISION = "clip.vision."
MMPROJ_DEFECTS = [
    pytest.param("mlp", put("clip.has_vision_encoder", UINT32, 1), "ModelError.*value == type", id="flag-as-number"),
    pytest.param("mlp", put(f"{VISION}image_size", FLOAT32, 56.0), "ModelError.*value == type", id="size-as-fraction"),
    pytest.param(
        "mlp", put(f"{VISION}image_size", UINT32, 112), "ModelError.*16 position.*64 patches", id="few-positions"
    ),
    pytest.param(
        "mlp", put(f"{VISION}patch_size", UINT32, 7), "ModelError.*16 position.*64 patches", id="small-patches"
    ),
    pytest.param("mlp", put(f"{VISION}attention.head_count", UINT32, 5), "ModelError.*share 32", id="heads"),
    pytest.param(
        *("mlp", put(f"{VISION}attention.layer_norm_epsilon", FLOAT32, -1.0), "ModelError.*at least 0"), id="epsilon"
    ),
    pytest.param(
        "mlp",
        put(f"{VISION}image_grid_pinpoints", ARRAY, [4_000_000, 4_000_000], 5),
        "ModelError.*4000000 pixels",
        id="large-pinpoints",
    ),
    pytest.param(
        *("mlp", put(f"{VISION}image_size", ARRAY, [112], UINT32), "ModelError.*image_size is a list"),
        id="size-as-list",
    ),
    pytest.param("mlp", drop("mm.2.weight"), "ModelError.*last layer is missing", id="no-last-layer"),
    pytest.param("mlp", drop("mm.0.weight"), "ImageError.*GGML_ASSERT", id="no-first-layer"),
    pytest.param("mlp", drop("mm.0.bias"), "ImageError.*GGML_ASSERT", id="no-bias"),
    pytest.param("mlp", drop("v.blk.0.attn_v.weight"), "ImageError.*GGML_ASSERT", id="no-values"),
    pytest.param("mlp", drop("v.patch_embd.weight"), "ImageError.*GGML_ASSERT", id="no-patch-embeddings"),
    pytest.param("mlp", drop("v.position_embd.weight"), "ImageError.*GGML_ASSERT", id="no-positions"),
    pytest.param("mlp", reshape("v.blk.0.ffn_up.weight", 16, 96), "ModelError.*48 numbers for 96", id="ffn-and-bias"),
    pytest.param("mlp", reshape("v.blk.0.attn_k.bias", 64), "ModelError.*64 numbers for 32 outputs", id="long-bias"),
    pytest.param("gemma3", reshape("mm.soft_emb_norm.weight", 24), "ImageError.*can_repeat", id="short-norm"),
    pytest.param("mlp", retype("v.blk.0.ln1.weight", TYPES.F16), "ModelError.*vectors are F32", id="norm-f16"),
    pytest.param("mlp", retype("v.blk.0.attn_v.weight", TYPES.I32), "ModelError.*cannot be multiplied", id="integers"),
    pytest.param("mlp", quantized_patches, "ModelError.*F32, F16 or BF16", id="patch-embeddings-q8_0"),
    pytest.param("gemma3", put("clip.projector_type", STRING, b"gemma3nv"), "ImageError.*ASSERT", id="other-encoder"),
    pytest.param("gemma3", retype("v.position_embd.weight", TYPES.F16), "ModelError.*are F32", id="positions-f16"),
]


@pytest.mark.parametrize(("projector", "damage", "expected"), MMPROJ_DEFECTS)
def test_a_damaged_mmproj(worker, folder, projector, damage, expected, request):
    """Each of these ended the process, or never ended, before it was checked."""
    text = folder / "text.gguf"
    if not text.exists():
        tiny_models.write_text_model(text)
    path = folder / f"mmproj-{request.node.callspec.id}.gguf"
    file = parse(tiny_models.write_mmproj(path, projector).read_bytes())
    damage(file)
    file.lay_out()
    path.write_bytes(file.write())
    assert_outcome(worker(f"files:{text}:{path}"), expected)


def pinpoints(*sides: int) -> Damage:
    return put(f"{VISION}image_grid_pinpoints", ARRAY, list(sides), 5)


def with_class_embedding(file: File) -> None:
    first = file.tensors[0]
    file.tensors.append(Tensor(b"v.class_embd", [32], TYPES.F32, first.offset, 128))


def yi_projector(file: File) -> None:
    """What tells Yi's projector from LLaVA's, but not all of it."""
    tensor(file, "mm.2.weight").name = b"mm.3.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put(f"{VISION}block_count", UINT32, 513), "at most 512 layers"),
        (put(f"{VISION}patch_size", UINT32, 0), "patch_size is 0"),
        (put("clip.projector_type", STRING, b"resampler"), "16 position embeddings for 4900 patches"),
        (with_class_embedding, "16 position embeddings for 17 patches"),
        (yi_projector, "last layer is missing"),
        (pinpoints(56, -56), "sides of -56 to 56 pixels"),
        (pinpoints(56 * 17, 56 * 17), "more than 256 tiles"),
        (pinpoints(*[56] * 1026), "1026 numbers"),
    ],
)
def test_what_no_mmproj_says(tmp_path, damage, message):
    path = tiny_models.write_mmproj(tmp_path / "mmproj.gguf")
    check_mmproj(path)
    file = parse(path.read_bytes())
    damage(file)
    file.lay_out()
    path.write_bytes(file.write())
    with pytest.raises(ModelError, match=message):
        check_mmproj(path)


def test_an_mmproj_in_bfloat16(worker, folder):
    text = tiny_models.write_text_model(folder / "text.gguf")
    path = folder / "mmproj-bf16.gguf"
    file = parse(tiny_models.write_mmproj(path).read_bytes())
    for one in file.tensors:
        if len(one.shape) > 1 and one.name != b"v.position_embd.weight":
            one.type = TYPES.BF16
    file.lay_out()
    path.write_bytes(file.write())
    assert_outcome(worker(f"files:{text}:{path}"), "ok")


def assert_outcome(outcome: str, expected: str) -> None:
    assert re.match(expected, outcome), outcome


@pytest.mark.parametrize(("kind", "n"), [("text", 40), ("mmproj", 40), ("pictures", 60), ("prompts", 40)])
def test_random_damage(worker, kind, n):
    """A few of the cases that docs/fuzzing.md counts 10,000 of."""
    outcomes = [worker(f"{kind}:{seed}") for seed in range(n)]
    assert any(outcome == "ok" for outcome in outcomes)
    assert any("Error: " in outcome for outcome in outcomes)
