"""Rows answered by actors of a real cluster of Ray, some of which are killed."""

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import batch_ray
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from demo_documents import make_document
from support.howto import ROOT

from edge_shiftkv import Runtime, SettingError
from edge_shiftkv.ray import ANSWER_COLUMNS, Predictor

N_PICTURES = 4


@pytest.fixture(scope="module")
def cluster():
    """A cluster on this machine that is gone afterwards, with all of its processes; its address."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp" if os.name == "posix" else None)  # sockets have short paths
    with pytest.MonkeyPatch.context() as patch:
        # The processes of the cluster have this environment.
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
        )
        patch.delenv("RAY_AUTH_MODE", raising=False)
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        try:
            context = ray.init(
                num_cpus=3,
                include_dashboard=False,
                object_store_memory=100 << 20,
                log_to_driver=False,
                _temp_dir=folder,
            )
            data = ray.data.DataContext.get_current()
            data.enable_progress_bars = False
            yield context.address_info["address"]
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder of four pictures, and of a file that is none."""
    folder = tmp_path_factory.mktemp("pages")
    for seed in range(N_PICTURES):
        make_document(seed).pil_image().save(folder / f"page{seed}.png")
    (folder / "torn.png").write_bytes((folder / "page0.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def files(demo):
    return {"model": str(demo / "demo-text-q8_0.gguf"), "mmproj": str(demo / "demo-mmproj-f16.gguf"), "kv_budget": 96}


@pytest.fixture(scope="module")
def runtime(files):
    """What answers are compared with: one by one, in this process."""
    with Runtime(**files, n_threads=1) as runtime:
        yield runtime


def seed_of(seed, name):
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big") % 0xFFFFFFFF


def test_an_actor_that_is_killed(cluster, pages, files, runtime, tmp_path):
    """Its rows are answered again: each is there once, as if it had been asked alone."""
    rows = []
    for i in range(36):
        path = pages / f"page{i % N_PICTURES}.png"
        picture = {"bytes": None, "path": str(path)} if i % 2 else {"bytes": path.read_bytes(), "path": None}
        rows.append({"id": i, "question": f"Read line {i % 16 + 1}.", "page": picture, "note": f"ü{i}"})
    rows[7]["page"] = {"bytes": b"no picture", "path": None}
    rows[8]["page"] = {"bytes": None, "path": "none.png"}
    rows[9]["question"] = None

    class Dying(Predictor):
        def __call__(self, batch):
            answered = super().__call__(batch)
            (tmp_path / str(os.getpid())).touch()
            if 13 in batch["id"].to_pylist():
                try:
                    (tmp_path / "killed").touch(exist_ok=False)
                except FileExistsError:
                    return answered
                os.kill(os.getpid(), signal.SIGKILL)
            return answered

    blocks = [pa.Table.from_pylist(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    options = {"max_tokens": 14, "temperature": 1.5, "seed": 5}
    answered = ray.data.from_arrow(blocks).map_batches(
        Dying,
        fn_constructor_kwargs={
            "runtime": files,
            "prompt_column": "question",
            "image_column": "page",
            "id_column": "id",
            "options": options,
            "n_parallel": 3,
        },
        batch_format="pyarrow",
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
    )
    found = sorted(answered.take_all(), key=lambda row: row["id"])
    assert (tmp_path / "killed").exists()
    assert len(list(tmp_path.iterdir())) == 1 + 3  # two actors, and one in place of the one that was killed
    assert [row["id"] for row in found] == list(range(36))
    errors = {row["id"]: row["error"] for row in found if row["error"]}
    assert {i: error.partition(":")[0] for i, error in errors.items()} == {
        7: "ImageError",
        8: "ImageError",
        9: "PromptError",
    }
    assert "none.png: No such file" in errors[8]
    for row, given in zip(found, rows, strict=True):
        assert set(row) == {"id", "question", "note", *ANSWER_COLUMNS.names}  # without the picture
        assert (row["note"], row["question"]) == (given["note"], given["question"])
        if row["id"] in errors:
            assert (row["answer"], row["finish_reason"], row["figures"]) == (None, None, None)
            continue
        path = pages / f"page{row['id'] % N_PICTURES}.png"
        one = runtime.generate(row["question"], [path], **{**options, "seed": seed_of(5, row["id"])})
        assert (row["answer"], row["finish_reason"]) == (one.text, one.finish_reason)
        figures = one.figures.as_dict()
        counted = [name for name in figures if name.endswith(("_tokens", "kept"))]
        assert len(counted) >= 5
        assert {name: row["figures"][name] for name in counted} == {name: figures[name] for name in counted}
        assert row["figures"]["prefill_s"] > 0


def answers(folder, key):
    """id -> answer, or the error's name; each row is there once."""
    rows = [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    rows += [json.loads(line) for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_text().splitlines()]
    names = [row[key] for row in rows]
    assert len(set(names)) == len(names)
    return {row[key]: row["answer"] if row["error"] is None else row["error"].partition(":")[0] for row in rows}


@pytest.fixture
def command(files):
    return [
        *("-m", files["model"], "--mmproj", files["mmproj"], "--kv-budget", "96", "--actors", "2"),
        *("-n", "12", "--parallel", "3", "--rows-per-file", "3"),
    ]


def test_a_run_that_is_killed_and_gone_on_with(cluster, pages, runtime, command, tmp_path, capsys):
    """A folder of pictures: nothing is answered twice, nothing is lost, and other settings are refused."""
    folder, out = tmp_path / "many", tmp_path / "out"
    folder.mkdir()
    torn, notes = folder / "00.PNG", folder / "notes.txt"
    shutil.copy(pages / "torn.png", torn)
    notes.touch()
    for i in range(1, 36):
        shutil.copy(pages / f"page{i % N_PICTURES}.png", folder / f"{i:02}.png")
    arguments = ["--images", str(folder), "-p", "Read everything.", "-o", str(out), *command, "--temperature", "1.5"]

    first = subprocess.Popen([sys.executable, ROOT / "scripts" / "batch_ray.py", *arguments, "--address", cluster])
    try:
        while str(torn) not in (before := answers(out, "custom_id")) or len(before) < 5:
            assert first.poll() is None
            time.sleep(0.01)
    finally:
        first.kill()
        first.wait()
    before = answers(out, "custom_id")
    assert len(before) < 36
    assert before.pop(str(torn)) == "ImageError"
    parts = {part: part.stat().st_mtime_ns for part in out.glob("part-*") if b"ImageError" not in part.read_bytes()}
    assert parts

    assert batch_ray.main([*arguments, "-n", "13"]) == 1
    assert "other settings (max_tokens)" in capsys.readouterr().err
    shutil.copy(pages / "page0.png", torn)
    assert batch_ray.main([*arguments, "--retry-errors"]) == 0
    assert "36 rows" in capsys.readouterr().err
    found = answers(out, "custom_id")
    assert found.items() >= before.items()
    assert {part: part.stat().st_mtime_ns for part in parts} == parts
    assert set(found) == {str(path) for path in folder.iterdir() if path != notes}
    seed = json.loads((out / "_settings.json").read_text())["seed"]
    for name, answer in found.items():
        one = runtime.generate("Read everything.", [name], max_tokens=12, temperature=1.5, seed=seed_of(seed, name))
        assert answer == one.text
    assert {path.name.partition("-")[0] for path in out.iterdir()} <= {"_lock", "_settings.json", "_tries", "part"}
    assert list((out / "_tries").iterdir()) == []


def test_a_parquet_file_into_jsonl(cluster, pages, runtime, command, tmp_path):
    names = [f"n{i}" for i in range(8)]
    pictures = [[(pages / f"page{i % 3}.png").read_bytes()] for i in range(7)] + [[b"none"]]
    path = tmp_path / "pages.parquet"
    pq.write_table(pa.table({"name": names, "page": pictures}), path)
    out = tmp_path / "out"
    arguments = ["--id-column", "name", "--image-column", "page", "-p", "Read line 3.", "-o", str(out), "--jsonl"]
    arguments = [str(path), *arguments, *command, "--actors", "1"]
    assert batch_ray.main(arguments) == 3
    one = [runtime.generate("Read line 3.", [pages / f"page{i}.png"], max_tokens=12).text for i in range(3)]
    expected = {**{name: one[i % 3] for i, name in enumerate(names[:7])}, "n7": "ImageError"}
    assert answers(out, "name") == expected
    parts = {part: part.stat().st_mtime_ns for part in out.glob("part-*")}
    assert len(parts) == 3
    assert batch_ray.main(arguments) == 3
    assert {part: part.stat().st_mtime_ns for part in out.glob("part-*")} == parts
    blocks = list(batch_ray.ParquetSource(str(path), "name", {}).dataset({"n1", "n4"}, 3).iter_internal_ref_bundles())
    assert [block.num_rows() for block in blocks] == [3, 3]


def test_the_example_of_the_how_to(cluster, pages, files, runtime, tmp_path):
    pictures = [(pages / f"page{i % 3}.png").read_bytes() for i in range(5)] + [b""]
    pq.write_table(pa.table({"id": range(6), "page": pictures}), tmp_path / "pages.parquet")
    page = (ROOT / "docs" / "howto" / "many-machines.md").read_text()
    [code] = re.findall(r"^```python cluster\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for written, here in (
        ("/shared", str(tmp_path)),
        ("/models/text.gguf", files["model"]),
        ("/models/mmproj.gguf", files["mmproj"]),
        ("size=10", "size=1"),
        ("num_cpus=15", "num_cpus=1"),
    ):
        assert written in code
        code = code.replace(written, here)
    exec(code, {})
    rows = sorted(pq.read_table(tmp_path / "answered").to_pylist(), key=lambda row: row["id"])
    options = {"max_tokens": 32, "kv_budget": 128}
    one = [runtime.generate("What is the total?", [pages / f"page{i}.png"], **options).text for i in range(3)]
    assert [row["answer"] for row in rows] == [*one, *one[:2], None]
    assert list(rows[0]) == ["id", *ANSWER_COLUMNS.names]


# Without a cluster


def test_bodies(files, runtime, pages):
    """JSON text as clients send it; and structs, which have the fields of all rows."""
    picture = {"type": "image_url", "image_url": {"url": str(pages / "page1.png")}}
    parts = [picture, {"type": "text", "text": "Read everything."}]
    ask = [{"role": "user", "content": parts}]
    digits = "root ::= [0-9]{3}"
    good = [
        {"messages": ask},
        {"messages": ask, "max_tokens": 3, "temperature": None},
        {"messages": ask, "grammar": digits},
        {"messages": ask, "kv_budget": None},
    ]
    options = {"max_tokens": 8, "temperature": 0.0, "json_schema": {"type": "integer"}}
    predictor = Predictor({**files, "n_threads": 1}, body_column="body", options=options)
    texts = [json.dumps(body) for body in good]
    wrong = ["[", "[1]", "{}", '{"messages": 3}', '{"messages": [], "n": 2}', None]
    found = predictor(pa.table({"body": [*wrong, *texts]})).to_pylist()
    assert [row["error"] and row["error"].partition(":")[0] for row in found] == [
        *("PromptError", "PromptError", "PromptError", "PromptError", "SettingError", "PromptError"),
        *([None] * 4),
    ]
    found = found[len(wrong) :]
    for row, body in zip(found, good, strict=True):
        own = {**options, **{name: value for name, value in body.items() if name != "temperature"}}
        if "grammar" in own:
            del own["json_schema"]
        one = runtime.create_chat_completion(**own)
        assert row["answer"] == one["choices"][0]["message"]["content"]
        assert row["figures"]["kept_tokens"] == one["figures"]["kept_tokens"]
    assert {row["figures"]["kept_tokens"] for row in found} > {96}

    predictor = Predictor({**files, "n_threads": 1}, body_column="body", options={"max_tokens": 4})
    bodies = [{"messages": [{"role": "user", "content": parts}]}, {"messages": ask, "max_tokens": 6, "top_p": 0.5}]
    structs = pa.table({"body": pa.array(bodies)})
    assert structs["body"][0].as_py()["max_tokens"] is None
    assert [row["figures"]["generated_tokens"] for row in predictor(structs).to_pylist()] == [4, 6]


def test_what_is_wrong_with_all_rows_is_raised(files):
    for wrong in ({}, {"prompt": "?", "prompt_column": "a"}, {"body_column": "a", "image_column": "b"}):
        with pytest.raises(SettingError):
            Predictor(files, **wrong)
    predictor = Predictor({**files, "n_threads": 1}, prompt="Read line 1.", image_column="page", keep_bytes=True)
    with pytest.raises(SettingError, match="no column 'page': there are id"):
        predictor(pa.table({"id": [1]}))
    with pytest.raises(SettingError, match="'answer' before"):
        predictor(pa.table({"page": [None], "answer": [1]}))
    with pytest.raises(SettingError, match="pyarrow"):
        predictor({"page": [None]})
    none = predictor(pa.table({"page": pa.array([], pa.binary())}))
    some = predictor(pa.table({"page": pa.array([None, b""], pa.binary())}))
    assert none.schema == some.schema
    assert some.column_names == ["page", *ANSWER_COLUMNS.names]
    assert [row["error"] is None for row in some.to_pylist()] == [True, False]


def test_a_row_at_which_actors_die_is_an_error_at_last(files, tmp_path):
    """Its neighbours are answered."""
    out = batch_ray.Out(str(tmp_path), "id", "parquet")
    worker = batch_ray.Worker(out, ["note"], {"runtime": {**files, "n_threads": 1}, "prompt_column": "prompt"})

    class Died(BaseException):
        pass

    predict = worker._predict

    class Fragile:
        failed = predict.failed

        def __call__(self, rows):
            if 2 in rows["id"].to_pylist():
                raise Died
            return predict(rows)

    worker._predict = Fragile()
    rows = pa.table({"id": [1, 2, 3], "prompt": ["Read line 1.", "Read line 2.", "Read line 3."], "note": ["", "", ""]})
    for _ in range(3):
        with pytest.raises(Died):
            worker(rows)
        assert not list(tmp_path.glob("part-*"))
    assert worker(rows).to_pylist()[0]["errors"] == 1
    found = {row["id"]: row for part in tmp_path.glob("part-*") for row in pq.read_table(part).to_pylist()}
    assert [bool(found[i]["answer"]) for i in (1, 2, 3)] == [True, False, True]
    assert found[2]["error"] == "ShiftKVError: the process that answered it ended again and again"
    assert "note" not in found[1]


def test_what_is_wrong_with_a_call_is_a_line(files, command, pages, tmp_path, capsys):
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"custom_id": "a", "body": {}}\n' * 2)
    no = shutil.copy(twice, tmp_path / "no.parquet")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"custom_id": "a", "body": {}}\n{"custom')
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(Path(files["model"]).read_bytes()[:200_000])
    (tmp_path / "foreign").mkdir()
    batch_ray.Out(str(tmp_path / "foreign"), "id", "parquet").write(pa.table({"id": ["a"], **answered_nothing()}))
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"name": ["a"]}), table)
    out = ["-o", str(tmp_path / "out")]
    asked = ["--images", str(pages), "-p", "?"]
    for arguments, message in (
        ([*out], "pass a file of rows, or --images"),
        ([str(twice), *out], "'a' is there twice"),
        ([str(torn), *out], "torn.jsonl:2: not JSON"),
        ([str(tmp_path / "none.jsonl"), *out], "none.jsonl: No such file"),
        (["--images", str(tmp_path), "-p", "?", *out], "no picture there"),
        (["--images", str(pages), *out], "pass -p"),
        ([*asked, *out, "--top-p", "7"], "top_p is 7"),
        ([*asked, *out, "-m", str(cut)], "cut.gguf: an incomplete file"),
        ([*asked, *out, "--mmproj", str(tmp_path / "none.gguf")], "none.gguf"),
        ([str(table), "-p", "?", *out], "table.parquet: No match for FieldRef.Name(id)"),
        ([str(no), "-p", "?", *out], "no.parquet: "),
        ([*asked, "-o", str(tmp_path / "foreign")], "has answers, but not what they were made with"),
    ):
        assert batch_ray.main([*command, *arguments]) == 1
        line = capsys.readouterr().err
        assert message in line
        assert line.count("\n") == 1
    with batch_ray.Out(str(tmp_path / "out"), "id", "parquet").lock():
        assert batch_ray.main([*command, *asked, *out]) == 1
    assert "another run is writing to it" in capsys.readouterr().err


def answered_nothing():
    """Columns of a row without an answer and without an error."""
    return {field.name: pa.array([None], field.type) for field in ANSWER_COLUMNS}


def test_what_cannot_be_written_as_json(tmp_path):
    answer = answered_nothing()
    out = batch_ray.Out(str(tmp_path), "id", "jsonl")
    out.write(pa.table({"id": ["a"], "raw": [b"\x00\xff"], **answer}))
    assert list(out.rows()) == [("a", None)]
    rows = pa.table({"id": ["b"], "raw": [b""], **answer})
    error = pa.table({"id": ["c"], "raw": [b""], **answer, "error": ["ImageError: no"]})
    out.write(error)
    out.write(pa.concat_tables([rows, error]))
    out.drop_errors()
    assert sorted(out.rows()) == [("a", None), ("b", None)]
