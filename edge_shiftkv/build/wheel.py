"""A wheel, out of the cache or built: the steps one after the other."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from edge_shiftkv._paths import patches_dir
from edge_shiftkv.build import cache, compiling, cuda_toolkit, installing, source
from edge_shiftkv.build.errors import BuildError, Report, print_line
from edge_shiftkv.build.options import Options, cpu_features

# What CMake and scikit-build-core read from the environment, hence part of a wheel's identity.
_BUILD_ENVIRONMENT = (
    "CC",
    "CXX",
    "CFLAGS",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDACXX",
    "CUDAFLAGS",
    "CUDAARCHS",
    "CMAKE_ARGS",
    "CMAKE_GENERATOR",
    "CMAKE_TOOLCHAIN_FILE",
    "VULKAN_SDK",
    "MACOSX_DEPLOYMENT_TARGET",
)


def build_wheel(options: Options, report: Report = print_line) -> Path:
    """Return the path of the wheel for `options`, building it unless the cache has it.

    Raises BuildError when the sdist cannot be had or differs from the pinned one, a patch does not apply, a tool is
    missing or the compile fails, and OSError when the cache cannot be written. A failed build adds no wheel to it.
    """
    folder = cache.default_cache_dir()
    patches = source.read_patches(patches_dir(), portability_only=options.stock)
    cpu = cpu_features() if options.native else ""
    key = cache_key(options, patches, cpu)
    if wheel := cache.find_wheel(folder, key):
        report(f"cached: {wheel}")
        return wheel
    compiling.require_compiler()
    _require_cuda(options)
    folder.mkdir(parents=True, exist_ok=True)
    with cache.locked(folder, report):
        if wheel := cache.find_wheel(folder, key):  # another process built it while this one waited
            return wheel
        sdist = source.fetch_sdist(folder, report)
        report("preparing the source tree")
        source.sync_tree(source.desired_tree(sdist, options, patches), folder / "src")
        with cache.temporary(folder, "wheel-") as work:
            wheel = compiling.compile_wheel(folder, options, work / "wheel", report)
            return cache.add_wheel(folder, key, wheel.parent, [options.stock, options.cmake(), cpu])


def cache_key(options: Options, patches: Mapping[str, bytes], cpu: str) -> str:
    """Hash everything that decides a wheel's content. `cpu` is empty unless the build is for this CPU alone."""
    ingredients = {
        "sdist": source.SDIST_SHA256,
        "version": options.version,
        "backend": [installing.BACKEND, compiling.CMAKE_INCLUDE],
        "cuda": cuda_toolkit.PACKAGES if options.takes_packaged_cuda else (),
        "patches": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(patches.items())},
        "cmake": options.cmake(),
        "environment": {name: os.environ[name] for name in _BUILD_ENVIRONMENT if name in os.environ},
        "platform": sysconfig.get_platform(),
        "cpu": cpu,
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:20]


def _require_cuda(options: Options) -> None:
    if not options.takes_packaged_cuda:
        return
    if not cuda_toolkit.is_offered():
        raise BuildError("no CUDA compiler found: install NVIDIA's CUDA toolkit, or set CUDACXX to its nvcc")
    chosen = options.cuda_arch or any("CMAKE_CUDA_ARCHITECTURES" in argument for argument in options.cmake_args)
    if not (chosen or os.environ.get("CUDAARCHS") or cuda_toolkit.has_gpu()):
        raise BuildError(
            "no NVIDIA GPU found to build for: name its architecture with --cuda-arch "
            "(75 Turing, 86 RTX 30, 89 RTX 40, 90 H100, 120 RTX 50)"
        )
