"""The bridge between real vocabularies, against llama.cpp's own tokens of the whole text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support import speakers

from edge_shiftkv.native.llama import Model
from edge_shiftkv.speculative.bridge import Bridge

Load = Callable[[str], Model]

TEXTS = {
    "english": "The river carries water from the mountains, doesn't it?  In 1987 it didn't.",
    "german": "Größere Flüsse überqueren: Straßenbahnhaltestellenhäuschen.",
    "russian": "Весной лёд ломается, и река несёт лодки.",
    "chinese": "河水从山上流下来，穿过村庄。",
    "arabic": "يحمل النهر الماء من الجبال إلى البحر.",
    "hindi": "नदी पहाड़ों से पानी लाती है।",
    "emoji": "ok 🌊🏔️ 👩‍👩‍👧 done",
    "code": "def f(x):\n    if x < 0.5:\n\t\treturn 'a'  # m³/s\n\n\nprint(f(1))\n",
    "spaces": "  two   three    four\n\n \n x",
    "lead": " the",
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """Load a vocabulary by its name."""
    folder = tmp_path_factory.mktemp("vocabularies")
    models: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in models:
            models[name] = Model(speakers.vocabulary_file(name, folder), 0, vocab_only=True)
        return models[name]

    yield get
    for model in models.values():
        model.close()


def text_of(model: Model, tokens: list[int]) -> bytes:
    return b"".join(map(model.piece, tokens))


def stands_for(model: Model, text: str) -> bool:
    """Whether the tokenizer gives the text back, but for a space before it; some drop or change white space."""
    return text_of(model, model.tokenize(text)) in (text.encode(), b" " + text.encode())


@pytest.mark.parametrize("destination", speakers.ALL_VOCABULARIES)
@pytest.mark.parametrize("source", speakers.ALL_VOCABULARIES)
def test_all_pairs(load: Load, source: str, destination: str) -> None:
    a, b = load(source), load(destination)
    bridge = Bridge(a, b)
    for text in TEXTS.values():
        drafted = a.tokenize("\n" + text)
        while len(text_of(a, drafted)) > len(text.encode()):
            drafted = drafted[1:]
        wanted = text_of(a, drafted)
        for n in range(1, len(drafted) + 1):
            part = text_of(a, drafted[:n])
            got = text_of(b, bridge.proxies([], drafted[:n]))
            # What is left out is less than a character, which has no more than 4 bytes.
            assert part.startswith(got)
            assert len(part) - len(got) < 4
        assert text_of(b, bridge.proxies([], drafted)) == wanted


@pytest.mark.parametrize("name", speakers.ALL_VOCABULARIES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_continues_as_the_whole_text_is_tokenized(load: Load, name: str, text: str) -> None:
    model = load(name)
    assert stands_for(model, text)
    whole = model.tokenize(text)
    bridge = Bridge(model, model)
    for n in range(1, len(whole)):  # also where a token ends inside a character
        held, rest = whole[:n], text_of(model, whole[n:])
        assert bridge.continue_(held, rest) == whole[n:], (held, rest)


@pytest.mark.parametrize("name", speakers.ALL_VOCABULARIES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_drafts_of_any_length(load: Load, name: str, text: str) -> None:
    """Cut anywhere, inside words and characters: as the text up to there is tokenized, if the seam is in its tokens."""
    model = load(name)
    bridge = Bridge(model, model)
    whole = model.tokenize(text)
    data = text_of(model, whole)
    n_prefix = len(data) - len(text.encode())
    for n in range(1, len(whole)):
        n_held = len(text_of(model, whole[:n]))
        for n_draft in (1, 2, 3, 5, 8, 13):
            draft = data[n_held : n_held + n_draft]
            got = bridge.continue_(whole[:n], draft)
            up_to_there = (data[:n_held] + draft)[n_prefix:].decode(errors="ignore")
            if len(up_to_there.encode()) + n_prefix <= n_held:
                assert got == []
                continue
            wanted = model.tokenize(up_to_there)
            if wanted[:n] == whole[:n]:
                assert got == wanted[n:]
            else:
                assert text_of(model, got) == text_of(model, wanted)[n_held:]


@pytest.mark.parametrize("name", speakers.ALL_VOCABULARIES)
def test_long_texts_need_no_more_than_their_end(load: Load, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(name)
    text = TEXTS["english"] + " "
    whole = model.tokenize(text * 40)
    cut = len(model.tokenize(text * 39 + "The river"))
    rest = text_of(model, whole[cut:])
    bridge = Bridge(model, model)
    bridge.continue_([], b"x")  # which looks at the tokenizer, once
    seen: list[str] = []
    tokenize = model.tokenize

    def watched(text: str) -> list[int]:
        seen.append(text)
        return tokenize(text)

    monkeypatch.setattr(model, "tokenize", watched)
    draft = rest[:20]
    assert bridge.continue_(whole[:cut], draft) == tokenize(text * 39 + "The river" + draft.decode())[cut:]
    assert sum(map(len, seen)) < 64 + len(draft)


@pytest.mark.parametrize("name", speakers.ALL_VOCABULARIES)
def test_a_merge_across_the_boundary(load: Load, name: str) -> None:
    model = load(name)
    held = model.tokenize("We say hel")
    got = Bridge(model, model).continue_(held, b"lo to them")
    assert text_of(model, got) == b"lo to them"


@pytest.mark.parametrize("name", speakers.ALL_VOCABULARIES)
@pytest.mark.parametrize("character", ["é", "河", "🌊"])
def test_a_character_in_two(load: Load, name: str, character: str) -> None:
    model = load(name)
    bridge = Bridge(model, model)
    data = character.encode()
    held = model.tokenize("x y")
    for n in range(1, len(data)):
        # its end is missing
        assert text_of(model, bridge.continue_(held, b" z" + data[:n])) == b" z"
        assert bridge.continue_(held, data[:n]) == []
        # its beginning is there already, if the vocabulary can hold it
        byte_tokens = [bridge._byte_tokens.get(byte) for byte in data]
        if None in byte_tokens:
            continue
        got = bridge.continue_([*held, *byte_tokens[:n]], data[n:] + b" z")
        assert text_of(model, got) == data[n:] + b" z"


def test_what_is_held_of_a_character_is_not_said_again(load: Load) -> None:
    a, b = load("llama-spm"), load("gpt-2")
    first, *rest = (Bridge(a, b)._byte_tokens[byte] for byte in "🌊".encode())
    held = [*b.tokenize("sea "), first]
    drafted = a.tokenize("🌊 waves")[1:]  # without the space before the text
    got = Bridge(a, b).proxies(held, drafted, overlap=1)
    assert text_of(b, got) == "🌊 waves".encode()[1:]
    assert got[: len(rest)] == rest
    assert Bridge(a, b).proxies(held, a.tokenize("x waves"), overlap=1) == []


@pytest.mark.parametrize("name", speakers.ALL_VOCABULARIES)
@pytest.mark.parametrize("spaces", [" ", "  ", "    ", "\n", "\n\n", "\t", " \n "])
def test_only_white_space(load: Load, name: str, spaces: str) -> None:
    """Also where nothing, or a control token, is before it."""
    model = load(name)
    control = next(token for token, _ in model.control_tokens.values() if not model.piece(token))
    for held in ([], [control], [*model.tokenize("He is"), control], model.tokenize("He is")):
        assert text_of(model, Bridge(model, model).continue_(held, spaces.encode())) == spaces.encode()


def test_what_a_vocabulary_cannot_say_ends_the_text(load: Load) -> None:
    model = load("llama-spm")  # whose tokens have this sign for a space
    got = Bridge(load("qwen2"), model).proxies([], load("qwen2").tokenize("one▁two"))
    assert text_of(model, got) == b"one"


def test_without_the_byte_no_byte_is_skipped(load: Load) -> None:
    """Of a vocabulary that lacks a byte inside a character, nothing from there on is used."""
    model = load("gpt-2")
    bridge = Bridge(model, model)
    first = bridge._byte_tokens["🌊".encode()[0]]
    del bridge._byte_tokens["🌊".encode()[2]]
    # The vocabulary has a token for the first two bytes: the first one alone calls for tokens of single bytes.
    assert bridge.continue_([first], "🌊".encode()[1:]) == []


def test_no_half_character_before_what_cannot_be_said(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp leaves out the bytes that a vocabulary has no tokens for."""
    model = load("gpt-2")
    tokenize, last = model.tokenize, model.tokenize("🌊")[-1]
    monkeypatch.setattr(model, "tokenize", lambda text: [token for token in tokenize(text) if token != last])
    got = Bridge(model, model).continue_([], "sea 🌊 sea".encode())
    assert text_of(model, got).rstrip() == b"sea"


