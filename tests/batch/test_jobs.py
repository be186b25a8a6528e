"""`edge-shiftkv batch`: rows in files, answered once each, whatever happens."""

import csv
import errno
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import batch_kills
import psutil
import pytest
from batch_kills import answers, entries, run_with_kills
from openai.types.chat import ChatCompletion
from PIL import Image

from edge_shiftkv import Runtime, SettingError, ShiftKVError, cli
from edge_shiftkv.batch import worker
from edge_shiftkv.batch.out_file import OutFile
from edge_shiftkv.batch.parallel import choose_parallel

ERRORS = {
    "no picture": "image",
    "no option": "setting",
    "no setting": "setting",
    "no messages": "prompt",
    "too long": "context_overflow",
}


@pytest.fixture(scope="module")
def uninterrupted(model, requests, tmp_path_factory):
    """An out file: of all the rows, in one run."""
    from edge_shiftkv import cli

    out = tmp_path_factory.mktemp("uninterrupted") / "out.jsonl"
    assert cli.main(["batch", *model, str(requests), "-o", str(out), "--seed", "5"]) == 3
    return out


def test_answers_are_those_of_single_requests(demo, bodies, uninterrupted):
    found = answers(uninterrupted)
    assert {name: found.pop(name) for name in ERRORS} == ERRORS
    assert set(found) == {name for name in bodies if name.startswith("row ")}
    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", n_threads=1, kv_budget=96) as runtime:
        for name, answer in found.items():
            seed = int.from_bytes(hashlib.sha256(f"5 {name}".encode()).digest()[:4], "big") % 0xFFFFFFFF
            alone = runtime.create_chat_completion(**{"temperature": 0.0, "seed": seed, **bodies[name]})
            choice = alone["choices"][0]
            expected = (choice["message"]["content"], choice["finish_reason"], alone["usage"])
            assert answer == (*expected, alone["figures"]["kept_tokens"], "demo"), name


def test_answers_are_in_openais_schema(uninterrupted):
    for name, line in entries(uninterrupted).items():
        assert set(line) == {"id", "custom_id", "response", "error"}
        if name in ERRORS:
            assert line["response"] is None
            assert set(line["error"]) == {"code", "message"}
            continue
        assert line["response"]["status_code"] == 200
        completion = ChatCompletion.model_validate(line["response"]["body"], strict=True)
        assert completion.choices[0].message.content is not None
    assert len({line["id"] for line in entries(uninterrupted).values()}) == 60


def test_a_run_that_is_killed_again_and_again(model, requests, uninterrupted, tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "edge_shiftkv", "batch", *model, str(requests), "-o", str(out), "--seed", "5"]
    statuses = []

    def ended(status):
        statuses.append(status)
        assert answers(out) == answers(uninterrupted)

    run_with_kills(command, out, 25, random.Random(0), ended)
    assert set(statuses) == {3}


def test_the_seed_drawn_at_first_stays(batch, requests, tmp_path):
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert batch(requests, "-o", outs[0], "--limit", 12) == 0
    os.link(tmp_path / "a.jsonl.run", tmp_path / "b.jsonl.run")
    outs[1].write_text(outs[0].read_text().splitlines(keepends=True)[0])
    assert batch(requests, "-o", outs[1], "--limit", 12) == 0
    assert answers(outs[0]) == answers(outs[1])


