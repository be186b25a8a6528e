"""A request ends when it is no longer wanted: inside a computation, too, of which one takes minutes on a CPU."""

import multiprocessing
import os
import pickle
import signal
import threading
from contextlib import closing

import pytest
from support.threads import in_a_thread

from edge_shiftkv import CancelledError, Runtime, ShiftKVError, TimeLimitError
from edge_shiftkv.native import calls, logs
from edge_shiftkv.native.calls import Interrupt
from edge_shiftkv.native.llama import Context, Model

PROMPT = "What is on the picture? " * 3
N_ASKED = 5


class Impatient(Interrupt):
    """Is asked at every node of a graph, and at the fifth question does something."""

    def __init__(self, then):
        self.n_asked = 0
        self._then = then
        super().__init__()
        self._poll.interval_us = 0

    def _ask(self, data):
        self.n_asked += 1
        if self.n_asked == N_ASKED:
            self._then(self)
        return super()._ask(data)


def sigint(_interrupt):
    signal.raise_signal(signal.SIGINT)


ENDS = [(Interrupt.cancel, CancelledError), (sigint, KeyboardInterrupt)]


@pytest.mark.parametrize(("then", "error"), ENDS)
def test_a_batch_that_is_computed_ends_early(tiny, then, error):
    with closing(Model(tiny.text, 0)) as model:
        tokens = model.tokenize(PROMPT)
        interrupt = Impatient(then)
        options = {"type_k": "f16", "type_v": "f16", "n_threads": 2}
        with closing(Context(model, 256, 256, **options, interrupt=interrupt)) as context:
            with pytest.raises(error):
                context.decode(tokens, 0)
            assert interrupt.n_asked == N_ASKED  # and no node after that
            interrupt.begin()
            context.clear()
            context.decode(tokens, 0)
            after = context.logits().copy()
        with closing(Context(model, 256, 256, **options)) as context:
            context.decode(tokens, 0)
            assert (context.logits() == after).all()


@pytest.mark.parametrize(("then", "error"), ENDS)
@pytest.mark.parametrize("where", ["encoder", "selection"])
def test_the_other_computations_end_early(tiny, monkeypatch, where, then, error):
    made, n_asked = [], []

    def impatient():
        made.append(Impatient(lambda interrupt: None))
        return made[-1]

    monkeypatch.setattr("edge_shiftkv.engine.engine.Interrupt", impatient)
    step = {
        "encoder": "edge_shiftkv.native.mtmd.mtmd.mtmd_encode_chunk",
        "selection": "edge_shiftkv.native.shiftkv._select",
    }
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24, image_cache=0) as runtime:
        expected = runtime.generate(PROMPT, [tiny.picture], max_tokens=8).text
        (interrupt,) = made
        module, name = step[where].rsplit(".", 1)
        owner = __import__(module.removesuffix(".mtmd") if where == "encoder" else module, fromlist=["x"])
        owner = owner.mtmd if where == "encoder" else owner
        plain = getattr(owner, name)

        def watched(*arguments):
            interrupt.n_asked, interrupt._then = 0, then
            try:
                return plain(*arguments)
            finally:
                n_asked.append(interrupt.n_asked)
                interrupt._then = lambda interrupt: None

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, watched)
            with pytest.raises(error):
                runtime.generate(PROMPT, [tiny.picture], max_tokens=8)
        assert n_asked == [N_ASKED]
        assert runtime.generate(PROMPT, [tiny.picture], max_tokens=8).text == expected


@pytest.mark.parametrize("kv_budget", [None, 24])
def test_cancel_from_another_thread(tiny, kv_budget):
    reports = []

    def progress(what, done, total):
        reports.append((what, done, total))
        if cancelling and what == "prompt":
            in_a_thread(runtime.cancel)

    cancelling = False
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=kv_budget, progress=progress) as runtime:
        runtime.cancel()  # there is nothing to cancel yet
        expected = runtime.generate(PROMPT, [tiny.picture], max_tokens=16)
        runtime.generate("Something else.", max_tokens=1)  # nothing of the prompt is held any more
        cancelling = True
        del reports[:]
        with pytest.raises(CancelledError, match="was cancelled"):
            runtime.generate(PROMPT, [tiny.picture], max_tokens=16)
        n_prompt = expected.figures.prompt_tokens
        assert len(reports) == 1
        assert reports[0][1] < reports[0][2] == n_prompt
        cancelling = False
        assert runtime.generate(PROMPT, [tiny.picture], max_tokens=16).text == expected.text


