"""`edge-shiftkv doctor` in environments of its own: without a library, with stock, damaged and others' ones."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from edge_shiftkv._version import WHEEL_VERSION
from edge_shiftkv.doctor import examine, probe

ROOT = Path(__file__).resolve().parents[2]
BUILD = "edge-shiftkv build"
X86 = platform.machine().lower() in ("x86_64", "amd64")


def doctor(*arguments: str, python: str | Path = sys.executable, **environment: str) -> tuple[int, str]:
    """Exit status and what is printed; nothing may be written to stderr."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [str(python), "-m", "edge_shiftkv", "doctor", *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def wrong(output: str) -> dict[str, str]:
    """What is wrong, and what to type."""
    found = re.findall(r"^wrong: (.*); type: (.*)$", output, re.MULTILINE)
    assert len(found) == output.count("wrong:")
    return dict(found)


class Site:
    """A folder for PYTHONPATH with a copy of the installed llama-cpp-python, to be changed."""

    def __init__(self, folder: Path) -> None:
        installed = distribution("llama-cpp-python")
        package = Path(str(installed.locate_file("llama_cpp")))
        self.package = folder / "llama_cpp"
        shutil.copytree(package, self.package, ignore=shutil.ignore_patterns("__pycache__", "server", "*.so.*"))
        for library in (package / "lib").glob("*.so.*"):  # what the libraries load of each other
            (self.package / "lib" / library.name).symlink_to(library)
        self.metadata = folder / f"llama_cpp_python-{installed.version}.dist-info" / "METADATA"
        self.metadata.parent.mkdir()
        self.version = installed.version
        self.has_version(installed.version)
        self.path = os.pathsep.join([str(folder), str(ROOT)])

    def has_version(self, version: str) -> None:
        self.metadata.write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")
        module = self.package / "__init__.py"
        module.write_text(module.read_text().replace(f'"{self.version}"', f'"{version}"'))

    def library(self, name: str = "llama") -> Path:
        (library,) = (path for path in (self.package / "lib").iterdir() if path.stem in (name, f"lib{name}"))
        return library


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without any package, not even pip."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def import_error(path: str, python: str | Path = sys.executable) -> str:
    command = [str(python), "-c", "import edge_shiftkv; edge_shiftkv.Runtime"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_what_is_installed_here_runs() -> None:
    status, output = doctor()
    assert status == 0
    assert output.endswith("\nmodels can be run\n")
    assert f"llama-cpp-python {WHEEL_VERSION}, patched in {distribution('llama-cpp-python').locate_file('')}" in output


def test_json_says_the_same() -> None:
    import llama_cpp
    import psutil

    status, output = doctor("--json")
    facts = json.loads(output)
    assert status == 0
    assert facts["findings"] == []
    assert facts["python"] == {"version": platform.python_version(), "executable": sys.executable}
    assert facts["library"]["version"] == llama_cpp.__version__
    assert "CPU" in facts["library"]["backends"]
    cpu = next(device for device in facts["library"]["devices"] if device["kind"] == "CPU")
    assert cpu["total_bytes"] == pytest.approx(psutil.virtual_memory().total, rel=0.02)
    assert facts["extras"] == {"server": True, "hub": True, "ray": True}


@pytest.mark.skipif(not (X86 and examine.CPUINFO.exists()), reason="reads Linux's names of an x86 CPU's instructions")
def test_instructions_that_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import llama_cpp

    built_for = probe.instructions(llama_cpp.llama_print_system_info().decode())
    assert "SSE3" in built_for
    assert "OPENMP" not in built_for
    assert examine.cpu_lacks(built_for) == []
    monkeypatch.setattr(examine, "CPUINFO", tmp_path / "cpuinfo")
    examine.CPUINFO.write_text("processor\t: 0\nflags\t\t: fpu pni ssse3 avx f16c\nbugs\t\t: avx2\n")
    assert examine.cpu_lacks(["SSE3", "AVX", "F16C", "AVX2", "AVX512_VNNI"]) == ["AVX2", "AVX512_VNNI"]
    facts = examine.examine()
    assert facts["library"]["cpu_lacks"] == [name for name in built_for if name not in ("SSE3", "SSSE3", "AVX", "F16C")]
    if facts["library"]["cpu_lacks"]:
        (finding,) = facts["findings"]
        assert "which this one lacks" in finding["what"]
        assert (finding["do"], finding["stops"]) == (BUILD, True)


def test_arm_has_names_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(examine, "CPUINFO", tmp_path / "cpuinfo")
    examine.CPUINFO.write_text("BogoMIPS\t: 50.00\nFeatures\t: fp asimd asimdhp asimddp sve\n")
    assert examine.cpu_lacks(["NEON", "ARM_FMA", "FP16_VA", "DOTPROD", "SVE", "MATMUL_INT8"]) == ["MATMUL_INT8"]


def test_a_system_that_does_not_tell_its_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(examine, "CPUINFO", tmp_path / "none")
    assert examine.cpu_lacks(["AVX2"]) == []


def test_a_python_without_anything(empty_python: Path) -> None:
    status, output = doctor(python=empty_python)
    assert status == 1
    found = wrong(output)
    assert found["there is no library: llama-cpp-python is not installed"] == BUILD
    assert found["Python packages are missing: filelock"] == f'{empty_python} -m pip install "filelock"'
    assert json.loads(doctor("--json", python=empty_python)[1])["library"]["version"] is None
    assert BUILD in import_error(str(ROOT), empty_python)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(empty_python), "-m", "edge_shiftkv"]
    for argument in ("--version", "--help"):
        assert subprocess.run([*command, argument], env=environment, capture_output=True, check=False).returncode == 0
    done = subprocess.run([*command, "build"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "edge-shiftkv build: the Python package filelock is missing: pip install filelock\n"


@pytest.mark.skipif(os.name == "nt", reason="Visual Studio is not looked for on PATH")
def test_no_compiler_is_wrong_only_without_a_library(empty_python: Path, tmp_path: Path) -> None:
    without = {"PATH": "", "CC": "", "CXX": ""}
    status, output = doctor(**without)
    assert (status, wrong(output)) == (0, {})
    assert "no C, no C++" in output
    for name in ("filelock", "platformdirs", "unidiff"):  # with which the builder starts
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        (tmp_path / name).symlink_to(Path(spec.origin).parent)
    status, output = doctor(python=empty_python, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]), **without)
    assert status == 1
    assert list(wrong(output)) == [
        "there is no library: llama-cpp-python is not installed",
        "no C++ compiler is found, which the build needs",
    ]


