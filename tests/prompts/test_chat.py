import ctypes

import llama_cpp.llama_cpp as llama
import pytest
from PIL import Image
from support import tiny_models

from edge_shiftkv import PromptError, Runtime
from edge_shiftkv.native.llama import ATTR_LSTRIP, ATTR_RSTRIP
from edge_shiftkv.native.mtmd import Text
from edge_shiftkv.prompts.chat import PLAIN_TEMPLATE
from edge_shiftkv.prompts.control import ControlTokens
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.prompts.prompt import Prompt

MARK = "\ue000123\ue001"
TYPED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant{{ '\n' }}"
)


def user(*content):
    return Message("user", content)


@pytest.fixture
def template(runtime):
    return runtime.engine.template


@pytest.fixture
def with_template(tmp_path):
    """A function: a template's source to the ChatTemplate of a model with it."""
    runtimes = []

    def load(source):
        path = tiny_models.write_text_model(tmp_path / f"{len(runtimes)}.gguf", template=source)
        runtimes.append(Runtime(path, n_threads=1))
        return runtimes[-1].engine.template

    yield load
    for runtime in runtimes:
        runtime.close()


def joined(parts):
    """Parts as one string, control tokens in braces, pictures as *."""
    return "".join(f"{{{p.text}}}" if getattr(p, "special", False) else getattr(p, "text", "*") for p in parts)


def tokenize_all(model, text):
    """llama.cpp's tokens of a rendered template, with the names of control tokens parsed everywhere."""
    data = text.encode()
    tokens = (llama.llama_token * (len(data) + 2))()
    n = llama.llama_tokenize(model._vocab, data, len(data), tokens, len(tokens), False, True)
    return tokens[:n]


def test_tokens_are_those_of_the_whole_text(runtime, template):
    parts = template.parts([Message("system", ("the rules",)), user("  the question ")])
    rendered = "".join(part.text for part in parts)
    assert rendered == (
        "<|im_start|>system\nthe rules<|im_end|>\n<|im_start|>user\n  the question <|im_end|>\n<|im_start|>assistant\n"
    )
    (chunk,) = Prompt(parts, runtime.engine.model, None).chunks
    assert chunk.tokens == tokenize_all(runtime.engine.model, rendered)


@pytest.mark.parametrize("name", tiny_models.CONTROL)
def test_control_tokens_in_a_prompt_stay_text(runtime, tiny, name):
    control = {token for token, _ in runtime.engine.model.control_tokens.values()}

    def count(text, images):
        parts = runtime.engine.template.parts([user(*images, text)])
        prompt = Prompt(parts, runtime.engine.model, runtime.engine.projector)
        tokens = [token for chunk in prompt.chunks if hasattr(chunk, "tokens") for token in chunk.tokens]
        assert name.encode() in b"".join(map(runtime.engine.model.piece, tokens)) or text == "x"
        return sum(token in control for token in tokens)

    image = Image.new("RGB", (56, 56))
    for images in ([], [image]):
        for text in (f"a{name}b", name, f"{name}\n{name}", name * 3):
            assert count(text, images) == count("x", images) == 3


@pytest.mark.parametrize(
    "content",
    [
        ("<|im_", "end|>"),
        ("<|im_end", "|>"),
        ("<|im_  ", "  end|>"),
        ("<|im_<|im_end|>end|>",),
        ("<", "|im_end|>"),
    ],
)
@pytest.mark.parametrize(
    "source", [tiny_models.CHAT_TEMPLATE, TYPED, TYPED.replace("part['text']", "part['text'] | trim")]
)
def test_a_control_token_cannot_be_put_together(with_template, content, source):
    parts = with_template(source).parts([user(*content)])
    assert [part.text for part in parts if part.special] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


def test_case_does_not_help(with_template):
    source = "{% for message in messages %}{{ message['content'] | lower }}{% endfor %}"
    parts = with_template(source).parts([user("<|IM_END|>")])
    assert parts == [Text("<|im_end|>")]


def test_names_that_overlap_are_broken_up():
    control = ControlTokens({"<a>b": (1, 0), ">b<": (2, 0)})
    assert [part.special for part in control.split(control.break_up("<a>b<", MARK), MARK)] == [False]


def test_blank_text_has_nothing_to_break_up():
    control = ControlTokens({"<a>": (1, 0)})
    assert control.break_up(" \n", MARK) == " \n"
    assert str(control.break_up("x \n", MARK)) == f"{MARK}x \n"


def test_space_around_tokens_that_take_it():
    control = ControlTokens({"<l>": (1, ATTR_LSTRIP), "<r>": (2, ATTR_RSTRIP), "<n>": (3, 0)})
    assert joined(control.split("a <n> b <l> c <r> \n d", MARK)) == "a {<n>} b{<l>} c {<r>}d"


def test_pictures_stay_where_they_are(template):
    a, b = Image.new("RGB", (56, 56)), Image.new("RGB", (56, 56), "white")
    parts = template.parts([user(a, "first", b, "second", "third")])
    assert joined(parts[1:-4]) == "user\n*first*second\nthird"
    assert [part for part in parts if isinstance(part, Image.Image)] == [a, b]


@pytest.mark.parametrize("source", [tiny_models.CHAT_TEMPLATE, TYPED])
def test_templates_take_strings_or_parts(with_template, source):
    parts = with_template(source).parts([user(Image.new("RGB", (56, 56)), "question")])
    assert joined(parts) == "{<|im_start|>}user\n*question{<|im_end|>}\n{<|im_start|>}assistant\n"


def test_a_model_without_a_template_gets_the_plain_one(with_template):
    conversation = [Message("system", ("Rules.",)), user("Q?"), Message("assistant", ("A.",)), user("R?")]
    expected = "Rules.\nUSER: Q?\nASSISTANT: A.\nUSER: R?\nASSISTANT:"
    assert joined(with_template(None).parts(conversation)) == expected
    assert joined(with_template(PLAIN_TEMPLATE).parts(conversation)) == expected


def test_a_template_that_refuses(with_template):
    template = with_template("{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}x")
    with pytest.raises(PromptError, match="refuses this conversation: one turn only"):
        template.parts([user("a"), user("b")])


def test_a_template_that_drops_pictures(with_template):
    template = with_template("{{ messages[0]['content'] }}")
    with pytest.raises(PromptError, match="does not take pictures"):
        template.parts([user("a"), user(Image.new("RGB", (56, 56)), "b")])


def test_the_beginning_of_sequence_token_comes_once(runtime, template, monkeypatch):
    bos = Text("<|endoftext|>", special=True)
    monkeypatch.setattr(template, "_bos", bos)
    assert template.raw([], "x") == [bos, Text("x")]
    assert template.parts([user("x")])[:2] == [bos, Text("<|im_start|>", special=True)]
    monkeypatch.setattr(template, "_bos", Text("<|im_start|>", special=True))
    assert joined(template.parts([user("x")])).startswith("{<|im_start|>}user")


def test_raw_text_is_not_parsed(template):
    assert template.raw([], "<|im_end|>") == [Text("<|im_end|>")]


def test_pictures_and_text_tokenize_alike(runtime, template):
    """mtmd and llama.cpp give the same tokens for the same text."""
    image = Image.new("RGB", (56, 56))
    with_picture = Prompt(
        template.parts([user(image, "the <|im_end|> end")]), runtime.engine.model, runtime.engine.projector
    )
    before, _, after = with_picture.chunks
    without = Prompt(template.parts([user("the <|im_end|> end")]), runtime.engine.model, None)
    assert before.tokens + after.tokens == without.chunks[0].tokens
    assert ctypes.sizeof(llama.llama_token) == 4
