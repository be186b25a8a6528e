"""What was read once is asked about again and again, and gives what a request of its own gives."""

import gc
import hashlib
import os
import weakref

import numpy as np
import pytest
from PIL import Image
from support import tiny_models
from support.gguf_random import Spec, write_model

from edge_shiftkv import (
    METHODS,
    CancelledError,
    ClosedError,
    DraftOptions,
    ImageError,
    PromptError,
    Runtime,
    SessionError,
    SettingError,
    ShiftKVError,
)
from edge_shiftkv.native.mtmd import Projector
from edge_shiftkv.sampling import Sampler

QUESTIONS = ["What is on the picture? " * 3, "And where?", "x", "What is on the table, then? " * 9]
N = 12


@pytest.fixture
def encodes(monkeypatch):
    """Grows by one with each picture that is encoded."""
    seen = []
    encode = Projector.encode
    monkeypatch.setattr(Projector, "encode", lambda self, chunk: (seen.append(chunk), encode(self, chunk)))
    return seen


BUDGETS = [(None, None), (24, "mixed"), (24, "snapkv"), (0.5, "keydiff"), (24, "expected-attention")]


@pytest.mark.parametrize(("budget", "method"), BUDGETS)
@pytest.mark.parametrize("kind", ["llava", "tiled", "qwen", "text"])
def test_each_question_is_answered_as_if_it_were_the_first(tiny, kind, budget, method, encodes):
    model, mmproj = {
        "llava": (tiny.text, tiny.mmproj),
        "tiled": (tiny.text, tiny.tiled_mmproj),
        "qwen": (tiny.qwen_text, tiny.qwen_mmproj),
        "text": (tiny.text, None),
    }[kind]
    images = [tiny.picture] if mmproj else []
    text = "" if mmproj else "A table stands in a room. " * 8
    with Runtime(model, mmproj, n_threads=1, kv_budget=budget, kv_method=method) as runtime:
        asked = [f"{text}\n{question}" if text else question for question in QUESTIONS]
        expected = [runtime.generate(question, images, max_tokens=N) for question in asked]
        encodes.clear()
        with runtime.session(text, images) as page:
            n_encoded = len(encodes)
            for _ in range(2):
                for question, fresh in zip(QUESTIONS, expected, strict=True):
                    answer = page.ask(question, max_tokens=N)
                    assert answer.text == fresh.text
                    assert answer.figures.prompt_tokens == fresh.figures.prompt_tokens
                    assert answer.figures.kept_tokens == fresh.figures.kept_tokens
                    if fresh.selection:
                        for layer in fresh.selection.layers:
                            mine, theirs = answer.selection.kept(layer, 0), fresh.selection.kept(layer, 0)
                            assert len({*mine.tolist()} - {*theirs.tolist()}) <= 2  # rounding of other batches
            if method in (None, "mixed", "keydiff"):  # the others look at queries of the picture
                assert len(encodes) == n_encoded


def test_only_the_question_is_read(tiny, n_read):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24) as runtime:
        with runtime.session(images=[tiny.picture], system="Be brief. " * 9) as page:
            (n_page,) = n_read
            for question in QUESTIONS:
                answer = page.ask(question, max_tokens=2)
                assert n_read[-1] <= answer.figures.prompt_tokens - n_page + 8  # the window of "mixed"
        assert n_page > 80


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("budget", [None, 24])
def test_a_reply_goes_on_in_the_cache_of_the_answer(tiny, budget, cut, n_read):
    """It is what the model makes of all that was said, in a cache that was not read again."""
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=budget) as runtime:  # noqa: SIM117
        with runtime.session(images=[tiny.picture]) as page:
            if cut:
                page.cut(20)
            first = page.ask(QUESTIONS[0], max_tokens=N)
            n_before = len(n_read)
            second = page.reply("Why?", max_tokens=N)
            assert n_read[n_before] < 40
            assert second.figures.prompt_tokens > first.figures.prompt_tokens + N / 2
            third = page.reply("Since when?", max_tokens=N)
            assert third.figures.prompt_tokens > second.figures.prompt_tokens
            again = [page.ask(QUESTIONS[0], max_tokens=N), page.reply("Why?", max_tokens=N)]
            assert [answer.text for answer in again] == [first.text, second.text]
            if budget is None and not cut:
                messages = [
                    {"role": "user", "content": [picture(tiny), {"type": "text", "text": QUESTIONS[0]}]},
                    {"role": "assistant", "content": first.text},
                    {"role": "user", "content": "Why?"},
                ]
                whole = runtime.create_chat_completion(messages, max_tokens=N)
                assert whole["choices"][0]["message"]["content"] == second.text
            else:
                assert second.figures.kept_tokens < second.figures.prompt_tokens


