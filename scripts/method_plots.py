"""The plots of docs/methods.md, from the CSV files that ``bench_quality.py report --csv`` writes.

    python scripts/method_plots.py

Draws the files of docs/quality/ anew into docs/images/methods/: one picture for each card, and ``all.png`` with all
methods. A panel is a suite: the score of its tasks taken together, against the budget. A point is left out where one of
the tasks was not measured, so that all points of a panel are means of the same. Rankings that need the answer or numpy
are left out, too. Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from intervals import wilson
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True)
class Panel:
    """What one panel shows.

    tasks: of the suite, whose scores are taken together.
    kv_type: of the KV pairs, as `bench_quality.py` names it.
    in_bytes: whether its budgets are shares of the bytes in f16 (``1/8B``) rather than numbers of KV pairs.
    """

    title: str
    axis: str
    file: str
    suite: str
    tasks: tuple[str, ...]
    kv_type: str = "f16"
    in_bytes: bool = False

    def place(self, budget: str) -> float | None:
        """Where on the axis a budget is; None for one of another kind."""
        if self.in_bytes:
            return float(Fraction(budget[:-1])) if budget.endswith("B") else None
        return float(budget) if budget.isdecimal() else None


PANELS = (
    Panel(
        "Pages, 1.5B model, q8_0/q4_0",
        "bytes kept, of all in f16",
        "pages.csv",
        "pages",
        ("look-up", "which", "list"),
        "q8_0/q4_0",
        in_bytes=True,
    ),
    Panel(
        "Pictures, demo model, f16",
        "KV pairs kept, of 279",
        "demo.csv",
        "demo",
        ("lookup", "line", "values", "transcribe"),
    ),
    Panel(
        "Texts, 1.5B model, f16",
        "KV pairs kept, of 1,000 to 4,000",
        "text-long.csv",
        "text",
        ("code", "codes", "table", "story"),
    ),
)

STYLES = {
    "paper": ("tab:blue", "o"),
    "mixed": ("tab:red", "s"),
    "keydiff": ("tab:green", "^"),
    "snapkv": ("tab:purple", "v"),
    "snapkv:window=8,kernel=9": ("tab:pink", "D"),
    "expected-attention": ("tab:brown", "P"),
    "streamingllm": ("tab:olive", "X"),
    "random": ("tab:cyan", "*"),
}
"""Colour and mark of each line that is drawn as more than a grey one."""

CARDS = {
    "paper": ("paper",),
    "mixed": ("mixed",),
    "keydiff": ("keydiff",),
    "snapkv": ("snapkv", "snapkv:window=8,kernel=9"),
    "expected-attention": ("expected-attention",),
    "baselines": ("streamingllm", "random"),
}
"""The cards of docs/methods.md by their pictures' names, and the lines that are theirs."""


@dataclass(frozen=True)
class Point:
    """A score in percent with its 95 % interval, and where on the axis it is."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """What a panel draws.

    lines: points from left to right, by method.
    uncut: the score of the full cache in percent, None if it was not measured.
    ticks: names of the budgets, by their places.
    """

    lines: Mapping[str, Sequence[Point]]
    uncut: float | None
    ticks: Mapping[float, str]


def read(panel: Panel, folder: Path) -> Scores:
    """What a panel draws of the CSV files in a folder."""
    cells: dict[tuple[str, str], dict[str, tuple[float, int]]] = defaultdict(dict)
    with (folder / panel.file).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            method, _, kv_type = row["method"].partition(", ")
            if row["suite"] == panel.suite and (kv_type or "f16") == panel.kv_type and row["task"] in panel.tasks:
                cells[method, row["budget"]][row["task"]] = float(row["mean"]), int(row["n"])
    lines: dict[str, list[Point]] = defaultdict(list)
    uncut, ticks = None, {}
    for (method, budget), tasks in cells.items():
        if len(tasks) < len(panel.tasks):
            continue
        n = sum(n for _, n in tasks.values())
        right = sum(mean * n for mean, n in tasks.values())
        if method == "full":
            uncut = 100 * right / n
        elif (x := panel.place(budget)) is not None and method.partition(":")[0] in STYLES:
            low, high = wilson(right, n)
            lines[method].append(Point(x, 100 * right / n, 100 * low, 100 * high))
            ticks[x] = budget.rstrip("B")
    return Scores({name: sorted(points, key=lambda point: point.x) for name, points in lines.items()}, uncut, ticks)


def draw(names: Sequence[str], panels: Mapping[Panel, Scores], *, bands: bool = True) -> Figure:
    """The panels side by side, with the lines of some methods in colour and those of all others in grey.

    bands: whether the coloured lines have their intervals around them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 2.9), layout="constrained")
    legend: dict[str, Artist] = {}
    for axes, (panel, scores) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        draw_panel(axes, names, scores, bands=bands)
        axes.set_title(panel.title, fontsize="medium")
        axes.set(xlabel=panel.axis, ylim=(0, 103))
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.axes[0].set_ylabel("right, %")
    order = [*names, "other methods", "nothing cut"]
    handles = [legend[label] for label in sorted(legend, key=order.index)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize="small")
    return figure


def draw_panel(axes: Axes, names: Sequence[str], scores: Scores, *, bands: bool) -> None:
    """The lines of one panel."""
    for name in sorted(scores.lines.keys() - set(names)):
        points = scores.lines[name]
        axes.plot(
            [p.x for p in points],
            [p.mean for p in points],
            color="0.75",
            linewidth=0.8,
            label="other methods",
            zorder=1,
        )
    shown = [name for name in names if name in scores.lines]
    for name in shown:
        points, (colour, mark) = scores.lines[name], STYLES[name]
        x, low, high = [p.x for p in points], [p.low for p in points], [p.high for p in points]
        axes.plot(x, [p.mean for p in points], color=colour, marker=mark, markersize=5, linewidth=2, label=name)
        if bands and len(x) > 1:
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        elif bands:
            axes.vlines(x, low, high, color=colour, alpha=0.4, linewidth=4)
    if not shown:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.4", backgroundcolor="white")
    if scores.uncut is not None:
        axes.axhline(scores.uncut, color="black", linestyle="--", linewidth=1, label="nothing cut")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(scores.ticks), list(scores.ticks.values()))


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a small PNG file."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=100)
    Image.open(whole).convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the plots of docs/methods.md.")
    parser.add_argument("--csv", type=Path, default=DOCS / "quality", help="folder of the CSV files (docs/quality)")
    parser.add_argument("--out", type=Path, default=DOCS / "images" / "methods", help="folder (docs/images/methods)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    panels = {panel: read(panel, args.csv) for panel in PANELS}
    for name, lines in CARDS.items():
        save(draw(lines, panels), args.out / f"{name}.png")
    save(draw(tuple(STYLES), panels, bands=False), args.out / "all.png")


if __name__ == "__main__":
    main()
