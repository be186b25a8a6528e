"""Random prompts."""

from __future__ import annotations

import numpy as np

from support.gguf_random import N_VOCAB
from support.native import Chunk, Image


def text(n: int, seed: int = 0) -> list[int]:
    """Text tokens."""
    return np.random.default_rng(seed).integers(3, N_VOCAB, n).tolist()


def image(nx: int, ny: int, n_embd: int, seed: int = 0) -> Image:
    """Embeddings as a projector makes them: alike, and not those of any token."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(n_embd)
    embeddings = 0.4 + common + 0.7 * rng.standard_normal((nx * ny, n_embd))
    return Image(embeddings.astype(np.float32), nx, ny)


def two_images(n_embd: int) -> list[Chunk]:
    """Text, an image, text, an image of another shape, text: 40 + 48 + 10 + 60 + 30 tokens."""
    return [text(40, 1), image(8, 6, n_embd, 2), text(10, 3), image(5, 12, n_embd, 4), text(30, 5)]
