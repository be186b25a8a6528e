"""What can be chosen for a build, and the CPU that it is for."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_shiftkv._version import UPSTREAM_VERSION, WHEEL_VERSION
from edge_shiftkv.build import cuda_toolkit


@dataclass(frozen=True)
class Options:
    """What to build. `backends` are GGML backend names in lower case ("cuda", "metal", "vulkan").

    `cuda_arch` is the GPU architecture, or several with semicolons, that CUDA code is compiled for ("86", "90").
    `stock` leaves out this project's own changes, all but the portability patches.
    """

    backends: frozenset[str] = frozenset()
    native: bool = True
    cmake_args: tuple[str, ...] = ()
    stock: bool = False
    cuda_arch: str | None = None

    @property
    def version(self) -> str:
        """The version of the wheel these options give."""
        return UPSTREAM_VERSION if self.stock else WHEEL_VERSION

    @property
    def takes_packaged_cuda(self) -> bool:
        """Whether CUDA's compiler comes from PyPI, as the machine has none."""
        return "cuda" in self.backends and cuda_toolkit.is_needed()

    def cmake(self) -> list[str]:
        """The CMake command line; the caller's own arguments come last so that they win."""
        return [
            f"-DGGML_NATIVE={'ON' if self.native else 'OFF'}",
            *(f"-DGGML_{backend.upper()}=ON" for backend in sorted(self.backends)),
            *([f"-DCMAKE_CUDA_ARCHITECTURES={self.cuda_arch}"] if self.cuda_arch else []),
            *self.cmake_args,
        ]


def cpu_features() -> str:
    """Describe the CPU as far as ``-march=native`` code depends on it."""
    if sys.platform == "linux":
        wanted = ("flags", "Features", "model name", "CPU part", "isa")
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    if sys.platform == "darwin":
        names = ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features", "hw.optional")
        # sysctl fails for the names that the other CPU family lacks, after printing those it has.
        return subprocess.run(["sysctl", *names], capture_output=True, text=True, check=False).stdout
    return platform.processor()
