import sys

import pytest
from support.memory import resident_bytes

from edge_shiftkv import PromptError, Runtime
from edge_shiftkv.speculative.options import DraftOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PROMPT = "What is on the picture? " * 3


def assert_bounded(request, n: int) -> None:
    for _ in range(100):  # until caches are full
        request()
    before = resident_bytes()
    for _ in range(n):
        request()
    # A KV cache here is 96 KiB or more, a picture 10 KiB, the weights of both files 600 KiB.
    # Pages of a process in which much else was tested come and go: a MiB.
    assert resident_bytes() - before < (n << 12) + (1 << 20)


def cut_with_a_picture(runtime, picture):
    runtime.kv_budget = 24
    runtime.generate(PROMPT, [picture], max_tokens=4)


def full_with_pictures(runtime, picture):
    runtime.kv_budget = None
    runtime.generate(PROMPT, [picture, picture], max_tokens=4)


def abandoned(runtime, picture):
    runtime.kv_budget = 24
    next(runtime.stream(PROMPT, [picture], max_tokens=4))


def refused(runtime, picture):
    with pytest.raises(PromptError):
        runtime.generate(PROMPT * 20, [picture])


@pytest.mark.parametrize("request_", [cut_with_a_picture, full_with_pictures, abandoned, refused])
def test_requests_do_not_leak(tiny, request_):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1) as runtime:
        assert_bounded(lambda: request_(runtime, tiny.picture), 250)


def test_opening_and_closing_does_not_leak(tiny):
    def open_and_close():
        with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24) as runtime:
            runtime.generate(PROMPT, [tiny.picture], max_tokens=2)

    assert_bounded(open_and_close, 100)


def with_draft(tiny):
    options = DraftOptions(4, mmproj=tiny.mmproj)
    return Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24, draft=tiny.text, draft_options=options)


def test_drafts_do_not_leak(tiny):
    with with_draft(tiny) as runtime:

        def request():
            runtime.generate(PROMPT, [tiny.picture], max_tokens=8, temperature=1.0)
            next(runtime.stream(PROMPT, [tiny.picture], max_tokens=8))

        assert_bounded(request, 150)


def test_opening_and_closing_with_a_draft_does_not_leak(tiny):
    def open_and_close():
        with with_draft(tiny) as runtime:
            runtime.generate(PROMPT, [tiny.picture], max_tokens=4)

    assert_bounded(open_and_close, 60)
