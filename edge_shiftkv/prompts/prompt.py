"""A prompt in tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from PIL import Image

from edge_shiftkv.errors import PromptError
from edge_shiftkv.native.llama import Model
from edge_shiftkv.native.mtmd import Chunks, ImageChunk, Projector, Text, TextChunk
from edge_shiftkv.prompts.chat import Part
from edge_shiftkv.prompts.control import ControlTokens
from edge_shiftkv.selection.results import ImageSpan, guess_grid

_STAND_IN = Text("\ue000")  # a character that no marker of pictures has

Item = int | str
"""A token of text, or what identifies consecutive visual tokens."""


def image_hash(image: Image.Image) -> str:
    """The sha256 of a picture's pixels and shape."""
    return hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()


class Prompt:
    """A prompt's tokens in chunks of text and of pictures. Owns the preprocessed pictures until `close`.

    n_tokens, n_image_tokens: the number of all tokens, and of visual ones.
    image_spans: where the visual ones are.
    items: one for each token of text, which is the token, and for each chunk of a picture, which is a sha256 of what it
        was made from and its place in the picture: prompts with the same first items begin the same.
    """

    n_dropped = n_head = 0  # of a `Continued`

    def __init__(self, parts: Sequence[Part], model: Model, projector: Projector | None) -> None:
        """Tokenize `parts`. Raises PromptError when they cannot be, or have no text at their end."""
        runs = _runs(parts, model)
        images = [run for run in runs if isinstance(run, Image.Image)]
        self._native: Chunks | None = None
        self.chunks: list[TextChunk | ImageChunk]
        if not images:
            self.chunks = [TextChunk(run) for run in runs if not isinstance(run, Image.Image)]
        elif projector is None:
            raise PromptError("the prompt has pictures, but the model was loaded without an mmproj")
        else:
            self._native = projector.tokenize([run if isinstance(run, Image.Image) else _STAND_IN for run in runs])
            try:
                self.chunks = _filled(self._native.items, [run for run in runs if isinstance(run, list)], model)
            except PromptError:
                self.close()
                raise
        self.image_spans: list[ImageSpan] = []
        self.items: list[Item] = []
        self.n_tokens = 0
        hashes = [image_hash(image) for image in images]
        for chunk in self.chunks:
            start = self.n_tokens
            self.n_tokens += _n_tokens(chunk)
            if isinstance(chunk, TextChunk):
                self.items += chunk.tokens
            else:
                image = images[chunk.image]
                tile = sum(span.image == chunk.image for span in self.image_spans)
                self.items.append(f"{hashes[chunk.image]}/{tile}")
                grid = (chunk.nx, chunk.ny) if chunk.ny > 1 else guess_grid(chunk.n_tokens, *image.size)
                self.image_spans.append(ImageSpan(chunk.image, start, self.n_tokens, *grid))
        self.n_image_tokens = sum(span.stop - span.start for span in self.image_spans)
        if not self.chunks or not isinstance(self.chunks[-1], TextChunk) or not self.chunks[-1].tokens:
            self.close()
            raise PromptError("the prompt is empty or ends with a picture: there has to be text at its end")

    def close(self) -> None:
        """Free the preprocessed pictures."""
        if self._native:
            self._native.close()


def _runs(parts: Sequence[Part], model: Model) -> list[list[int] | Image.Image]:
    """Pictures, and the tokens of all text between two of them."""
    runs: list[list[int] | Image.Image] = []
    for is_text, group in groupby(parts, key=lambda part: isinstance(part, Text)):
        if is_text:
            runs.append(_tokens([part for part in group if isinstance(part, Text)], model))
        else:
            runs += [part for part in group if isinstance(part, Image.Image)]
    return [run for run in runs if run != []]


@dataclass(frozen=True)
class HeldChunk:
    """The beginning of a prompt that a context is known to hold, and that cannot be read again."""

    n_items: int


