"""The page at /, in a real browser: what it shows, before and after a link degrades, by keyboard, in both themes.

Screenshots go to build/. Without a Chromium on this machine (Debian: chromium-headless-shell) the tests are skipped.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from benchmarks.page_camera import find_browser
from cluster.grpc_gateway import GrpcGateway
from cluster.http_gateway import HttpGateway
from cluster.internal_tls import TlsDecision
from cluster.message_json import as_dict
from kv_transfer.config import BYTES_PER_GBIT, KvTransferConfig, LinkConfig
from tests.unit.cluster.page_views import CAPACITY, FAILURE, FAR, HOME, fleet, requests
from tests.unit.cluster.scripted_router import Gateway

BUILD = Path(__file__).resolve().parents[3] / "build"
BROWSER = find_browser()
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium-headless-shell"),
    pytest.mark.timeout(120),
]
SIZE = {"width": 1360, "height": 900}


@dataclass
class Opened:
    """The page in a tab, and what went wrong in it."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # every address that the tab asked for

    async def drawn_again(self) -> None:
        """Wait until it has drawn what the gateway says from now on."""
        seen = await self.num_drawn()
        while await self.num_drawn() < seen + 2:
            await asyncio.sleep(0.05)

    async def num_drawn(self) -> int:
        """How often it has drawn; asked for thus, because its content security policy forbids ``wait_for_function``."""
        return int(await self.page.locator("body").get_attribute("data-drawn") or 0)


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as driver:
        running = await driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield running
        finally:
            await running.close()


@asynccontextmanager
async def opened(
    service: Gateway, running: Browser, *, dark: bool = False, keys: Path | None = None
) -> AsyncIterator[Opened]:
    """The service's page in a new tab. ``keys``: a file of those that the service asks for."""
    link = LinkConfig(from_cluster=FAR, to_cluster=HOME, capacity_gbps=CAPACITY / BYTES_PER_GBIT)
    config = replace(
        service.config,
        kv_transfer=KvTransferConfig(links=(link, LinkConfig())),
        api_keys_file=None if keys is None else str(keys),
    )
    grpc = GrpcGateway(
        service.generation,
        service.router,
        service.membership,
        service.links,
        service.planner,
        config,
        service.clock,
        TlsDecision(True, "workers listen on 10.0.0.5"),
        service.requests,
    )
    door = HttpGateway(
        service.generation,
        service.membership,
        service.metrics,
        config,
        service.clock,
        lambda: as_dict(grpc.cluster_info()),
        lambda limit: as_dict(grpc.recent_requests(limit)),
    )
    await door.start()
    page = await running.new_page(viewport=SIZE, color_scheme="dark" if dark else "light", reduced_motion="reduce")
    tab = Opened(page, f"http://127.0.0.1:{door.port}/")
    page.on("console", lambda message: tab.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: tab.errors.append(str(error)))
    page.on("request", lambda request: tab.asked.append(request.url))
    try:
        await page.goto(tab.url)
        await expect(page.locator("body")).to_have_attribute("data-drawn", re.compile("[1-9]"))
        yield tab
    finally:
        await page.close()
        await door.stop(0)


async def shoot(tab: Opened, name: str) -> None:
    BUILD.mkdir(exist_ok=True)
    await tab.page.screenshot(path=BUILD / f"{name}.png", full_page=True)


async def test_the_page_shows_a_fleet_under_load_and_a_link_that_degrades(service: Gateway) -> None:
    fleet(service, degraded=False)
    requests(service.requests, service.clock.now())
    async with browser() as running, opened(service, running) as tab:
        page = tab.page
        await expect(page.locator("#state")).to_have_text("serving")
        await expect(page.locator("#model")).to_have_text("tiny")
        await expect(page.locator("g.worker.prefill")).to_have_count(5)
        await expect(page.locator("g.worker.decode")).to_have_count(4)
        await expect(page.locator("g[data-cluster]")).to_have_count(2)
        across = page.locator('[data-path="oslo→amsterdam"]')
        await expect(across).to_have_attribute("data-state", "ok")
        await expect(across).to_contain_text("52 %")
        await expect(page.locator("dl.tile", has_text="Threshold")).to_contain_text("2,048 tok")
        await expect(page.locator("dl.tile", has_text="Offloaded")).to_contain_text("39 %")
        await expect(page.locator("#plan svg")).to_have_attribute("aria-label", re.compile("2 prefill and 4 decode"))
        await expect(page.locator("#plan-reason")).to_have_text("both stages balance")
        await expect(page.locator("details.request")).to_have_count(24)
        first = page.locator("details.request").first
        await expect(first.locator('i[data-part="prefill"]')).to_be_visible()
        await expect(first.locator("summary")).to_have_attribute("aria-label", re.compile("transfer .*later tokens"))
        await shoot(tab, "page-before")

        fleet(service, degraded=True)
        requests(service.requests, service.clock.now(), degraded=True)
        await tab.drawn_again()

        await expect(page.locator("#state")).to_have_text("serving, 1 of 20 links not used")
        await expect(across).to_have_attribute("data-state", "degraded")
        await expect(across).to_contain_text("degraded to 12 %")
        await expect(page.locator("path.wire.failed")).to_have_count(1)
        await expect(page.locator("path.wire.failed title")).to_contain_text(FAILURE)
        await expect(page.locator("dl.tile", has_text="Threshold")).to_contain_text("7,168 tok")
        await expect(page.locator("#plan-reason")).to_contain_text("link from oslo is full")
        await expect(page.locator("#plan line.change title")).to_contain_text("decode-3 becomes a prefill worker")
        pool = page.locator('[data-pool="decode"]')
        await expect(pool).to_have_text("decode pool: 4 ready of 5 desired (2 to 6), 1 pending")
        await expect(pool).to_have_attribute("title", re.compile(r"decode-4 placing since \d+ s"))
        await expect(page.locator("#routing")).to_contain_text("link_down")
        await expect(page.locator(".outcome.bad").first).to_have_text("overloaded")
        await shoot(tab, "page-after")

        assert tab.errors == []
        assert [url for url in tab.asked if not url.startswith((tab.url, "data:"))] == []


