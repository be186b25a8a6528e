"""The facts about this machine and what is installed on it, and what of them is wrong."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import edge_shiftkv
from edge_shiftkv._version import WHEEL_VERSION

BUILD = "edge-shiftkv build"

_QUOTE = shlex.join if os.name == "posix" else subprocess.list2cmdline
PIP = f"{_QUOTE([sys.executable])} -m pip install"
"""What installs into this environment, whichever is active."""

EXTRAS = {"server": ("fastapi", "uvicorn"), "hub": ("huggingface_hub",), "ray": ("ray",)}
"""The optional parts that users install, and the modules that they need."""

CPUINFO = Path("/proc/cpuinfo")

_FLAGS = {
    **{"SSE3": "pni", "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi"},
    **{"NEON": "asimd", "ARM_FMA": "asimd", "FP16_VA": "asimdhp", "DOTPROD": "asimddp", "MATMUL_INT8": "i8mm"},
}
"""What Linux calls instructions where it is not ggml's name in lower case."""

_PROBE_S = 120.0  # a driver that was never used may compile for long
_ILLEGAL_INSTRUCTION = {-4, 0xC000001D}  # SIGILL, and what Windows calls it


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    what: it is.
    do: what to type against it.
    stops: whether models cannot be run because of it.
    """

    what: str
    do: str
    stops: bool = True


def examine() -> dict[str, Any]:
    """All that ``edge-shiftkv doctor --json`` prints; ``findings`` is empty where nothing is wrong."""
    facts: dict[str, Any] = {
        "version": edge_shiftkv.__version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": f"{platform.system()} {platform.machine()}",
        "library": {"wanted": WHEEL_VERSION, **probe()},
        "missing_packages": missing_packages(),
        **_builder(),
        "extras": {name: all(map(_is_there, modules)) for name, modules in EXTRAS.items()},
    }
    library = facts["library"]
    library["cpu_lacks"] = cpu_lacks(library.get("instructions", ()))
    facts["findings"] = [asdict(finding) for finding in findings(facts)]
    return facts


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """What is wrong, the first things first."""
    found = []
    missing = facts["missing_packages"] or facts["builder_lacks"]
    if missing:
        found.append(Finding(f"Python packages are missing: {', '.join(missing)}", f"{PIP} {_quoted(missing)}"))
    library = facts["library"]
    wrong = _wrong_with(library, missing)
    if wrong:
        found.append(wrong)
    tools = facts["build_tools"]
    if wrong and wrong.do == BUILD and tools and not (tools["C"] and tools["C++"]):
        found.append(Finding("no C++ compiler is found, which the build needs", _get_compiler()))
    gpus = [device for device in library.get("devices", ()) if "GPU" in device["kind"]]
    built_for = [name for name in library.get("backends", ()) if name != "CPU"]
    if built_for and not gpus:
        what = f"the library is for a GPU ({', '.join(built_for)}) and sees none: all runs on the CPU"
        found.append(Finding(what, "nvidia-smi" if "CUDA" in built_for else "vulkaninfo --summary", stops=False))
    if library.get("backends") and not built_for and facts["nvidia_gpu"]:
        what = "there is an NVIDIA GPU, and the library is for the CPU alone"
        found.append(Finding(what, f"{BUILD} --cuda", stops=False))
    return found


def _wrong_with(library: Mapping[str, Any], missing: Sequence[str]) -> Finding | None:
    """What keeps the library from running, of what `probe` found."""
    have, wanted, error = library.get("version"), library["wanted"], library.get("error", "")
    status = library.get("status", 0)
    if have is None and "folder" not in library and not error and not status:
        return Finding("there is no library: llama-cpp-python is not installed", BUILD)
    if library["LLAMA_CPP_LIB_PATH"] and ("folder" not in library or library.get("patched") is False):
        what = f"LLAMA_CPP_LIB_PATH names a folder without the patched library: {library['LLAMA_CPP_LIB_PATH']}"
        return Finding(what, "set LLAMA_CPP_LIB_PATH=" if os.name == "nt" else "unset LLAMA_CPP_LIB_PATH")
    if status in _ILLEGAL_INSTRUCTION:
        return Finding("the library ends in an illegal instruction: it was built for another CPU", BUILD)
    if status == "timeout":
        return Finding(f"the library does not answer within {_PROBE_S:.0f} s: a GPU's driver may hang", BUILD)
    if status:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"status {status}"
        return Finding(f"loading the library ends with {name}: its files are damaged", BUILD)
    module = library.get("module")
    if module and module not in ("llama_cpp", "edge_shiftkv"):
        return None if missing else Finding(f"the Python package {module} is missing", f"{PIP} {module}")
    if "folder" not in library:
        needed = re.search(r"\b((?!libllama|libmtmd|libggml)lib\S+\.so\S*): cannot open shared object file", error)
        if needed:
            return Finding(f"the library needs {needed[1]}, which is not on this machine", _get_shared(needed[1]))
        return Finding(f"the library cannot be loaded: {error or 'its files are gone'}", BUILD)
    if not library.get("patched"):
        return Finding(f"llama-cpp-python {have} is not the patched one", BUILD)
    if library["cpu_lacks"]:
        what = f"the library was built for a CPU with {', '.join(library['cpu_lacks'])}, which this one lacks"
        return Finding(what, BUILD)
    if have != wanted:
        return Finding(f"the library is {have}, and this edge_shiftkv needs {wanted}", BUILD)
    if "runs" in library:
        return None
    return Finding(f"edge_shiftkv cannot be loaded: {error}", BUILD)


def probe() -> dict[str, Any]:
    """What the process of `edge_shiftkv.doctor.probe` finds out; ``status`` is how it ended, if not well."""
    found: dict[str, Any] = {"LLAMA_CPP_LIB_PATH": os.environ.get("LLAMA_CPP_LIB_PATH")}
    command = [sys.executable, "-m", "edge_shiftkv.doctor.probe"]
    status: int | str
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_PROBE_S, check=False)
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output, status = error.stdout or b"", "timeout"
    except OSError as error:
        return {**found, "error": str(error)}
    for line in output.splitlines():
        try:
            found |= json.loads(line)
        except (ValueError, TypeError):  # the process ended within it
            break
    return {**found, "status": status} if status else found


def cpu_lacks(instructions: Sequence[str]) -> list[str]:
    """Which of the instructions that ggml names this CPU lacks; empty where Linux does not tell."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(lines[0].split()) if lines else None
    return [name for name in instructions if flags is not None and _FLAGS.get(name, name.lower()) not in flags]


