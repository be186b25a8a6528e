"""Models by name: with the real huggingface_hub, from a hub of our own."""

import json
import os
import struct
import subprocess
import sys

import pytest
from support import hub as stand_in

pytest.importorskip("huggingface_hub")

SCRIPT = """\
import json, sys
from edge_shiftkv import HubError, hub
for arguments in json.loads(sys.argv[1]):
    try:
        files = hub.fetch(**arguments)
        print(json.dumps([str(files.model), files.mmproj and str(files.mmproj)]))
    except HubError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def online(tmp_path, demo):
    """A hub with the shipped model, and others of which nothing but names is real."""

    def files(*names):
        paths = {name: tmp_path / f"content {name.replace('/', ' ')}" for name in names}
        for name, path in paths.items():
            path.write_text(name)
        return paths

    shipped = {name: demo / name for name in ("demo-text-q8_0.gguf", "demo-text-f16.gguf", "demo-mmproj-f16.gguf")}
    several = ("Q4_K_M", "Q5_K_M", "IQ4_K_M-00001-of-00002", "IQ4_K_M-00002-of-00002")
    parts = [f"sub/big-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    models = {
        "us/demo": {**shipped, "README.md": demo / "README.md"},
        "us/one": files("one.gguf", ".gitattributes"),
        "us/several": files(*(f"m-{name}.gguf" for name in several)),
        "us/parts": files(*parts, "mmproj-big-Q8_0.gguf", "mmproj-big-f16.gguf"),
        "us/torn": files(*parts[:2]),
        "us/gated": files("gated.gguf"),
        "us/none": files("model.safetensors"),
    }
    with stand_in.serving(models) as served:
        served.gated.add("us/gated")
        yield served


@pytest.fixture
def environment(tmp_path, online):
    """For a process that asks that hub."""
    names = {"HF_ENDPOINT": online.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_ETAG_TIMEOUT": "5"}
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**ours, **names, "HF_HUB_DISABLE_TELEMETRY": "1"}


def fetch(environment, *cases):
    """What `hub.fetch` gives for each of the arguments: paths, or an error's text."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(environment, *arguments):
    command = [sys.executable, "-m", "edge_shiftkv", "run", "--threads", "1", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_the_shipped_model_by_name(environment, online, demo):
    question = ("--image", str(demo / "document.png"), "-p", "Read line 2.", "-n", "20")
    status, out, err = run(environment, "-hf", "us/demo:q8_0", *question)
    assert (status, out) == (0, "VOLT 89537\n"), err
    assert sorted(online.downloads) == ["demo-mmproj-f16.gguf", "demo-text-q8_0.gguf"]
    # Again, from the cache; then without a network, in Python.
    assert run(environment, "--hf-repo", "us/demo", "--hf-file", "*-q8_0.gguf", *question)[:2] == (0, out)
    assert len(online.downloads) == 2
    script = (
        "import sys; from edge_shiftkv import Runtime\n"
        "with Runtime.from_pretrained('us/demo', '*text-q8*', kv_budget=96, n_threads=1) as runtime:\n"
        "    print(runtime.generate('Read line 4.', [sys.argv[1]]).text, runtime.kv_budget)"
    )
    for offline in ({"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}):
        command = [sys.executable, "-c", script, str(demo / "document.png")]
        done = subprocess.run(command, env={**environment, **offline}, capture_output=True, text=True, timeout=120)
        assert done.stdout == "TERMS COPY 96\n", done.stderr
    assert len(online.downloads) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
def test_the_progress_is_shown_on_a_terminal(environment, online):
    import fcntl
    import termios

    shown, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-c", SCRIPT, json.dumps([{"repo": "us/demo:q8_0"}])]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=terminal) as process:
        os.close(terminal)
        seen = b""
        try:
            while piece := os.read(shown, 4096):
                seen += piece
        except OSError:  # what Linux says of a terminal that nobody has open
            pass
        os.close(shown)
    assert process.returncode == 0
    assert b"demo-text-q8_0.gguf" in seen
    assert b"100%" in seen


def test_which_files_are_taken(environment, online):
    found = fetch(
        environment,
        {"repo": "us/one"},
        {"repo": "us/several"},
        {"repo": "us/several:q5_k_m"},
        {"repo": "us/several", "file": "m-IQ4*"},
        {"repo": "us/parts:Q8_0"},
        {"repo": "us/parts", "mmproj": "*q8_0.gguf"},
        {"repo": "us/parts", "mmproj": "mmproj-big-Q8_0.gguf"},
        {"repo": "us/parts", "mmproj": None},
        {"repo": "us/demo", "file": "demo-text-f16.gguf"},
    )
    names = [[path and path.partition(f"{stand_in.COMMIT}/")[2] for path in paths] for paths in found]
    part = "sub/big-Q8_0-00001-of-00003.gguf"
    assert names[:5] == [
        ["one.gguf", None],
        ["m-Q4_K_M.gguf", None],
        ["m-Q5_K_M.gguf", None],
        ["m-IQ4_K_M-00001-of-00002.gguf", None],
        [part, "mmproj-big-f16.gguf"],
    ]
    assert found[5].startswith("us/parts: *q8_0.gguf is none of its files: mmproj-big-Q8_0.gguf") is True
    assert names[6:] == [
        [part, "mmproj-big-Q8_0.gguf"],
        [part, None],
        ["demo-text-f16.gguf", "demo-mmproj-f16.gguf"],
    ]
    # All parts are there, beside each other.
    assert {name for name in online.downloads if "-00003" in name} == {
        part.replace("00001", f"0000{i}") for i in (1, 2, 3)
    }
    assert "README.md" not in online.downloads


def test_what_cannot_be_had(environment, online):
    found = fetch(
        environment,
        {"repo": "us/missing"},
        {"repo": "a/b/c"},
        {"repo": "us/gated"},
        {"repo": "us/none"},
        {"repo": "us/torn"},
        {"repo": "us/demo"},
        {"repo": "us/demo", "file": "*.gguf"},
        {"repo": "us/demo", "file": "*q2*"},
        {"repo": "us/demo:Q2_K"},
        {"repo": "us/demo:Q2_K", "file": "*"},
        {"repo": "us/several", "mmproj": "*f16*"},
    )
    both = "demo-text-f16.gguf, demo-text-q8_0.gguf"
    expected = [
        f"{online.url}/us/missing: there is no such model, or it is private",
        "'a/b/c' is no name of a model: it has to be user/model",
        f"{online.url}/us/gated is gated: accept its terms there, and log in with: hf auth login",
        "us/none: no file is named, and Q4_K_M is none of its models: it has no such GGUF files",
        "us/torn: parts of the model are not there: sub/big-Q8_0-00003-of-00003.gguf",
        f"us/demo: no file is named, and Q4_K_M is none of its models: {both}",
        f"us/demo: *.gguf is 2 of its files: {both}",
        f"us/demo: *q2* is none of its files: {both}",
        f"us/demo: Q2_K is none of its models: {both}",
        "us/demo:Q2_K names a quantization, and * a file: use one of them",
        "us/several: *f16* is none of its files: it has no such GGUF files",
    ]
    for text, beginning in zip(found, expected, strict=True):
        assert text.startswith(beginning)
    assert online.downloads == []


def test_without_a_network(environment, online, tmp_path):
    offline = {**environment, "HF_ENDPOINT": "http://127.0.0.1:1"}
    (text,) = fetch(offline, {"repo": "us/one"})
    assert text.startswith("http://127.0.0.1:1/us/one cannot be downloaded: ")
    assert text.endswith("nothing of it is in the cache")
    assert fetch(environment, {"repo": "us/several:Q5_K_M"}) == fetch(offline, {"repo": "us/several:Q5_K_M"})
    # The cache has one of them only; what belongs to another revision is not looked at.
    (main,) = (tmp_path / "home" / "hub").glob("models--us--several/snapshots/*")
    other = main.with_name("f" * 40)
    other.mkdir()
    (other / "m-Q4_K_M.gguf").write_text("another")
    (text,) = fetch(offline, {"repo": "us/several:Q4_K_M"})
    assert text == "us/several: Q4_K_M is none of its models: m-Q5_K_M.gguf"


def test_errors_are_one_line(environment, tiny):
    status, out, err = run(environment, "-hf", "us/missing", "-p", "x")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("edge-shiftkv run: http://")
    status, _, err = run(environment, "-m", str(tiny.text), "--hf-file", "x", "-p", "x")
    assert (status, err) == (
        1,
        "edge-shiftkv run: --hf-file and --hf-mmproj are files of a repository: name it with -hf\n",
    )
    # Either a file or a repository.
    for arguments in ((), ("-m", "a.gguf", "-hf", "us/one")):
        status, _, err = run(environment, *arguments, "-p", "x")
        assert status == 2
        assert "-hf/--hf-repo" in err


def test_without_huggingface_hub(environment, tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not installed')\n")
    hidden = {**environment, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    (text,) = fetch(hidden, {"repo": "us/one"})
    assert text == 'models by name need huggingface_hub: install it with pip install "edge-shiftkv[hub]"'
    # It is only imported where a model is named so.
    status, _, err = run(hidden, "-m", "none.gguf", "-p", "x")
    assert (status, "No such file" in err) == (1, True)