def picture(tiny):
    return {"type": "image_url", "image_url": {"url": str(tiny.picture)}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of four pictures of noise."""
    paths = [tmp_path_factory.mktemp("pictures") / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i + 1).integers(0, 256, (90, 150, 3), dtype=np.uint8)).save(path)
    return paths


def turns(pictures, texts):
    """The user's messages, each with a picture or none."""
    return [
        {
            "role": "user",
            "content": [
                *([{"type": "image_url", "image_url": {"url": str(picture)}}] if picture else []),
                {"type": "text", "text": text},
            ],
        }
        for picture, text in zip(pictures, texts, strict=True)
    ]


KINDS = {"llava": ("text", "mmproj"), "tiled": ("text", "tiled_mmproj"), "qwen": ("qwen_text", "qwen_mmproj")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_with_pictures(tiny, kind, pictures, encodes):
    """Uncut, it is what the model makes of the whole conversation; each picture is read once."""
    model, mmproj = (getattr(tiny, name) for name in KINDS[kind])
    places = [pictures[0], pictures[1], None, pictures[2], None]
    texts = [QUESTIONS[0], "And on this one? " * 3, "Why?", "Compare them.", "Since when?"]
    with Runtime(model, mmproj, n_threads=1, n_ctx=4096, image_cache=0) as runtime:
        messages, expected = [], []
        for message in turns(places, texts):
            messages.append(message)
            answer = runtime.create_chat_completion(messages, max_tokens=N)["choices"][0]["message"]["content"]
            messages.append({"role": "assistant", "content": answer})
            expected.append(answer)
        encodes.clear()
        with runtime.session(images=places[:1]) as page:
            answers = [page.ask(texts[0], max_tokens=N).text]
            for picture, text in zip(places[1:], texts[1:], strict=True):
                answers.append(page.reply(text, [picture] if picture else [], max_tokens=N).text)
            assert answers == expected
            n_tiles = 5 if kind == "tiled" else 1
            assert len(encodes) == 3 * n_tiles
            assert page.ask(texts[0], max_tokens=N).text == expected[0]
            assert page.reply(texts[1], [pictures[1]], max_tokens=N).text == expected[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("about", ["picture", "cut", "loaded", "nothing"])
def test_a_conversation_over_many_pictures_stays_small(tiny, kind, about, pictures, encodes, tmp_path):
    """Each reply's prompt is cut once, to the budget, beside what was there."""
    model, mmproj = (getattr(tiny, name) for name in KINDS[kind])
    with Runtime(model, mmproj, n_threads=1, kv_budget=24, n_ctx=500) as runtime:
        if about == "loaded":
            with runtime.session(images=[tiny.picture]) as page:
                page.cut(20)
                page.save(tmp_path / "page.kv")
            page = runtime.load_session(tmp_path / "page.kv")
        else:
            page = runtime.session(images=[] if about == "nothing" else [tiny.picture])
        with page:
            if about == "cut":
                page.cut(20)
            last = page.ask("What is it?", max_tokens=N).figures
            encodes.clear()
            for i, picture in enumerate([*pictures, pictures[0]]):
                answer = page.reply(f"Picture {i}?", [picture], max_tokens=N)
                # The answer's last token is not in the cache: it is read with the reply.
                held = last.kept_tokens + last.generated_tokens - 1
                assert answer.figures.kept_tokens == held + 24
                assert answer.selection.n_kept == held + 24
                assert answer.figures.image_tokens > last.image_tokens
                last = answer.figures
            last = page.reply("Why?", max_tokens=N).figures
            assert last.kept_tokens < held + 24 + 60
            assert last.prompt_tokens - last.kept_tokens > 4 * 24
            assert len(encodes) == (20 if kind == "tiled" else 4)  # the others are known


def test_a_cut_of_a_reply_that_keeps_nearly_all(tiny, pictures):
    """Only pairs that tell least are gone: it goes on at the right positions, from the right pairs."""
    texts = [QUESTIONS[0], "And on this one? " * 3, "Compare them."]
    answers = []
    with Runtime(tiny.qwen_text, tiny.qwen_mmproj, n_threads=1, kv_method="keydiff", n_ctx=4096) as runtime:
        for budget in (None, 0.99):
            with runtime.session(images=pictures[:1]) as page:
                page.ask(texts[0], max_tokens=2)
                for picture, text in zip(pictures[1:3], texts[1:], strict=True):
                    answers.append(page.reply(text, [picture], max_tokens=2, kv_budget=budget).text)
    assert answers[:2] == answers[2:]


def test_what_a_reply_kept(tiny, pictures):
    """Positions in the selection are places in the cache; StreamingLLM's are known without looking."""
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24, kv_method="streamingllm") as runtime:
        with runtime.session(images=[tiny.picture]) as page:
            page.ask(QUESTIONS[0], max_tokens=N)
            answer = page.reply("And this?", pictures[1:3], max_tokens=N)
        selection = answer.selection
        n_sink = METHODS["streamingllm"].n_sink
        kept = [*range(n_sink), *range(selection.n_prompt - selection.n_kept + n_sink, selection.n_prompt)]
        assert {tuple(selection.kept(layer, 0)) for layer in selection.layers} == {tuple(kept)}
        first, second = selection.image_spans
        assert (first.image, second.image) == (0, 1)
        assert first.stop - first.start == second.stop - second.start == 16
        assert first.stop == second.start
        with Runtime(tiny.text, n_threads=1) as plain:
            n_after = plain.generate("And this?", max_tokens=1).figures.prompt_tokens
            n_empty = plain.generate("x", max_tokens=1).figures.prompt_tokens
        assert 0 <= selection.n_prompt - second.stop - (n_after - n_empty) < n_empty
        assert selection.image_counts(1).sum() > 0


def test_a_reply_with_a_picture_that_cannot_be_read(tiny, pictures, tmp_path):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24) as runtime:  # noqa: SIM117
        with runtime.session(images=[tiny.picture]) as page:
            page.ask(QUESTIONS[0], max_tokens=N)
            first = page.reply("And this?", [pictures[0]], max_tokens=N)
            with pytest.raises(ImageError, match=r"none\.png"):
                page.reply("And this?", [tmp_path / "none.png"])
            assert page.reply("Why?", max_tokens=N).figures.prompt_tokens > first.figures.prompt_tokens
            stream = page.stream_reply("And this?", [pictures[1]], max_tokens=N)
            next(stream)
            stream.cancel()
            with pytest.raises(CancelledError):
                next(stream)
            answer = page.reply("And this?", [pictures[1]], max_tokens=N)  # all of it is read again
            assert answer.figures.generated_tokens == N
            assert answer.figures.image_tokens == 3 * 16


def test_an_empty_session(tiny):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1) as runtime, runtime.session() as chat:
        assert chat.ask(QUESTIONS[0], max_tokens=N).text == runtime.generate(QUESTIONS[0], max_tokens=N).text
        assert chat.reply("Why?", max_tokens=N).figures.generated_tokens == N


