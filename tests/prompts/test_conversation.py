"""Conversations, and the names of control tokens in them."""

from __future__ import annotations

from PIL import Image

from edge_shiftkv.native.mtmd import Text
from edge_shiftkv.prompts.chat import ControlTokens
from edge_shiftkv.prompts.conversation import Conversation
from edge_shiftkv.prompts.messages import Message


def test_without_its_pictures_a_conversation_has_all_its_text():
    picture = Image.new("RGB", (2, 2))
    asked = Message("user", (picture, "one", picture, "two"))
    conversation = Conversation([Message("system", ("brief",)), asked, Message("assistant", ()), asked], raw=False)
    texts = [("system", ("brief",)), ("user", ("one", "two")), ("assistant", ()), ("user", ("one", "two"))]
    without = conversation.without_images()
    assert [(message.role, message.content) for message in without.messages] == texts
    assert conversation.messages[1] is asked
    assert not without.raw
    assert Conversation([asked], raw=True).without_images().raw


def test_of_two_names_that_begin_alike_the_longer_one_is_found():
    names = {"<end>": (1, 0), "<end><end>": (2, 0), "<end>of": (3, 0), "a": (4, 0)}
    control = ControlTokens(names)
    parts = control.split("<end>of a <end><end><end>", mark="|")
    special = [part.text for part in parts if part.special]
    assert special == ["<end>of", "<end><end>", "<end>"]
    assert Text(" a ") in parts  # names of one character are text
