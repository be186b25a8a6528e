"""Measure what sessions save; prints Markdown tables.

    python scripts/bench_session.py ask -m MODEL --mmproj MMPROJ --image PAGE --tokens 1024   # time to the first token
    python scripts/bench_session.py memory -m MODEL --mmproj MMPROJ --image PAGE              # of many open pages
    python scripts/bench_session.py server -m MODEL --mmproj MMPROJ --image PAGE --llama-server LLAMA_SERVER

`ask` takes the seconds until the first token of an answer is there: of a question with its page read for it, of a
second question in the same session, of one after a cut, and of one in a session from a file (the SHA-256 of the model
file is left aside, as its load is). A page is a picture, or --tokens of text (Python source). What is compared is
measured in one run, alternately; ratios are medians of the rounds' ratios with their quartiles. `memory` opens pages
one after the other and takes what they add to the process's own memory. `server` sets beside
a session's file the slot that llama.cpp's own server (of the same llama.cpp, unpatched) saves and restores, whose KV
cache is whole: bytes, and seconds from a request that restores the slot, or loads the session, to the first token.
"""

from __future__ import annotations

import argparse
import base64
import json
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from harness import MIB, Row, add_model, add_options, first_text, markdown, ratio, resident, seconds

from edge_shiftkv import Runtime, Session
from edge_shiftkv.session_file import file_hash

if TYPE_CHECKING:
    from typing_extensions import Self

QUESTIONS = ("What is the first line about?", "Which number is the largest?")