def test_cancelling_a_stream_between_two_pieces(runtime):
    expected = list(runtime.stream(PROMPT, max_tokens=16))
    stream = runtime.stream(PROMPT, max_tokens=16)
    pieces = [next(stream)]
    in_a_thread(stream.cancel)
    with pytest.raises(CancelledError):
        pieces.extend(stream)
    assert pieces == expected[:1]
    assert list(runtime.stream(PROMPT, max_tokens=16)) == expected
    following = runtime.stream(PROMPT, max_tokens=16)
    pieces = [next(following)]
    stream.cancel()  # of a request that is over: the next one is not ended by it
    assert pieces + list(following) == expected


def test_a_time_limit(runtime, monkeypatch):
    now = 100.0
    monkeypatch.setattr(calls.time, "monotonic", lambda: now)
    expected = runtime.generate(PROMPT, max_tokens=16, time_limit=10.0).text
    stream = runtime.stream(PROMPT, max_tokens=16, time_limit=10.0)
    pieces = [next(stream), next(stream)]
    now = 110.0
    with pytest.raises(TimeLimitError, match="its time limit of 10 s"):
        next(stream)
    assert expected.startswith("".join(pieces))
    assert runtime.generate(PROMPT, max_tokens=16, time_limit=10.0).text == expected


@pytest.mark.parametrize("close", ["runtime", "stream"])
def test_closing_waits_for_a_request_that_it_cancels(tiny, monkeypatch, close):
    at_work, outcome = threading.Event(), []
    from edge_shiftkv.engine import Slot

    advance = Slot.advance

    def slowly(self, token):
        at_work.set()
        threading.Event().wait(0.001)
        return advance(self, token)

    def work():
        try:
            outcome.extend(stream)
        except CancelledError as error:
            outcome.append(error)

    monkeypatch.setattr(Slot, "advance", slowly)
    with Runtime(tiny.text, n_threads=1) as runtime:
        stream = runtime.stream(PROMPT, max_tokens=900)
        thread = threading.Thread(target=work)
        thread.start()
        assert at_work.wait(30)
        (runtime if close == "runtime" else stream).close()
        thread.join(30)
        assert isinstance(outcome[-1], CancelledError)
        if close == "stream":
            assert runtime.generate(PROMPT, max_tokens=2).text


def test_a_runtime_that_is_closed_by_its_own_request_says_so(tiny):
    def progress(what, done, total):
        if what == "prompt":
            runtime.close()

    with (
        Runtime(tiny.text, n_threads=1, progress=progress) as runtime,
        pytest.raises(ShiftKVError, match="cannot wait for a request of its own thread"),
    ):
        runtime.generate(PROMPT, max_tokens=2)


def test_loading_reports_its_progress_and_ends_when_that_raises(tiny):
    reports = []
    with Runtime(tiny.text, tiny.mmproj, draft=tiny.text, n_threads=1, progress=lambda *report: reports.append(report)):
        pass
    for what, path in (("model", tiny.text), ("mmproj", tiny.mmproj), ("draft", tiny.text)):
        shares = [done for kind, done, total in reports if kind == what]
        assert shares == sorted(shares)
        assert shares[-1] == path.stat().st_size
        assert {total for kind, _, total in reports if kind == what} == {path.stat().st_size}

    def fail(what, *_):
        raise LookupError(what)

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(LookupError, match="model"):
        Runtime(tiny.text, progress=fail)
    with pytest.raises(KeyboardInterrupt):
        Runtime(tiny.text, progress=interrupt)


def child(runtime, connection):
    try:
        runtime.generate(PROMPT, max_tokens=2)
        runtime.close()
    except ShiftKVError as error:
        runtime.close()
        connection.send(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_told(tiny):
    with Runtime(tiny.text, n_threads=2) as runtime:
        expected = runtime.generate(PROMPT, max_tokens=4).text
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=child, args=(runtime, theirs))
        process.start()
        process.join(60)
        hung = process.is_alive()
        process.kill()
        assert not hung
        assert ours.poll(0)
        assert "was loaded before this process was forked" in ours.recv()
        assert runtime.generate(PROMPT, max_tokens=4).text == expected


def test_a_runtime_cannot_be_pickled(runtime):
    with pytest.raises(TypeError, match="a runtime cannot be pickled: make one in the process"):
        pickle.dumps(runtime)
    with pytest.raises(TypeError, match="a model cannot be pickled"):
        pickle.dumps(runtime.engine.model)


def test_the_errors_of_two_threads_do_not_mix():
    both_in, both_logged = threading.Barrier(2), threading.Barrier(2)
    seen = {}

    def work(name):
        with calls.native_call() as errors:
            both_in.wait(30)
            logs._callback(4, f"error of {name}".encode(), None)
            logs._callback(5, f"more of {name}".encode(), None)
            both_logged.wait(30)
            seen[name] = list(errors)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {name: [f"error of {name}", f"more of {name}"] for name in "ab"}
