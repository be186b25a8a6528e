"""The builder, with a stub in place of the compiler: the real compile is what set up the environment of these tests."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import filelock
import pytest

from edge_shiftkv import build, cli
from edge_shiftkv._paths import patches_dir
from edge_shiftkv.build import BuildError, Options, cache, compiling, installing, options, source, wheel

SOURCE = "vendor/llama.cpp/src/a.cpp"
PATCH = f"""\
--- a/{SOURCE}
+++ b/{SOURCE}
@@ -1,3 +1,4 @@
 one
+one and a half
 two
 three
"""

# A PEP 517 backend in place of scikit-build-core: it prints progress as ninja does and packs the version it finds.
BACKEND = """
import os, re, sys, zipfile
def get_requires_for_build_wheel(settings):
    return []
def build_wheel(folder, settings):
    for step in range(1, 41):
        print(f"[{step}/40] Building a.cpp.o")
    if os.environ.get("STUB_FAILS"):
        print("a.cpp:1:2: error: boom")
        sys.exit(1)
    version = re.search('__version__ = "(.*)"', open("llama_cpp/__init__.py").read())[1]
    name = f"llama_cpp_python-{version}-py3-none-any.whl"
    os.makedirs(folder)
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr(f"llama_cpp_python-{version}.dist-info/METADATA", f"Version: {version}")
        wheel.write("vendor/llama.cpp/src/a.cpp", "llama_cpp/lib/a.cpp")
    return name
