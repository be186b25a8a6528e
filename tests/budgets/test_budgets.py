"""Budgets in bytes: how many KV pairs they are, against numpy and what the caches really hold, and who takes them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as llama_h
import numpy as np
import openai
import pytest
from llama_cpp import Llama
from support import kv_state
from support.gguf_random import Spec, write_model
from support.server import serving

from edge_shiftkv import Runtime, SettingError, ShiftKVChatHandler, ShiftKVError, cli
from edge_shiftkv.batch.parallel import choose_parallel
from edge_shiftkv.budget import PairBytes, budget_for, check_budget, most_pairs, read_budget
from edge_shiftkv.chat import commands
from edge_shiftkv.chat.conversation import Chat
from edge_shiftkv.native.llama import Model, small_kv_types
from edge_shiftkv.prompts.images import load_image
from edge_shiftkv.prompts.prompt import Prompt

BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q4_0": 18 / 32}
"""Of a number in storage."""

PROMPT = "the quick brown fox jumps over the lazy dog. " * 6

WINDOWS = {"attention.sliding_window": 32, "attention.sliding_window_pattern": 2}


def gemma4(size: int, in_windows: int) -> Spec:
    """Window layers have other heads, of another size."""
    names = ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa")
    meta = {"attention.sliding_window": 32, "attention.sliding_window_pattern": [True, True, False] * 2}
    meta |= {"embedding_length_per_layer_input": 0, **dict.fromkeys(names, in_windows)}
    return Spec("gemma4", n_layer=6, d_head=size, kv_heads=(4, 4, 1) * 2, rope_factors=True, meta=meta)


# A model, and KV heads and their size in each of the layers that are cut.
MODELS = {
    "llama": (Spec(n_layer=3, n_head_kv=2, d_head=32), [2, 2, 2], 32),
    "wide heads": (Spec("qwen3", n_layer=2, d_head=96), [2, 2], 96),
    "openelm": (Spec("openelm", kv_heads=(2, 4, 2)), [2, 4, 2], 32),
    "a layer without attention": (Spec("deci", n_layer=4, kv_heads=(1, 0, 4, 2)), [1, 4, 2], 32),
    "every other layer has a window": (Spec("gemma3", n_layer=6, meta=WINDOWS), [2, 2, 2], 32),
    "windows of another size": (gemma4(64, 32), [1, 1], 64),
}
TYPES = [("f16", "f16"), ("q8_0", "q4_0"), ("q8_0", "f16"), ("f32", "q5_1"), ("bf16", "bf16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


class OfDemo:
    """What the shipped model's pairs take in f16: 4 layers, 2 KV heads of 32 numbers."""

    pair_bytes = PairBytes(1024, 1024)


class Never:
    """Stores nothing that anyone may look at."""

    @property
    def pair_bytes(self) -> PairBytes:
        raise AssertionError


