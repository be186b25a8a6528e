"""Whatever ends a request early, the runtime serves the next one."""

import gc
import logging
import signal
import threading
import weakref

import pytest

from edge_shiftkv import BusyError, ClosedError, Runtime, ShiftKVError
from edge_shiftkv.native import calls, logs

PROMPT = "What is on the picture? " * 3


@pytest.fixture(params=[None, 24])
def expected(request, runtime):
    """The answer to PROMPT, which a runtime in order gives again."""
    runtime.kv_budget = request.param
    return runtime.generate(PROMPT, max_tokens=16).text


def test_ctrl_c_in_the_consumer(runtime, expected):
    with pytest.raises(KeyboardInterrupt):
        for i, _ in enumerate(runtime.stream(PROMPT, max_tokens=16)):
            if i == 2:
                signal.raise_signal(signal.SIGINT)
    assert runtime.generate(PROMPT, max_tokens=16).text == expected


@pytest.mark.parametrize(
    "where", ["edge_shiftkv.engine.slot.Slot.advance", "edge_shiftkv.native.mtmd.Projector.encode"]
)
def test_ctrl_c_inside(runtime, tiny, expected, monkeypatch, where):
    with monkeypatch.context() as patch:
        patch.setattr(where, lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            runtime.generate(PROMPT, [tiny.picture], max_tokens=16)
    assert runtime.generate(PROMPT, max_tokens=16).text == expected


@pytest.mark.parametrize(
    "where",
    [
        "edge_shiftkv.engine.slot.Slot.advance",
        "edge_shiftkv.native.mtmd.Projector.decode",
        "edge_shiftkv.native.shiftkv.select",
        "edge_shiftkv.native.shiftkv.compact",
        "edge_shiftkv.native.shiftkv.kept",
    ],
)
def test_an_error_inside(runtime, tiny, monkeypatch, where):
    runtime.kv_budget = 24
    expected = runtime.generate(PROMPT, [tiny.picture], max_tokens=16).text

    def fail(*_):
        raise ShiftKVError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(ShiftKVError, match="out of order"):
            runtime.generate(PROMPT, [tiny.picture], max_tokens=16)
    assert runtime.generate(PROMPT, [tiny.picture], max_tokens=16).text == expected


def test_a_stream_can_be_closed_early(runtime, expected):
    with runtime.stream(PROMPT, max_tokens=16) as stream:
        next(stream)
    assert list(stream) == []
    with pytest.raises(ShiftKVError, match="not complete"):
        _ = stream.completion
    assert runtime.generate(PROMPT, max_tokens=16).text == expected


def test_a_new_request_ends_a_stream_that_still_runs(runtime, expected):
    stream = runtime.stream(PROMPT, max_tokens=16)
    next(stream)
    assert runtime.generate(PROMPT, max_tokens=16).text == expected
    with pytest.raises(ClosedError, match="another request"):
        next(stream)


def test_a_complete_stream_stays_readable(runtime):
    stream = runtime.stream(PROMPT, max_tokens=4)
    text = "".join(stream)
    runtime.generate(PROMPT, max_tokens=1)
    assert list(stream) == []
    assert stream.completion.text == text


def test_a_request_while_another_thread_is_at_work_is_refused(runtime, expected, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    advance = runtime.engine.model.ends_generation

    def wait(token):
        started.set()
        go_on.wait(10)
        return advance(token)

    answers = []
    thread = threading.Thread(target=lambda: answers.append(runtime.generate(PROMPT, max_tokens=16).text))
    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine.model, "ends_generation", wait)
        thread.start()
        started.wait(10)
        with pytest.raises(BusyError, match="busy in another thread"):
            runtime.generate(PROMPT, max_tokens=16)
        go_on.set()
        thread.join()
    assert answers == [expected]


def test_ctrl_c_during_a_native_call_comes_after_it():
    reached = False
    with pytest.raises(KeyboardInterrupt), calls.native_call():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_closed_runtime_says_so(tiny):
    runtime = Runtime(tiny.text, n_threads=1)
    stream = runtime.stream(PROMPT)
    next(stream)
    runtime.close()
    runtime.close()
    with pytest.raises(ClosedError, match="closed"):
        next(stream)
    with pytest.raises(ClosedError, match="the runtime is closed"):
        runtime.generate(PROMPT)


def test_a_runtime_that_is_dropped_is_freed(tiny, monkeypatch):
    freed = []
    from edge_shiftkv.native import llama

    free = llama.Model.close
    monkeypatch.setattr(llama.Model, "close", lambda self: (freed.append(self), free(self)))
    runtime = Runtime(tiny.text, n_threads=1)
    runtime.generate(PROMPT, max_tokens=2)
    gone = weakref.ref(runtime)
    del runtime
    gc.collect()
    assert gone() is None
    assert len(freed) == 1


def test_the_log_is_silent_until_asked_for(tiny, capfd, caplog):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1) as runtime:
        runtime.generate(PROMPT, [tiny.picture], max_tokens=2)
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.DEBUG, logger="edge_shiftkv.llama_cpp"), Runtime(tiny.text, n_threads=1):
        pass
    assert any("architecture" in record.message or "arch" in record.message for record in caplog.records)


def test_many_threads_get_right_answers_or_are_refused(runtime, expected):
    outcomes = []

    def work():
        for _ in range(20):
            try:
                outcomes.append(runtime.generate(PROMPT, max_tokens=16).text)
            except ShiftKVError as error:
                assert "busy" in str(error) or "another request" in str(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {expected}
    assert runtime.generate(PROMPT, max_tokens=16).text == expected


def test_levels_of_the_log(caplog):
    """ggml's debug, info, warn and error; a line that goes on has the level of the one before."""
    levels = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
    with caplog.at_level(logging.DEBUG, logger="edge_shiftkv.llama_cpp"):
        for number in levels:
            logs._callback(number, b"a line\n", None)
            logs._callback(5, b"and the rest\n", None)
        logs._callback(2, b".....", None)  # progress
    expected = [(level, text) for level in levels.values() for text in ("a line", "and the rest")]
    assert [(record.levelno, record.message) for record in caplog.records] == expected
