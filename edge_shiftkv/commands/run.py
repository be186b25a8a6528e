"""``edge-shiftkv run``."""

from __future__ import annotations

import argparse
import json
import sys

from edge_shiftkv.commands.figures import LABEL_WIDTH, check_heatmap, figure_rows, save_heatmap
from edge_shiftkv.commands.settings import allow_http, load_runtime, request_options
from edge_shiftkv.errors import SettingError
from edge_shiftkv.prompts.images import load_image


def main(arguments: argparse.Namespace) -> None:
    """Answer one prompt: the answer on stdout as it comes, or as JSON at its end; figures on stderr."""
    if arguments.heatmap:
        if not arguments.image:
            raise SettingError("a heat map is drawn over a picture: pass --image, too")
        check_heatmap(arguments.heatmap, arguments.kv_budget)
    images = [
        load_image(image, allow_http=allow_http(arguments), image_root=arguments.image_root)
        for image in arguments.image
    ]
    options = request_options(arguments)
    runtime = load_runtime(arguments)
    with runtime, runtime.stream(arguments.prompt, images, raw=arguments.raw, **options) as stream:
        for text in stream:
            if not arguments.json:
                print(text, end="", flush=True)
        answer = stream.completion
    if arguments.json:
        figures = answer.figures.as_dict()
        print(json.dumps({"text": answer.text, "finish_reason": answer.finish_reason, "figures": figures}))
    else:
        print()
    if arguments.stats:
        for label, value in figure_rows(answer.figures):
            print(f"{label:{LABEL_WIDTH}}{value}", file=sys.stderr)
    if arguments.heatmap:
        save_heatmap(answer.selection, images, arguments.heatmap)
