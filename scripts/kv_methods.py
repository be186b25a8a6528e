"""What benches are to compare, as text: methods and KV types."""

from __future__ import annotations

import json
from dataclasses import replace

from edge_shiftkv.selection.methods import Method, method


def configured(text: str) -> Method:
    """The method that a text names, with settings where they are not its defaults: ``paper:gamma=3,observed=0.5``.

    Raises SettingError.
    """
    name, _, settings = text.partition(":")
    found = method(name)
    pairs = (setting.split("=") for setting in settings.split(",") if setting)
    return replace(found, **{key: json.loads(value) for key, value in pairs})  # type: ignore[type-var]


def kv_types(text: str) -> tuple[str, str]:
    """The types of keys and values that ``q8_0`` or ``q8_0/q4_0`` stand for."""
    type_k, _, type_v = text.partition("/")
    return type_k, type_v or type_k
