"""Which KV pairs of a prompt are kept: the methods' configurations, their results, and pictures of those."""

from edge_shiftkv.selection.methods import ShiftKV
from edge_shiftkv.selection.results import ImageSpan, Selection

__all__ = ["ImageSpan", "Selection", "ShiftKV"]
