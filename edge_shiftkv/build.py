"""Build the patched llama-cpp-python wheel.

llama-cpp-python is published as an sdist with llama.cpp inside. `build_wheel` fetches that sdist through pip, lays the
project's patches and own native files over it and builds one wheel with a local version (``0.3.36+shiftkv.N``), which
installs over or instead of the stock wheel. Everything lives in one cache directory:

    sdist/          the sdist, checked against SDIST_SHA256
    tools/<hash>/   the build backend (and cmake and ninja where the machine lacks them)
    src/, build/    one source tree and one CMake tree; a build only rewrites files that differ, so ninja recompiles
                    only what a changed patch or option touches
    wheels/<key>/   finished wheels by a hash of everything that goes into them

Nothing here imports llama_cpp or the rest of the package: it has to work before there is a library to load.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path, PurePosixPath

import filelock
import platformdirs
from unidiff.errors import UnidiffParseError
from unidiff.patch import PatchedFile, PatchSet

from edge_shiftkv import cuda_toolkit
from edge_shiftkv._paths import patches_dir

UPSTREAM_VERSION = "0.3.36"
"""The one llama-cpp-python release the patches are written for."""

SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

LOCAL_VERSION = "shiftkv.5"
"""Raise the number when a released set of patches changes, so that pip upgrades an older build."""

WHEEL_VERSION = f"{UPSTREAM_VERSION}+{LOCAL_VERSION}"

# Patches that only let the library compile or run on some machines; the stock library that tests compare with has them.
_PORTABILITY = "9"

_BACKEND = "scikit-build-core==1.1.2"
_SDIST_ROOT = f"llama_cpp_python-{UPSTREAM_VERSION}"
_VERSION_FILE = "llama_cpp/__init__.py"
_METADATA_FILE = "pyproject.toml"

# 60 % of the sdist's bytes and its longest paths (Windows stops at 260 characters), none of which the library needs.
_NOT_UNPACKED = tuple(f"vendor/llama.cpp/{part}/" for part in ("benches", "docs", "media", "models", "tools/ui"))

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

# Included by CMake before upstream's CMakeLists.txt. Both changes leave the libraries in the wheel as they are.
_CMAKE_INCLUDE = """\
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

Report = Callable[[str], None]


class BuildError(RuntimeError):
    """The wheel could not be built or installed; the message is one line for the user."""


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


def print_line(text: str) -> None:
    """Print at once: a build that writes to a pipe or a file should be seen to advance, too."""
    print(text, flush=True)


def default_cache_dir() -> Path:
    """The directory all builds of this user share."""
    override = os.environ.get("EDGE_SHIFTKV_CACHE")
    return Path(override).absolute() if override else Path(platformdirs.user_cache_dir("edge_shiftkv", appauthor=False))


def build_wheel(options: Options, report: Report = print_line) -> Path:
    """Return the path of the wheel for `options`, building it unless the cache has it.

    Raises BuildError when the sdist cannot be had or differs from the pinned one, a patch does not apply, a tool is
    missing or the compile fails, and OSError when the cache cannot be written. A failed build adds no wheel to it.
    """
    cache = default_cache_dir()
    patches = read_patches(patches_dir())
    if options.stock:
        patches = {name: data for name, data in patches.items() if name.startswith(_PORTABILITY)}
    finished = cache / "wheels" / cache_key(options, patches, cpu_features() if options.native else "")
    if wheel := _only_wheel(finished):
        report(f"cached: {wheel}")
        return wheel
    _require_compiler()
    _require_cuda(options)
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache, report):
        if wheel := _only_wheel(finished):  # another process built it while this one waited
            return wheel
        sdist = _fetch_sdist(cache, report)
        report("preparing the source tree")
        sync_tree(_desired_tree(sdist, options, patches), cache / "src")
        with tempfile.TemporaryDirectory(dir=cache, prefix="wheel-") as work:
            wheel = _compile(cache, options, Path(work) / "wheel", report)
            finished.parent.mkdir(exist_ok=True)
            shutil.rmtree(finished, ignore_errors=True)
            wheel.parent.replace(finished)
    return finished / wheel.name


