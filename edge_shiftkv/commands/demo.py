"""``edge-shiftkv demo``."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import textwrap
from contextlib import closing
from dataclasses import dataclass
from itertools import count, zip_longest
from pathlib import Path

from PIL import Image

from edge_shiftkv._paths import models_dir, page_reader_dir
from edge_shiftkv.budget import Budget
from edge_shiftkv.chat.progress import ProgressBar
from edge_shiftkv.commands.figures import LABEL_WIDTH, check_heatmap, draw_heatmap
from edge_shiftkv.errors import SettingError, ShiftKVError
from edge_shiftkv.page_reader import fitted
from edge_shiftkv.prompts.images import load_image
from edge_shiftkv.results import Completion, Figures
from edge_shiftkv.runtime import Runtime
from edge_shiftkv.selection.methods import DEFAULT_METHOD
from edge_shiftkv.selection.results import Selection

SESSION_BUDGET = "1/4"


@dataclass(frozen=True)
class Asked:
    """A picture, and two questions with what stands in it: (question, value).

    peer: a method that loses the first one's value, where the default does not.
    """

    picture: Path
    peer: str
    first: tuple[str, str]
    second: tuple[str, str]


def document() -> Asked:
    """The shipped model's."""
    return Asked(
        models_dir() / "document.png",
        "snapkv",
        ("What is the value of AREA?", "654.92"),
        ("What is the value of ZMBZE?", "28-103"),
    )


def receipt() -> Asked:
    """Any other language model's, which reads it with the page reader."""
    return Asked(
        page_reader_dir() / "receipt.png",
        "streamingllm",
        ("What is the total of this receipt? Answer with the value only.", "62.25"),
        ("What is the price of Lemons? Answer with the value only.", "14.89"),
    )


def is_right(answer: str, value: str) -> bool:
    """Whether a value stands in an answer, and not as a part of a longer one."""
    return re.search(rf"(?<![\w.:/-]){re.escape(value)}(?!\w|[.:/-]\w)", answer) is not None


def main(arguments: argparse.Namespace) -> None:
    """Ask about a picture with its whole KV cache and with two cut ones, then again from what a session kept."""
    if arguments.model is None:
        asked = document()
        model, mmproj = models_dir() / "demo-text-q8_0.gguf", models_dir() / "demo-mmproj-f16.gguf"
    else:
        asked, model = receipt(), Path(arguments.model)
        mmproj = fitted(model)
    budget: Budget = arguments.kv_budget
    if arguments.heatmap:
        check_heatmap(arguments.heatmap, budget)
    image = load_image(asked.picture)
    question, value = asked.first
    print(f"model     {model.name}\npicture   {_short(asked.picture)}\nquestion  {question}\n", flush=True)

    with closing(ProgressBar()) as progress:
        with Runtime(model, mmproj, image_cache=0, progress=progress) as runtime:
            full = _ask(runtime, question, image)
        with Runtime(model, mmproj, image_cache=0, progress=progress, kv_budget=budget) as runtime:
            cut = _ask(runtime, question, image)
            if cut.selection is None:
                n_prompt = cut.figures.prompt_tokens
                raise SettingError(f"--kv-budget {budget} has room for all {n_prompt} tokens: nothing would be cut")
            peer = runtime.generate(question, [image], kv_method=asked.peer, max_tokens=_LONGEST)
            with runtime.session(images=[image]) as session:
                session.cut(SESSION_BUDGET)
                again = session.ask(asked.second[0], max_tokens=_LONGEST)
                n_held = session.selection.n_kept if session.selection else 0

    titles = ("full KV cache", f"{DEFAULT_METHOD}, the default", asked.peer), ("", *[f"kv_budget {budget}"] * 2)
    _print_table([*(("", *title) for title in titles), *_rows([full, cut, peer], value)])
    print("\nThat is one picture. Averages: docs/quality.md; speed: docs/performance.md\n")
    question, value = asked.second
    seconds, share = _seconds(again.figures), _seconds(again.figures) / _seconds(cut.figures)
    print(
        f"session   keeps {SESSION_BUDGET} of the picture's bytes, {n_held} pairs, before it is asked anything\n"
        f"question  {question}\n"
        f"answer    {_shortened(again.text, 60, 1)[0]}, {_verdict(again, value)}\n"
        f"          answered in {seconds:.3f} s, {share:.0%} of the first question's time\n"
    )
    print(f"heat map  {_draw(cut.selection, image, arguments.heatmap)}")
    command = ["edge-shiftkv", "chat", "-m", _short(model), "--mmproj", _short(mmproj)]
    print(f"next      {shlex.join([*command, '--image', _short(asked.picture), '--kv-budget', '1/8'])}")
    if arguments.model is None:
        print("          edge-shiftkv demo -m MODEL.gguf: any language model reads a receipt")


