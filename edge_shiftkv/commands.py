"""What the command line's `run` and `demo` do; imported only for them, as it needs the patched library."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

from PIL import Image

import edge_shiftkv.native  # noqa: F401 - first: it says what to do where the library is not the patched one
from edge_shiftkv._paths import models_dir
from edge_shiftkv.errors import ShiftKVError
from edge_shiftkv.prompts.images import AllowHttp, load_image
from edge_shiftkv.request import Options
from edge_shiftkv.results import Completion, DraftFigures, Figures
from edge_shiftkv.runtime import Runtime
from edge_shiftkv.selection.heatmap import heatmap
from edge_shiftkv.speculative.options import DraftOptions

_LABEL_WIDTH = 16


def run(arguments: argparse.Namespace) -> None:
    """Answer one prompt: the answer on stdout as it comes, or as JSON at its end; figures on stderr."""
    allow_http: AllowHttp = "private" if arguments.allow_http == "private" else bool(arguments.allow_http)
    images = [load_image(image, allow_http=allow_http, image_root=arguments.image_root) for image in arguments.image]
    options = Options(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        repeat_penalty=arguments.repeat_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        stop=arguments.stop,
    )
    runtime = Runtime(
        arguments.model,
        arguments.mmproj,
        kv_budget=arguments.kv_budget,
        kv_method=arguments.kv_method,
        n_ctx=arguments.n_ctx,
        type_k=arguments.type_k,
        type_v=arguments.type_v,
        n_gpu_layers=arguments.gpu_layers,
        n_threads=arguments.threads,
        draft=arguments.draft,
        draft_options=DraftOptions(
            n_draft=arguments.draft_tokens, rule=arguments.draft_rule, mmproj=arguments.draft_mmproj
        ),
    )
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
        for label, value in _rows(answer.figures):
            print(f"{label:{_LABEL_WIDTH}}{value}", file=sys.stderr)
    if arguments.heatmap:
        _save_heatmap(answer, images, arguments.heatmap)


def demo(arguments: argparse.Namespace) -> None:
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
    width = max(24, (shutil.get_terminal_size().columns - _LABEL_WIDTH - 2) // 2)
    _print_row("", "full KV cache", f"kv_budget {arguments.kv_budget}", width)
    _print_row("", "-" * 13, "-" * 13, width)
    _print_row("answer", full.text, cut.text, width)
    print()
    for (label, left), (_, right) in zip(_rows(full.figures), _rows(cut.figures), strict=True):
        _print_row(label, left, right, width)
    if arguments.heatmap:
        _save_heatmap(cut, [image], arguments.heatmap)


def _save_heatmap(answer: Completion, images: list[Image.Image], path: Path) -> None:
    if answer.selection is None:
        raise ShiftKVError("no heat map: the whole prompt is within the budget, nothing was cut")
    try:
        heatmap(answer.selection, images).save(path)
    except (OSError, ValueError) as error:  # PIL raises ValueError for a suffix that it does not know
        raise ShiftKVError(f"{path}: {error}") from error
    print(f"heat map: {path}", file=sys.stderr)


def _rows(figures: Figures) -> list[tuple[str, str]]:
    """The figures as (label, text)."""
    rate = "" if figures.tokens_per_second is None else f"{figures.tokens_per_second:.1f} tokens/s"
    rows = [
        ("prompt", f"{figures.prompt_tokens} tokens, {figures.image_tokens} visual"),
        ("kept", f"{figures.kept_tokens} per layer and KV head"),
        ("KV cache", f"{_mib(figures.kv_bytes_prompt)} -> {_mib(figures.kv_bytes_kept)}"),
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


def _mib(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / 2**20:.2f} MiB"


def _print_row(label: str, left: str, right: str, width: int) -> None:
    columns = ([line for part in text.splitlines() for line in textwrap.wrap(part, width)] for text in (left, right))
    for i, (a, b) in enumerate(zip_longest(*columns, fillvalue="")):
        print(f"{label if i == 0 else '':{_LABEL_WIDTH}}{a:{width}}  {b}".rstrip())
