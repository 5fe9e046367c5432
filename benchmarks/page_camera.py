"""How does the gateway's page look meanwhile? Photographs of it by a Chromium of this machine, for benchmarks."""

from __future__ import annotations

import shutil
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZE = (1360, 900)
_LOOK_MS = 20_000


def find_browser() -> str | None:
    """A Chromium's path; None: there is none here (Debian: chromium-headless-shell)."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class PageCamera:
    """The page at ``url`` in a tab of its own, from ``async with`` to its end."""

    def __init__(self, url: str, folder: Path, browser: str) -> None:
        self._url = url
        self._folder = folder
        self._browser = browser
        self._opened = AsyncExitStack()

    async def __aenter__(self) -> Self:
        from playwright.async_api import async_playwright  # a tool of developers

        driver = await self._opened.enter_async_context(async_playwright())
        running = await driver.chromium.launch(executable_path=self._browser, args=["--no-sandbox", "--disable-gpu"])
        self._opened.push_async_callback(running.close)
        width, height = SIZE
        self._page = await running.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        await self._page.goto(self._url)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._opened.aclose()

    async def shoot(self, name: str) -> Path:
        """Photograph the whole page as it is now; the file's path."""
        await self._page.wait_for_selector("body[data-drawn]", timeout=_LOOK_MS)
        path = self._folder / f"{name}.png"
        await self._page.screenshot(path=path, full_page=True)
        return path