"""


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a small sdist in it, a folder of patches and the stub backend."""
    folder, patches, tools = tmp_path / "cache", tmp_path / "patches", tmp_path / "tools"
    (folder / "sdist").mkdir(parents=True)
    sdist = folder / "sdist" / "llama_cpp_python-0.3.36.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name, text in {"llama_cpp/__init__.py": '__version__ = "0.3.36"\n', SOURCE: "one\ntwo\nthree\n"}.items():
            member = tarfile.TarInfo(f"llama_cpp_python-0.3.36/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    (patches / "llama.cpp/src").mkdir(parents=True)
    (patches / "0001-a.patch").write_text(PATCH, newline="\n")
    (patches / "llama.cpp/src/own.cpp").write_text("own\n", newline="\n")
    (tools / "scikit_build_core/build").mkdir(parents=True)
    (tools / "scikit_build_core/__init__.py").touch()
    (tools / "scikit_build_core/build/__init__.py").write_text(BACKEND)
    monkeypatch.setenv("EDGE_SHIFTKV_CACHE", str(folder))
    monkeypatch.setattr(source, "SDIST_SHA256", cache.sha256(sdist))
    monkeypatch.setattr(wheel, "patches_dir", lambda: patches)
    monkeypatch.setattr(installing, "tools", lambda *_: tools)
    return tmp_path


def wheels(workshop: Path) -> list[Path]:
    return list((workshop / "cache").rglob("*.whl"))


def leftovers(workshop: Path) -> set[str]:
    """What lies in the cache besides the things that are kept there."""
    kept = {"sdist", "src", "build", "build.log", "lock", "include.cmake", "wheels", "tools"}
    return {path.name for path in (workshop / "cache").iterdir()} - kept


def test_a_wheel_is_built_once(workshop: Path) -> None:
    said: list[str] = []
    wheel = build.build_wheel(Options(), said.append)
    assert wheel.name == f"llama_cpp_python-{build.WHEEL_VERSION}-py3-none-any.whl"
    assert [line.split()[0] for line in said if line.startswith("[")] == [f"[{n}/40]" for n in range(4, 41, 4)]
    assert (workshop / "cache/src" / SOURCE).read_text() == "one\none and a half\ntwo\nthree\n"
    assert (workshop / "cache/src/vendor/llama.cpp/src/own.cpp").read_text() == "own\n"

    said.clear()
    assert build.build_wheel(Options(), said.append) == wheel
    assert said == [f"cached: {wheel}"]
    assert leftovers(workshop) == set()


def test_a_second_build_waits_for_the_first(workshop: Path) -> None:
    waiting = threading.Event()

    def listen(text: str) -> None:
        if "waiting" in text:
            waiting.set()

    with ThreadPoolExecutor() as pool:
        with filelock.FileLock(workshop / "cache/lock"):
            (workshop / "cache/wheel-of-the-first").mkdir()
            second = pool.submit(build.build_wheel, Options(), listen)
            assert waiting.wait(timeout=60)
            assert wheels(workshop) == []
            assert leftovers(workshop) == {"wheel-of-the-first"}
        assert second.result(timeout=60).is_file()
    assert leftovers(workshop) == set(), "the first was killed, as it released its lock without cleaning up"


def test_a_few_wheels_of_each_variant_stay(workshop: Path) -> None:
    """Those used last, where taking one from the cache is a use."""

    def patched(number: int, choice: Options = Options()) -> Path:  # noqa: B008 - it is frozen
        (workshop / "patches/llama.cpp/src/own.cpp").write_text(f"{number}")
        made = build.build_wheel(choice, list[str]().append)
        os.utime(made.parent, (now + number, now + number))
        return made

    now = time.time() - 1000
    vulkan = patched(0, Options(frozenset({"vulkan"})))
    first, second, third = patched(1), patched(2), patched(3)
    assert patched(1) == first
    os.utime(first.parent, (now + 4, now + 4))
    fourth = patched(5)
    assert set(wheels(workshop)) == {vulkan, first, third, fourth}
    assert not second.parent.exists()

    os.utime(vulkan.parent, (now - 70 * 86400, now - 70 * 86400))
    fifth = patched(6)
    assert set(wheels(workshop)) == {first, fourth, fifth}


def test_what_the_cache_gives_counts_as_used(workshop: Path) -> None:
    made = build.build_wheel(Options(), list[str]().append)
    os.utime(made.parent, (0, 0))
    assert build.build_wheel(Options(), list[str]().append) == made
    assert made.parent.stat().st_mtime > 1e9


def test_tools_that_nobody_used_for_long_go(workshop: Path) -> None:
    for name in ("old", "recent"):
        (workshop / "cache/tools" / name).mkdir(parents=True)
    os.utime(workshop / "cache/tools/old", (0, 0))
    build.build_wheel(Options(), list[str]().append)
    assert [path.name for path in (workshop / "cache/tools").iterdir()] == ["recent"]


def test_stock_is_the_untouched_sdist(workshop: Path) -> None:
    build.build_wheel(Options(), list[str]().append)
    wheel = build.build_wheel(Options(stock=True), list[str]().append)
    assert wheel.name == "llama_cpp_python-0.3.36-py3-none-any.whl"
    assert (workshop / "cache/src" / SOURCE).read_text() == "one\ntwo\nthree\n"
    assert not (workshop / "cache/src/vendor/llama.cpp/src/own.cpp").exists()


def test_the_installed_library_has_the_local_version() -> None:
    import llama_cpp

    assert version("llama-cpp-python") == build.WHEEL_VERSION == llama_cpp.__version__


def test_a_failed_compile_installs_and_keeps_nothing(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STUB_FAILS", "1")
    monkeypatch.setattr(build, "install_wheel", lambda *_: pytest.fail("installed after a failed build"))
    assert cli.main(["build"]) == 1
    log = workshop / "cache/build.log"
    assert capsys.readouterr().err == f"edge-shiftkv build: a.cpp:1:2: error: boom (full log: {log})\n"
    assert wheels(workshop) == []
    assert leftovers(workshop) == set()

    monkeypatch.delenv("STUB_FAILS")
    assert build.build_wheel(Options(), list[str]().append).is_file()


def test_a_failed_install_leaves_the_library_alone(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = build.build_wheel(Options(), list[str]().append)
    calls = []

    def fail(*arguments: str) -> None:
        calls.append(arguments)
        raise BuildError("pip install failed: no network")

    monkeypatch.setattr(installing, "pip", fail)
    with pytest.raises(BuildError, match="no network"):
        build.install_wheel(wheel)
    assert calls == [("install",)], "the dependencies come first, the library only after them"


def test_an_sdist_with_another_hash_is_refused(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sdist = workshop / "cache/sdist/llama_cpp_python-0.3.36.tar.gz"
    (workshop / "index").mkdir()
    sdist.rename(workshop / "index" / sdist.name)
    monkeypatch.setattr(source, "SDIST_SHA256", "0" * 64)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(workshop / "index"))
    assert cli.main(["build"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "sha256" in error
    assert "0" * 64 in error
    assert not sdist.exists()
    assert wheels(workshop) == []
    assert leftovers(workshop) == set()


def test_a_patch_that_does_not_apply_is_named(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workshop / "patches/0002-late.patch").write_text(PATCH)  # what it changes is not there any more after the first
    assert cli.main(["build"]) == 1
    assert capsys.readouterr().err == f"edge-shiftkv build: 0002-late.patch: does not apply to {SOURCE} at line 1\n"
    assert not (workshop / "cache/src").exists()
    assert wheels(workshop) == []


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (
            {"p.patch": PATCH.replace("@@ -1,3 +1,4 @@", "@@ -2,3 +2,4 @@").encode()},
            f"p.patch: does not apply to {SOURCE}",
        ),
        ({"p.patch": PATCH.replace(" two", " 2").encode()}, f"p.patch: does not apply to {SOURCE}"),
        ({"p.patch": PATCH.replace("/a.cpp", "/b.cpp").encode()}, "p.patch: vendor/llama.cpp/src/b.cpp: patches only"),
        ({"p.patch": PATCH.replace("1,4", "1,9").encode()}, "p.patch: not a unified diff"),
        ({"p.patch": b"words\n"}, "p.patch: not a unified diff"),
        ({"llama.cpp/src/a.cpp": b"own\n"}, f"llama.cpp/src/a.cpp: would replace {SOURCE}"),
    ],
)
def test_patches_apply_strictly(patches: dict[str, bytes], message: str) -> None:
    with pytest.raises(BuildError, match=f"^{message}"):
        source.patched_files({SOURCE: b"one\ntwo\nthree\n"}, patches)


def test_patches_apply_in_name_order_and_several_hunks_at_once() -> None:
    original = "".join(f"{n}\n" for n in range(1, 21)).encode()
    first = f"--- a/{SOURCE}\n+++ b/{SOURCE}\n@@ -1,2 +1,1 @@\n-1\n 2\n@@ -19,2 +18,3 @@\n 19\n+19.5\n 20\n"
    second = f"--- a/{SOURCE}\n+++ b/{SOURCE}\n@@ -18,0 +19,1 @@\n+19.2\n"
    patched = source.patched_files({SOURCE: original}, {"2.patch": second.encode(), "1.patch": first.encode()})
    expected = [*(str(n) for n in range(2, 20)), "19.2", "19.5", "20"]
    assert patched == {SOURCE: "".join(f"{line}\n" for line in expected).encode()}


@pytest.mark.skipif(os.name == "nt", reason="Visual Studio is not looked for on PATH")
def test_a_missing_compiler_is_one_line(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {"PATH": "", "EDGE_SHIFTKV_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "edge_shiftkv", "build"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("edge-shiftkv build: no C compiler found (looked for cc, gcc, clang)")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_the_build_command_works_without_llama_cpp(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('no library yet')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "edge_shiftkv", "build", "--help"]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def test_every_ingredient_changes_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = {"0001-a.patch": b"x", "llama.cpp/src/own.cpp": b"y"}
    keys = [
        wheel.cache_key(Options(), patches, "cpu"),
        wheel.cache_key(Options(), patches, "another cpu"),
        wheel.cache_key(Options(), {**patches, "0001-a.patch": b"z"}, "cpu"),
        wheel.cache_key(Options(), {**patches, "llama.cpp/src/own.cpp": b"z"}, "cpu"),
        wheel.cache_key(Options(), {"0002-a.patch": b"x", "llama.cpp/src/own.cpp": b"y"}, "cpu"),
        wheel.cache_key(Options(native=False), patches, "cpu"),
        wheel.cache_key(Options(stock=True), patches, "cpu"),
        wheel.cache_key(Options(cmake_args=("-DGGML_RPC=ON",)), patches, "cpu"),
        *(wheel.cache_key(Options(frozenset({name})), patches, "cpu") for name in ("cuda", "metal", "vulkan")),
    ]
    monkeypatch.setenv("CXXFLAGS", "-O1")
    keys.append(wheel.cache_key(Options(), patches, "cpu"))
    monkeypatch.setattr(source, "SDIST_SHA256", "0" * 64)
    keys.append(wheel.cache_key(Options(), patches, "cpu"))
    assert len(set(keys)) == len(keys)


def test_options_reach_cmake() -> None:
    options = Options(frozenset({"vulkan", "cuda"}), native=False, cmake_args=("-DGGML_RPC=ON",))
    assert options.cmake() == ["-DGGML_NATIVE=OFF", "-DGGML_CUDA=ON", "-DGGML_VULKAN=ON", "-DGGML_RPC=ON"]


def test_sync_writes_only_what_differs(tmp_path: Path) -> None:
    assert source.sync_tree({"a": b"1", "d/b": b"2", "d/c": b"3"}, tmp_path) == {"a", "d/b", "d/c"}
    before = (tmp_path / "d/b").stat().st_mtime_ns
    assert source.sync_tree({"a": b"1!", "d/b": b"2", "e": b"4"}, tmp_path) == {"a", "e"}
    assert (tmp_path / "d/b").stat().st_mtime_ns == before
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"a": b"1!", "d/b": b"2", "e": b"4"}


def test_the_shipped_patches_are_found() -> None:
    assert (patches_dir() / "9000-vulkan-old-headers.patch").is_file()


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, cpuinfo: str) -> None:
    """Have /proc/cpuinfo say this, and the platform be Linux."""
    read_text = Path.read_text

    def read(path: Path, *arguments: str, **options: str) -> str:
        return cpuinfo if path == Path("/proc/cpuinfo") else read_text(path, *arguments, **options)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "read_text", read)


CPU = "model name\t: A\ncpu MHz\t\t: 2250.000\nflags\t\t: fpu sse2 avx2 avx512f\n\n"
ANOTHER_CPU = CPU.replace(" avx512f", "")


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (ANOTHER_CPU, True),
        (CPU.replace(": A", ": B"), True),  # gcc tunes for the model, too
        (CPU.replace("2250", "3000"), False),
        (2 * CPU, False),  # another core of the same
        (CPU.replace("flags\t\t: fpu sse2 avx2 avx512f", "Features\t: fp asimd sve"), True),
        (CPU.replace("flags\t\t: fpu sse2 avx2 avx512f", "isa\t\t: rv64imafdcv"), True),
        (f"{CPU}CPU part\t: 0xd40\n", True),
    ],
    ids=["flags", "model", "frequency", "cores", "arm", "risc-v", "part"],
)
def test_cpus_are_told_apart_by_what_native_code_depends_on(
    monkeypatch: pytest.MonkeyPatch, other: str, differs: bool
) -> None:
    pretend_cpu(monkeypatch, CPU)
    features = options.cpu_features()
    pretend_cpu(monkeypatch, other)
    assert (options.cpu_features() != features) is differs


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_cpu_of_this_machine_is_described_by_its_flags() -> None:
    lines = subprocess.run(["cat", "/proc/cpuinfo"], capture_output=True, text=True, check=True).stdout.splitlines()
    described = [line for line in lines if line.split(":")[0].strip() in ("flags", "Features", "isa")]
    assert described
    assert set(described) <= set(options.cpu_features().splitlines())


