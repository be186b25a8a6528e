"""MM-ShiftKV for llama.cpp: a multimodal prompt's KV cache, cut once after prefill to what decoding will need.

    with edge_shiftkv.Runtime("model.gguf", "mmproj.gguf", kv_budget=128) as runtime:
        answer = runtime.generate("What is the total?", ["receipt.png"])
        print(answer.text, answer.figures)

What needs the library raises ImportError when the llama-cpp-python installed is not the patched one;
``edge-shiftkv build`` makes it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_shiftkv.batch.batch import Batch, BatchResult
    from edge_shiftkv.engine.prefilled import Captured, ScoringMethod
    from edge_shiftkv.errors import (
        BusyError,
        CancelledError,
        ClosedError,
        ContextOverflowError,
        HubError,
        ImageError,
        ModelError,
        PromptError,
        SessionError,
        SettingError,
        ShiftKVError,
        TimeLimitError,
    )
    from edge_shiftkv.llama_handler import ShiftKVChatHandler
    from edge_shiftkv.prompts.images import load_image
    from edge_shiftkv.request import Options
    from edge_shiftkv.results import Completion, DraftFigures, Figures, TokenLogprob, TokenLogprobs
    from edge_shiftkv.runtime import Runtime
    from edge_shiftkv.sampling import Sampling
    from edge_shiftkv.selection.heatmap import heatmap
    from edge_shiftkv.selection.methods import (
        METHODS,
        ExpectedAttention,
        KeyDiff,
        Random,
        ShiftKV,
        SnapKV,
        StreamingLLM,
    )
    from edge_shiftkv.selection.results import ImageSpan, Selection
    from edge_shiftkv.session import Session
    from edge_shiftkv.speculative.llama_draft import LlamaDraft
    from edge_shiftkv.speculative.options import DraftOptions
    from edge_shiftkv.stream import Stream

try:
    __version__ = version("edge-shiftkv")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

_WHERE = {
    "batch.batch": ("Batch", "BatchResult"),
    "engine.prefilled": ("Captured", "ScoringMethod"),
    "errors": (
        *("BusyError", "CancelledError", "ClosedError", "ContextOverflowError", "HubError", "ImageError"),
        *("ModelError", "PromptError", "SessionError", "SettingError", "ShiftKVError", "TimeLimitError"),
    ),
    "llama_handler": ("ShiftKVChatHandler",),
    "prompts.images": ("load_image",),
    "request": ("Options",),
    "results": ("Completion", "DraftFigures", "Figures", "TokenLogprob", "TokenLogprobs"),
    "runtime": ("Runtime",),
    "sampling": ("Sampling",),
    "selection.heatmap": ("heatmap",),
    "selection.methods": ("METHODS", "ExpectedAttention", "KeyDiff", "Random", "ShiftKV", "SnapKV", "StreamingLLM"),
    "selection.results": ("ImageSpan", "Selection"),
    "session": ("Session",),
    "speculative.llama_draft": ("LlamaDraft",),
    "speculative.options": ("DraftOptions",),
    "stream": ("Stream",),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "METHODS",
    "Batch",
    "BatchResult",
    "BusyError",
    "CancelledError",
    "Captured",
    "ClosedError",
    "Completion",
    "ContextOverflowError",
    "DraftFigures",
    "DraftOptions",
    "ExpectedAttention",
    "Figures",
    "HubError",
    "ImageError",
    "ImageSpan",
    "KeyDiff",
    "LlamaDraft",
    "ModelError",
    "Options",
    "PromptError",
    "Random",
    "Runtime",
    "Sampling",
    "ScoringMethod",
    "Selection",
    "Session",
    "SessionError",
    "SettingError",
    "ShiftKV",
    "ShiftKVChatHandler",
    "ShiftKVError",
    "SnapKV",
    "Stream",
    "StreamingLLM",
    "TimeLimitError",
    "TokenLogprob",
    "TokenLogprobs",
    "heatmap",
    "load_image",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562): the command line's `build` has to start without the library."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'edge_shiftkv' has no attribute {name!r}")
    if module != "errors":
        import_module("edge_shiftkv.native")  # first: it says what to do where the library is not the patched one
    return getattr(import_module(f"edge_shiftkv.{module}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