def test_invalid_bytes_end_the_text(load: Load) -> None:
    model = load("llama-bpe")
    got = Bridge(model, model).continue_([], b"one \xff two")
    assert text_of(model, got) == b"one "
    assert Bridge(model, model).continue_([], b"\x80") == []


@pytest.mark.parametrize("destination", speakers.ALL_VOCABULARIES)
@pytest.mark.parametrize("source", speakers.ALL_VOCABULARIES)
def test_end_tokens_by_role(load: Load, source: str, destination: str) -> None:
    a, b = load(source), load(destination)
    ends = [token for token in (a.eos, a.eot) if token is not None]
    assert ends
    for end in ends:
        got = Bridge(a, b).proxies([], [*a.tokenize("It is so."), end, *a.tokenize("More")])
        assert b.ends_generation(got[-1])
        assert text_of(b, got[:-1]).strip() == b"It is so."
        both = None not in (a.eos, a.eot, b.eos, b.eot) and a.eos != a.eot and b.eos != b.eot
        if both:
            assert got[-1] == (b.eos if end == a.eos else b.eot)


def test_other_control_tokens_end_the_text(load: Load) -> None:
    a, b = load("qwen2"), load("llama-bpe")
    start = next(token for name, (token, _) in a.control_tokens.items() if not a.ends_generation(token))
    got = Bridge(a, b).proxies([], [*a.tokenize("It is"), start, *a.tokenize(" so")])
    assert text_of(b, got) == b"It is"


def test_names_of_control_tokens_stay_text(load: Load) -> None:
    a, b = load("llama-bpe"), load("qwen2")
    text = "Say <|im_end|> and <|endoftext|>."
    got = Bridge(a, b).proxies([], a.tokenize(text))
    assert text_of(b, got) == text.encode()
    assert not any(map(b.ends_generation, got))


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_a_draft_that_does_not_begin_as_the_text_ends_is_not_used(load: Load, overlap: int) -> None:
    a, b = load("gpt-2"), load("qwen2")
    held = b.tokenize("one two")
    assert Bridge(a, b).proxies(held, a.tokenize("xyz and on"), overlap=overlap) == []
    drafted = a.tokenize("one two"[-overlap:] + " and on")
    assert text_of(b, Bridge(a, b).proxies(held, drafted, overlap=overlap)) == b" and on"
