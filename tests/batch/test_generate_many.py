"""Many requests are answered as each by itself, and what goes wrong with one stays with it."""

from __future__ import annotations

import gc
import itertools
import signal
import threading
import time

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from demo_documents import make_document
from support.cases import GEMMA3, MAMBA
from support.gguf_random import write_model
from support.threads import in_a_thread

from edge_shiftkv import (
    METHODS,
    BusyError,
    CancelledError,
    ClosedError,
    ContextOverflowError,
    ImageError,
    PromptError,
    Runtime,
    SettingError,
    ShiftKVError,
    TimeLimitError,
)
from edge_shiftkv.batch.slots import Slots
from edge_shiftkv.engine import Engine
from edge_shiftkv.native.llama import Context
from edge_shiftkv.native.mtmd import Projector
from edge_shiftkv.speculative.options import DraftOptions

NO_END = {257: -100.0}  # the token that ends the demo model's answers
PROMPT = "What is on the picture? " * 3
BUDGETS = (None, 64, 0.5, 96)


def alone(runtime, row):
    options = {name: value for name, value in row.items() if name not in ("prompt", "images")}
    return runtime.generate(row["prompt"], row.get("images", ()), **options)


def essence(completion):
    """All of an answer but the time it took."""
    figures = completion.figures
    kept = completion.selection and {
        layer: [completion.selection.kept(layer, head).tolist() for head in range(2)]
        for layer in completion.selection.layers
    }
    counts = (figures.prompt_tokens, figures.text_tokens, figures.image_tokens, figures.kept_tokens)
    sizes = (figures.generated_tokens, figures.kv_bytes_prompt, figures.kv_bytes_kept)
    assert (figures.tokens_per_second is None) == (figures.decode_s == 0)
    if figures.decode_s:  # an end that is no token of the answer took a pass, too
        assert 0 <= round(figures.decode_s * figures.tokens_per_second) - figures.generated_tokens + 1 <= 1
    return completion.text, completion.finish_reason, counts, sizes, kept, completion.logprobs


class LastQuery:
    n_query = 1

    def scores(self, captured, budget):
        result = {}
        for layer in captured.layers:
            keys = captured.keys(layer)
            query = captured.queries(layer)[-1].reshape(len(keys), -1, keys.shape[-1])
            result[layer] = np.einsum("hgd,hnd->hn", query, keys)
        return result


