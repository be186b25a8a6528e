"""The `edge-shiftkv` command.

Each sub-command is a function here that adds its arguments, and imports what it runs only when it runs: `build` and
`doctor` have to work where the patched library is not there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from edge_shiftkv import __version__
from edge_shiftkv.budget import Budget, read_budget
from edge_shiftkv.errors import SettingError

_SIGPIPE_STATUS = 141  # what a shell says of other tools that end so: 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _Parser(
        prog="edge-shiftkv",
        description="Read pictures and long texts with llama.cpp, in a KV cache that is cut to a budget.",
        epilog="to begin: edge-shiftkv doctor, then edge-shiftkv demo",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_build(commands)
    _add_doctor(commands)
    _add_run(commands)
    _add_batch(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_demo(commands)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        with _plain_warnings():
            status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has had enough of it, as `head` does
        _discard_output()
        return _SIGPIPE_STATUS
    return status


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line: the usage of these commands fills a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Have warnings printed as messages for people, without the line of code they come from."""
    original = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"edge-shiftkv: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = original


def _discard_output() -> None:
    """Let what is still to be written go nowhere, or Python would try again at its end, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _add_build(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "build the patched llama-cpp-python and install it into this Python environment"
    parser = commands.add_parser("build", help=text, description=text)
    for name, title in (("cuda", "CUDA"), ("metal", "Metal, the default on macOS"), ("vulkan", "Vulkan")):
        parser.add_argument(f"--{name}", dest="backends", action="append_const", const=name, help=f"add {title}")
    parser.add_argument(
        "--cuda-arch",
        metavar="ARCH",
        help="the GPU architecture to build for, as in 86 or 75;90 (default: that of this machine's GPU)",
    )
    parser.add_argument("--no-native", action="store_true", help="do not tune the library for this machine's CPU")
    parser.add_argument(
        "--cmake-arg",
        action="append",
        default=[],
        metavar="-D...",
        help="hand one argument to CMake, as in --cmake-arg=-DGGML_RPC=ON; repeatable",
    )
    parser.add_argument("--stock", action="store_true", help="build the unpatched library instead, for comparison")
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="also copy the wheel to DIR")
    parser.add_argument("--no-install", action="store_true", help="do not install the wheel")
    parser.set_defaults(run=_build)


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "say what is installed here, what is wrong with it, and what to type against that"
    status = "exit status: 0 models can be run, 1 something keeps them from it"
    parser = commands.add_parser("doctor", help=text, description=text, epilog=status)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=_doctor)


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "answer a prompt, with pictures, from a KV cache cut to a budget"
    parser = commands.add_parser("run", help=text, description=text)
    add_model(parser)
    _add_prefill(parser)
    _add_draft(parser)
    parser.add_argument("--image", action="append", default=[], metavar="PICTURE", help="a picture; repeatable")
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT")
    parser.add_argument("--raw", action="store_true", help="continue the text, without the model's chat template")
    add_sampling(parser)
    parser.add_argument("--stats", action="store_true", help="print figures to stderr")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    _add_heatmap(parser)
    parser.set_defaults(run=_run)


def _add_chat(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "talk with a model, about pictures, too; /help there lists what can be done"
    parser = commands.add_parser("chat", help=text, description=text)
    add_model(parser)
    _add_draft(parser)
    parser.add_argument(
        "--image", action="append", default=[], metavar="PICTURE", help="a picture of the first message; repeatable"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the first message")
    add_sampling(parser)
    parser.set_defaults(run=_run)


def _add_serve(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "answer OpenAI clients over HTTP, one request at a time, with a page to try it in a browser"
    parser = commands.add_parser("serve", help=text, description=text)
    add_model(parser)
    _add_prefill(parser)
    _add_draft(parser)
    # Requests come from others: without a folder they may not name files at all.
    parser.set_defaults(run=_run, image_root=False)
    add_sampling(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="the address to serve at (default: %(default)s)")
    group.add_argument("--port", type=int, default=8080, help="default: %(default)s; 0 takes a free one")
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="what clients have to send; repeatable; or the variable EDGE_SHIFTKV_API_KEY, which others do not see",
    )
    group.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)")
    group.add_argument(
        "--keep-prompt",
        action="store_true",
        help="with a budget, keep the uncut prompt, too: the next turn of a conversation only reads what is new",
    )
    group.add_argument("--time-limit", type=float, metavar="S", help="most seconds that an answer may take")
    group.add_argument("--sessions", type=int, default=4, metavar="N", help="sessions open at a time (default: 4)")
    group.add_argument(
        "--session-idle", type=float, default=900, metavar="S", help="seconds until an unused one ends (default: 900)"
    )
    group.add_argument("--max-body", type=float, default=32, metavar="MIB", help="largest request (default: 32)")
    group.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="a web page's origin that may ask; repeatable"
    )
    group.add_argument("--quiet", action="store_true", help="no line on stderr for each request")


def add_model(parser: argparse.ArgumentParser) -> None:
    """What models are loaded, and how: `commands.settings.load_runtime` takes it."""
    group = parser.add_argument_group("model")
    model = group.add_mutually_exclusive_group(required=True)
    model.add_argument("-m", "--model", metavar="GGUF", help="the language model")
    model.add_argument(
        "-hf",
        "--hf-repo",
        metavar="USER/MODEL[:QUANT]",
        help="a model of the Hugging Face hub, downloaded with its mmproj (default quantization: Q4_K_M)",
    )
    group.add_argument("--hf-file", metavar="GGUF", help="its file in the repository, or a pattern for it")
    group.add_argument("--hf-mmproj", metavar="GGUF", help="the mmproj's, or a pattern for it, or none")
    group.add_argument("--mmproj", metavar="GGUF", help="its vision encoder and projector")
    group.add_argument(
        "--kv-budget",
        type=_budget,
        metavar="N",
        help="KV pairs kept of the prompt per layer and KV head, or below 1 their share; or bytes for all layers, "
        "as in 64MiB, or a share of the prompt's bytes in f16, as in 1/8 (default: all)",
    )
    kv_method = group.add_argument("--kv-method", metavar="NAME", help="how: mixed (default)%(others)s")
    kv_method.others = _OtherMethods()  # type: ignore[attr-defined]
    group.add_argument("-c", "--n-ctx", type=int, metavar="N", help="prompt and answer together (default: the model's)")
    group.add_argument(
        "--type-k", metavar="TYPE", help="how keys are stored: f16, q8_0, ... (default: f16; q8_0 with bytes)"
    )
    group.add_argument("--type-v", metavar="TYPE", help="how values are stored (default: f16; q4_0 with bytes)")
    group.add_argument("--gpu-layers", type=int, default=-1, metavar="N", help="layers on the GPU (default: all)")
    group.add_argument(
        "--no-pack-weights",
        dest="pack_weights",
        action="store_false",
        help="keep no copy of the weights in the order that is fastest on the CPU: less memory, slower",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    group.add_argument(
        "--allow-http",
        nargs="?",
        const="public",
        choices=("public", "private"),
        help="fetch pictures from http(s) addresses: public ones (default), or those of private networks, too",
    )
    group.add_argument("--image-root", type=Path, metavar="DIR", help="take pictures' paths from this folder only")
    parser.set_defaults(prefill="by-batch", draft=None, draft_tokens=None, draft_rule=None, draft_mmproj=None)


def _add_prefill(parser: argparse.ArgumentParser) -> None:
    """How prompts are read, for commands that keep none of them whole."""
    parser.add_argument(
        "--prefill",
        choices=("by-batch", "by-layer"),
        help="by-layer takes less memory while a prompt is read that is cut (default: by-batch)",
    )


def _add_draft(parser: argparse.ArgumentParser) -> None:
    """What drafts for the model, for commands that write one answer at a time."""
    group = parser.add_argument_group("draft")
    group.add_argument("--draft", metavar="GGUF", help="a smaller model of any vocabulary that drafts the answer")
    group.add_argument(
        "--draft-tokens", type=int, metavar="N", help="tokens drafted in each round (default: as many as pay)"
    )
    group.add_argument("--draft-rule", metavar="RULE", help="at a temperature: coupled (default) or tokentiming")
    group.add_argument("--draft-mmproj", metavar="GGUF", help="the draft's own vision encoder and projector")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How answers are written: `commands.settings.request_options` takes it."""
    group = parser.add_argument_group("answers")
    group.add_argument("-n", "--max-tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: most likely token")
    group.add_argument("--top-k", type=int, default=40, metavar="K", help="default: 40")
    group.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default: 0.95")
    group.add_argument("--min-p", type=float, default=0.05, metavar="P", help="default: 0.05")
    group.add_argument(
        "--seed", type=int, metavar="N", help="of the draws at a temperature (default: another each time)"
    )
    group.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="default: 1.0, which is off")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="default: 0.0, which is off")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="default: 0.0, which is off")
    keeps = group.add_mutually_exclusive_group()
    keeps.add_argument("--grammar-file", type=Path, metavar="GBNF", help="answers keep to the grammar in this file")
    keeps.add_argument("--json-schema", type=Path, metavar="JSON", help="answers are JSON of the schema in this file")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer; repeatable")


