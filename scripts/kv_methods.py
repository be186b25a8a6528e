"""Selection methods as text: a name, with settings where they are not its defaults: ``paper:gamma=3,observed=0.5``."""

from __future__ import annotations

import json
from dataclasses import replace

from edge_shiftkv.selection.methods import Method, method


def configured(text: str) -> Method:
    """The method that a text names. Raises SettingError."""
    name, _, settings = text.partition(":")
    found = method(name)
    pairs = (setting.split("=") for setting in settings.split(",") if setting)
    return replace(found, **{key: json.loads(value) for key, value in pairs})  # type: ignore[type-var]
