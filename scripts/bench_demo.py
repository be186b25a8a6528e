"""How well the demo model answers with its full KV cache and with a part of it: exact match per task and budget.

    python scripts/bench_demo.py                        # 100 held-out documents, the shipped q8_0 model
    python scripts/bench_demo.py --documents 300 --model models/demo/demo-text-f16.gguf

Budgets are shares of each prompt. The documents are held out: training never draws their seeds. Prints a Markdown table
with the exact match in percent, the number of questions and the half-width of the 95 % interval.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

from demo_documents import TASKS, make_document

from edge_shiftkv import Runtime

MODEL_DIR = Path(__file__).resolve().parent.parent / "models" / "demo"
SHARES = (Fraction(1), Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))


def measure(model: Path, documents: int) -> dict[tuple[str, Fraction], list[bool]]:
    """Whether each answer is exact, by task and share of the prompt that is kept. One question a document and task."""
    exact: dict[tuple[str, Fraction], list[bool]] = defaultdict(list)
    with Runtime(model, MODEL_DIR / "demo-mmproj-f16.gguf") as runtime:
        for seed in range(documents):
            document = make_document(seed)
            picture = document.pil_image()
            first = {item.task: item for item in reversed(document.questions())}
            for task, item in first.items():
                n_prompt = 0
                for share in SHARES:
                    runtime.kv_budget = None if share == 1 else max(2, int(n_prompt * share))
                    answer = runtime.generate(item.question, [picture], max_tokens=160, temperature=0.0)
                    n_prompt = answer.figures.prompt_tokens
                    exact[task, share].append(answer.text == item.answer)
    return exact


def table(exact: dict[tuple[str, Fraction], list[bool]]) -> str:
    """The results in Markdown."""
    rows = ["| task | n | " + " | ".join("full cache" if share == 1 else f"{share}" for share in SHARES) + " |"]
    rows.append("| --- " * (2 + len(SHARES)) + "|")
    for task in TASKS:
        cells = []
        for share in SHARES:
            outcomes = exact[task, share]
            p = sum(outcomes) / len(outcomes)
            cells.append(f"{100 * p:.1f} ± {196 * math.sqrt(p * (1 - p) / len(outcomes)):.1f}")
        rows.append(f"| {task} | {len(outcomes)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match of the demo model by task and KV budget.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR / "demo-text-q8_0.gguf")
    parser.add_argument("--documents", type=int, default=100)
    args = parser.parse_args()
    print(table(measure(args.model, args.documents)))


if __name__ == "__main__":
    main()
