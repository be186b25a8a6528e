"""The source tree that is compiled: the sdist, checked, with the patches and own native files over it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from unidiff.errors import UnidiffParseError
from unidiff.patch import PatchedFile, PatchSet

from edge_shiftkv._version import UPSTREAM_VERSION, WHEEL_VERSION
from edge_shiftkv.build import cuda_toolkit, installing
from edge_shiftkv.build.cache import sha256, temporary
from edge_shiftkv.build.errors import BuildError, Report
from edge_shiftkv.build.options import Options

SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

# Patches that only let the library compile or run on some machines; the stock library that tests compare with has them.
_PORTABILITY = "9"

_SDIST_ROOT = f"llama_cpp_python-{UPSTREAM_VERSION}"
_VERSION_FILE = "llama_cpp/__init__.py"
_METADATA_FILE = "pyproject.toml"

# 60 % of the sdist's bytes and its longest paths (Windows stops at 260 characters), none of which the library needs.
_NOT_UNPACKED = tuple(f"vendor/llama.cpp/{part}/" for part in ("benches", "docs", "media", "models", "tools/ui"))


def read_patches(folder: Path, *, portability_only: bool = False) -> dict[str, bytes]:
    """Return the files below `folder` by relative path: ``*.patch`` at its top, own files under ``llama.cpp/``.

    portability_only: whether to leave out this project's own changes.

    Raises BuildError when the folder has no patches.
    """
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    kept = {name: data for name, data in files.items() if _is_patch(name) or name.startswith("llama.cpp/")}
    if not any(map(_is_patch, kept)):
        raise BuildError(f"no patches in {folder}")
    return {name: data for name, data in kept.items() if not portability_only or name.startswith(_PORTABILITY)}


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


def desired_tree(sdist: Path, options: Options, patches: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files that are compiled, by their paths in the sdist: its own, patched. Raises BuildError."""
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


def fetch_sdist(cache: Path, report: Report) -> Path:
    """The path of the sdist in the cache, downloaded where it is not there yet. Raises BuildError."""
    path = cache / "sdist" / f"{_SDIST_ROOT}.tar.gz"
    if path.is_file() and sha256(path) == SDIST_SHA256:
        return path
    report(f"downloading llama-cpp-python {UPSTREAM_VERSION}")
    path.parent.mkdir(exist_ok=True)
    with temporary(cache, "sdist-") as work:
        requirement = work / "requirements.txt"
        requirement.write_text(f"llama-cpp-python=={UPSTREAM_VERSION} --hash=sha256:{SDIST_SHA256}\n")
        # pip runs the sdist's metadata hook to confirm name and version, after it has checked the hash. Handing it the
        # backend (no isolation) makes that a matter of seconds instead of installing the backend a second time.
        installing.pip(
            *("download", "--no-deps", "--no-binary", "llama-cpp-python", "--no-build-isolation"),
            *("--require-hashes", "-r", str(requirement), "-d", str(work)),
            path=installing.tools(cache, [installing.BACKEND], report),
        )
        downloaded = work / path.name
        if not downloaded.is_file() or sha256(downloaded) != SDIST_SHA256:
            raise BuildError(f"{path.name}: pip downloaded something else than the pinned sdist")
        downloaded.replace(path)
    return path
