"""How a draft model is used."""

from __future__ import annotations

import os
from dataclasses import dataclass

from edge_shiftkv.errors import SettingError
from edge_shiftkv.speculative.rules import SAMPLING_RULES, SamplingRule

MOST_DRAFTED = 16
"""The most tokens that can be drafted, and proposed, in a round."""


@dataclass(frozen=True)
class DraftOptions:
    """How a draft model is used.

    n_draft: tokens drafted in every round, 1 to 16; None drafts as many as pay, which may be none: some passes of the
        target are timed for that when the models are loaded.
    rule: how drafts are verified at a temperature: "coupled", the default, gives the answer that the target gives
        without a draft; "tokentiming" is the rule of the paper, which does not. Temperature 0 is always exact.
    mmproj: path of the draft's own vision encoder and projector; without one, it is given the text of a prompt only.
    min_confidence: a draft ends before a token that the draft model gives a lower probability.

    Raises SettingError when a value is out of its range.
    """

    n_draft: int | None = None
    rule: SamplingRule | None = None
    mmproj: str | os.PathLike[str] | None = None
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.n_draft is not None and not 1 <= self.n_draft <= MOST_DRAFTED:
            raise SettingError(f"n_draft is {self.n_draft}: it has to be 1 to {MOST_DRAFTED}, or None for what pays")
        if self.rule is not None and self.rule not in SAMPLING_RULES:
            raise SettingError(f"draft rule {self.rule!r} is not known: use one of {', '.join(SAMPLING_RULES)}")
        if not 0 <= self.min_confidence <= 1:
            raise SettingError(f"min_confidence is {self.min_confidence}: it has to be in [0, 1]")
