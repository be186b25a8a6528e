"""Pictures from wherever they are, as RGB."""

from __future__ import annotations

import base64
import binascii
import io
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from edge_shiftkv.errors import ImageError

ImageSource = str | os.PathLike[str] | Image.Image
"""A path, a ``data:``, ``file:`` or (where allowed) ``http(s):`` URL, or a PIL image."""

MAX_PIXELS = 64_000_000
"""The largest picture accepted; vision encoders scale down to a few million pixels at most."""

_MAX_ASPECT = 200  # as in Qwen2-VL's own preprocessing
_MAX_DOWNLOAD = 64 << 20
_TIMEOUT_S = 30


def load_image(source: ImageSource, *, allow_http: bool = False) -> Image.Image:
    """Return a picture as an RGB image, turned as its EXIF data says; what is transparent becomes white.

    Of an animation it is the first frame. Raises ImageError when the picture cannot be had or read, has more than
    MAX_PIXELS, or is more than 200 times as long as wide.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "the image")
    name = os.fspath(source)
    short = name if len(name) <= 80 else f"{name[:60]}..."
    try:
        data = _read(name, allow_http)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"{short}: {reason}") from error
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:  # PIL's decoders raise whatever they stumble over
        reason = (
            "has too many pixels" if isinstance(error, Image.DecompressionBombError) else "not a picture PIL can read"
        )
        raise ImageError(f"{short}: {reason}") from error
    return _rgb(image, short)


def _read(name: str, allow_http: bool) -> bytes:
    scheme = name[: name.find(":")].lower() if ":" in name else ""
    if scheme == "data":
        return _data_url(name)
    if scheme in ("http", "https"):
        if not allow_http:
            raise ValueError("the network is only used when asked for: pass allow_http=True")
        with urllib.request.urlopen(name, timeout=_TIMEOUT_S) as response:
            data: bytes = response.read(_MAX_DOWNLOAD + 1)
        if len(data) > _MAX_DOWNLOAD:
            raise ValueError(f"more than {_MAX_DOWNLOAD >> 20} MiB")
        return data
    path = urllib.request.url2pathname(urllib.parse.urlsplit(name).path) if scheme == "file" else name
    return Path(path).read_bytes()


def _data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ValueError("a data: URL needs a comma before its data")
    data = urllib.parse.unquote_to_bytes(payload)
    if not header.endswith(";base64"):
        return data
    try:
        return base64.b64decode(data)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width}x{height} pixels; at most {MAX_PIXELS // 1_000_000} million are accepted")
    if not 1 <= max(width, height) <= _MAX_ASPECT * min(width, height):
        raise ImageError(f"{name}: {width}x{height} pixels; at most {_MAX_ASPECT} times as long as wide is accepted")
    try:
        turned = ImageOps.exif_transpose(image)
        if turned.mode.startswith("I"):  # 16 bits, which convert() would clip to 8
            turned = Image.fromarray((np.asarray(turned) >> 8).clip(0, 255).astype(np.uint8))
        if not turned.has_transparency_data:
            return turned.convert("RGB")
        rgba = turned.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    except Exception as error:  # a file that is damaged further in
        raise ImageError(f"{name}: the picture's data is damaged ({error})") from error
