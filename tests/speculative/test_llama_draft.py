"""Drafts for llama-cpp-python's own Llama."""

import numpy as np
import pytest
from llama_cpp import Llama
from support import tiny_models
from support.llama_draft import Counting
from support.speakers import SENTENCES, write_speaker

from edge_shiftkv import ModelError, ShiftKVError
from edge_shiftkv.speculative.bridge import Bridge
from edge_shiftkv.speculative.llama_draft import LlamaDraft

SETTINGS = {"n_ctx": 256, "n_batch": 256, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
pytestmark = pytest.mark.usefixtures("token_by_token")
PROMPTS = (SENTENCES[1], SENTENCES[1][:30], SENTENCES[3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speakers")


def complete(llama, prompt):
    return llama.create_completion(prompt, max_tokens=24, temperature=0.0)["choices"][0]["text"]


@pytest.mark.parametrize(("target", "draft"), [("llama-spm", "gpt-neox"), ("falcon", "llama-spm")])
def test_llama_gains_a_draft_of_any_vocabulary(folder, target, draft):
    path = write_speaker(target, folder)
    alone = Llama(str(path), **SETTINGS)
    expected = [complete(alone, prompt) for prompt in PROMPTS]
    drafting = Counting(write_speaker(draft, folder), path, n_threads=1)
    llama = Llama(str(path), draft_model=drafting, **SETTINGS)
    assert [complete(llama, prompt) for prompt in PROMPTS] == expected
    # A call for every pass: less than one for each token.
    assert drafting.n_proposed > 0
    assert drafting.n_calls < 0.9 * len(PROMPTS) * 24
    drafting.close()


def test_control_tokens_with_one_name_are_one(tiny):
    """The chat of a target whose template is ChatML, read by a draft that knows ChatML."""
    llama = Llama(str(tiny.text), **SETTINGS)
    drafting = Counting(tiny.text, tiny.text, n_threads=1, n_draft=8)
    messages = [{"role": "user", "content": "Who are you?"}]
    expected = llama.create_chat_completion(messages, temperature=0.0, max_tokens=24)
    ids = llama.tokenize(b"<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n", False, True)
    said = llama.tokenize(expected["choices"][0]["message"]["content"].encode(), False, False)
    proposed = drafting(np.array([*ids, said[0]], np.intc))
    assert proposed.dtype == np.intc
    assert proposed.tolist() == said[1:9]  # what the model itself says
    drafting.close()


def test_bad_input(folder, tmp_path):
    path = write_speaker("falcon", folder)
    with pytest.raises(ModelError, match="No such file"):
        LlamaDraft(path, tmp_path / "missing.gguf")
    with pytest.raises(ModelError, match="No such file"):
        LlamaDraft(tmp_path / "missing.gguf", path)
    with pytest.raises(ShiftKVError, match="n_draft is 0"):
        LlamaDraft(path, path, n_draft=0)


@pytest.mark.parametrize("same", [True, False])
def test_tokens_are_only_taken_over_where_control_tokens_are_the_same(tiny, tmp_path, monkeypatch, same):
    """With the same text, but another order of control tokens, the number of one's end is another's beginning."""
    names = tiny_models.CONTROL if same else tiny_models.CONTROL[::-1]
    monkeypatch.setattr(tiny_models, "CONTROL", names)
    path = tiny_models.write_text_model(tmp_path / "draft.gguf")
    bridged = []
    proxies = Bridge.proxies
    monkeypatch.setattr(
        Bridge, "proxies", lambda *arguments, **options: bridged.append(1) or proxies(*arguments, **options)
    )
    drafting = LlamaDraft(path, tiny.text, n_threads=1)
    llama = Llama(str(tiny.text), **SETTINGS)
    ids = llama.tokenize(b"<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n", False, True)
    proposed = drafting(np.array([*ids, *llama.tokenize(b"I", False)], np.intc))
    drafting.close()
    assert len(proposed) > 0
    assert bool(bridged) is not same
