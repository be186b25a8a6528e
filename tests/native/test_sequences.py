"""Sequences side by side in one context: each is as if it were alone."""

from __future__ import annotations

from contextlib import closing

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from PIL import Image
from support.cases import GEMMA2, GEMMA3
from support.gguf_random import write_model

from edge_shiftkv.engine import Engine, Prefilled
from edge_shiftkv.errors import ShiftKVError
from edge_shiftkv.native.llama import Context
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.selection.methods import method

N_SEQ = 5
BUDGET = 24


def last_position(context: Context, sequence: int) -> int:
    return llama.llama_memory_seq_pos_max(llama.llama_get_memory(context.pointer), sequence)


def test_a_sequence_beside_others_has_the_logits_of_one_alone(demo):
    """Bit for bit, with weights in Q8_0: each of them others' tokens, another length, and joined at another time."""
    rng = np.random.default_rng(0)
    with Engine(demo / "demo-text-q8_0.gguf", n_threads=1) as engine:
        texts = [rng.integers(5, engine.model.n_vocab, 30 + 7 * i).tolist() for i in range(N_SEQ)]
        expected = []
        for tokens in texts:
            with closing(engine.context(256, 1)) as alone:
                rows = []
                for i, token in enumerate(tokens):
                    alone.decode([token], i)
                    rows.append(alone.logits().copy())
            expected.append(rows)
        with closing(engine.context(256, N_SEQ, n_outputs=N_SEQ, n_seq=N_SEQ)) as context:
            done = [0] * N_SEQ
            for step in range(100):
                live = [i for i in range(N_SEQ) if step >= 3 * i and done[i] < len(texts[i])]
                if not live:
                    break
                context.decode_rows([(texts[i][done[i]], done[i], i) for i in live])
                for row, i in enumerate(live):
                    assert np.array_equal(context.logits(row), expected[i][done[i]])
                    done[i] += 1
            assert done == [len(tokens) for tokens in texts]


def test_forgetting_a_sequence_leaves_the_others(tiny):
    with Engine(tiny.text, n_threads=1) as engine, closing(engine.context(256, 4, n_outputs=4, n_seq=3)) as context:
        for i in range(6):
            context.decode_rows([(40 + i, i, 0), (50 + i, i, 1), (60 + i, i, 2)])
        context.remove(0, 1)
        assert [last_position(context, sequence) for sequence in range(3)] == [5, -1, 5]
        context.remove(4, 2)
        assert [last_position(context, sequence) for sequence in range(3)] == [5, -1, 3]
        context.decode_rows([(70, 0, 1)])
        assert last_position(context, 1) == 0
        context.clear()
        assert [last_position(context, sequence) for sequence in range(3)] == [-1, -1, -1]


@pytest.mark.parametrize(("n_ctx", "n_seq", "each"), [(1, 1, 256), (256, 3, 256), (257, 3, 512), (700, 8, 768)])
def test_each_sequence_has_the_cells_that_were_asked_for(tiny, n_ctx, n_seq, each):
    with Engine(tiny.text, n_threads=1) as engine, closing(engine.context(n_ctx, 64, n_outputs=64, n_seq=n_seq)) as c:
        assert c.n_ctx == each >= n_ctx
        assert llama.llama_n_ctx(c.pointer) == each * n_seq
        for start in range(0, each, 64):
            c.decode_rows([(65, start + i, n_seq - 1) for i in range(64)])
        with pytest.raises(ShiftKVError, match="status 1"):
            c.decode_rows([(65, each, n_seq - 1)])


@pytest.fixture(params=["llava", "qwen", "gemma2", "gemma3"])
def engine(request, tiny, tmp_path):
    files = {
        "llava": lambda: (tiny.text, tiny.mmproj),
        "qwen": lambda: (tiny.qwen_text, tiny.qwen_mmproj),
        "gemma2": lambda: (write_model(GEMMA2, tmp_path),),
        "gemma3": lambda: (write_model(GEMMA3, tmp_path),),
    }[request.param]()
    with Engine(*files, n_threads=1) as engine:
        yield engine


@pytest.mark.parametrize("cut", [False, True])
def test_a_prompt_goes_on_in_any_sequence_as_in_one_of_its_own(engine, tiny, cut):
    """The same bits: whole, as where it was read; cut, as in a context of its own."""
    picture = Image.open(tiny.picture).convert("RGB")
    content = (picture, "What is on it?") if engine.projector else ("What is there to see on it, and where? " * 3,)
    template = Message("user", content)
    with (
        closing(engine.prompt([template])) as prompt,
        closing(engine.context(512)) as large,
        closing(engine.context(512, 1)) as own,
        closing(engine.context(512, 3, n_outputs=3, n_seq=3)) as context,
    ):
        for i in range(40):  # what was there before
            context.decode_rows([(40 + i, i, 0), (70 + i, i, 1), (100 + i, i, 2)])
        prefilled = Prefilled(large, engine.projector, n_query=32)
        prefilled.read(prompt)
        if cut:
            prefilled.select(method("snapkv"), BUDGET)
            prefilled.hand_over(own)
        else:
            prefilled.select_all()
        position = prefilled.hand_over(context, 1)
        assert position == prefilled.position
        assert last_position(context, 0) == last_position(context, 2) == 39
        for i in range(20):
            alone = own if cut else large
            alone.decode([50 + i], position + i)
            context.decode_rows([(50 + i, position + i, 1)])
            assert np.array_equal(context.logits(0), alone.logits())