@dataclass(frozen=True)
class Head:
    """The beginning of prompts, up to their last picture and what the model has around pictures.

    n_tokens, image_spans: as in `Prompt`.
    """

    items: tuple[Item, ...] = ()
    n_tokens: int = 0
    image_spans: tuple[ImageSpan, ...] = ()

    @classmethod
    def of(cls, prompt: Prompt | Continued, parts: Sequence[Part], model: Model) -> Head:
        """What is before the text at the end of a prompt that was made of `parts`.

        Raises PromptError where the model takes that text otherwise than other text.
        """
        if not prompt.image_spans:
            return cls()
        after = [token for run in _runs(_after_pictures(parts), model) if isinstance(run, list) for token in run]
        n = len(prompt.items) - len(after)
        if prompt.items[n:] != after:
            raise PromptError("this model's pictures change the tokens of the text after them")
        return cls(tuple(prompt.items[:n]), prompt.n_tokens - len(after), tuple(prompt.image_spans))

    @property
    def n_images(self) -> int:
        """How many pictures are in it."""
        return len({span.image for span in self.image_spans})


class Continued:
    """A `Prompt` that begins with a head, whose pictures are not looked at again. To be closed like one.

    parts: of all of it; pictures in the head may be stand-ins.
    n_dropped: tokens of the head that were cut from the cache that holds it.

    Raises PromptError.
    """

    def __init__(
        self, head: Head, parts: Sequence[Part], model: Model, projector: Projector | None = None, *, n_dropped: int = 0
    ) -> None:
        self.n_dropped = n_dropped
        self.n_head = len(head.items)
        self._rest = rest = Prompt(_after_pictures(parts, head.n_images), model, projector)
        self.chunks: list[TextChunk | ImageChunk | HeldChunk] = [HeldChunk(self.n_head), *rest.chunks]
        self.items: list[Item] = [*head.items, *rest.items]
        spans = [
            replace(
                span,
                image=span.image + head.n_images,
                start=span.start + head.n_tokens,
                stop=span.stop + head.n_tokens,
            )
            for span in rest.image_spans
        ]
        self.image_spans = [*head.image_spans, *spans]
        self.n_tokens = head.n_tokens + rest.n_tokens
        self.n_image_tokens = sum(span.stop - span.start for span in self.image_spans)

    def close(self) -> None:
        """Free the preprocessed pictures."""
        self._rest.close()


def _after_pictures(parts: Sequence[Part], n: int | None = None) -> Sequence[Part]:
    """What comes after the n-th picture, or the last one."""
    places = [i for i, part in enumerate(parts) if isinstance(part, Image.Image)]
    n = len(places) if n is None else n
    return parts[places[n - 1] + 1 :] if n else parts


def _tokens(parts: Sequence[Text], model: Model) -> list[int]:
    control = ControlTokens(model.control_tokens)
    return [token for part in parts for token in control.tokenize(part, model)]


def _filled(
    chunks: Sequence[TextChunk | ImageChunk], runs: Sequence[list[int]], model: Model
) -> list[TextChunk | ImageChunk]:
    """The chunks with each run of tokens in its place, where the stand-in was between the markers of pictures."""
    stand_in = model.tokenize(_STAND_IN.text)
    n = len(stand_in)
    left = list(runs)
    filled: list[TextChunk | ImageChunk] = []
    for chunk in chunks:
        if isinstance(chunk, TextChunk):
            tokens = chunk.tokens
            places = [i for i in range(len(tokens) - n + 1) if tokens[i : i + n] == stand_in] if n else []
            if left and places:
                at = places[0]
                chunk = TextChunk([*tokens[:at], *left.pop(0), *tokens[at + n :]])
        filled.append(chunk)
    if left:
        raise PromptError("the prompt could not be tokenized: the vocabulary lacks a character to stand for text")
    return filled


def _n_tokens(chunk: TextChunk | ImageChunk) -> int:
    return len(chunk.tokens) if isinstance(chunk, TextChunk) else chunk.n_tokens
