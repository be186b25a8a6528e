import pytest

from edge_shiftkv.text import TextAssembler


def assemble(pieces, stop=()):
    assembler = TextAssembler(stop)
    shown = []
    for piece in pieces:
        shown.append(assembler.push(piece))
        if assembler.stopped:
            return shown, True
    return [*shown, assembler.finish()], False


def test_a_character_split_over_tokens_comes_out_whole():
    euro, smile = "€".encode(), "😀".encode()
    pieces = [b"a", euro[:1], euro[1:2], euro[2:], smile[:3], smile[3:]]
    assert assemble(pieces) == (["a", "", "", "€", "", "😀", ""], False)


def test_an_incomplete_character_at_the_end_is_dropped():
    assert assemble([b"a", "é".encode()[:1]]) == (["a", "", ""], False)


def test_bytes_that_are_no_character_do_not_hold_up_the_rest():
    assert assemble([b"a\xff", b"b"])[0] == ["a�", "b", ""]


@pytest.mark.parametrize("pieces", [[b"one END two"], [b"one ", b"END two"], [b"one E", b"N", b"D two"]])
def test_a_stop_string_across_tokens_ends_the_text_before_it(pieces):
    shown, stopped = assemble(pieces, stop=["END"])
    assert stopped
    assert "".join(shown) == "one "
    assert not any("E" in text for text in shown)


def test_what_only_looked_like_a_stop_string_is_shown_once_it_is_not():
    assert assemble([b"aE", b"N", b"x"], stop=["END"]) == (["a", "", "ENx", ""], False)


def test_a_beginning_of_a_stop_string_at_the_end_is_shown():
    assert assemble([b"aEN"], stop=["END"]) == (["a", "EN"], False)


def test_the_earliest_of_several_stop_strings_counts():
    assert assemble([b"a\n\nb"], stop=["b", "\n\n"]) == (["a"], True)


def test_a_stop_string_of_a_character_split_over_tokens():
    star = "★".encode()
    assert assemble([b"a", star[:1], star[1:], b"b"], stop=["★"]) == (["a", "", ""], True)
