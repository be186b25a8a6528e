"""What this process has in memory. Linux only."""

from __future__ import annotations

import ctypes
import gc
import mmap
from pathlib import Path


def resident_bytes() -> int:
    """What is resident, once all that was freed is given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; without it freed memory stays resident at times
    if trim:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
