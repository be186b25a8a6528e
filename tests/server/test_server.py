import asyncio
import base64
import json
import math
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion
from support.server import answer, error, serving

from edge_shiftkv import CancelledError, Runtime, cli
from edge_shiftkv.server.queue import Queue

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
LONG = {**HELLO, "max_tokens": 900, "logit_bias": {"258": -1000}, "stream": True}  # the tiny model's end token


@pytest.fixture(scope="module")
def model(demo):
    return ["-m", demo / "demo-text-q8_0.gguf", "--mmproj", demo / "demo-mmproj-f16.gguf"]


@pytest.fixture(scope="module")
def own(demo):
    """The answers of a runtime without a server."""
    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", n_threads=1) as runtime:
        yield lambda text, **options: runtime.generate(text, [demo / "document.png"], **options)


@pytest.fixture(scope="module")
def server(model):
    with serving(*model) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(demo):
    """A function: a question to messages that ask it about the document."""
    picture = base64.b64encode((demo / "document.png").read_bytes()).decode()

    def messages(text):
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]

    return messages


def chat(client, messages, **options):
    return client.chat.completions.create(model="any", messages=messages, **options)


def test_a_picture_is_answered_as_the_runtime_does(client, ask, own):
    reply = chat(client, ask("Read line 2."))
    expected = own("Read line 2.")
    assert reply.choices[0].message.content == expected.text != ""
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == expected.figures.prompt_tokens
    assert reply.figures["kept_tokens"] == expected.figures.kept_tokens
    ChatCompletion.model_validate(reply.model_dump(), strict=True)


def test_a_budget_of_the_request(client, ask, own):
    reply = chat(client, ask("Read line 2."), extra_body={"kv_budget": 96, "kv_method": "snapkv"})
    expected = own("Read line 2.", kv_budget=96, kv_method="snapkv")
    assert (reply.figures["kept_tokens"], reply.choices[0].message.content) == (96, expected.text)


def test_the_servers_own_settings(model, demo, ask, own):
    with (
        serving(
            *model, "--kv-budget", "96", "--max-tokens", "3", "--keep-prompt", "--quiet", "--image-root", demo
        ) as server,
        openai.OpenAI(base_url=server.url, api_key="none") as client,
    ):
        question = ask("Read line 2.")
        short, longer = chat(client, question), chat(client, question, max_tokens=None, max_completion_tokens=5)
        whole = chat(client, question, extra_body={"kv_budget": None})
        assert [reply.usage.completion_tokens for reply in (short, longer)] == [3, 5]
        assert [reply.figures["kept_tokens"] for reply in (short, whole)] == [96, whole.usage.prompt_tokens]
        assert short.choices[0].message.content == own("Read line 2.", kv_budget=96, max_tokens=3).text
        question[0]["content"][0]["image_url"]["url"] = "document.png"  # in the folder
        assert chat(client, question).choices[0].message.content == short.choices[0].message.content
        question[0]["content"][0]["image_url"]["url"] = "/etc/passwd"
        with pytest.raises(openai.BadRequestError, match="no such file in the folder"):
            chat(client, question)
        assert server.log() == []


