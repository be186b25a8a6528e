"""Answers with a draft against answers without, on random models of one vocabulary; and whatever ends an answer."""

import dataclasses
import json
import re
import signal

import pytest
from llama_cpp import Llama
from support import tiny_models
from support.gguf_random import Spec, write_model

from edge_shiftkv import ModelError, Runtime, SettingError, ShiftKVError
from edge_shiftkv.cli import main
from edge_shiftkv.sampling import Sampling
from edge_shiftkv.speculative import draft as draft_module
from edge_shiftkv.speculative.options import DraftOptions

PROMPT = "the quick brown fox jumps over the lazy dog. " * 2
SAMPLED = (
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_k": 0, "top_p": 0.9, "min_p": 0.0},
    {"temperature": 1.0, "seed": 3, "top_k": 5, "top_p": 1.0},
    {"temperature": 1.3, "seed": 4, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
)
PENALIZED = (
    {"repeat_penalty": 1.5},
    {"presence_penalty": 2.0, "frequency_penalty": 0.5, "temperature": 0.7, "seed": 5},
    {"logit_bias": {65: 3.0, 101: -float("inf")}},
)
WINDOW = Spec("gemma3", n_layer=6, meta={"attention.sliding_window": 16})


def with_draft(target, draft, n_draft=4, **options):
    rule = options.pop("rule", None)
    return Runtime(target, n_threads=1, draft=draft, draft_options=DraftOptions(n_draft, rule), **options)


@pytest.fixture
def alone(pair):
    with Runtime(pair.target, n_threads=1) as runtime:
        yield runtime


@pytest.fixture
def plain(token_by_token, alone):
    return alone


@pytest.fixture
def drafted(token_by_token, pair):
    """With drafts of four tokens, most of which are rejected, often in the middle."""
    with with_draft(pair.target, pair.draft) as runtime:
        yield runtime


@pytest.mark.parametrize("which", ["draft", "same", "stranger"])
@pytest.mark.parametrize("n_draft", [1, 2, 5, 16, None])
def test_greedy(pair, alone, drawn, which, n_draft):
    def ask(runtime):
        return runtime.generate(PROMPT, raw=True, max_tokens=48)

    ask(alone)
    with with_draft(pair.target, getattr(pair, which), n_draft) as runtime:
        figures = ask(runtime).figures.draft
    drawn.assert_same(*drawn, lambda: ask(alone))
    if n_draft and which == "same":
        assert figures.accepted >= 0.8 * figures.drafted
    if which == "stranger":
        assert figures.accepted < figures.drafted or n_draft is None


@pytest.mark.parametrize("n_draft", [1, 2, 5, 16])
def test_all_is_accepted_of_the_same_model(pair, token_by_token, n_draft):
    with with_draft(pair.target, pair.same, n_draft) as runtime:
        figures = runtime.generate(PROMPT, raw=True, max_tokens=48).figures.draft
    assert figures.accepted == figures.drafted
    assert figures.tokens_per_pass > min(n_draft, 8)


@pytest.mark.parametrize("options", [*SAMPLED, *PENALIZED])
def test_a_seed_gives_one_answer_with_any_draft(pair, alone, drawn, options):
    def ask(runtime):
        return runtime.generate(PROMPT, raw=True, max_tokens=40, **options)

    ask(alone)
    accepted = {}
    for which in ("draft", "same", "stranger"):
        with with_draft(pair.target, getattr(pair, which)) as runtime:
            answer = ask(runtime)
        drawn.assert_same(drawn[0], drawn[-1], lambda: ask(alone))
        accepted[which] = answer.figures.draft.accepted
    assert accepted["same"] > accepted["draft"] > accepted["stranger"]


def test_the_noise_is_shared_all_is_accepted_of_the_same_model(pair, token_by_token):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7}
    with with_draft(pair.target, pair.same) as runtime:
        figures = runtime.generate(PROMPT, raw=True, max_tokens=40, **options).figures.draft
    assert figures.accepted == figures.drafted


GRAMMARS = (
    {"grammar": 'root ::= ("the " | "a ") ([a-z] [a-z]? [a-z]? " "){4,9} "end."'},
    {
        "json_schema": {
            "type": "object",
            "properties": {"word": {"type": "string", "pattern": "^[a-z]{3,12}$"}, "n": {"type": "integer"}},
            "required": ["word", "n"],
        }
    },
)


