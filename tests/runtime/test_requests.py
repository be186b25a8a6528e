import pytest
from llama_cpp import Llama
from support import tiny_models
from support.gguf_random import Spec, write_model

from edge_shiftkv import ModelError, Runtime, ShiftKVError
from edge_shiftkv.engine import Slot

PROMPT = "What is on the picture? " * 3


def test_the_full_cache_answers_as_llama_cpp_python_does(runtime, tiny):
    llama = Llama(str(tiny.text), n_ctx=256, n_threads=1, flash_attn=True, verbose=False)
    message = {"role": "user", "content": PROMPT}
    theirs = llama.create_chat_completion([message], temperature=0, max_tokens=24, repeat_penalty=1.0)
    ours = runtime.generate(PROMPT, max_tokens=24)
    assert ours.text == theirs["choices"][0]["message"]["content"]
    assert ours.figures.prompt_tokens == theirs["usage"]["prompt_tokens"]


def test_the_same_seed_draws_the_same_answer(runtime):
    def answer(seed):
        return runtime.generate(PROMPT, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed, max_tokens=16).text

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("kv_budget", [None, 24])
def test_streaming_gives_the_same_answer_in_pieces(runtime, tiny, kv_budget):
    runtime.kv_budget = kv_budget
    options = {"max_tokens": 20, "temperature": 1.0, "seed": 4}
    whole = runtime.generate(PROMPT, [tiny.picture], **options)
    stream = runtime.stream(PROMPT, [tiny.picture], **options)
    with pytest.raises(ShiftKVError, match="not complete"):
        _ = stream.completion
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.completion.text == whole.text
    assert stream.completion.finish_reason == whole.finish_reason


def test_an_answer_ends_at_max_tokens(runtime):
    answer = runtime.generate(PROMPT, max_tokens=5)
    assert (answer.finish_reason, answer.figures.generated_tokens) == ("length", 5)


@pytest.mark.parametrize("kv_budget", [None, 16])
def test_an_answer_ends_where_n_ctx_does(tiny, kv_budget):
    with Runtime(tiny.text, n_threads=1, n_ctx=120, kv_budget=kv_budget) as runtime:
        answer = runtime.generate(PROMPT, max_tokens=None)
    assert answer.finish_reason == "length"
    assert answer.figures.prompt_tokens + answer.figures.generated_tokens == 120


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(runtime):
    text = runtime.generate(PROMPT, max_tokens=24).text
    stop = text[5:8]
    answer = runtime.generate(PROMPT, max_tokens=24, stop=["never", stop])
    assert (answer.text, answer.finish_reason) == (text[: text.index(stop)], "stop")
    assert runtime.generate(PROMPT, max_tokens=24, stop=stop).text == answer.text


def test_the_models_own_end_is_no_text(runtime, monkeypatch):
    options = {"max_tokens": 8, "temperature": 1.0, "seed": 1}
    text = runtime.generate(PROMPT, **options).text
    tokens = runtime.engine.model.tokenize(text)
    end = next(token for token in tokens if token != tokens[0])
    monkeypatch.setattr(runtime.engine.model, "ends_generation", lambda token: token == end)
    answer = runtime.generate(PROMPT, **options)
    assert answer.finish_reason == "stop"
    assert answer.figures.generated_tokens == tokens.index(end)
    assert text.startswith(answer.text)


def test_control_tokens_have_no_text(runtime):
    assert all(runtime.engine.model.piece(token) == b"" for token, _ in runtime.engine.model.control_tokens.values())


def test_raw_prompts_have_no_template(runtime):
    chat = runtime.generate("abc", max_tokens=1).figures
    raw = runtime.generate("abc", raw=True, max_tokens=1).figures
    assert raw.prompt_tokens == 3 < chat.prompt_tokens


def test_a_picture_changes_the_answer(runtime, tiny):
    with_picture = runtime.generate("abc", [tiny.picture], max_tokens=8)
    assert with_picture.text != runtime.generate("abc", max_tokens=8).text
    assert with_picture.figures.image_tokens == 16