def test_the_stock_library(site: Site) -> None:
    folder = os.environ.get("EDGE_SHIFTKV_STOCK_LIB")
    if not folder:
        pytest.skip("EDGE_SHIFTKV_STOCK_LIB is not set: scripts/dev.py test builds the stock library and sets it")
    site.has_version("0.3.36")
    shutil.rmtree(site.package / "lib")
    shutil.copytree(folder, site.package / "lib", ignore=shutil.ignore_patterns("*.whl"))
    status, output = doctor(PYTHONPATH=site.path)
    assert (status, wrong(output)) == (1, {"llama-cpp-python 0.3.36 is not the patched one": BUILD})
    assert "not patched in" in output
    assert "the stock one" in import_error(site.path)


def test_a_library_of_another_edge_shiftkv(site: Site) -> None:
    site.has_version("0.3.36+shiftkv.1")
    status, output = doctor(PYTHONPATH=site.path)
    what = f"the library is 0.3.36+shiftkv.1, and this edge_shiftkv needs {WHEEL_VERSION}"
    assert (status, wrong(output)) == (1, {what: BUILD})
    message = import_error(site.path)
    assert BUILD in message
    assert f"(version {WHEEL_VERSION}; 0.3.36+shiftkv.1 is installed here)" in message


def test_an_empty_folder_for_the_library(tmp_path: Path) -> None:
    status, output = doctor(LLAMA_CPP_LIB_PATH=str(tmp_path))
    ((what, do),) = wrong(output).items()
    assert status == 1
    assert what == f"LLAMA_CPP_LIB_PATH names a folder without the patched library: {tmp_path}"
    assert "LLAMA_CPP_LIB_PATH" in do


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.97])
def test_a_file_that_was_cut_short(site: Site, kept: float) -> None:
    """Which the loader notices, or ends the process over."""
    library = site.library()
    data = library.read_bytes()
    library.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    status, output = doctor(PYTHONPATH=site.path)
    ((what, do),) = wrong(output).items()
    assert (status, do) == (1, BUILD)
    assert re.match(r"loading the library ends with SIG|the library cannot be loaded: ", what)