@pytest.mark.parametrize("options", [{}, *SAMPLED, PENALIZED[1]])
@pytest.mark.parametrize("kept_to", GRAMMARS)
def test_a_grammar_gives_one_answer_with_any_draft(pair, plain, kept_to, options):
    request = {"raw": True, "max_tokens": 60, "logprobs": 2, **kept_to, **options}
    expected = plain.generate(PROMPT, **request)
    assert expected.finish_reason == "stop"
    for which in ("draft", "same", "stranger"):
        with with_draft(pair.target, getattr(pair, which)) as runtime:
            answer = runtime.generate(PROMPT, **request)
        assert (answer.text, answer.finish_reason) == (expected.text, "stop")
        assert answer.figures.generated_tokens == expected.figures.generated_tokens
        assert answer.logprobs == expected.logprobs
        assert answer.figures.draft.drafted > 0


def test_a_draft_draws_with_the_filters_only(drafted, monkeypatch):
    """Where the target is in its grammar, and in its penalties, the draft does not know."""
    made = []
    sampler = draft_module.Sampler
    monkeypatch.setattr(
        draft_module, "Sampler", lambda model, sampling: made.append(sampling) or sampler(model, sampling)
    )
    filters = {"temperature": 0.9, "top_k": 30, "top_p": 0.8, "min_p": 0.01, "seed": 3}
    rest = {"repeat_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0, "logit_bias": {65: 1.0}}
    drafted.generate(PROMPT, raw=True, max_tokens=4, logprobs=3, **filters, **rest, **GRAMMARS[0])
    assert made == [Sampling(**filters)]


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_of_the_paper_keeps_to_a_grammar(pair, seed):
    """A proposal that the grammar does not allow has the probability 0 for the target."""
    request = {"raw": True, "temperature": 1.0, "seed": seed, "top_k": 0, "max_tokens": 60}
    accepted = 0
    with with_draft(pair.target, pair.same, rule="tokentiming") as runtime:
        for grammar in ('root ::= ("the" | "a") (" " [a-z]){5}', 'root ::= ([a-z] | " "){12}'):
            answer = runtime.generate(PROMPT, grammar=grammar, logprobs=0, **request)
            assert re.fullmatch("(the|a)( [a-z]){5}|[a-z ]{12}", answer.text)
            assert answer.finish_reason == "stop"
            assert len(answer.logprobs) == answer.figures.generated_tokens
            accepted += answer.figures.draft.accepted
    assert accepted > 0


@pytest.mark.parametrize("options", [{}, *SAMPLED])
def test_a_draft_is_judged_by_what_it_would_have_written(pair, plain, judged_only, options):
    expected = plain.generate(PROMPT, raw=True, max_tokens=60, **options).text
    agreed = {}
    for which in ("same", "stranger"):
        judged_only.clear()
        with Runtime(pair.target, n_threads=1, draft=getattr(pair, which)) as runtime:
            assert runtime.generate(PROMPT, raw=True, max_tokens=60, **options).text == expected
        n = sum(judged.n for judged in judged_only)
        assert n >= 3 * 10
        agreed[which] = sum(judged.n_agreed for judged in judged_only) / n
    assert agreed["same"] == 1
    assert agreed["stranger"] < 0.8  # the noise is shared


@pytest.mark.parametrize(
    "spec",
    [
        WINDOW,
        Spec("qwen2"),
        Spec(
            "gpt-oss",
            meta={
                "expert_count": 4,
                "expert_used_count": 2,
                "expert_feed_forward_length": 96,
                "attention.sliding_window": 16,
            },
        ),
    ],
    ids=lambda spec: spec.arch,
)
def test_sliding_windows_and_other_architectures(tmp_path, drawn, spec):
    model = write_model(spec, tmp_path)
    draft = write_model(dataclasses.replace(spec, n_layer=spec.n_layer - 1), tmp_path)

    def ask(runtime):
        return runtime.generate(PROMPT, raw=True, max_tokens=100)

    with Runtime(model, n_threads=1) as alone:
        ask(alone)
        for path in (draft, model):
            with with_draft(model, path) as runtime:
                figures = ask(runtime).figures.draft
            assert figures.accepted > 0
            drawn.assert_same(drawn[0], drawn[-1], lambda: ask(alone))


@pytest.mark.parametrize("options", [{}, SAMPLED[0]])
@pytest.mark.parametrize("spec", [Spec(), WINDOW], ids=lambda spec: spec.arch)
def test_on_a_cut_cache(tmp_path, drawn, spec, options):
    model = write_model(spec, tmp_path)
    draft = write_model(dataclasses.replace(spec, n_layer=spec.n_layer - 1), tmp_path)

    def ask(runtime):
        return runtime.generate(PROMPT, raw=True, max_tokens=60, **options)

    with Runtime(model, n_threads=1, kv_budget=24) as alone, with_draft(model, draft, kv_budget=24) as runtime:
        expected, answer = ask(alone), ask(runtime)
        drawn.assert_same(*drawn, lambda: ask(alone))
    assert answer.figures.kept_tokens == expected.figures.kept_tokens == 24
    assert answer.figures.draft.accepted > 0


@pytest.mark.parametrize("kv_budget", [None, 20])
@pytest.mark.parametrize("kind", ["text", "qwen_text"])
@pytest.mark.parametrize("seeing", [False, True])
def test_pictures(tiny, drawn, kv_budget, kind, seeing):
    mmproj = tiny.qwen_mmproj if kind == "qwen_text" else tiny.mmproj
    model = getattr(tiny, kind)
    options = DraftOptions(4, mmproj=mmproj if seeing else None)
    with (
        Runtime(model, mmproj, n_threads=1, kv_budget=kv_budget) as alone,
        Runtime(model, mmproj, n_threads=1, kv_budget=kv_budget, draft=model, draft_options=options) as runtime,
    ):
        answers = []
        for question in (("What is on the picture? ", [tiny.picture]), ("And here? ",)):
            alone.generate(*question, max_tokens=24)
            answers.append(runtime.generate(*question, max_tokens=24))
            drawn.assert_same(*drawn[-2:], lambda question=question: alone.generate(*question, max_tokens=24))
    figures = answers[0].figures.draft
    if not seeing:
        assert figures.accepted < figures.drafted


@pytest.mark.parametrize("kind", ["text", "qwen_text"])
def test_all_is_accepted_of_a_draft_that_sees_what_the_target_sees(tiny, token_by_token, kind):
    mmproj = tiny.qwen_mmproj if kind == "qwen_text" else tiny.mmproj
    model = getattr(tiny, kind)
    options = DraftOptions(4, mmproj=mmproj)
    with Runtime(model, mmproj, n_threads=1, draft=model, draft_options=options) as runtime:
        figures = runtime.generate("What is on the picture? ", [tiny.picture], max_tokens=24).figures.draft
    assert figures.accepted == figures.drafted > 0


def test_an_answer_ends_at_max_tokens_in_the_middle_of_a_block(pair, plain):
    with with_draft(pair.target, pair.same) as runtime:
        for n in range(1, 14):
            answer = runtime.generate(PROMPT, raw=True, max_tokens=n)
            assert answer.text == plain.generate(PROMPT, raw=True, max_tokens=n).text
            assert (answer.finish_reason, answer.figures.generated_tokens) == ("length", n)
            draft = answer.figures.draft
            # Every round gives a token of the target's own and what it accepted; the first token is the prompt's.
            assert draft.rounds + draft.accepted == n - 1


def test_an_answer_ends_where_n_ctx_does(pair, token_by_token):
    with Runtime(pair.target, n_threads=1, n_ctx=130) as runtime:
        expected = runtime.generate(PROMPT, raw=True, max_tokens=None)
    with with_draft(pair.target, pair.same, n_ctx=130) as runtime:
        answer = runtime.generate(PROMPT, raw=True, max_tokens=None)
    assert (answer.text, answer.finish_reason) == (expected.text, "length")


def test_stop_strings_in_a_block(pair, plain):
    text = plain.generate(PROMPT, raw=True, max_tokens=40).text
    with with_draft(pair.target, pair.same) as runtime:
        for start in range(0, len(text) - 2, 3):
            stop = text[start : start + 2]
            options = {"raw": True, "max_tokens": 40, "stop": ["no such text", stop]}
            expected, answer = plain.generate(PROMPT, **options), runtime.generate(PROMPT, **options)
            assert answer.text == expected.text == text[: text.index(stop)]
            assert answer.finish_reason == "stop"
            assert answer.figures.generated_tokens == expected.figures.generated_tokens
            draft = answer.figures.draft
            assert draft.accepted <= answer.figures.generated_tokens
        assert runtime.generate(PROMPT, raw=True, max_tokens=40).text == text


def test_the_models_own_end_in_a_block(pair, drawn, token_by_token):
    with Runtime(pair.target, n_threads=1) as runtime:
        runtime.generate(PROMPT, raw=True, max_tokens=40)
        tokens = drawn[-1].tokens
        for end in tokens[1:20]:
            runtime.engine.model.ends_generation = lambda token, end=end: token == end
            expected = runtime.generate(PROMPT, raw=True, max_tokens=40)
            with with_draft(pair.target, pair.same) as other:
                other.engine.model.ends_generation = runtime.engine.model.ends_generation
                answer = other.generate(PROMPT, raw=True, max_tokens=40)
            assert (answer.text, answer.finish_reason) == (expected.text, "stop")
            assert answer.figures.generated_tokens == tokens.index(end)
            assert drawn[-1].tokens == tokens[: tokens.index(end) + 1]


def test_a_stream_closed_in_the_middle_of_a_block(drafted, plain):
    expected = plain.generate(PROMPT, raw=True, max_tokens=32).text
    for n in range(1, 9):
        with drafted.stream(PROMPT, raw=True, max_tokens=32) as stream:
            pieces = [next(stream) for _ in range(n)]
        assert expected.startswith("".join(pieces))
    assert drafted.generate(PROMPT, raw=True, max_tokens=32).text == expected


@pytest.mark.parametrize(
    "where",
    [
        "edge_shiftkv.speculative.draft.Draft.propose",
        "edge_shiftkv.speculative.prefix_cache.PrefixCache.extend",
        "edge_shiftkv.speculative.loop.verify",
        "edge_shiftkv.native.llama.Context.remove",
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ShiftKVError])
def test_an_error_inside(drafted, plain, monkeypatch, where, error):
    expected = plain.generate(PROMPT, raw=True, max_tokens=32).text

    def fail(*_, **__):
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise error("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(error):
            drafted.generate(PROMPT, raw=True, max_tokens=32)
    assert drafted.generate(PROMPT, raw=True, max_tokens=32).text == expected


def test_requests_one_after_the_other(drafted, plain):
    for options in ({}, SAMPLED[0], {"max_tokens": 1}, SAMPLED[1], PENALIZED[0], {}):
        for prompt in (PROMPT, PROMPT * 3, PROMPT + "and"):
            request = {"raw": True, "max_tokens": 12, **options}
            assert drafted.generate(prompt, **request).text == plain.generate(prompt, **request).text


def test_a_prompt_that_goes_on_is_not_read_again(drafted, monkeypatch):
    from edge_shiftkv.speculative.prefix_cache import PrefixCache

    read = []
    hold = PrefixCache.hold
    monkeypatch.setattr(PrefixCache, "hold", lambda *arguments: read.append(hold(*arguments)) or read[-1])
    drafted.generate(PROMPT * 4, raw=True, max_tokens=8)
    first, *others = read
    assert first > 4 * len(PROMPT.split())
    assert max(others) <= 5
    read.clear()
    drafted.generate(PROMPT * 4 + "and then", raw=True, max_tokens=8)
    assert read[0] <= len("and then") + 1


def test_a_draft_with_a_shorter_context_goes_on_with_the_end(tmp_path, pair, alone, drawn):
    draft = write_model(Spec(n_layer=2, meta={"context_length": 256}), tmp_path)
    request = {"raw": True, "max_tokens": 200}
    for prompt in (PROMPT, PROMPT * 4):
        alone.generate(prompt, **request)
        with with_draft(pair.target, draft) as runtime:
            figures = runtime.generate(prompt, **request).figures.draft
        drawn.assert_same(*drawn[-2:], lambda prompt=prompt: alone.generate(prompt, **request))
        assert figures.accepted > 0
        assert figures.drafted > 300


def test_chat_and_its_figures(tiny, token_by_token):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]
    with Runtime(tiny.text, n_threads=1) as runtime:
        expected = runtime.create_chat_completion(messages, max_tokens=16)
    with with_draft(tiny.text, tiny.text) as runtime:
        answer = runtime.create_chat_completion(messages, max_tokens=16)
        *_, last = runtime.create_chat_completion(messages, max_tokens=16, stream=True)
    assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
    # The same template and the same model: the draft is right about everything.
    assert answer["figures"]["draft"]["accepted"] == answer["figures"]["draft"]["drafted"] > 0
    assert last["figures"]["draft"]["accepted"] == answer["figures"]["draft"]["accepted"]
    assert expected["figures"]["draft"] is None


def test_a_draft_whose_template_refuses_the_conversation(tmp_path, tiny, token_by_token):
    template = "{{ raise_exception('no') }}"
    draft = tiny_models.write_text_model(tmp_path / "draft.gguf", template=template)
    with Runtime(tiny.text, n_threads=1) as runtime:
        expected = runtime.generate(PROMPT, max_tokens=16).text
    with with_draft(tiny.text, draft) as runtime:
        answer = runtime.generate(PROMPT, max_tokens=16)
    assert answer.text == expected
    assert answer.figures.draft.drafted > 0


def test_the_penalties_of_llama_cpp_python(tiny):
    messages = [{"role": "user", "content": PROMPT}]
    penalties = {"repeat_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    llama = Llama(str(tiny.text), n_ctx=512, n_threads=1, flash_attn=True, verbose=False)
    theirs = llama.create_chat_completion(messages, temperature=0, max_tokens=100, **penalties)
    with Runtime(tiny.text, n_threads=1) as runtime:
        ours = runtime.create_chat_completion(messages, max_tokens=100, **penalties)
        assert ours["choices"][0]["message"] == theirs["choices"][0]["message"]
        without = runtime.create_chat_completion(messages, max_tokens=100)
        assert ours["choices"][0]["message"] != without["choices"][0]["message"]


def test_on_the_command_line(pair, capsys, token_by_token):
    arguments = ["run", "-m", str(pair.target), "-p", PROMPT, "--raw", "-n", "24", "--threads", "1"]
    main(arguments)
    expected = capsys.readouterr().out
    draft = ["--draft", str(pair.draft), "--draft-tokens", "4"]
    assert main([*arguments, *draft, "--stats"]) == 0
    output = capsys.readouterr()
    assert output.out == expected
    for label in ("rounds", "drafted", "draft", "align", "verify"):
        assert f"\n{label:16}" in output.err
    assert main([*arguments, *draft, "--json", "--temperature", "1", "--seed", "1", "--draft-rule", "tokentiming"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]["draft"]
    assert figures["rounds"] > 0
    assert figures["drafted"] >= figures["accepted"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_draft": 0}, "n_draft is 0"), ({"n_draft": 17}, "n_draft is 17"), ({"rule": "exact"}, "rule 'exact'"),
     ({"min_confidence": 1.5}, "min_confidence is 1.5")],
)  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(SettingError, match=message):
        DraftOptions(**options)


def test_files_that_cannot_draft(tmp_path, pair):
    meta = {"ssm.inner_size": 256, "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.time_step_rank": 4}
    mamba = write_model(Spec("mamba", meta=meta), tmp_path)
    encoder = write_model(Spec("t5", n_head_kv=4, meta={"attention.relative_buckets_count": 8}), tmp_path)
    embedding = write_model(Spec("qwen2", seed=9, meta={"pooling_type": 3}), tmp_path)
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    for path, message in (
        (tmp_path / "missing.gguf", "missing.gguf: No such file"),
        (text, "not a GGUF file"),
        (encoder, "models with a text encoder are not supported"),
        (mamba, "its memory does not take tokens back"),
        (embedding, "it is an embedding model"),
    ):
        with pytest.raises(ModelError, match=message):
            Runtime(pair.target, n_threads=1, draft=path)
    with pytest.raises(ModelError, match="does not take tokens back"):
        Runtime(mamba, n_threads=1, draft=pair.draft)


def test_a_low_confidence_ends_a_draft(pair):
    with Runtime(
        pair.target, n_threads=1, draft=pair.draft, draft_options=DraftOptions(8, min_confidence=1.0)
    ) as runtime:
        figures = runtime.generate(PROMPT, raw=True, max_tokens=16).figures.draft
    assert figures.drafted == 0
    assert figures.rounds == 15
    drafted = []
    for confidence in (0.0, 0.05, 0.3):
        options = DraftOptions(8, min_confidence=confidence)
        with Runtime(pair.target, n_threads=1, draft=pair.draft, draft_options=options) as runtime:
            drafted.append(runtime.generate(PROMPT, raw=True, max_tokens=32).figures.draft.drafted)
    assert drafted[0] > drafted[1] > drafted[2]


def test_a_wrong_option_is_found_before_the_stream(drafted):
    with pytest.raises(SettingError, match="logit_bias"):
        drafted.stream(PROMPT, raw=True, logit_bias={10**9: 1.0})
