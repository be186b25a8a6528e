import inspect
import json
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image

from edge_shiftkv import Runtime, ShiftKVError, cli
from edge_shiftkv.sampling import Sampling
from edge_shiftkv.selection.methods import METHODS
from edge_shiftkv.speculative.options import DraftOptions

PROMPT = "What is on the picture? " * 3


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr("edge_shiftkv.engine.engine.usable_cpus", lambda: 1)


@pytest.fixture
def run(tiny, capsys):
    """A function: arguments to (exit status, stdout, stderr) of `run` with the tiny model and its picture."""

    def call(*arguments):
        common = ["run", "-m", str(tiny.text), "--mmproj", str(tiny.mmproj), "--image", str(tiny.picture), "-n", "12"]
        status = cli.main([*common, "-p", PROMPT, *arguments])
        return status, *capsys.readouterr()

    return call


def test_run_prints_the_answer(run, tiny):
    with Runtime(tiny.text, tiny.mmproj, kv_budget=24) as runtime:
        answer = runtime.generate(PROMPT, [tiny.picture], max_tokens=12)
    assert run("--kv-budget", "24") == (0, f"{answer.text}\n", "")


def test_run_prints_figures_to_stderr(run):
    status, out, err = run("--kv-budget", "24", "--stats")
    assert status == 0
    assert out == run("--kv-budget", "24")[1]
    for part in (" tokens, 16 visual\n", "24 per layer and KV head", " MiB -> 0.01 MiB", "selection", "s, 12 tokens\n"):
        assert part in err


def test_run_prints_json(run):
    status, out, err = run("--kv-budget", "24", "--json")
    answer = json.loads(out)
    assert (status, err) == (0, "")
    assert f"{answer['text']}\n" == run("--kv-budget", "24")[1]
    assert answer["finish_reason"] == "length"
    assert answer["figures"]["kept_tokens"] == 24


def test_run_takes_every_setting(run):
    status, out, _ = run(
        *(
            "--kv-budget",
            "24",
            "--n-ctx",
            "300",
            "--temperature",
            "1.5",
            "--top-k",
            "0",
            "--top-p",
            "1",
            "--min-p",
            "0",
        ),
        *("--seed", "3", "--stop", "zz", "--stop", "qq", "--type-k", "f32", "--type-v", "f32", "--gpu-layers", "0"),
        *("--threads", "1", "--raw"),
    )
    assert status == 0
    assert out != run("--kv-budget", "24")[1]


def test_run_keeps_to_a_grammar_or_a_schema(run, tmp_path, capsys):
    (tmp_path / "a.gbnf").write_text('root ::= "yes" | "no"')
    (tmp_path / "a.json").write_text('{"enum": ["red", "green"]}')
    assert run("--grammar-file", str(tmp_path / "a.gbnf"))[:2] in ((0, "yes\n"), (0, "no\n"))
    status, out, _ = run("--json-schema", str(tmp_path / "a.json"), "-n", "40")
    assert status == 0
    assert json.loads(out) in ("red", "green")
    with pytest.raises(SystemExit):
        run("--json-schema", str(tmp_path / "a.json"), "--grammar-file", str(tmp_path / "a.gbnf"))
    assert "not allowed with" in capsys.readouterr().err
    (tmp_path / "a.gbnf").write_text('root ::= "yes')
    assert run("--grammar-file", str(tmp_path / "a.gbnf"))[2].startswith("edge-shiftkv run: grammar, line 1: not GBNF")
    (tmp_path / "a.gbnf").write_bytes(b"\xff\xff")
    assert "a.gbnf: 'utf-8' codec" in run("--grammar-file", str(tmp_path / "a.gbnf"))[2]


