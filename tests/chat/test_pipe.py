"""The chat without a terminal, as a script uses it."""

import signal
import subprocess
import sys

import pytest

from edge_shiftkv import Runtime, cli
from edge_shiftkv.chat.commands import paths
from edge_shiftkv.errors import PromptError


@pytest.fixture
def run(demo):
    """A function: arguments and the lines of stdin to the finished process."""

    def call(*arguments, lines=(), model=None):
        command = [sys.executable, "-m", "edge_shiftkv", "chat", "--threads", "1", *arguments, "-m"]
        command += [model] if model else [demo / "demo-text-q8_0.gguf", "--mmproj", demo / "demo-mmproj-f16.gguf"]
        text = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        return subprocess.run([*map(str, command)], input=text, capture_output=True, timeout=120, check=False)

    return call


def test_answers_only(run, demo):
    document = demo / "document.png"
    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", n_threads=1) as runtime:  # noqa: SIM117
        with runtime.session(images=[document]) as page:
            expected = [page.ask("Read line 2.").text, page.reply("List all\nvalues.").text]
    done = run("--image", document, lines=["Read line 2.", "", "List all\\", "values."])
    assert done.stdout.decode() == "".join(f"{answer}\n" for answer in expected)
    assert (done.returncode, done.stderr) == (0, b"")


def test_errors_go_to_stderr_and_the_chat_goes_on(run, demo):
    done = run(
        *("-p", "/image none.png"),
        lines=[f"/image {demo / 'document.png'}", "word " * 600, "Read line 4.", "/quit", "Read line 2."],
    )
    assert done.stdout.decode() == "TERMS COPY\n"
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("edge-shiftkv chat: ")]
    assert errors[0] == "edge-shiftkv chat: none.png: No such file or directory"
    assert "/clear begins a new conversation" in errors[1]
    assert (done.returncode, len(errors)) == (1, 2)


def test_a_draft_changes_no_answer(run, tiny):
    alone, drafted = (
        run("-n", "12", *draft, lines=["Tell me all.", "And then?", "/stats"], model=tiny.text)
        for draft in ((), ("--draft", tiny.text, "--draft-tokens", "3"))
    )
    assert drafted.stdout == alone.stdout
    assert b"accepted" in drafted.stderr
    assert b"accepted" not in alone.stderr


def test_ctrl_c_ends_a_pipe(demo):
    """There is nobody at a prompt to go on."""
    command = [sys.executable, "-m", "edge_shiftkv", "chat", "-m", demo / "demo-text-q8_0.gguf", "--threads", "1"]
    with subprocess.Popen([*map(str, command), "-p", "/help"], stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stderr.readline().startswith(b"/image")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert b"Traceback" not in process.stderr.read()


def test_lines_that_go_on(run):
    done = run("--system", "Be brief.", lines=["/system", "/system a\\", "b\\", "c"])
    expected = 'system message: "Be brief."\na new conversation, system message: "a\nb\nc"\n'
    assert (done.returncode, done.stdout, done.stderr.decode()) == (0, b"", expected)


def test_bytes_that_are_no_text(run, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    done = run(lines=["Read \udcff line 2."])
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_argument_that_is_wrong_ends_it(tiny, capsys):
    assert cli.main(["chat", "-m", str(tiny.text), "--image", "none.png"]) == 1
    assert capsys.readouterr().err == "edge-shiftkv chat: none.png: No such file or directory\n"


def test_paths_as_people_write_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "it's here.png").touch()
    assert paths("a.png b.png") == ["a.png", "b.png"]
    assert paths("'a b.png' \"c d.png\" e\\ f.png") == ["a b.png", "c d.png", "e f.png"]
    assert paths("~/a.png '~/b c.png'") == [f"{tmp_path}/a.png", f"{tmp_path}/b c.png"]
    assert paths("~/it's here.png") == [f"{tmp_path}/it's here.png"]
    assert paths("https://example.org/~a.png") == ["https://example.org/~a.png"]
    with pytest.raises(PromptError, match="a quote does not end"):
        paths("it's.png")
