"""The compile: CMake and ninja through the build backend's hooks, and how far it is."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from edge_shiftkv.build import cuda_toolkit, installing
from edge_shiftkv.build.cache import only_wheel, temporary
from edge_shiftkv.build.errors import BuildError, Report, print_line
from edge_shiftkv.build.options import Options, cpu_features

# Included by CMake before upstream's CMakeLists.txt. Both changes leave the libraries in the wheel as they are.
CMAKE_INCLUDE = """\
# Upstream forces the helper library of llama.cpp's command-line tools on, which nothing in the wheel loads and which
# takes 3 of 7 minutes; a plain variable shadows the forced cache entry.
set(LLAMA_BUILD_COMMON OFF)

# ggml passes GGML_USE_<BACKEND> on to everything that links it, though only its own registry reads it: without that,
# building another backend does not recompile libllama and libmtmd.
function(edge_shiftkv_keep_backend_macros_private)
    get_target_property(definitions ggml INTERFACE_COMPILE_DEFINITIONS)
    if(definitions)
        list(FILTER definitions EXCLUDE REGEX "^GGML_USE_")
        set_target_properties(ggml PROPERTIES INTERFACE_COMPILE_DEFINITIONS "${definitions}")
    endif()
endfunction()
cmake_language(DEFER CALL edge_shiftkv_keep_backend_macros_private)

# NVIDIA's packages put CUDA's libraries beside llama_cpp.
function(edge_shiftkv_find_packaged_cuda)
    if(TARGET ggml-cuda)
        set_property(TARGET ggml-cuda APPEND PROPERTY INSTALL_RPATH "$ORIGIN/../../@CUDA@")
    endif()
endfunction()
cmake_language(DEFER CALL edge_shiftkv_find_packaged_cuda)
""".replace("@CUDA@", cuda_toolkit.RUNTIME_FOLDER)

_HOOK = """
import json, sys
from scikit_build_core import build
hook, arguments, answer = sys.argv[1:]
result = getattr(build, hook)(*json.loads(arguments))
with open(answer, "w", encoding="utf-8") as file:
    json.dump(result, file)
