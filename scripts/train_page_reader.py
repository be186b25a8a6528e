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
from train_demo_vlm import EPS_V, Block, linear, write

from edge_shiftkv.page_reader import CELL, CHARS, MAX_CELLS, VIT

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
        batch, side = pictures.shape[:2]
        n = side // CELL
        x = (pictures.float() / 255 - 0.5) / 0.5
        x = x.view(batch, n, CELL, n, CELL, 3).permute(0, 1, 3, 5, 2, 4).reshape(batch, n * n, -1)
        places = self.rows[row : row + n, None] + self.columns[None, column : column + n]
        places = torch.cat([places[:, :-1], places[:, -1:] + self.last], 1)
        x = self.patch(x) + places.reshape(n * n, WIDTH)
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
    """Muon for the layers' matrices, AdamW for the rest; goes on from a checkpoint."""
    torch.manual_seed(0)
    last = args.steps + args.refine
    model = PageReader()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "vit" in name]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    peaks = [(muon, 2e-2), (adam, 2e-3)]
    first = 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        if "muon" in saved:
            muon.load_state_dict(saved["muon"])
            adam.load_state_dict(saved["adam"])
        first = saved["step"]
    # A short queue: the producer waits for the trainer, not the other way round.
    queue: multiprocessing.Queue[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]] = multiprocessing.Queue(4)
    multiprocessing.Process(target=produce, args=(queue, first, last), daemon=True).start()
    start = time.monotonic()
    for step in range(first, last):
        scale = rate_scale(step, args.steps, args.refine)
        for optimizer, peak in peaks:
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        pictures, units = (torch.from_numpy(column) for column in queue.get())
        spare = MAX_CELLS - pictures.shape[1] // CELL + 1
        row, column = torch.randint(spare, (2,)).tolist()
        if step % 2:  # half of the pages begin where those that are read do
            row = column = 0
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(pictures, row, column)
        loss = loss_of(hidden, units)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in peaks:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            inked = (units != 0) & (units != LINE_BREAK)
            right = (hidden.argmax(-1) == units)[inked].float().mean().item()
            print(f"{step} loss {loss.item():.3f} right {right:.4f} {time.monotonic() - start:.0f} s", flush=True)
        if step % 50 == 49 or step == last - 1:
            state = {"muon": muon.state_dict(), "adam": adam.state_dict(), "step": step + 1}
            torch.save({"model": model.state_dict(), **state}, args.checkpoint)


def load(checkpoint: Path) -> PageReader:
    model = PageReader()
    model.load_state_dict(torch.load(checkpoint)["model"])
    model.eval()
    return model


@torch.inference_mode()
def evaluate(args: argparse.Namespace) -> None:
    """Inked cells read right, and how far the GELU is from one-hot."""
    model = load(args.checkpoint)
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
    model = load(args.checkpoint)
    writer = gguf.GGUFWriter(args.dest, "clip")
    writer.add_name("edge_shiftkv page reader, vision tower")
    writer.add_description("Not an mmproj yet: scripts/page_reader.py adds a language model's rows of characters.")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_uint32("clip.vision.embedding_length", WIDTH)
    writer.add_uint32("clip.vision.feed_forward_length", FF)
    writer.add_uint32("clip.vision.block_count", LAYERS)
    writer.add_uint32("clip.vision.attention.head_count", HEADS)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", EPS_V)
    tensors: dict[str, Tensor] = {
        "v.patch_embd.weight": model.patch.weight.view(WIDTH, 3, CELL, CELL),
        "v.patch_embd.bias": model.patch.bias,
        "v.position_embd.row": model.rows,
        "v.position_embd.column": model.columns,
        "v.position_embd.last": model.last,
        "v.post_ln.weight": model.post.weight,
        "v.post_ln.bias": model.post.bias,
        **linear("mm.0", model.p1),
    }
    names = {"n1": "ln1", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_out"}
    for i, block in enumerate(model.vit):
        for ours, theirs in {**names, "n2": "ln2", "up": "ffn_up", "down": "ffn_down"}.items():
            tensors |= linear(f"v.blk.{i}.{theirs}", getattr(block, ours))
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
