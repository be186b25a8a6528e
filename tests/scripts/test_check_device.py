"""What of scripts/check_device.py needs no GPU: its arguments, and that a stopped step keeps what it measured."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import bench_kv
import check_device
import harness
import pytest
from check_device import Step

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
    values: dict[str, Any] = {"layers": 1, "tokens": [2048, 512], "rounds": 1, "test": None}
    return argparse.Namespace(**values | {"model": None, "draft": None, "deepen": None} | changes)


def test_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a command that its script accepts; prompts come in the order of their lengths."""
    model = tmp_path / "model.gguf"
    monkeypatch.setattr(harness, "synthetic_model", lambda n_layer: model)
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