def test_run_draws_a_heat_map(run, tmp_path):
    status, _, err = run("--kv-budget", "24", "--heatmap", str(tmp_path / "map.png"))
    assert (status, err) == (0, f"heat map: {tmp_path / 'map.png'}\n")
    with Image.open(tmp_path / "map.png") as sheet:
        assert sheet.width > 640


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "none.gguf"], "none.gguf: No such file or directory"),
        (["--image", "none.png"], "none.png: No such file or directory"),
        (["--kv-budget", "1"], "kv_budget is 1"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--grammar-file", "none.gbnf"], "none.gbnf: No such file"),
        (["--json-schema", "."], ".: Is a directory"),
        (["--n-ctx", "20"], "n_ctx is 20"),
        (["--kv-budget", "900", "--heatmap", "map.png"], "no heat map: the whole prompt is within the budget"),
        (["--heatmap", "map.png"], "pass --kv-budget, too"),
        (["--kv-budget", "24", "--heatmap", "map.nothing"], "map.nothing: a heat map is a picture"),
        (["--kv-budget", "24", "--heatmap", "none/map.png"], "none/map.png: there is no folder none"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 1
    assert err.startswith("edge-shiftkv run: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("path", ["map.nothing", "none/map.png"])
def test_a_heat_map_that_cannot_be_written_is_refused_before_the_answer(run, path):
    assert run("--kv-budget", "24", "--heatmap", path)[:2] == (1, "")
    assert run("--heatmap", "map.png")[:2] == (1, "")


def test_a_heat_map_needs_a_picture(tiny, capsys):
    command = ["run", "-m", str(tiny.text), "-p", PROMPT, "--kv-budget", "24", "--heatmap", "map.png"]
    assert cli.main(command) == 1
    assert capsys.readouterr() == ("", "edge-shiftkv run: a heat map is drawn over a picture: pass --image, too\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "edge-shiftkv: argument COMMAND: invalid choice: 'rnu'"),
        (["run", "-m", "a.gguf"], "edge-shiftkv run: the following arguments are required: -p/--prompt; see"),
        (["run", "-m", "a.gguf", "-p", "x", "--kv-budget", "much"], "kv_budget is 'much': it has to be"),
        (["run", "-m", "a.gguf", "-p", "x", "--top-q", "3"], "edge-shiftkv: unrecognized arguments: --top-q 3"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert err.rstrip().endswith("--help")


def test_without_a_command_all_are_listed(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(f"    {name} " in err for name in ("build", "doctor", "run", "batch", "chat", "serve", "demo"))


def test_the_help_lists_the_librarys_methods(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"how: mixed (default), paper, {', '.join(name for name in METHODS if name not in ('mixed', 'paper'))}" in text
    )


def test_ctrl_c_ends_without_a_traceback(run, monkeypatch):
    monkeypatch.setattr("edge_shiftkv.engine.slot.Slot.advance", lambda *_: signal.raise_signal(signal.SIGINT))
    status, _, err = run()
    assert (status, err) == (130, "")


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--stats"]], ids=["text", "json", "stats"])
def test_a_reader_that_has_had_enough(tiny, arguments):
    """As `| head -c 0` does: no traceback, and the exit status of other tools."""
    command = [sys.executable, "-m", "edge_shiftkv", "run", "-m", str(tiny.text), "--threads", "1", "-n", "200"]
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [*command, "-p", PROMPT, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, env=buffered
    )
    os.close(write)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (141, "")


def test_run_keeps_to_a_folder(run, tiny, tmp_path):
    status, _, err = run("--image-root", str(tmp_path))
    assert (status, err.count("\n")) == (1, 1)
    assert "no such file in the folder that pictures may be in" in err
    assert run("--image-root", str(tiny.picture.parent))[0] == 0


def test_run_fetches_from_public_addresses_only(run):
    for arguments, message in (
        ([], "allow_http=True"),
        (["--allow-http"], "private network"),
        (["--allow-http", "public"], "private network"),
        (["--allow-http", "private"], "Connection refused"),
    ):
        status, _, err = run("--image", "http://127.0.0.1:1/a.png", *arguments)
        assert status == 1
        assert message in err


class AskedError(Exception):
    """What a runtime was made with, and asked."""


GRAMMAR, SCHEMA = "some.gbnf", "some.json"

# Every option of `run` that reaches the runtime: an argument, the value it is passed on as, and by what name.
SETTINGS = {
    "--model": ("some.gguf", "model", "some.gguf"),
    "--mmproj": ("some-mmproj.gguf", "mmproj", "some-mmproj.gguf"),
    "--kv-budget": ("24", "kv_budget", 24),
    "--kv-method": ("snapkv", "kv_method", "snapkv"),
    "--n-ctx": ("300", "n_ctx", 300),
    "--type-k": ("q8_0", "type_k", "q8_0"),
    "--type-v": ("q4_0", "type_v", "q4_0"),
    "--gpu-layers": ("7", "n_gpu_layers", 7),
    "--no-pack-weights": (None, "pack_weights", False),
    "--threads": ("3", "n_threads", 3),
    "--draft": ("some-draft.gguf", "draft", "some-draft.gguf"),
    "--draft-tokens": ("5", "draft_options", DraftOptions(5)),
    "--draft-rule": ("tokentiming", "draft_options", DraftOptions(rule="tokentiming")),
    "--draft-mmproj": ("its-mmproj.gguf", "draft_options", DraftOptions(mmproj="its-mmproj.gguf")),
}
REQUEST = {
    "--prompt": ("What?", "prompt", "What?"),
    "--raw": (None, "raw", True),
    "--max-tokens": ("17", "max_tokens", 17),
    "--temperature": ("1.5", "temperature", 1.5),
    "--top-k": ("3", "top_k", 3),
    "--top-p": ("0.5", "top_p", 0.5),
    "--min-p": ("0.25", "min_p", 0.25),
    "--seed": ("11", "seed", 11),
    "--repeat-penalty": ("1.5", "repeat_penalty", 1.5),
    "--presence-penalty": ("0.5", "presence_penalty", 0.5),
    "--frequency-penalty": ("0.75", "frequency_penalty", 0.75),
    "--grammar-file": (GRAMMAR, "grammar", 'root ::= "é"\n'),
    "--json-schema": (SCHEMA, "json_schema", '{"enum": [1]}'),
    "--stop": ("END", "stop", ["END"]),
}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A function: arguments to what the runtime is made with, and what it is asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / GRAMMAR).write_text('root ::= "é"\n', encoding="utf-8")
    (tmp_path / SCHEMA).write_text('{"enum": [1]}', encoding="utf-8")

    class Recorder:
        def __init__(self, model, mmproj, **settings):
            self.settings = {"model": model, "mmproj": mmproj, **settings}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def stream(self, prompt, images, **options):
            raise AskedError(self.settings, {"prompt": prompt, **options})

    def call(*arguments):
        monkeypatch.setattr("edge_shiftkv.commands.settings.Runtime", Recorder)
        with pytest.raises(AskedError) as recorded:
            cli.main(["run", "--model", "m.gguf", "--prompt", "x", *arguments])
        return recorded.value.args

    return call


@pytest.mark.parametrize("name", [*SETTINGS, *REQUEST])
def test_every_argument_of_run_reaches_the_runtime(asked, name):
    which, table = (0, SETTINGS) if name in SETTINGS else (1, REQUEST)
    text, key, value = table[name]
    before, after = asked(), asked(name) if text is None else asked(name, text)
    assert after[which][key] == value != before[which][key]
    # It changes nothing else.
    assert after[1 - which] == before[1 - which]
    assert {**after[which], key: None} == {**before[which], key: None}


def test_the_defaults_of_run_are_those_of_a_request(asked):
    settings, options = asked()
    del settings["model"]
    signature = inspect.signature(Runtime.__init__)
    assert settings.pop("draft_options") == DraftOptions()
    assert settings == {name: signature.parameters[name].default for name in settings}
    assert (options.pop("prompt"), options.pop("raw"), options.pop("max_tokens")) == ("x", False, 512)
    assert options.pop("stop") is None
    assert options == {name: getattr(Sampling(), name) for name in options}


def test_pictures_are_only_fetched_when_asked_for(monkeypatch):
    allowed = []

    def load(image, *, allow_http=False, **_):
        allowed.append((image, allow_http))
        raise ShiftKVError("not now")

    monkeypatch.setattr("edge_shiftkv.commands.run.load_image", load)
    arguments = ["run", "-m", "m.gguf", "-p", "x", "--image", "http://example.org/a.png"]
    assert cli.main(arguments) == cli.main([*arguments, "--allow-http"]) == 1
    assert allowed == [("http://example.org/a.png", False), ("http://example.org/a.png", True)]