def page_of(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """What a session is about."""
    if arguments.image:
        return {"images": [arguments.image]}
    return {"text": first_text(runtime.engine.model, arguments.tokens)}


def ask(arguments: argparse.Namespace) -> list[Row]:
    """The time to the first token."""
    times: dict[str, list[float]] = {
        name: [] for name in ("generate", "first", "second", "after a cut", "from a file", "save")
    }
    sizes: list[float] = []
    with (
        Runtime(arguments.model, arguments.mmproj, kv_budget=arguments.budget, n_threads=arguments.threads) as runtime,
        tempfile.TemporaryDirectory() as folder,
    ):
        page = page_of(arguments, runtime)
        images, text = page.get("images", ()), page.get("text", "")
        path = Path(folder) / "page.kv"
        for file in filter(None, (arguments.model, arguments.mmproj)):
            file_hash(file)

        prompts = [f"{text}\n{question}" if text else question for question in QUESTIONS]

        def one(session: Session, question: str) -> Callable[[], object]:
            return lambda: session.ask(question, max_tokens=1)

        for i in range(-1, arguments.rounds):  # the first one to warm up
            found = {"generate": seconds(lambda: runtime.generate(prompts[0], images, max_tokens=1))}
            started = time.perf_counter()
            with runtime.session(**page) as session:
                session.ask(QUESTIONS[0], max_tokens=1)
                found["first"] = time.perf_counter() - started
                found["second"] = seconds(one(session, QUESTIONS[1]))
                session.cut(arguments.cut)
                session.ask(QUESTIONS[0], max_tokens=1)
                found["after a cut"] = seconds(one(session, QUESTIONS[1]))
                found["save"] = seconds(lambda: session.save(path))
            started = time.perf_counter()
            with runtime.load_session(path) as session:
                session.ask(QUESTIONS[1], max_tokens=1)
                found["from a file"] = time.perf_counter() - started
            if i >= 0:
                sizes.append(path.stat().st_size / MIB)
                for name, value in found.items():
                    times[name].append(value)
        n_prompt = runtime.generate(prompts[0], images, max_tokens=1).figures.prompt_tokens
    print(f"{n_prompt} tokens; budget of a question {arguments.budget}, of a cut {arguments.cut}; "
          f"file of the cut page {np.median(sizes):.2f} MiB\n")  # fmt: skip
    return [
        {"Time to": name, "s": f"{np.median(values):.3f}", "Over the first question's": ratio(values, times["first"])}
        for name, values in times.items()
    ]


def memory(arguments: argparse.Namespace) -> list[Row]:
    """What open pages take, uncut and cut."""
    rows: list[Row] = []
    for cut in (None, arguments.cut):
        with (
            Runtime(arguments.model, arguments.mmproj, n_threads=arguments.threads) as runtime,
            ExitStack() as pages,
        ):
            page = page_of(arguments, runtime)
            with runtime.session(**page) as session:  # warm up
                session.cut(arguments.cut)
                session.ask(QUESTIONS[0], max_tokens=1)
            before = resident("RssAnon")
            for _ in range(arguments.pages):
                session = pages.enter_context(runtime.session(**page))
                if cut:
                    session.cut(cut)
            after = resident("RssAnon")
        rows.append(
            {
                "Pages": arguments.pages,
                "KV pairs kept": cut or "all",
                "MiB": f"{(after - before) / MIB:.0f}",
                "MiB a page": f"{(after - before) / MIB / arguments.pages:.1f}",
            }
        )
    return rows


class LlamaServer:
    """llama.cpp's server with one slot; a context manager."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [arguments.llama_server, "-m", arguments.model, "--port", port, "-np", 1, "-c", 4096, "-fa", "on"]
        command += ["-t", arguments.threads, "--slot-save-path", folder, "--cache-ram", 0]
        if arguments.mmproj:
            command += ["--mmproj", arguments.mmproj]
        self._process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> Self:
        while True:
            try:
                with urllib.request.urlopen(f"{self._url}/health"):
                    return self
            except OSError:
                if self._process.poll() is not None:
                    raise SystemExit("llama-server does not start") from None
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def post(self, path: str, body: object) -> Any:
        """The answer to a request."""
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def ask(self, arguments: argparse.Namespace, text: str, question: str) -> None:
        """Have one token written about the page."""
        content: list[Any] = [{"type": "text", "text": f"{text}\n{question}" if text else question}]
        if arguments.image:
            data = base64.b64encode(arguments.image.read_bytes()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        messages = [{"role": "user", "content": content}]
        self.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1, "temperature": 0, "id_slot": 0})


def server(arguments: argparse.Namespace) -> list[Row]:
    """A page on disk, next to llama.cpp's server."""
    times: dict[str, list[float]] = {name: [] for name in ("read it", "restore its slot", "load its session, cut")}
    sizes: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        LlamaServer(arguments, Path(folder)) as theirs,
        Runtime(arguments.model, arguments.mmproj, n_threads=arguments.threads) as runtime,
    ):
        page = page_of(arguments, runtime)
        text, path = page.get("text", ""), Path(folder) / "page.kv"
        with runtime.session(**page) as session:
            session.cut(arguments.cut)
            session.save(path)
        for i in range(-1, arguments.rounds):
            theirs.post("/slots/0?action=erase", {})
            found = {"read it": seconds(lambda: theirs.ask(arguments, text, QUESTIONS[0]))}
            sizes["restore its slot"] = theirs.post("/slots/0?action=save", {"filename": "slot"})["n_written"]
            theirs.post("/slots/0?action=erase", {})
            started = time.perf_counter()
            theirs.post("/slots/0?action=restore", {"filename": "slot"})
            theirs.ask(arguments, text, QUESTIONS[1])
            found["restore its slot"] = time.perf_counter() - started
            started = time.perf_counter()
            with runtime.load_session(path) as session:
                session.ask(QUESTIONS[1], max_tokens=1)
                found["load its session, cut"] = time.perf_counter() - started
            for name, value in found.items():
                if i >= 0:
                    times[name].append(value)
        sizes["load its session, cut"] = path.stat().st_size
    return [
        {
            "To the first token": name,
            "s": f"{np.median(values):.3f}",
            "Over reading": ratio(values, times["read it"]),
            "File, MiB": f"{sizes[name] / MIB:.2f}" if name in sizes else "",
        }
        for name, values in times.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description="Measure what sessions save.")
    commands = parser.add_subparsers(required=True)
    for function in (ask, memory, server):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        add_model(command)
        command.add_argument("--image", type=Path, metavar="PICTURE", help="the page, which --mmproj sees")
        command.add_argument("--tokens", type=int, default=1024, help="of a page of text (1024)")
        command.add_argument("--cut", type=int, default=64, help="KV pairs a cut keeps (64)")
        add_options(command, "--mmproj", "--threads")
        if function is ask:
            add_options(command, "--budget")
        if function is memory:
            command.add_argument("--pages", type=int, default=20, help="that are open (20)")
        else:
            add_options(command, "--rounds")
        if function is server:
            command.add_argument("--llama-server", default="llama-server", help="llama.cpp's (%(default)s)")
    options = parser.parse_args(arguments)
    print(markdown(options.function(options)))


if __name__ == "__main__":
    main()
