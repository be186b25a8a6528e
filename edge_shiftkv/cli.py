"""The `edge-shiftkv` command.

Each sub-command is a function here that adds its arguments, and imports what it runs only when it runs: `build` has
to work where the patched library is not there yet.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="edge-shiftkv", description="KV-cache selection for llama.cpp")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _add_build(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "build the patched llama-cpp-python and install it into this Python environment"
    parser = commands.add_parser("build", help=text, description=text)
    for backend, title in (("cuda", "CUDA"), ("metal", "Metal (default on macOS)"), ("vulkan", "Vulkan")):
        parser.add_argument(
            f"--{backend}",
            dest="backends",
            action="append_const",
            const=backend,
            help=f"build llama.cpp's {title} backend",
        )
    parser.add_argument("--no-native", action="store_true", help="do not tune the library for this machine's CPU")
    parser.add_argument(
        "--cmake-arg",
        action="append",
        default=[],
        metavar="-D...",
        help="hand one argument to CMake, as in --cmake-arg=-DGGML_RPC=ON; repeatable",
    )
    parser.add_argument("--stock", action="store_true", help="build the unpatched library instead, for comparison")
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="also copy the wheel to DIR")
    parser.add_argument("--no-install", action="store_true", help="do not install the wheel")
    parser.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    from edge_shiftkv import build

    options = build.Options(
        backends=frozenset(arguments.backends or ()),
        native=not arguments.no_native,
        cmake_args=tuple(arguments.cmake_arg),
        stock=arguments.stock,
    )
    try:
        wheel = build.build_wheel(options)
        if arguments.wheel_dir:
            arguments.wheel_dir.mkdir(parents=True, exist_ok=True)
            print(f"wheel: {shutil.copy2(wheel, arguments.wheel_dir)}")
        if not arguments.no_install:
            build.install_wheel(wheel)
    except (build.BuildError, OSError) as error:
        print(f"edge-shiftkv build: {error}", file=sys.stderr)
        return 1
    return 0
