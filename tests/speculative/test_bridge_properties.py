"""The bridge for any text, between vocabularies that split and spell it differently."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import speakers

from edge_shiftkv.native.llama import Model
from edge_shiftkv.speculative.bridge import Bridge

# SentencePiece with and without a space before the text, and byte-level BPE that splits words in three ways.
NAMES = ("llama-spm", "baichuan", "gpt-2", "gpt-neox", "falcon")

models: dict[str, Model] = {}
bridges: dict[tuple[str, str], Bridge] = {}
byte_tokens: dict[str, dict[bytes, int]] = {}
"""The tokens of single bytes."""


@pytest.fixture(scope="module", autouse=True)
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("vocabularies")
    for name in NAMES:
        models[name] = model = Model(speakers.vocabulary_file(name, folder), 0, vocab_only=True)
        pieces = ((model.piece(token), token) for token in range(model.n_vocab))
        byte_tokens[name] = {piece: token for piece, token in pieces if len(piece) == 1}
    bridges.update({(a, b): Bridge(models[a], models[b]) for a in NAMES for b in NAMES})
    yield
    bridges.clear()
    while models:
        models.popitem()[1].close()


words = st.sampled_from(
    ["the", " river", "Water", " don't", " x", "  ", "\n", "\n\n", "\t", " ", ".", ",", "  \n ", "1987", " 3.14", "()",
     "é", "e\u0301", " größer", "Весной", " лёд", "河水", "🌊", "👩\u200d👩\u200d👧", "\u0640", "नदी", "<0x0A>", "<s>",
     "\ufffd", "ﬁ", "\r\n"]
)  # fmt: skip
# SentencePiece writes a space as U+2581, and has no other token for that; NUL ends a text in C.
letters = st.characters(exclude_categories=["Cs"], exclude_characters="▁\0")
texts = st.lists(st.one_of(words, words, letters), max_size=12).map("".join)
names = st.sampled_from(NAMES)
lightly = settings(derandomize=True, deadline=None, max_examples=150)


def text_of(model: Model, tokens: list[int]) -> bytes:
    return b"".join(map(model.piece, tokens))


def whole_characters(data: bytes) -> bytes:
    """The bytes up to the last whole character; of valid text that was cut anywhere."""
    return data.decode(errors="ignore").encode()


def sayable(name: str, text: str) -> bytes:
    """The beginning of a text that a vocabulary has bytes for: Falcon's lacks some, which only rare characters have."""
    known = b"".join(byte_tokens[name])
    n = next((i for i, character in enumerate(text) if not set(character.encode()) <= set(known)), len(text))
    return text[:n].encode()


@lightly
@given(names, names, texts, st.integers(0, 40))
def test_bytes_are_kept_up_to_the_last_whole_character(source: str, destination: str, text: str, n: int) -> None:
    a, b = models[source], models[destination]
    drafted = a.tokenize(text)[:n]
    said = text_of(a, drafted)
    assume(text.encode().startswith(said) or (" " + text).encode().startswith(said))
    proxies = bridges[source, destination].proxies([], drafted)
    got, wanted = text_of(b, proxies), whole_characters(said)
    assert wanted.startswith(got)
    assert got == whole_characters(got)
    assert len(got) >= len(sayable(destination, wanted.decode()))
    assert all(map(b.piece, proxies))  # none is a control token, whatever the text says


@lightly
@given(names, texts, texts, st.integers(0, 12))
def test_text_goes_on_after_any_text(name: str, before: str, text: str, n_cut: int) -> None:
    """Also where what is held ends inside a word or, in a vocabulary with tokens of bytes, inside a character."""
    model = models[name]
    assume(sayable(name, before + text) == (before + text).encode())
    held = model.tokenize(before)
    held = held[: max(0, len(held) - n_cut)]
    said = text_of(model, held)
    whole = next((data for data in (before.encode(), b" " + before.encode()) if data.startswith(said)), None)
    assume(whole is not None)
    assert whole is not None
    # What completes the character that was begun, and the text.
    n_open = len(said) - len(whole_characters(said))
    first = whole[len(said) - n_open :].decode()[:1].encode() if n_open else b""
    rest = first[n_open:] + text.encode()
    assert text_of(model, bridges[name, name].continue_(held, rest)) == rest


@lightly
@given(names, names, texts, st.binary(max_size=6), texts)
def test_no_byte_is_invented(source: str, destination: str, before: str, noise: bytes, after: str) -> None:
    """Bytes that are no text, and whatever comes after them, are left out."""
    data = before.encode() + noise + after.encode()
    got = text_of(models[destination], bridges[source, destination].continue_([], data))
    assert data.startswith(got)
    got.decode()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        assert len(got) <= error.start
    assert len(got) >= len(sayable(destination, before))


@lightly
@given(names, names, texts)
def test_an_end_token_comes_after_all_of_the_text_and_is_the_last(source: str, destination: str, text: str) -> None:
    a, b = models[source], models[destination]
    end = a.eos if a.eos is not None else a.eot
    assert end is not None
    drafted = a.tokenize(text)
    proxies = bridges[source, destination].proxies([], [*drafted, end, *a.tokenize("more")])
    n = sum(map(b.ends_generation, proxies))
    if sayable(destination, text) == text.encode():
        assert n == 1
    if n:
        assert b.ends_generation(proxies[-1])
        assert text_of(b, proxies) == text_of(a, drafted)


@lightly
@given(names, texts, texts, st.integers(0, 3))
def test_nothing_before_a_control_token_has_a_say(name: str, before: str, text: str, n_open: int) -> None:
    """Neither a word that was begun before it, nor a character of which some bytes were there."""
    model, bridge = models[name], bridges[name, name]
    wave = [byte_tokens[name].get(bytes([byte])) for byte in "🌊".encode()[:n_open]]
    assume(None not in wave)
    control = next(token for token, _ in model.control_tokens.values() if not model.piece(token))
    held = [*model.tokenize(before), *wave, control]
    assert bridge.continue_(held, text.encode()) == bridge.continue_([], text.encode())