def test_null_leaves_it_to_the_command_line(batch, demo, tmp_path):
    body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 20}
    line = {"custom_id": "a", "body": {**body, "temperature": None, "seed": None, "json_schema": None}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    assert batch(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--temperature", "1.7", "--seed", "5") == 0
    seed = int.from_bytes(hashlib.sha256(b"5 a").digest()[:4], "big") % 0xFFFFFFFF
    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", n_threads=1, kv_budget=96) as runtime:
        expected = runtime.create_chat_completion(**body, temperature=1.7, seed=seed)
    assert answers(tmp_path / "out.jsonl")["a"][0] == expected["choices"][0]["message"]["content"]


# What becomes of an out file


def entry(name, error=None):
    return {"id": "x", "custom_id": name, "response": None if error else {"body": {}}, "error": error}


def write(path, *rows):
    with OutFile(path, {"a": 1}, {"seed": 3}) as out:
        for row in rows:
            out.add(row)


def done(path, *names, **options):
    with OutFile(path, {"a": 1}, {}, **options) as out:
        return [name for name in names if out.is_done(name)]


def test_a_torn_last_line_is_cut_off_at_each_of_its_bytes(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, entry("a"), entry("ü"))
    whole = path.read_bytes()
    first = whole[: whole.index(b"\n") + 1]
    for size in range(len(first), len(whole)):
        path.write_bytes(whole[:size])
        assert done(path, "a", "ü") == ["a"]
        assert path.read_bytes() == first
        write(path, entry("ü"))
        assert path.read_bytes() == whole
    assert done(path, "a", "ü") == ["a", "ü"]


def test_lines_that_are_none_are_taken_out(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, entry("a"), entry("b"))
    a, b = path.read_bytes().splitlines(keepends=True)
    for middle in (b"\0" * 40 + b"\n", b'{"custom_id": "c"}\n', b"[" * 5000 + b"\n", b"\xff\n", a):
        path.write_bytes(a + middle + b + b[:5])
        with OutFile(path, {"a": 1}, {}) as out:
            assert (out.is_done("a"), out.is_done("b"), out.is_done("c")) == (True, True, False)
            assert out.n_dropped == (middle != a)
        assert path.read_bytes() == a + b
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.lock", "out.jsonl.run"]


def test_errors_are_done_again_when_asked_for(tmp_path):
    path = tmp_path / "out.jsonl"
    error = {"code": "image", "message": "gone"}
    write(path, entry("a"), entry("b", error), entry("c"), entry("d", error))
    before = path.read_bytes().splitlines(keepends=True)
    assert done(path, *"abcd") == list("abcd")
    assert path.read_bytes() == b"".join(before)
    assert done(path, *"abcd", retry_errors=True) == ["a", "c"]
    assert path.read_bytes() == before[0] + before[2]


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with OutFile(path, {"budget": 96, "model": "a" * 64, "stop": None}, {"seed": 3}) as out:
        out.add(entry("a"))
        assert out.settings["seed"] == 3
    with OutFile(path, {"budget": 96, "model": "a" * 64, "stop": None}, {"seed": 4}) as out:
        assert out.settings["seed"] == 3
    before = path.read_bytes()
    for settings, message in (
        ({"budget": 97, "model": "a" * 64, "stop": None}, "budget was 96, now 97;"),
        ({"budget": 96, "model": "b" * 64, "stop": ["x"]}, "another model, another stop;"),
        ({"budget": 96, "model": "a" * 64, "stop": None, "seed": 4}, "seed was 3, now 4;"),
        ({"budget": 96, "model": "a" * 64, "stop": None, "more": 4}, "is not of a batch of this version"),
    ):
        with pytest.raises(SettingError, match=message):
            OutFile(path, settings, {"seed": 3} if "seed" not in settings else {})
    assert path.read_bytes() == before
    with OutFile(path, {"budget": 97}, {}, restart=True) as out:
        assert not out.is_done("a")
    assert path.read_bytes() == b""


def test_the_settings_that_answers_depend_on(batch, requests, demo, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert batch(requests, "-o", out, "--limit", 1, "--seed", 5) == 0
    before = out.read_bytes()
    (tmp_path / "other.gguf").write_bytes((demo / "demo-text-q8_0.gguf").read_bytes() + b"x")
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    (tmp_path / "grammar.gbnf").write_text('root ::= "a"')
    for name, *arguments in (
        *(("model", "-m", tmp_path / "other.gguf"), ("mmproj", "--mmproj", tmp_path / "other.gguf")),
        *(("kv_budget", "--kv-budget", 95), ("kv_method", "--kv-method", "snapkv"), ("n_ctx", "-c", 500)),
        *(("type_k", "--type-k", "q8_0"), ("type_v", "--type-v", "q8_0"), ("max_tokens", "-n", 99)),
        *(("temperature", "--temperature", 1), ("top_k", "--top-k", 3), ("top_p", "--top-p", 0.5)),
        *(("min_p", "--min-p", 0.5), ("seed", "--seed", 6), ("stop", "--stop", "x")),
        *(("repeat_penalty", "--repeat-penalty", 1.5), ("presence_penalty", "--presence-penalty", 0.5)),
        ("frequency_penalty", "--frequency-penalty", 0.5),
        ("json_schema", "--json-schema", tmp_path / "schema.json"),
        ("grammar", "--grammar-file", tmp_path / "grammar.gbnf"),
    ):
        assert batch(requests, "-o", out, "--limit", 1, "--seed", 5, *arguments) == 1
        assert f"other settings: {name} was" in (err := capsys.readouterr().err) or f"another {name};" in err
        assert out.read_bytes() == before
    machine = [
        "--threads",
        2,
        "--parallel",
        2,
        "--gpu-layers",
        0,
        "--no-pack-weights",
        "--row-timeout",
        100,
        "--kv-method",
        "mixed",
    ]
    assert batch(requests, "-o", out, "--limit", 1, *machine) == 0
    assert batch(requests, "-o", out, "--limit", 1, "--kv-budget", 95, "--restart") == 0
    assert len(entries(out)) == 1
    assert json.loads(Path(f"{out}.run").read_text())["settings"]["kv_budget"] == 95


def test_files_of_others_are_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    with pytest.raises(SettingError, match=r"notes.txt is there, but no notes.txt.run"):
        OutFile(path, {}, {})
    (tmp_path / "notes.txt.run").write_text("mine, too")
    with pytest.raises(SettingError, match=r"notes.txt.run is not of a batch"):
        OutFile(path, {}, {})
    assert path.read_text() == "mine\n"


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "out.jsonl"
    code = "import sys; from edge_shiftkv.batch.out_file import *; OutFile(Path(sys.argv[1]), {}, {})"
    command = [sys.executable, "-c", code, str(path)]
    with OutFile(path, {}, {}):
        other = subprocess.run(command, capture_output=True, text=True)
        assert "another run is writing to it" in other.stderr
    assert subprocess.run(command).returncode == 0


def test_a_full_disk_loses_nothing(tmp_path):
    """A file that may not grow over a limit: a part of the line is written, and then an error comes."""
    path = tmp_path / "out.jsonl"
    write(path, entry("a"))
    size = path.stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = OutFile(path, {"a": 1}, {})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        with pytest.raises(ShiftKVError, match=rf"{os.strerror(errno.EFBIG)}; the rows in it are kept"):
            out.add(entry("b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == size
    assert not out.is_done("b")
    out.add(entry("b"))
    out.close()
    assert list(entries(path)) == ["a", "b"]


def test_a_run_whose_disk_is_full_ends_and_goes_on(model, requests, uninterrupted, tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "edge_shiftkv", "batch", *model, str(requests), "-o", str(out), "--seed", "5"]
    limited = ["bash", "-c", 'ulimit -f 9 && exec "$@"', "-", *command]  # KiB
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the rows in it are kept: run it again to go on\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert 4 < len(entries(out)) < 12
    assert subprocess.run(command, capture_output=True).returncode == 3
    assert answers(out) == answers(uninterrupted)


def test_what_is_written_is_flushed(tmp_path, monkeypatch):
    synced = []
    now = [0.0]
    monkeypatch.setattr("edge_shiftkv.batch.out_file.os.fsync", synced.append)
    monkeypatch.setattr("edge_shiftkv.batch.out_file.time.monotonic", lambda: now[0])
    with OutFile(tmp_path / "out.jsonl", {}, {}) as out:
        synced.clear()
        out.add(entry("a"))
        out.sync()
        assert len(synced) == 0
        assert list(entries(out.path)) == ["a"]  # other processes see it
        now[0] = 1.5
        out.sync()
        out.sync()
        assert len(synced) == 1
        out.add(entry("b"))
        assert len(synced) == 1
    assert len(synced) == 2


# Rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not JSON"),
        ("[" * 100_000, ":2: not JSON"),
        ("[]", ":2: not a JSON object"),
        ('{"custom_id": 3, "body": {}}', ":2: custom_id is 3"),
        ('{"custom_id": "x"}', ":2: body has to be an object"),
        ('{"custom_id": "x", "body": {}, "url": "/v1/embeddings"}', ":2: url is '/v1/embeddings'"),
        ('{"custom_id": "x", "body": {}, "method": "GET"}', ":2: method is 'GET'"),
        ('{"custom_id": "a", "body": {}}', ":2: custom_id 'a' is there twice"),
    ],
)
def test_files_that_are_no_batches_are_refused(batch, tmp_path, capsys, line, message):
    path = tmp_path / "in.jsonl"
    path.write_text('{"custom_id": "a", "body": {}}\n' + line + "\n")
    assert batch(path, "-o", tmp_path / "out.jsonl") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass a file of requests, or --images"),
        (["in.jsonl", "--images", "a.png"], "pass a file of requests, or --images"),
        (["--images", "a.png"], "--images needs a prompt"),
        (["--images", "none*.png", "-p", "x"], "none*.png: no picture there\n"),
        (["--images", "none", "-p", "x"], "none: No such file or directory"),
        (["--images", ".", "-p", "x"], ".: no picture there; --recursive looks into folders below"),
        (["in.jsonl", "-p", "x"], "-p and --recursive go with --images"),
        (["none.jsonl"], "none.jsonl: No such file"),
        (["none.jsonl", "--top-p", "7"], "top_p is 7"),
        (["none.jsonl", "--row-timeout", "0"], "time_limit is 0"),
        (["none.jsonl", "-m", "none.gguf"], "none.gguf: No such file"),
    ],
)
def test_mistakes_are_one_line(batch, tmp_path, capsys, arguments, message):
    assert batch(*arguments, "-o", tmp_path / "out.jsonl") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out.jsonl").exists()


def test_heat_maps_of_pictures_need_a_budget(demo, tmp_path, capsys):
    command = ["batch", "-m", "a.gguf", "--images", demo / "document.png", "-p", "x", "--heatmaps", tmp_path / "maps"]
    assert cli.main([*map(str, command), "-o", str(tmp_path / "out.jsonl")]) == 1
    assert "pass --kv-budget, too" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_what_only_the_model_knows_is_said_too(batch, tmp_path, requests, tiny, capsys):
    assert batch(requests, "-o", tmp_path / "out.jsonl", "-m", tiny.text) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("edge-shiftkv batch: ")
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_pictures(batch, demo, documents, tmp_path, monkeypatch):
    """Of files, folders and patterns, each once; and their table and heat maps."""
    (tmp_path / "scans" / "deep").mkdir(parents=True)
    for name in ("scans/a.png", "scans/deep/b.PNG", "scans/deep/data:c.png"):
        Image.open(documents / "page 0.png").save(tmp_path / name, "PNG")
    (tmp_path / "scans" / "notes.txt").write_text("no picture")
    (tmp_path / "scans" / "broken.jpg").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    prompt = ["-p", "Read everything.", "-n", 30]
    assert batch("--images", "scans", "scans/*.png", *prompt, "-o", "flat.jsonl") == 3
    assert answers(Path("flat.jsonl"))["scans/broken.jpg"] == "image"
    assert set(entries(Path("flat.jsonl"))) == {"scans/a.png", "scans/broken.jpg"}
    assert batch("--images", "scans", "--recursive", *prompt, "-o", "o.jsonl", "--csv", "o.csv", "--heatmaps", "m") == 3
    names = ["scans/a.png", "scans/broken.jpg", "scans/deep/b.PNG", "scans/deep/data:c.png"]
    assert sorted(entries(Path("o.jsonl"))) == names

    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", n_threads=1, kv_budget=96) as runtime:
        text = runtime.generate("Read everything.", ["scans/a.png"], max_tokens=30).text
    assert "\n" in text
    with Path("o.csv").open(newline="") as file:
        table = sorted(csv.reader(file))
    assert table[0] == ["custom_id", "answer", "error"]
    assert [row[:2] for row in table[1:]] == [[name, "" if "broken" in name else text] for name in names]
    assert table[2][2].startswith("image: ")
    maps = sorted(Path("m").iterdir())
    hashes = [hashlib.sha256(name.encode()).hexdigest()[:8] for name in names if "broken" not in name]
    assert [path.name for path in maps] == sorted(
        f"{stem}-{digest}.png"
        for stem, digest in zip(("scans-a-png", "scans-deep-b-PNG", "scans-deep-data-c-png"), hashes, strict=True)
    )
    for path in maps:
        with Image.open(path) as sheet:
            assert sheet.width > 480
    # Nothing is to be done now, but the table.
    Path("o.csv").unlink()
    monkeypatch.setattr("edge_shiftkv.batch.jobs.Worker", None)
    assert batch("--images", "scans", "--recursive", *prompt, "-o", "o.jsonl", "--csv", "o.csv") == 3
    assert len(Path("o.csv").read_text().splitlines()) > 4


def test_names_of_heat_maps_are_safe():
    names = ["../../x", "a" * 5000, "", ".", "a/b", "a-b", "a\0b", "ü", "\udcff", "a\n", "C:\\a"]
    files = [worker.heatmap_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,100}\.png", file) for file in files)


def test_a_schema_binds_answers_and_names_columns(batch, documents, tmp_path):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["page", "other"]}, "tags": {"type": "array", "items": {"enum": ["A"]}}},
        "required": ["kind", "tags"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    ask = {"messages": [{"role": "user", "content": "What?"}]}
    rows = {
        "bound": ask,
        "cut": {**ask, "max_tokens": 3},
        "its own": {**ask, "grammar": 'root ::= "free"', "max_tokens": 9},
    }
    lines = [json.dumps({"custom_id": name, "body": body}) + "\n" for name, body in rows.items()]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    arguments = ["--json-schema", tmp_path / "schema.json", "--csv", tmp_path / "out.csv", "-n", 60]
    assert batch(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *arguments) == 0
    found = answers(tmp_path / "out.jsonl")
    assert found["its own"][0] == "free"
    answer = json.loads(found["bound"][0])
    with (tmp_path / "out.csv").open(newline="") as file:
        table = {row["custom_id"]: row for row in csv.DictReader(file)}
    assert list(table["bound"]) == ["custom_id", "kind", "tags", "error"]
    assert table["bound"]["kind"] == answer["kind"]
    assert json.loads(table["bound"]["tags"]) == answer["tags"]
    assert table["cut"]["kind"] == ""
    assert "finish_reason length" in table["cut"]["error"]


# The process that answers


def crashing(connection, work):
    """The worker, that dies when it gets to certain rows."""
    answered = worker._answered

    def die(custom_id, *arguments):
        if custom_id == "row 2":
            os.kill(os.getpid(), signal.SIGSEGV)
        if custom_id == "row 12" and not Path(os.environ["CRASHED_ONCE"]).exists():
            Path(os.environ["CRASHED_ONCE"]).touch()
            os.abort()
        return answered(custom_id, *arguments)

    worker._answered = die
    worker.serve(connection, work)


def always_crashing(connection, work):
    worker._answered = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    worker.serve(connection, work)


def test_a_run_in_which_nothing_works_ends(batch, requests, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(worker, "serve", always_crashing)
    monkeypatch.setattr("edge_shiftkv.batch.jobs._DEATHS", 2)
    out = tmp_path / "out.jsonl"
    assert batch(requests, "-o", out) == 1
    assert "the process that answers ended with SIGKILL again and again" in capfd.readouterr().err
    assert list(answers(out).values()) == ["crash"]


def test_a_crash_costs_the_row_that_causes_it(batch, requests, uninterrupted, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CRASHED_ONCE", str(tmp_path / "crashed"))
    monkeypatch.setattr(worker, "serve", crashing)
    monkeypatch.setattr("edge_shiftkv.batch.jobs._DEATHS", 3)  # there are three, but with answers between them
    out = tmp_path / "out.jsonl"
    assert batch(requests, "-o", out, "--seed", 5, "--limit", 14) == 3
    expected = {name: answer for name, answer in answers(uninterrupted).items() if name in entries(out)}
    assert len(expected) == 14
    assert answers(out) == {**expected, "row 2": "crash"}
    assert "ended twice (SIGSEGV)" in entries(out)["row 2"]["error"]["message"]
    assert (tmp_path / "crashed").exists()
    assert "tried again, one by one" in capfd.readouterr().err
    monkeypatch.undo()
    assert batch(requests, "-o", out, "--seed", 5, "--limit", 14, "--retry-errors") == 0
    assert answers(out) == expected


def dying(connection, work):
    os.abort()


def hanging(connection, work):
    """The worker, that says nothing more when it gets to a certain row."""
    answered = worker._answered
    worker._answered = lambda name, *rest: time.sleep(600) if name == "row 1" else answered(name, *rest)
    worker.serve(connection, work)


def test_a_process_that_cannot_begin_ends_the_run(batch, requests, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "serve", dying)
    assert batch(requests, "-o", tmp_path / "out.jsonl") == 1
    assert "the process that loads the models ended with SIGABRT" in capsys.readouterr().err


def test_a_process_that_hangs_is_ended(batch, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "serve", hanging)
    monkeypatch.setattr("edge_shiftkv.batch.jobs._SILENCE_S", -3.0)
    out = tmp_path / "out.jsonl"
    assert batch(requests, "-o", out, "--limit", 3, "--row-timeout", 2) == 3
    assert {name: line["error"] and line["error"]["code"] for name, line in entries(out).items()} == {
        "row 0": None,
        "row 1": "crash",
        "row 2": None,
    }


def test_a_row_may_take_too_long(batch, requests, tmp_path):
    out = tmp_path / "out.jsonl"
    assert batch(requests, "-o", out, "--limit", 2, "--row-timeout", 1e-6) == 3
    assert set(answers(out).values()) == {"time_limit"}


# Ctrl-C, and what is to be seen


@pytest.fixture(scope="module")
def slow(demo, requests, tmp_path_factory):
    """A file of a long row, a short one, and more long ones: when the short one is answered, others are at work."""
    with Runtime(demo / "demo-text-q8_0.gguf", n_gpu_layers=0) as runtime:
        end = runtime.engine.model.eos
    content = json.loads(requests.read_text().splitlines()[0])["body"]["messages"][0]["content"][:1]
    long = {"messages": [{"role": "user", "content": content}], "logit_bias": {str(end): -1000}, "max_tokens": 700}
    rows = [("long", long), ("short", {**long, "max_tokens": 1})] + [("long", long)] * 18
    lines = [{"custom_id": f"{name} {i}", "body": body} for i, (name, body) in enumerate(rows)]
    path = tmp_path_factory.mktemp("slow") / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def start(model, requests, out, *arguments):
    """Start the command and return when the first row is answered."""
    command = [sys.executable, "-m", "edge_shiftkv", "batch", *model, str(requests), "-o", str(out), "--seed", "5"]
    process = subprocess.Popen([*command, *arguments], start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (out.exists() and out.stat().st_size):
        assert process.poll() is None
        time.sleep(0.002)
    return process


def test_ctrl_c_finishes_what_is_at_work(model, slow, tmp_path):
    out = tmp_path / "out.jsonl"
    process = start(model, slow, out, "--parallel", "2")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the child is told, too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finishing the rows that are at work" in err
    assert "Traceback" not in err
    found = answers(out)
    # Beside the short one one or two were at work, and one may have followed; not those that were made ready ahead.
    assert 2 <= len(found) <= 5
    assert f"{len(found)} of 20 rows done" in err.splitlines()[-1]
    assert {answer[2]["completion_tokens"] for answer in found.values()} == {1, 700}


def test_a_second_ctrl_c_stops_at_once(model, slow, tmp_path):
    out = tmp_path / "out.jsonl"
    process = start(model, slow, out)
    os.killpg(process.pid, signal.SIGINT)
    assert "finishing the rows" in process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    assert list(entries(out)) == ["short 1"]


def test_the_worker_is_not_told_of_ctrl_c_while_it_starts(model, requests, tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "edge_shiftkv", "batch", *model, str(requests), "-o", str(out), "--limit", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    parent = psutil.Process(process.pid)
    while not (workers := [child for child in parent.children() if "spawn_main" in str(child.cmdline())]):
        assert process.poll() is None
    workers[0].send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.count("\n") == 1


def test_the_worker_ends_with_its_parent(model, requests, tmp_path):
    """Also one that never says anything again."""
    code = (
        "import sys; sys.path[:0] = sys.argv.pop(1).split(';'); import test_jobs; from edge_shiftkv import cli; "
        "from edge_shiftkv.batch import worker; worker.serve = test_jobs.hanging; cli.main(sys.argv[1:])"
    )
    out = tmp_path / "out.jsonl"
    folders = f"{Path(__file__).parent};{Path(batch_kills.__file__).parent}"
    command = [sys.executable, "-c", code, folders, "batch", *model, str(requests), "-o", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (out.exists() and out.stat().st_size):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)  # until nobody has its stderr open


def test_lines_without_a_terminal(batch, requests, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("edge_shiftkv.commands.batch._EVERY_S", 0.0)
    out = tmp_path / "out.jsonl"
    assert batch(requests, "-o", out, "--limit", 3) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("edge-shiftkv batch: ") for line in lines)
    assert any(" of 3 rows, 0 errors, " in line and line.endswith(" left") for line in lines)
    assert lines[-1].startswith("edge-shiftkv batch: 3 of 3 rows done: 3 answered, 0 errors; ")
    assert "\r" not in "".join(lines)
    assert batch(requests, "-o", out, "--limit", 5) == 0
    assert "5 of 5 rows done, 3 of them before: 5 answered, 0 errors; " in capsys.readouterr().err


def test_a_bar_on_a_terminal(model, requests, tmp_path):
    import pexpect

    arguments = ["-m", "edge_shiftkv", "batch", *model, str(requests), "-o", str(tmp_path / "out.jsonl")]
    child = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=60, dimensions=(24, 120))
    child.expect(r"60/60 .*5 errors, [0-9.]+ tokens/s, [0-9]+ pictures/hour")
    child.expect("60 of 60 rows done: 55 answered, 5 errors; ")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 3


# How many at a time


class Machine:
    """An engine whose passes take the time that a table says."""

    def __init__(self, seconds, has_kv_cache=True):
        self.seconds = seconds
        self.now = 0.0
        self.made = []
        self.model = SimpleNamespace(has_kv_cache=has_kv_cache)

    def context(self, n_cells, n_batch, *, n_outputs, n_seq):
        assert n_batch == n_outputs == n_seq
        self.made.append((n_cells, n_seq))
        if n_seq not in self.seconds:
            raise ShiftKVError("no memory")

        def decode(rows):
            assert [sequence for _, _, sequence in rows] == list(range(n_seq))
            self.now += self.seconds[n_seq]

        return SimpleNamespace(decode_rows=decode, logits=lambda _: None, close=lambda: None, n_seq=n_seq)


@pytest.mark.parametrize(
    ("seconds", "n"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.0}, 16),
        ({1: 1.0, 2: 1.9, 4: 3.8}, 1),
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.5}, 4),
        ({1: 1.0, 2: 1.0}, 2),
        ({}, 1),
    ],
)
def test_as_many_as_pay_and_can_be_had(monkeypatch, seconds, n):
    monkeypatch.setattr("edge_shiftkv.native.shiftkv.cache_size", lambda _: 0)
    machine = Machine(seconds)
    assert choose_parallel(machine, 4096, 96, {"max_tokens": 40}, clock=lambda: machine.now) == n
    assert set(machine.made) <= {(136, i) for i in (1, 2, 4, 8, 16)}


