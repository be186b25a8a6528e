"""What a request gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edge_shiftkv.selection.results import Selection

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class DraftFigures:
    """What a draft model did for an answer.

    rounds: passes of the target after the prompt; plain_rounds of them had no draft, as it would not have paid.
    drafted: the target's tokens that were proposed; accepted of them became part of the answer.
    tokens_per_pass: tokens of the answer per round; None without rounds.
    draft_s: seconds in the draft model.
    align_s: seconds to carry text from vocabulary to vocabulary, and to align tokens.
    verify_s: seconds in the target's passes and in drawing tokens.
    """

    rounds: int
    plain_rounds: int
    drafted: int
    accepted: int
    tokens_per_pass: float | None
    draft_s: float
    align_s: float
    verify_s: float


@dataclass(frozen=True)
class Figures:
    """What an answer took.

    prompt_tokens: tokens of the prompt; text_tokens and image_tokens are its parts.
    kept_tokens: KV pairs kept per layer and KV head; prompt_tokens where nothing was cut.
    generated_tokens: tokens of the answer.
    kv_bytes_prompt, kv_bytes_kept: bytes of the prompt's KV pairs over all layers, before and after the selection; None
        for models without a KV cache. Where nothing was cut and layers have sliding windows, they are estimates. What
        such layers keep is part of both; a budget in bytes is for the others.
    type_k, type_v: how keys and values are stored, as in `Runtime`; None for models without a KV cache.
    image_encode_s: seconds in the vision encoder; part of prefill_s.
    prefill_s: seconds from the start until the first token was drawn.
    selection_s: seconds to select KV pairs and hand them over; 0 where nothing was cut.
    decode_s: seconds to decode all tokens after the first.
    tokens_per_second: of decode_s; None for an answer of one token.
    draft: what the draft model did; None without one.
    """

    prompt_tokens: int
    text_tokens: int
    image_tokens: int
    kept_tokens: int
    generated_tokens: int
    kv_bytes_prompt: int | None
    kv_bytes_kept: int | None
    type_k: str | None
    type_v: str | None
    image_encode_s: float
    prefill_s: float
    selection_s: float
    decode_s: float
    tokens_per_second: float | None
    draft: DraftFigures | None = None

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was.

    token: its text; what is no whole character of its own is replaced.
    bytes: the same, as it is; none for control tokens.
    logprob: the natural logarithm of its probability by the model's own logits, without biases, penalties, temperature,
        filters or grammar.
    """

    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs(TokenLogprob):
    """The same of a token of an answer, with the most likely tokens in its place, the best one first."""

    top: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class Completion:
    """An answer.

    finish_reason: "stop" when the model ended it or a stop string was met, "length" when max_tokens or n_ctx was met.
    selection: what was kept of the prompt's KV pairs; None where nothing was cut.
    logprobs: of each token of the answer, those of a stop string among them, where `Options` asked for them.
    """

    text: str
    finish_reason: FinishReason
    figures: Figures
    selection: Selection | None
    logprobs: Sequence[TokenLogprobs] | None = None
