"""Pictures of the server's page for the docs: ``server_screenshot.py OUT.png PICTURE QUESTION... -- SERVE...``.

QUESTION: what is asked, one after the other; each may begin with a budget in percent and a colon, as in "25:What?".
SERVE: arguments of ``edge-shiftkv serve``, which is run.

Needs the test extra and Chromium.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

MAX_BYTES = 200_000
WAIT_MS = 300_000


def main(arguments: Sequence[str]) -> None:
    """Ask the page, and write what it looks like then."""
    own, served = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    out, picture, *questions = own
    command = [sys.executable, "-m", "edge_shiftkv", "serve", "--port", "0", "--quiet", *served]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            server.stdout.readline()
            address = server.stdout.readline().split()[-1]
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
                page = browser.new_page(viewport={"width": 1120, "height": 600})
                page.set_default_timeout(WAIT_MS)
                page.goto(address)
                page.get_by_label("Choose a picture").set_input_files(picture)
                for question in questions:
                    ask(page, question)
                page.evaluate("document.activeElement.blur()")
                shot = page.screenshot(full_page=True)
                browser.close()
        finally:
            server.terminate()
    Path(out).write_bytes(optimised(shot))


def ask(page: Page, question: str) -> None:
    """Ask, and wait for the answer."""
    percent, colon, text = question.rpartition(":")
    if colon:
        page.get_by_label("Keep of the KV cache").fill(percent)
    page.locator("#send:enabled").wait_for()
    page.get_by_label("What do you want to know?").fill(text)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=text).wait_for()
    page.locator("#times").wait_for()
    page.locator("#send").wait_for()


def optimised(shot: bytes) -> bytes:
    """The picture as a small file, with fewer colours if it takes that."""
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    for colours in (None, 256, 128, 64, 32):
        data = io.BytesIO()
        fewer = image.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) if colours else image
        fewer.save(data, "PNG", optimize=True)
        if data.tell() < MAX_BYTES:
            break
    return data.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
