import base64
import contextlib
import http.server
import io
import ipaddress
import os
import resource
import socket
import stat
import struct
import subprocess
import threading
import time
import urllib.parse
import zlib

import numpy as np
import pytest
from PIL import Image

from edge_shiftkv import ImageError
from edge_shiftkv.chat_schema import parse_messages
from edge_shiftkv.prompts import fetch as fetching
from edge_shiftkv.prompts import images
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
    """Its address, and what it was asked with."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(dict(self.headers))
            found = self.path == "/a.png"
            self.send_response(200 if found else 302 if self.path.startswith("/to/") else 404)
            if self.path.startswith("/to/"):
                self.send_header("Location", urllib.parse.unquote(self.path[4:]))
            self.end_headers()
            if found:
                self.wfile.write(encoded(picture))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def sends():
    """A function: bytes to the address of a server that sends them one by one to whoever comes."""
    sockets = []

    def serve(listener, pieces):
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                sockets.append(connection)
                connection.recv(1 << 16)
                for piece in pieces():
                    connection.sendall(piece)
                connection.close()

    def start(pieces):
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)
        threading.Thread(target=serve, args=(listener, pieces), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"

    yield start
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


def test_http_only_when_asked_for(picture, server):
    url, asked = server
    with pytest.raises(ImageError, match="allow_http=True"):
        load_image(f"{url}/a.png")
    with pytest.raises(ImageError, match="private network, which takes allow_http='private'"):
        load_image(f"{url}/a.png", allow_http=True)
    assert not asked
    assert same(load_image(f"{url}/a.png", allow_http="private"), picture)
    assert asked[0]["User-Agent"].startswith("edge-shiftkv/")
    with pytest.raises(ImageError, match="404"):
        load_image(f"{url}/b.png", allow_http="private")


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.1", "2130706433", "0x7f.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[::]", "127.0.0.1."],
)
def test_no_way_to_write_this_machine(server, host):
    url, asked = server
    with pytest.raises(ImageError, match=r"private network|no such host"):
        load_image(url.replace("127.0.0.1", host) + "/a.png", allow_http=True)
    assert not asked


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254")),
        *((address, False) for address in ("100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.2.1")),
        *((address, False) for address in ("::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1")),
        *((address, False) for address in ("64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "::127.0.0.1")),
        *((address, True) for address in ("1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8")),
    ],
)
def test_public_addresses(address, public):
    assert fetching.is_public(ipaddress.ip_address(address)) == public


def test_redirections(picture, server):
    url, _ = server

    def to(where):
        return f"{url}/to/{urllib.parse.quote(where, safe='')}"

    for where in ("/a.png", f"{url}/a.png", "../a.png"):
        assert same(load_image(to(where), allow_http="private"), picture)
    for where in ("ftp://127.0.0.1/a.png", "file:///etc/passwd", "data:,x"):
        with pytest.raises(ImageError, match=r"leads to an address that is not http\(s\)"):
            load_image(to(where), allow_http="private")
    with pytest.raises(ImageError, match="more than 5 redirections"):
        load_image(to(to(to(to(to(to(f"{url}/a.png")))))), allow_http="private")


def test_no_redirection_to_private_addresses(server, monkeypatch):
    """What the first address is redirected to is checked as well."""
    url, asked = server
    checks = iter([True, False])
    monkeypatch.setattr(fetching, "is_public", lambda _: next(checks))
    with pytest.raises(ImageError, match="private network"):
        load_image(f"{url}/to/%2Fa.png", allow_http=True)
    assert len(asked) == 1


def test_the_address_that_was_checked_is_connected_to(server, monkeypatch):
    """A name that means another address at every look-up is looked up once."""
    url, asked = server
    look_ups = []
    look_up = socket.getaddrinfo

    def rebinding(host, *rest, **options):
        look_ups.append(host)
        return look_up("8.8.8.8" if len(look_ups) == 1 else "127.0.0.1", *rest, **options)

    connected = []
    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: connected.append(address[0]) or refuse())

    def refuse():
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(ImageError, match="Connection refused"):
        load_image(url.replace("127.0.0.1", "rebinding.test") + "/a.png", allow_http=True)
    assert (look_ups, connected) == (["rebinding.test"], ["8.8.8.8"])
    assert not asked


def test_one_address_of_a_name_may_be_public(monkeypatch):
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 80)) for host in ("10.0.0.1", "8.8.8.8")]
    connected = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)

    def connect(_, address):
        connected.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(ImageError):
        load_image("http://both.test/a.png", allow_http=True)
    assert connected == ["8.8.8.8"]


def drip(head=b"", piece=b" "):
    def pieces():
        yield head
        for _ in range(500):
            time.sleep(0.02)
            yield piece

    return pieces


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        drip(OK + b"\r\n"),
        drip(OK + b"Content-Length: 1000\r\n\r\n"),
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drip(OK + b"X: "),
        drip(b"HTTP/1.1"),
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drip(b"HTTP/1.1 302 Found\r\nLocation: /a.png\r\n"),
    ],
    ids=["body", "length", "chunks", "header", "status", "continue", "redirection"],
)
def test_a_server_that_drips(sends, monkeypatch, pieces):
    """Every read ends in time, all together do not."""
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.3)
    with pytest.raises(ImageError, match=r"not there within 0\.3 s"):
        load_image(sends(pieces), allow_http="private")


def test_a_look_up_that_does_not_end(monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.1)
    answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer.wait(20) and [])
    with pytest.raises(ImageError, match="not there within"):
        load_image("http://slow.test/a.png", allow_http=True)
    answer.set()


def test_a_body_without_end(sends, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    sent = []

    def pieces():
        yield OK + b"\r\n"
        while True:
            sent.append(1 << 16)
            yield bytes(1 << 16)

    with pytest.raises(ImageError, match="more than 1 MiB"):
        load_image(sends(pieces), allow_http="private")
    assert sum(sent) < 64 << 20


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "not an answer in HTTP"),
        (b"SSH-2.0-x\r\n", "not an answer in HTTP"),
        (OK + b"Content-Length: 99\r\n\r\nx", "not a picture"),
        (OK + b"\r\nhello", "not a picture"),
    ],
)
def test_no_picture_from_a_server(sends, answer, message):
    with pytest.raises(ImageError, match=message):
        load_image(sends(lambda: [answer]), allow_http="private")


@pytest.mark.parametrize(
    "url", ["http://", "http:///a.png", "http://[", "http://a b/", "http://x:y/", "http://\ud800/"]
)
def test_no_url(url):
    with pytest.raises(ImageError):
        load_image(url, allow_http="private")


def test_a_url_cannot_add_headers(server):
    url, asked = server
    with pytest.raises(ImageError):
        load_image(f"{url}/b.png?a\r\nX-Added: 1", allow_http="private")
    assert all("X-Added" not in headers for headers in asked)


def test_what_is_not_a_regular_file(tmp_path):
    """A pipe is not waited for, a device not read to its end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.png", "/dev/zero", "/dev/null", tmp_path / "link.png"):
        with pytest.raises(ImageError, match="not a regular file"):
            load_image(path)


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(1_500_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for source in (path, path.as_uri()):
        with pytest.raises(ImageError, match=r"large\.png: more than 64 MiB"):
            load_image(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_file_that_grows_while_it_is_read(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    monkeypatch.setattr(images, "MAX_BYTES", size - 1)
    monkeypatch.setattr(images.os, "fstat", lambda _: os.stat_result((stat.S_IFREG, 0, 0, 0, 0, 0, 1, 0, 0, 0)))
    with pytest.raises(ImageError, match="more than"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("format", ["EPS", "ICO", "PPM", "TGA", "PCX", "SGI", "ICNS", "PDF"])
def test_other_formats_are_not_even_opened(tmp_path, monkeypatch, format):
    """Whatever the name says: EPS would start Ghostscript, an ICO is decoded to be measured."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **_: started.append(command))
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **_: started.append(command))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", format)
    with pytest.raises(ImageError, match="not a picture in one of the formats PNG, JPEG, WEBP, GIF, BMP, TIFF"):
        load_image(tmp_path / "a.png")
    assert not started


@pytest.mark.parametrize("format", images.FORMATS)
def test_the_formats(picture, tmp_path, format):
    picture.save(tmp_path / "a", format)
    assert load_image(tmp_path / "a").size == picture.size


@pytest.mark.parametrize("url", ["file://otherhost/a.png", "file://127.0.0.1/a.png", "FILE://x@y/a.png"])
def test_files_of_other_hosts(url):
    with pytest.raises(ImageError, match="of another host"):
        load_image(url)


@pytest.fixture
def rooted(picture, tmp_path):
    """A folder for pictures, with what leads out of it."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    for folder in (root, root / "sub", outside):
        picture.save(folder / "a.png")
    (root / "out").symlink_to(outside)
    (root / "out.png").symlink_to(outside / "a.png")
    (root / "gone.png").symlink_to(outside / "none.png")
    (root / "circle.png").symlink_to(root / "circle.png")
    (root / "in.png").symlink_to(root / "sub" / "a.png")
    (tmp_path / "root2").mkdir()
    picture.save(tmp_path / "root2" / "a.png")
    (tmp_path / "link").symlink_to(root)
    return root


def test_paths_in_the_folder(picture, rooted):
    for root in (rooted, rooted.parent / "link"):
        for source in ("a.png", "sub/a.png", "./sub/../a.png", "in.png", rooted / "a.png", (rooted / "a.png").as_uri()):
            assert same(load_image(source, image_root=root), picture)


def test_nothing_out_of_the_folder_is_told(rooted):
    outside = rooted.parent / "outside"
    told = set()
    for path in (
        *("../outside/a.png", "../outside/none.png", "out/a.png", "out.png", "gone.png", "circle.png", "none.png"),
        *(str(outside / "a.png"), str(outside / "none.png"), str(outside), "../root2/a.png", "a.png/x", "x\0y"),
        *((outside / "a.png").as_uri(), (outside / "none.png").as_uri(), "/etc/passwd", "/root/x/y", "x" * 5000),
        *("/dev/zero", "..", "/", "~/a.png"),
    ):
        with pytest.raises(ImageError) as error:
            load_image(path, image_root=rooted)
        told.add(str(error.value).rpartition(": ")[2])
        assert isinstance(error.value.__cause__, ValueError)
        assert error.value.__cause__.__context__ is None or path in ("circle.png", "x\0y") or len(path) > 80
    assert told == {"no such file in the folder that pictures may be in"}


def test_messages_are_confined(rooted):
    def message(url):
        return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]

    assert parse_messages(message("a.png"), image_root=rooted)
    for source in ("a.png", str(rooted / "a.png"), (rooted / "a.png").as_uri()):
        with pytest.raises(ImageError, match="files are not read here"):
            parse_messages(message(source), image_root=False)
    with pytest.raises(ImageError, match="no such file in the folder"):
        parse_messages(message("../outside/a.png"), image_root=rooted)


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
