"""Set up everything in ``.venv`` and run the demo or the tests: ``python3 scripts/dev.py demo`` or ``... test``.

Needs Python 3.10 or newer with venv, and a C++ compiler. What follows the command goes on to ``edge-shiftkv demo`` or
to pytest. ``test --build avx2`` and ``test --build avx512`` build all libraries for these instructions and no others:
the tests have to hold with the kernels of any CPU. The first run builds llama.cpp, which takes minutes; later ones
reuse the environment and the cached wheels.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LIBRARIES = ROOT / "build" / "libraries"
CPUINFO = Path("/proc/cpuinfo")

AVX2 = ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")
BUILDS: dict[str, tuple[str, ...]] = {
    "native": (),
    "avx2": AVX2,
    # What the server CPUs without AMX and AMD's since Zen 4 share.
    "avx512": (*AVX2, "AVX512", "AVX512_VNNI"),
}
"""The instructions that ggml is allowed to use, as its options name them; native stands for all of this CPU's."""

CPU_FLAGS = {"SSE42": "sse4_2", "AVX512": "avx512f"}
"""What Linux calls them where it is another name."""

VULKAN_PACKAGES = ("glslc", "libvulkan-dev", "mesa-vulkan-drivers", "spirv-headers")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_PACKAGES = ("chromium",)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status of the first step that fails, or 0."""
    if sys.version_info < (3, 10):  # noqa: UP036 - run by whatever python3 there is
        print("edge_shiftkv needs Python 3.10 or newer", file=sys.stderr)
        return 1
    commands = {"demo": demo, "test": test}
    if not arguments or arguments[0] not in commands:
        print("usage: dev.py demo [ARGUMENT...] | test [--build native|avx2|avx512] [ARGUMENT...]", file=sys.stderr)
        return 2
    try:
        commands[arguments[0]](arguments[1:])
    except subprocess.CalledProcessError as error:
        # The failed command has said why.
        return int(error.returncode)
    return 0


def demo(arguments: Sequence[str]) -> None:
    """Install the project, build and install the patched library, then run the demo."""
    make_environment(".")
    build()
    python("-m", "edge_shiftkv", "demo", *arguments)


def test(arguments: Sequence[str]) -> None:
    """Install the project, build all variants of the library, check style and types, then run the tests.

    All builds share one CMake tree, so each compiles only what the one before it lacks. Vulkan comes before the plain
    patched build because its last step is one long compile, which leaves the other cores to what the patches touch.
    """
    parser = argparse.ArgumentParser(prog="dev.py test", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--build", choices=BUILDS, default="native")
    chosen, arguments = parser.parse_known_args(arguments)
    options = instructions(chosen.build)
    make_environment(".[test,dev]")
    environment = {"EDGE_SHIFTKV_STOCK_LIB": str(build_library("stock", "--stock", *options))}
    if make_vulkan_available():
        environment["EDGE_SHIFTKV_VULKAN_LIB"] = str(build_library("vulkan", "--vulkan", *options))
    build(*options)
    make_browser_available()
    python("-m", "ruff", "format", "--check", "--quiet", ".")
    python("-m", "ruff", "check", "--quiet", ".")
    python("-m", "mypy")
    python("-m", "pytest", *arguments, environment=environment)


def instructions(build: str) -> list[str]:
    """The options of ``edge-shiftkv build`` for one of `BUILDS`; exit with a message where its code could not run."""
    names = BUILDS[build]
    if not names:
        return []
    if platform.machine().lower() not in ("x86_64", "amd64"):
        sys.exit(f"--build {build} is for x86-64 CPUs, and this is {platform.machine()}")
    if CPUINFO.exists():
        flags = CPUINFO.read_text().partition("\nflags")[2].partition("\n")[0].split()
        lacking = [name for name in names if CPU_FLAGS.get(name, name.lower()) not in flags]
        if lacking:
            sys.exit(f"--build {build} needs a CPU with {', '.join(lacking)}, which this one lacks")
    return ["--no-native", *(f"--cmake-arg=-DGGML_{name}=ON" for name in names)]


def make_environment(project: str) -> None:
    """Create ``.venv`` with the project, and the extras that are named with it, but without the library."""
    if not PYTHON.exists():
        print(f"creating {VENV}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip("install", "--editable", project)


def build(*options: str) -> None:
    """Run ``edge-shiftkv build`` from the checkout."""
    python("-m", "edge_shiftkv", "build", *options)


def build_library(name: str, *options: str) -> Path:
    """Build a variant without installing it; return a folder with its shared libraries."""
    target = LIBRARIES / name
    shutil.rmtree(target, ignore_errors=True)
    build(*options, "--no-install", "--wheel-dir", str(target))
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith("llama_cpp/lib/"):
                (target / Path(member).name).write_bytes(archive.read(member))
    return target


def make_vulkan_available() -> bool:
    """Whether the Vulkan variant can be built here, after installing Debian's packages where that needs no password."""
    return install("Vulkan build", VULKAN_PACKAGES)


def make_browser_available() -> bool:
    """Whether there is a browser for the tests of the server's page, after installing Debian's if need be."""
    return any(map(shutil.which, BROWSERS)) or install("tests in a browser", BROWSER_PACKAGES)


def install(what: str, packages: Sequence[str]) -> bool:
    """Whether Debian's packages for something are there, after installing them where that needs no password."""
    if not sys.platform.startswith("linux") or not shutil.which("dpkg-query"):
        print(f"no {what}: its packages are only installed on Debian and its relatives", flush=True)
        return False
    query = ["dpkg-query", "--show", "--showformat", "${db:Status-Status}\\n", *packages]
    states = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    if states == ["installed"] * len(packages):
        return True
    become_root = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    apt = [*become_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--quiet"]
    print(f"installing {' '.join(packages)}", flush=True)
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        try:
            result = subprocess.run([*apt, *command], stdout=subprocess.DEVNULL, check=False)
        except FileNotFoundError:  # neither root nor sudo
            return False
        if result.returncode:
            print(f"no {what}: apt-get {command[0]} failed", flush=True)
            return False
    return True


def pip(*arguments: str) -> None:
    """Run pip in ``.venv``."""
    python("-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def python(*arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Run ``.venv``'s Python in the checkout; raise CalledProcessError when it fails."""
    print(f"$ python {' '.join(arguments)}", flush=True)
    subprocess.run([str(PYTHON), *arguments], cwd=ROOT, env={**os.environ, **(environment or {})}, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
