"""Where the files that ship with the package are, installed or in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def patches_dir() -> Path:
    """The folder with the patches and own native files."""
    return _data("patches", "patches")


def models_dir() -> Path:
    """The folder with the demo's GGUF files."""
    return _data("models", "models/demo")


def page_reader_dir() -> Path:
    """The folder with the page reader's vision tower, and a page."""
    return _data("page-reader", "models/page-reader")


def _data(installed: str, checkout: str) -> Path:
    """`installed` below the package's data in a wheel; an editable install or a checkout has only `checkout`."""
    shipped = _PACKAGE / "_data" / installed
    return shipped if shipped.is_dir() else _PACKAGE.parent / checkout