async def test_the_page_is_used_by_keyboard_keeps_its_place_and_has_a_dark_theme(service: Gateway) -> None:
    fleet(service, degraded=False)
    requests(service.requests, service.clock.now(), num=5)
    async with browser() as running, opened(service, running, dark=True) as tab:
        page = tab.page
        assert await page.evaluate("document.documentElement.dataset.theme") == "dark"
        summary = page.locator("details.request summary").first
        await summary.focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("details.request[open]")).to_contain_text("prefilled by")
        await tab.drawn_again()
        await expect(page.locator("details.request[open]")).to_have_count(1)
        assert await page.evaluate("document.activeElement.dataset.key") == "request:request-4"
        await page.locator('g.worker[data-key="worker:decode-0"]').focus()
        await tab.drawn_again()
        assert await page.evaluate("document.activeElement.dataset.key") == "worker:decode-0"
        await shoot(tab, "page-dark")

        await page.get_by_role("button", name="Theme: auto").click()
        await page.get_by_role("button", name="Theme: dark").click()
        assert await page.evaluate("document.documentElement.dataset.theme") == "light"
        await page.get_by_role("button", name="Pause").click()
        await expect(page.get_by_role("button", name="Go on")).to_have_attribute("aria-pressed", "true")
        assert await faint_texts(page) == []
        assert tab.errors == []


async def test_what_a_name_holds_is_text_and_an_empty_service_says_so(service: Gateway) -> None:
    service.membership.workers = ()
    async with browser() as running, opened(service, running) as tab:
        page = tab.page
        await expect(page.locator("#state")).to_have_text("no decode worker is ready")
        await expect(page.locator("#topology")).to_contain_text("No worker has registered yet")
        await expect(page.locator("#timeline")).to_contain_text("No request has ended yet")
        requests(service.requests, service.clock.now(), num=1)
        (record,) = service.requests.latest()
        object.__setattr__(record, "request_id", "<img src=x onerror=alert(1)>")
        await tab.drawn_again()
        await expect(page.locator("details.request .name")).to_have_text("<img src=x onerror=alert(1)>")
        assert await page.locator("img").count() == 0
        assert tab.errors == []


async def test_where_keys_are_needed_requests_are_shown_to_who_has_one(service: Gateway, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("the-key\n")
    fleet(service, degraded=False)
    requests(service.requests, service.clock.now(), num=3)
    async with browser() as running, opened(service, running, keys=keys) as tab:
        page = tab.page
        await expect(page.locator("g.worker")).to_have_count(9)
        await expect(page.locator("details.request")).to_have_count(0)
        await page.get_by_label("Requests are shown to who has").fill("wrong")
        await page.get_by_role("button", name="Show requests").click()
        await page.get_by_label("That key is not one of the service's").fill("the-key")
        await page.keyboard.press("Enter")
        await expect(page.locator("details.request")).to_have_count(3)


async def faint_texts(page: Page) -> list[str]:
    """Texts whose contrast against what they stand on is below WCAG's 4.5:1, in the theme that is shown."""
    found: list[str] = await page.evaluate(
        """() => {
          const channel = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
          const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
          const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
          const ground = (node) => {
            for (let n = node; n; n = n.parentElement) {
              const c = rgb(getComputedStyle(n).backgroundColor);
              if (c.length < 4 || c[3] > 0.99) return c;
            }
            return [255, 255, 255];
          };
          const faint = [];
          for (const node of document.querySelectorAll("h1,h2,h3,p,td,th,li,dt,dd,span,button,caption,a")) {
            const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
            if (!own || !node.offsetParent) continue;
            const [a, b] = [light(rgb(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(node.textContent.trim().slice(0, 40));
          }
          return faint;
        }"""
    )
    return found