def install_wheel(wheel: Path, report: Report = print_line) -> None:
    """Install `wheel` into the running environment in place of any llama-cpp-python there.

    Its dependencies are installed first, so that the library itself is only replaced once nothing else can fail.
    Raises BuildError when pip fails; pip puts the former installation back in that case.
    """
    if _is_installed(wheel):
        report(f"already installed: {wheel.name}")
        return
    with zipfile.ZipFile(wheel) as archive:
        metadata_name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
    requirements = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    _pip("install", *requirements)
    _pip("install", "--no-deps", "--force-reinstall", str(wheel))
    report(f"installed: {wheel.name}")


def read_patches(folder: Path) -> dict[str, bytes]:
    """Return the files below `folder` by relative path: ``*.patch`` at its top, own files under ``llama.cpp/``.

    Raises BuildError when the folder has no patches.
    """
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    kept = {name: data for name, data in files.items() if _is_patch(name) or name.startswith("llama.cpp/")}
    if not any(map(_is_patch, kept)):
        raise BuildError(f"no patches in {folder}")
    return kept


def cache_key(options: Options, patches: Mapping[str, bytes], cpu: str) -> str:
    """Hash everything that decides a wheel's content. `cpu` is empty unless the build is for this CPU alone."""
    ingredients = {
        "sdist": SDIST_SHA256,
        "version": options.version,
        "backend": [_BACKEND, _CMAKE_INCLUDE],
        "cuda": cuda_toolkit.PACKAGES if options.takes_packaged_cuda else (),
        "patches": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(patches.items())},
        "cmake": options.cmake(),
        "environment": {name: os.environ[name] for name in _BUILD_ENVIRONMENT if name in os.environ},
        "platform": sysconfig.get_platform(),
        "cpu": cpu,
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:20]


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