def test_streaming(client, ask, own):
    expected = own("Read line 4.")
    chunks = list(chat(client, ask("Read line 4."), stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected.text
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == expected.figures.generated_tokens
    assert sum(bool(chunk.choices and chunk.choices[0].finish_reason) for chunk in chunks) == 1


def test_the_bytes_of_a_stream(server):
    status, headers, body = answer(server.send({**HELLO, "stream": True}))
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    *events, done, rest = body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
    assert {json.loads(event[6:])["object"] for event in events} == {"chat.completion.chunk"}


def test_a_schema(client, ask):
    class Pick(pydantic.BaseModel):
        kind: Literal["form", "letter"]
        right: bool

    reply = client.chat.completions.parse(
        model="any", messages=ask("Read line 2."), response_format=Pick, max_tokens=200
    )
    assert isinstance(reply.choices[0].message.parsed, Pick)


def test_the_models(client, server, demo):
    assert [model.id for model in client.models.list()] == ["demo-text-q8_0"]
    assert client.models.retrieve("demo-text-q8_0").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is 'demo-text-q8_0'"):
        client.models.retrieve("other")
    assert chat(client, HELLO["messages"]).model == "any"
    assert json.loads(answer(server.send(HELLO))[2])["model"] == "demo-text-q8_0"
    assert json.loads(answer(server.raw("GET", "/health"))[2])["status"] == "ok"
    server.holds(0)


def test_the_page_in_the_docs(server, own, capsys, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    page = (root / "docs/howto/server.md").read_text()
    blocks = re.findall(r"^```python server\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 4
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(block.replace("http://127.0.0.1:8080/v1", server.url), names)
    names["client"].close()
    expected = own("Read line 2.")
    text, n_tokens = expected.text, expected.figures.prompt_tokens
    assert capsys.readouterr().out.startswith(f"{text}\n{text}{n_tokens} tokens, 96 kept per layer and KV head\n")


def test_many_clients_at_once(client, ask, own):
    questions = [f"Read line {1 + i % 8}." for i in range(16)]
    with ThreadPoolExecutor(16) as threads:
        replies = list(threads.map(lambda question: chat(client, ask(question)), questions))
    expected = {question: own(question).text for question in set(questions)}
    assert [reply.choices[0].message.content for reply in replies] == [expected[question] for question in questions]
    assert len(set(expected.values())) > 4


@pytest.mark.parametrize(
    ("options", "kind", "code", "message"),
    [
        ({"messages": []}, openai.BadRequestError, "invalid_prompt", "messages is empty"),
        (
            {"messages": [{"role": "x", "content": ""}]},
            openai.BadRequestError,
            "invalid_prompt",
            "'x' is not supported",
        ),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value", "temperature is -1"),
        ({"n": 2}, openai.BadRequestError, "invalid_value", "n"),
        ({"extra_body": {"self": 1}}, openai.BadRequestError, "invalid_value", "unknown option 'self'"),
        ({"extra_body": {"kv_budget": 1}}, openai.BadRequestError, "invalid_value", "kv_budget is 1"),
        (
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            openai.BadRequestError,
            "context_length_exceeded",
            "leaves no room for an answer",
        ),
    ],
)
def test_errors_of_requests(client, options, kind, code, message):
    with pytest.raises(kind, match=message) as caught:
        chat(client, **{"messages": HELLO["messages"], **options})
    assert (caught.value.code, caught.value.type) == (code, "invalid_request_error")
    assert chat(client, HELLO["messages"]).choices


@pytest.mark.parametrize(
    "source",
    ["document.png", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/a.png", "data:image/png;base64,AA"],
)
def test_pictures_that_are_refused(client, source):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": source}}]}])
    assert caught.value.code == "invalid_image"
    if ":" not in source or source.startswith("file"):
        assert "files are not read here" in caught.value.message


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (b"[]", 400, "a JSON object"),
        (b"{}", 400, "messages is empty"),
        (b'{"messages": {"role": "user"}}', 400, "messages is"),
        (
            b'{"messages": [{"role": "user", "content": "a\\ud800b"}], "model": "\\ud800", "stream": 1}',
            400,
            "stream is 1",
        ),
    ],
)
def test_bodies_that_are_none(server, data, status, message):
    got, about = error(server.raw("POST", "/v1/chat/completions", data, Content_Type="application/json"))
    assert (got, about["type"]) == (status, "invalid_request_error")
    assert message in about["message"]


def test_half_a_surrogate_pair(server):
    body = {"messages": [{"role": "user", "content": "a\ud800b"}], "model": "\ud800", "max_tokens": 1}
    status, _, data = answer(server.send(body))
    json.loads(data)
    assert status in (200, 400)


def test_what_is_no_request(server):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
    ):
        got, about = error(server.raw(method, path))
        assert (got, about["type"]) == (status, "invalid_request_error")
    assert error(server.raw("POST", "/v1/chat/completions", b"{}", Content_Type="text/plain"))[0] == 415
    got, about = error(server.send(HELLO, Host="evil.example"))
    assert (got, about["code"]) == (403, "invalid_host")
    for host in ("localhost", f"localhost:{server.port}", "[::1]:80"):
        assert answer(server.send(HELLO, Host=host))[0] == 200


def test_the_log_has_a_line_for_each_request(server):
    answer(server.raw("GET", "/before"))
    while not (lines := server.log())[-1:] or "/before" not in lines[-1]:
        pass
    n_before = len(lines)
    for body, n in ((HELLO, 1), ({**HELLO, "stream": True}, 2)):
        answer(server.send(body))
        server.log(n_before + n)
    answer(server.raw("GET", "/a%0Ab"))
    one, streamed, none = server.log(n_before + 3)[n_before:]
    for line in (one, streamed):
        assert line.startswith("POST /v1/chat/completions 200 12+")
        assert line.endswith(" s")
    assert none.startswith("GET /a?b 404 ")


@pytest.fixture(scope="module")
def guarded(tiny):
    page = ["--cors", "https://page.example"]
    with serving("-m", tiny.text, "--api-key", "one", "--api-key", "zwö", "--max-body", "0.5", *page) as server:
        yield server


def test_keys(guarded):
    assert error(guarded.send(HELLO))[1]["code"] == "invalid_api_key"
    assert answer(guarded.raw("GET", "/health"))[0] == 200
    for header, status in (
        ("Bearer one", 200),
        ("bearer zwö", 200),
        ("Bearer on", 401),
        ("Bearer one2", 401),
        ("Bearer ", 401),
        ("Basic one", 401),
    ):
        assert answer(guarded.send(HELLO, Authorization=header))[0] == status, header
    with openai.OpenAI(base_url=guarded.url, api_key="other") as client:
        with pytest.raises(openai.AuthenticationError, match="a wrong API key"):
            chat(client, HELLO["messages"])
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_the_key_of_the_environment(tiny, monkeypatch):
    monkeypatch.setenv("EDGE_SHIFTKV_API_KEY", "secret")
    with serving("-m", tiny.text) as server:
        assert answer(server.send(HELLO))[0] == 401
        assert answer(server.send(HELLO, Authorization="Bearer secret"))[0] == 200


def test_a_body_that_is_too_large(guarded):
    with openai.OpenAI(base_url=guarded.url, api_key="one", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError, match=r"more than 0\.5 MiB") as caught:
            chat(client, [{"role": "user", "content": "x" * (8 << 20)}])
        assert caught.value.status_code == 413
        assert chat(client, HELLO["messages"], max_tokens=1).choices
    # A refusal for something else reaches a client that is still sending.
    assert error(guarded.send("x" * (8 << 20)))[0] == 401


def test_web_pages(guarded):
    for origin, allowed in (("https://page.example", "https://page.example"), ("https://other.example", None)):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answered = answer(guarded.raw("OPTIONS", "/v1/chat/completions", **headers))[1]
        assert answered.get("access-control-allow-origin") == allowed


def first_event(connection):
    data = b""
    while b"\n\n" not in data.partition(b"data: ")[2]:
        piece = connection.recv(4096)
        assert piece, data
        data += piece


@pytest.fixture(scope="module")
def slow(tiny):
    """A server whose answers take long, and of which one request may wait."""
    with serving("-m", tiny.text, "--mmproj", tiny.mmproj, "--queue", "1", slowly=True) as server:
        yield server


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(slow, stream):
    running = slow.send(LONG)
    first_event(running)
    waiting = slow.send({**LONG, "stream": stream})
    slow.holds(2)
    status, headers, body = answer(slow.send(HELLO))
    about = json.loads(body)["error"]
    assert (status, headers["retry-after"], about["code"], about["type"]) == (503, "2", "queue_full", "server_error")
    waiting.close()
    slow.holds(1)
    second = slow.send({**LONG, "stream": stream})
    slow.holds(2)
    running.close()
    if stream:
        first_event(second)
    slow.holds(1)
    second.close()
    slow.holds(0)
    assert json.loads(answer(slow.send(HELLO))[2])["usage"]["completion_tokens"] == 4
    log = "\n".join(slow.log())
    assert "+900 tokens" not in log
    assert log.count("POST /v1/chat/completions 499 ") >= 3


def test_a_body_that_does_not_come(slow):
    got, about = error(
        slow.raw("POST", "/v1/chat/completions", b"{", Content_Type="application/json", Content_Length=9)
    )
    assert (got, about["code"]) == (408, "upload_time")
    gone = slow.raw("POST", "/v1/chat/completions", b"{", Content_Type="application/json", Content_Length=9)
    gone.close()
    assert answer(slow.send(HELLO))[0] == 200
    assert "Traceback" not in "".join(slow.log())


def test_a_job_that_is_cancelled_before_the_runtime_knows_it(runtime):
    begin, taken = threading.Event(), threading.Event()

    def work(runtime):
        taken.set()
        begin.wait(30)
        yield from ({"text": text} for text in runtime.stream("Hello", max_tokens=900, logit_bias={258: -math.inf}))

    async def texts():
        with Queue(runtime, 1) as queue:
            job, following = queue.enter(), queue.enter()
            job.start(work)
            following.start(lambda runtime: [{"text": runtime.generate("Hello", max_tokens=4).text}])
            await asyncio.to_thread(taken.wait, 30)
            job.cancel()
            begin.set()
            with pytest.raises(CancelledError):
                async for _ in job:
                    pass
            return [item["text"] async for item in following]

    assert asyncio.run(texts()) == [runtime.generate("Hello", max_tokens=4).text]


def test_a_time_limit(tiny):
    with (
        serving("-m", tiny.text, "--time-limit", "0.5", slowly=True) as server,
        openai.OpenAI(base_url=server.url, api_key="none") as client,
    ):
        options = {"max_tokens": 900, "logit_bias": LONG["logit_bias"]}
        for limits in ({}, {"time_limit": 1000}, {"time_limit": 0.25}):
            with pytest.raises(openai.APIStatusError, match="its time limit of") as caught:
                chat(client, HELLO["messages"], extra_body=limits, **options)
            assert (caught.value.status_code, caught.value.code) == (408, "time_limit")
            assert f"limit of {min(0.5, limits.get('time_limit', 0.5)):g} s" in caught.value.message
        assert [line.split()[2] for line in server.log(3)] == ["408"] * 3  # none was tried again
        # In the middle of a stream the status is sent already.
        with pytest.raises(openai.APIError, match=r"its time limit of 0\.5 s"):
            list(chat(client, HELLO["messages"], stream=True, **options))
        assert chat(client, HELLO["messages"], max_tokens=2).choices


def test_a_signal_finishes_what_is_answered(tiny):
    with serving("-m", tiny.text, slowly=True) as server:
        body = {**LONG, "max_tokens": 8}
        running = server.send(body)
        first_event(running)
        waiting = server.send(body)
        server.holds(2)
        server.process.send_signal(signal.SIGTERM)
        assert error(waiting)[1]["code"] == "stopping"
        assert running.makefile("rb").read().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        running.close()
        assert server.process.wait(60) == 0
        assert [line.split()[2] for line in server.log() if "POST" in line] == ["503", "200"]


def test_a_second_signal_ends_at_once(tiny):
    with serving("-m", tiny.text, slowly=True) as server:
        running = server.send(LONG)
        first_event(running)
        server.process.send_signal(signal.SIGTERM)
        while True:  # until it took note of the first
            try:
                server.connect().close()
            except OSError:
                break
        assert server.stop(signal.SIGINT) == 0
        running.close()
        assert "Traceback" not in "".join(server.log())


def test_an_idle_server_stops(tiny):
    with serving("-m", tiny.text) as server:
        kept = server.raw("GET", "/health", Connection="keep-alive")
        assert kept.recv(15) == b"HTTP/1.1 200 OK"
        assert server.stop(signal.SIGINT) == 0
        kept.close()
        (line,) = server.log()
        assert line.startswith("GET /health 200 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queue", "-1"], "--queue is -1"),
        (["--max-body", "0"], "--max-body is 0"),
        (["--api-key", ""], "--api-key is empty"),
        (["--time-limit", "0"], "time_limit is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--port", "99999"], "--port is 99999"),
        (["--host", "no.such.host.invalid"], "cannot serve at no.such.host.invalid"),
        (["-m", "none.gguf"], "none.gguf: No such file"),
    ],
)
def test_settings_that_are_wrong(tiny, capsys, arguments, message):
    assert cli.main(["serve", "-m", str(tiny.text), "--threads", "1", "--port", "0", *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("edge-shiftkv serve: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_address_in_use(tiny, server, capsys):
    assert cli.main(["serve", "-m", str(tiny.text), "--port", str(server.port)]) == 1
    assert "Address already in use" in capsys.readouterr().err


def test_without_the_extra(tiny):
    code = (
        "import sys; sys.modules['uvicorn'] = None; from edge_shiftkv.cli import main; "
        f"sys.exit(main(['serve', '-m', {str(tiny.text)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert 'pip install "edge-shiftkv[server]"' in done.stderr
