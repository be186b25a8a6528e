"""Threads beside that of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_a_thread(function: Callable[[], object]) -> None:
    """Call a function in another thread, and wait for it."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
