"""CUDA without a toolkit on the machine: what is asked for, completed and refused. The compile itself takes an hour."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from edge_shiftkv import build
from edge_shiftkv.build import BuildError, Options, cuda_toolkit, source, wheel

CUDA = Options(frozenset({"cuda"}))


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDACXX", "CUDA_PATH", "CUDA_HOME", "CUDAARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_toolkit, "DEFAULT_HOME", tmp_path / "none")
    monkeypatch.setattr(cuda_toolkit, "_which", lambda name: None)


def toolkit(root: Path, *, header: str | None) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "nvcc").touch(mode=0o755)
    if header:
        (root / header).parent.mkdir(parents=True)
        (root / header).touch()
    return root


@pytest.mark.usefixtures("no_toolkit")
@pytest.mark.parametrize(
    ("header", "needed"),
    [(None, True), ("include/cublas_v2.h", False), ("targets/x86_64-linux/include/cublas_v2.h", False)],
)
def test_a_toolkit_without_cublas_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, header: str | None, needed: bool
) -> None:
    assert cuda_toolkit.is_needed()
    root = toolkit(tmp_path / "cuda-13.0", header=header)
    monkeypatch.setenv("CUDA_HOME", str(root))
    assert cuda_toolkit.is_needed() == needed
    monkeypatch.delenv("CUDA_HOME")
    (tmp_path / "usr-bin").mkdir()
    (tmp_path / "usr-bin" / "nvcc").symlink_to(root / "bin" / "nvcc")
    monkeypatch.setattr(cuda_toolkit, "_which", lambda name: str(tmp_path / "usr-bin" / name))
    assert cuda_toolkit.is_needed() == needed
    assert CUDA.takes_packaged_cuda == needed
    assert not Options().takes_packaged_cuda
    monkeypatch.setenv("CUDACXX", "/my/nvcc")
    assert not cuda_toolkit.is_needed()


@pytest.mark.usefixtures("no_toolkit")
def test_packages_are_completed_to_what_cmake_and_the_linker_look_for(tmp_path: Path) -> None:
    lib = tmp_path / "nvidia" / "cu13" / "lib"
    lib.mkdir(parents=True)
    for name in ("libcudart.so.13", "libcublas.so.13", "libcudart_static.a"):
        (lib / name).write_text(name)
    for _ in range(2):  # it does no harm the second time
        arguments = cuda_toolkit.complete(tmp_path)
    assert (lib / "libcudart.so").read_text() == "libcudart.so.13"
    assert (lib.parent / "lib64" / "libcublas.so").read_text() == "libcublas.so.13"
    assert sorted(path.name for path in lib.iterdir()) == sorted(
        ["libcudart.so.13", "libcublas.so.13", "libcudart_static.a", "libcudart.so", "libcublas.so"]
    )
    assert f"-DCMAKE_CUDA_COMPILER={lib.parent}/bin/nvcc" in arguments


@pytest.mark.usefixtures("no_toolkit")
@pytest.mark.skipif(not cuda_toolkit.is_offered() or os.name == "nt", reason="the packages are for Linux")
def test_without_a_gpu_the_architecture_has_to_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_SHIFTKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_toolkit, "has_gpu", lambda: False)
    with pytest.raises(BuildError, match="--cuda-arch"):
        build.build_wheel(CUDA)
    monkeypatch.setattr(source, "fetch_sdist", lambda *_: pytest.fail("got further"))
    for options in (
        Options(frozenset({"cuda"}), cuda_arch="90"),
        Options(frozenset({"cuda"}), cmake_args=("-DCMAKE_CUDA_ARCHITECTURES=90",)),
    ):
        with pytest.raises(pytest.fail.Exception, match="got further"):
            build.build_wheel(options)
    monkeypatch.setattr(cuda_toolkit, "is_offered", lambda: False)
    with pytest.raises(BuildError, match="CUDA toolkit"):
        build.build_wheel(Options(frozenset({"cuda"}), cuda_arch="90"))


@pytest.mark.usefixtures("no_toolkit")
def test_the_wheel_asks_for_the_libraries_it_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sdist = tmp_path / "sdist.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name, data in {
            "pyproject.toml": b'[project]\ndependencies = [\n    "numpy>=1.20.0",\n]\n[x]\ndependencies = [\n]\n',
            "llama_cpp/__init__.py": b'__version__ = "0.3.36"\n',
        }.items():
            member = tarfile.TarInfo(f"llama_cpp_python-0.3.36/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert b"nvidia" not in source.desired_tree(sdist, Options(), {})["pyproject.toml"]
    metadata = source.desired_tree(sdist, CUDA, {})["pyproject.toml"].decode()
    wanted = "".join(f'    "{requirement}",\n' for requirement in cuda_toolkit.RUNTIME)
    assert metadata == f'[project]\ndependencies = [\n{wanted}    "numpy>=1.20.0",\n]\n[x]\ndependencies = [\n]\n'


@pytest.mark.usefixtures("no_toolkit")
def test_the_compiler_and_the_architecture_change_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [wheel.cache_key(CUDA, {}, "cpu"), wheel.cache_key(Options(frozenset({"cuda"}), cuda_arch="90"), {}, "cpu")]
    monkeypatch.setattr(cuda_toolkit, "PACKAGES", ("nvidia-cuda-nvcc==13.6",))
    keys.append(wheel.cache_key(CUDA, {}, "cpu"))
    monkeypatch.setattr(cuda_toolkit, "is_needed", lambda: False)
    keys.append(wheel.cache_key(CUDA, {}, "cpu"))
    assert len(set(keys)) == len(keys)
