"""MM-ShiftKV for llama.cpp: a multimodal prompt's KV cache, cut once after prefill to what decoding will need.

    with edge_shiftkv.Runtime("model.gguf", "mmproj.gguf", kv_budget=128) as runtime:
        answer = runtime.generate("What is the total?", ["receipt.png"])
        print(answer.text, answer.figures)

Raises ImportError when the llama-cpp-python installed is not the patched one; ``edge-shiftkv build`` makes it.
"""

import edge_shiftkv.native  # noqa: F401 - first: it says what to do where the library is not the patched one
from edge_shiftkv.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    ContextOverflowError,
    ImageError,
    ModelError,
    PromptError,
    SessionError,
    SettingError,
    ShiftKVError,
    TimeLimitError,
)
from edge_shiftkv.request import Options
from edge_shiftkv.results import Completion, DraftFigures, Figures
from edge_shiftkv.runtime import Runtime
from edge_shiftkv.selection import ImageSpan, Selection, ShiftKV
from edge_shiftkv.selection.heatmap import heatmap
from edge_shiftkv.session import Session
from edge_shiftkv.speculative.llama_draft import LlamaDraft
from edge_shiftkv.speculative.options import DraftOptions
from edge_shiftkv.stream import Stream

__all__ = [
    "BusyError",
    "CancelledError",
    "ClosedError",
    "Completion",
    "ContextOverflowError",
    "DraftFigures",
    "DraftOptions",
    "Figures",
    "ImageError",
    "ImageSpan",
    "LlamaDraft",
    "ModelError",
    "Options",
    "PromptError",
    "Runtime",
    "Selection",
    "Session",
    "SessionError",
    "SettingError",
    "ShiftKV",
    "ShiftKVError",
    "Stream",
    "TimeLimitError",
    "heatmap",
]
