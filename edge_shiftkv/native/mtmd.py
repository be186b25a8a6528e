"""mtmd.h: images through a vision encoder and projector into a model's embedding space."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp.llama_cpp as llama
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_shiftkv.errors import ImageError, ModelError, PromptError, ShiftKVError
from edge_shiftkv.native import logs
from edge_shiftkv.native.calls import Handle, Interrupt, Loading, native_call
from edge_shiftkv.native.gguf_check import check_mmproj
from edge_shiftkv.native.llama import Context, Model


@dataclass(frozen=True)
class Text:
    """A part of a prompt. Control tokens' names are parsed only where `special` is set."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class TextChunk:
    """Consecutive tokens of text."""

    tokens: list[int]


@dataclass(frozen=True)
class ImageChunk:
    """Consecutive visual tokens: an image, or a tile of one.

    `image` counts the prompt's images from 0. `nx` and `ny` are the rows' length and number where mtmd knows them
    (M-RoPE models); other models have `ny` = 1.
    """

    image: int
    n_tokens: int
    nx: int
    ny: int
    pointer: int


class Chunks(Handle):
    """A tokenized prompt with images: `mtmd_input_chunks *`. Owns the preprocessed images until `close`."""

    def __init__(self, pointer: int) -> None:
        super().__init__("prompt", pointer, mtmd.mtmd_input_chunks_free)
        self.items = [_chunk(pointer, i) for i in range(mtmd.mtmd_input_chunks_size(pointer))]

    def __del__(self) -> None:
        self.close()


