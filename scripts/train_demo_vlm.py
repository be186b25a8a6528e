"""Train, evaluate and export the demo model: a tiny LLaVA that reads pictures of documents (`demo_documents.py`).

A ViT (2 layers, width 128) sees each of the 16 x 16 cells as one patch, a two-layer projector hands 256 visual tokens
to a text model of the llama architecture (4 layers, width 192, 6 heads on 2 KV heads). About 2.2 M parameters.

    python scripts/train_demo_vlm.py train  --checkpoint demo.pt      # about 45 minutes on 2 cores with bf16
    python scripts/train_demo_vlm.py eval   --checkpoint demo.pt      # exact match per task on held-out documents
    python scripts/train_demo_vlm.py export --checkpoint demo.pt      # GGUF files into models/demo/
    python scripts/train_demo_vlm.py check  --checkpoint demo.pt      # llama.cpp's greedy answers against torch's

Needs the extra `train` (PyTorch), and for `export` and `check` the patched llama-cpp-python. But for the page reader's
training, nothing else in the project needs PyTorch.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from demo_documents import CELL, CHARS, GRID, SIZE, TASKS, WORDINGS, Document, Question, make_document
from intervals import wilson
from torch import Tensor, nn
from torch.nn import functional
from training import EPS, EPS_V, Block, Training, linear, load, patches, produced, vit_layers, write

MODEL_DIR = Path(__file__).resolve().parent.parent / "models" / "demo"

# Tokens are the 256 bytes, then these, then unused ones that fill up the last block of 32.
BOS, END, USER, ASSISTANT, SYSTEM = range(256, 261)
SPECIAL = {BOS: "<|bos|>", END: "<|end|>", USER: "<|user|>", ASSISTANT: "<|assistant|>", SYSTEM: "<|system|>"}
N_VOCAB = 288
NEWLINE = ord("\n")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

BEFORE_IMAGE = [BOS, USER, NEWLINE]
N_PATCH = GRID * GRID
N_PREFIX = len(BEFORE_IMAGE) + N_PATCH
N_SEGMENT = 208  # tokens of questions and answers packed behind one picture
N_CONTEXT = 1024
TRAIN_SEED = 10_000_000  # documents from here on are trained on; smaller seeds are held out

# ViT, then text model
V_WIDTH, V_LAYERS, V_HEADS, V_FF = 128, 2, 4, 320
WIDTH, LAYERS, HEADS, KV_HEADS, FF = 192, 4, 6, 2, 512
HEAD = WIDTH // HEADS


def question_tokens(question: str) -> list[int]:
    """What follows the picture, up to where the answer starts."""
    return [*question.encode(), END, NEWLINE, ASSISTANT, NEWLINE]


def answer_tokens(answer: str) -> list[int]:
    return [*answer.encode(), END]


class DemoVLM(nn.Module):
    """The whole model."""

    freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(CELL * CELL * 3, V_WIDTH, bias=False)
        self.vpos = nn.Parameter(torch.randn(N_PATCH, V_WIDTH) * 0.02)
        self.vit = nn.ModuleList([Block(V_WIDTH, V_HEADS, V_HEADS, V_FF, text=False) for _ in range(V_LAYERS)])
        self.post = nn.LayerNorm(V_WIDTH, eps=EPS_V)
        self.p1 = nn.Linear(V_WIDTH, WIDTH)
        self.p2 = nn.Linear(WIDTH, WIDTH)
        self.aux = nn.Linear(WIDTH, len(CHARS) + 1)  # which character is in the cell: for training only
        self.emb = nn.Embedding(N_VOCAB, WIDTH)
        nn.init.normal_(self.emb.weight, std=0.1)
        self.blocks = nn.ModuleList([Block(WIDTH, HEADS, KV_HEADS, FF, text=True) for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(WIDTH, eps=EPS)
        self.head = nn.Linear(WIDTH, N_VOCAB, bias=False)
        self.register_buffer("freq", 10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD))

    def image(self, pictures: Tensor) -> Tensor:
        """Visual tokens [batch, N_PATCH, WIDTH] of pictures, uint8 [batch, SIZE, SIZE, 3]."""
        x = self.patch(patches(pictures, CELL)) + self.vpos
        for block in self.vit:
            x = block(x)
        return self.p2(functional.gelu(self.p1(self.post(x)), approximate="tanh"))

    def forward(self, pictures: Tensor, ids: Tensor, segment: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens, and logits [batch, tokens, N_VOCAB] of the tokens behind the picture.

        ids, segment, pos: int64 [batch, tokens]. A token sees the prefix and its own segment.
        """
        batch, tokens = ids.shape
        visual = self.image(pictures)
        before = self.emb(torch.tensor(BEFORE_IMAGE).expand(batch, -1))
        x = torch.cat([before, visual.to(before.dtype), self.emb(ids)], 1)
        pos = torch.cat([torch.arange(N_PREFIX).expand(batch, -1), pos], 1)
        angle = pos[..., None].float() * self.freq
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        rope = angle.cos()[:, :, None].to(dtype), angle.sin()[:, :, None].to(dtype)
        total = N_PREFIX + tokens
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        prefix_mask = torch.zeros(N_PREFIX, N_PREFIX, dtype=dtype).masked_fill_(~causal[:N_PREFIX, :N_PREFIX], -1e9)
        own = (segment[:, :, None] == segment[:, None, :]) & causal[N_PREFIX:, N_PREFIX:]
        segment_mask = torch.zeros(batch, 1, tokens, total, dtype=dtype)
        segment_mask[..., N_PREFIX:].masked_fill_(~own[:, None], -1e9)
        for block in self.blocks:
            x = block(x, (prefix_mask, segment_mask), rope)
        return visual, self.head(self.norm(x[:, N_PREFIX:]))


