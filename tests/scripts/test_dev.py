"""Which library `scripts/dev.py test` builds."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import dev
import pytest

CPUINFO = """\
model name\t: some CPU
flags\t\t: fpu sse4_2 avx avx2 fma f16c bmi2
bugs\t\t: avx512f
flags\t\t: avx512f avx512_vnni
"""


@pytest.fixture(autouse=True)
def other_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO)
    monkeypatch.setattr(dev, "CPUINFO", cpuinfo)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def test_the_machines_own_instructions_need_no_option() -> None:
    assert dev.instructions("native") == []


def test_other_instructions_are_named_one_by_one() -> None:
    options = dev.instructions("avx2")
    assert options[0] == "--no-native"
    assert "--cmake-arg=-DGGML_AVX2=ON" in options
    assert not any("AVX512" in option for option in options)


def test_what_this_cpu_cannot_run_is_not_built() -> None:
    with pytest.raises(SystemExit, match="needs a CPU with AVX512, AVX512_VNNI"):
        dev.instructions("avx512")


def test_a_cpu_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with pytest.raises(SystemExit, match="x86-64"):
        dev.instructions("avx2")


def test_an_unknown_build(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dev.test(["--build", "sse"])
    assert "invalid choice: 'sse'" in capsys.readouterr().err


def test_the_option_decides_about_all_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what else there is goes on to pytest."""
    built: list[tuple[str, ...]] = []
    run: list[tuple[str, ...]] = []

    def build_library(name: str, *options: str) -> Path:
        built.append(options)
        return Path(name)

    monkeypatch.setattr(dev, "make_environment", lambda _: None)
    monkeypatch.setattr(dev, "make_vulkan_available", lambda: True)
    monkeypatch.setattr(dev, "make_browser_available", lambda: True)
    monkeypatch.setattr(dev, "build", lambda *options: built.append(options))
    monkeypatch.setattr(dev, "build_library", build_library)
    monkeypatch.setattr(dev, "python", lambda *arguments, **_: run.append(arguments))
    dev.test(["-k", "some", "--build", "avx2", "-x"])
    options = tuple(dev.instructions("avx2"))
    assert built == [("--stock", *options), ("--vulkan", *options), options]
    assert run[-1] == ("-m", "pytest", "-k", "some", "-x")
    built.clear()
    dev.test([])
    assert built == [("--stock",), ("--vulkan",), ()]


def test_a_browser_is_only_installed_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[object] = []
    found = {"google-chrome": "/usr/bin/google-chrome"}

    def install(*arguments: object) -> bool:
        installed.append(arguments)
        return False

    monkeypatch.setattr(shutil, "which", found.get)
    monkeypatch.setattr(dev, "install", install)
    assert dev.make_browser_available()
    assert installed == []
    found.clear()
    assert not dev.make_browser_available()
    assert installed == [("tests in a browser", ("chromium",))]
