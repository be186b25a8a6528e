"""``edge-shiftkv demo``."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from itertools import zip_longest

from edge_shiftkv._paths import models_dir
from edge_shiftkv.commands.figures import LABEL_WIDTH, figure_rows, save_heatmap
from edge_shiftkv.prompts.images import load_image
from edge_shiftkv.runtime import Runtime


def main(arguments: argparse.Namespace) -> None:
    """Ask the shipped model about a picture, with its full KV cache and with a cut one, and show both."""
    folder = models_dir()
    image = load_image(arguments.image or folder / "document.png")
    prompt = arguments.prompt
    with Runtime(folder / "demo-text-q8_0.gguf", folder / "demo-mmproj-f16.gguf") as runtime:
        runtime.generate(prompt, [image], max_tokens=1)  # reads the weights from disk, which neither is to pay for
        full = runtime.generate(prompt, [image])
        runtime.kv_budget = arguments.kv_budget
        cut = runtime.generate(prompt, [image])
    print(f"picture: {arguments.image or folder / 'document.png'}\nprompt:  {prompt}\n")
    width = max(24, (shutil.get_terminal_size().columns - LABEL_WIDTH - 2) // 2)
    _print_row("", "full KV cache", f"kv_budget {arguments.kv_budget}", width)
    _print_row("", "-" * 13, "-" * 13, width)
    _print_row("answer", full.text, cut.text, width)
    print()
    for (label, left), (_, right) in zip(figure_rows(full.figures), figure_rows(cut.figures), strict=True):
        _print_row(label, left, right, width)
    if arguments.heatmap:
        save_heatmap(cut.selection, [image], arguments.heatmap)


def _print_row(label: str, left: str, right: str, width: int) -> None:
    columns = ([line for part in text.splitlines() for line in textwrap.wrap(part, width)] for text in (left, right))
    for i, (a, b) in enumerate(zip_longest(*columns, fillvalue="")):
        print(f"{label if i == 0 else '':{LABEL_WIDTH}}{a:{width}}  {b}".rstrip())
