"""A real browser, without a window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 60_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium: Playwright's own where that is installed, or else the system's. Skips the test without any."""
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        path = str(own) if own.is_file() else next(filter(None, map(shutil.which, _NAMES)), None)
        if path is None:
            pytest.skip("there is no Chromium: scripts/dev.py test installs it where Debian's packages can be had")
        with playwright.chromium.launch(executable_path=path) as browser:
            yield browser


@contextmanager
def visiting(browser: Browser, url: str, *, refused: int = 0, **settings: object) -> Iterator[Page]:
    """A page in a profile of its own, which may ask nobody but the server that it came from, and logs no errors.

    refused: how many of its requests the server is to refuse, of which browsers log an error.
    settings: of `Browser.new_context`.
    """
    with browser.new_context(**settings) as context:
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        errors: list[str] = []
        refusals: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.on("response", lambda one: refusals.append(f"{one.status} {one.url}") if one.status >= 400 else None)
        context.on("request", lambda request: asked.append(request.url.removeprefix("blob:")))
        page.goto(url)
        yield page
        assert len(refusals) == refused, refusals
        assert [error for error in errors if "the server responded with a status of" not in error] == []
        assert all(address.startswith(url) for address in asked), asked