def _budget(text: str) -> Budget:
    try:
        return read_budget(text)
    except SettingError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_batch(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = (
        "answer a file of requests, or a prompt about each of many pictures, into a file that a later run goes on with"
    )
    status = "exit status: 0 all rows are answered, 3 some are errors, 1 the run could not go on, 130 interrupted"
    parser = commands.add_parser("batch", help=text, description=text, epilog=status)
    parser.add_argument(
        "requests", nargs="?", type=Path, metavar="IN.jsonl", help="requests in OpenAI's batch format, one a line"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="PICTURE", help="pictures, folders, or patterns such as 'scans/*.png'; with -p"
    )
    parser.add_argument("--recursive", action="store_true", help="take what is in folders below folders, too")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="what is asked about each picture")
    parser.add_argument(
        "-o", "--out", required=True, type=Path, metavar="OUT.jsonl", help="answers; what is there is gone on with"
    )
    add_model(parser)
    _add_prefill(parser)
    add_sampling(parser)
    group = parser.add_argument_group("batch")
    group.add_argument(
        "--parallel",
        type=_parallel,
        default="auto",
        metavar="N",
        help="answers written at a time; auto, the default, tries what pays",
    )
    group.add_argument("--limit", type=at_least_one, metavar="N", help="the first N rows only")
    group.add_argument("--row-timeout", type=float, metavar="SECONDS", help="a row that takes longer is an error")
    group.add_argument("--retry-errors", action="store_true", help="do the rows again that are errors")
    group.add_argument("--restart", action="store_true", help="throw away the answers that are there")
    group.add_argument("--csv", type=Path, metavar="FILE", help="write a table besides; with a schema, by its fields")
    group.add_argument(
        "--heatmaps", type=Path, metavar="DIR", help="draw a heat map of what was kept of each row's pictures"
    )
    parser.set_defaults(run=_run)


