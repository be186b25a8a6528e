"""What of scripts/check_device.py needs no GPU: its arguments, and that a stopped step keeps what it measured."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import bench_kv
import bench_pass
import check_device
import gguf
import harness
import pytest
import synthetic_gguf
from check_device import Step

TEXT = "demo-text-q8_0.gguf"

TAKES_LONG = """
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
pathlib.Path(sys.argv[-1]).write_text(json.dumps({"rows": [{"Prompt tokens": 512, "ms": "1.5", "rounds": [1, 2]}]}))
time.sleep(600)
"""
LINES = "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text('[1]\\n[2]\\n[3'); sys.exit(3)"
QUICK = "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text('{}'); print('| all |')"


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_step_that_takes_too_long_keeps_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with its own processes, and the next one has the rest of the time."""
    out = tmp_path / "device.json"
    chosen = [
        Step("Long", ("-c", TAKES_LONG), 0.2),
        Step("Lines", ("-c", LINES), 0.3, file="--out"),
        Step("Quick", ("-c", QUICK), 0.5),
    ]
    started = time.monotonic()
    assert check_device.check(chosen, 30, {"steps": {}}, out) == 1
    assert time.monotonic() - started < 60
    found = json.loads(out.read_text())["steps"]
    assert [step["status"] for step in found.values()] == ["took too long", "exit status 3", ""]
    assert found["Long"]["measured"]["rows"][0]["rounds"] == [1, 2]
    assert found["Lines"]["measured"] == [[1], [2]]
    word, pid = found["Long"]["output"].split()
    assert word == "child" and not is_alive(int(pid))
    printed = capsys.readouterr().out
    for text in ("| Prompt tokens | ms |", "| 512 | 1.5 |", "2 measurements", "| all |", "left out: needs a model"):
        assert text in printed