def test_figures_of_a_full_cache(runtime, tiny):
    figures = runtime.generate(PROMPT, [tiny.picture, tiny.picture], max_tokens=6).figures
    assert figures.image_tokens == 32
    assert figures.prompt_tokens == figures.image_tokens + figures.text_tokens == figures.kept_tokens
    # 3 layers, 2 KV heads of 16 numbers each, keys and values, 2 bytes a number
    assert figures.kv_bytes_prompt == figures.kv_bytes_kept == figures.prompt_tokens * 3 * 2 * 16 * 2 * 2
    assert figures.selection_s == 0
    assert 0 < figures.image_encode_s < figures.prefill_s
    assert figures.tokens_per_second == pytest.approx(5 / figures.decode_s)


def test_figures_of_a_cut_cache(runtime, tiny):
    runtime.kv_budget = 20
    answer = runtime.generate(PROMPT, [tiny.picture], max_tokens=6)
    figures = answer.figures
    assert figures.kept_tokens == answer.selection.n_kept == 20
    assert figures.kv_bytes_prompt == figures.prompt_tokens * 3 * 2 * 16 * 2 * 2
    assert figures.kv_bytes_kept == 20 * 3 * 2 * 16 * 2 * 2
    assert figures.selection_s > 0


def test_an_answer_of_one_token_has_no_rate(runtime):
    assert runtime.generate(PROMPT, max_tokens=1).figures.tokens_per_second is None


@pytest.mark.parametrize("extra", [0, 1, 1000])
def test_a_budget_that_holds_the_prompt_changes_nothing(runtime, tiny, extra):
    full = runtime.generate(PROMPT, [tiny.picture], max_tokens=24)
    runtime.kv_budget = full.figures.prompt_tokens + extra
    answer = runtime.generate(PROMPT, [tiny.picture], max_tokens=24)
    assert answer.text == full.text
    assert answer.selection is None
    assert answer.figures.kept_tokens == full.figures.kept_tokens


def test_a_cut_answer_goes_on_at_the_prompts_next_position(tiny, monkeypatch):
    positions = []

    class SpySlot(Slot):
        def advance(self, token):
            positions.append(self.position)
            return super().advance(token)

    monkeypatch.setattr("edge_shiftkv.answering.Slot", SpySlot)
    with Runtime(tiny.qwen_text, tiny.qwen_mmproj, n_threads=1, kv_budget=20) as runtime:
        figures = runtime.generate(PROMPT, [tiny.picture], max_tokens=4).figures
    # A picture of 5 x 3 tokens takes 5 positions with M-RoPE.
    start = figures.prompt_tokens - 15 + 5
    assert positions == [start, start + 1, start + 2]


def test_a_cut_answer_is_decoded_in_a_small_cache(tiny):
    with Runtime(tiny.text, n_threads=1, kv_budget=16) as runtime:
        runtime.generate(PROMPT * 10, max_tokens=8)
        small = runtime._kept.get(1, 1)
        assert small.n_ctx == 256
        runtime.generate(PROMPT * 10, max_tokens=8)
        assert runtime._kept.get(1, 1) is small


@pytest.mark.parametrize(("type_k", "type_v"), [("f32", "f32"), ("q8_0", "f16"), ("bf16", "bf16")])
def test_kv_types(tiny, type_k, type_v):
    # q8_0 comes in blocks of 32 and these heads have 16 numbers, which llama.cpp says no to.
    options = {"n_threads": 1, "kv_budget": 16, "type_k": type_k, "type_v": type_v}
    with Runtime(tiny.text, **options) as runtime:
        if type_k == "q8_0":
            with pytest.raises(ShiftKVError, match="q8_0/f16 KV cache"):
                runtime.generate(PROMPT)
        else:
            n_bytes = 4 if type_k == "f32" else 2
            figures = runtime.generate(PROMPT, max_tokens=4).figures
            assert figures.kv_bytes_kept == 16 * 3 * 2 * 16 * 2 * n_bytes


def test_pictures_whose_tokens_see_each_other_are_decoded_at_once(tiny, tmp_path):
    mmproj = tiny_models.write_mmproj(tmp_path / "mmproj.gguf", "gemma3", n_patches=24)
    with Runtime(tiny.text, mmproj, n_threads=1, kv_budget=24) as runtime:
        figures = runtime.generate("abc", [tiny.picture], max_tokens=2).figures
    assert figures.image_tokens == 576  # llama.cpp ends the process if they do not fit its batch