def test_as_many_as_there_is_memory_for(monkeypatch):
    monkeypatch.setattr("edge_shiftkv.native.shiftkv.cache_size", lambda context: 1000 * context.n_seq)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=9000))
    machine = Machine(dict.fromkeys((1, 2, 4, 8, 16), 1.0))
    assert choose_parallel(machine, 4096, None, {"max_tokens": None}, clock=lambda: machine.now) == 4
    assert machine.made[0] == (4096, 1)


def test_auto(batch, requests, uninterrupted, tmp_path):
    out = tmp_path / "out.jsonl"
    assert batch(requests, "-o", out, "--seed", 5, "--limit", 6, "--parallel", "auto") == 0
    assert answers(out) == {name: answers(uninterrupted)[name] for name in entries(out)}


def test_the_commands_of_the_how_to_run(demo, documents, tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "howto" / "batch.md"
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "demo").symlink_to(demo, target_is_directory=True)
    (tmp_path / "scans").symlink_to(documents, target_is_directory=True)
    commands = f'edge-shiftkv() {{ "{sys.executable}" -m edge_shiftkv "$@" --threads 1; }}\n' + "\n".join(blocks)
    done = subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(entries(tmp_path / "answers.jsonl")) == {f"scans/page {i}.png" for i in range(4)}
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 5
    assert set(entries(tmp_path / "done.jsonl")) == {"a", "b"}