def patched_files(originals: Mapping[str, bytes], patches: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the content of the files that `patches` change or add; paths are relative to the sdist's root.

    Every hunk has to match at exactly the line it names: a hunk found elsewhere may be in the wrong place. Raises
    BuildError naming the patch and its target when it does not, and when an own file would hide an upstream one.
    """
    changed: dict[str, bytes] = {}
    for name in sorted(filter(_is_patch, patches)):
        try:
            diffs = list(PatchSet(io.StringIO(patches[name].decode())))
        except (UnidiffParseError, UnicodeDecodeError) as error:
            raise BuildError(f"{name}: not a unified diff: {error}") from error
        if not diffs:
            raise BuildError(f"{name}: not a unified diff: it changes no file")
        for diff in diffs:
            source = changed.get(diff.path, originals.get(diff.path))
            if source is None or not diff.is_modified_file:
                raise BuildError(f"{name}: {diff.path}: patches only change files that llama-cpp-python has")
            changed[diff.path] = _apply(name, diff, source)
    for name, data in patches.items():
        if not _is_patch(name):
            target = f"vendor/{name}"
            if target in originals:
                raise BuildError(f"{name}: would replace {target}; change that file with a patch instead")
            changed[target] = data
    return changed


def sync_tree(desired: Mapping[str, bytes], root: Path) -> set[str]:
    """Make `root` hold exactly `desired`; return the paths written. Files with the right content keep their mtime."""
    root.mkdir(parents=True, exist_ok=True)
    for path in root.rglob("*"):
        if (path.is_symlink() or path.is_file()) and path.relative_to(root).as_posix() not in desired:
            path.unlink()
    written = set()
    for name, data in desired.items():
        path = root / name
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written.add(name)
    return written


def _is_patch(name: str) -> bool:
    return "/" not in name and name.endswith(".patch")


def _apply(patch: str, diff: PatchedFile, source: bytes) -> bytes:
    lines = io.StringIO(source.decode(errors="surrogateescape"), newline="\n").readlines()
    result: list[str] = []
    done = 0
    for hunk in diff:
        # A hunk without source lines names the line before the insertion.
        start = hunk.source_start - 1 if hunk.source_length else hunk.source_start
        expected = [line.value for line in hunk.source_lines()]
        if start < done or lines[start : start + len(expected)] != expected:
            raise BuildError(f"{patch}: does not apply to {diff.path} at line {hunk.source_start}")
        result += lines[done:start]
        result += (line.value for line in hunk.target_lines())
        done = start + len(expected)
    return "".join(result + lines[done:]).encode(errors="surrogateescape")


def _desired_tree(sdist: Path, options: Options, patches: Mapping[str, bytes]) -> dict[str, bytes]:
    tree: dict[str, bytes] = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = PurePosixPath(member.name).relative_to(_SDIST_ROOT).as_posix()
            if member.isfile() and not name.startswith(_NOT_UNPACKED):
                stream = archive.extractfile(member)
                assert stream is not None
                tree[name] = stream.read()
    tree |= patched_files(tree, patches)
    if not options.stock:
        # The backend reads the wheel's version from here.
        stock_line, local_line = (f'__version__ = "{v}"'.encode() for v in (UPSTREAM_VERSION, WHEEL_VERSION))
        tree[_VERSION_FILE] = tree[_VERSION_FILE].replace(stock_line, local_line)
    if options.takes_packaged_cuda:  # then pip brings its libraries along with the wheel
        more = "".join(f'    "{requirement}",\n' for requirement in cuda_toolkit.RUNTIME)
        first = b"dependencies = [\n"
        tree[_METADATA_FILE] = tree[_METADATA_FILE].replace(first, first + more.encode(), 1)
    return tree


def _fetch_sdist(cache: Path, report: Report) -> Path:
    path = cache / "sdist" / f"{_SDIST_ROOT}.tar.gz"
    if path.is_file() and _sha256(path) == SDIST_SHA256:
        return path
    report(f"downloading llama-cpp-python {UPSTREAM_VERSION}")
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="sdist-") as work:
        requirement = Path(work) / "requirements.txt"
        requirement.write_text(f"llama-cpp-python=={UPSTREAM_VERSION} --hash=sha256:{SDIST_SHA256}\n")
        # pip runs the sdist's metadata hook to confirm name and version, after it has checked the hash. Handing it the
        # backend (no isolation) makes that a matter of seconds instead of installing the backend a second time.
        _pip(
            *("download", "--no-deps", "--no-binary", "llama-cpp-python", "--no-build-isolation"),
            *("--require-hashes", "-r", str(requirement), "-d", work),
            path=_tools(cache, [_BACKEND], report),
        )
        downloaded = Path(work) / path.name
        if not downloaded.is_file() or _sha256(downloaded) != SDIST_SHA256:
            raise BuildError(f"{path.name}: pip downloaded something else than the pinned sdist")
        downloaded.replace(path)
    return path


def _tools(cache: Path, requirements: list[str], report: Report) -> Path:
    """Return a directory with `requirements` installed, for PYTHONPATH and (its ``bin``) for PATH.

    pip's own isolated environments get a new path each time, which CMake records and would take for a change.
    """
    identity = "\n".join([sys.implementation.cache_tag or sys.version, *sorted(requirements)])
    folder = cache / "tools" / hashlib.sha256(identity.encode()).hexdigest()[:12]
    if not folder.is_dir():
        report(f"installing the build tools: {', '.join(requirements)}")
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="tools-") as work:
            installed = Path(work) / "tools"
            _pip("install", "--target", str(installed), *requirements)
            installed.replace(folder)
    return folder


_HOOK = """
import json, sys
from scikit_build_core import build
hook, arguments, answer = sys.argv[1:]
result = getattr(build, hook)(*json.loads(arguments))
with open(answer, "w", encoding="utf-8") as file:
    json.dump(result, file)
"""


def _compile(cache: Path, options: Options, wheel_dir: Path, report: Report) -> Path:
    """Build the synced source tree's wheel into the new folder `wheel_dir` through the PEP 517 hooks, as pip would."""
    source, build = cache / "src", cache / "build"
    _discard_foreign_objects(build, options)
    # Options of an earlier build must not leak into this one; ninja still knows which objects are up to date.
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    include = cache / "include.cmake"
    include.write_text(_CMAKE_INCLUDE, encoding="utf-8")
    packaged = (
        cuda_toolkit.complete(_tools(cache, list(cuda_toolkit.PACKAGES), report)) if options.takes_packaged_cuda else []
    )
    settings = {
        "build-dir": str(build),
        "cmake.args": [f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={include.as_posix()}", *packaged, *options.cmake()],
        "cmake.verbose": "false",
        "ninja.make-fallback": "false",
    }
    log = cache / "build.log"
    with tempfile.TemporaryDirectory(dir=cache, prefix="hook-") as work, log.open("w", 1, encoding="utf-8") as log_file:
        answer = Path(work) / "answer.json"

        def call(hook: str, arguments: list[object], tools: Path) -> object:
            command = [sys.executable, "-c", _HOOK, hook, json.dumps(arguments), str(answer)]
            process = subprocess.Popen(
                command,
                cwd=source,
                env=_environment(tools),
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

        tools = _tools(cache, [_BACKEND], report)
        extra = call("get_requires_for_build_wheel", [settings], tools)
        assert isinstance(extra, list)
        if extra:
            tools = _tools(cache, [_BACKEND, *extra], report)
        report(f"building llama-cpp-python {options.version} ({' '.join(options.cmake())}), log: {log}")
        call("build_wheel", [str(wheel_dir), settings], tools)
    wheel = _only_wheel(wheel_dir)
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


def _require_compiler() -> None:
    if os.name == "nt":  # CMake finds Visual Studio outside of PATH; where it does not, the log has its message
        return
    for variable, language, usual in (("CC", "C", ("cc", "gcc", "clang")), ("CXX", "C++", ("c++", "g++", "clang++"))):
        chosen = shlex.split(os.environ.get(variable, ""))[:1]
        if not any(shutil.which(name) for name in chosen or usual):
            looked_for = ", ".join(chosen or usual)
            raise BuildError(
                f"no {language} compiler found (looked for {looked_for}): install one "
                f"(Debian: apt install g++, macOS: xcode-select --install) or set {variable}"
            )


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


def _pip(*arguments: str, path: Path | None = None) -> None:
    if importlib.util.find_spec("pip") is None:
        raise BuildError(f"this Python has no pip: run {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, env=_environment(path), capture_output=True, text=True, check=False)
    if result.returncode:
        if "DO NOT MATCH THE HASHES" in result.stderr:
            got = re.search(r"Got\s+([0-9a-f]{64})", result.stderr)
            raise BuildError(
                f"llama-cpp-python {UPSTREAM_VERSION}: the sdist's sha256 is {got[1] if got else 'another'}, "
                f"expected {SDIST_SHA256}"
            )
        errors = re.findall(r"^(?:ERROR|error): (.*)", result.stderr, re.MULTILINE)
        reason = errors[0] if errors else f"exit status {result.returncode}"
        raise BuildError(f"pip {arguments[0]} failed: {reason}")


def _environment(path: Path | None) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if path:
        environment["PYTHONPATH"] = str(path)
        environment["PATH"] = os.pathsep.join([str(path / "bin"), os.environ.get("PATH", "")])
    return environment


def _is_installed(wheel: Path) -> bool:
    """Whether the running environment's llama-cpp-python came from exactly this wheel (pip records its hash)."""
    code = (
        "from importlib.metadata import Distribution as D\n"
        "print(D.from_name('llama-cpp-python').read_text('direct_url.json') or '')"
    )
    # A fresh process: this one may have looked at site-packages before the wheel was installed.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return result.returncode == 0 and _sha256(wheel) in result.stdout


def _only_wheel(folder: Path) -> Path | None:
    return next(folder.glob("*.whl"), None)


@contextmanager
def _locked(cache: Path, report: Report) -> Iterator[None]:
    """Keep other builds away from the shared trees; the lock goes with the process, however that ends."""
    lock = filelock.FileLock(cache / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report("waiting for another build to finish")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