def test_the_same_question_twice_gives_the_same_bits(tiny, monkeypatch):
    """Also right after itself, when nearly all of it is still there."""
    seen = []
    sample = Sampler.sample
    monkeypatch.setattr(
        Sampler,
        "sample",
        lambda self, outputs, output=-1: (
            seen.append(outputs.logits(output).tobytes()),
            sample(self, outputs, output),
        )[1],
    )
    with Runtime(tiny.text, tiny.mmproj, n_threads=1) as runtime, runtime.session(images=[tiny.picture]) as page:
        for question in (QUESTIONS[0], QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]):
            page.ask(question, max_tokens=1)
    assert seen[0] == seen[1] == seen[3] != seen[2]


def test_a_reply_after_an_answer_that_failed_starts_from_the_page(tiny, monkeypatch):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24) as runtime:
        with runtime.session(images=[tiny.picture]) as page:
            page.ask(QUESTIONS[0], max_tokens=N)
            stream = page.stream(QUESTIONS[1], max_tokens=N)
            next(stream)
            stream.cancel()
            with pytest.raises(CancelledError):
                next(stream)
            assert page.reply("Why?", max_tokens=N).figures.generated_tokens == N
        with runtime.session(images=[tiny.picture]) as page, pytest.raises(PromptError, match="ask first"):
            page.reply("Why?")


