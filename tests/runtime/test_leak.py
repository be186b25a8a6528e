import gc
import itertools
import sys
from pathlib import Path

import pytest

from edge_shiftkv import PromptError, Runtime

PROMPT = "What is on the picture? " * 3


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand_requests_do_not_leak(tiny):
    with Runtime(tiny.text, tiny.mmproj, n_threads=1) as runtime:

        def cut_with_picture():
            runtime.kv_budget = 24
            runtime.generate(PROMPT, [tiny.picture], max_tokens=4)

        def full_with_pictures():
            runtime.kv_budget = None
            runtime.generate(PROMPT, [tiny.picture, tiny.picture], max_tokens=4)

        def abandoned():
            runtime.kv_budget = 24
            next(runtime.stream(PROMPT, [tiny.picture], max_tokens=4))

        def refused():
            with pytest.raises(PromptError):
                runtime.generate(PROMPT * 20, [tiny.picture])

        kinds = itertools.cycle([cut_with_picture, full_with_pictures, abandoned, refused])
        for request in itertools.islice(kinds, 100):
            request()
        gc.collect()
        before = resident_bytes()
        for request in itertools.islice(kinds, 1000):
            request()
        gc.collect()
        # A leaked KV cache is 96 KiB or more, a leaked picture 10 KiB: 250 of either would show.
        assert resident_bytes() - before < 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_and_closing_does_not_leak(tiny):
    def open_and_close():
        with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24) as runtime:
            runtime.generate(PROMPT, [tiny.picture], max_tokens=2)

    for _ in range(10):
        open_and_close()
    gc.collect()
    before = resident_bytes()
    for _ in range(50):
        open_and_close()
    gc.collect()
    assert resident_bytes() - before < 1 << 20  # the weights of both files are 600 KiB
