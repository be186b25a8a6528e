"""What `help` says of the options of a request, and that what annotations name is there."""

import inspect
import pydoc
import typing

import pytest

import edge_shiftkv
from edge_shiftkv import Options, Runtime, Session, chat_schema
from edge_shiftkv.request import Request
from edge_shiftkv.sampling import Sampling

TAKES_OPTIONS = [
    *(Runtime.generate, Runtime.stream, Runtime.create_chat_completion),
    *(Session.ask, Session.stream, Session.reply, Session.stream_reply),
]


def test_help_names_every_option_with_its_default():
    text = pydoc.plain(pydoc.render_doc(edge_shiftkv.Runtime))
    (signature, *_) = " ".join(text.replace("\n |", " ").split()).split(" generate(")[1].split(") -> ")
    defaults = {**vars(Request.of()), **vars(Sampling())}
    for name in Options.__annotations__:
        default = "<the runtime's>" if name.startswith("kv_") else repr(None if name == "stop" else defaults[name])
        assert f" {name}: " in signature
        assert signature.split(f" {name}: ")[1].split(" = ")[1].split(", ")[0] == default
    assert "**options" not in text


@pytest.mark.parametrize("function", TAKES_OPTIONS, ids=lambda function: function.__qualname__)
def test_signatures_and_type_hints_agree(function):
    options = chat_schema.Body if function is Runtime.create_chat_completion else Options
    names = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert [name for name in names if name in options.__annotations__] == [*options.__annotations__]
    assert typing.get_type_hints(function)["options"].__args__ == (options,)
    assert set(typing.get_type_hints(options)) == set(options.__annotations__)


def test_every_option_is_explained():
    for options in (Options, chat_schema.Body):
        explained = "".join(inspect.getdoc(one) or "" for one in (options, Options, Sampling))
        assert not [name for name in options.__annotations__ if name not in explained]


def test_all_that_is_public_has_type_hints():
    for name in edge_shiftkv.__all__:
        thing = getattr(edge_shiftkv, name)
        for member in vars(thing).values() if inspect.isclass(thing) else [thing]:
            if inspect.isfunction(member) and member.__module__.startswith("edge_shiftkv"):
                typing.get_type_hints(member)
