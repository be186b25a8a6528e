"""Figures and heat maps, as the command line shows them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from edge_shiftkv.budget import Budget
from edge_shiftkv.errors import SettingError, ShiftKVError
from edge_shiftkv.results import DraftFigures, Figures
from edge_shiftkv.selection.heatmap import heatmap
from edge_shiftkv.selection.results import Selection

LABEL_WIDTH = 16


def check_heatmap(path: Path, budget: Budget) -> None:
    """Raise SettingError where an answer would be waited for in vain, as no heat map of it could be written."""
    if budget is None:
        raise SettingError("a heat map shows what a budget kept: pass --kv-budget, too, such as --kv-budget 1/8")
    if path.suffix.lower() not in Image.registered_extensions():
        raise SettingError(f"{path}: a heat map is a picture: give it a name that ends in .png")
    if not path.parent.is_dir():
        raise SettingError(f"{path}: there is no folder {path.parent}")


def save_heatmap(selection: Selection | None, images: Sequence[Image.Image], path: Path) -> None:
    """Draw what was kept, and say so. Raises what `draw_heatmap` does."""
    draw_heatmap(selection, images, path)
    print(f"heat map: {path}", file=sys.stderr)


def draw_heatmap(selection: Selection | None, images: Sequence[Image.Image], path: Path) -> None:
    """Draw what was kept. Raises ShiftKVError where nothing was cut or the file cannot be written."""
    if selection is None:
        raise ShiftKVError("no heat map: the whole prompt is within the budget, nothing was cut")
    try:
        heatmap(selection, images).save(path)
    except (OSError, ValueError) as error:  # PIL raises ValueError for a suffix that it does not know
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ShiftKVError(f"{path}: {reason}") from error


def figure_rows(figures: Figures) -> list[tuple[str, str]]:
    """The figures as (label, text)."""
    rate = "" if figures.tokens_per_second is None else f"{figures.tokens_per_second:.1f} tokens/s"
    rows = [
        ("prompt", f"{figures.prompt_tokens} tokens, {figures.image_tokens} visual"),
        ("kept", f"{figures.kept_tokens} per layer and KV head"),
        ("KV cache", f"{mebibytes(figures.kv_bytes_prompt)} -> {mebibytes(figures.kv_bytes_kept)}"),
        ("KV types", "" if figures.type_k is None else f"keys {figures.type_k}, values {figures.type_v}"),
        ("vision encoder", f"{figures.image_encode_s:.3f} s"),
        ("prefill", f"{figures.prefill_s:.3f} s with the encoder"),
        ("selection", f"{figures.selection_s:.3f} s"),
        ("decode", f"{figures.decode_s:.3f} s, {figures.generated_tokens} tokens"),
        ("rate", rate),
    ]
    return rows + _draft_rows(figures.draft) if figures.draft else rows


def _draft_rows(figures: DraftFigures) -> list[tuple[str, str]]:
    per_pass = "" if figures.tokens_per_pass is None else f", {figures.tokens_per_pass:.2f} tokens each"
    return [
        ("rounds", f"{figures.rounds}, {figures.plain_rounds} of them without a draft{per_pass}"),
        ("drafted", f"{figures.drafted} tokens, {figures.accepted} accepted"),
        ("draft", f"{figures.draft_s:.3f} s"),
        ("align", f"{figures.align_s:.3f} s"),
        ("verify", f"{figures.verify_s:.3f} s"),
    ]


def mebibytes(n_bytes: int | None) -> str:
    """A size for people."""
    return "unknown" if n_bytes is None else f"{n_bytes / 2**20:.2f} MiB"