def mixed_rows():
    """Pictures and none, in runs and mixed; budgets and none; methods, seeds, stop strings, lengths."""
    documents = [make_document(seed) for seed in range(7)]
    methods = [None, *METHODS, LastQuery()]
    rows = []
    for i in range(30):
        document = documents[i // 2 % 7]
        questions = document.questions()
        row = {"prompt": questions[i % len(questions)].question, "max_tokens": (8, 60, 200, 1, None)[i % 5]}
        if i % 5 != 3:
            row["images"] = [document.pil_image()]
        row |= {"kv_budget": BUDGETS[i // 3 % 4], "kv_method": methods[i % len(methods)]}
        if i % 3 == 0:
            row |= {"temperature": 1.0, "seed": i}
        if i % 4 == 1:
            row |= {"stop": ["0", "E"]}
        if i % 7 == 5:
            row |= {"repeat_penalty": 1.5}
        if i % 9 == 2:
            row |= {"json_schema": {"type": "object", "properties": {"a": {"enum": ["x", "yes"]}}, "required": ["a"]}}
        if i % 6 == 4:
            row |= {"logprobs": 3}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def seeing(demo):
    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", n_threads=1, image_cache=0) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def rows():
    return mixed_rows()


@pytest.fixture(scope="module")
def expected(seeing, rows):
    answers = [essence(alone(seeing, row)) for row in rows]
    assert {answer[1] for answer in answers} == {"stop", "length"}
    assert len({answer[0] for answer in answers}) > 15
    return answers


@pytest.fixture
def passes(monkeypatch):
    """The rows of each pass over the weights."""
    seen = []
    decode_rows = Context.decode_rows
    monkeypatch.setattr(
        Context, "decode_rows", lambda self, rows: (seen.append(list(rows)), decode_rows(self, rows))[1]
    )
    return seen


class Alive:
    """Contexts that were made, and that are there."""

    def __init__(self, monkeypatch):
        self.made = self.freed = 0
        make, free = llama.llama_init_from_model, llama.llama_free

        def counted_make(*arguments):
            self.made += 1
            return make(*arguments)

        def counted_free(pointer):
            self.freed += 1
            free(pointer)

        monkeypatch.setattr(llama, "llama_init_from_model", counted_make)
        monkeypatch.setattr(llama, "llama_free", counted_free)

    @property
    def n(self):
        return self.made - self.freed


@pytest.fixture
def contexts(monkeypatch):
    gc.collect()
    return Alive(monkeypatch)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("n_parallel", [1, 3, 8])
def test_answers_are_those_of_one_by_one(seeing, rows, expected, passes, contexts, n_parallel, ordered):
    results = list(seeing.generate_many(iter(rows), n_parallel=n_parallel, ordered=ordered))
    assert [result.error for result in results] == [None] * len(rows)
    if ordered:
        assert [result.index for result in results] == list(range(len(rows)))
    for result in results:
        assert result.request is rows[result.index]
        assert essence(result.completion) == expected[result.index]
    assert sorted(result.index for result in results) == list(range(len(rows)))
    sizes = [len(one) for one in passes]
    assert max(sizes) == n_parallel
    n_generated = sum(answer[3][0] for answer in expected)
    assert n_generated - len(rows) <= sum(sizes) <= n_generated
    assert contexts.n == 0


def test_results_come_as_they_are_there_unless_their_order_matters(seeing):
    rows = [{"prompt": "Read everything.", "max_tokens": n, "logit_bias": NO_END} for n in (40, 1, 20, 2, 3, 4)]
    assert [result.index for result in seeing.generate_many(rows, n_parallel=3, ordered=False)] == [1, 3, 4, 5, 2, 0]
    assert [result.index for result in seeing.generate_many(rows, n_parallel=3)] == [0, 1, 2, 3, 4, 5]


def test_slots_are_given_to_the_next_as_they_get_free(seeing, passes):
    lengths = np.random.default_rng(0).integers(1, 14, 25).tolist()
    rows = [{"prompt": f"Read line {i % 16}.", "max_tokens": n, "logit_bias": NO_END} for i, n in enumerate(lengths)]
    assert len(list(seeing.generate_many(rows, n_parallel=4, ordered=False))) == len(rows)
    left, live, schedule = [n - 1 for n in lengths if n > 1], [], []  # the first token is the prompt's
    while left or live:
        while left and len(live) < 4:
            live.append(left.pop(0))
        schedule.append(len(live))
        live = [n - 1 for n in live if n > 1]
    assert [len(one) for one in passes] == schedule


def test_options_of_the_call_are_those_of_requests_that_have_none(seeing):
    message = {"role": "user", "content": "Read line 2."}
    body = {"messages": [message], "max_completion_tokens": 3, "model": "any", "logprobs": True}
    rows = [{"prompt": "Read line 2."}, {"messages": [message]}, body, {"prompt": "Line 2:", "raw": True}]
    results = list(seeing.generate_many(rows, max_tokens=5, temperature=1.0, seed=3, logprobs=1))
    own = ({}, {}, {"max_tokens": 3, "logprobs": 0}, {"raw": True})
    for result, options in zip(results, own, strict=True):
        prompt = result.request.get("prompt", message["content"])
        one = seeing.generate(prompt, **{"max_tokens": 5, "temperature": 1.0, "seed": 3, "logprobs": 1, **options})
        assert essence(result.completion) == essence(one)


WRONG = [
    ({"prompt": "?", "images": ["missing.png"]}, ImageError, "missing.png: No such file"),
    ({"prompt": "word " * 2000}, ContextOverflowError, "leaves no room"),
    ({"prompt": "?", "max_tokens": 0}, SettingError, "max_tokens is 0"),
    ({"prompt": "?", "max_token": 5}, SettingError, "unknown option 'max_token'"),
    ({"prompt": "?", "temperature": "hot"}, SettingError, "hot"),
    ({"prompt": "?", "logit_bias": {10**6: 1.0}}, SettingError, "the model's tokens are"),
    ({"prompt": "?", "kv_method": "none such"}, SettingError, "none such"),
    ({"prompt": ""}, PromptError, "empty"),
    ({}, PromptError, "empty"),
    ({"prompt": "?", "messages": []}, PromptError, "has its text and its pictures in them"),
    ({"messages": []}, PromptError, "messages is empty"),
    ({"messages": [3]}, PromptError, "has to be an object with role and content"),
    ({"messages": [{"role": "user", "content": "?"}], "n": 2}, SettingError, "n=2 is not supported"),
    ({"messages": [{"role": "user", "content": "?"}], "stream": True}, SettingError, "answers come whole"),
    ({"prompt": "?", "grammar": "root ::= nowhere"}, SettingError, "grammar"),
    ({"messages": [{"role": "king", "content": "?"}]}, PromptError, "role 'king'"),
    ({"prompt": "?", "images": "page.png"}, PromptError, "has to be a list"),
    ({"prompt": 7}, PromptError, "has to be text"),
    ({"prompt": "?", "images": [3]}, PromptError, "a picture has to be"),
    ("Read everything.", PromptError, "has to be a mapping"),
    (None, PromptError, "has to be a mapping"),
]


def test_what_is_wrong_with_a_request_is_its_own_error(seeing):
    good = {"prompt": "Read line 3.", "max_tokens": 6}
    one = essence(alone(seeing, good))
    rows = [row for wrong, _, _ in WRONG for row in (good, wrong)] + [good]
    results = list(seeing.generate_many(rows, n_parallel=3))
    assert [result.index for result in results] == list(range(len(rows)))
    for result in results[::2]:
        assert essence(result.completion) == one
    for result, (wrong, kind, message) in zip(results[1::2], WRONG, strict=True):
        assert result.completion is None
        assert result.request is wrong
        assert isinstance(result.error, kind), repr(result.error)
        assert result.error.__traceback__ is None  # it would hold pictures
        with pytest.raises(kind, match=message):
            raise result.error


def test_what_is_wrong_with_the_call_is_raised_at_once(seeing, tiny):
    pulled = []
    rows = (pulled.append(i) for i in range(9))
    for options, kind in (
        ({"n_parallel": 0}, SettingError),
        ({"n_parallel": 257}, SettingError),
        ({"n_parallel": 2.5}, SettingError),
        ({"max_token": 5}, TypeError),
        ({"top_p": 0.0}, SettingError),
        ({"logit_bias": {10**6: 1.0}}, SettingError),
    ):
        with pytest.raises(kind):
            seeing.generate_many(rows, **options)
    with Runtime(tiny.text, draft=tiny.text, draft_options=DraftOptions(), n_threads=1) as runtime:
        with pytest.raises(SettingError, match="drafting = None"):
            runtime.generate_many(rows)
        drafting, runtime.drafting = runtime.drafting, None
        assert len(list(runtime.generate_many([{"prompt": PROMPT, "max_tokens": 3}]))) == 1
        runtime.drafting = drafting
    assert not pulled


def test_what_the_iterator_raises_comes_after_the_answers(seeing, contexts):
    def rows():
        for i in range(4):
            yield {"prompt": f"Read line {i}.", "max_tokens": 4}
        raise LookupError("the source is gone")

    results = []
    with pytest.raises(LookupError, match="the source is gone"):
        for result in seeing.generate_many(rows(), n_parallel=2):
            results.append(result)
    assert [result.index for result in results if result.completion] == [0, 1, 2, 3]
    assert contexts.n == 0


def endless(pulled, **options):
    for i in itertools.count():
        pulled.append(i)
        yield {"prompt": f"Read line {i % 16}.", "max_tokens": 5, **options}


@pytest.mark.parametrize("ordered", [True, False])
def test_an_endless_iterator_is_taken_from_as_far_as_needed(seeing, contexts, ordered):
    pulled = []
    batch = seeing.generate_many(endless(pulled), n_parallel=3, ordered=ordered)
    assert not pulled
    results = list(itertools.islice(batch, 5))
    assert len(results) == 5
    assert len(pulled) <= 5 + 3 + 4
    assert contexts.n == 2
    batch.close()
    batch.close()
    assert contexts.n == 0
    with pytest.raises(StopIteration):
        next(batch)
    for _ in seeing.generate_many(endless(pulled)):
        break  # dropped
    gc.collect()
    assert contexts.n == 0


def test_a_long_answer_does_not_have_endless_ones_wait_for_it(seeing):
    """With results in their order, requests are begun only so far ahead of the first one that is open."""
    pulled = []
    long = {"prompt": "Read everything.", "max_tokens": 600, "logit_bias": NO_END}
    batch = seeing.generate_many(itertools.chain([long], endless(pulled)), n_parallel=2)
    assert next(batch).completion.figures.generated_tokens == 600
    assert len(pulled) <= 4 * 2 + 4
    batch.close()


def test_finishing_answers_what_was_begun(seeing, contexts):
    pulled = []
    batch = seeing.generate_many(endless(pulled), n_parallel=3)
    results = [next(batch)]
    batch.finish()
    results += batch
    assert [result.index for result in results] == list(range(len(results)))
    assert 1 < len(results) < len(pulled)
    assert contexts.n == 0


def test_memory_is_that_of_two_contexts(seeing, contexts):
    assert seeing.engine.can_cut
    contexts.made = contexts.freed = 0
    rows = [{"prompt": f"Read line {i % 16}." * (1 + i % 3), "max_tokens": 4} for i in range(40)]
    assert sum(result.completion is not None for result in seeing.generate_many(rows, n_parallel=4)) == 40
    assert contexts.made == 2


def test_a_request_that_needs_more_than_a_slot_has_waits_for_a_larger_one(seeing, contexts, passes):
    lengths = [4, 300, 4, 560, 4, 900, 4, 4]
    rows = [{"prompt": f"Read line {i}.", "max_tokens": n} for i, n in enumerate(lengths)]
    expected = [essence(alone(seeing, row)) for row in rows]
    assert seeing.engine.can_cut
    made = contexts.made
    results = list(seeing.generate_many(rows, n_parallel=3))
    assert [essence(result.completion) for result in results] == expected
    assert contexts.made - made == 1 + 4  # of 256, 512, 768 and 1024 cells


def test_a_request_that_there_is_no_memory_for_is_an_error(seeing, monkeypatch):
    context = Engine.context

    def limited(self, n_ctx, *arguments, n_seq=1, **options):
        if n_seq * n_ctx > 1200:
            raise ShiftKVError("no context of that size")
        return context(self, n_ctx, *arguments, n_seq=n_seq, **options)

    monkeypatch.setattr(Engine, "context", limited)
    lengths = [4, 4, 900, 4, 4]
    rows = [{"prompt": f"Read line {i}.", "max_tokens": n} for i, n in enumerate(lengths)]
    results = list(seeing.generate_many(rows, n_parallel=3))
    assert [str(result.error) for result in results if result.error] == ["no context of that size"]
    assert results[2].completion is None


def test_requests_about_the_same_picture_read_it_once(seeing, monkeypatch):
    encoded, read = [], []
    encode, decode = Projector.encode, Context.decode
    monkeypatch.setattr(Projector, "encode", lambda self, chunk: (encoded.append(1), encode(self, chunk)))
    monkeypatch.setattr(
        Context, "decode", lambda self, tokens, *a, **k: (read.append(len(tokens)), decode(self, tokens, *a, **k))
    )
    pages = [make_document(seed).pil_image() for seed in range(3)]
    rows = [
        {"prompt": question, "images": [page], "max_tokens": 5, "kv_budget": budget, "kv_method": "snapkv"}
        for page in pages
        for question, budget in (("Read line 4.", 64), ("List all values.", 64), ("Read line 9.", None))
    ]
    expected = [essence(alone(seeing, row)) for row in rows]
    assert len(encoded) == 9
    encoded.clear()
    results = list(seeing.generate_many(rows, n_parallel=4))
    assert len(encoded) == 3
    assert [essence(result.completion) for result in results] == expected


@pytest.mark.parametrize("kind", ["tiled", "qwen", "gemma3", "mamba"])
def test_other_memories(tiny, tmp_path, passes, kind):
    """Windows, M-RoPE, tiles; and a recurrent model, of which one answer is written at a time."""
    files = {
        "tiled": lambda: (tiny.text, tiny.tiled_mmproj),
        "qwen": lambda: (tiny.qwen_text, tiny.qwen_mmproj),
        "gemma3": lambda: (write_model(GEMMA3, tmp_path),),
        "mamba": lambda: (write_model(MAMBA, tmp_path),),
    }[kind]()
    with Runtime(*files, n_threads=1) as runtime:
        images = [tiny.picture] if runtime.engine.projector else []
        rows = [
            {"prompt": f"{i} " + PROMPT * (1 + i % 2), "images": images, "max_tokens": 12, "kv_budget": budget}
            for i, budget in enumerate((None, 24, 0.5, 40, None, 32))
        ]
        if kind == "mamba":
            errors = list(runtime.generate_many(rows[1:2]))
            with pytest.raises(ShiftKVError, match="a kv_budget cannot be used with this model"):
                raise errors[0].error
            rows = [{**row, "kv_budget": None} for row in rows]
        expected = [essence_of_text(alone(runtime, row)) for row in rows]
        # The arithmetic of weights in F32 depends on what is computed beside a token.
        results = list(runtime.generate_many(rows, n_parallel=4 if kind == "mamba" else 1))
        assert [result.error for result in results] == [None] * len(rows)
        assert [essence_of_text(result.completion) for result in results] == expected
        assert max(map(len, passes)) == 1
        assert all(result.completion for result in runtime.generate_many(rows, n_parallel=4))
        assert max(map(len, passes)) == (1 if kind == "mamba" else 4)


def essence_of_text(completion):
    return completion.text, completion.finish_reason, completion.figures.kept_tokens


@pytest.fixture
def at_step(monkeypatch):
    """Have something done before the n-th pass."""

    def at(n, then):
        steps, step = itertools.count(1), Slots.step

        def stepping(self):
            if next(steps) == n:
                then(self)
            step(self)

        monkeypatch.setattr(Slots, "step", stepping)

    return at


ROWS = [{"prompt": f"Read line {i}.", "max_tokens": 12, "logit_bias": NO_END} for i in range(7)]


@pytest.mark.parametrize("end", ["cancel", "sigint"])
def test_cancel_and_ctrl_c_end_it(seeing, contexts, at_step, end):
    expected = essence(alone(seeing, ROWS[0]))
    before = contexts.n
    ends = {"cancel": seeing.cancel, "sigint": lambda: signal.raise_signal(signal.SIGINT)}
    at_step(15, lambda slots: in_a_thread(ends[end]) if end == "cancel" else ends[end]())
    batch = seeing.generate_many(ROWS, n_parallel=2)
    results = [next(batch), next(batch)]
    with pytest.raises(CancelledError if end == "cancel" else KeyboardInterrupt):
        next(batch)
    assert contexts.n == before
    assert essence(results[0].completion) == expected == essence(alone(seeing, ROWS[0]))


def test_another_request_takes_its_place_and_another_thread_has_to_wait(seeing, at_step):
    errors = []

    def ask(_slots):
        def work():
            try:
                seeing.generate("Read line 1.", max_tokens=1)
            except BusyError as error:
                errors.append(error)

        in_a_thread(work)

    at_step(3, ask)
    batch = seeing.generate_many(ROWS, n_parallel=2)
    next(batch)
    assert len(errors) == 1
    seeing.generate("Read line 1.", max_tokens=1)
    with pytest.raises(ClosedError, match="the batch was ended"):
        next(batch)


def test_closing_the_runtime_ends_it(tiny):
    with Runtime(tiny.text, n_threads=1) as runtime:
        batch = runtime.generate_many([{"prompt": PROMPT, "max_tokens": n} for n in (2, 50, 60)], n_parallel=2)
        next(batch)
    with pytest.raises(ClosedError):
        next(batch)


def test_a_time_limit_is_that_of_one_request(seeing, monkeypatch, at_step, passes):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def later(_slots):
        nonlocal now
        now += 50.0

    at_step(5, later)
    rows = [ROWS[1], {**ROWS[2], "time_limit": 100.0}, {**ROWS[0], "time_limit": 10.0}]
    results = list(seeing.generate_many(rows, n_parallel=3))
    with pytest.raises(TimeLimitError, match="its time limit of 10 s"):
        raise results[2].error
    assert [result.completion is not None for result in results] == [True, True, False]
    assert [len(one) for one in passes] == [3] * 4 + [2] * 7
    assert results[0].completion.text == alone(seeing, ROWS[1]).text


def test_a_time_limit_ends_reading(seeing, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    decode = Context.decode

    def slowly(self, tokens, *arguments, **options):
        nonlocal now
        now += 20.0 if len(tokens) > 100 else 0.0
        decode(self, tokens, *arguments, **options)

    expected = alone(seeing, ROWS[1]).text
    monkeypatch.setattr(Context, "decode", slowly)
    rows = [ROWS[1], {"prompt": "Read line 3. " * 20, "time_limit": 10.0}, ROWS[1]]
    results = list(seeing.generate_many(rows, n_parallel=2))
    assert isinstance(results[1].error, TimeLimitError)
    assert [results[0].completion.text, results[2].completion.text] == [expected] * 2


def test_after_a_pass_that_failed_each_is_tried_alone(seeing, contexts, at_step, passes):
    expected = [essence(alone(seeing, row)) for row in ROWS]
    before = contexts.n

    def fail(_slots):
        raise ShiftKVError("llama_decode failed with status -3")

    at_step(5, fail)
    results = list(seeing.generate_many(ROWS, n_parallel=3))
    assert [essence(result.completion) for result in results] == expected
    sizes = [len(one) for one in passes]
    assert sizes[:4] == [3] * 4
    assert sizes[4 : 4 + 33] == [1] * 33
    assert max(sizes[4 + 33 :]) == 3
    assert contexts.n == before


def test_a_request_that_fails_alone_too_is_an_error(seeing, monkeypatch):
    expected = [essence(alone(seeing, row)) for row in ROWS]
    step = Slots.step

    def stepping(self):
        if any(job.row.index == 2 and job.steps == 4 for job in self.jobs):
            raise ShiftKVError("llama_decode failed with status -3")
        step(self)

    monkeypatch.setattr(Slots, "step", stepping)
    results = list(seeing.generate_many(ROWS, n_parallel=3))
    assert [result.index for result in results if result.error] == [2]
    for result in results:
        if not result.error:
            assert essence(result.completion) == expected[result.index]


def test_a_prompt_that_cannot_be_read_is_an_error(seeing, monkeypatch):
    """And what comes after it is not read on from what it left."""
    expected = [essence(alone(seeing, row)) for row in ROWS]
    calls, decode = itertools.count(), Context.decode

    def failing(self, tokens, *arguments, **options):
        if next(calls) == 2:
            decode(self, [5] * len(tokens), *arguments, **options)
            raise ShiftKVError("llama_decode failed with status -3")
        decode(self, tokens, *arguments, **options)

    monkeypatch.setattr(Context, "decode", failing)
    results = list(seeing.generate_many(ROWS, n_parallel=3))
    assert [result.index for result in results if result.error] == [2]
    assert [essence(result.completion) for result in results if not result.error] == expected[:2] + expected[3:]


def test_pictures_are_loaded_ahead_by_another_thread(seeing, monkeypatch, demo):
    threads = set()
    from edge_shiftkv import runtime as module

    load = module.load_image
    monkeypatch.setattr(
        module, "load_image", lambda *a, **k: (threads.add(threading.current_thread().name), load(*a, **k))[1]
    )
    rows = [{"prompt": "Read line 3.", "images": [demo / "document.png"], "max_tokens": 3}] * 6
    assert all(result.completion for result in seeing.generate_many(rows, n_parallel=2))
    assert len(threads) == 1
    assert threads != {threading.current_thread().name}
    assert not [thread for thread in threading.enumerate() if thread.name in threads and not _ends(thread)]


def _ends(thread):
    thread.join(10)
    return not thread.is_alive()
