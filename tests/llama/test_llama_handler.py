"""llama-cpp-python's own `Llama` on a cut KV cache, against that library without us, and against `Runtime`."""

import gc
import json
import math

import gguf
import numpy as np
import pytest
from llama_cpp import Llama, LlamaGrammar, LlamaRAMCache
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, LlamaChatCompletionHandlerRegistry, MTMDChatHandler
from support import tiny_models
from support.gguf_random import Spec, write_model
from support.ledger import Ledger
from support.llama_draft import Counting

from edge_shiftkv import (
    ClosedError,
    ContextOverflowError,
    ImageError,
    ModelError,
    PromptError,
    Runtime,
    SettingError,
    ShiftKVChatHandler,
    ShiftKVError,
    heatmap,
    load_image,
)
from edge_shiftkv.native import shiftkv
from edge_shiftkv.native.mtmd import Projector

# As the runtime has them; other batches and other attention kernels round differently.
SETTINGS = {"n_ctx": 1024, "n_batch": 512, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
GREEDY = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": 40}
QUESTIONS = ("Read line 2.", "Read everything.", "What is the total?")
LONG = "It was the best of times, it was the worst of times. " * 3


def ask(text, *pictures):
    parts = [{"type": "image_url", "image_url": {"url": str(picture)}} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def said(llama, messages, **options):
    return llama.create_chat_completion(messages, **{**GREEDY, **options})["choices"][0]["message"]["content"]


def streamed(llama, messages, **options):
    chunks = llama.create_chat_completion(messages, stream=True, **{**GREEDY, **options})
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@pytest.fixture(scope="module")
def reader(demo):
    """The shipped model."""
    handler = ShiftKVChatHandler(demo / "demo-mmproj-f16.gguf", kv_budget=96)
    yield Llama(str(demo / "demo-text-q8_0.gguf"), chat_handler=handler, **SETTINGS)


@pytest.fixture
def cut(reader):
    """The same, with a budget of 96."""
    reader.chat_handler.kv_budget, reader.chat_handler.kv_method = 96, None
    return reader


@pytest.fixture(scope="module")
def ours(demo):
    """Answers of the runtime: (messages, budget) -> text."""
    with Runtime(demo / "demo-text-q8_0.gguf", demo / "demo-mmproj-f16.gguf", n_threads=1) as runtime:

        def answer(messages, budget=96, **options):
            options = {"temperature": 0.0, "max_tokens": 40, "kv_budget": budget, **options}
            return runtime.create_chat_completion(messages, **options)["choices"][0]["message"]["content"]

        yield answer


@pytest.fixture
def other_picture(demo, tmp_path):
    path = tmp_path / "other.png"
    load_image(demo / "document.png").rotate(180).save(path)
    return path


# What it answers


@pytest.mark.parametrize("budget", [48, 96, 128])
def test_the_texts_of_the_runtime(cut, ours, demo, budget):
    cut.chat_handler.kv_budget = budget
    for question in QUESTIONS:
        messages = ask(question, demo / "document.png")
        expected = ours(messages, budget)
        assert said(cut, messages) == expected
        assert cut.chat_handler.selection.n_kept == budget
        assert streamed(cut, messages) == expected


def test_another_method(cut, ours, demo):
    messages = ask("Read everything.", demo / "document.png")
    cut.chat_handler.kv_budget, cut.chat_handler.kv_method = 0.25, "snapkv"
    assert said(cut, messages) == ours(messages, 0.25, kv_method="snapkv") != ours(messages, 0.25)


class Stock(MTMDChatHandler):
    """llama-cpp-python's, for a template that takes texts: it adds the beginning itself, and would print lists."""

    def _get_chat_template(self, llama_model):
        return super()._get_chat_template(llama_model).replace("{{ bos_token }}", "")

    def _convert_message_for_template(self, message, media_marker):
        converted = super()._convert_message_for_template(message, media_marker)
        return {**converted, "content": "".join(part["text"] for part in converted["content"])}


def test_without_a_budget_it_is_stock(cut, demo):
    """Also with the other handler's picture, and with text alone."""
    cut.chat_handler.kv_budget = None
    stock = Llama(str(demo / "demo-text-q8_0.gguf"), **SETTINGS)
    stock.chat_handler = Stock(str(demo / "demo-mmproj-f16.gguf"), verbose=False)
    url = (demo / "document.png").resolve().as_uri()
    for question in ("Read line 2.", "Read line 4.", "What is the value of AREA?"):
        assert said(cut, ask(question, url)) == said(stock, ask(question, url))
        assert cut.chat_handler.selection is None
    stock.chat_handler = None
    messages = [{"role": "user", "content": "Read line 3."}]
    cut.chat_handler.kv_budget = 96
    said(cut, ask("Read line 2.", url))
    assert cut.chat_handler.selection is not None
    assert said(cut, messages) == said(stock, messages) != ""
    assert cut.chat_handler.selection is None
    assert cut.n_tokens == stock.n_tokens
    assert cut._input_ids.tolist() == stock._input_ids.tolist()


def test_text_alone_is_cut(tiny):
    llama = Llama(str(tiny.text), chat_handler=ShiftKVChatHandler(kv_budget=24), **SETTINGS)
    with Runtime(tiny.text, kv_budget=24, n_threads=1) as runtime:
        expected = runtime.generate(LONG, temperature=0.0, max_tokens=40).text
        full = runtime.generate(LONG, temperature=0.0, max_tokens=40, kv_budget=None).text
    assert said(llama, [{"role": "user", "content": LONG}]) == expected != full


@pytest.mark.parametrize("budget", [None, 24])
def test_m_rope(tiny, budget):
    """Its pictures take less positions than tokens."""
    handler = ShiftKVChatHandler(tiny.qwen_mmproj, kv_budget=budget)
    llama = Llama(str(tiny.qwen_text), chat_handler=handler, **SETTINGS)
    with Runtime(tiny.qwen_text, tiny.qwen_mmproj, kv_budget=budget, n_threads=1) as runtime:
        for messages in (ask(LONG, tiny.picture, tiny.picture), ask("Why?", tiny.picture)):
            expected = runtime.create_chat_completion(messages, temperature=0.0, max_tokens=40)
            answer = llama.create_chat_completion(messages, **GREEDY)
            assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
            assert answer["usage"] == expected["usage"]


def test_m_rope_ends_where_the_cells_do(tiny):
    handler = ShiftKVChatHandler(tiny.qwen_mmproj, kv_budget=None)
    llama = Llama(str(tiny.qwen_text), chat_handler=handler, **{**SETTINGS, "n_ctx": 256})
    answer = llama.create_chat_completion(ask("Why?", *[tiny.picture] * 8), **{**GREEDY, "max_tokens": None})
    assert answer["usage"]["total_tokens"] == llama.n_ctx()
    assert answer["choices"][0]["finish_reason"] == "length"


def test_text_stays_text(tiny):
    """Names of control tokens, wherever a request may have them."""
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
        "<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    path = tiny_models.write_text_model(tiny.text.parent / "tools.gguf", template=template)
    llama = Llama(str(path), chat_handler=ShiftKVChatHandler(kv_budget=None), **SETTINGS)
    name = "<|im_end|>"
    call = {"id": "1", "type": "function", "function": {"name": f"f{name}", "arguments": json.dumps({"a": name})}}
    messages = [
        {"role": "user", "content": f"Hello {name}"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": f"42 {name}"},
    ]
    parameters = {"type": "object", "properties": {name: {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "f", "description": name, "parameters": parameters}}]
    said(llama, messages, tools=tools, max_tokens=1)
    ids = llama._input_ids.tolist()
    assert ids.count(llama.tokenize(name.encode(), False, True)[0]) == len(messages)
    # Else it is what any other Jinja makes of it.
    messages[1]["content"] = ""
    rendered = Jinja2ChatFormatter(template, "", "")(messages=messages, tools=tools).prompt
    assert llama.detokenize(ids, special=True).decode() == rendered


# What `Llama` has


def test_stop_texts(cut, ours, demo):
    messages = ask("Read everything.", demo / "document.png")
    whole = ours(messages)
    stop = whole[12:15]
    assert said(cut, messages, stop=[stop]) == streamed(cut, messages, stop=[stop]) == whole[: whole.index(stop)]


def test_a_schema_and_a_grammar(cut, demo):
    schema = {
        "type": "object",
        "properties": {"line": {"enum": ["VOLT 1", "COPY 2"]}, "sure": {"type": "boolean"}},
        "required": ["line", "sure"],
        "additionalProperties": False,
    }
    messages = ask("Read line 2.", demo / "document.png")
    forms = (
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "json_schema": {"name": "line", "schema": schema}},
    )
    for get, form in zip((said, streamed), forms, strict=True):
        text = get(cut, messages, response_format=form, max_tokens=200)
        answer = json.loads(text)
        assert answer.keys() == {"line", "sure"}
        assert answer["line"] in ("VOLT 1", "COPY 2")
        assert type(answer["sure"]) is bool
    assert said(cut, messages, grammar=LlamaGrammar.from_string('root ::= "VOLT" | "COPY"')) == "VOLT"


def test_tools(cut, demo, tiny):
    function = {
        "name": "tell",
        "parameters": {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]},
    }
    tools = [{"type": "function", "function": function}]
    messages = ask("Read line 2.", demo / "document.png")
    choice = {"type": "function", "function": {"name": "tell"}}
    answer = cut.create_chat_completion(messages, tools=tools, tool_choice=choice, **{**GREEDY, "max_tokens": 100})
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "tell"
    assert type(json.loads(call["function"]["arguments"])["n"]) is bool
    with pytest.raises(PromptError, match="no place for tools"):
        said(cut, messages, tools=tools)


@pytest.mark.parametrize("budget", [None, 96])
def test_logprobs(demo, ours, budget):
    """The first token's are those of the whole prompt, with a cut, too; the others' are of what the answer is."""
    handler = ShiftKVChatHandler(demo / "demo-mmproj-f16.gguf", kv_budget=budget)
    paths = str(demo / "demo-text-q8_0.gguf"), str(demo / "demo-mmproj-f16.gguf")
    llama = Llama(paths[0], chat_handler=handler, logits_all=True, **SETTINGS)
    stock = Llama(paths[0], chat_handler=Stock(paths[1], verbose=False), logits_all=True, **SETTINGS)
    messages = ask("Read line 2.", (demo / "document.png").resolve().as_uri())
    options = {**GREEDY, "logprobs": True, "top_logprobs": 3}
    answer, expected = (one.create_chat_completion(messages, **options)["choices"][0] for one in (llama, stock))
    assert answer["message"]["content"] == ours(messages, budget)
    entries, wanted = answer["logprobs"]["content"], expected["logprobs"]["content"]
    n = len(wanted) if budget is None else 1
    for ours_, theirs in zip(entries[:n], wanted[:n], strict=True):
        assert ours_["token"] == theirs["token"]
        assert ours_["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
    assert "".join(entry["token"] for entry in entries) == answer["message"]["content"]
    assert all(entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"]) for entry in entries)
    # As the stream has them.
    chunks = list(llama.create_chat_completion(messages, stream=True, **options))
    found = [entry for chunk in chunks if (got := chunk["choices"][0]["logprobs"]) for entry in got["content"]]
    assert [entry["token"] for entry in found] == [entry["token"] for entry in entries]
    for one, other in zip(found, entries, strict=True):
        assert math.isclose(one["logprob"], other["logprob"], abs_tol=1e-5)


def write_lora(path, layers, n_in, n_out, scale):
    """An adapter of rank 2 on all query projections."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0)
    random = np.random.default_rng(0)
    for layer in range(layers):
        for name, shape in (("lora_a", (2, n_in)), ("lora_b", (n_out, 2))):
            values = random.normal(0, scale, shape).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.attn_q.weight.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_lora(tiny, tmp_path):
    size = tiny_models.N_EMBD
    lora = write_lora(tmp_path / "lora.gguf", tiny_models.N_LAYER, size, size, 0.5)
    merged = merge_lora(tiny.text, lora, tmp_path / "merged.gguf")
    messages = [{"role": "user", "content": LONG}]
    handler = ShiftKVChatHandler(kv_budget=None)
    llama = Llama(str(tiny.text), chat_handler=handler, lora_path=lora, **SETTINGS)
    stock = Llama(str(tiny.text), lora_path=lora, **SETTINGS)
    assert said(llama, messages) == said(stock, messages) != said(Llama(str(tiny.text), **SETTINGS), messages)
    # What is kept is what the model with the adapter in its weights keeps.
    handler.kv_budget = 24
    said(llama, messages)
    with Runtime(merged, kv_budget=24, n_threads=1) as runtime:
        expected = runtime.generate(LONG, max_tokens=1).selection
    with Runtime(tiny.text, kv_budget=24, n_threads=1) as runtime:
        without = runtime.generate(LONG, max_tokens=1).selection

    def n_common(one, other):
        pairs = [(layer, head) for layer in one.layers for head in range(tiny_models.N_HEAD_KV)]
        return sum(len(set(one.kept(*pair)) & set(other.kept(*pair))) for pair in pairs)

    n = n_common(expected, expected)
    assert n_common(handler.selection, expected) > 0.97 * n
    assert n_common(handler.selection, without) < 0.9 * n


def merge_lora(model, lora, path):
    """The model with an adapter added to its weights."""
    source, adapter = gguf.GGUFReader(model), gguf.GGUFReader(lora)
    deltas = {tensor.name: tensor.data for tensor in adapter.tensors}
    data = bytearray(model.read_bytes())
    for tensor in source.tensors:
        if f"{tensor.name}.lora_a" in deltas:
            a, b = deltas[f"{tensor.name}.lora_a"], deltas[f"{tensor.name}.lora_b"]
            changed = tensor.data + b @ a  # alpha / rank is 1
            start = tensor.data_offset
            data[start : start + tensor.data.nbytes] = changed.astype(np.float32).tobytes()
    path.write_bytes(data)
    return path


def test_with_a_draft(demo, ours):
    text = demo / "demo-text-q8_0.gguf"
    handler = ShiftKVChatHandler(demo / "demo-mmproj-f16.gguf", kv_budget=96)
    n_tokens = 0
    with Counting(demo / "demo-text-f16.gguf", text, n_threads=1) as drafting:
        llama = Llama(str(text), chat_handler=handler, draft_model=drafting, **{**SETTINGS, "n_ctx": 512})
        for question in ("Read line 2.", "Read line 4.", "Read line 8."):
            messages = ask(question, demo / "document.png")
            answer = llama.create_chat_completion(messages, **GREEDY)
            assert answer["choices"][0]["message"]["content"] == ours(messages)
            n_tokens += answer["usage"]["completion_tokens"]
        # A call for every pass: less than one for each token, though a draft that sees no picture seldom agrees.
        assert drafting.n_proposed > 0
        assert drafting.n_calls < n_tokens
        small = Llama(str(text), chat_handler=handler, draft_model=drafting, **SETTINGS)
        with pytest.raises(SettingError, match="n_batch of at least its n_ctx"):
            said(small, messages)


# What it leaves behind


def test_what_was_cut_is_no_beginning_of_another_prompt(cut, ours, demo, other_picture):
    """All that may come after an answer, against a `Llama` that has seen nothing."""
    fresh = Llama(str(demo / "demo-text-q8_0.gguf"), **SETTINGS)
    picture = demo / "document.png"
    for after in ([*range(40, 60)], []):
        cut.chat_handler.kv_budget = 96
        said(cut, ask("Read line 2.", picture))
        ids = [*cut.input_ids[:200].tolist(), *after]
        ids[0] = cut.token_bos()
        fresh.reset()
        expected = fresh.create_completion(ids, max_tokens=12, temperature=0.0)
        found = cut.create_completion(ids, max_tokens=12, temperature=0.0)
        assert found["choices"][0]["text"] == expected["choices"][0]["text"]
    for messages in (
        ask("Read line 2.", other_picture),
        ask("Read line 2.", picture),
        ask("Read everything.", picture, picture),
        ask("Read line 4.", picture),
    ):
        assert said(cut, messages) == ours(messages)
    cut.reset()
    assert said(cut, messages) == ours(messages)


def test_text_that_is_not_cut_is_reused(tiny):
    llama = Llama(str(tiny.text), chat_handler=ShiftKVChatHandler(kv_budget=200), **SETTINGS)
    messages = [{"role": "user", "content": "Who are you?"}]
    first = said(llama, messages)
    read = []
    llama.eval = lambda tokens, original=llama.eval: read.append(len(tokens)) or original(tokens)
    longer = [*messages, {"role": "assistant", "content": first}, {"role": "user", "content": "And why?"}]
    again = said(llama, longer)
    assert sum(read) < len(llama._input_ids)
    assert again == said(Llama(str(tiny.text), **SETTINGS), longer)
    del llama.eval


def test_a_stream_that_is_given_up(cut, ours, demo):
    messages = [ask(question, demo / "document.png") for question in QUESTIONS]
    chunks = cut.create_chat_completion(messages[1], stream=True, **GREEDY)
    for _ in range(4):
        next(chunks)
    assert said(cut, messages[0]) == ours(messages[0])
    with pytest.raises(ShiftKVError, match="used for something else"):
        next(chunks)
    # A stream that another follows, which goes on.
    first, second = (cut.create_chat_completion(one, stream=True, **GREEDY) for one in messages[:2])
    with pytest.raises(ShiftKVError, match="used for something else"):
        list(first)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in second)
    assert text == ours(messages[1])
    # One that `Llama` itself was used after.
    third = cut.create_chat_completion(messages[1], stream=True, **GREEDY)
    next(third), next(third)
    cut.create_completion("x", max_tokens=2)
    with pytest.raises(ShiftKVError, match="used for something else"):
        list(third)
    third = cut.create_chat_completion(messages[1], stream=True, **GREEDY)
    next(third), next(third)
    cut.create_completion("x", max_tokens=2)
    cut.reset()
    with pytest.raises(ShiftKVError, match="used for something else"):
        list(third)
    # One that is dropped, without being closed.
    fourth = cut.create_chat_completion(messages[1], stream=True, **GREEDY)
    next(fourth)
    last = cut.create_chat_completion(messages[2], stream=True, **GREEDY)
    del fourth
    gc.collect()
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in last) == ours(messages[2])


def test_a_stream_after_which_a_request_failed(cut, ours, demo, monkeypatch):
    messages = ask("Read line 2.", demo / "document.png")
    chunks = cut.create_chat_completion(messages, stream=True, **GREEDY)
    next(chunks), next(chunks)
    with pytest.raises(ContextOverflowError):  # of which nothing was read
        said(cut, ask("Read line 2. " * 99, demo / "document.png"))
    next(chunks)

    def fail(*_):
        raise ShiftKVError("out of order")

    with monkeypatch.context() as patch, pytest.raises(ShiftKVError, match="out of order"):
        patch.setattr("edge_shiftkv.native.shiftkv.select", fail)
        said(cut, messages)
    with pytest.raises(ShiftKVError, match="used for something else"):
        next(chunks)
    assert said(cut, messages) == ours(messages)


def test_nothing_is_captured_of_an_answer(cut, demo):
    said(cut, ask("Read line 2.", demo / "document.png"))
    with pytest.raises(ShiftKVError, match="capture was not on"):
        shiftkv.queries(cut.chat_handler._readers[cut].context, 0)


def test_caches_and_states_do_not_hold_what_was_cut(cut, ours, demo):
    messages = ask("Read line 2.", demo / "document.png")
    cache = LlamaRAMCache()
    cut.set_cache(cache)
    assert said(cut, messages) == ours(messages)
    assert not cache.cache_state
    assert cut.cache is cache
    cut.set_cache(None)
    chunks = cut.create_chat_completion(messages, stream=True, **GREEDY)
    next(chunks), next(chunks)
    state = cut.save_state()
    assert state.n_tokens == 0
    cut.load_state(state)
    with pytest.raises(ShiftKVError, match="used for something else"):
        next(chunks)
    assert said(cut, messages) == ours(messages)


def test_a_state_of_text_comes_back(tiny):
    llama = Llama(str(tiny.text), chat_handler=ShiftKVChatHandler(kv_budget=100), **SETTINGS)
    messages = [{"role": "user", "content": "Who are you?"}]
    expected = said(llama, messages)
    state = llama.save_state()
    said(llama, [{"role": "user", "content": LONG}])  # is cut
    assert llama.chat_handler.selection is not None
    llama.load_state(state)
    assert llama.n_tokens == state.n_tokens > 0
    assert said(llama, messages) == expected


@pytest.mark.parametrize(("image_cache", "n_encoded"), [(64, 1), (0, 2)])
def test_a_picture_is_encoded_once(tiny, monkeypatch, image_cache, n_encoded):
    encoded = []
    encode = Projector.encode
    monkeypatch.setattr(Projector, "encode", lambda self, chunk: encoded.append(chunk) or encode(self, chunk))
    handler = ShiftKVChatHandler(tiny.mmproj, kv_budget=24, image_cache=image_cache)
    llama = Llama(str(tiny.text), chat_handler=handler, **SETTINGS)
    assert said(llama, ask(LONG, tiny.picture)) == said(llama, ask(LONG, tiny.picture))
    assert len(encoded) == n_encoded


def test_two_at_once(demo, ours, tiny):
    """Two handlers, and one handler of two."""
    shared = ShiftKVChatHandler(demo / "demo-mmproj-f16.gguf", kv_budget=96)
    other = ShiftKVChatHandler(tiny.mmproj, kv_budget=24)
    path = str(demo / "demo-text-q8_0.gguf")
    one, two = (Llama(path, chat_handler=shared, **SETTINGS) for _ in range(2))
    third = Llama(str(tiny.text), chat_handler=other, **SETTINGS)
    expected = said(third, ask(LONG, tiny.picture))
    messages = [ask(question, demo / "document.png") for question in QUESTIONS[:2]]
    streams = [
        one.create_chat_completion(messages[0], stream=True, **GREEDY),
        two.create_chat_completion(messages[1], stream=True, **GREEDY),
        third.create_chat_completion(ask(LONG, tiny.picture), stream=True, **GREEDY),
    ]
    texts = ["", "", ""]
    running = set(range(3))
    while running:
        for i in sorted(running):
            chunk = next(streams[i], None)
            if chunk is None:
                running.discard(i)
            else:
                texts[i] += chunk["choices"][0]["delta"].get("content") or ""
    assert texts == [ours(messages[0]), ours(messages[1]), expected]


def test_nothing_leaks(tiny, monkeypatch):
    gc.collect()
    ledger = Ledger(monkeypatch)
    handler = ShiftKVChatHandler(tiny.mmproj, kv_budget=24)
    llama = Llama(str(tiny.text), chat_handler=handler, **{**SETTINGS, "n_ctx": 400})
    said(llama, ask(LONG, tiny.picture))
    before = ledger.left()
    for i in range(20):
        said(llama, ask(LONG + str(i), tiny.picture), max_tokens=4)
        next(llama.create_chat_completion(ask(LONG, tiny.picture), stream=True, **GREEDY))
        with pytest.raises(ContextOverflowError):
            said(llama, ask(LONG * 9, tiny.picture))
    gc.collect()
    assert ledger.left() == before == {"model": 1, "context": 1, "mmproj": 1, "sampler": 1}
    assert ledger.made["chunks"] == 61
    llama.close()
    del llama
    gc.collect()
    left = ledger.left()
    left.pop("sampler", None)
    assert left == {}


def test_ctrl_c_leaves_a_llama_that_works(cut, ours, demo, monkeypatch):
    def interrupted(*_):
        cut.chat_handler._readers[cut].interrupt._poll.ended = True
        raise KeyboardInterrupt

    messages = ask("Read line 2.", demo / "document.png")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("edge_shiftkv.native.shiftkv.select", interrupted)
        said(cut, messages)
    assert cut.create_completion("x", max_tokens=2, temperature=0.0)["usage"]["completion_tokens"] > 0
    assert said(cut, messages) == ours(messages)


# What it refuses


def test_what_cannot_be(tiny, demo, tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        ShiftKVChatHandler(tmp_path / "none.gguf")
    with pytest.raises(SettingError, match="kv_budget is 1"):
        ShiftKVChatHandler(kv_budget=1)
    with pytest.raises(SettingError, match="image_cache is -1"):
        ShiftKVChatHandler(image_cache=-1)
    with pytest.raises(SettingError, match="'nothing' is not known"):
        ShiftKVChatHandler(kv_method="nothing")
    hello = [{"role": "user", "content": "Hello"}]

    def llama(path, handler, **settings):
        return Llama(str(path), chat_handler=handler, **{**SETTINGS, "n_ctx": 300, **settings})

    with pytest.raises(ModelError, match="not the mmproj of this model"):
        said(llama(tiny.text, ShiftKVChatHandler(demo / "demo-mmproj-f16.gguf")), hello)
    with pytest.raises(SettingError, match="embedding=False"):
        said(llama(tiny.text, ShiftKVChatHandler(), embedding=True), hello)
    text_only = llama(tiny.text, ShiftKVChatHandler(kv_budget=24))
    with pytest.raises(PromptError, match="without an mmproj"):
        said(text_only, ask("What?", tiny.picture))
    with pytest.raises(ImageError, match=r"none\.png"):
        said(text_only, ask("What?", tmp_path / "none.png"))
    with pytest.raises(ImageError, match="allow_http=True"):
        said(text_only, ask("What?", "http://127.0.0.1:1/a.png"))
    with pytest.raises(PromptError, match="not a message with a role"):
        said(text_only, ["Hello"])
    with pytest.raises(PromptError, match="messages is empty"):
        said(text_only, [])
    for budget in (None, 24):
        text_only.chat_handler.kv_budget = budget
        with pytest.raises(ContextOverflowError, match="n_ctx is") as caught:
            said(text_only, [{"role": "user", "content": LONG * 4}])
        assert caught.value.n_ctx == 300
    assert said(text_only, hello)
    text_only.close()
    with pytest.raises(ClosedError):
        said(text_only, hello)


@pytest.mark.parametrize("budget", [None, 24])
def test_an_n_ctx_that_llama_cpp_rounds_up(tiny, budget):
    handler = ShiftKVChatHandler(tiny.mmproj, kv_budget=budget)
    llama = Llama(str(tiny.text), chat_handler=handler, **{**SETTINGS, "n_ctx": 300})
    answer = llama.create_chat_completion(ask(LONG, tiny.picture), **{**GREEDY, "max_tokens": None})
    assert answer["usage"]["total_tokens"] == 300
    with pytest.raises(ContextOverflowError, match="n_ctx is 300"):
        said(llama, ask(LONG + "x" * 150, tiny.picture))


def test_recurrent_models(tmp_path):
    meta = {"ssm.inner_size": 256, "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.time_step_rank": 4}
    path = write_model(Spec("mamba", meta=meta), tmp_path)
    handler = ShiftKVChatHandler(kv_budget=24)
    llama = Llama(str(path), chat_handler=handler, **SETTINGS)
    with pytest.raises(ShiftKVError, match="cannot be used with this model"):
        said(llama, [{"role": "user", "content": "a"}])
    handler.kv_budget = None
    said(llama, [{"role": "user", "content": "a"}], max_tokens=2)


def test_pictures_whose_tokens_see_each_other(tiny, tmp_path):
    mmproj = tiny_models.write_mmproj(tmp_path / "gemma.gguf", "gemma3", n_patches=8)
    handler = ShiftKVChatHandler(mmproj, kv_budget=24)
    llama = Llama(str(tiny.text), chat_handler=handler, **{**SETTINGS, "n_batch": 64, "n_ubatch": 32})
    with pytest.raises(SettingError, match="a picture of 64 tokens has to be read at once"):
        said(llama, ask("What?", tiny.picture))


# Beside


def test_it_says_what_was_cut(tiny, capsys):
    handler = ShiftKVChatHandler(tiny.mmproj, kv_budget=24)
    llama = Llama(str(tiny.text), chat_handler=handler, **{**SETTINGS, "n_ctx": 600})
    llama.verbose = True
    said(llama, ask(LONG, tiny.picture), max_tokens=1)
    assert "24 kept" in capsys.readouterr().err
    handler.verbose = False
    said(llama, ask(LONG, tiny.picture), max_tokens=1)
    assert "kept" not in capsys.readouterr().err


def test_a_heat_map(cut, demo):
    said(cut, ask("Read line 2.", demo / "document.png"))
    assert heatmap(cut.chat_handler.selection, [load_image(demo / "document.png")]).width > 640


def test_by_name(tiny):
    """As llama_cpp.server finds handlers."""
    registry = LlamaChatCompletionHandlerRegistry()
    registry.register_chat_completion_handler("shiftkv-test", ShiftKVChatHandler(kv_budget=24))
    try:
        named = Llama(str(tiny.text), chat_format="shiftkv-test", **SETTINGS)
        messages = [{"role": "user", "content": LONG}]
        given = Llama(str(tiny.text), chat_handler=ShiftKVChatHandler(kv_budget=24), **SETTINGS)
        assert said(named, messages) == said(given, messages)
    finally:
        registry.unregister_chat_handler("shiftkv-test")