_LONGEST = 32  # tokens of an answer


def _ask(runtime: Runtime, question: str, image: Image.Image) -> Completion:
    """An answer that does not pay for reading the weights from disk."""
    runtime.generate("?", max_tokens=1)
    return runtime.generate(question, [image], max_tokens=_LONGEST)


def _rows(answers: list[Completion], value: str) -> list[tuple[str, ...]]:
    figures = [answer.figures for answer in answers]
    return [
        ("answer", *(answer.text or "(nothing)" for answer in answers)),
        ("which is", *(_verdict(answer, value) for answer in answers)),
        ("KV pairs kept", *(f"{each.kept_tokens} of {each.prompt_tokens}" for each in figures)),
        ("KV cache", *(_size(each.kv_bytes_kept) for each in figures)),
        ("keys, values in", *(f"{each.type_k}, {each.type_v}" for each in figures)),
        ("first token", *(f"{each.prefill_s:.3f} s" for each in figures)),
        ("cut", *(f"{each.selection_s:.3f} s" if each.selection_s else "" for each in figures)),
        ("decode", *(f"{each.decode_s:.3f} s, {each.generated_tokens} tokens" for each in figures)),
    ]


def _print_table(rows: list[tuple[str, ...]]) -> None:
    """Rows of a label and columns, in which long text is wrapped and shortened to two lines."""
    width = (min(shutil.get_terminal_size().columns, 100) - LABEL_WIDTH) // 3 - 2
    for label, *texts in rows:
        columns = [_shortened(text, max(width, 18), 2) for text in texts]
        for i, cells in enumerate(zip_longest(*columns, fillvalue="")):
            line = "  ".join(f"{cell:{width}}" for cell in cells)
            print(f"{label if i == 0 else '':{LABEL_WIDTH}}{line}".rstrip())


def _verdict(answer: Completion, value: str) -> str:
    return "right" if is_right(answer.text, value) else "wrong"


def _shortened(text: str, width: int, lines: int) -> list[str]:
    return textwrap.wrap(text, width, max_lines=lines, placeholder=" ...") or [""]


def _seconds(figures: Figures) -> float:
    return figures.prefill_s + figures.selection_s + figures.decode_s


def _size(n_bytes: int | None) -> str:
    if n_bytes is None:
        return ""
    return f"{n_bytes / 2**10:.0f} KiB" if n_bytes < 2**20 else f"{n_bytes / 2**20:.1f} MiB"


def _draw(selection: Selection, image: Image.Image, wanted: Path | None) -> str:
    """Draw what was kept, and say where. A file that nobody named is a new one, and may fail."""
    path = wanted or _new_file("kept", ".png")
    try:
        draw_heatmap(selection, [image], path)
    except ShiftKVError as error:
        if wanted is not None:
            raise
        return f"not written: {error}"
    return f"{path} shows what {DEFAULT_METHOD} kept of the picture"


def _new_file(stem: str, suffix: str) -> Path:
    names = (f"{stem}{f'-{i}' if i > 1 else ''}{suffix}" for i in count(1))
    return next(path for path in map(Path, names) if not path.exists())


def _short(path: Path) -> str:
    """A path as it is easiest to type from here."""
    try:
        return min(os.path.relpath(path), str(path), key=len)
    except ValueError:  # another drive
        return str(path)