def _parallel(text: str) -> int | str:
    return text if text == "auto" else at_least_one(text)


def at_least_one(text: str) -> int:
    """The type of an argument that counts."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = (
        "ask the shipped model about a picture, with its full KV cache and with cut ones side by side; draw a heat map"
    )
    parser = commands.add_parser("demo", help=text, description=text)
    parser.add_argument(
        "-m",
        "--model",
        metavar="GGUF",
        help="have this language model read a receipt instead, which any one can, also one without an mmproj",
    )
    parser.add_argument("--kv-budget", type=_budget, default="1/8", metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--heatmap",
        type=Path,
        metavar="PNG",
        help="where to draw what was kept (default: the first of kept.png, kept-2.png, ... that is not there)",
    )
    parser.set_defaults(run=_run)


class _OtherMethods:
    """Written into a help text, the methods beside the default, which the library knows: it is only loaded for that."""

    def __str__(self) -> str:
        try:
            from edge_shiftkv.selection.methods import DEFAULT_METHOD, METHODS
        except ImportError:
            return "; the patched library lists the others"
        return "".join(f", {name}" for name in METHODS if name != DEFAULT_METHOD)


def _add_heatmap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--heatmap",
        type=Path,
        metavar="PNG",
        help="draw the pictures as a heat map of what the budget kept of them: --kv-budget goes with it",
    )


def _run(arguments: argparse.Namespace) -> int:
    try:
        command = import_module(f"edge_shiftkv.commands.{arguments.command}")
        from edge_shiftkv.errors import ShiftKVError
    except ImportError as error:  # its message names the command that helps
        print(f"edge-shiftkv {arguments.command}: {error}", file=sys.stderr)
        return 1
    try:
        status: int | None = command.main(arguments)
    except ShiftKVError as error:
        print(f"edge-shiftkv {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status or 0


def _doctor(arguments: argparse.Namespace) -> int:
    from edge_shiftkv.doctor import examine, text

    facts = examine.examine()
    print(json.dumps(facts, indent=1) if arguments.json else "\n".join(text.lines(facts)))
    return int(any(finding["stops"] for finding in facts["findings"]))


def _build(arguments: argparse.Namespace) -> int:
    try:
        from edge_shiftkv import build
    except ModuleNotFoundError as error:
        print(
            f"edge-shiftkv build: the Python package {error.name} is missing: pip install {error.name}", file=sys.stderr
        )
        return 1
    options = build.Options(
        backends=frozenset(arguments.backends or ()),
        native=not arguments.no_native,
        cmake_args=tuple(arguments.cmake_arg),
        stock=arguments.stock,
        cuda_arch=arguments.cuda_arch,
    )
    try:
        wheel = build.build_wheel(options)
        if arguments.wheel_dir:
            arguments.wheel_dir.mkdir(parents=True, exist_ok=True)
            print(f"wheel: {shutil.copy2(wheel, arguments.wheel_dir)}")
        if not arguments.no_install:
            build.install_wheel(wheel)
    except BrokenPipeError:
        raise
    except (build.BuildError, OSError) as error:
        print(f"edge-shiftkv build: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
