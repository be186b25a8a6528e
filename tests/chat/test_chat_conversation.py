"""What a chat keeps, forgets and asks for, without a terminal."""

from contextlib import closing

import pytest

from edge_shiftkv import ImageError, PromptError, Runtime, SessionError, SettingError
from edge_shiftkv.chat.conversation import Chat
from edge_shiftkv.prompts.images import load_image
from edge_shiftkv.selection.heatmap import heatmap
from edge_shiftkv.session import Session

N = 12
FIRST, SECOND, THIRD = "What is on the picture? " * 3, "Why?", "Since when?"


@pytest.fixture
def chat(tiny):
    """A function: settings of a runtime, and options, to a chat with it."""
    opened = []

    def begin(options=(), **settings):
        runtime = Runtime(tiny.text, tiny.mmproj, n_threads=1, **settings)
        opened.append(runtime)
        return Chat(runtime, {"max_tokens": N, **dict(options)}, load_image)

    yield begin
    for runtime in opened:
        runtime.close()


def say(chat, text):
    return "".join(chat.ask(text))


def stop(chat, text, n=3):
    """Take n pieces of an answer, and no more."""
    with closing(chat.ask(text)) as pieces:
        return "".join(next(pieces) for _ in range(n))


def test_the_model_knows_what_was_said(chat, tiny):
    talk = chat()
    talk.system = "Be brief."
    talk.attach([str(tiny.picture)])
    messages = [{"role": "system", "content": "Be brief."}]
    picture = {"type": "image_url", "image_url": {"url": str(tiny.picture)}}
    for text, images in ((FIRST, [picture]), (SECOND, []), (THIRD, [picture])):
        if images and talk.turns:
            talk.attach([str(tiny.picture)])
        answer = say(talk, text)
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": text}]})
        whole = talk.runtime.create_chat_completion(messages, max_tokens=N)
        assert answer == whole["choices"][0]["message"]["content"]
        assert talk.n_tokens == whole["usage"]["total_tokens"]
        messages.append({"role": "assistant", "content": answer})
        assert talk.attached == []


@pytest.mark.parametrize("budget", [None, 24])
def test_a_stopped_message_is_forgotten(chat, tiny, budget):
    talk, other = chat(kv_budget=budget), chat(kv_budget=budget)
    talk.attach([str(tiny.picture)])
    assert stop(talk, "Tell me all.")
    assert [picture.name for picture in talk.attached] == [str(tiny.picture)]
    other.attach([str(tiny.picture)])
    assert say(talk, FIRST) == say(other, FIRST)
    talk.attach([str(tiny.picture)])
    stop(talk, "Tell me all.")
    assert (len(talk.turns), len(talk.attached), talk.unfinished) == (1, 1, "Tell me all.")
    talk.attached = []
    say(talk, SECOND)
    say(other, SECOND)
    mine, others = (chat.turns[-1].answer.figures for chat in (talk, other))
    assert mine.prompt_tokens == others.prompt_tokens


def test_a_picture_of_a_stopped_message_may_be_left_out(chat, tiny):
    talk = chat()
    fresh = say(talk, FIRST)
    talk.clear()
    talk.attach([str(tiny.picture)])
    stop(talk, FIRST)
    talk.attached = []
    assert say(talk, FIRST) == fresh


def test_again(chat, tiny):
    talk = chat()
    with pytest.raises(PromptError, match="no message to answer"):
        next(talk.again())
    beginning = stop(talk, FIRST)
    whole = "".join(talk.again())
    assert whole.startswith(beginning)
    assert talk.repeats
    assert "".join(talk.again()) == whole
    second = say(talk, SECOND)
    talk.attach([str(tiny.picture)])
    assert "".join(talk.again()) == second
    assert [turn.text for turn in talk.turns] == [FIRST, SECOND]
    assert len(talk.attached) == 1  # for the next message


def test_again_with_another_budget(chat, tiny):
    talk = chat()
    talk.attach([str(tiny.picture)])
    say(talk, FIRST)
    talk.set_budget(30)
    assert not talk.repeats
    for _ in talk.again():
        pass
    assert talk.turns[-1].answer.figures.kept_tokens == talk.selection.n_kept == 30
    assert talk.repeats


