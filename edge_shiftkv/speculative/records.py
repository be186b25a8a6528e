"""What a draft model tells of its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Proposal:
    """Tokens of the target that a draft proposes.

    probabilities: that the draft gave them, one for each; only for a rule that needs them.
    """

    tokens: Sequence[int] = ()
    probabilities: Sequence[float] = ()


@dataclass(frozen=True)
class Drafted:
    """A draft, and what it took; by default none.

    n_drafted: tokens of the draft model in it.
    confidences: what the draft model gave each of them, and that of a token at which it ended for lack of confidence.
    n_read, reading_s: tokens that the draft model read before, at once, and the seconds; part of model_s.
    n_passes: the other passes of the draft model.
    model_s, bridge_s: seconds in the draft model, and from its tokens to the target's and back.
    """

    proposal: Proposal = field(default_factory=Proposal)
    n_drafted: int = 0
    confidences: Sequence[float] = ()
    n_read: int = 0
    n_passes: int = 0
    reading_s: float = 0.0
    model_s: float = 0.0
    bridge_s: float = 0.0


@dataclass(frozen=True)
class Judged:
    """What the draft model would have written, had it been asked.

    n, n_agreed: tokens of the answer that it was asked about, and those that it would have written, too.
    n_read, seconds: tokens that it read, at once, and the time it all took.
    """

    n: int
    n_agreed: int
    n_read: int
    seconds: float
