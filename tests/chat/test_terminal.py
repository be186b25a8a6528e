"""The chat in a terminal, as someone uses it."""

import shutil
import stat
from pathlib import Path

import pytest
from support.terminal import Terminal

from edge_shiftkv import Runtime
from edge_shiftkv.chat.terminal import printable
from edge_shiftkv.selection.methods import METHODS

LONG = ("-c", 150_000, "-n", 140_000)  # an answer that takes minutes


@pytest.fixture
def files(demo):
    return demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf"


@pytest.fixture
def chat(files, tmp_path):
    """A function: arguments to a terminal with a chat about documents in it, at its first prompt."""
    opened = []

    def begin(*arguments, model=files, term="xterm"):
        text, mmproj = model
        terminal = Terminal(
            ["chat", "-m", text, "--mmproj", mmproj, "--threads", 1, *arguments], tmp_path / "state", term
        )
        opened.append(terminal)
        terminal.prompt()
        return terminal

    yield begin
    for terminal in opened:
        terminal.__exit__()


def test_a_conversation_about_a_picture(chat, files, demo):
    document = demo / "document.png"
    with Runtime(*files, n_threads=1, kv_budget=140) as runtime:
        expected = runtime.generate("Read line 2.", [document]).text
        with runtime.session(images=[document]) as page:
            assert page.ask("Read line 2.").text == expected
            reply = page.reply("Read line 6.").text
            figures = page.reply("List all values.").figures
    terminal = chat("--kv-budget", 140)
    assert terminal.lines[0] == ("demo-text-q8_0.gguf; budget: 140 KV pairs per layer and KV head, method mixed")
    assert "/help" in terminal.lines[1]
    assert terminal.enter(f"/image {document}") == [f"attached to the next message: {document}"]
    assert terminal.lines[-1] == "1 picture >"
    assert terminal.enter("Read line 2.") == [expected]
    assert terminal.lines[-1] == ">"
    assert terminal.enter("Read line 6.") == [reply]
    terminal.enter("List all values.")
    stats = {line[:16].strip(): line[16:] for line in terminal.enter("/stats")}
    assert stats["prompt"] == f"{figures.prompt_tokens} tokens, 256 visual"
    assert stats["kept"] == f"{figures.kept_tokens} per layer and KV head"
    assert stats["conversation"] == "3 messages, 1 picture"
    assert stats["context"] == f"{figures.kept_tokens + figures.generated_tokens} of 1024 tokens"
    assert stats["memory"].endswith(" MiB of KV caches")
    terminal.press("\x04")
    assert terminal.end() == 0


