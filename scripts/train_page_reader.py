"""Train, evaluate and export the page reader's vision tower, which reads one character in each cell of a page.

A ViT (2 layers, width 192) sees each cell of 14 x 14 pixels as one patch; the projector's hidden layer has one unit for
each printable ASCII character and one for the line break, which the last cell of a row stands for. It is trained so
that its GELU is one-hot. No language model takes part: the projector's second matrix is the embedding rows of these
characters in any language model, which `page_reader.py` writes. Pages of 16 x 16, 24 x 24 and 32 x 32 cells are trained
on together: a position is a row's embedding plus a column's, plus one for the last column.

    python scripts/train_page_reader.py train  --checkpoint page.pt   # about 20 minutes on 2 cores with bf16
    python scripts/train_page_reader.py eval   --checkpoint page.pt   # right characters, also in typefaces never seen
    python scripts/train_page_reader.py export --checkpoint page.pt   # models/page-reader/vit-f16.gguf

Needs the extra `train` (PyTorch). Nothing that reads pages does.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from intervals import wilson
from page_pictures import FONTS, LINE_BREAK, TRAINED, paint
from torch import Tensor, nn
from torch.nn import functional
from training import EPS_V, Block, Training, linear, load, patches, produced, vit_layers, write

from edge_shiftkv.page_reader import CELL, CHARS, MAX_CELLS, VIT, Tower

WIDTH, LAYERS, HEADS, FF = 192, 2, 4, 448
N_UNITS = LINE_BREAK + 1
TOKENS = 4096  # cells of a step
SIZES = (16, 24, 32)  # cells a side of a page
SIZE_SHARES = (0.5, 0.3, 0.2)
TRAIN_SEED = 10_000_000  # pages from here on are trained on
BLANK_WEIGHT = 0.3


class PageReader(nn.Module):
    """The ViT and the projector's first matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(CELL * CELL * 3, WIDTH)
        self.rows = nn.Parameter(torch.randn(MAX_CELLS, WIDTH) * 0.02)
        self.columns = nn.Parameter(torch.randn(MAX_CELLS, WIDTH) * 0.02)
        self.last = nn.Parameter(torch.randn(WIDTH) * 0.02)
        self.vit = nn.ModuleList([Block(WIDTH, HEADS, HEADS, FF, text=False) for _ in range(LAYERS)])
        self.post = nn.LayerNorm(WIDTH, eps=EPS_V)
        self.p1 = nn.Linear(WIDTH, N_UNITS)

    def forward(self, pictures: Tensor, row: int = 0, column: int = 0) -> Tensor:
        """The hidden layer before its GELU, [batch, n * n, N_UNITS], of pictures, uint8 [batch, 14 n, 14 n, 3].

        row, column: of the position embeddings, where the page begins.
        """
        n = pictures.shape[1] // CELL
        places = self.rows[row : row + n, None] + self.columns[None, column : column + n]
        places = torch.cat([places[:, :-1], places[:, -1:] + self.last], 1)
        x = self.patch(patches(pictures, CELL)) + places.reshape(n * n, WIDTH)
        for block in self.vit:
            x = block(x)
        hidden: Tensor = self.p1(self.post(x))
        return hidden


def random_cells(rng: np.random.RandomState, n: int) -> npt.NDArray[np.uint8]:
    """Characters of a page that means nothing: words of random characters, blanks between them, blank lines."""
    cells = rng.randint(1, len(CHARS), size=(n, n)).astype(np.uint8)
    digits = rng.rand(n, n) < 0.25
    cells[digits] = CHARS.index("0") + rng.randint(0, 10, size=int(digits.sum()))
    cells[rng.rand(n, n) < rng.choice([0.1, 0.3, 0.6])] = 0
    cells[rng.rand(n) < 0.15] = 0
    cells[:, -1] = 0
    return cells