def test_budgets_methods_and_drafts_per_question(tiny):
    options = DraftOptions(n_draft=4)
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, draft=tiny.text, draft_options=options) as runtime:
        drafting, runtime.drafting = runtime.drafting, None
        expected = {}
        for budget, method in ((24, "mixed"), (40, "snapkv"), (None, None)):
            runtime.kv_budget, runtime.kv_method = budget, method
            expected[budget, method] = runtime.generate(QUESTIONS[0], [tiny.picture], max_tokens=N).text
        runtime.kv_budget = None
        with runtime.session(images=[tiny.picture]) as page:
            for drafts in (None, drafting):
                runtime.drafting = drafts
                for (budget, method), text in expected.items():
                    answer = page.ask(QUESTIONS[0], max_tokens=N, kv_budget=budget, kv_method=method)
                    assert answer.text == text
                    assert (answer.figures.draft is not None) == (drafts is not None)
                    assert drafts is None or answer.figures.draft.drafted > 0
                    page.reply("Why?", max_tokens=N)


@pytest.mark.parametrize("text", [0, 1, 3])
def test_a_cut_session_forks_what_was_kept(tiny, encodes, text):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24) as runtime:
        with runtime.session(images=[tiny.picture], system="Be brief. " * 9) as page:
            before = runtime.generate(QUESTIONS[0], [tiny.picture], max_tokens=1)
            for question in QUESTIONS[:text]:
                page.ask(question, max_tokens=3)
            encodes.clear()
            page.cut(30)
            assert page.selection.n_kept == 30 < page.selection.n_prompt
            answers = [page.ask(question, max_tokens=N).text for question in QUESTIONS]
            assert [page.ask(question, max_tokens=N).text for question in QUESTIONS] == answers
            assert len(set(answers)) == len(QUESTIONS)
            figures = page.ask(QUESTIONS[1], max_tokens=2).figures
            assert figures.kept_tokens == figures.prompt_tokens - page.selection.n_prompt + 30
            assert encodes == []
            with pytest.raises(ShiftKVError, match="was cut already"):
                page.cut(20)
            with pytest.raises(SettingError, match="was cut already"):
                page.ask("x", kv_budget=10)
        assert before.figures.prompt_tokens