"""


def compile_wheel(cache: Path, options: Options, wheel_dir: Path, report: Report) -> Path:
    """Build the synced source tree's wheel into the new folder `wheel_dir` through the PEP 517 hooks, as pip would."""
    source, build = cache / "src", cache / "build"
    _discard_foreign_objects(build, options)
    # Options of an earlier build must not leak into this one; ninja still knows which objects are up to date.
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    include = cache / "include.cmake"
    include.write_text(CMAKE_INCLUDE, encoding="utf-8")
    packaged = (
        cuda_toolkit.complete(installing.tools(cache, list(cuda_toolkit.PACKAGES), report))
        if options.takes_packaged_cuda
        else []
    )
    settings = {
        "build-dir": str(build),
        "cmake.args": [f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={include.as_posix()}", *packaged, *options.cmake()],
        "cmake.verbose": "false",
        "ninja.make-fallback": "false",
    }
    log = cache / "build.log"
    with temporary(cache, "hook-") as work, log.open("w", 1, encoding="utf-8") as log_file:
        answer = work / "answer.json"

        def call(hook: str, arguments: list[object], tools: Path) -> object:
            command = [sys.executable, "-c", _HOOK, hook, json.dumps(arguments), str(answer)]
            process = subprocess.Popen(
                command,
                cwd=source,
                env=installing.environment(tools),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            with process, _Progress(report) as progress:
                for line in process.stdout or ():
                    log_file.write(line)
                    progress.see(line)
            if process.returncode:
                log_file.flush()
                raise BuildError(f"{_first_error(log)} (full log: {log})")
            return json.loads(answer.read_text(encoding="utf-8"))

        tools = installing.tools(cache, [installing.BACKEND], report)
        extra = call("get_requires_for_build_wheel", [settings], tools)
        assert isinstance(extra, list)
        if extra:
            tools = installing.tools(cache, [installing.BACKEND, *extra], report)
        report(f"building llama-cpp-python {options.version} ({' '.join(options.cmake())}), log: {log}")
        call("build_wheel", [str(wheel_dir), settings], tools)
    wheel = only_wheel(wheel_dir)
    if wheel is None or wheel.name.split("-")[1] != options.version:
        raise BuildError(f"the build gave no wheel of version {options.version} (full log: {log})")
    return wheel


def _discard_foreign_objects(build: Path, options: Options) -> None:
    """Empty the CMake tree when its objects are for another CPU: ``-march=native`` looks the same to ninja."""
    if options.native:
        stamp, cpu = build / "edge-shiftkv-cpu.txt", cpu_features()
        if stamp.is_file() and stamp.read_text(encoding="utf-8") != cpu:
            shutil.rmtree(build)
        build.mkdir(exist_ok=True)
        stamp.write_text(cpu, encoding="utf-8")


class _Progress:
    """Report ninja's ``[n/m]``: in place on a terminal, elsewhere a line every 10 % and for every silent minute."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._terminal = report is print_line and sys.stdout.isatty()
        self._started = time.monotonic()
        self._done, self._total, self._tenth = 0, 0, 0
        self._news = threading.Event()
        self._ended = False
        self._watch = threading.Thread(target=self._report_silence, daemon=True)

    def __enter__(self) -> _Progress:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._news.set()
        self._watch.join()
        if self._terminal and self._total:
            print()

    def see(self, line: str) -> None:
        """Take notice of one line of the build's output."""
        step = re.match(r"\[\s*(\d+)/(\d+)\]", line)
        if not step or int(step[2]) < self._total:  # a small total is that of a helper built within the build
            return
        if int(step[2]) > self._total:
            self._tenth = 0
        self._done, self._total = int(step[1]), int(step[2])
        if self._terminal or 10 * self._done // self._total > self._tenth:
            self._tenth = 10 * self._done // self._total
            self._show()

    def _show(self) -> None:
        step = f"[{self._done}/{self._total}] " if self._total else ""
        text = f"{step}{time.monotonic() - self._started:.0f} s"
        if self._terminal:
            print(f"\r{text}", end="", flush=True)
        else:
            self._report(text)
        self._news.set()

    def _report_silence(self) -> None:
        while not self._ended:
            if not self._news.wait(timeout=60):
                self._show()
            self._news.clear()


def _first_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("CMake Error"):
            rest = [text.strip() for text in lines[number + 1 : number + 6] if text.strip()]
            return " ".join([line.strip(), *rest[:1]])
        if re.search(r"\b(fatal error|error)\b ?[A-Z0-9]*:", line):
            return line.strip()
    return lines[-1].strip() if lines else "the build stopped without a message"


COMPILERS = {"C": ("CC", ("cc", "gcc", "clang")), "C++": ("CXX", ("c++", "g++", "clang++"))}
"""The variable that names a language's compiler, and the usual names where it is not set."""


def find_compiler(language: str) -> str | None:
    """The path of the compiler that CMake would take; of Visual Studio, where that is installed."""
    return next(filter(None, map(shutil.which, _compiler_names(language))), None) or _visual_studio()


def require_compiler() -> None:
    """Raise BuildError where there is no compiler."""
    if os.name == "nt":  # CMake finds Visual Studio outside of PATH; where it does not, the log has its message
        return
    for language, (variable, _) in COMPILERS.items():
        if not find_compiler(language):
            raise BuildError(
                f"no {language} compiler found (looked for {', '.join(_compiler_names(language))}): install one "
                f"(Debian: apt install g++, macOS: xcode-select --install) or set {variable}"
            )


def _compiler_names(language: str) -> tuple[str, ...]:
    variable, usual = COMPILERS[language]
    return tuple(shlex.split(os.environ.get(variable, ""))[:1]) or usual


def _visual_studio() -> str | None:
    """Where Visual Studio with a C++ compiler is, as CMake asks for it."""
    finder = Path(os.environ.get("PROGRAMFILES(X86)", "")) / "Microsoft Visual Studio/Installer/vswhere.exe"
    if os.name != "nt" or not finder.is_file():
        return None
    tools = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
    command = [str(finder), "-latest", "-products", "*", "-requires", tools, "-property", "installationPath"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