class Projector(Handle):
    """A vision encoder with its projector (``mmproj``): an `mtmd_context *`.

    cache_bytes: the most that embeddings of former pictures may take, of which the ones used last are kept.
    interrupt: ends what it computes.
    progress: is given the share of the file that is loaded, 0 to 1, now and then.

    Raises ModelError when the file is missing, is not one, has no vision encoder or belongs to another model.
    """

    def __init__(
        self,
        path: Path,
        model: Model,
        *,
        use_gpu: bool,
        n_threads: int,
        cache_bytes: int = 0,
        interrupt: Interrupt | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        check_mmproj(path)
        self._n_embd = int(llama.llama_model_n_embd_inp(model.pointer))
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = use_gpu
        params.n_threads = n_threads
        params.print_timings = False
        params.warmup = False
        self.interrupt = interrupt or Interrupt()
        self.interrupt.watch_encoder(params)
        loading = Loading(progress)
        params.progress_callback = mtmd.mtmd_progress_callback(loading)
        with native_call() as errors:
            super().__init__(
                "mmproj", mtmd.mtmd_init_from_file(str(path).encode(), model.pointer, params), mtmd.mtmd_free
            )
        loading.check()
        if not self._pointer:
            raise ModelError(
                f"{path}: not the mmproj of this model; use the file that was converted together with it"
                f"{logs.explain(errors)}"
            )
        if not mtmd.mtmd_support_vision(self.pointer):
            self.close()
            raise ModelError(f"{path}: this mmproj has no vision encoder")

    def tokenize(self, parts: Sequence[Text | Image.Image]) -> Chunks:
        """Tokenize text and preprocess RGB images. Raises PromptError."""
        bitmaps: list[int] = []
        keep: list[object] = []  # what the C structures point at
        pointers = (ctypes.POINTER(mtmd.mtmd_input_part) * len(parts))()
        output = mtmd.mtmd_input_chunks_init()
        try:
            for i, part in enumerate(parts):
                if isinstance(part, Text):
                    data = part.text.encode(errors="replace")
                    text = mtmd.mtmd_input_text(text=data, text_len=len(data), parse_special=part.special)
                    keep.append(text)
                    native = mtmd.mtmd_input_part(text=ctypes.pointer(text))
                else:
                    bitmap = _bitmap(part, name=str(len(bitmaps)))
                    bitmaps.append(bitmap)
                    native = mtmd.mtmd_input_part(bitmap=bitmap)
                pointers[i] = ctypes.pointer(native)
            with native_call() as errors:
                status = mtmd.mtmd_tokenize_from_parts(self.pointer, output, pointers, len(parts), False)
            if status:
                raise PromptError(f"the prompt could not be tokenized{logs.explain(errors)}")
            chunks = Chunks(output)
        except BaseException:
            mtmd.mtmd_input_chunks_free(output)
            raise
        finally:
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)
        return chunks

    def non_causal(self, chunk: ImageChunk) -> bool:
        """Whether the image's tokens attend to each other both ways, and so have to be decoded in one batch."""
        return bool(mtmd.mtmd_decode_use_non_causal(self.pointer, chunk.pointer))

    def embed(self, chunk: ImageChunk, key: str) -> npt.NDArray[np.float32]:
        """The embeddings of a chunk, [n_tokens, n_embd], encoded or from the cache; valid until the next call.

        key: identifies the chunk's pixels.

        Raises ImageError, and CancelledError.
        """
        self.interrupt.check()
        known = self._cached.get(key)
        if known is not None:
            self._cached.move_to_end(key)
            return known
        self.encode(chunk)
        output = mtmd.mtmd_get_output_embd(self.pointer)
        embeddings = np.ctypeslib.as_array(output, (chunk.n_tokens, self._n_embd))
        if embeddings.nbytes <= self._cache_bytes:
            embeddings = self._cached[key] = embeddings.copy()
            while sum(kept.nbytes for kept in self._cached.values()) > self._cache_bytes:
                self._cached.popitem(last=False)
        return embeddings

    def encode(self, chunk: ImageChunk) -> None:
        """Run the vision encoder; the embeddings stay inside until the next call.

        Raises ImageError, and CancelledError.
        """
        self.interrupt.check()
        with native_call() as errors:
            status = mtmd.mtmd_encode_chunk(self.pointer, chunk.pointer)
        self.interrupt.check()  # the encoder does not tell that it was ended
        if status:
            raise ImageError(f"image {chunk.image + 1}: the vision encoder failed{logs.explain(errors)}")

    def decode(self, context: Context, chunk: ImageChunk, embeddings: npt.NDArray[np.float32], position: int) -> int:
        """Decode the embeddings of a chunk from `position` on; return the position after them.

        With M-RoPE that is less than the number of tokens further on. Raises ShiftKVError, and CancelledError.
        """
        data = embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        after = llama.llama_pos(position)
        with native_call() as errors:
            status = mtmd.mtmd_helper_decode_image_chunk(
                *(self.pointer, context.pointer, chunk.pointer, data, position, 0, context.n_batch),
                ctypes.byref(after),
                mtmd.mtmd_helper_post_decode_callback(),
                None,
            )
        if status:
            context.interrupt.check()
            raise ShiftKVError(
                f"image {chunk.image + 1}: llama.cpp failed to decode it, status {status}{logs.explain(errors)}"
            )
        return after.value


def _bitmap(image: Image.Image, name: str) -> int:
    pixels = image.tobytes()
    buffer = ctypes.cast(ctypes.c_char_p(pixels), ctypes.POINTER(ctypes.c_uint8))
    bitmap: int = mtmd.mtmd_bitmap_init(image.width, image.height, buffer)
    mtmd.mtmd_bitmap_set_id(bitmap, name.encode())  # comes back with each of its chunks
    return bitmap


def _chunk(chunks: int, i: int) -> TextChunk | ImageChunk:
    chunk = mtmd.mtmd_input_chunks_get(chunks, i)
    kind = mtmd.mtmd_input_chunk_get_type(chunk)
    if kind == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
        n = ctypes.c_size_t()
        tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
        return TextChunk(tokens[: n.value])
    image = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
    n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
    nx, ny = mtmd.mtmd_image_tokens_get_nx(image), mtmd.mtmd_image_tokens_get_ny(image)
    return ImageChunk(int(mtmd.mtmd_input_chunk_get_id(chunk)), n_tokens, nx, ny, chunk)
