"""A model's chat template: from a conversation to the parts of a prompt.

A template is a program that turns messages into one string, in which the template's own control tokens and those a user
typed look the same. To tell them apart, what users wrote is marked before the template runs: a random string is put
inside every control token's name in it, and after its end, so that no name is whole unless the template wrote it.
Pictures go through the template as random strings, too.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from PIL import Image

from edge_shiftkv.errors import PromptError
from edge_shiftkv.native.llama import ATTR_LSTRIP, ATTR_RSTRIP, Model
from edge_shiftkv.native.mtmd import Text
from edge_shiftkv.prompts.messages import Message

PLAIN_TEMPLATE = """\
{%- for message in messages %}
{{- {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message['role']] + message['content'] + '\\n' }}
{%- endfor %}
{{- 'ASSISTANT:' }}"""
"""What a model without a template in its GGUF gets: Vicuna's roles, which LLaVA-1.5 was trained with."""

Part = Text | Image.Image
_SPACE = " \t\n\v\f\r"  # isspace(), which llama.cpp strips around some tokens


class ControlTokens:
    """The names of a model's control tokens: found where a template wrote them, broken up where a user did."""

    def __init__(self, tokens: Mapping[str, tuple[int, int]]) -> None:
        names = sorted((name for name in tokens if len(name) > 1), key=len, reverse=True)
        either = "|".join(map(re.escape, names)) or r"(?!)"
        self._whole = re.compile(f"({either})")
        # Any case: templates may change it. The lookahead also finds names that overlap.
        self._first_letter = re.compile(f"(?=(?:{either}))(.)", re.DOTALL | re.IGNORECASE)
        self._tokens = tokens

    def break_up(self, text: str, mark: str) -> str:
        """Put `mark` inside every name in `text`, and where text that follows could complete one."""
        body = text.rstrip()
        broken = self._first_letter.sub(rf"\g<1>{mark}", body)
        return f"{broken}{mark}{text[len(body) :]}" if body else text

    def split(self, text: str, mark: str) -> list[Text]:
        """Split at the names that are whole, and remove the marks."""
        parts: list[Text] = []
        strip_next = False
        for i, piece in enumerate(self._whole.split(text)):
            if i % 2:  # re.split puts what it split at at odd places
                _, attributes = self._tokens[piece]
                if attributes & ATTR_LSTRIP and parts and not parts[-1].special:
                    parts[-1] = Text(parts[-1].text.rstrip(_SPACE))
                parts.append(Text(piece, special=True))
                strip_next = bool(attributes & ATTR_RSTRIP)
            else:
                plain = piece.replace(mark, "")
                parts.append(Text(plain.lstrip(_SPACE) if strip_next else plain))
        return [part for part in parts if part.text]


class ChatTemplate:
    """The chat template of a model's GGUF, or PLAIN_TEMPLATE. Raises PromptError when it is no valid template."""

    def __init__(self, model: Model) -> None:
        source = model.chat_template or PLAIN_TEMPLATE
        try:
            self._formatter = Jinja2ChatFormatter(source, eos_token=model.eos_text, bos_token=model.bos_text)
        except jinja2.TemplateError as error:
            raise PromptError(f"the chat template in the GGUF is broken: {error}") from error
        self._control = ControlTokens(model.control_tokens)
        self._bos = Text(model.bos_text, special=True) if model.bos is not None else None
        self._typed = not self._takes_strings()

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """Render a conversation, ready for the model's next turn.

        Raises PromptError when the template refuses the conversation or leaves its pictures out.
        """
        mark = _random_mark()
        images: dict[str, Image.Image] = {}
        rendered = self._render([(message.role, self._texts(message, mark, images)) for message in messages])
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

    def _texts(self, message: Message, mark: str, images: dict[str, Image.Image]) -> list[str]:
        texts: list[str] = []
        after_text = False
        for part in message.content:
            if isinstance(part, str):
                text = self._control.break_up(part, mark)
                texts.append(f"\n{text}" if after_text else text)  # as llama.cpp's server joins them
            else:
                texts.append(_random_mark())
                images[texts[-1]] = part
            after_text = isinstance(part, str)
        return texts

    def _render(self, messages: Sequence[tuple[str, list[str]]], *, typed: bool | None = None) -> str:
        as_parts = self._typed if typed is None else typed
        schema = [
            {
                "role": role,
                "content": [{"type": "text", "text": text} for text in texts] if as_parts else "".join(texts),
            }
            for role, texts in messages
        ]
        try:
            prompt: str = self._formatter(messages=schema).prompt  # type: ignore[arg-type]
        except Exception as error:  # templates are programs, and raise errors of their own
            raise PromptError(f"the model's chat template refuses this conversation: {error}") from error
        return prompt

    def _takes_strings(self) -> bool:
        """Whether the template prints content that is a string; some only print lists of parts."""
        needle = _random_mark()
        try:
            return needle in self._render([("user", [needle])], typed=False)
        except PromptError:
            return False


def _random_mark() -> str:
    """Text that no user wrote and no template changes: digits between two private-use characters."""
    return f"\ue000{secrets.randbelow(10**12)}\ue001"
