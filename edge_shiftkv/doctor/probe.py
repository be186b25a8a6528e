"""Look at the library from a process that it may end: ``python -m edge_shiftkv.doctor.probe``.

Each fact is a line of JSON on stdout as soon as it is known, so that those before a crash are not lost.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GPU_BACKENDS = ("CUDA", "Metal", "Vulkan")

KINDS = ("CPU", "GPU", "integrated GPU", "accelerator", "several")
"""Of devices, as in ggml's enum ggml_backend_dev_type."""


def facts() -> Iterator[dict[str, Any]]:
    """Yield what is found out about the library, a dictionary at a time; raises what loading it raises."""
    try:
        yield {"version": distribution("llama-cpp-python").version}
    except PackageNotFoundError:
        yield {"version": None}
    if find_spec("llama_cpp") is None:
        return
    import llama_cpp.llama_cpp as llama

    yield {"folder": str(llama._base_path), "patched": hasattr(llama._lib, "llama_shiftkv_asserts_throw")}
    yield {"instructions": instructions(llama.llama_print_system_info().decode(errors="replace"))}
    yield {"backends": backends(Path(llama._base_path)), "devices": devices()}
    import edge_shiftkv.runtime  # noqa: F401 - whether all that it imports is there

    yield {"runs": True}


def instructions(system_info: str) -> list[str]:
    """What the CPU's part of the library was compiled for, of what `llama_print_system_info` says."""
    _, _, cpu = system_info.partition("CPU : ")
    other = {"LLAMAFILE", "ACCELERATE", "CPU_HBM", "OPENMP", "KLEIDIAI", "REPACK"}
    return [name for name in re.findall(r"(\w+) = 1 \|", cpu) if name not in other]


def backends(folder: Path) -> list[str]:
    """What the library can compute with. ggml itself does not name those that find no device."""
    return ["CPU", *(name for name in GPU_BACKENDS if any(folder.glob(f"*ggml-{name.lower()}.*")))]


def devices() -> list[dict[str, Any]]:
    """The devices that it sees: their names, kinds and memory in bytes, free and all."""
    ggml, base = _libraries()
    found = []
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        kind = base.ggml_backend_dev_type(device)
        found.append(
            {
                "name": _text(base.ggml_backend_dev_name(device)),
                "description": _text(base.ggml_backend_dev_description(device)),
                "kind": KINDS[kind] if kind < len(KINDS) else str(kind),
                "free_bytes": free.value,
                "total_bytes": total.value,
            }
        )
    return found


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """ggml's registry of devices, and what it says of one."""
    import llama_cpp.llama_cpp as llama
    from llama_cpp._ctypes_extensions import load_shared_library

    ggml, base = (load_shared_library(name, llama._base_path) for name in ("ggml", "ggml-base"))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype, ggml.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        function = getattr(base, name)
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return ggml, base


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


def main() -> None:
    """Print the facts, and last what went wrong."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what drivers print is no fact
        try:
            for fact in facts():
                print(json.dumps(fact), file=out, flush=True)
        except Exception as error:
            found = {"error": " ".join(f"{error}".split()) or type(error).__name__}
            if isinstance(error, ModuleNotFoundError) and error.name:
                found["module"] = error.name.partition(".")[0]
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