@pytest.mark.parametrize("values", [("Apple M1", "Apple M2"), ("Intel: AVX2.0", "Intel: AVX1.0")], ids=["arm", "intel"])
def test_cpus_of_macs_are_told_apart_by_sysctl(monkeypatch: pytest.MonkeyPatch, values: tuple[str, str]) -> None:
    said = iter(values)

    def sysctl(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == "sysctl"
        assert {"machdep.cpu.brand_string", "machdep.cpu.leaf7_features", "hw.optional"} <= set(command[1:])
        return subprocess.CompletedProcess(command, 1, next(said), "")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", sysctl)
    assert options.cpu_features() != options.cpu_features()


def test_a_cache_shared_by_machines_has_a_wheel_for_each_cpu(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for another CPU ends in an illegal instruction: neither its wheel nor its objects may be used."""
    compiled = workshop / "cache/build/a.cpp.o"
    pretend_cpu(monkeypatch, CPU)
    first = build.build_wheel(Options(), list[str]().append)
    portable = build.build_wheel(Options(native=False), list[str]().append)
    compiled.write_text("for the first CPU")
    build.build_wheel(Options(cmake_args=("-DGGML_RPC=ON",)), list[str]().append)
    assert compiled.exists(), "another build for the same CPU goes on with its objects"

    pretend_cpu(monkeypatch, ANOTHER_CPU)
    assert build.build_wheel(Options(native=False), list[str]().append) == portable
    second = build.build_wheel(Options(), list[str]().append)
    assert second != first
    assert not compiled.exists(), "the objects are for another CPU"

    compiled.write_text("for the second CPU")
    pretend_cpu(monkeypatch, CPU)
    assert build.build_wheel(Options(), list[str]().append) == first
    assert compiled.exists(), "nothing was compiled"
    build.build_wheel(Options(cmake_args=("-DGGML_RPC=OFF",)), list[str]().append)
    assert not compiled.exists()


def test_what_cmake_reads_of_the_environment_changes_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS", "CUDAARCHS", "VULKAN_SDK"):
        monkeypatch.delenv(name, raising=False)
    keys = {wheel.cache_key(Options(), {"a.patch": b"x"}, "cpu")}
    for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS", "CUDAARCHS", "VULKAN_SDK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "x")
            keys.add(wheel.cache_key(Options(), {"a.patch": b"x"}, "cpu"))
    assert len(keys) == 9
    for module, name in ((installing, "BACKEND"), (compiling, "CMAKE_INCLUDE")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "another")
            keys.add(wheel.cache_key(Options(), {"a.patch": b"x"}, "cpu"))
    assert len(keys) == 11
    monkeypatch.setattr("sysconfig.get_platform", lambda: "another")
    assert wheel.cache_key(Options(), {"a.patch": b"x"}, "cpu") not in keys


def test_options_of_an_earlier_build_do_not_stay(workshop: Path) -> None:
    """CMake's cache would keep a backend that was asked for once."""
    build.build_wheel(Options(frozenset({"vulkan"})), list[str]().append)
    remembered = workshop / "cache/build/CMakeCache.txt"
    remembered.write_text("GGML_VULKAN:BOOL=ON")
    build.build_wheel(Options(), list[str]().append)
    assert not remembered.exists()


def test_a_wheel_replaces_the_library_and_nothing_else(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it depends on is only installed where it is missing: force-reinstalling would replace numpy, too."""
    wheel = build.build_wheel(Options(), list[str]().append)
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(installing, "pip", lambda *arguments: calls.append(arguments))
    build.install_wheel(wheel, list[str]().append)
    dependencies, library = calls
    assert dependencies == ("install",)
    assert library[0] == "install"
    assert library[-1] == str(wheel)
    assert {"--no-deps", "--force-reinstall"} == set(library[1:-1])


def test_a_damaged_library_is_installed_again(workshop: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Though pip's record says that it came from this very wheel."""
    made = build.build_wheel(Options(), list[str]().append)
    file, metadata = tmp_path / "site/llama_cpp/lib/a.so", tmp_path / "site/llama_cpp_python-0.3.36.dist-info"
    file.parent.mkdir(parents=True)
    metadata.mkdir()
    file.write_bytes(b"code")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"code").digest()).decode().rstrip("=")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n")
    (metadata / "RECORD").write_text(f"llama_cpp/lib/a.so,sha256={digest},4\nllama_cpp/a.pyc,,\n")
    archive = {"archive_info": {"hash": f"sha256={hashlib.sha256(made.read_bytes()).hexdigest()}"}, "url": "file:///x"}
    (metadata / "direct_url.json").write_text(json.dumps(archive))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(installing, "pip", lambda *arguments: calls.append(arguments))
    build.install_wheel(made, list[str]().append)
    assert calls == []
    file.write_bytes(b"cod")
    build.install_wheel(made, list[str]().append)
    assert len(calls) == 2
    file.unlink()
    build.install_wheel(made, list[str]().append)
    assert len(calls) == 4