def test_the_transcript_in_the_docs(demo, tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs/howto/chat.md").read_text()
    command, title, keys, *lines = page.split("```text\n")[1].split("\n```")[0].split("\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "demo").symlink_to(demo)
    arguments = command.removeprefix("$ edge-shiftkv ").split()
    with Terminal([*arguments, "--threads", 1], tmp_path / "state", cwd=tmp_path) as terminal:
        terminal.prompt()
        for line in lines:
            prompt, entered, message = line.partition("> ")
            if entered and prompt in ("", "1 picture "):
                terminal.enter(message)
        assert terminal.lines == [title, keys, *lines, ">"]


def test_commands(chat, demo, tmp_path, files):
    document, page, drawn = demo / "document.png", tmp_path / "my page.kv", tmp_path / "kept.png"
    terminal = chat("-p", "Read line 1.", "--image", document)
    assert terminal.lines[2] == "VOLT 89537"
    assert terminal.enter("/heatmap x.png") == ["no heat map: the whole prompt is within the budget, nothing was cut"]
    assert terminal.enter("/budget 0.5") == [
        "budget: 0.5 of the prompt's KV pairs; what was read before stays as it is"
    ]
    assert terminal.enter("/budget many")[0].startswith("many is no budget")
    assert terminal.enter("/budget 1")[0].startswith("kv_budget is 1")
    assert terminal.enter("/method")[-1].startswith("method: mixed; there are ")
    assert all(name in " ".join(terminal.lines) for name in METHODS)
    assert terminal.enter("/method keydiff") == ["method: keydiff; what was read before stays as it is"]
    assert terminal.enter("/method nothing")[0].startswith("KV method 'nothing' is not known")
    terminal.enter("/regen")
    n_prompt, n_kept = figures(terminal)
    assert n_kept == round(n_prompt / 2)
    assert terminal.enter(f"/heatmap {drawn}") == [f"heat map: {drawn}"]
    assert drawn.is_file()
    assert "that is the picture itself" in terminal.enter(f"/heatmap {document}")[0]
    assert "at temperature 0 it is the same answer" in terminal.enter("/regen")[0]
    assert terminal.enter("/budget all")[0].startswith("budget: all of the prompt's KV pairs;")
    assert terminal.enter("/regen") == ["VOLT 89537"]
    assert terminal.enter(f"/save '{page}'")[0].startswith(f"{page}: saved 1 picture")
    assert "which is not a session" in terminal.enter(f"/save {drawn}")[0]
    assert terminal.enter("/clear") == ["a new conversation"]
    assert terminal.enter("/save x.kv")[0].startswith("nothing to save")
    assert terminal.enter("/regen") == ["there is no message to answer again"]
    assert terminal.enter(f"/load '{page}'") == [f"{page}: a new conversation about 1 picture"]
    assert terminal.enter("/budget 20")[0].startswith("what was loaded cannot be cut again")
    assert terminal.enter("Read line 4.") == ["TERMS COPY"]
    assert terminal.enter("/load nothing.kv") == ["nothing.kv: No such file or directory"]
    assert terminal.enter("Read line 6.") == ["AREA 654.92"]
    assert figures(terminal)[0] > n_prompt + 10
    terminal.enter(f"/image {document}")
    assert terminal.enter("/system Be brief.") == ['a new conversation, system message: "Be brief."']
    assert terminal.lines[-1] == "1 picture >"
    terminal.enter("/clear")
    assert terminal.lines[-1] == ">"
    assert terminal.enter("/system") == ['system message: "Be brief."']
    assert terminal.enter("/system none") == ["a new conversation, no system message"]
    assert terminal.enter("/system") == ["no system message"]
    assert terminal.enter("/imgae x.png")[0].startswith("/imgae is no command; did you mean /image?")
    assert terminal.enter(f"{document}") == [f"to attach a picture: /image {document}"]
    assert terminal.enter("/image none.png") == ["none.png: No such file or directory"]
    assert "not a picture" in terminal.enter(f"/image {page.as_posix().replace(' ', chr(92) + ' ')}")[0]
    assert "a quote does not end" in terminal.enter("/image it's.png")[0]
    assert terminal.enter("/image")[0].startswith("attached to the next message: nothing")
    shown = " ".join(terminal.enter("/help"))
    assert all(f"/{name} " in shown for name in ("image", "budget", "heatmap", "regen", "save", "load", "quit"))
    terminal.press("/quit\r")
    assert terminal.end() == 0


def figures(terminal):
    """Tokens of the last prompt, and those kept."""
    rows = {line[:16].strip(): line[16:].split() for line in terminal.enter("/stats")}
    return int(rows["prompt"][0]), int(rows["kept"][0])


def test_a_message_that_begins_with_a_slash(chat, files, tiny):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1) as runtime:
        expected = runtime.generate("/help me", max_tokens=8).text
    terminal = chat("-n", 8, model=(tiny.text, tiny.mmproj))
    assert printable(expected).split("\n")[0].rstrip() in terminal.enter("//help me")


def test_ctrl_c_ends_an_answer(chat, tiny):
    terminal = chat(*LONG, model=(tiny.text, tiny.mmproj))
    terminal.enter(f"/image {tiny.picture}")
    terminal.press("Tell me all.\r")
    terminal.wait(r"Tell me all\.\n.{20}")
    terminal.press("\x03")
    terminal.wait("the model forgets this message")
    terminal.wait("\n1 picture >$")  # what it had is attached again
    terminal.press("/regen\r")
    terminal.wait(r"/regen\n.{20}")
    terminal.press("\x03")
    terminal.wait("(?s)forgets.*forgets.*\n1 picture >$")
    terminal.press("/stats\r")
    terminal.wait("conversation +0 messages, 0 pictures")
    terminal.press("\x04")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt(chat):
    terminal = chat()
    terminal.press("to be thrown away\x03")
    terminal.wait("Ctrl-C again or Ctrl-D ends")
    terminal.prompt()
    assert terminal.enter("/system") == ["no system message"]  # the line was empty
    terminal.press("\x03")
    terminal.wait("(?s)Ctrl-C again.*Ctrl-C again.*\n>$")
    terminal.press("\x03")
    assert terminal.end() == 0


def test_lines_keys_and_completion(chat, demo, tmp_path):
    terminal = chat()
    terminal.press("/ima\t")
    terminal.wait("\n> /image$")
    terminal.press(f" {demo}/docu\t")
    terminal.wait("document.png$")
    assert terminal.enter("") == [f"attached to the next message: {demo / 'document.png'}"]
    terminal.press("Read \\\r")
    terminal.wait(r"\n\.\.\.$")
    terminal.press("line\x1b\r2.\r")
    terminal.prompt()
    assert terminal.lines[-5:-2] == ["1 picture > Read", "... line", "... 2."]
    terminal.press("/system a\\\x1b[D\r")  # a backslash after the cursor
    terminal.prompt()
    assert terminal.lines[-2] == 'a new conversation, system message: "a\\"'
    terminal.press("/met\t")
    terminal.wait("\n> /method$")
    terminal.press(" snap\t")
    terminal.wait("\n> /method snapkv$")
    assert terminal.enter("")[0].startswith("method: snapkv")
    folder = tmp_path / "my pictures"
    folder.mkdir()
    shutil.copy(demo / "document.png", folder / "page one.png")
    terminal.press(f"/image {demo}/document.png {tmp_path}/my\\ pictures/pa\t")
    terminal.wait(r"pictures/page\\ one\.png$")
    attached = f"attached to the next message: {demo / 'document.png'}, {folder / 'page one.png'}"
    assert "".join(terminal.enter("")).endswith(attached)


def test_the_history_is_the_users_alone(chat, tmp_path):
    first = chat()
    first.press(b"/system a\xff\r")  # no character
    first.prompt()
    assert first.lines[-2] == 'a new conversation, system message: "a?"'
    first.enter("/system Be brief.")
    first.press("\x04")
    first.end()
    (history,) = (tmp_path / "state").rglob("chat_history")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    second = chat()
    second.press("\x1b[A")
    second.wait(r"\n> /system Be brief\.$")


def test_without_a_place_for_the_history(chat, tmp_path):
    (tmp_path / "state").write_text("no folder")
    assert chat().enter("/system") == ["no system message"]


def test_progress_is_shown_and_goes_away(chat, demo):
    terminal = chat("--image", demo / "document.png", "-p", "Read line 2.")
    assert b"loading the model: " in terminal.shown
    assert b"reading: " in terminal.shown
    assert b" tokens, " in terminal.shown
    assert terminal.lines[2:] == ["VOLT 89537", ">"]


def test_a_dumb_terminal(chat, demo):
    terminal = chat("--image", demo / "document.png", term="dumb")
    terminal.press("Read line 2.\r")
    terminal.wait("VOLT 89537\n>$")
    assert b"\x1b" not in terminal.shown
    terminal.press("\x04")
    assert terminal.end() == 0


def test_an_overflow_says_what_helps(chat, tiny):
    terminal = chat("-n", 200, "-c", 300, model=(tiny.text, tiny.mmproj))
    terminal.press("Tell me all.\r")
    terminal.wait(r"(?s)ended at 200 tokens: -n sets.*\n>$")
    terminal.press("word " * 24 + "\r")
    terminal.wait("(?s)/clear begins a new conversation.*\n>$")
    terminal.press("/clear\r")
    terminal.wait("\na new conversation\n>$")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nü€😀", "a\tb\nü€😀"),
        ("\x1b]0;title\x07", "\ufffd]0;title\ufffd"),
        ("\x9b1m\r\x00", "\ufffd1m\ufffd\ufffd"),
    ],
)
def test_answers_do_nothing_to_the_terminal(text, shown):
    assert printable(text) == shown
