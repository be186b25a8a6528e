"""Which KV pairs of a prompt are kept: the methods' configurations, their results, and pictures of those."""

from edge_shiftkv.selection.methods import ExpectedAttention, KeyDiff, Random, ShiftKV, SnapKV, StreamingLLM, method
from edge_shiftkv.selection.results import ImageSpan, Selection

__all__ = [
    "ExpectedAttention",
    "ImageSpan",
    "KeyDiff",
    "Random",
    "Selection",
    "ShiftKV",
    "SnapKV",
    "StreamingLLM",
    "method",
]