def targets(cells: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The unit that each cell is to switch on, [n * n]."""
    units = cells.astype(np.int64)
    units[:, -1] = LINE_BREAK
    return units.reshape(-1)


def page(seed: int, n: int, fonts: range) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """A picture and its units."""
    rng = np.random.RandomState(seed)
    cells = random_cells(rng, n)
    return paint(rng, cells, fonts), targets(cells)


def produce(
    queue: multiprocessing.Queue[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]], first: int, steps: int
) -> None:
    for step in range(first, steps):
        rng = np.random.RandomState(TRAIN_SEED + step)
        n = int(rng.choice(SIZES, p=SIZE_SHARES))
        seeds = TRAIN_SEED + rng.randint(0, 2**31 - TRAIN_SEED, size=TOKENS // (n * n))
        pictures, units = zip(*(page(int(seed), n, range(len(TRAINED))) for seed in seeds), strict=True)
        queue.put((np.stack(pictures), np.stack(units)))


def loss_of(hidden: Tensor, units: Tensor) -> Tensor:
    """Cross-entropy, and the squared distance of the GELU from one-hot; blanks count less."""
    hidden, units = hidden.float().flatten(0, 1), units.flatten()
    weight = torch.where((units == 0) | (units == LINE_BREAK), BLANK_WEIGHT, 1.0)
    wanted = functional.one_hot(units, N_UNITS).float()
    distance = (functional.gelu(hidden, approximate="tanh") - wanted).square().sum(-1)
    # Eight times: at one-hot, where the hidden values are 1.16 and 0, next to nothing of the entropy is left.
    entropy = functional.cross_entropy(8 * hidden, units, reduction="none")
    return ((entropy + distance) * weight).sum() / weight.sum()


def rate_scale(step: int, steps: int, refine: int) -> float:
    """Learning rate over its peak: a warm-up and a cosine to 1 %, then, to refine, linearly from 30 % to none."""
    if step >= steps:
        return 0.3 * (1 - (step - steps) / refine)
    return min(1.0, (step + 1) / 60) * (0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))


def train(args: argparse.Namespace) -> None:
    """Train, from where the checkpoint is on."""
    torch.manual_seed(0)
    last = args.steps + args.refine
    model = PageReader()
    training = Training(model, args.checkpoint)
    queue = produced(produce, training.first, last)
    start = time.monotonic()
    for step in training.steps(last):
        pictures, units = (torch.from_numpy(column) for column in queue.get())
        spare = MAX_CELLS - pictures.shape[1] // CELL + 1
        row, column = torch.randint(spare, (2,)).tolist()
        if step % 2:  # half of the pages begin where those that are read do
            row = column = 0
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(pictures, row, column)
        loss = loss_of(hidden, units)
        training.descend(loss, rate_scale(step, args.steps, args.refine))
        if step % 20 == 0:
            inked = (units != 0) & (units != LINE_BREAK)
            right = (hidden.argmax(-1) == units)[inked].float().mean().item()
            print(f"{step} loss {loss.item():.3f} right {right:.4f} {time.monotonic() - start:.0f} s", flush=True)


@torch.inference_mode()
def evaluate(args: argparse.Namespace) -> None:
    """Inked cells read right, and how far the GELU is from one-hot."""
    model = load(PageReader(), args.checkpoint)
    for n in SIZES[1:]:
        for what, fonts in (("trained", range(len(TRAINED))), ("held out", range(len(TRAINED), len(FONTS)))):
            right = inked = 0
            wrong = dict.fromkeys((FONTS[i][0] for i in fonts), 0)
            far = []
            for seed in range(args.pages):
                font = fonts[seed % len(fonts)]
                picture, units = page(seed, n, range(font, font + 1))
                hidden = functional.gelu(model(torch.from_numpy(picture)[None])[0], approximate="tanh").numpy()
                ink = (units != 0) & (units != LINE_BREAK)
                hits = hidden.argmax(-1) == units
                right, inked = right + int(hits[ink].sum()), inked + int(ink.sum())
                wrong[FONTS[font][0]] += int((~hits).sum())
                far.append(np.abs(hidden - np.eye(N_UNITS)[units]).sum(-1).mean())
            low, high = wilson(right, inked)
            print(
                f"{n} x {n}, {what} typefaces: {100 * right / inked:.2f} % of {inked} inked cells "
                f"({100 * low:.2f} to {100 * high:.2f}), distance from one-hot {np.mean(far):.3f}"
            )
            print("  wrong cells:", {name: count for name, count in wrong.items() if count})


def export(args: argparse.Namespace) -> None:
    """Write the GGUF file that `page_reader.py` makes mmprojs from."""
    model = load(PageReader(), args.checkpoint)
    writer = gguf.GGUFWriter(args.dest, "clip")
    writer.add_name("edge_shiftkv page reader, vision tower")
    writer.add_description("Not an mmproj yet: scripts/page_reader.py adds a language model's rows of characters.")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    Tower(WIDTH, FF, LAYERS, HEADS, EPS_V).add(writer)
    tensors: dict[str, Tensor] = {
        "v.patch_embd.weight": model.patch.weight.view(WIDTH, 3, CELL, CELL),
        "v.patch_embd.bias": model.patch.bias,
        "v.position_embd.row": model.rows,
        "v.position_embd.column": model.columns,
        "v.position_embd.last": model.last,
        "v.post_ln.weight": model.post.weight,
        "v.post_ln.bias": model.post.bias,
        **linear("mm.0", model.p1),
        **vit_layers(model.vit),
    }
    write(writer, tensors, gguf.GGMLQuantizationType.F16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, evaluate and export the page reader's vision tower.")
    commands = parser.add_subparsers(required=True)
    for name, run in (("train", train), ("eval", evaluate), ("export", export)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--checkpoint", type=Path, default=Path("page.pt"))
        if name == "train":
            command.add_argument("--steps", type=int, default=2000)
            command.add_argument("--refine", type=int, default=0, help="further steps at a lower rate (default 0)")
        if name == "eval":
            command.add_argument("--pages", type=int, default=120, help="held-out pages of each kind (default 120)")
        if name == "export":
            command.add_argument("--dest", type=Path, default=VIT)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