def test_again_draws_anew(chat, monkeypatch):
    talk, other = (chat({"temperature": 1.5, "seed": 3, "top_k": 0, "min_p": 0.0}) for _ in range(2))
    answers = [say(talk, FIRST), "".join(talk.again()), "".join(talk.again())]
    assert len(set(answers)) == 3
    assert not talk.repeats
    assert [say(other, FIRST), "".join(other.again())] == answers[:2]
    seeds = []
    reply = Session.stream_reply
    monkeypatch.setattr(Session, "stream_reply", lambda *a, **b: (seeds.append(b["seed"]), reply(*a, **b))[1])
    say(talk, SECOND)
    assert seeds == [3]


def test_a_budget_holds_for_what_is_read_from_then_on(chat, tiny):
    talk = chat()
    talk.attach([str(tiny.picture)])
    say(talk, FIRST)
    assert talk.selection is None
    talk.set_budget(24)
    talk.set_method("keydiff")
    talk.attach([str(tiny.picture)])
    say(talk, SECOND)
    before, figures = talk.turns[0].answer.figures, talk.turns[-1].answer.figures
    assert figures.kept_tokens == before.prompt_tokens + before.generated_tokens - 1 + 24
    assert len(talk.pictures) == 2
    talk.set_budget(20)
    other = tiny.picture.with_name("other.png")
    load_image(tiny.picture).rotate(90).save(other)
    talk.attach([str(other)])
    say(talk, THIRD)
    assert talk.turns[-1].answer.figures.kept_tokens == figures.kept_tokens + figures.generated_tokens - 1 + 20
    assert [picture.name for picture in talk.pictures] == [str(other)]
    heatmap(talk.selection, [picture.image for picture in talk.pictures])
    for budget in (1, 0.0, 1.5):
        with pytest.raises(SettingError, match="kv_budget is"):
            talk.set_budget(budget)
    with pytest.raises(SettingError, match="not known"):
        talk.set_method("nothing")
    assert talk.runtime.kv_budget == 20


def test_files(chat, tiny, tmp_path):
    path = tmp_path / "page.kv"
    talk = chat()
    with pytest.raises(SessionError, match="nothing to save"):
        talk.save(path)
    talk.system = "Be brief."
    talk.attach([str(tiny.picture)])
    first, second = say(talk, FIRST), say(talk, SECOND)
    talk.save(path)
    talk.save(path)
    third = say(talk, THIRD)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SessionError, match="another file of that name"):
        talk.save(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(SessionError, match="not a session file"):
        talk.load(tmp_path / "notes.txt")
    assert len(talk.turns) == 3
    talk.set_budget(24)  # for what is read: nothing is
    talk.load(path)
    assert (talk.system, talk.turns, talk.is_loaded) == ("Be brief.", [], True)
    assert [say(talk, text) for text in (FIRST, SECOND, THIRD)] == [first, second, third]
    assert "".join(talk.again()) == third
    talk.set_budget(None)
    talk.clear()
    talk.attach([str(tiny.picture)])
    assert say(talk, FIRST) == first
    talk.load(path)
    talk.attach([str(tiny.picture)])
    with pytest.raises(PromptError, match="first ask about what was loaded"):
        say(talk, FIRST)
    attached, talk.attached = talk.attached, []
    assert say(talk, FIRST) == first
    talk.attached = attached
    n = talk.n_tokens
    say(talk, SECOND)
    assert talk.n_tokens > n + 16  # the further picture's


def test_clear(chat, tiny):
    talk = chat(kv_budget=24)
    talk.system = "Be brief."
    fresh = say(talk, SECOND)
    talk.attach([str(tiny.picture)])
    say(talk, FIRST)
    stop(talk, THIRD)
    talk.attach([str(tiny.picture)])
    talk.clear()
    assert (talk.turns, talk.attached, talk.pictures, talk.unfinished) == ([], [], [], "")
    assert (talk.kv_bytes, talk.n_tokens, talk.system) == (None, 0, "Be brief.")
    assert say(talk, SECOND) == fresh


def test_pictures_are_attached_all_or_none(chat, tiny):
    talk = chat()
    with pytest.raises(ImageError):
        talk.attach([str(tiny.picture), "none.png"])
    assert talk.attached == []