# Data


def draw_question(document: Document, rng: np.random.RandomState, mix: npt.NDArray[np.float64]) -> Question:
    task = TASKS[rng.choice(len(TASKS), p=mix)]
    known: dict[str, list[str | int]] = {"lookup": [*document.values], "line": [*document.lines]}
    subjects = known.get(task, [""])
    return document.ask(task, rng.randint(len(WORDINGS[task])), subjects[rng.randint(len(subjects))])


def pack(seed: int, mix: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.generic], ...]:
    """A document with conversations about it: picture, cells, then ids, targets, segment and pos, int64 [N_SEGMENT].

    A quarter of the conversations have a second question.
    """
    document = make_document(seed)
    rng = np.random.RandomState(seed ^ 0x1234567)
    ids, segment, pos = (np.zeros(N_SEGMENT, np.int64) for _ in range(3))
    target = np.full(N_SEGMENT, -100, np.int64)
    n, number, misfits = 0, 1, 0
    while misfits < 4:
        turns = []
        for turn in range(1 + (rng.rand() < 0.25)):
            item = draw_question(document, rng, mix)
            between = [NEWLINE, USER, NEWLINE] if turn else []
            turns.append((between + question_tokens(item.question), answer_tokens(item.answer)))
        if n + sum(len(asked) + len(answer) for asked, answer in turns) > N_SEGMENT:
            misfits += 1
            continue
        at = N_PREFIX
        for asked, answer in turns:
            size = len(asked) + len(answer)
            ids[n : n + size] = asked + answer
            target[n + len(asked) - 1 : n + size - 1] = answer
            segment[n : n + size] = number
            pos[n : n + size] = np.arange(at, at + size)
            n += size
            at += size
        number += 1
    return document.image, document.cells.reshape(-1), ids, target, segment, pos


def task_mix(step: int, steps: int) -> npt.NDArray[np.float64]:
    """Shares of the tasks: long readings first, which teach the way over the page, then mostly look-ups and lists.

    From `steps` on the model is refined: mostly look-ups, which are learned last.
    """
    if step >= steps:
        return np.array([0.7, 0.1, 0.12, 0.08])
    return np.array([0.15, 0.35, 0.1, 0.4] if step < 0.12 * steps else [0.4, 0.2, 0.25, 0.15])


def rate_scale(step: int, first: int, steps: int, refine: int) -> float:
    """Learning rate over its peak: a cosine to 2 %, then, to refine, linearly from 30 % to none; short warm-ups."""
    if step >= steps:
        return 0.3 * min(1.0, (step - max(first, steps) + 1) / 20) * (1 - (step - steps) / refine)
    return min(1.0, (step - first + 1) / 60) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def produce(
    queue: multiprocessing.Queue[list[npt.NDArray[np.generic]]], first: int, steps: int, refine: int, batch: int
) -> None:
    torch.set_num_threads(1)
    for step in range(first, steps + refine):
        seeds = [(1 + (step * batch + i) * 7919) % 2**31 + TRAIN_SEED for i in range(batch)]
        items = [pack(seed, task_mix(step, steps)) for seed in seeds]
        queue.put([np.stack(column) for column in zip(*items, strict=True)])


