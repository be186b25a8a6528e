"""What the trained models share: a transformer layer, optimizers and their checkpoint, and tensors for GGUF files.

Needs the extra `train` (PyTorch).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

EPS_V, EPS = 1e-6, 1e-5  # of LayerNorm in ViTs, of RMSNorm in text models

Model = TypeVar("Model", bound=nn.Module)


class Block(nn.Module):
    """A transformer layer: of a text model (RMSNorm, RoPE, SwiGLU) or of a ViT (LayerNorm, GELU)."""

    def __init__(self, width: int, heads: int, kv_heads: int, ff: int, *, text: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head, self.text = heads, kv_heads, width // heads, text
        self.n1: nn.Module = nn.RMSNorm(width, eps=EPS) if text else nn.LayerNorm(width, eps=EPS_V)
        self.n2: nn.Module = nn.RMSNorm(width, eps=EPS) if text else nn.LayerNorm(width, eps=EPS_V)
        self.q = nn.Linear(width, width, bias=not text)
        self.k = nn.Linear(width, kv_heads * self.head, bias=not text)
        self.v = nn.Linear(width, kv_heads * self.head, bias=not text)
        self.o = nn.Linear(width, width, bias=not text)
        self.up = nn.Linear(width, ff, bias=not text)
        self.down = nn.Linear(ff, width, bias=not text)
        if text:
            self.gate = nn.Linear(width, ff, bias=False)

    def forward(
        self, x: Tensor, masks: tuple[Tensor, Tensor] | None = None, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x: [batch, tokens, width]; masks: of the tokens that all see and of the others; rope: see `rotate`.

        Masks and rope are for text models only.
        """
        batch, tokens, width = x.shape
        y = self.n1(x)
        q = self.q(y).view(batch, tokens, self.heads, self.head)
        k = self.k(y).view(batch, tokens, self.kv_heads, self.head)
        v = self.v(y).view(batch, tokens, self.kv_heads, self.head)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
            k = k.repeat_interleave(self.heads // self.kv_heads, 2)
            v = v.repeat_interleave(self.heads // self.kv_heads, 2)
        q, k, v = q.transpose(1, 2) * self.head**-0.5, k.permute(0, 2, 3, 1), v.transpose(1, 2)
        if masks is None:
            out = functional.scaled_dot_product_attention(q, k.transpose(-1, -2), v, scale=1.0)
        else:
            # Prefix tokens see the prefix only: two products are cheaper than one over everything.
            prefix, segments = masks
            n = prefix.shape[-1]
            out = torch.cat(
                [
                    functional.softmax(q[:, :, :n] @ k[..., :n] + prefix, -1, dtype=q.dtype) @ v[:, :, :n],
                    functional.softmax(q[:, :, n:] @ k + segments, -1, dtype=q.dtype) @ v,
                ],
                2,
            )
        x = x + self.o(out.transpose(1, 2).reshape(batch, tokens, width))
        y = self.n2(x)
        if self.text:
            return x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return x + self.down(functional.gelu(self.up(y), approximate="tanh"))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding on neighbouring pairs, as llama.cpp's llama architecture has it.

    x: [batch, tokens, heads, head].
    rope: cosines and sines, [batch, tokens, 1, head / 2].
    """
    cos, sin = rope
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def patches(pictures: Tensor, side: int) -> Tensor:
    """Pictures, uint8 [batch, n * side, n * side, 3], as rows for a ViT, [batch, n * n, 3 * side * side]."""
    batch, n = pictures.shape[0], pictures.shape[1] // side
    x = (pictures.float() / 255 - 0.5) / 0.5
    return x.view(batch, n, side, n, side, 3).permute(0, 1, 3, 5, 2, 4).reshape(batch, n * n, -1)


class Training:
    """Muon for the matrices of a model's layers (`blocks` and `vit`), AdamW for the rest; goes on from a checkpoint.

    first: the step that it begins with.
    """

    def __init__(self, model: nn.Module, checkpoint: Path) -> None:
        named = model.named_parameters()
        matrices = [p for name, p in named if p.ndim == 2 and ("blocks" in name or "vit" in name)]
        others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        self._muon = torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.01, momentum=0.95)
        self._adam = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self._peaks = [(self._muon, 2e-2), (self._adam, 2e-3)]
        self._model = model
        self._checkpoint = checkpoint
        self.first = 0
        if checkpoint.exists():
            saved = torch.load(checkpoint)
            model.load_state_dict(saved["model"])
            if "muon" in saved:
                self._muon.load_state_dict(saved["muon"])
                self._adam.load_state_dict(saved["adam"])
            self.first = saved["step"]

    def steps(self, last: int) -> Iterator[int]:
        """The steps before `last`; the checkpoint is written now and then, and at the end."""
        for step in range(self.first, last):
            yield step
            if step % 50 == 49 or step == last - 1:
                state = {"muon": self._muon.state_dict(), "adam": self._adam.state_dict(), "step": step + 1}
                torch.save({"model": self._model.state_dict(), **state}, self._checkpoint)

    def descend(self, loss: Tensor, scale: float) -> None:
        """Go a step down; `scale` is the learning rates' over their peaks."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimizer, peak in self._peaks:
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad()


def produced(produce: Callable[..., None], *arguments: object) -> multiprocessing.Queue[Any]:
    """A queue that a process of its own fills: it is short, so that the producer waits for the trainer."""
    queue: multiprocessing.Queue[Any] = multiprocessing.Queue(4)
    multiprocessing.Process(target=produce, args=(queue, *arguments), daemon=True).start()
    return queue


def load(model: Model, checkpoint: Path) -> Model:
    """A model with the weights of its checkpoint, to be asked."""
    model.load_state_dict(torch.load(checkpoint)["model"])
    model.eval()
    return model


def linear(name: str, layer: nn.Linear) -> dict[str, Tensor]:
    """A layer's tensors by their names in a GGUF file."""
    parameters = {f"{name}.weight": layer.weight}
    return parameters if layer.bias is None else {**parameters, f"{name}.bias": layer.bias}


def vit_layers(blocks: Iterable[Any]) -> dict[str, Tensor]:
    """The tensors of a ViT's layers by their names in an mmproj."""
    names = {"n1": "ln1", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_out"}
    tensors: dict[str, Tensor] = {}
    for i, block in enumerate(blocks):
        for ours, theirs in {**names, "n2": "ln2", "up": "ffn_up", "down": "ffn_down"}.items():
            tensors |= linear(f"v.blk.{i}.{theirs}", getattr(block, ours))
    return tensors


def write(writer: gguf.GGUFWriter, tensors: dict[str, Tensor], matrix_type: gguf.GGMLQuantizationType) -> None:
    """Write tensors, matrices as `matrix_type`, the rest (and position embeddings, which llama.cpp adds) as f32."""
    for name, tensor in tensors.items():
        data = tensor.detach().float().numpy()
        if data.ndim == 1 or "position_embd" in name:
            writer.add_tensor(name, data)
        elif matrix_type == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, data.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, matrix_type), raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
