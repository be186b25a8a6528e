"""A model's chat template: from a conversation to the parts of a prompt.

A template is a program that turns messages into one string, in which the template's own control tokens and those a user
typed look the same. To tell them apart, what users wrote is marked before the template runs: a random string is put at
its beginning and behind every character that a control token's name begins with, so that no name is whole unless the
template wrote it. Pictures go through the template as random strings, too.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from PIL import Image

from edge_shiftkv.errors import PromptError
from edge_shiftkv.native.llama import Model
from edge_shiftkv.native.mtmd import Text
from edge_shiftkv.prompts.control import ControlTokens
from edge_shiftkv.prompts.messages import Message
from edge_shiftkv.prompts.template import Template, TemplateLimitError

PLAIN_TEMPLATE = """\
{%- for message in messages %}
{{- {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message['role']] + message['content'] + '\\n' }}
{%- endfor %}
{{- 'ASSISTANT:' }}"""
"""What a model without a template in its GGUF gets: Vicuna's roles, which LLaVA-1.5 was trained with."""

Part = Text | Image.Image


class ChatTemplate:
    """The chat template of a model's GGUF, or PLAIN_TEMPLATE. Raises PromptError when it is no valid template, or one
    that takes more than the limits of `template`.

    takes_tools: whether it has a place for descriptions of tools.
    """

    def __init__(self, model: Model) -> None:
        source = model.chat_template or PLAIN_TEMPLATE
        try:
            self._template = Template(source, bos=model.bos_text, eos=model.eos_text)
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template in the GGUF is broken: {error}") from error
        self._control = ControlTokens(model.control_tokens)
        self._bos = Text(model.bos_text, special=True) if model.bos is not None else None
        self._typed = not self._takes_strings()
        self.takes_tools = "tools" in source

    def parts(self, messages: Sequence[Message], **variables: Any) -> list[Part]:
        """Render a conversation, ready for the model's next turn.

        variables: JSON values that the template may read besides the messages, such as `tools`; text in them is text,
            too.

        Raises PromptError when the template refuses the conversation or leaves its pictures out.
        """
        mark = _random_mark()
        images: dict[str, Image.Image] = {}
        rendered = self._render(
            [(message.role, _texts(message, images), message.fields) for message in messages], mark, variables
        )
        at_images = re.compile(f"({'|'.join(images)})" if images else r"((?!))")
        pieces = at_images.split(rendered)
        if pieces[1::2] != list(images):
            raise PromptError("the model's chat template does not take pictures where they are in this conversation")
        parts: list[Part] = []
        for i, piece in enumerate(pieces):
            parts += [images[piece]] if i % 2 else self._control.split(piece, mark)
        return self._begun(parts)

    def raw(self, images: Iterable[Image.Image], text: str) -> list[Part]:
        """The parts of a prompt without a template: pictures, then text as it is."""
        return self._begun([*images, *([Text(text)] if text else [])])

    def _begun(self, parts: list[Part]) -> list[Part]:
        # Many templates write the beginning-of-sequence token themselves.
        return parts if self._bos is None or parts[:1] == [self._bos] else [self._bos, *parts]

    def _render(
        self,
        messages: Sequence[tuple[str, list[str], Mapping[str, Any]]],
        mark: str,
        variables: Mapping[str, Any],
        *,
        typed: bool | None = None,
    ) -> str:
        as_parts = self._typed if typed is None else typed

        def content(texts: list[str]) -> str | list[dict[str, str]]:
            if as_parts:
                return [{"type": "text", "text": self._control.break_up(text, mark)} for text in texts]
            return self._control.break_up("".join(texts), mark)

        def broken(value: Any) -> Any:
            if isinstance(value, str):
                return self._control.break_up(value, mark)
            if isinstance(value, Mapping):
                return {broken(key): broken(inside) for key, inside in value.items()}
            return [broken(inside) for inside in value] if isinstance(value, list | tuple) else value

        schema = [{**broken(fields), "role": role, "content": content(texts)} for role, texts, fields in messages]
        try:
            return self._template.render(schema, mark, **{name: broken(value) for name, value in variables.items()})
        except TemplateLimitError as error:
            raise PromptError(f"the model's chat template is no use: {error}") from error
        except Exception as error:  # templates are programs, and raise errors of their own
            raise _RefusedError(f"the model's chat template refuses this conversation: {error}"[:1000]) from error

    def _takes_strings(self) -> bool:
        """Whether the template prints content that is a string; some only print lists of parts."""
        needle = _random_mark()
        try:
            return needle in self._render([("user", [needle], {})], _random_mark(), {}, typed=False)
        except _RefusedError:
            return False


class _RefusedError(PromptError):
    """What a template says of a conversation."""


def _texts(message: Message, images: dict[str, Image.Image]) -> list[str]:
    """The texts of a message, with a random string for each picture, which is put into `images` under it."""
    texts: list[str] = []
    after_text = False
    for part in message.content:
        if isinstance(part, str):
            texts.append(f"\n{part}" if after_text else part)  # as llama.cpp's server joins them
        else:
            texts.append(_random_mark())
            images[texts[-1]] = part
        after_text = isinstance(part, str)
    return texts


def _random_mark() -> str:
    """Text that no user wrote and no template changes: digits between two private-use characters."""
    return f"\ue000{secrets.randbelow(10**12)}\ue001"
