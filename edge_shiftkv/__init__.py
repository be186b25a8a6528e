"""MM-ShiftKV for llama.cpp: a multimodal prompt's KV cache, cut once after prefill to what decoding will need.

    with edge_shiftkv.Runtime("model.gguf", "mmproj.gguf", kv_budget=128) as runtime:
        answer = runtime.generate("What is the total?", ["receipt.png"])
        print(answer.text, answer.figures)

Raises ImportError when the llama-cpp-python installed is not the patched one; ``edge-shiftkv build`` makes it.
"""

from edge_shiftkv.errors import ImageError, ModelError, PromptError, ShiftKVError
from edge_shiftkv.results import Completion, DraftFigures, Figures
from edge_shiftkv.runtime import Runtime, Stream
from edge_shiftkv.selection import ImageSpan, Selection, ShiftKV
from edge_shiftkv.selection.heatmap import heatmap
from edge_shiftkv.speculative.draft import DraftOptions
from edge_shiftkv.speculative.llama_draft import LlamaDraft

__all__ = [
    "Completion",
    "DraftFigures",
    "DraftOptions",
    "Figures",
    "ImageError",
    "ImageSpan",
    "LlamaDraft",
    "ModelError",
    "PromptError",
    "Runtime",
    "Selection",
    "ShiftKV",
    "ShiftKVError",
    "Stream",
    "heatmap",
]
