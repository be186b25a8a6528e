"""What the benches share: tables, files that a run goes on with, kept models, processes with other libraries."""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import harness
import pytest

from edge_shiftkv.native.llama import Model


def test_a_table_has_no_single_measurements() -> None:
    rows: list[harness.Row] = [{"Name": "a", "Seconds": 1.5, harness.ROUNDS: [1, 2]}, {"Name": "b", harness.ROUNDS: []}]
    assert harness.markdown(rows) == "| Name | Seconds |\n| --- | --- |\n| a | 1.5 |\n| b |  |"
    assert harness.markdown(rows, numbers=True).splitlines()[1] == "| --- | ---: |"


def test_a_ratio_is_of_rounds() -> None:
    """Not of medians: those of 2, 40, 6 over 1, 10, 2 would be 6 over 2."""
    assert harness.ratio([2, 40, 6, 10], [1, 10, 2, 2]) == "3.500 (2.750 to 4.250)"
    assert harness.ratio([1, 1, 1], [2, 2, 2], ".0%") == "50% (50% to 50%)"


def test_each_round_begins_with_another_one() -> None:
    orders = [harness.turned("abc", i) for i in range(-1, 5)]
    assert ["".join(order) for order in orders] == ["cab", "abc", "bca", "cab", "abc", "bca"]


def test_a_file_is_gone_on_with_where_its_last_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for text, kept in (('{"a": 1}\n{"b', [{"a": 1}]), ('{"a": 1}\n', [{"a": 1}]), ('{"a', []), ("", []), (None, [])):
        path.unlink() if text is None else path.write_text(text)
        if text is not None:
            assert harness.read_lines(path) == kept
            assert path.read_text() == text
        lines = harness.JsonLines(path)
        assert lines.rows == kept
        lines.add({"c": "\u2028"})
        assert [json.loads(line) for line in path.read_text().split("\n") if line] == [*kept, {"c": "\u2028"}]
        assert lines.rows == harness.read_lines(path)


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        harness.JsonLines(tmp_path / "nowhere" / "out.jsonl")


def test_json_that_is_not_whole_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    harness.write_json(path, {"a": [1]})
    with pytest.raises(TypeError):
        harness.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "default_cache_dir", lambda: tmp_path)
    n_made = 0

    def write(path: Path) -> None:
        nonlocal n_made
        n_made += 1
        path.write_text("half")
        if n_made == 1:
            raise KeyboardInterrupt
        path.write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        harness.kept_model("a.b", write)
    for _ in range(2):
        assert harness.kept_model("a.b", write).read_text() == "whole"
    assert n_made == 2


def test_tokens_of_a_prompt(demo: Path) -> None:
    model = Model(demo / "demo-text-q8_0.gguf", 0, vocab_only=True)
    source = Path(argparse.__file__).read_text()
    assert harness.first_text(model, 300) == source[:300]  # a token is a byte here
    assert harness.first_text(model, 300, 101) == source[101:401]
    n = len(source.encode()) + 200_000
    assert source[:300] in harness.first_text(model, n)[len(source) :]
    assert len(harness.first_tokens(model, n)) == n
    model.close()


ANSWERS = """
import os, sys
print(os.environ.get("LLAMA_CPP_LIB_PATH"), flush=True)
for line in sys.stdin:
    if line == "end\\n":
        sys.exit(3)
    print(line[::-1].strip(), flush=True)
"""


def test_a_process_has_its_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "another")
    for library, told in ((tmp_path, str(tmp_path)), (None, "None")):
        with harness.Process([sys.executable, "-c", ANSWERS], library) as process:
            assert process.read().strip() == told
            assert process.ask("abc") == "cba\n"
    with harness.Process([sys.executable, "-c", ANSWERS]) as process:
        process.read()
        with pytest.raises(SystemExit, match="ended with status 3"):
            process.ask("end")


def test_a_stock_library_is_none_that_is_patched(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no library of llama"):
        harness.stock_library(tmp_path)
    (tmp_path / "libllama.so").write_bytes(b"\x7fELF llama_decode")
    assert harness.stock_library(tmp_path) == tmp_path
    spec = find_spec("llama_cpp")
    assert spec and spec.origin
    with pytest.raises(SystemExit, match="is a patched one"):
        harness.stock_library(Path(spec.origin).parent / "lib")


def test_options_have_defaults_of_their_own_and_cpu_time_is_of_one_thread() -> None:
    parser = argparse.ArgumentParser()
    harness.add_options(parser, "--threads", "--rounds", "--cpu-time", rounds=9)
    usual = harness.parsed(parser, [])
    assert (usual.rounds, usual.clock, harness.clock_name(usual)) == (9, time.perf_counter, "wall time")
    one = harness.parsed(parser, ["--cpu-time", "--threads", "4", "--rounds", "2"])
    assert (one.rounds, one.threads, one.clock, harness.clock_name(one)) == (2, 1, time.process_time, "CPU time")
