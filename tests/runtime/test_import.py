"""Without the patched library, importing says what to do, and the builder still starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STOCK = {"__init__.py": "", "llama_cpp.py": "class _lib: pass", "mtmd_cpp.py": ""}
MISSING = {"__init__.py": "raise ImportError('no llama_cpp')"}
WITHOUT_LIBRARY = {"__init__.py": "raise FileNotFoundError('Shared library not found')"}


@pytest.fixture(params=[STOCK, MISSING, WITHOUT_LIBRARY])
def python(request, tmp_path, monkeypatch):
    """A function that runs Python with arguments where llama_cpp is a stand-in."""
    (tmp_path / "llama_cpp").mkdir()
    for name, text in request.param.items():
        (tmp_path / "llama_cpp" / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)

    return run


def test_importing_names_the_command(python):
    result = python("-c", "from edge_shiftkv import Runtime")
    assert result.returncode == 1
    assert "ImportError: edge_shiftkv needs its patched llama-cpp-python" in result.stderr
    assert "edge-shiftkv build" in result.stderr.splitlines()[-1]


def test_the_commands_name_it_in_one_line(python):
    result = python("-m", "edge_shiftkv", "run", "-m", "a.gguf", "-p", "x")
    assert result.returncode == 1
    assert result.stderr.startswith("edge-shiftkv run: edge_shiftkv needs its patched llama-cpp-python")
    assert result.stderr.count("\n") == 1


def test_the_help_does_without_it(python):
    result = python("-m", "edge_shiftkv", "run", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "mixed (default); the patched library lists the others" in " ".join(result.stdout.split())


def test_the_builder_starts(python):
    result = python("-m", "edge_shiftkv", "build", "--help")
    assert (result.returncode, result.stderr) == (0, "")


def test_what_needs_no_library_is_there_without_it(python):
    result = python(
        "-c", "import edge_shiftkv as e; print(e.__version__, e.ShiftKVError.__name__, 'Runtime' in dir(e))"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split()[1:] == ["ShiftKVError", "True"]


def test_every_exported_name_is_there():
    import edge_shiftkv

    for name in edge_shiftkv.__all__:
        assert getattr(edge_shiftkv, name).__module__ if name != "METHODS" else edge_shiftkv.METHODS
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = edge_shiftkv.Nothing


def test_type_checkers_are_told():
    from importlib.resources import files

    assert (files("edge_shiftkv") / "py.typed").is_file()