def test_a_cut_that_keeps_nearly_all_answers_as_the_whole(tiny):
    """Only the pair that tells least is gone; the answers go on at the right positions, from the right pairs."""
    with Runtime(tiny.qwen_text, tiny.qwen_mmproj, n_threads=1, kv_method="keydiff") as runtime:
        with runtime.session(images=[tiny.picture], system="Be brief. " * 9) as page:
            whole = [page.ask(question, max_tokens=4).text for question in QUESTIONS]
            n = page.ask("x", max_tokens=1).figures.prompt_tokens
        with runtime.session(images=[tiny.picture], system="Be brief. " * 9) as page:
            page.cut(0.99)
            assert page.selection.n_prompt - page.selection.n_kept == 1
            assert page.selection.n_prompt < n
            cut = [page.ask(question, max_tokens=4).text for question in QUESTIONS]
    assert sum(a == b for a, b in zip(whole, cut, strict=True)) >= 3


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("budget", [None, 40])
def test_sliding_windows(tmp_path, budget, cut):
    """Windows forget what questions before the last one saw: it is read, or loaded, again."""
    model = write_model(Spec("gemma3", n_layer=6, meta={"attention.sliding_window": 32}), tmp_path)
    text = "the quick brown fox jumps over the lazy dog " * 8
    with Runtime(model, n_threads=1, kv_budget=budget) as runtime, runtime.session(text) as page:
        if cut:
            page.cut(60)
        first = [page.ask(question, max_tokens=60).text for question in QUESTIONS]
        assert [page.ask(question, max_tokens=60).text for question in QUESTIONS] == first
        if not cut:
            fresh = [runtime.generate(f"{text}\n{question}", max_tokens=60).text for question in QUESTIONS]
            assert first == fresh


def test_a_model_that_cannot_be_cut_has_sessions_too(tmp_path):
    meta = {"ssm.inner_size": 256, "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.time_step_rank": 4}
    with Runtime(write_model(Spec("mamba", meta=meta), tmp_path), n_threads=1) as runtime:
        fresh = runtime.generate(f"A room.\n{QUESTIONS[0]}", max_tokens=N).text
        with runtime.session("A room.") as page:
            assert [page.ask(QUESTIONS[0], max_tokens=N).text for _ in range(2)] == [fresh, fresh]
            assert page.reply("Why?", max_tokens=N).figures.generated_tokens
            with pytest.raises(ShiftKVError, match="the KV selection failed"):
                page.cut(8)


def test_an_answer_longer_than_there_was_room_for(tiny, encodes):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, n_ctx=4096) as runtime:
        expected = runtime.generate(QUESTIONS[0], [tiny.picture], max_tokens=1500).text
        for cut in (False, True):
            with runtime.session(images=[tiny.picture]) as page:
                if cut:
                    page.cut(20)
                short = page.ask(QUESTIONS[0], max_tokens=N).text
                long = page.ask(QUESTIONS[0], max_tokens=1500)
                assert long.figures.generated_tokens == 1500
                assert long.text.startswith(short)
                assert cut or long.text == expected
                assert page.reply("Why?", max_tokens=N).figures.prompt_tokens > 1500
                assert page.ask(QUESTIONS[0], max_tokens=N).text == short


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", ["llava", "qwen", "gemma3"])
def test_files(tiny, tmp_path, kind, cut, encodes):
    path = tmp_path / "page.kv"
    if kind == "gemma3":
        files = (write_model(Spec("gemma3", n_layer=6, meta={"attention.sliding_window": 32}), tmp_path),)
        about = {"text": "the quick brown fox " * 20}
    else:
        files = (tiny.text, tiny.mmproj) if kind == "llava" else (tiny.qwen_text, tiny.qwen_mmproj)
        about = {"images": [tiny.picture], "system": "Be brief. " * 9}
    with Runtime(*files, n_threads=1) as runtime, runtime.session(**about) as page:
        page.ask(QUESTIONS[1], max_tokens=3)
        if cut:
            page.cut(40)
        expected = [page.ask(question, max_tokens=N).text for question in QUESTIONS]
        reply = page.reply("Why?", max_tokens=N).text
        page.save(path)
        assert [page.ask(question, max_tokens=N).text for question in QUESTIONS] == expected
    encodes.clear()
    with Runtime(*files, n_threads=1, kv_budget=24) as runtime, runtime.load_session(path) as page:
        for _ in range(2):
            assert [page.ask(question, max_tokens=N).text for question in QUESTIONS] == expected
            assert page.reply("Why?", max_tokens=N).text == reply
        assert encodes == []
        with pytest.raises(ShiftKVError, match=r"cut already|came from a file"):
            page.cut(20)
        if not cut:
            with pytest.raises(SettingError, match="came from a file"):
                page.ask("x", kv_budget=24)
        again = tmp_path / "again.kv"
        page.save(again)
        assert again.read_bytes() == path.read_bytes()


