"""The chat templates of real models, out of llama.cpp's source."""

from __future__ import annotations

import functools
import re
import tarfile
from pathlib import Path

from edge_shiftkv.build import default_cache_dir, source


@functools.cache
def real_templates() -> dict[str, str]:
    """Name -> source in Jinja."""
    found = {}
    with tarfile.open(source.fetch_sdist(default_cache_dir(), print)) as archive:
        for member in archive:
            if re.search(r"/models/templates/.*\.jinja$", member.name) and (file := archive.extractfile(member)):
                found[Path(member.name).stem] = file.read().decode()
    return found
