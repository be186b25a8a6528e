"""What a selection kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ImageSpan:
    """The prompt tokens `start` .. `stop` - 1 of an image, or of one tile of it: `ny` rows of `nx`, from the top left.

    `image` counts the prompt's images from 0. The grid is mtmd's for M-RoPE models (Qwen2-VL). For others mtmd only
    tells the number of tokens: a square if that is a square number (LLaVA, Gemma 3), else the rows and columns closest
    to the picture's shape. Tiled models (LLaVA-1.6) have a span for each tile, row by row, and then one for the
    overview.
    """

    image: int
    start: int
    stop: int
    nx: int
    ny: int


class Selection:
    """The prompt tokens whose KV pairs were kept, per layer and KV head.

    n_prompt: tokens of the prompt.
    n_kept: KV pairs kept per layer and KV head.
    layers: the model layers that were cut, ascending; sliding-window layers are not.
    image_spans: where the images are, in the prompt's order.
    """

    def __init__(
        self, kept: Mapping[int, npt.NDArray[np.int32]], n_prompt: int, image_spans: Sequence[ImageSpan]
    ) -> None:
        self._kept = dict(kept)
        self.n_prompt = n_prompt
        self.n_kept: int = next(iter(self._kept.values())).shape[1]
        self.layers = tuple(sorted(self._kept))
        self.image_spans = tuple(image_spans)

    def kept(self, layer: int, kv_head: int) -> npt.NDArray[np.int32]:
        """The kept tokens of a layer's KV head: shape [n_kept], indices into the prompt, ascending.

        Raises KeyError for a layer that was not cut, IndexError for a head the layer does not have.
        """
        tokens: npt.NDArray[np.int32] = self._kept[layer][kv_head]
        return tokens

    @property
    def n_heads(self) -> int:
        """The number of (layer, KV head) pairs: as often a token can have been kept."""
        return sum(len(heads) for heads in self._kept.values())

    def counts(self) -> npt.NDArray[np.int32]:
        """How many (layer, KV head) pairs kept each prompt token, shape [n_prompt]."""
        tokens = np.concatenate([heads.ravel() for heads in self._kept.values()])
        return np.bincount(tokens, minlength=self.n_prompt).astype(np.int32)

    def image_counts(self, image: int) -> npt.NDArray[np.int32]:
        """`counts` of the `image`-th image's visual tokens (from 0), shape [n_visual_tokens], its spans in order.

        Raises IndexError when the prompt has no such image.
        """
        counts = self.counts()
        spans = [counts[span.start : span.stop] for span in self.image_spans if span.image == image]
        if not spans:
            raise IndexError(f"the prompt has no image {image}")
        return np.concatenate(spans)


def guess_grid(n_tokens: int, width: int, height: int) -> tuple[int, int]:
    """Columns and rows of `n_tokens` patches of a picture: see `ImageSpan`."""
    side = math.isqrt(n_tokens)
    if side * side == n_tokens:
        return side, side
    divisors = [n for n in range(1, n_tokens + 1) if n_tokens % n == 0]
    nx = min(divisors, key=lambda n: abs(math.log(n * n * height / (n_tokens * width))))
    return nx, n_tokens // nx
