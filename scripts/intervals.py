"""How sure a measured share is."""

from __future__ import annotations

import math


def wilson(right: float, asked: int) -> tuple[float, float]:
    """The 95 % interval of the share right / asked, by Wilson's score; parts of right answers may count in `right`."""
    z2 = 1.96**2
    middle = (right + z2 / 2) / (asked + z2)
    half = math.sqrt(z2 * (right * (asked - right) / asked + z2 / 4)) / (asked + z2)
    return max(0.0, middle - half), min(1.0, middle + half)  # but for rounding, they are within
