"""Sessions over HTTP."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.server import answer, error, serving

from edge_shiftkv import ImageError, Runtime, SettingError
from edge_shiftkv.request import Options
from edge_shiftkv.server import app as app_module
from edge_shiftkv.server import sessions as sessions_module
from edge_shiftkv.server.app import create_app
from edge_shiftkv.server.errors import ApiError
from edge_shiftkv.server.queue import Queue
from edge_shiftkv.server.sessions import Sessions
from edge_shiftkv.server.settings import Settings
from edge_shiftkv.session import Session

SESSIONS = "/v1/sessions"


@pytest.fixture(scope="module")
def server(demo):
    model = ["-m", demo / "demo-text-q8_0.gguf", "--mmproj", demo / "demo-mmproj-f16.gguf"]
    with serving(*model, "--sessions", "2", "--max-tokens", "40", "--image-root", demo) as server:
        yield server


@pytest.fixture(scope="module")
def own(demo):
    """The answers of a runtime without a server."""
    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", n_threads=1) as runtime:

        def answered(question, **options):
            with runtime.session(images=[demo / "document.png"]) as session:
                return session.ask(question, **options)

        yield answered


def data_url(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def got(connection):
    status, _, body = answer(connection)
    assert status == 200, body
    return json.loads(body)


@pytest.fixture
def opened(server, demo):
    """A session about the document; with its address."""
    session = got(server.send({"images": [data_url(demo / "document.png")]}, SESSIONS))
    return {**session, "path": f"{SESSIONS}/{session['id']}"}


def counts_of(selection):
    counts = np.zeros(selection.n_prompt, int)
    for layer in selection.layers:
        for head in range(selection.n_heads // len(selection.layers)):
            counts[selection.kept(layer, head)] += 1
    (span,) = selection.image_spans
    return counts[span.start : span.stop].reshape(span.ny, span.nx).tolist()


def test_questions_about_a_picture(server, opened, own):
    assert opened["images"] == [{"width": 224, "height": 224}]
    assert opened["kv_bytes"] > 0 < opened["read_s"]
    for question, options in (
        ("Read line 2.", {"kv_budget": 0.33}),
        ("Read line 4.", {"kv_budget": 40, "kv_method": "snapkv"}),
        ("Read line 2.", {}),
    ):
        reply = got(server.send({"question": question, **options}, f"{opened['path']}/ask"))
        expected = own(question, **options, max_tokens=40)
        assert reply["choices"][0]["message"]["content"] == expected.text != ""
        assert (reply["object"], reply["model"]) == ("chat.completion", "demo-text-q8_0")
        figures = reply["figures"]
        assert figures["kept_tokens"] == expected.figures.kept_tokens
        assert figures["kv_bytes_kept"] == expected.figures.kv_bytes_kept
        assert figures["image_encode_s"] == 0
        assert opened["prompt_tokens"] < figures["prompt_tokens"] < opened["prompt_tokens"] + 24
        if options:
            (one,) = reply["kept"].pop("maps")
            assert one == {"image": 0, "part": "picture", "padded": False, "counts": counts_of(expected.selection)}
            kept = {"prompt_tokens": figures["prompt_tokens"], "kept_tokens": figures["kept_tokens"], "heads": 8}
            assert reply["kept"] == kept
        else:
            assert reply["kept"] is None
    assert got(server.raw("DELETE", opened["path"])) == {"id": opened["id"], "object": "session", "deleted": True}
    assert error(server.raw("DELETE", opened["path"]))[1]["code"] == "session_not_found"


def test_streaming(server, opened, own):
    body = {"question": "Read everything.", "kv_budget": 0.33, "stream": True, "max_tokens": 12, "model": "any"}
    status, headers, data = answer(server.send(body, f"{opened['path']}/ask"))
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    *events, done, rest = data.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    role, *texts, last = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert role["choices"][0]["delta"] == {"role": "assistant"}
    expected = own("Read everything.", kv_budget=0.33, max_tokens=12)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in texts) == expected.text
    assert len(texts) > 3
    assert [chunk.get("kept", 0) and chunk["kept"]["maps"][0]["counts"] for chunk in (role, *texts, last)] == [
        0,
        counts_of(expected.selection),  # with the first text
        *[0] * len(texts),
    ]
    assert last["figures"]["generated_tokens"] == 12
    assert last["choices"][0]["finish_reason"] == "length"
    assert {chunk["model"] for chunk in (role, *texts, last)} == {"any"}


def test_text_and_a_schema(server):
    session = got(server.send({"text": "The sky is blue. " * 9, "system": "Be brief."}, SESSIONS))
    body = {
        "question": "Is it?",
        "kv_budget": 0.5,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}},
    }
    reply = got(server.send(body, f"{SESSIONS}/{session['id']}/ask"))
    assert json.loads(reply["choices"][0]["message"]["content"]) in ("yes", "no")
    assert reply["kept"]["maps"] == []


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({}, "invalid_prompt", "there is nothing to read"),
        ({"text": " "}, "invalid_prompt", "there is nothing to read"),
        ({"text": 1}, "invalid_value", "text is 1"),
        ({"images": "x"}, "invalid_value", "images is 'x'"),
        ({"images": [None]}, "invalid_image", "as data: URLs"),
        ({"images": ["document.png"]}, "invalid_image", "as data: URLs"),
        ({"images": ["/etc/passwd"]}, "invalid_image", "as data: URLs"),
        ({"images": ["file:///etc/passwd"]}, "invalid_image", "as data: URLs"),
        ({"images": ["http://127.0.0.1:1/a.png"]}, "invalid_image", "as data: URLs"),
        ({"images": ["data:image/png;base64,AAAA"]}, "invalid_image", "not a picture in one of the formats"),
        ({"text": "a", "kv_budget": 1}, "invalid_value", "kv_budget is 1"),
        ({"text": "a", "kv_method": "none"}, "invalid_value", "'none' is not known"),
        ({"text": "a", "time_limit": 0}, "invalid_value", "time_limit is 0"),
        ({"text": "a", "n_ctx": 1}, "invalid_value", "unknown option 'n_ctx'"),
        ({"text": "word " * 9000}, "context_length_exceeded", "leaves no room"),
    ],
)
def test_what_cannot_be_read(server, body, code, message):
    status, about = error(server.send(body, SESSIONS))
    assert (status, about["code"], about["type"]) == (400, code, "invalid_request_error")
    assert message in about["message"]


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({}, "invalid_prompt", "the question is empty"),
        ({"question": 1}, "invalid_value", "question is 1"),
        ({"question": "a", "messages": []}, "invalid_value", "a session has its own messages"),
        ({"question": "a", "kv_budget": -1}, "invalid_value", "kv_budget is -1"),
        ({"question": "a", "kv_method": "none"}, "invalid_value", "'none' is not known"),
        ({"question": "a", "stream": "yes"}, "invalid_value", "stream is 'yes'"),
        ({"question": "a", "n": 2}, "invalid_value", "n=2"),
        ({"question": "a", "self": 1}, "invalid_value", "unknown option 'self'"),
        ({"question": "word " * 9000}, "context_length_exceeded", "leaves no room"),
    ],
)
def test_what_cannot_be_asked(server, opened, body, code, message):
    status, about = error(server.send(body, f"{opened['path']}/ask"))
    assert (status, about["code"], about["type"]) == (400, code, "invalid_request_error")
    assert message in about["message"]
    assert got(server.send({"question": "Read line 2.", "max_tokens": 1}, f"{opened['path']}/ask"))["choices"]


def test_the_one_not_used_for_longest_makes_way(server):
    first, second = (got(server.send({"text": text}, SESSIONS))["id"] for text in ("One.", "Two."))
    question = {"question": "a", "max_tokens": 1}
    got(server.send(question, f"{SESSIONS}/{first}/ask"))
    third = got(server.send({"text": "Three."}, SESSIONS))["id"]
    for name, status in ((first, 200), (second, 404), (third, 200), ("none", 404)):
        assert answer(server.send(question, f"{SESSIONS}/{name}/ask"))[0] == status
    assert len({first, second, third}) == 3
    assert error(server.send({"images": ["x"]}, SESSIONS))[0] == 400  # for which none makes way
    assert answer(server.send(question, f"{SESSIONS}/{first}/ask"))[0] == 200


def test_the_models_abilities(server):
    (model,) = got(server.raw("GET", "/v1/models"))["data"]
    assert (model["images"], model["kv_budget"], model["kv_method"]) == (True, None, "mixed")
    assert model["kv_methods"][:2] == ["mixed", "paper"]


def test_only_the_question_is_read(tiny, n_read):
    settings = Settings("tiny", Options())
    picture = data_url(tiny.picture)
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24) as runtime:
        sessions = Sessions(settings)
        name = sessions.open(runtime, {"images": [picture], "text": "It is small. " * 5})["id"]
        (n_page,) = n_read
        for question in ("What is it?", "And where?"):
            (reply,) = sessions.ask(name, {"question": question, "max_tokens": 2})
            assert n_read[-1] <= reply["figures"]["prompt_tokens"] - n_page + 8  # the window of "mixed"
        assert n_page > 60


def test_pictures_have_a_limit_together(tiny, runtime, monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_PIXELS", 2 * 90 * 150)
    sessions = Sessions(Settings("tiny", Options()))
    picture = data_url(tiny.picture)
    assert len(sessions.open(runtime, {"images": [picture] * 2})["images"]) == 2
    with pytest.raises(ImageError, match="more than 0 million pixels together"):
        sessions.open(runtime, {"images": [picture] * 3})


def test_reading_has_a_time_limit(tiny, runtime):
    sessions = Sessions(Settings("tiny", Options(), time_limit=1e-9))
    for asked in ({}, {"time_limit": 1000}):
        with pytest.raises(Exception, match="its time limit of 1e-09 s"):
            sessions.open(runtime, {"images": [data_url(tiny.picture)], **asked})
    with pytest.raises(SettingError, match="time_limit is -1"):
        runtime.session("a", time_limit=-1)


def test_a_session_that_is_not_used_ends(tiny, runtime, monkeypatch):
    """Also where no other request comes."""
    closed = []
    close = Session.close
    monkeypatch.setattr(Session, "close", lambda self: (close(self), closed.append(self)))

    async def call(app, path, body, method="POST"):
        sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        received = []

        async def receive():
            return sent.pop() if sent else await asyncio.Future()

        async def send(message):
            received.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        await app({**scope, "http_version": "1.1", "scheme": "http", "server": ("localhost", 80)}, receive, send)
        return json.loads(received[1]["body"])

    async def serve():
        with Queue(runtime, 1) as queue:
            app = create_app(queue, Settings("tiny", Options(), session_idle=0.2))
            session = await call(app, SESSIONS, {"text": "A table."})
            assert not closed
            assert (await call(app, f"{SESSIONS}/{session['id']}/ask", {"question": "What?", "max_tokens": 1}))[
                "kept"
            ] is None
            for _ in range(1000):
                if closed:
                    break
                await asyncio.sleep(0.05)
            # Nothing is waited for that would come after the body.
            return [
                (await asyncio.wait_for(call(app, path, {"question": "What?"}, method), 60))["error"]["code"]
                for method, path in (("POST", f"{SESSIONS}/{session['id']}/ask"), ("DELETE", f"{SESSIONS}/a"))
            ]

    monkeypatch.setattr(app_module, "_DRAIN_S", 3600)
    assert asyncio.run(serve()) == ["session_not_found"] * 2
    assert len(closed) == 1


def test_what_is_not_used_for_long_is_closed_before_another_is_opened(runtime, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(sessions_module.time, "monotonic", lambda: now[0])
    sessions = Sessions(Settings("tiny", Options(), session_idle=60))
    one, two = (sessions.open(runtime, {"text": "A table."})["id"] for _ in range(2))
    now[0] += 59
    assert list(sessions.ask(one, {"question": "What?", "max_tokens": 1}))
    now[0] += 1
    sessions.forget()
    assert sessions.delete(one)["deleted"]
    with pytest.raises(ApiError, match="not open any more"):
        sessions.delete(two)


def test_a_stream_tells_what_was_kept_with_its_first_piece(runtime, tiny):
    with runtime.session(images=[tiny.picture]) as session:
        stream = session.stream("What is it?", max_tokens=4, kv_budget=24)
        assert stream.selection is None
        next(stream)
        kept = stream.selection
        assert kept.n_kept == 24
        list(stream)
        assert stream.completion.selection is kept
        whole = session.stream("What is it?", max_tokens=4)
        list(whole)
        assert whole.selection is None


@pytest.fixture(scope="module")
def guarded(tiny):
    page = ["--cors", "https://page.example"]
    with serving("-m", tiny.text, "--api-key", "one", *page, slowly=True) as server:
        yield server


def test_keys_and_pages(guarded):
    for method, path in (("POST", SESSIONS), ("POST", f"{SESSIONS}/a/ask"), ("DELETE", f"{SESSIONS}/a")):
        for headers in ({}, {"Authorization": "Bearer two"}):
            status, about = error(guarded.raw(method, path, b"{}", Content_Type="application/json", **headers))
            assert (status, about["code"]) == (401, "invalid_api_key")
    key = {"Authorization": "Bearer one"}
    (model,) = got(guarded.raw("GET", "/v1/models", **key))["data"]
    assert model["images"] is False
    assert answer(guarded.send({"text": "a"}, SESSIONS, **key))[0] == 200
    assert error(guarded.raw("POST", SESSIONS, b"{}", Content_Type="text/plain", **key))[0] == 415
    for method in ("POST", "DELETE"):
        headers = {"Origin": "https://page.example", "Access-Control-Request-Method": method}
        assert answer(guarded.raw("OPTIONS", f"{SESSIONS}/a", **headers))[0] == 200
        headers["Origin"] = "https://other.example"
        assert "access-control-allow-origin" not in answer(guarded.raw("OPTIONS", f"{SESSIONS}/a", **headers))[1]


def test_a_client_that_goes_away_ends_its_answer(guarded):
    key = {"Authorization": "Bearer one"}
    session = got(guarded.send({"text": "A table."}, SESSIONS, **key))
    path = f"{SESSIONS}/{session['id']}/ask"
    long = {"question": "What?", "max_tokens": 900, "logit_bias": {"258": -1000}, "stream": True}
    running = guarded.send(long, path, **key)
    data = b""
    while data.count(b"data: ") < 3:
        piece = running.recv(4096)
        assert piece, data
        data += piece
    running.close()
    guarded.holds(0)
    assert got(guarded.send({"question": "What?", "max_tokens": 2}, path, **key))["usage"]["completion_tokens"] == 2
    assert "+900 tokens" not in "\n".join(guarded.log())


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="needs curl and bash")
def test_the_example_in_the_docs(server, own):
    root = Path(__file__).parents[2]
    page = (root / "docs/howto/server.md").read_text()
    (block,) = re.findall(r"^```sh session\n(.*?)^```", page, re.M | re.S)
    assert block.count("http://127.0.0.1:8080/v1") == 3
    script = block.replace("http://127.0.0.1:8080/v1", server.url)
    done = subprocess.run(["bash", "-ec", script], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *events, deleted = [line for line in done.stdout.splitlines() if line]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == own("Read line 2.", kv_budget=96).text
    assert any(chunk.get("kept") for chunk in chunks)
    assert json.loads(deleted)["deleted"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--sessions", "0"], "--sessions is 0"), (["--session-idle", "0"], "--session-idle is 0")],
)
def test_settings_that_are_wrong(tiny, capsys, arguments, message):
    from edge_shiftkv import cli

    assert cli.main(["serve", "-m", str(tiny.text), "--threads", "1", "--port", "0", *arguments]) == 1
    assert message in capsys.readouterr().err
