"""What `examine` found, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edge_shiftkv.doctor.examine import PIP


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The facts, a line each, and what is wrong with what to type against it."""
    python = facts["python"]
    yield f"edge_shiftkv  {facts['version']}, Python {python['version']} ({python['executable']}), {facts['platform']}"
    library = facts["library"]
    kind = {True: "patched", False: "not patched"}.get(library.get("patched"), "not loaded")
    where = f" in {library['folder']}" if "folder" in library else ""
    have = library.get("version")
    yield f"library       {f'llama-cpp-python {have}, {kind}{where}' if have or where else 'none'}"
    if "instructions" in library:
        yield f"built for     {' '.join(library['instructions']) or 'any CPU of this kind'}"
    if "backends" in library:
        yield f"backends      {', '.join(library['backends'])}"
        for device in library["devices"]:
            what = f"{device['description']}, {device['kind']}, {_size(device['total_bytes'])}"
            yield f"device        {device['name']}: {what}"
    if tools := facts["build_tools"]:
        yield f"compilers     {tools['C'] or 'no C'}, {tools['C++'] or 'no C++'}"
        yield f"cmake, ninja  {tools['cmake'] or 'from PyPI'}, {tools['ninja'] or 'from PyPI'}"
    if cache := facts["cache"]:
        yield f"cache         {cache['folder']}, {_size(cache['bytes'])}, {cache['wheels']} wheels"
    for name, is_there in facts["extras"].items():
        how = "installed" if is_there else f'not installed: {PIP} "edge-shiftkv[{name}]"'
        yield f"{f'[{name}]':<13} {how}"
    yield ""
    for finding in facts["findings"]:
        yield f"{'wrong' if finding['stops'] else 'note'}: {finding['what']}; type: {finding['do']}"
    if not any(finding["stops"] for finding in facts["findings"]):
        yield "models can be run"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
