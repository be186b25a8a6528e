"""An extension of griffe: this project's docstrings as Markdown.

What a docstring says of a parameter or an attribute, ``name: text`` with its further lines indented, becomes an item of
a list; the rest is Markdown as it is.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>\S.*)")


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, when its object is there."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See `griffe.Extension`."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """A docstring, its indentation taken away, as Markdown."""
    lines: list[str] = []
    in_item, before = False, ""
    for line in docstring.splitlines():
        item = _ITEM.fullmatch(line)
        # A word and a colon in the middle of a paragraph begin nothing, unless that is of items.
        if item and (in_item or not before) and item["names"] not in ("Raises", "Returns", "Source", "Example"):
            if not in_item:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in item["names"].split(", "))
            lines.append(f"- {names}: {item['text']}")
            in_item = True
        else:
            if line and not line.startswith(" "):
                in_item = False
            lines.append(re.sub(r"::$", ":", line))
        before = line
    return "\n".join(lines)
