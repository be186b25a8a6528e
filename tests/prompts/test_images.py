import base64
import http.server
import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from edge_shiftkv import ImageError
from edge_shiftkv.prompts.images import MAX_PIXELS, load_image


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def same(a, b):
    return a.mode == b.mode == "RGB" and a.size == b.size and a.tobytes() == b.tobytes()


def test_paths_and_urls(picture, tmp_path):
    path = tmp_path / "ein Bild: 50%.png"
    picture.save(path)
    base = base64.b64encode(path.read_bytes()).decode()
    percent = "".join(f"%{byte:02x}" for byte in path.read_bytes())
    for source in (
        path,
        str(path),
        path.as_uri(),
        f"data:image/png;base64,{base}",
        f"data:;base64,{base[:40]}\n{base[40:]}",
        f"data:image/png,{percent}",
        picture,
    ):
        assert same(load_image(source), picture), source


@pytest.fixture
def server(picture):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/a.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(encoded(picture))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_http_only_when_asked_for(picture, server):
    with pytest.raises(ImageError, match="allow_http=True"):
        load_image(f"{server}/a.png")
    assert same(load_image(f"{server}/a.png", allow_http=True), picture)
    with pytest.raises(ImageError, match="404"):
        load_image(f"{server}/b.png", allow_http=True)


def test_what_is_transparent_becomes_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    for version in (image, image.quantize()):
        assert [load_image(version).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]


def test_pictures_are_turned_as_their_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    data = encoded(Image.new("RGB", (30, 10)), "JPEG", exif=exif)
    assert load_image(Image.open(io.BytesIO(data))).size == (10, 30)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "F"])
def test_any_mode(mode):
    assert load_image(Image.new("RGB", (4, 3), "white").convert(mode)).mode == "RGB"


def test_16_bit_grey_keeps_its_shades():
    grey = Image.fromarray(np.array([[0, 0x4000, 0x8000, 0xFFFF]], np.uint16))
    assert [load_image(grey).getpixel((x, 0))[0] for x in range(4)] == [0, 64, 128, 255]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.png", "none.png: No such file or directory"),
        (".", r"\.: Is a directory"),
        ("data:image/png;base64", "needs a comma"),
        ("data:image/png;base64,abc", "not base64"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
        ("data:text/plain,hello", "not a picture"),
        ("ftp://127.0.0.1/a.png", "No such file"),
        ("", r"directory"),
    ],
)
def test_what_cannot_be_read(source, message):
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_long_sources_are_shortened_in_messages():
    with pytest.raises(ImageError) as error:
        load_image(f"data:image/png;base64,{'A' * 10_000}")
    assert len(str(error.value)) < 200


def test_a_damaged_picture(picture, tmp_path):
    for name, data in (("cut.png", encoded(picture)[:100]), ("cut.jpg", encoded(picture, "JPEG")[:200])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=f"{name}: "):
            load_image(tmp_path / name)


@pytest.mark.parametrize("side", [8001, 20_000, 2_000_000_000])
def test_an_absurdly_large_picture(tmp_path, side):
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "large.png").write_bytes(data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match=r"large\.png: .*pixels"):
        load_image(tmp_path / "large.png")


def test_a_strip():
    with pytest.raises(ImageError, match="1x300 pixels; at most 200 times as long as wide"):
        load_image(Image.new("RGB", (1, 300)))
    assert load_image(Image.new("RGB", (1, 1))).size == (1, 1)
