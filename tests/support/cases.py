"""Prompts to decode and select from: models, KV types, parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

from support import selection
from support.gguf_random import Spec
from support.native import OK, Chunk, Context, Image, Model, set_causal_attn
from support.prompts import text, two_images
from support.reference import Settings

Load = Callable[[Spec], Model]
"""The fixture that writes and loads a random model."""

FEW = Settings(n_proxy=128)
"""Enough for what does not depend on their number."""


@dataclass(frozen=True)
class Case:
    """One row of the tables. `context` are further options of the context."""

    name: str
    spec: Spec = field(default_factory=Spec)
    settings: Settings = FEW
    budget: int = 40
    n_prompt: int = 150
    images: bool = False
    type_k: str = "f16"
    type_v: str = "f16"
    flash: bool | None = False
    n_ubatch: int = 512
    context: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self) -> list[Chunk]:
        """The prompt's text and images."""
        return two_images(self.spec.n_embd_image) if self.images else [text(self.n_prompt)]


MHA = Spec(n_head_kv=4)
QWEN2 = Spec("qwen2")
QWEN3 = Spec("qwen3", d_head=48)
PHI3 = Spec("phi3")
QWEN2VL = Spec("qwen2vl", meta={"rope.dimension_sections": [6, 5, 5, 0]})
QWEN2VL_64 = Spec("qwen2vl", n_head=2, n_head_kv=1, d_head=64, meta={"rope.dimension_sections": [12, 10, 10, 0]})
QWEN3VL = Spec("qwen3vl", meta={"rope.dimension_sections": [6, 5, 5, 0], "n_deepstack_layers": 1})
# Every other layer has a sliding window.
GEMMA2 = Spec("gemma2", n_layer=6, meta={"attention.sliding_window": 32, "attn_logit_softcapping": 20.0})
GEMMA3 = Spec("gemma3", n_layer=6, meta={"attention.sliding_window": 32, "attention.sliding_window_pattern": 2})

MAMBA = Spec(
    "mamba",
    n_embd=64,
    meta={"ssm.inner_size": 128, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 4},
)

ARCHITECTURES = [
    Case("llama-mha", MHA, Settings()),
    Case("llama-gqa", Spec(), Settings()),
    Case("llama-mqa-odd", Spec(n_head=3, n_head_kv=1)),
    Case("qwen2", QWEN2),
    Case("qwen3", QWEN3),
    Case("phi3", PHI3),
    Case("gemma2", GEMMA2),
    Case("gemma3", GEMMA3),
    Case("qwen2vl", QWEN2VL),
    Case("qwen3vl", QWEN3VL),
]

VARIANTS = [
    Case("linear", Spec(meta={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})),
    Case(
        "yarn",
        Spec(
            "qwen2",
            meta={
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 1024,
            },
        ),
    ),
    Case("factors", Spec(rope_factors=True)),
    Case("base", Spec(meta={"rope.freq_base": 500.0})),
    Case("f16-weights", Spec(weight_type=gguf.GGMLQuantizationType.F16)),
]

HEAD_64 = Spec(n_head=2, n_head_kv=1, d_head=64)
HEAD_96 = Spec(n_head=2, n_head_kv=1, d_head=96)
HEAD_128 = Spec(n_head=2, n_head_kv=1, d_head=128)
HEAD_192 = Spec(n_head=2, n_head_kv=1, d_head=192)

KV_TYPES = [
    Case("f32", type_k="f32", type_v="f32"),
    Case("bf16", type_k="bf16", type_v="bf16"),
    Case("q8_0", type_k="q8_0", type_v="q8_0", flash=True),
    Case("q8_0-keys", type_k="q8_0"),
    Case("q4_0", type_k="q4_0", type_v="q4_0", flash=True),
    Case("q4_0-keys-64", HEAD_64, type_k="q4_0"),
    Case("q8_0-64", HEAD_64, type_k="q8_0", type_v="q8_0", flash=True),
    Case("q8_0-96", HEAD_96, type_k="q8_0", type_v="q8_0", flash=True),
    Case("q8_0-128", HEAD_128, type_k="q8_0", type_v="q8_0", flash=True),
    Case("q4_0-192", HEAD_192, type_k="q4_0", type_v="q4_0", flash=True),
    Case("q8_0-qwen2vl", QWEN2VL_64, type_k="q8_0", type_v="q4_0", flash=True, images=True),
]

SMALL_WINDOWS: Mapping[str, Any] = {"swa_full": False}
"""Window layers with a cache of their own size, 256 cells for 32 tokens a time, which longer prompts wrap around in."""


PROMPTS = [
    Case("flash-auto", flash=None),
    Case("ubatch-64", n_ubatch=64),
    Case("ubatch-7", n_ubatch=7, flash=True),
    Case("last-ubatch-of-1", n_ubatch=64, n_prompt=129),
    Case("short", n_prompt=3, budget=2),
    Case("longer-than-n-stat", Spec(n_layer=3), Settings(n_proxy=128, n_stat=100), n_prompt=300),
    Case("images", images=True),
    Case("images-flash-ubatch", images=True, flash=True, n_ubatch=32),
    Case("images-gemma3", GEMMA3, images=True),
    Case("small-windows", GEMMA3, n_ubatch=32, n_prompt=400, context=SMALL_WINDOWS),
    Case("images-qwen2vl", QWEN2VL, images=True),
    Case("images-qwen3vl", QWEN3VL, images=True),
    Case("images-qwen2vl-flash-ubatch", QWEN2VL, images=True, flash=True, n_ubatch=32),
]


def open_context(model: Model, case: Case) -> Context:
    """An empty context with the case's options."""
    return Context(
        model,
        type_k=case.type_k,
        type_v=case.type_v,
        flash=case.flash,
        n_ubatch=case.n_ubatch,
        **case.context,
    )


def prefill(context: Context, case: Case) -> int:
    """Decode the case's prompt; return the position after it."""
    position = 0
    for chunk in case.prompt():
        # Gemma's images are decoded this way.
        non_causal = case.spec.arch == "gemma3" and isinstance(chunk, Image)
        set_causal_attn(context.pointer, not non_causal)
        position = context.prefill([chunk], position=position)
    set_causal_attn(context.pointer, True)
    return position


def selected(model: Model, case: Case) -> Context:
    """A context that has decoded the case's prompt and selected from it."""
    context = open_context(model, case)
    assert context.capture() == OK
    assert prefill(context, case) == context.last_position() + 1
    assert context.select(selection.native_params(case.settings, case.budget)) == OK
    return context
