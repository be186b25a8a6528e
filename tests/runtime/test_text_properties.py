"""Text from tokens for any bytes, cut anywhere, and any stop strings; against the whole text at once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_shiftkv.text import TextAssembler

# Few characters, so that stop strings occur, overlap and begin in vain; of one to four bytes, and bytes that are none.
characters = st.sampled_from(["a", "b", "ab", "\n", "é", "€", "😀", "\ufffd"])
encoded = characters.map(str.encode)
broken = st.sampled_from([b"\xff", b"\x80", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0"])
anything = st.one_of(st.lists(st.one_of(encoded, broken), max_size=24).map(b"".join), st.binary(max_size=40))
stops = st.lists(st.lists(characters, min_size=1, max_size=4).map("".join), max_size=4)

# The beginnings of all characters of more than one byte; those of 64 in a row differ in the last one only. Python's
# decoder waits for the end of surrogates, too.
ENCODED = [chr(code).encode("utf-8", "surrogatepass") for code in range(0x80, 0x110000, 64)]
BEGINNINGS = {data[:n] for data in ENCODED for n in range(1, len(data))}


@st.composite
def tokens(draw: st.DrawFn) -> list[bytes]:
    """Bytes cut into tokens anywhere, some of them empty, as those of control tokens are."""
    data = draw(anything)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=len(data) + 2)))
    return [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def whole(data: bytes) -> str:
    """The text of bytes, without an incomplete character at their end."""
    n = next((n for n in (3, 2, 1) if n <= len(data) and data[-n:] in BEGINNINGS), 0)
    return data[: len(data) - n].decode(errors="replace")


def begins(text: str, stop: list[str]) -> int:
    """The length of the longest end of a text that a stop string begins with."""
    return max((n for s in stop for n in range(len(s)) if text.endswith(s[:n])), default=0)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(tokens(), stops)
def test_the_text_up_to_the_first_stop_string_and_nothing_after_it(pieces: list[bytes], stop: list[str]) -> None:
    assembler = TextAssembler(stop)
    shown, data = "", b""
    for piece in pieces:
        shown += assembler.push(piece)
        data += piece
        text = whole(data)
        found = [text.index(s) for s in stop if s in text]
        assert assembler.stopped == bool(found)
        if found:
            assert shown == text[: min(found)]
            assert assembler.finish() == ""
            return
        # All that cannot become a stop string is out, and nothing that can.
        assert shown == text[: len(text) - begins(text, stop)]
    assert shown + assembler.finish() == whole(data)
    assert assembler.finish() == ""


@settings(derandomize=True, deadline=None, max_examples=100)
@given(tokens())
def test_where_tokens_end_does_not_matter(pieces: list[bytes]) -> None:
    texts = []
    for cut in (pieces, [b"".join(pieces)], [bytes([byte]) for byte in b"".join(pieces)]):
        assembler = TextAssembler()
        texts.append("".join(map(assembler.push, cut)) + assembler.finish())
    assert len(set(texts)) == 1
