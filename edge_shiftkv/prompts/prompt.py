"""A prompt in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from PIL import Image

from edge_shiftkv.errors import PromptError
from edge_shiftkv.native.llama import Model
from edge_shiftkv.native.mtmd import Chunks, ImageChunk, Projector, Text, TextChunk
from edge_shiftkv.prompts.chat import Part
from edge_shiftkv.prompts.control import ControlTokens
from edge_shiftkv.selection.results import ImageSpan, guess_grid

_STAND_IN = Text("\ue000")  # a character that no marker of pictures has


class Prompt:
    """A prompt's tokens in chunks of text and of pictures. Owns the preprocessed pictures until `close`.

    n_tokens, n_image_tokens: the number of all tokens, and of visual ones.
    image_spans: where the visual ones are.
    """

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
        self.n_tokens = 0
        for chunk in self.chunks:
            start = self.n_tokens
            self.n_tokens += _n_tokens(chunk)
            if isinstance(chunk, ImageChunk):
                image = images[chunk.image]
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
