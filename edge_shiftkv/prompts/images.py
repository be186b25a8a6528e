"""Pictures from wherever they are, as RGB."""

from __future__ import annotations

import base64
import binascii
import errno
import io
import os
import stat
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from edge_shiftkv.errors import ImageError
from edge_shiftkv.prompts.fetch import fetch

ImageSource = str | os.PathLike[str] | Image.Image
"""A path, a ``data:``, ``file:`` or (where allowed) ``http(s):`` URL, or a PIL image."""

MAX_PIXELS = 64_000_000
"""The largest picture accepted; vision encoders scale down to a few million pixels at most."""

MAX_BYTES = 64 << 20
"""The largest file accepted."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats accepted. PIL knows more, of which one starts Ghostscript, whatever the file's name is."""

AllowHttp = bool | Literal["private"]
"""Whether pictures may come from http(s) addresses: from public ones, or also from those of private networks."""

ImageRoot = Path | Literal[False] | None
"""The folder that paths have to lead into; None for any file, False for none."""

_MAX_ASPECT = 200  # as in Qwen2-VL's own preprocessing


def load_image(source: ImageSource, *, allow_http: AllowHttp = False, image_root: ImageRoot = None) -> Image.Image:
    """Return a picture as an RGB image, turned as its EXIF data says; what is transparent becomes white.

    allow_http: whether http(s) URLs are fetched: True from public addresses, "private" from this machine's and private
        networks', too.
    image_root: the folder that paths and ``file:`` URLs have to lead into; relative ones start there. With it, errors
        do not tell what files there are elsewhere. None takes any file, False none.

    Of an animation it is the first frame. Raises ImageError when the picture cannot be had or read, is in none of the
    FORMATS, has more than MAX_BYTES or MAX_PIXELS, or is more than 200 times as long as wide.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "the image")
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"a picture has to be a path, a URL or a PIL image, not {type(source).__name__}")
    name = os.fspath(source)
    short = name if len(name) <= 80 else f"{name[:60]}..."
    short = "".join(letter if letter.isprintable() else "?" for letter in short)
    try:
        data = _read(name, allow_http, image_root)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"{short}: {reason}") from error
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # PIL's decoders raise whatever they stumble over
        reason = (
            "has too many pixels"
            if isinstance(error, Image.DecompressionBombError)
            else f"not a picture in one of the formats {', '.join(FORMATS)}"
        )
        raise ImageError(f"{short}: {reason}") from error
    return _rgb(image, short)


def _read(name: str, allow_http: AllowHttp, root: ImageRoot) -> bytes:
    scheme = name[: name.find(":")].lower() if ":" in name else ""
    if scheme == "data":
        return _data_url(name)
    if scheme in ("http", "https"):
        if not allow_http:
            raise ValueError("the network is only used when asked for: pass allow_http=True")
        return fetch(name, max_bytes=MAX_BYTES, private=allow_http == "private")
    if root is False:
        raise ValueError("files are not read here: send the picture as a data: URL, or allow a folder as image_root")
    path = Path(_path_of_url(name) if scheme == "file" else name)
    return _file(path if root is None else _confined(path, root))


def _path_of_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost"):
        raise ValueError("a file: URL of another host")
    return urllib.request.url2pathname(parts.path)


def _confined(path: Path, root: Path) -> Path:
    """The file that a path leads to, if it lies in `root`."""
    try:
        root = root.resolve()
        target = (root / path).resolve()
        if target.is_relative_to(root) and target.exists():
            return target
    except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
        pass
    # Alike whether there is such a file elsewhere or not.
    raise ValueError("no such file in the folder that pictures may be in")


def _file(path: Path) -> bytes:
    """The bytes of a regular file. Opened without waiting, as a pipe may have no writer."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
    with os.fdopen(os.open(path, flags), "rb", buffering=0) as file:
        about = os.fstat(file.fileno())
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("not a regular file")
        data = bytearray()
        if about.st_size <= MAX_BYTES:
            while piece := file.read(MAX_BYTES + 1 - len(data)):
                data += piece
        if max(about.st_size, len(data)) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        return bytes(data)


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
