"""CUDA's compiler and libraries from PyPI, for a machine that has no toolkit of its own.

NVIDIA publishes the parts of the toolkit as wheels, which unpack into one folder that lacks two things CMake and the
linker look for: libraries without a version in their name, and a lib64 beside lib.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from shutil import which as _which

PACKAGES = (
    "nvidia-cuda-nvcc==13.5.37",
    "nvidia-nvvm==13.5.37",
    "nvidia-cuda-crt==13.5.37",
    "nvidia-cuda-runtime==13.5.37",
    "nvidia-cuda-cccl==13.3.5.0.6",
    "nvidia-cublas==13.10.0.20",
)
"""What llama.cpp is compiled with. Its code for a GPU depends on the compiler, so the versions are exact."""

RUNTIME = ("nvidia-cuda-runtime>=13.5,<14", "nvidia-cublas>=13.10,<14")
"""What the library loads where it runs."""

RUNTIME_FOLDER = "nvidia/cu13/lib"
"""Where these have their libraries, in site-packages."""

DEFAULT_HOME = Path("/usr/local/cuda")
"""Where NVIDIA's installers put the toolkit."""


def is_needed() -> bool:
    """Whether CMake would find no toolkit, or one without cuBLAS (often only the compiler is installed)."""
    if os.environ.get("CUDACXX"):
        return False
    homes = [Path(os.environ[name]) for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    compilers = [_which("nvcc"), *(home / "bin" / "nvcc" for home in [*homes, DEFAULT_HOME])]
    roots = [Path(compiler).resolve().parents[1] for compiler in compilers if compiler and Path(compiler).is_file()]
    headers = ("include/cublas_v2.h", "targets/*/include/cublas_v2.h")
    return not any(any(root.glob(header)) for root in roots for header in headers)


def is_offered() -> bool:
    """Whether the packages are published for this platform in the form this module knows."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


def has_gpu() -> bool:
    """Whether a driver shows a GPU, whose architecture the compiler can then ask for."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def complete(folder: Path) -> list[str]:
    """Add what is missing to a folder that PACKAGES were installed into; returns the arguments CMake needs."""
    root = folder / "nvidia" / "cu13"
    for library in (root / "lib").glob("lib*.so.*"):
        plain = library.with_name(f"{library.name.partition('.so')[0]}.so")
        if not plain.exists():
            plain.symlink_to(library.name)
    if not (root / "lib64").exists():
        (root / "lib64").symlink_to("lib")
    return [
        f"-DCUDAToolkit_ROOT={root.as_posix()}",
        f"-DCMAKE_CUDA_COMPILER={(root / 'bin' / 'nvcc').as_posix()}",
        "-DGGML_CUDA_NO_VMM=ON",  # which links the driver's own library, that no package has
    ]