def test_the_size_of_a_file(demo, tmp_path):
    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf") as runtime:
        with runtime.session(images=[demo / "document.png"]) as page:
            page.cut(128)
            page.save(tmp_path / "page.kv")
        runtime.kv_budget = 128
        pairs = runtime.generate("Read line 1.", [demo / "document.png"], max_tokens=1).figures.kv_bytes_kept
    assert pairs < (tmp_path / "page.kv").stat().st_size < 1.05 * pairs


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny):
    path = tmp_path_factory.mktemp("saved") / "page.kv"
    with Runtime(tiny.text, tiny.mmproj, n_threads=1) as runtime, runtime.session(images=[tiny.picture]) as page:
        page.cut(20)
        page.save(path)
    return path


def sealed(body):
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "incomplete or was altered"),
        (lambda data: data[: len(data) // 2], "incomplete or was altered"),
        (lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "incomplete or was altered"),
        (lambda data: data + b"x", "incomplete or was altered"),
        (lambda data: b"", "not a session file"),
        (lambda data: b"GGUF" + data, "not a session file"),
        (lambda data: data.replace(b"session 1\n", b"session 2\n", 1), "of another version"),
        (lambda data: sealed(data[:-40]), "could not be loaded"),
        (lambda data: sealed(data.split(b"\n")[0] + b"\n{}\n"), "damaged"),
        (lambda data: sealed(data.split(b"\n")[0] + b"\nx\n"), "damaged"),
    ],
)
def test_files_that_are_refused(tiny, saved, tmp_path, change, message):
    path = tmp_path / "changed.kv"
    path.write_bytes(change(saved.read_bytes()))
    with Runtime(tiny.text, tiny.mmproj, n_threads=1) as runtime:
        with pytest.raises(SessionError, match=message):
            runtime.load_session(path)
        with runtime.load_session(saved) as page:
            assert page.ask("x", max_tokens=2).text


def test_files_of_others_are_refused(tiny, saved, tmp_path):
    other = tiny_models.write_text_model(tmp_path / "other.gguf", template="{{ messages[0]['content'] }}")
    projector = tiny_models.write_mmproj(tmp_path / "mmproj.gguf", n_patches=5)
    for files, options, what in (
        ((other, tiny.mmproj), {}, "another model"),
        ((tiny.text, projector), {}, "another mmproj"),
        ((tiny.text,), {}, "another mmproj"),
        ((tiny.text, tiny.mmproj), {"type_k": "bf16"}, r"another type of keys \(type_k\)"),
    ):
        with Runtime(*files, n_threads=1, **options) as runtime, pytest.raises(SessionError, match=what):
            runtime.load_session(saved)
    with Runtime(tiny.text, n_threads=1) as runtime, pytest.raises(SessionError, match="No such file"):
        runtime.load_session(tmp_path / "missing.kv")


