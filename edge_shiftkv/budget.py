"""How much of a prompt's KV pairs to keep: a number, a share, or bytes.

This imports nothing of the library, so that the command line can read budgets without it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple, Protocol

from edge_shiftkv.errors import SettingError

Budget = int | float | str | None
"""A number of KV pairs; a share of the prompt's; as text bytes or a share of bytes: see `check_budget`; None: all."""

_LEAST = 2  # KV pairs
_UNITS = {"b": 1, **{f"{c}b": 1000 ** (i + 1) for i, c in enumerate("kmg")}}
_UNITS |= {f"{c}ib": 1024 ** (i + 1) for i, c in enumerate("kmg")}
_BYTES = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kmg]?i?b)", re.IGNORECASE)
_SHARE = re.compile(r"([0-9]{1,15})/([0-9]{1,15})")


class PairBytes(NamedTuple):
    """What the KV pairs of one token take in all layers that are cut.

    stored: bytes as they are stored.
    f16: bytes in f16.
    """

    stored: int
    f16: int


class Stores(Protocol):
    """What stores KV pairs."""

    @property
    def pair_bytes(self) -> PairBytes:
        """Raises ShiftKVError for a model whose KV pairs cannot be cut."""
        ...


def check_budget(budget: Budget) -> Budget:
    """The budget, if it is one. Raises SettingError.

    A whole number, at least 2: KV pairs per layer and KV head. A number between 0 and 1: the share of the prompt's.
    Text with a unit, such as "64MiB": bytes of what is kept, over all layers that are cut. Text such as "1/8": the
    share of the bytes that the prompt's KV pairs in those layers take in f16. None keeps all.
    """
    whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= _LEAST
    share = isinstance(budget, float) and (0 < budget < 1 or (budget >= _LEAST and budget.is_integer()))
    in_text = isinstance(budget, str) and _amount(budget) is not None
    if budget is not None and not whole and not share and not in_text:
        raise SettingError(
            f"kv_budget is {budget!r:.200}: it has to be a number of KV pairs >= {_LEAST}, a share of them between 0 "
            "and 1, bytes such as '64MiB' (KiB, MiB, GiB; kB, MB, GB), a share below 1 of the prompt's bytes in f16 "
            "such as '1/8', or None to keep all"
        )
    return budget


def read_budget(text: str) -> Budget:
    """The budget that somebody wrote. Raises SettingError for text that is none; `check_budget` looks at numbers."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return check_budget(text)


def is_in_bytes(budget: Budget) -> bool:
    """Whether a budget is a number of bytes or a share of them."""
    return isinstance(budget, str)


def most_pairs(budget: Budget, stores: Stores) -> int | None:
    """The KV pairs per layer and KV head that a budget has whatever the prompt is; None where it goes by the prompt.

    Raises SettingError for bytes that are less than two pairs take, and what `pair_bytes` does.
    """
    if isinstance(budget, str):
        amount = _amount(budget)
        if not isinstance(amount, int):
            return None
        size = stores.pair_bytes.stored
        if amount < _LEAST * size:
            raise SettingError(
                f"kv_budget is {budget!r}: it has to be at least {_LEAST * size} bytes, which {_LEAST} KV pairs per "
                "layer and KV head take in this model"
            )
        return amount // size
    return None if budget is None or budget < 1 else int(budget)


def budget_for(budget: Budget, n_tokens: int, stores: Stores) -> int | None:
    """The KV pairs to keep of a prompt of `n_tokens`; None where that is all of them. Raises what `most_pairs` does."""
    if budget is None:
        return None
    n = most_pairs(budget, stores)
    if n is None:
        n = max(_LEAST, _share_of(budget, n_tokens, stores))
    return n if n < n_tokens else None


def _share_of(budget: int | float | str, n_tokens: int, stores: Stores) -> int:
    if not isinstance(budget, str):
        return round(budget * n_tokens)
    share, size = _amount(budget), stores.pair_bytes
    assert share is not None
    return int(share * n_tokens * size.f16 / size.stored)


def _amount(text: str) -> int | Fraction | None:
    """Bytes, at least one, or a share of them; None for text that is neither."""
    if found := _BYTES.fullmatch(text.strip()):
        unit = _UNITS.get(found[2].lower())
        return unit and (int(Fraction(found[1]) * unit) or None)
    if (found := _SHARE.fullmatch(text.strip())) and 0 < int(found[1]) < int(found[2]):
        return Fraction(int(found[1]), int(found[2]))
    return None