def test_a_file_that_is_missing(site: Site) -> None:
    site.library("mtmd").unlink()
    status, output = doctor(PYTHONPATH=site.path)
    ((what, do),) = wrong(output).items()
    assert (status, do) == (1, BUILD)
    assert "mtmd" in what


def test_a_package_that_the_library_imports_is_missing(site: Site, tmp_path: Path) -> None:
    (tmp_path / "diskcache.py").write_text("raise ModuleNotFoundError('No module named diskcache', name='diskcache')")
    status, output = doctor(PYTHONPATH=site.path)
    found = {"the Python package diskcache is missing": f"{sys.executable} -m pip install diskcache"}
    assert (status, wrong(output)) == (1, found)


def test_only_the_record_of_an_installation(tmp_path: Path, empty_python: Path) -> None:
    metadata = tmp_path / "llama_cpp_python-0.3.36.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n")
    status, output = doctor(python=empty_python, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert status == 1
    assert wrong(output)["the library cannot be loaded: its files are gone"] == BUILD


@pytest.fixture
def compile_library(site: Site) -> object:
    compiler = shutil.which("cc")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("makes a library with cc")

    def compile_library(code: str, *options: str) -> None:
        library = site.library()
        library.unlink()
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), *options]
        subprocess.run(command, input=code, text=True, check=True)

    return compile_library


@pytest.mark.skipif(not X86, reason="an instruction of x86")
def test_code_for_another_cpu(site: Site, compile_library) -> None:  # type: ignore[no-untyped-def]
    compile_library('__attribute__((constructor)) static void load(void) { __asm__("ud2"); }')
    status, output = doctor(PYTHONPATH=site.path)
    what = "the library ends in an illegal instruction: it was built for another CPU"
    assert (status, wrong(output)) == (1, {what: BUILD})


def test_a_library_that_needs_another_one(site: Site, compile_library, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """As libgomp.so.1 on a machine on which nothing was compiled."""
    needed = tmp_path / "libnowhere.so.7"
    command = ["cc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libnowhere.so.7", "-o", str(needed)]
    subprocess.run(command, check=True)
    compile_library("", "-Wl,--no-as-needed", "-x", "none", str(needed))
    status, output = doctor(PYTHONPATH=site.path)
    what = "the library needs libnowhere.so.7, which is not on this machine"
    assert (status, list(wrong(output))) == (1, [what])


def test_what_a_library_prints_is_no_fact(site: Site, compile_library) -> None:  # type: ignore[no-untyped-def]
    compile_library('int puts(const char *); __attribute__((constructor)) static void load(void) { puts("hello"); }')
    command = [sys.executable, "-m", "edge_shiftkv.doctor.probe"]
    environment = {**os.environ, "PYTHONPATH": site.path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "hello\n"
    assert [list(json.loads(line)) for line in done.stdout.splitlines()] == [["version"], ["error"]]


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "requires", lambda _: ["numpy>=1.24", "no-such-package>=2", 'fast; extra == "server"'])
    assert examine.missing_packages() == ["no-such-package>=2"]
    facts = examine.examine()
    assert facts["findings"][0]["do"] == f'{sys.executable} -m pip install "no-such-package>=2"'


def test_a_library_for_a_gpu() -> None:
    folder = os.environ.get("EDGE_SHIFTKV_VULKAN_LIB")
    if not folder:
        pytest.skip("EDGE_SHIFTKV_VULKAN_LIB is not set: scripts/dev.py test sets it where Vulkan can be installed")
    facts = json.loads(doctor("--json", LLAMA_CPP_LIB_PATH=folder)[1])
    assert {"Vulkan", "CPU"} <= set(facts["library"]["backends"])
    environment = {"LLAMA_CPP_LIB_PATH": folder, "VK_DRIVER_FILES": "/dev/null", "VK_ICD_FILENAMES": "/dev/null"}
    status, output = doctor(**environment)
    assert status == 0
    assert "note: the library is for a GPU (Vulkan) and sees none: all runs on the CPU" in output