def options(**changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {"layers": 1, "tokens": [2048, 512], "rounds": 1, "test": None, "rehearse": False}
    return argparse.Namespace(**values | {"model": None, "draft": None, "deepen": None} | changes)


def test_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a command that its script accepts; prompts come in the order of their lengths."""
    model = tmp_path / "model.gguf"
    monkeypatch.setattr(harness, "synthetic_model", lambda n_layer, shape: model)
    found = {step.name: step for step in check_device.steps(options())}
    assert list(found) == ["Tests", "Decoding", "Selection", "Passes over a few tokens"]
    for name in ("Decoding", "Selection"):
        parsed = bench_kv.parse([*found[name].command[1:], "--json", "rows.json"])
        assert parsed.tokens == [512, 2048] and parsed.model == model and parsed.gpu_layers == 99
    more = [step.name for step in check_device.steps(options(model=model, draft=model))]
    assert more == [*found, "Many requests at once", "Drafts"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--draft", "draft.gguf"], "need the model that is drafted for"),
        (["--deepen", "99"], "need the model that is drafted for"),
        (["-m", "missing.gguf"], "missing.gguf is no file"),
    ],
)
def test_wrong_arguments(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_device.main(arguments)
    assert problem in capsys.readouterr().err


def test_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU: build it for one"):
        check_device.main([])


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter prompts' rows are there when a longer one ends the process."""
    measure = bench_kv.measure_selection
    model = next(Path(__file__).resolve().parents[2].glob("models/demo/demo-text-q8_0.gguf"))

    def fails_on_a_long_prompt(bench: Any, n_prompt: int, *arguments: Any) -> Any:
        if n_prompt == 96:
            raise KeyboardInterrupt
        return measure(bench, n_prompt, *arguments)

    monkeypatch.setattr(bench_kv, "measure_selection", fails_on_a_long_prompt)
    monkeypatch.setattr(bench_kv, "BATCH", 32)
    out = tmp_path / "rows.json"
    settings = ["--budget", "16", "--rounds", "1", "--threads", "1", "--methods", "mixed", "paper"]
    with pytest.raises(KeyboardInterrupt):
        bench_kv.main(["selection", "-m", str(model), "--tokens", "96", "64", *settings, "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["Prompt tokens"], row["Method"]) for row in rows] == [(64, "mixed"), (64, "paper")]
    assert len(rows[0]["rounds"]["selection"]) == 1
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where models to measure with are kept, empty."""
    monkeypatch.setenv("EDGE_SHIFTKV_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step runs to its end and measures, here on the CPU."""
    monkeypatch.setattr(check_device, "device", lambda: {})
    out = tmp_path / "device.json"
    status = check_device.main(["--rehearse", "--out", str(out)])
    found = json.loads(out.read_text())["steps"]
    assert {name: step["output"] for name, step in found.items() if step["status"]} == {} and status == 0
    tests, decoding, selection, passes, requests, drafts = found.values()
    assert "2 passed" in tests["output"]
    assert [row["Prompt tokens"] for row in decoding["measured"]["rows"]] == [288]
    assert [row["Method"] for row in selection["measured"]["rows"]] == ["mixed", "paper"]
    assert [len(times) for times in passes["measured"]["seconds"]["patched"].values()] == [1, 1, 1]
    assert [(row["way"], row["tokens"]) for row in requests["measured"]] == [
        ("one by one, full cache", 16),
        ("2 slots, uncut", 16),
        ("2 slots, cut to 128", 16),
    ]
    variants = {row["variant"]: row["draft"] for row in drafts["measured"]}
    assert list(variants) == ["alone", "planned", "planned, disagree", "2 tokens"]
    assert variants["2 tokens"]["drafted"] > 0


@pytest.mark.usefixtures("cache")
def test_what_is_given_counts_in_a_rehearsal(monkeypatch: pytest.MonkeyPatch, demo: Path) -> None:
    monkeypatch.setattr(check_device, "device", lambda: {})
    chosen: dict[str, tuple[str, ...]] = {}

    def record(steps: list[Step], seconds: float, *_: Any) -> int:
        chosen.update({step.name: step.command for step in steps}, seconds=(str(seconds),))
        return 0

    monkeypatch.setattr(check_device, "check", record)
    given = ["--test", "tests/one.py", "--tokens", "300", "-m", str(demo / TEXT), "--deepen", "5", "--minutes", "1"]
    assert check_device.main(["--rehearse", *given]) == 0
    assert chosen["seconds"] == ("60.0",)
    assert chosen["Tests"][-1] == "tests/one.py" and "300" in chosen["Decoding"]
    assert str(demo / TEXT) in chosen["Many requests at once"]
    target = Path(chosen["Drafts"][chosen["Drafts"].index("-m") + 1])
    assert n_layers(target) == 5 and target.name.startswith(Path(TEXT).stem)


@pytest.mark.usefixtures("cache")
def test_models_of_the_same_name_are_deepened_each(tmp_path: Path, demo: Path) -> None:
    """Also one that was written over."""
    paths = [tmp_path / name / "model.gguf" for name in ("one", "other")]
    contents = [demo / TEXT, harness.synthetic_model(2, synthetic_gguf.SMALL)]
    for path, content in zip(paths, contents, strict=True):
        path.parent.mkdir()
        shutil.copy(content, path)
        os.utime(path, (0, 0))
    first, second = (check_device.deepened(options(model=path, deepen=5)) for path in paths)
    assert [embedding_length(path) for path in (first, second)] == [192, 160]
    assert check_device.deepened(options(model=paths[0], deepen=5)) == first
    shutil.copy(contents[1], paths[0])
    assert embedding_length(check_device.deepened(options(model=paths[0], deepen=5))) == 160


def n_layers(path: Path) -> Any:
    return gguf.GGUFReader(path).fields["llama.block_count"].contents()


def embedding_length(path: Path) -> Any:
    return gguf.GGUFReader(path).fields["llama.embedding_length"].contents()


def test_passes_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that is cut off leaves what it had measured, and that makes a table."""

    class Slow:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None: ...
        def seconds(self, n_tokens: int) -> float:
            measured.append(n_tokens)
            if len(measured) == 5:
                raise KeyboardInterrupt
            return n_tokens / 1000

    measured: list[int] = []
    monkeypatch.setattr(bench_pass, "Library", Slow)
    out = tmp_path / "passes.json"
    with pytest.raises(KeyboardInterrupt):
        bench_pass.main(["-m", "model.gguf", "--tokens", "1", "2", "8", "--rounds", "2", "--json", str(out)])
    written = json.loads(out.read_text())
    assert written["seconds"] == {"patched": {"1": [0.001, 0.001], "2": [0.002], "8": [0.008]}}
    assert "| 8 | 8.0 | 8.00 (8.00 to 8.00) |" in check_device.table(written)

    written["seconds"]["patched"] |= {"2": [], "8": []}
    assert check_device.table(written).splitlines()[-1] == "| 1 | 1.0 | 1.00 (1.00 to 1.00) |"
