"""aiohttp applications on a free port of loopback, for tests that need a server whose answers they wrote."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    """Its base URL, without a path."""
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextmanager
def served_beside(app: web.Application) -> Iterator[str]:
    """The same on a thread, for a test whose own thread runs an event loop."""
    loop = asyncio.new_event_loop()
    url, stopping = "", asyncio.Event()
    ready = threading.Event()

    async def serve() -> None:
        nonlocal url
        async with served(app) as url:
            ready.set()
            await stopping.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(10)
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(10)
