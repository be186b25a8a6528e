"""No text that a person wrote becomes a control token, and all of it reaches the model as it was."""

import re
from functools import cache

import gguf
import llama_cpp.llama_cpp as llama
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import tiny_models
from support.speakers import ALL_VOCABULARIES, ENCODERS, vocabulary_file, write_speaker
from support.templates import real_templates

from edge_shiftkv import PromptError
from edge_shiftkv.native.llama import Model
from edge_shiftkv.native.mtmd import Projector, Text
from edge_shiftkv.prompts.chat import ChatTemplate
from edge_shiftkv.prompts.control import ControlTokens
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.prompts.prompt import Prompt

_UNKNOWN, _CONTROL, _USER_DEFINED = 1, 8, 16  # enum llama_token_attr
USER_DEFINED = gguf.TokenType.USER_DEFINED
MARK = "\ue000123\ue001"
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
SEEN = {
    "command-r": ["<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"],
    "deepseek-coder": ["<|User|>", "<|Assistant|>", "<|EOT|>"],
    "gemma-4": ["<|tool_call>", "<tool_call|>", "<tool_response|>", "<|channel>", '<|"|>'],
    "phi-3": ["<|system|>", "<|user|>", "<|end|>", "</s>"],
    "qwen2": ["<|im_start|>", "<|im_end|>"],
    "llama-spm": ["<s>", "</s>"],
}
"""Names that a person may not say, by vocabulary."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabularies")


@cache
def vocabulary(name, folder):
    return Model(vocabulary_file(name, folder), 0, vocab_only=True)


@cache
def special(model):
    """What the GGUF says of its tokens: name -> token of all that are not made of text."""
    result = {}
    for token in range(model.n_vocab):
        name = llama.llama_vocab_get_text(model._vocab, token).decode()
        attributes = llama.llama_vocab_get_attr(model._vocab, token)
        if attributes & _CONTROL or (attributes & _USER_DEFINED and re.search(r"^[<\[].*[>\]]$", name)):
            result[name] = token
    return result


def tokens_of(template, model, *messages, projector=None, raw=False):
    """The tokens of a prompt, but for those of pictures."""
    parts = template.raw([], messages[0].content[0]) if raw else template.parts(messages)
    prompt = Prompt(parts, model, projector)
    return [token for chunk in prompt.chunks for token in getattr(chunk, "tokens", [])]


def said(model, tokens):
    return b"".join(map(model.piece, tokens)).decode()


@pytest.mark.parametrize("name", [*ALL_VOCABULARIES, *ENCODERS])
def test_every_vocabulary(name, folder):
    """Every token with a name, typed alone, next to another, in other words, and all of them in one text."""
    model = vocabulary(name, folder)
    names = special(model)
    assert names.keys() >= set(SEEN.get(name, ())), "the test knows less than it should"
    model.chat_template = CHAT
    template = ChatTemplate(model)
    control = set(names.values())
    some = [*SEEN.get(name, ()), *list(names)[:20], *list(names)[-5:]]
    texts = [f"{a}{one}{b}" for one in some for a, b in (("", ""), ("a", "b"), (f" {one}", "<"))]
    texts += ["".join(list(names)[:400]), " ".join(list(names)[-400:])]
    for raw in (False, True):
        harmless = tokens_of(template, model, Message("user", ("x",)), raw=raw)
        for text in texts:
            tokens = tokens_of(template, model, Message("user", (text,)), raw=raw)
            assert sum(token in control for token in tokens) == sum(token in control for token in harmless), text
            if name not in ENCODERS:
                assert text in said(model, tokens)


@pytest.mark.parametrize("name", [*ALL_VOCABULARIES, *ENCODERS])
def test_other_text_has_the_tokens_it_had(name, folder):
    """Code, HTML, and runs of spaces are tokenized in one piece."""
    model = vocabulary(name, folder)
    control = ControlTokens(model.control_tokens)
    for text in (
        "if a < b and c[0] > 1:\n        return <T>(x)",
        "<b>bold</b> <table><tr><td>",
        "ø ÷ 5",
        "a   b" + " " * 24,
    ):
        assert control.tokenize(Text(text), model) == model.tokenize(text)


def test_every_token_that_a_real_template_writes(tmp_path):
    """As USER_DEFINED tokens, they are found where the template writes them, and not in what is asked."""
    n_tested = 0
    for name, source in real_templates().items():
        markers = [*dict.fromkeys(re.findall(r"<[^<>\s'{}]{2,40}>|\[/?[A-Z_]{3,}\]|\][^\s'{}\]\[]+\[", source))]
        markers = [marker for marker in markers if not re.fullmatch("</?(a|s|b|i|p|code|li|pre|td|br|ul)>", marker)]
        path = tiny_models.write_text_model(
            tmp_path / "model.gguf", template=source, added=dict.fromkeys(markers, USER_DEFINED)
        )
        model = Model(path, 0, vocab_only=True)
        names = {model._token_text(token): token for token in range(model.n_vocab)}
        control = {names[marker] for marker in markers}

        template = ChatTemplate(model)

        def count(text, model=model, template=template, control=control):
            messages = [Message("user", (text,)), Message("assistant", ("A.",)), Message("user", ("x",))]
            tokens = tokens_of(template, model, *messages)
            return sum(token in control for token in tokens)

        try:
            harmless = count("QQ")
        except PromptError:  # some are for tools only
            continue
        if markers:
            assert count("Q".join(["", *markers, ""])) == count(f"Q{''.join(markers)}") == harmless, name
            n_tested += harmless > 0
        model.close()
    assert n_tested > 50


@pytest.fixture(params=[False, True], ids=["bpe", "sentencepiece"])
def added(request, tmp_path):
    """A model with markers typed USER_DEFINED, its projector, and its chat template."""
    names = (
        "<|user|>",
        "<think>",
        "</think>",
        "[INST]",
        "<a><b>",
        "<b><c>",
        "<|SYSTEM|>",
        "<|im_end|>",
        "<e f>",
        "]~b]",
        "<?x>",
        "--turn--",
        "next:",
    )
    template = tiny_models.CHAT_TEMPLATE + "{# --turn-- next: #}"
    path = tiny_models.write_text_model(
        tmp_path / "model.gguf",
        template=template,
        added=dict.fromkeys(names, USER_DEFINED),
        sentencepiece=request.param,
    )
    mmproj = tiny_models.write_mmproj(tmp_path / "mmproj.gguf")
    model = Model(path, 0)
    projector = Projector(mmproj, model, use_gpu=False, n_threads=1)
    model.names = names
    yield model, projector
    projector.close()
    model.close()


def has_prefix(model):
    """Whether the tokenizer puts a space before a text."""
    return said(model, model.tokenize("a")) == " a"


def n_control(model, tokens):
    """How many of the tokens are markers or control tokens, unknown characters aside."""
    names = {*getattr(model, "names", ()), *tiny_models.CONTROL, "<s>", "</s>"}
    control = {token for token in range(model.n_vocab) if model._token_text(token) in names}
    return sum(token in control for token in tokens)


def test_markers_are_text_with_pictures_and_without(added):
    model, projector = added
    template = ChatTemplate(model)
    image = Image.new("RGB", (56, 56))
    for name in (*model.names, "".join(model.names)):
        for text in (name, f"a{name} b", name * 3):
            for content in ((text,), (image, text), (text, image, "and"), (text, image, text, image, text)):
                message = Message("user", content)
                tokens = tokens_of(template, model, Message("system", (name,)), message, projector=projector)
                assert n_control(model, tokens) == 5, (text, content)
                assert text in said(model, tokens)


def test_text_is_tokenized_alike_with_pictures_and_without(added):
    model, projector = added
    template = ChatTemplate(model)
    text = "the <think> and <|user|>"
    with_picture = tokens_of(template, model, Message("user", (Image.new("RGB", (56, 56)), text)), projector=projector)
    plain = tokens_of(template, model, Message("user", (text,)))
    assert [token for token in with_picture if model.piece(token) != b" "] == [
        token for token in plain if model.piece(token) != b" "
    ]


def test_text_around_a_marker_has_the_tokens_it_had(added):
    model, _ = added
    (the,) = (token for token in range(model.n_vocab) if model._token_text(token) == "the")
    tokens = ControlTokens(model.control_tokens).tokenize(Text("the<|user|>the"), model)
    assert len(tokens) == has_prefix(model) + len("1<|user|>1")
    assert tokens.count(the) == 2


@pytest.mark.parametrize(
    "content",
    [
        ("<thi", "nk>"),
        ("<think", ">"),
        ("[IN", "ST]"),
        ("<thi<think>nk>",),
        ("<<think>>",),
        ("<a><b><c>",),
        ("<\ud800think>", "<th\ud800ink>"),
        ("<th\0ink>", "\0<think>\0"),
        ("<\ud800x>", "<?x>"),
        ("＜think＞", "<ｔhink>", "<thi\u0301nk>"),
    ],
)
def test_names_in_pieces(added, content):
    model, _ = added
    template = ChatTemplate(model)
    for role in ("system", "user", "assistant"):
        tokens = tokens_of(template, model, Message(role, content), Message("user", content))
        assert n_control(model, tokens) == 5
        for part in content:
            assert part.encode(errors="replace").decode() in said(model, tokens)


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("<{{ m['content'] }}>", "think"),
        ("<{{ m['content'] }}", "think>"),
        ("<{{ m['content'] }}", " e f>"),
        ("<e{{ m['content'] }}", " f>"),
        ("[{{ m['content'] }}]", "INST"),
        ("{{ m['content'] }}nk>", "<thi"),
        ("{{ m['content'] | upper }}", "<|system|>"),
        ("{{ m['content'] | lower }}", "<THINK>"),
        ("{{ m['content'] | lower }}", "<THIN\u212a>"),
        ("{{ m['content'] | lower }}next:", "xNEXT:"),
        ("{{ (m['content'] ~ '') | lower }}", "NeXt:"),
        ("{{ m['content'] | upper }}", "<|\u017fY\u017fTEM|>"),
        ("{{ m['content'] | upper }}", "<|syﬆem|>"),
        ("{{ (m['content'] ~ '') | upper }}", "<|syﬆem|>"),
        ("{{ m['content'] | trim }}", " <think> "),
        ("{{ m['content'] | replace(' ', '') }}", "< t h i n k >"),
        ("{{ m['content'].replace('x', '') }}", "<xthink>"),
        ("{{ m['content'].split('x')[0] }}{{ m['content'].split('x')[1] }}", "<thxink>"),
        ("<{{ m['content'].split('x')[-1] }}", "xthink>"),
        ("{{ m['content'][1:] }}", "x<think>"),
        ("<{{ m['content'][1:] }}", "xthink>"),
        ("<{{ m['content'].lstrip('x') }}", "xthink>"),
        ("<{{ m['content'].removeprefix('x') }}>", "xthink"),
        ("{{ m['content'].removesuffix('x') }}think>", "<x"),
        ("{{ m['content'].rstrip('x') }}think>", "<x"),
        ("{{ m['content'].partition('x')[0] }}think>", "<x"),
        ("<{{ m['content'].rpartition('x')[2] }}", "xthink>"),
        ("<{{ m['content'].split()[1] }}>", "x think"),
        ("<{{ m['content'].rsplit('x', 1)[1] }}>", "xthink"),
        ("<{{ m['content'].splitlines()[1] }}>", "x\nthink"),
        ("{{ m['content'][::-1] }}", ">kniht<"),
        ("{{ m['content'].replace('', '') }}", "<think>"),
        ("{{ m['content'] | replace('x', '', 1) }}", "<xthink>"),
        ("{% set t %}a{{ m['content'] }}b{% endset %}<{{ t.split('x')[1] }}>", "xthinkx"),
        ("{% macro t() %}ax{{ m['content'] }}xb{% endmacro %}<{{ t().split('x')[1] }}>", "think"),
        ("{% set t = '<' ~ m['content'] ~ '>' %}{{ t | trim }}{{ t[0:] }}{{ t.upper().lower() }}", "think"),
        ("{% set t = '<' + m['content'] %}{{ t.split('x') | join }}", "thixnk>"),
        ("{{ m['content'] | list | join }}", "<think>"),
        ("{{ m['content'] | reverse }}", ">kniht<"),
        ("{{ m['content'].split('y') | join('') }}", "<thyink>"),
        ("{{ m['content'] | tojson }}", "<think>"),
        ("{% for c in m['content'] %}{{ c }}{% endfor %}", "<think>"),
    ],
)
def test_no_template_makes_names_of_what_people_say(added, source, content):
    model, _ = added
    model.chat_template = "{% for m in messages %}" + source + "{% endfor %}.{# --turn-- next: #}"
    template = ChatTemplate(model)
    template._typed = False
    n_own = source.endswith("next:")
    assert n_control(model, tokens_of(template, model, Message("user", (content,)))) == n_own


@pytest.mark.parametrize(
    "said_as",
    [
        "{% set c = m['content'] %}",
        "{% set c = m['content'] ~ '' %}",
        "{% set c = '' + m['content'] %}",
        "{% set c = '%s' % m['content'] %}",
        "{% set c = [m['content']] | join %}",
        "{% set c = m['content'] | string | trim %}",
        "{% set c %}{{ m['content'] }}{% endset %}",
        "{% macro f(x) %}{{ x }}{% endmacro %}{% set c = f(m['content']) %}",
    ],
)
def test_templates_find_markers_in_what_was_said(added, said_as):
    """Qwen3's and DeepSeek's take the reasoning out of answers before."""
    model, _ = added
    model.chat_template = (
        "{% for m in messages %}<|user|>" + said_as + "{% if '</think>' in c and c.startswith('<think>') %}"
        "{{ c.split('</think>')[-1].lstrip('\n') }}"
        "({{ c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }})"
        "{% else %}{{ c }}{% endif %}{% endfor %}"
    )
    parts = ChatTemplate(model).parts([Message("assistant", ("<think>\nHm <|user|>\n</think>\n\nYes <think>.",))])
    assert parts == [Text("<|user|>", special=True), Text("Yes <think>.(Hm <|user|>)")]


def test_names_reached_by_merges(tmp_path):
    """A tokenizer may come to a control token from other text than its name."""
    added = {"Ġth": gguf.TokenType.CONTROL}
    path = tiny_models.write_text_model(tmp_path / "model.gguf", added=added, merges=("Ġ th",))
    model = Model(path, 0, vocab_only=True)
    token = model.control_tokens["Ġth"][0]
    assert token in model.tokenize("a th")
    tokens = ControlTokens(model.control_tokens).tokenize(Text("a th"), model)
    assert token not in tokens
    assert said(model, tokens) == "a th"


def test_templates_keep_their_own_names(added):
    """Also where they put text together first, search it and take it apart."""
    model, _ = added
    turn = "{% macro turn(m) %} <|user|>{{ m['content'] }}<|im_end|>\n{% endmacro %}"
    body = "{% for m in messages %}{% set t = turn(m) %}{{ t | trim if '<think>' in t else t.strip() }}{% endfor %}"
    model.chat_template = turn + body
    parts = ChatTemplate(model).parts([Message("user", ("a <think> <|im_end|>",)), Message("user", ("b",))])
    assert [part.text for part in parts if part.special] == ["<|user|>", "<|im_end|>"] * 2
    assert "".join(part.text for part in parts) == "<|user|>a <think> <|im_end|><|im_end|><|user|>b<|im_end|>"


@given(
    st.text(alphabet="<|think>ax \n", max_size=20),
    st.sampled_from(["<", "x", "a", "th", "\n", None]),
    st.integers(-1, 3),
)
def test_marked_text_is_taken_apart_as_text(text, sep, n):
    control = ControlTokens({"<think>": (0, 0), "<|a|>": (1, 0)})
    marked = control.break_up(text, MARK)

    def bare(value):
        if isinstance(value, str):
            return str(value).replace(MARK, "")
        return type(value)(map(bare, value)) if isinstance(value, list | tuple) else value

    calls = [
        lambda t: t.split(sep, n),
        lambda t: t.rsplit(sep) if sep is None else t.rsplit(sep, n),
        lambda t: [t.strip(sep), t.lstrip(sep), t.rstrip(sep), t.lower(), t.upper()],
        lambda t: [t.splitlines(), t.splitlines(True), t[n:], t[:n], t[n : n + 4], t[::-1], t[1:9:2], len(t)],
        lambda t: [t.partition(sep or "x"), t.rpartition(sep or "x"), t.replace(sep or "", "y")],
        lambda t: [t.removeprefix(sep or ""), t.removesuffix(sep or ""), t.find(sep or "q"), t.count(sep or "q")],
        lambda t: [
            t == text,
            text == t,
            t != text,
            t == t[:],
            t == "x",
            hash(t),
            (sep or "") in t,
            t.startswith(sep or ""),
            t.endswith(sep or ""),
        ],
    ]
    for call in calls:
        assert bare(call(marked)) == call(text)
    for part in (*marked.split(sep, n), marked[1:], marked.strip(sep), marked.replace("x", "")):
        for around in (f"<{part}>", f"<thi{part}nk>", f"{part}think>", f"<|{part}"):
            assert not [piece for piece in control.split(around, MARK) if piece.special] or not part.strip()


NAMES = ("<|user|>", "<think>", "[INST]", "<a>b", "b<c>", "<>", "|>", "user")
texts = st.lists(
    st.sampled_from([*NAMES, *"".join(NAMES), " ", "\n", "é", MARK[0], "\ud800"]) | st.text(max_size=3), max_size=12
).map("".join)


@given(text=texts, before=texts, after=texts)
def test_marked_text_has_no_names(text, before, after):
    control = ControlTokens({name: (i, 0) for i, name in enumerate(NAMES)})
    marked = control.break_up(text, MARK)
    assert str(marked).replace(MARK, "") == text
    if not text.strip():
        return
    # A template's own text has no marks, and is not to change what is found in it by what is put behind it.
    around = [part for side in (before, after) for part in control.split(side, MARK) if part.special]
    parts = control.split(f"{before}{marked}{after}", MARK)
    assert "".join(part.text for part in parts) == f"{before}{text}{after}".replace(MARK, "")
    assert len([part for part in parts if part.special]) <= len(around)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=texts)
def test_no_text_has_control_tokens(added, text):
    model, _ = added
    control = ControlTokens(model.control_tokens)
    tokens = control.tokenize(Text(text), model)
    plain = text.encode(errors="replace").decode().replace("▁", " " if has_prefix(model) else "▁")
    assert n_control(model, tokens) == 0
    assert said(model, tokens).removeprefix(" " * has_prefix(model)) == plain


@pytest.mark.parametrize("name", ["command-r", "deepseek-coder", "gemma-4", "phi-3", "qwen2", "llama-spm", "gpt-neox"])
def test_no_text_has_control_tokens_of_real_vocabularies(name, folder):
    model = vocabulary(name, folder)
    names = special(model)
    control = ControlTokens(model.control_tokens)
    some = [*SEEN.get(name, ()), *list(names)[-200:]]

    @settings(deadline=None)
    @given(st.lists(st.sampled_from(some) | st.text(max_size=4), max_size=8).map("".join))
    def check(text):
        tokens = control.tokenize(Text(text), model)
        assert not set(tokens) & set(names.values())
        plain = text.encode(errors="replace").decode()
        # SentencePiece writes spaces with this letter.
        assert said(model, tokens).replace("▁", " ").removeprefix(" " * has_prefix(model)) == plain.replace("▁", " ")

    check()


def test_a_picture_among_the_markers_of_sentencepiece(folder, tmp_path):
    """Llama's vocabulary, as LLaVA-1.5 has it: text goes on without a space that nobody wrote."""
    model = Model(write_speaker("llama-spm", folder), 0)
    projector = Projector(
        tiny_models.write_mmproj(tmp_path / "mmproj.gguf", n_embd_text=128), model, use_gpu=False, n_threads=1
    )
    message = Message("user", ("before</s>", Image.new("RGB", (56, 56)), "<s>after"))
    tokens = tokens_of(ChatTemplate(model), model, message, projector=projector)
    assert n_control(model, tokens) == 1  # the beginning
    assert said(model, tokens) == " USER: before</s> <s>after\n ASSISTANT:".replace("\n A", "\nA")
    projector.close()
    model.close()
