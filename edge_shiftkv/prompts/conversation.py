"""What a model is asked, before any model's template is applied to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from edge_shiftkv.prompts.chat import ChatTemplate, Part
from edge_shiftkv.prompts.messages import Message


@dataclass(frozen=True)
class Conversation:
    """Messages for a template; or, with `raw`, one whose content is continued as it is."""

    messages: Sequence[Message]
    raw: bool = False

    def parts(self, template: ChatTemplate) -> list[Part]:
        """The prompt as a model with this template takes it. Raises PromptError when the template refuses it."""
        if not self.raw:
            return template.parts(self.messages)
        content = self.messages[0].content
        images = [part for part in content if isinstance(part, Image.Image)]
        return template.raw(images, "".join(part for part in content if isinstance(part, str)))

    def without_images(self) -> Conversation:
        """The text of it."""
        return replace(
            self,
            messages=[
                Message(message.role, tuple(part for part in message.content if isinstance(part, str)))
                for message in self.messages
            ],
        )
