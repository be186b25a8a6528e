"""What the quality bench measured: tables in Markdown, a CSV file and plots, for ``bench_quality.py report``."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Row, markdown, read_lines
from intervals import wilson

Key = tuple[str, str]
"""A method, with the KV type where that is not f16, and a budget."""

WHOLE = "all"  # the budget of full caches
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Mean:
    """A mean score in [0, 1] with its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, scores: Sequence[float]) -> Mean:
        """Wilson's interval; for scores between 0 and 1 it is wider than needed."""
        return cls(len(scores), sum(scores) / len(scores), *wilson(sum(scores), len(scores)))

    def __str__(self) -> str:
        return f"{100 * self.mean:.0f} ({100 * self.low:.0f}-{100 * self.high:.0f})"


@dataclass(frozen=True)
class Task:
    """The scores of one task of a suite, or of all of them.

    bytes_of: as shares of the full cache's in f16, where they were measured.
    budgets: those of cut caches, in pairs and then in shares.
    """

    suite: str
    name: str
    means: dict[Key, Mean]
    bytes_of: dict[Key, float]
    budgets: list[str]

    @property
    def methods(self) -> list[str]:
        """Those that cut."""
        return list(dict.fromkeys(name for name, budget in self.means if budget != WHOLE))

    @property
    def full(self) -> dict[str, Mean]:
        """The full caches' scores, by KV type as methods are."""
        return {name: mean for (name, budget), mean in self.means.items() if budget == WHOLE}


def report(files: Iterable[Path], csv_file: Path | None, plots: Path | None) -> None:
    """Print tables, and write what was asked for."""
    tasks = tasks_of(row for path in files for row in read_lines(path))
    for task in tasks:
        print_task(task)
        if plots:
            plots.mkdir(parents=True, exist_ok=True)
            name = f"{task.suite}-{task.name.replace(' ', '-')}"
            if any("/" not in budget for budget in task.budgets):
                plot_pairs(plots / f"{name}.png", task)
            if task.bytes_of:
                plot_bytes(plots / f"{name}-bytes.png", task)
    if csv_file:
        with csv_file.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["suite", "task", "method", "budget", "bytes", "n", "mean", "low", "high"])
            for task in tasks:
                for key, m in task.means.items():
                    cells = [task.suite, task.name, *key, task.bytes_of.get(key, "")]
                    writer.writerow([*cells, m.n, m.mean, m.low, m.high])


def tasks_of(rows: Iterable[Row]) -> list[Task]:
    """The tasks that rows are about, after one of all tasks of their suite."""
    scores: dict[tuple[str, str], dict[Key, list[float]]] = defaultdict(lambda: defaultdict(list))
    shares: dict[tuple[str, str], dict[Key, list[float]]] = defaultdict(lambda: defaultdict(list))
    largest: dict[str, int] = {}
    for row in rows:
        names = [row["task"]] if row["suite"].endswith("second") else ["all tasks", row["task"]]
        kv_type = row.get("kv", "f16")
        key = (row["method"] if kv_type == "f16" else f"{row['method']}, {kv_type}"), row["budget"]
        for name in names:
            scores[row["suite"], name][key].append(row["score"])
            if "bytes" in row:
                shares[row["suite"], name][key].append(row["bytes"])
        largest[row["budget"]] = max(largest.get(row["budget"], 0), row["n_budget"])
    return [
        Task(
            *about,
            means={key: Mean.of(values) for key, values in of.items()},
            bytes_of={key: sum(values) / len(values) for key, values in shares[about].items()},
            budgets=sorted({text for _, text in of} - {WHOLE}, key=lambda text: ("/" in text, largest[text])),
        )
        for about, of in scores.items()
    ]


def print_task(task: Task) -> None:
    """The full cache's score, and a table of methods by budgets."""
    (_, first), *others = task.full.items()
    print(f"\n**{task.suite}, {task.name}**: full cache {first}, n = {first.n}\n")
    for name, m in others:
        print(f"{name}: {m} at {task.bytes_of[name, WHOLE]:.2f} of the bytes, n = {m.n}\n")
    if task.methods:
        by_budget = [{text: task.means.get((name, text), "") for text in task.budgets} for name in task.methods]
        rows = [{"method": name, **of} for name, of in zip(task.methods, by_budget, strict=True)]
        print(markdown(rows, numbers=True))


def plot_pairs(path: Path, task: Task) -> None:
    """Score against budget in KV pairs, one line a method, between nothing and the full cache."""
    figure, axes = _figure(task)
    numbers = [budget for budget in task.budgets if "/" not in budget]
    for name in task.methods:
        points = [(int(budget), task.means[name, budget]) for budget in numbers if (name, budget) in task.means]
        style = "k--" if name == "oracle" else "o-"
        axes.plot([x for x, _ in points], [100 * m.mean for _, m in points], style, label=name, markersize=4)
    if "full" in task.full:
        axes.axhline(100 * task.full["full"].mean, color="black", linewidth=1, label="full cache")
    axes.set_xticks([int(budget) for budget in numbers], numbers)
    axes.set_xlabel("KV pairs per layer and KV head")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=110)


def plot_bytes(path: Path, task: Task) -> None:
    """Score against bytes, a colour for each method and a dash for each KV type; full caches are stars."""
    figure, axes = _figure(task)
    names = {name: tuple(name.partition(", ")[::2]) for name, _ in task.means}
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(m for m, _ in names.values() if m != "full"))}
    kv_types = list(dict.fromkeys(kv_type for _, kv_type in names.values()))
    for name, (method, kv_type) in names.items():
        points = sorted((share, task.means[key].mean) for key, share in task.bytes_of.items() if key[0] == name)
        axes.plot(
            [x for x, _ in points],
            [100 * y for _, y in points],
            linestyle=DASHES[kv_types.index(kv_type) % len(DASHES)],
            marker="*" if method == "full" else "o",
            color=colours.get(method, "black"),
            label=name,
            markersize=8 if method == "full" else 4,
        )
    axes.set_xlabel("bytes, as a share of the full cache in f16")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=110)


def _figure(task: Task) -> tuple[Any, Any]:
    """A figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set(ylabel="score, %", ylim=(0, 103), title=f"{task.suite}: {task.name}")
    return figure, axes