@pytest.mark.parametrize(
    ("budget", "bytes_"),
    [
        *(("64MiB", 64 * 2**20), ("64 MiB", 64 * 2**20), ("64mib", 64 * 2**20), ("1GiB", 2**30), ("3KiB", 3 * 2**10)),
        *(("64MB", 64_000_000), ("64kB", 64_000), ("64KB", 64_000), ("2GB", 2_000_000_000), ("4097B", 4097)),
        *((" 0.5 MiB ", 2**19), ("1.5GB", 1_500_000_000), ("2.0001KiB", 2048)),
    ],
)
def test_bytes(budget: str, bytes_: int) -> None:
    assert check_budget(budget) == read_budget(budget) == budget
    assert most_pairs(budget, OfDemo()) == bytes_ // 1024
    assert budget_for(budget, 10**9, OfDemo()) == bytes_ // 1024
    assert budget_for(budget, bytes_ // 1024, OfDemo()) is None
    assert budget_for(budget, bytes_ // 1024 + 1, OfDemo()) == bytes_ // 1024


@pytest.mark.parametrize(
    ("budget", "n"), [("1/8", 1000 // 8), ("3/16", 3000 // 16), ("7/8", 875), ("999/1000", 999), ("1/999", 2)]
)
def test_shares_of_bytes(budget: str, n: int) -> None:
    assert check_budget(budget) == read_budget(budget) == budget
    assert most_pairs(budget, Never()) is None
    assert budget_for(budget, 1000, OfDemo()) == n
    smaller = type("", (), {"pair_bytes": PairBytes(416, 1024)})()
    of_bytes = max(2, int(np.floor(np.float64(eval(budget)) * 1000 * 1024 / 416)))
    assert budget_for(budget, 1000, smaller) == (of_bytes if of_bytes < 1000 else None)


def test_numbers_mean_pairs_as_ever() -> None:
    """They ask for no bytes."""
    for budget, n in ((2, 2), (99, 99), (100, None), (0.25, 25), (0.001, 2), (64.0, 64), (None, None)):
        assert budget_for(budget, 100, Never()) == n
    assert [read_budget(text) for text in ("96", "0.25", "64.0", "1e3")] == [96, 0.25, 64.0, 1000.0]
    assert (most_pairs(96, Never()), most_pairs(0.5, Never()), most_pairs(None, Never())) == (96, None, None)


WRONG = [
    *(
        "",
        "1/0",
        "0/8",
        "8/8",
        "9/8",
        "-1/2",
        "1/-2",
        "1.5/2",
        "1/8/2",
        "1 / 8",
        "1/8B",
        "12 apples",
        "12",
        "0.5",
        "all",
    ),
    *(
        "0MiB",
        "-1MiB",
        "MiB",
        "64M",
        "64 Mi",
        "64iB",
        "64TiB",
        "1e3MiB",
        "½MiB",
        "٣MiB",
        "0.1B",
        "nan",
        "runtime",
        "1" * 9999,
    ),
]


@pytest.mark.parametrize("budget", WRONG, ids=lambda text: text[:10])
def test_other_text_is_refused(budget: str) -> None:
    with pytest.raises(SettingError, match=r"kv_budget is .*bytes such as '64MiB'.*such as '1/8'") as caught:
        check_budget(budget)
    assert len(str(caught.value)) < 600
    with pytest.raises(SettingError):
        Runtime("no-such-file.gguf", kv_budget=budget)


@pytest.mark.parametrize("budget", [True, b"1/8", ("1/8",), 1, 0, -3, 1.0, 0.0, 12.5, float("nan")])
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    with pytest.raises(SettingError, match="kv_budget is"):
        check_budget(budget)


@pytest.mark.parametrize(("type_k", "type_v"), TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_as_many_pairs_as_fit_the_bytes(folder: Path, name: str, type_k: str, type_v: str) -> None:
    """Counted by hand, by the library, and in what llama.cpp saves of the cut cache."""
    spec, kv_heads, size = MODELS[name]
    pair = sum(kv_heads) * size * (BYTES[type_k] + BYTES[type_v])
    n_bytes = int(20.5 * pair)
    path = folder / f"{spec.name}.kv"
    with Runtime(
        write_model(spec, folder), n_threads=1, type_k=type_k, type_v=type_v, kv_budget=f"{n_bytes}B"
    ) as runtime:
        assert runtime.engine.pair_bytes == (pair, sum(kv_heads) * size * 4)
        answer = runtime.generate(PROMPT, raw=True, max_tokens=2, kv_method="streamingllm")
        assert answer.selection
        assert answer.figures.kept_tokens == answer.selection.n_kept == 20
        assert [len(answer.selection._kept[layer]) for layer in answer.selection.layers] == kv_heads
        saved = (answer.figures.kv_bytes_prompt or 0) - (answer.figures.kv_bytes_kept or 0)
        assert saved == (answer.figures.prompt_tokens - 20) * pair
        if not runtime.engine.model.window:
            assert answer.figures.kv_bytes_kept == 20 * pair
        assert (answer.figures.type_k, answer.figures.type_v) == (type_k, type_v)
        with runtime.session(PROMPT, kv_method="streamingllm") as page:
            page.cut()
            page.save(path)
    _, line, state = path.read_bytes()[:-32].split(b"\n", 2)
    assert json.loads(line)["state_bytes"] == len(state)
    held = kv_state.parse(state, has_extent=False)[0]
    stored = sum(rows.raw.nbytes for rows in held.k + held.v)
    assert stored == 20 * pair <= n_bytes < stored + pair


@pytest.mark.parametrize("name", ["llama", "openelm", "every other layer has a window"])
def test_a_share_is_of_the_bytes_in_f16(folder: Path, name: str) -> None:
    spec, kv_heads, size = MODELS[name]
    in_f16 = sum(kv_heads) * size * 2 * BYTES["f16"]
    kept = {}
    for types in TYPES:
        pair = sum(kv_heads) * size * (BYTES[types[0]] + BYTES[types[1]])
        with Runtime(write_model(spec, folder), n_threads=1, type_k=types[0], type_v=types[1]) as runtime:
            figures = runtime.generate(PROMPT, raw=True, max_tokens=1, kv_budget="1/8").figures
        kept[types] = figures.kept_tokens
        room = figures.prompt_tokens * in_f16 / 8
        assert kept[types] * pair <= room < (kept[types] + 1) * pair
    assert kept["q8_0", "q4_0"] == int(figures.prompt_tokens / 8 * 4 / 1.625) > 2.4 * kept["f16", "f16"]


def test_values_may_be_wider_than_keys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model that can be cut was at hand."""
    with Runtime(write_model(Spec(), folder), n_threads=1, type_k="q8_0", type_v="q4_0") as runtime:
        monkeypatch.setattr(Model, "n_embd_head_v", 64)
        assert runtime.engine.pair_bytes == (3 * 2 * (34 + 2 * 18), 3 * 2 * 2 * (32 + 64))


def test_too_few_bytes_name_the_least(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(Spec(), folder)
    least = 2 * 3 * 2 * 2 * 32 * 2  # pairs, layers, KV heads, keys and values, numbers, bytes
    message = (
        rf"kv_budget is '{least - 1}B': it has to be at least {least} bytes, which 2 KV pairs .* take in this model"
    )
    with pytest.raises(SettingError, match=message):
        Runtime(model, n_threads=1, type_k="f16", type_v="f16", kv_budget=f"{least - 1}B")
    with Runtime(model, n_threads=1) as runtime:
        with pytest.raises(SettingError, match=message):
            runtime.stream(PROMPT, raw=True, kv_budget=f"{least - 1}B")  # before anything is read
        assert runtime.generate(PROMPT, raw=True, max_tokens=1, kv_budget=f"{least}B").figures.kept_tokens == 2
        # A share of a prompt is never too little, as with numbers.
        assert runtime.generate(PROMPT, raw=True, max_tokens=1, kv_budget="1/9999").figures.kept_tokens == 2
        closed: list[Prompt] = []
        close = Prompt.close
        monkeypatch.setattr(Prompt, "close", lambda prompt: (closed.append(prompt), close(prompt))[1])
        small, right = runtime.generate_many(
            [{"prompt": PROMPT, "raw": True, "kv_budget": budget} for budget in (f"{least - 1}B", f"{least}B")],
            max_tokens=1,
        )
        assert len({id(prompt) for prompt in closed}) == 2  # pictures of refused ones go, too
        assert isinstance(small.error, SettingError)
        assert f"at least {least} bytes" in str(small.error)
        assert right.completion.figures.kept_tokens == 2


def test_more_than_the_prompt_keeps_all(folder: Path) -> None:
    with Runtime(write_model(Spec(), folder), n_threads=1) as runtime:
        full = runtime.generate(PROMPT, raw=True, max_tokens=8)
        n_bytes = full.figures.prompt_tokens * 768
        for budget, cut in ((f"{n_bytes}B", False), (f"{n_bytes - 1}B", True), ("1GiB", False)):
            answer = runtime.generate(PROMPT, raw=True, max_tokens=8, kv_budget=budget)
            assert (answer.selection is not None) == cut
            assert answer.figures.kept_tokens == full.figures.prompt_tokens - cut
            if not cut:
                assert answer.text == full.text
        with runtime.session(PROMPT) as page, pytest.raises(SettingError, match="1GiB: what was read has only"):
            page.cut("1GiB")


def test_a_model_that_cannot_be_cut_says_so(folder: Path) -> None:
    meta = {"ssm.inner_size": 256, "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.time_step_rank": 4}
    model = write_model(Spec("mamba", meta=meta), folder)
    with pytest.raises(ShiftKVError, match="a kv_budget cannot be used with this model"):
        Runtime(model, n_threads=1, kv_budget="64MiB")
    with Runtime(model, n_threads=1) as runtime:
        for budget in ("64MiB", "1/8"):
            with pytest.raises(ShiftKVError, match="a kv_budget cannot be used with this model"):
                runtime.generate(PROMPT, raw=True, max_tokens=1, kv_budget=budget)
            (result,) = runtime.generate_many([{"prompt": PROMPT, "raw": True, "kv_budget": budget}])
            assert "a kv_budget cannot be used with this model" in str(result.error)
        figures = runtime.generate(PROMPT, raw=True, max_tokens=1).figures
        assert (figures.type_k, figures.type_v) == (None, None)


# How KV pairs are stored


@pytest.mark.parametrize(
    ("settings", "types"),
    [
        ({}, ("f16", "f16")),
        ({"kv_budget": 20}, ("f16", "f16")),
        ({"kv_budget": 0.25}, ("f16", "f16")),
        ({"kv_budget": "1/8"}, ("q8_0", "q4_0")),
        ({"kv_budget": "64MiB"}, ("q8_0", "q4_0")),
        ({"kv_budget": "1/8", "type_k": "f16"}, ("f16", "q4_0")),
        ({"kv_budget": "1/8", "type_v": "bf16"}, ("q8_0", "bf16")),
        ({"kv_budget": "1/8", "type_k": "f16", "type_v": "f16"}, ("f16", "f16")),
        ({"type_v": "q8_0"}, ("f16", "q8_0")),
    ],
)
def test_the_types_that_are_chosen(folder: Path, settings: dict[str, Any], types: tuple[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime = Runtime(write_model(Spec(), folder), n_threads=1, **settings)
    with runtime:
        figures = runtime.generate(PROMPT, raw=True, max_tokens=1, kv_budget=None).figures
        assert (figures.type_k, figures.type_v) == types
        pair = 3 * 2 * 32 * (BYTES[types[0]] + BYTES[types[1]])
        assert figures.kv_bytes_prompt == figures.prompt_tokens * pair
        runtime.kv_budget = "1/4"  # changes nothing of what it is made with
        figures = runtime.generate(PROMPT, raw=True, max_tokens=1).figures
        assert (figures.type_k, figures.type_v, figures.kv_bytes_kept) == (*types, figures.kept_tokens * pair)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (Spec("qwen3", d_head=16), "block size 32 does not divide n_embd_head_k=16"),
        (Spec("qwen3", d_head=48), "block size 32 does not divide n_embd_head_k=48"),
        (gemma4(32, 64), "GGML_ASSERT"),  # llama.cpp would rotate heads of 32 like those of 64
    ],
    ids=["16", "48", "32 and 64"],
)
def test_what_cannot_be_stored_in_them_stays_f16(folder: Path, spec: Spec, reason: str) -> None:
    model = write_model(spec, folder)
    with pytest.warns(RuntimeWarning, match=f"keys are stored in f16, values in f16.*{reason}") as said:
        runtime = Runtime(model, n_threads=1, kv_budget="1/4")
    assert [Path(warning.filename) for warning in said] == [Path(__file__)]
    with runtime:
        figures = runtime.generate(PROMPT, raw=True, max_tokens=1).figures
        assert (figures.type_k, figures.type_v) == ("f16", "f16")
        assert figures.kept_tokens == figures.prompt_tokens // 4
    with pytest.warns(RuntimeWarning, match="keys are stored in f32, values in f16"):
        runtime = Runtime(model, n_threads=1, kv_budget="1/4", type_k="f32")
    with runtime:
        assert (runtime.engine.type_k, runtime.engine.type_v) == ("f32", "f16")


def test_types_that_are_named_are_not_replaced(folder: Path) -> None:
    model = write_model(Spec("qwen3", d_head=48), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime = Runtime(model, n_threads=1, kv_budget="1/4", type_k="q8_0", type_v="q4_0")
    with runtime, pytest.raises(ShiftKVError, match="q8_0/q4_0 KV cache"):
        runtime.generate(PROMPT, raw=True)


@pytest.mark.parametrize(
    ("library", "on_gpu"),
    [
        ("libggml-metal.dylib", "q8_0"),
        ("libggml-cuda.so", "q8_0"),
        ("ggml-cuda.dll", "q8_0"),
        ("libggml-vulkan.so", "q4_0"),
    ],
)
def test_gpus_that_take_keys_and_values_of_one_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str, on_gpu: str
) -> None:
    monkeypatch.setattr(llama_h, "_base_path", tmp_path)
    (tmp_path / library).touch()
    for has_device, n_gpu_layers, type_v in (
        (True, -1, on_gpu),
        (True, 7, on_gpu),
        (True, 0, "q4_0"),
        (False, -1, "q4_0"),
    ):
        monkeypatch.setattr(llama_h, "llama_supports_gpu_offload", lambda has_device=has_device: has_device)
        assert small_kv_types(n_gpu_layers) == ("q8_0", type_v)


# Where budgets are taken. The shipped model has 4 layers with 2 KV heads of 32: 1,024 bytes a pair in f16, 416 else.


@pytest.fixture(scope="module")
def reader(demo: Path) -> Iterator[Runtime]:
    with Runtime(
        demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", n_threads=1, kv_budget="64KiB"
    ) as runtime:
        yield runtime


def message(demo: Path) -> list[dict[str, Any]]:
    picture = {"type": "image_url", "image_url": {"url": str(demo / "document.png")}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": "Read line 2."}]}]


def test_in_python(demo: Path, reader: Runtime) -> None:
    page = [demo / "document.png"]
    answer = reader.generate("Read line 2.", page)
    assert (answer.text, answer.figures.kept_tokens) == ("VOLT 89537", 64 * 1024 // 416)
    n = answer.figures.prompt_tokens
    assert reader.generate("Read line 2.", page, kv_budget="1/8").figures.kept_tokens == n * 1024 // 8 // 416
    reply = reader.create_chat_completion(message(demo), kv_budget="48 KiB")
    assert reply["figures"]["kept_tokens"] == 48 * 1024 // 416
    assert (reply["figures"]["type_k"], reply["figures"]["type_v"]) == ("q8_0", "q4_0")
    rows = [{"messages": message(demo), "kv_budget": budget} for budget in ("40KiB", "1/16", None, "9/8")]
    rows += [{"prompt": "Read line 2.", "images": page}]
    *kept, wrong, own = reader.generate_many(rows, max_tokens=4)
    assert [row.completion.figures.kept_tokens for row in kept] == [40 * 1024 // 416, n * 64 // 416, n]
    assert "kv_budget is '9/8'" in str(wrong.error)
    assert own.completion.figures.kept_tokens == 64 * 1024 // 416


def test_in_sessions(demo: Path, reader: Runtime, tmp_path: Path) -> None:
    page = [demo / "document.png"]
    with reader.session(images=page) as session:
        answer = session.ask("Read line 2.")
        assert answer.figures.kept_tokens == 64 * 1024 // 416
        other = session.ask("Read line 2.", kv_budget="1/8")
        assert other.figures.kept_tokens == other.figures.prompt_tokens * 128 // 416
        held = other.figures.kept_tokens + other.figures.generated_tokens
        further = session.reply("Read line 3.", page, kv_budget="32KiB").figures
        assert further.kept_tokens == held + 32 * 1024 // 416  # of the reply's prompt alone
        held = further.kept_tokens + further.generated_tokens
        last = session.reply("Read line 4.", page, kv_budget="1/8").figures
        n_new = last.prompt_tokens - further.prompt_tokens - further.generated_tokens
        assert last.kept_tokens == held + n_new * 128 // 416
        session.cut("56 kB")
        assert session.selection
        assert session.selection.n_kept == 56_000 // 416
        session.save(tmp_path / "page.kv")
    with reader.load_session(tmp_path / "page.kv", kv_budget="1/8") as session:
        assert session.ask("Read line 2.").figures.kept_tokens > 56_000 // 416
    with reader.session(images=page, kv_budget="1/4") as session:
        figures = session.ask("Read line 2.").figures
        assert figures.kept_tokens == figures.prompt_tokens * 256 // 416


def test_by_layer(demo: Path) -> None:
    files = demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf"
    with Runtime(*files, n_threads=1, kv_budget="1/4", prefill="by-layer") as runtime:
        figures = runtime.generate("Read line 2.", [demo / "document.png"], max_tokens=2).figures
    assert (figures.kept_tokens, figures.type_v) == (figures.prompt_tokens * 256 // 416, "q4_0")
    assert figures.kv_bytes_kept == figures.kept_tokens * 416


def run(capsys: pytest.CaptureFixture[str], demo: Path, *arguments: str) -> tuple[int, str, str]:
    files = ["-m", str(demo / "demo-text-q8_0.gguf"), "--mmproj", str(demo / "demo-mmproj-f16.gguf")]
    page = ["--image", str(demo / "document.png"), "-p", "Read line 2."]
    status = cli.main(["run", *files, *page, "--threads", "1", *arguments])
    return status, *capsys.readouterr()


def test_on_the_command_line(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, demo, "--kv-budget", "64KiB", "--json")
    figures = json.loads(out)["figures"]
    assert (status, figures["kept_tokens"], figures["type_k"], figures["type_v"]) == (0, 157, "q8_0", "q4_0")
    status, _, err = run(capsys, demo, "--kv-budget", "1/8", "--stats", "--type-k", "f16", "--type-v", "f16")
    assert status == 0
    assert "34 per layer and KV head\n" in err
    assert "KV types        keys f16, values f16\n" in err
    status, _, err = run(capsys, demo, "--kv-budget", "100B")
    assert (status, "at least 832 bytes" in err) == (1, True)
    for wrong in ("12apples", "9/8", "1/0"):
        with pytest.raises(SystemExit) as left:
            run(capsys, demo, "--kv-budget", wrong)
        assert left.value.code == 2
        assert f"argument --kv-budget: kv_budget is '{wrong}': it has to be" in capsys.readouterr().err


def test_in_batches_of_files(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bodies = [{}, {"kv_budget": "1/8"}, {"kv_budget": "40KiB"}, {"kv_budget": "1/0"}, {"kv_budget": 50}]
    lines = [
        json.dumps(
            {
                **{"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions"},
                "body": {"messages": message(demo), "max_tokens": 3, **body},
            }
        )
        for i, body in enumerate(bodies)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.jsonl"
    arguments = ["batch", str(tmp_path / "in.jsonl"), "-o", str(out), "--threads", "1"]
    arguments += ["-m", str(demo / "demo-text-q8_0.gguf"), "--mmproj", str(demo / "demo-mmproj-f16.gguf")]
    assert cli.main([*arguments, "--kv-budget", "64KiB"]) == 3
    rows = {row["custom_id"]: row for row in map(json.loads, out.read_text().splitlines())}
    figures = [rows[name]["response"]["body"]["figures"] for name in "0124"]
    assert [one["kept_tokens"] for one in figures] == [157, 275 * 128 // 416, 98, 50]
    assert {(one["type_k"], one["type_v"]) for one in figures} == {("q8_0", "q4_0")}
    assert "kv_budget is '1/0'" in rows["3"]["error"]["message"]
    # Going on with it needs the same budget and types.
    capsys.readouterr()
    for other in (["--kv-budget", "65KiB"], ["--kv-budget", "64KiB", "--type-k", "f16"], ["--kv-budget", "100"]):
        assert cli.main([*arguments, *other]) == 1
        assert "other settings" in capsys.readouterr().err
    assert cli.main([*arguments, "--kv-budget", "64KiB", "--retry-errors"]) == 3


def test_over_http(demo: Path) -> None:
    """As OpenAI's client sends them."""
    files = ["-m", demo / "demo-text-q8_0.gguf", "--mmproj", demo / "demo-mmproj-f16.gguf", "--image-root", demo]
    with (
        serving(*files, "--kv-budget", "64KiB") as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):

        def ask(**options: Any) -> Any:
            return client.chat.completions.create(model="any", messages=message(demo), max_tokens=3, **options)

        assert ask().figures["kept_tokens"] == 157
        for budget, n in (("1/8", 275 * 128 // 416), ("40 KiB", 98), (50, 50), (None, 275)):
            figures = ask(extra_body={"kv_budget": budget}).figures
            assert (figures["kept_tokens"], figures["type_k"], figures["type_v"]) == (n, "q8_0", "q4_0")
        for budget, reason in (("9/8", "kv_budget is '9/8'"), ("0.8kB", "at least 832 bytes"), ("96", "'96'")):
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError, match=reason) as refused:
                    ask(stream=stream, extra_body={"kv_budget": budget})
                assert refused.value.code == "invalid_value"


class Notes(list[str]):
    """What a chat shows beside answers."""

    def note(self, text: str) -> None:
        self.append(text)

    def answer(self, pieces: Generator[str, None, None]) -> None:
        for _ in pieces:
            pass


def test_in_a_chat(demo: Path) -> None:
    files, notes = (demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf"), Notes()

    with (
        Runtime(*files, n_threads=1, kv_budget="64KiB") as runtime,
        Chat(runtime, {"max_tokens": 3}, load_image) as chat,
    ):
        chat.attach([str(demo / "document.png")])
        commands.run(chat, "/budget", notes)
        commands.run(chat, "Read line 2.", notes)
        assert chat.turns[-1].answer.figures.kept_tokens == 157
        commands.run(chat, "/budget 1/8", notes)
        commands.run(chat, "/regen", notes)
        assert chat.turns[-1].answer.figures.kept_tokens == 275 * 128 // 416
        for wrong in ("9/8", "12apples", "1/0", "many"):
            with pytest.raises(SettingError, match=f"{wrong} is no budget: write .* 64MiB.* 1/8, or all"):
                commands.run(chat, f"/budget {wrong}", notes)
        assert runtime.kv_budget == "1/8"
    types = "keys in q8_0, values in q4_0"
    assert notes[0] == f"budget: 64KiB of KV pairs, {types}"
    assert f"budget: 1/8 of the prompt's bytes in f16, {types}; what was read before stays as it is" in notes


def test_types_that_are_named_or_not_are_the_same_settings() -> None:
    """Files of answers that were begun when f16 was the default can be gone on with."""
    from edge_shiftkv.commands.settings import answers_depend_on

    def settings(**given: Any) -> dict[str, Any]:
        runtime = {"model": __file__, "mmproj": None, "kv_budget": 9, "kv_method": None, "type_k": None, "type_v": None}
        return answers_depend_on({**runtime, **given}, {})

    assert settings() == settings(type_k="f16", type_v="f16") == {**settings(), "type_k": "f16", "type_v": "f16"}
    assert settings(kv_budget="1/8") != settings(kv_budget="1/8", type_v="f16")


def test_with_llama(demo: Path) -> None:
    """Bytes are of pairs as the `Llama` stores them."""
    for types, pair in (({}, 1024), ({"type_k": 8, "type_v": 2}, 416)):
        handler = ShiftKVChatHandler(demo / "demo-mmproj-f16.gguf", kv_budget="64KiB", verbose=False)
        llama = Llama(
            str(demo / "demo-text-q8_0.gguf"),
            **{"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False},
            **types,
            chat_handler=handler,
        )
        for budget, n_bytes in (("64KiB", 64 * 1024), ("1/8", 275 * 1024 // 8)):
            handler.kv_budget = budget
            llama.create_chat_completion(message(demo), max_tokens=2)
            assert handler.selection
            assert handler.selection.n_kept == n_bytes // pair
        handler.kv_budget = "1KiB" if pair == 1024 else "831B"
        with pytest.raises(SettingError, match=f"at least {2 * pair} bytes"):
            llama.create_chat_completion(message(demo), max_tokens=2)
        with pytest.raises(SettingError, match="kv_budget is '9/8'"):
            handler.kv_budget = "9/8"
        llama.close()


def test_slots_are_as_long_as_the_bytes_say(reader: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    context = reader.engine.context
    monkeypatch.setattr(
        reader.engine, "context", lambda n_ctx, *rest, **names: (made.append(n_ctx), context(n_ctx, *rest, **names))[1]
    )
    for budget, n in (("64KiB", 157), ("512KiB", 1260), ("1/8", 2048), (96, 96), (0.5, 2048)):
        made.clear()
        choose_parallel(reader.engine, 4096, budget, {"max_tokens": 40})
        assert set(made) == {n + 40}


def test_rows_that_numpy_reads(folder: Path) -> None:
    """The sizes here are those of the format's own library."""
    for name, size in BYTES.items():
        n, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
        assert n_bytes / n == size
