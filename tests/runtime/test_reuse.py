"""What a request has in common with the one before is not read again, and nothing else changes: not a bit."""

import pytest

from edge_shiftkv import Runtime, SettingError
from edge_shiftkv.native.llama import Context
from edge_shiftkv.native.mtmd import Projector
from edge_shiftkv.sampling import Sampler

N = 6
N_BATCH = 16


@pytest.fixture
def small_batches(monkeypatch):
    """Prompts are read in many batches, as long ones are."""
    monkeypatch.setattr("edge_shiftkv.engine.prefilled.BATCH", N_BATCH)


@pytest.fixture
def first_logits(monkeypatch):
    """The logits that each answer's first token was drawn from."""
    seen = []
    sample = Sampler.sample

    def spy(self, outputs, output=-1):
        if not self.n_drawn:
            seen.append(outputs.logits(output).tobytes())
        return sample(self, outputs, output)

    monkeypatch.setattr(Sampler, "sample", spy)
    return seen


@pytest.fixture
def passes(monkeypatch):
    """The tokens of each pass over text, and whether logits were wanted."""
    seen = []
    decode = Context.decode

    def spy(self, tokens, position, *, logits=1):
        seen.append((tuple(tokens), position))
        return decode(self, tokens, position, logits=logits)

    monkeypatch.setattr(Context, "decode", spy)
    return seen


def conversations(tiny):
    """One that grows, another one, and the first again."""
    picture = {"type": "image_url", "image_url": {"url": str(tiny.picture)}}

    def user(text, *parts):
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    messages = [{"role": "system", "content": "Answer in one word, if there is one. " * 2}]
    result = []
    for turn in (
        user("What is on the picture?", picture),
        user("And where does it stand?"),
        user("Here is another one. Which is larger?", picture),
        user("x"),
    ):
        messages = [*messages, turn]
        result.append(messages)
        messages = [*messages, {"role": "assistant", "content": "A table, I think."}]
    return [*result, [user("Something else. " * 6)], result[2], result[2], result[0]]


CASES = [
    ({}, {}),
    ({"kv_budget": 24}, {"keep_prompt": True}),
    ({"kv_budget": 24, "kv_method": "snapkv"}, {"keep_prompt": True}),
    ({"kv_budget": 24, "kv_method": "expected-attention"}, {"keep_prompt": True}),
    ({"kv_budget": 24, "kv_method": "keydiff"}, {"keep_prompt": True}),
]


@pytest.mark.parametrize(("options", "keeping"), CASES)
@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_a_conversation_that_grows(tiny, kind, options, keeping, small_batches, first_logits, n_read, passes):
    files = (tiny.text, tiny.mmproj) if kind == "llava" else (tiny.qwen_text, tiny.qwen_mmproj)
    asked = conversations(tiny)
    answers = []

    def ask(runtime, messages):
        passes.clear()
        answer = runtime.create_chat_completion(messages, max_tokens=N, **options)
        text = answer["choices"][0]["message"]["content"]
        answers.append((first_logits[-1], text, tuple(passes), n_read[-1], answer["usage"]["prompt_tokens"]))

    for messages in asked:
        with Runtime(*files, n_threads=1, **keeping) as runtime:
            ask(runtime, messages)
    with Runtime(*files, n_threads=1, **keeping) as runtime:
        runtime.generate("A long text. " * 40, max_tokens=200, **options)  # contexts stay as large as that
        for messages in asked:
            ask(runtime, messages)
    fresh, reused = answers[: len(asked)], answers[len(asked) :]
    assert [answer[:2] for answer in reused] == [answer[:2] for answer in fresh]
    assert all(read == n for *_, read, n in fresh)
    # These models' arithmetic is the same for all batches, others' is not: what is read is read in the same ones.
    for (*_, mine, _, _), (*_, theirs, _, _) in zip(reused, fresh, strict=True):
        assert theirs[len(theirs) - len(mine) :] == mine
    saved = [n - read for *_, read, n in reused]
    window = 512 if options.get("kv_method") == "expected-attention" else 0
    if not window:  # its queries are those of the whole prompt
        assert all(saved[i] >= fresh[i - 1][-1] - 3 * N_BATCH - 32 for i in (1, 2, 3))
        assert saved[6] > 0
        assert saved[7] > 0
    assert saved[0] == saved[4] == 0


def test_methods_in_turn(tiny):
    """Some look at more queries than the one before had captured."""
    methods = ["keydiff", "snapkv", "mixed", "expected-attention", "keydiff", "paper", "snapkv"]
    kept = []
    for keep in (False, True):
        with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24, keep_prompt=keep) as runtime:
            for i, method in enumerate(methods):
                answer = runtime.generate("Where is it? " * (3 + i % 2), [tiny.picture], kv_method=method, max_tokens=N)
                kept.append((answer.text, answer.selection.counts().tolist()))
    assert kept[: len(methods)] == kept[len(methods) :]


def test_only_when_it_is_asked_for(tiny, n_read):
    """A whole prompt's KV pairs take memory: with a budget they are freed."""
    for keep in (False, True):
        n_read.clear()
        with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24, keep_prompt=keep) as runtime:
            for _ in range(2):
                n = runtime.generate("What is it?", [tiny.picture], max_tokens=2).figures.prompt_tokens
            # The text after the picture is less than a batch.
            assert (n_read[0], n_read[1] < n) == (n, keep)


def test_pictures_used_last_are_not_encoded_again(tiny, monkeypatch, tmp_path):
    from PIL import Image

    pictures = [Image.new("RGB", (90, 150), (40 * i, 9, 9)) for i in range(4)]
    encoded = []
    encode = Projector.encode
    monkeypatch.setattr(Projector, "encode", lambda self, chunk: (encoded.append(chunk), encode(self, chunk)))

    def ask(runtime, i):
        before = len(encoded)
        text = runtime.generate("What is it?", [pictures[i]], max_tokens=N).text
        return text, len(encoded) - before

    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24, image_cache=0) as runtime:
        expected = [ask(runtime, i) for i in (0, 1, 2, 3, 0)]
        assert [n for _, n in expected] == [1] * 5
    n_bytes = 16 * 64 * 4  # of a picture's embeddings
    monkeypatch.setattr("edge_shiftkv.engine.engine._MIB", 3 * n_bytes)
    with Runtime(tiny.text, tiny.mmproj, n_threads=1, kv_budget=24, image_cache=1) as runtime:
        places = [0, 1, 2, 0, 1, 3, 0, 1, 3, 2, 1]
        answers = [ask(runtime, i) for i in places]
    assert [text for text, _ in answers] == [expected[i][0] for i in places]
    assert [n for _, n in answers] == [1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0]


def test_a_cache_out_of_its_range(tiny):
    with pytest.raises(SettingError, match="image_cache is -1"):
        Runtime(tiny.text, image_cache=-1)
