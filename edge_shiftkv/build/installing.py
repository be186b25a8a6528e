"""What pip does: it installs the wheel, and the build's tools into the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

from edge_shiftkv.build.cache import mark_used, sha256, temporary
from edge_shiftkv.build.errors import BuildError, Report, print_line

BACKEND = "scikit-build-core==1.1.2"
"""What builds the wheel, through its PEP 517 hooks."""


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
    pip("install", *requirements)
    pip("install", "--no-deps", "--force-reinstall", str(wheel))
    report(f"installed: {wheel.name}")


def tools(cache: Path, requirements: list[str], report: Report) -> Path:
    """Return a directory with `requirements` installed, for PYTHONPATH and (its ``bin``) for PATH.

    pip's own isolated environments get a new path each time, which CMake records and would take for a change.
    """
    identity = "\n".join([sys.implementation.cache_tag or sys.version, *sorted(requirements)])
    folder = cache / "tools" / hashlib.sha256(identity.encode()).hexdigest()[:12]
    if not folder.is_dir():
        report(f"installing the build tools: {', '.join(requirements)}")
        folder.parent.mkdir(exist_ok=True)
        with temporary(cache, "tools-") as work:
            installed = work / "tools"
            pip("install", "--target", str(installed), *requirements)
            installed.replace(folder)
    mark_used(folder)
    return folder


def pip(*arguments: str, path: Path | None = None) -> None:
    """Run pip in this environment, with a `path` of tools in front; raises BuildError with its first error."""
    if importlib.util.find_spec("pip") is None:
        raise BuildError(f"this Python has no pip: run {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, env=environment(path), capture_output=True, text=True, check=False)
    if result.returncode:
        if hashes := re.search(r"Expected sha256 ([0-9a-f]{64})\s+Got\s+([0-9a-f]{64})", result.stderr):
            raise BuildError(f"what pip downloaded has the sha256 {hashes[2]}, expected {hashes[1]}")
        errors = re.findall(r"^(?:ERROR|error): (.*)", result.stderr, re.MULTILINE)
        reason = errors[0] if errors else f"exit status {result.returncode}"
        raise BuildError(f"pip {arguments[0]} failed: {reason}")


def environment(path: Path | None) -> dict[str, str]:
    """The environment variables for pip and the compile."""
    variables = dict(os.environ)
    variables.pop("PYTHONPATH", None)
    if path:
        variables["PYTHONPATH"] = str(path)
        variables["PATH"] = os.pathsep.join([str(path / "bin"), os.environ.get("PATH", "")])
    return variables


_WHICH = """
import base64, hashlib
from importlib.metadata import Distribution
installed = Distribution.from_name("llama-cpp-python")
for file in installed.files:
    if file.hash:
        digest = hashlib.new(file.hash.mode, file.locate().read_bytes()).digest()
        assert base64.urlsafe_b64encode(digest).decode().rstrip("=") == file.hash.value, file
print(installed.read_text("direct_url.json") or "")
"""


def _is_installed(wheel: Path) -> bool:
    """Whether the running environment's llama-cpp-python came from exactly this wheel and is undamaged.

    pip records the hashes of the wheel and of all files.
    """
    # A fresh process: this one may have looked at site-packages before the wheel was installed.
    result = subprocess.run([sys.executable, "-c", _WHICH], capture_output=True, text=True, check=False)
    return result.returncode == 0 and sha256(wheel) in result.stdout
