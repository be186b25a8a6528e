"""What a request gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from edge_shiftkv.selection.results import Selection

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Figures:
    """What an answer took.

    prompt_tokens: tokens of the prompt; text_tokens and image_tokens are its parts.
    kept_tokens: KV pairs kept per layer and KV head; prompt_tokens where nothing was cut.
    generated_tokens: tokens of the answer.
    kv_bytes_prompt, kv_bytes_kept: bytes of the prompt's KV pairs over all layers, before and after the selection; None
        for models without a KV cache. Where nothing was cut and layers have sliding windows, they are estimates.
    image_encode_s: seconds in the vision encoder; part of prefill_s.
    prefill_s: seconds from the start until the first token was drawn.
    selection_s: seconds to select KV pairs and hand them over; 0 where nothing was cut.
    decode_s: seconds to decode all tokens after the first.
    tokens_per_second: of decode_s; None for an answer of one token.
    """

    prompt_tokens: int
    text_tokens: int
    image_tokens: int
    kept_tokens: int
    generated_tokens: int
    kv_bytes_prompt: int | None
    kv_bytes_kept: int | None
    image_encode_s: float
    prefill_s: float
    selection_s: float
    decode_s: float
    tokens_per_second: float | None

    def as_dict(self) -> dict[str, int | float | None]:
        """The figures by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Completion:
    """An answer.

    finish_reason: "stop" when the model ended it or a stop string was met, "length" when max_tokens or n_ctx was met.
    selection: what was kept of the prompt's KV pairs; None where nothing was cut.
    """

    text: str
    finish_reason: FinishReason
    figures: Figures
    selection: Selection | None