def test_a_file_that_cannot_be_written_leaves_the_one_before(tiny, saved, tmp_path, monkeypatch):
    path = tmp_path / "page.kv"
    with Runtime(tiny.text, tiny.mmproj, n_threads=1) as runtime, runtime.session(images=[tiny.picture]) as page:
        page.save(path)
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(SessionError, match="No space left"):
                page.save(path)
        with pytest.raises(SessionError, match="No such file"):
            page.save(tmp_path / "missing" / "page.kv")
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == before
        assert page.ask("x", max_tokens=2).text


def test_what_is_wrong_is_said(tiny):
    runtime = Runtime(tiny.text, tiny.mmproj, n_threads=1, n_ctx=200)
    with pytest.raises(PromptError, match="leaves no room"):
        runtime.session("word " * 300)
    page = runtime.session(images=[tiny.picture])
    for budget in (1, 0.0, 1.5, True):
        with pytest.raises(SettingError, match="kv_budget is"):
            page.cut(budget)
    with pytest.raises(SettingError, match="no budget"):
        page.cut()
    with pytest.raises(SettingError, match="what was read has only"):
        page.cut(1000)
    assert page.ask("x", max_tokens=2).text
    with runtime.session(images=[tiny.picture]) as other:
        pass
    with pytest.raises(ClosedError, match="the session is closed"):
        other.ask("x")
    runtime.close()
    with pytest.raises(ClosedError, match="closed"):
        page.ask("x")


@pytest.mark.parametrize("budget", [None, 24])
def test_another_answer_in_place_of_the_last(tiny, budget):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=budget) as runtime:  # noqa: SIM117
        with runtime.session(images=[tiny.picture]) as page:
            with pytest.raises(PromptError, match="ask first"):
                page.stream_again()
            first = page.ask(QUESTIONS[0], max_tokens=N)
            assert "".join(page.stream_again(max_tokens=N)) == first.text
            second = page.reply("Why?", max_tokens=N)
            assert "".join(page.stream_again(max_tokens=N)) == second.text
            warm = "".join(page.stream_again(max_tokens=N, temperature=1.5, seed=1))
            assert warm != second.text
            third = page.reply("Since when?", max_tokens=N)
            assert third.figures.prompt_tokens > second.figures.prompt_tokens + len(warm)
            fourth = page.reply("And here?", [tiny.picture], max_tokens=N)
            again = page.stream_again(max_tokens=N)
            for _ in again:
                pass
            assert again.completion.figures.prompt_tokens == fourth.figures.prompt_tokens
            messages = [
                {"role": "user", "content": [picture(tiny), {"type": "text", "text": QUESTIONS[0]}]},
                {"role": "assistant", "content": first.text},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": warm},
                {"role": "user", "content": "Since when?"},
            ]
            whole = runtime.create_chat_completion(messages, max_tokens=N)
            assert whole["usage"]["prompt_tokens"] == third.figures.prompt_tokens
            if budget is None:
                assert whole["choices"][0]["message"]["content"] == third.text
            assert page.kv_bytes > 2 * first.figures.kv_bytes_prompt


def test_two_sessions_beside_each_other(tiny):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24) as runtime:
        expected = [runtime.generate(question, [tiny.picture], max_tokens=N).text for question in QUESTIONS]
        other = [runtime.generate(f"A room.\n{question}", max_tokens=N).text for question in QUESTIONS]
        with runtime.session(images=[tiny.picture]) as a, runtime.session("A room.") as b:
            for question, of_a, of_b in zip(QUESTIONS, expected, other, strict=True):
                assert a.ask(question, max_tokens=N).text == of_a
                assert b.ask(question, max_tokens=N).text == of_b
                assert runtime.generate(question, [tiny.picture], max_tokens=N).text == of_a


def test_a_session_that_is_dropped_is_freed(tiny):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24) as runtime:
        page = runtime.session(images=[tiny.picture])
        page.ask("x", max_tokens=2)
        gone = weakref.ref(page)
        del page
        gc.collect()
        assert gone() is None
