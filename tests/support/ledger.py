"""What native code allocates, counted."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import llama_cpp.llama_cpp as llama
import llama_cpp.mtmd_cpp as mtmd
import pytest

# What makes a thing, and what frees it, each given it as its first argument.
PAIRS: dict[str, tuple[ModuleType, str, str]] = {
    "model": (llama, "llama_model_load_from_file", "llama_model_free"),
    "context": (llama, "llama_init_from_model", "llama_free"),
    "sampler": (llama, "llama_sampler_chain_init", "llama_sampler_free"),
    "mmproj": (mtmd, "mtmd_init_from_file", "mtmd_free"),
    "chunks": (mtmd, "mtmd_input_chunks_init", "mtmd_input_chunks_free"),
    "bitmap": (mtmd, "mtmd_bitmap_init", "mtmd_bitmap_free"),
}


class Ledger:
    """Counts what is made and freed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: Counter[str] = Counter()
        self.alive: dict[str, set[int | None]] = {kind: set() for kind in PAIRS}
        for kind, (module, make, free) in PAIRS.items():
            monkeypatch.setattr(module, make, self._making(kind, getattr(module, make)))
            monkeypatch.setattr(module, free, self._freeing(kind, getattr(module, free)))

    def left(self) -> dict[str, int]:
        """How many of each kind are not freed, of those that some are."""
        return {kind: len(alive) for kind, alive in self.alive.items() if alive}

    def _making(self, kind: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            pointer = make(*arguments)
            if pointer:
                self.made[kind] += 1
                self.alive[kind].add(_address(pointer))
            return pointer

        return call

    def _freeing(self, kind: str, free: Callable[..., Any]) -> Callable[..., Any]:
        def call(pointer: Any) -> None:
            assert _address(pointer) in self.alive[kind], f"a {kind} that is not there is freed"
            self.alive[kind].discard(_address(pointer))
            free(pointer)

        return call


def _address(pointer: Any) -> int | None:
    return pointer if isinstance(pointer, int) else ctypes.cast(pointer, ctypes.c_void_p).value
