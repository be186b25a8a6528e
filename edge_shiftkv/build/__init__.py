"""Build the patched llama-cpp-python and install it: what ``edge-shiftkv build`` does.

    wheel = build_wheel(Options(frozenset({"vulkan"})))
    install_wheel(wheel)

llama-cpp-python is published as an sdist with llama.cpp inside. `build_wheel` fetches that sdist through pip, lays the
project's patches and own native files over it and builds one wheel with a local version (``0.3.36+shiftkv.N``), which
installs over or instead of the stock wheel.

`wheel` has the steps one after the other, `options` what can be chosen, `source` the patched source tree, `compiling`
the compile, `installing` what pip does, `cache` the folder that all of it lies in. Nothing here imports llama_cpp or
the rest of the package: it has to work before there is a library to load.
"""

from edge_shiftkv._version import UPSTREAM_VERSION, WHEEL_VERSION
from edge_shiftkv.build.cache import default_cache_dir
from edge_shiftkv.build.errors import BuildError
from edge_shiftkv.build.installing import install_wheel
from edge_shiftkv.build.options import Options
from edge_shiftkv.build.wheel import build_wheel

__all__ = [
    "UPSTREAM_VERSION",
    "WHEEL_VERSION",
    "BuildError",
    "Options",
    "build_wheel",
    "default_cache_dir",
    "install_wheel",
]