@pytest.mark.parametrize("kv_budget", [16, 400])
def test_sliding_windows_are_handed_over_whole(tmp_path, kv_budget):
    model = write_model(Spec("gemma3", n_layer=6, meta={"attention.sliding_window": 300}), tmp_path)
    with Runtime(model, n_threads=1, kv_budget=kv_budget) as runtime:
        answer = runtime.generate("the quick brown fox " * 30, raw=True, max_tokens=300)
    assert answer.selection.layers == (5,)
    assert answer.figures.kept_tokens == kv_budget
    assert answer.figures.generated_tokens == 300


def test_a_model_without_a_kv_cache_only_takes_no_budget(tmp_path):
    meta = {"ssm.inner_size": 256, "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.time_step_rank": 4}
    with Runtime(write_model(Spec("mamba", meta=meta), tmp_path), n_threads=1) as runtime:
        full = runtime.generate(PROMPT, raw=True, max_tokens=4)
        assert (full.figures.kv_bytes_prompt, full.figures.kv_bytes_kept) == (None, None)
        runtime.kv_budget = 16
        with pytest.raises(ShiftKVError, match="kv_budget cannot be used with this model"):
            runtime.generate(PROMPT, raw=True, max_tokens=4)
        runtime.kv_budget = None
        assert runtime.generate(PROMPT, raw=True, max_tokens=4).text == full.text


def test_a_model_with_an_encoder_is_refused(tmp_path):
    model = write_model(Spec("t5", n_head_kv=4, meta={"attention.relative_buckets_count": 8}), tmp_path)
    with pytest.raises(ModelError, match="models with a text encoder are not supported"):
        Runtime(model)


@pytest.mark.parametrize("kv_budget", [None, 16])
def test_n_ctx_ends_an_answer_before_max_tokens_do(tiny, kv_budget):
    with Runtime(tiny.text, n_threads=1, n_ctx=120, kv_budget=kv_budget) as runtime:
        answer = runtime.generate(PROMPT, max_tokens=1000)
    assert answer.finish_reason == "length"
    assert answer.figures.prompt_tokens + answer.figures.generated_tokens == 120


@pytest.mark.parametrize("kv_budget", [None, 24])
@pytest.mark.parametrize(("projector", "n_batch"), [("gemma3", 576), ("mlp", 512)])
def test_a_batch_holds_a_picture_whose_tokens_see_each_other(
    tiny, tmp_path, monkeypatch, kv_budget, projector, n_batch
):
    """In two batches its first tokens would not see its last ones. For others no more room is made than usual."""
    from edge_shiftkv.native.mtmd import Projector

    batches = []
    decode = Projector.decode

    def watched(self, context, chunk, *rest):
        batches.append((chunk.n_tokens, context.n_batch))
        return decode(self, context, chunk, *rest)

    monkeypatch.setattr(Projector, "decode", watched)
    mmproj = tiny_models.write_mmproj(tmp_path / "mmproj.gguf", projector, n_patches=24)
    with Runtime(tiny.text, mmproj, n_threads=1, kv_budget=kv_budget) as runtime:
        runtime.generate("abc", [tiny.picture], max_tokens=2)
    assert batches == [(576, n_batch)]


def test_a_context_that_only_decodes_has_small_batches(tiny, monkeypatch):
    """Those of a prompt make its buffers many times as large: it is not kept for answers on a cut cache."""
    from edge_shiftkv.native.llama import Context

    made, closed = [], []
    init, close = Context.__init__, Context.close
    monkeypatch.setattr(
        Context, "__init__", lambda self, *rest, **options: (init(self, *rest, **options), made.append(self))[0]
    )
    monkeypatch.setattr(Context, "close", lambda self: (closed.append(self), close(self))[1])
    with Runtime(tiny.text, n_threads=1) as runtime:
        runtime.generate(PROMPT, max_tokens=4)
        runtime.kv_budget = 16
        for _ in range(2):
            runtime.generate(PROMPT, max_tokens=4)
        full, first, small, second = made
        assert small.n_batch == 1 < min(full.n_batch, first.n_batch, second.n_batch)
        assert closed == [full, first, second]
        runtime.kv_budget = None
        runtime.generate(PROMPT, max_tokens=4)
        assert made[4].n_batch > 1
        assert closed[3:] == [small]