# Commands


def train(args: argparse.Namespace) -> None:
    """Train, from where the checkpoint is on."""
    torch.manual_seed(0)
    last = args.steps + args.refine
    model = DemoVLM()
    training = Training(model, args.checkpoint)
    compiled = torch.compile(model)
    queue = produced(produce, training.first, args.steps, args.refine, args.batch)
    start = time.monotonic()
    for step in training.steps(last):
        pictures, cells, ids, target, segment, pos = (torch.from_numpy(column) for column in queue.get())
        with torch.autocast("cpu", torch.bfloat16):
            visual, logits = compiled(pictures, ids, segment, pos)
            loss = functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-100)
            glyphs = functional.cross_entropy(model.aux(visual).float().flatten(0, 1), cells.long().flatten())
            total = loss + (0.3 * glyphs if step < args.steps / 2 else 0)
        training.descend(total, rate_scale(step, training.first, args.steps, args.refine))
        if step % 10 == 0:
            print(
                f"{step} loss {loss.item():.3f} glyphs {glyphs.item():.3f} {time.monotonic() - start:.0f} s", flush=True
            )


@torch.inference_mode()
def evaluate(args: argparse.Namespace) -> None:
    """Exact match: a greedy answer is right if and only if, given the right answer, every next token is."""
    model = load(DemoVLM(), args.checkpoint)
    right = dict.fromkeys(TASKS, 0)
    asked = dict.fromkeys(TASKS, 0)
    for seed in range(args.documents):
        document = make_document(seed)
        questions = document.questions()
        rows = [(question_tokens(item.question), answer_tokens(item.answer)) for item in questions]
        length = max(len(question) + len(answer) for question, answer in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for i, (question, answer) in enumerate(rows):
            ids[i, : len(question) + len(answer)] = torch.tensor(question + answer)
        pos = torch.arange(N_PREFIX, N_PREFIX + length).expand(len(rows), -1)
        picture = torch.from_numpy(document.image).expand(len(rows), -1, -1, -1)
        choice = model(picture, ids, torch.ones_like(ids), pos)[1].argmax(-1)
        for i, (item, (question, answer)) in enumerate(zip(questions, rows, strict=True)):
            span = choice[i, len(question) - 1 : len(question) + len(answer) - 1]
            asked[item.task] += 1
            right[item.task] += span.tolist() == answer
    for task in TASKS:
        low, high = wilson(right[task], asked[task])
        share = right[task] / asked[task]
        print(f"{task:10s} {100 * share:5.1f} % of {asked[task]} (95 % interval {100 * low:.1f} to {100 * high:.1f})")


@torch.inference_mode()
def greedy(model: DemoVLM, document: Document, question: str, limit: int = 160) -> str:
    """The model's greedy answer."""
    ids = question_tokens(question)
    picture = torch.from_numpy(document.image)[None]
    answer: list[int] = []
    while len(answer) < limit:
        row = torch.tensor([ids + answer])
        pos = torch.arange(N_PREFIX, N_PREFIX + row.shape[1])[None]
        token = int(model(picture, row, torch.ones_like(row), pos)[1][0, -1].argmax())
        if token == END:
            break
        answer.append(token)
    return bytes(token for token in answer if token < 256).decode(errors="replace")


def check(args: argparse.Namespace) -> None:
    """Ask one question about each of many held-out documents, in torch and through llama.cpp and mtmd."""
    from edge_shiftkv import Runtime

    model = load(DemoVLM(), args.checkpoint)
    differ = []
    text = args.dest / f"demo-text-{args.type}.gguf"
    with Runtime(str(text), mmproj=str(args.dest / "demo-mmproj-f16.gguf"), n_ctx=N_CONTEXT) as runtime:
        for seed in range(args.documents):
            document = make_document(seed)
            questions = document.questions()
            item = questions[seed % len(questions)]
            theirs = runtime.generate(
                item.question, images=[document.pil_image()], max_tokens=160, temperature=0.0
            ).text
            ours = greedy(model, document, item.question)
            if ours != theirs:
                differ.append((seed, item.question, ours, theirs))
    for seed, question, ours, theirs in differ:
        print(f"document {seed}, {question!r}: torch {ours!r}, llama.cpp {theirs!r}")
    print(f"{args.documents - len(differ)} of {args.documents} answers are the same ({args.type})")


# Export


def byte_tokens() -> list[str]:
    """The 256 bytes in GPT-2's printable spelling: bytes that print stand for themselves, others move behind 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)}
    moved: Iterator[int] = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def export_text(model: DemoVLM, path: Path, file_type: gguf.GGMLQuantizationType) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("edge_shiftkv demo document reader")
    writer.add_description("A tiny LLaVA-style model that reads synthetic documents; for demonstration and tests.")
    writer.add_license("mit")
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_Q8_0 if file_type == gguf.GGMLQuantizationType.Q8_0 else gguf.LlamaFileType.MOSTLY_F16
    )
    writer.add_context_length(N_CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(N_VOCAB)

    unused = [f"<|unused{i}|>" for i in range(N_VOCAB - 256 - len(SPECIAL))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*byte_tokens(), *SPECIAL.values(), *unused])
    writer.add_token_types(
        [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.UNUSED] * len(unused)
    )
    # llama.cpp wants merges; a pair of control bytes, which no text holds, merges into nothing that is a token
    writer.add_token_merges([f"{byte_tokens()[0]} {byte_tokens()[1]}"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(END)
    writer.add_eot_token_id(END)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    tensors: dict[str, Tensor] = {
        "token_embd.weight": model.emb.weight,
        "output_norm.weight": model.norm.weight,
        "output.weight": model.head.weight,
    }
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "up": "ffn_up", "down": "ffn_down"}
    for i, block in enumerate(model.blocks):
        tensors[f"blk.{i}.attn_norm.weight"] = block.n1.weight
        tensors[f"blk.{i}.ffn_norm.weight"] = block.n2.weight
        for ours, theirs in {**names, "gate": "ffn_gate"}.items():
            tensors |= linear(f"blk.{i}.{theirs}", getattr(block, ours))
    write(writer, tensors, file_type)


def export_projector(model: DemoVLM, path: Path) -> None:
    from edge_shiftkv.page_reader import Tower, mmproj_writer

    tower = Tower(V_WIDTH, V_FF, V_LAYERS, V_HEADS, EPS_V)
    writer = mmproj_writer(path, "edge_shiftkv demo document reader, vision", SIZE, WIDTH, tower)
    tensors: dict[str, Tensor] = {
        "v.patch_embd.weight": model.patch.weight.view(V_WIDTH, 3, CELL, CELL),
        "v.position_embd.weight": model.vpos,
        "v.post_ln.weight": model.post.weight,
        "v.post_ln.bias": model.post.bias,
        **linear("mm.0", model.p1),
        **linear("mm.2", model.p2),
        **vit_layers(model.vit),
    }
    write(writer, tensors, gguf.GGMLQuantizationType.F16)


def export(args: argparse.Namespace) -> None:
    model = load(DemoVLM(), args.checkpoint)
    args.dest.mkdir(parents=True, exist_ok=True)
    export_text(model, args.dest / "demo-text-q8_0.gguf", gguf.GGMLQuantizationType.Q8_0)
    export_text(model, args.dest / "demo-text-f16.gguf", gguf.GGMLQuantizationType.F16)
    export_projector(model, args.dest / "demo-mmproj-f16.gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, evaluate, export and check the demo model.")
    commands = parser.add_subparsers(required=True)
    for name, run in (("train", train), ("eval", evaluate), ("export", export), ("check", check)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--checkpoint", type=Path, default=Path("demo.pt"))
        if name == "train":
            command.add_argument("--steps", type=int, default=2200)
            command.add_argument("--refine", type=int, default=0, help="further steps, mostly of look-ups (default 0)")
            command.add_argument("--batch", type=int, default=24)
        if name in ("eval", "check"):
            command.add_argument("--documents", type=int, default=300, help="held-out documents (default 300)")
        if name in ("export", "check"):
            command.add_argument("--dest", type=Path, default=MODEL_DIR)
        if name == "check":
            command.add_argument("--type", choices=("f16", "q8_0"), default="f16")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
