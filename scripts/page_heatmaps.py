"""What several methods keep of one page, side by side.

    python scripts/page_heatmaps.py -m MODEL.gguf --mmproj page-reader.gguf --out maps.png

The page and the question are those of `page_documents.py`. Needs what the package needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kv_methods import configured
from page_documents import KINDS, make_page
from PIL import Image

from edge_shiftkv import Runtime
from edge_shiftkv.selection.heatmap import heatmap


def side_by_side(pictures: Sequence[Image.Image], width: int) -> Image.Image:
    """Pictures of one size in a row, which is made `width` pixels wide."""
    first = pictures[0]
    sheet = Image.new("RGB", (first.width * len(pictures), first.height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * first.width, 0))
    return sheet.resize((width, round(sheet.height * width / sheet.width)), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what methods keep of a page.")
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--mmproj", type=Path, required=True, help="written by page_reader.py")
    parser.add_argument("--kind", choices=KINDS, default="receipt")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--task", default="look-up", help="what is asked (default look-up)")
    parser.add_argument("--budget", type=int, default=78, help="KV pairs per layer and KV head (78)")
    parser.add_argument("--methods", nargs="+", default=["paper", "snapkv", "keydiff"])
    parser.add_argument("--width", type=int, default=1500, help="of the file, in pixels (1500)")
    parser.add_argument("--out", type=Path, required=True, help="png")
    args = parser.parse_args()
    page = make_page(args.kind, args.seed)
    question, picture = page.ask(args.task), page.picture()
    print(f"{question.question} -> {', '.join(question.items)}")
    maps = []
    with Runtime(args.model, args.mmproj, kv_budget=args.budget, n_gpu_layers=0) as runtime:
        for name in args.methods:
            answer = runtime.generate(
                question.question, [picture], kv_method=configured(name), max_tokens=question.max_tokens
            )
            print(f"{name}: {answer.text!r}")
            assert answer.selection
            maps.append(heatmap(answer.selection, [picture]))
    side_by_side(maps, args.width).quantize(64).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