def missing_packages() -> list[str]:
    """What this package requires and is not installed, as pip takes it; empty in a checkout that is not installed."""
    try:
        required = requires("edge-shiftkv") or []
    except PackageNotFoundError:
        return []
    return [text for text in required if "extra ==" not in text and not _is_installed(text)]


def _is_installed(requirement: str) -> bool:
    name = re.match(r"[\w.-]+", requirement)
    try:
        version(name[0] if name else requirement)
    except PackageNotFoundError:
        return False
    return True


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _builder() -> dict[str, Any]:
    """The builder's part of the facts."""
    try:
        from edge_shiftkv.build import compiling, cuda_toolkit, default_cache_dir
    except ModuleNotFoundError as error:  # it has requirements of its own
        return {"build_tools": {}, "cache": None, "nvidia_gpu": False, "builder_lacks": [error.name]}
    folder = default_cache_dir()
    return {
        "build_tools": {
            **{language: compiling.find_compiler(language) for language in compiling.COMPILERS},
            "cmake": shutil.which("cmake"),
            "ninja": shutil.which("ninja"),
        },
        "cache": {
            "folder": str(folder),
            "bytes": sum(_sizes(folder)),
            "wheels": len(list(folder.glob("wheels/*/*.whl"))),
        },
        "nvidia_gpu": cuda_toolkit.has_gpu(),
        "builder_lacks": [],
    }


def _sizes(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield (Path(parent) / name).lstat().st_size
            except OSError:  # a build goes on
                continue


def _get_compiler() -> str:
    return {"linux": "apt install g++", "darwin": "xcode-select --install"}.get(
        sys.platform,
        'winget install Microsoft.VisualStudio.2022.BuildTools --override "--passive --add '
        'Microsoft.VisualStudio.Workload.VCTools --includeRecommended"',
    )


def _get_shared(name: str) -> str:
    package = {"libgomp.so.1": "libgomp1", "libvulkan.so.1": "libvulkan1", "libstdc++.so.6": "libstdc++6"}.get(name)
    return f"apt install {package}" if package else BUILD


def _quoted(requirements: Sequence[str]) -> str:
    return " ".join(f'"{text}"' for text in requirements)
