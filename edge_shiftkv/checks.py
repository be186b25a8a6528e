"""Checks of what users pass."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from edge_shiftkv.errors import SettingError


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    whole: bool = False,
    above: bool = False,
    note: str = "",
) -> None:
    """Raise SettingError unless a value is a finite number from `low` to `high`.

    name: of the setting, for the error.
    whole: it has to be an integer.
    above: `low` itself is not allowed.
    note: the end of the error, as in "0 is off".
    """
    right = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if right and abs(value) <= sys.float_info.max and low <= value <= high and not (above and value == low):
        return
    kind = "a whole number" if whole else "a finite number"
    limits = [f"{'>' if above else '>='} {low:.12g}"] if low > -math.inf else []
    limits += [f"<= {high:.12g}"] if high < math.inf else []
    text = " ".join([kind, " and ".join(limits)]).rstrip()
    raise SettingError(f"{name} is {value!r}: it has to be {text}{f' ({note})' if note else ''}"[:1000])


def texts(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One text or several, as a tuple. Raises SettingError for what is none."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bytes) or not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise SettingError(f"{name} is {value!r}: it has to be text or a list of texts"[:1000])
    return tuple(value)


def unknown_option(name: str, known: Iterable[str]) -> str:
    """What to say of an option that there is not: the one that was likely meant, and all."""
    known = list(known)
    meant = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {meant[0]}? " if meant else ""
    return f"unknown option {name!r:.200}: {hint}there are {', '.join(known)}"
