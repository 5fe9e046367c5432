"""How do cached pages leave an engine for another worker, and how do such pages come into it?

    out   lend()     pages of a known prefix, kept from eviction while they are read     give_back()
    in    expect()   room behind the part of a prefix that is known here                 adopt(), or give_back()

Nothing here waits for a step of the engine, nor makes one wait: its books are open while it computes. What is lent to
somebody who is gone before he gets it (a cancelled call) goes back by itself; from then on it belongs to whoever holds
it, until it is given back or adopted, exactly once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from core.prefix_hash import PageHash
from engine.engine_thread import EngineThread
from engine.page_loan import Pages
from engine.scheduler import PrefixRoom

T = TypeVar("T")


class PrefixBooks(Protocol):
    """What of an engine is asked here, from any thread (``Engine``)."""

    def num_known_pages(self, page_hashes: Sequence[PageHash]) -> int: ...
    def lend_prefix(self, page_hashes: Sequence[PageHash]) -> tuple[int, ...]: ...
    def expect_prefix(self, page_hashes: Sequence[PageHash], num_known: int) -> PrefixRoom | None: ...
    def adopt(self, room: PrefixRoom) -> None: ...


class PrefixLoans:
    """Lends known prefixes of one engine, and makes room for others. Coroutines run on an event loop, the rest may be
    called from any thread."""

    def __init__(self, engine: EngineThread, books: PrefixBooks) -> None:
        self._engine = engine
        self._books = books

    async def num_known(self, page_hashes: Sequence[PageHash]) -> int:
        """How many of these pages, from the first on, are cached here."""
        return await asyncio.to_thread(self._books.num_known_pages, page_hashes)

    async def lend(self, page_hashes: Sequence[PageHash]) -> Pages:
        """Those of these pages, from the first on, that are cached and can be spared. They may only be read."""
        return await _kept(lambda: self._books.lend_prefix(page_hashes), self.give_back)

    async def expect(self, page_hashes: Sequence[PageHash], num_known: int) -> PrefixRoom | None:
        """Room for a prefix that is known here up to page ``num_known``; None: there is none to spare, or what was
        known is not any more."""

        def give_back(room: PrefixRoom | None) -> None:
            if room is not None:
                self.give_back(room.page_ids)

        return await _kept(lambda: self._books.expect_prefix(page_hashes, num_known), give_back)

    async def adopt(self, room: PrefixRoom) -> None:
        """All of it is stored: it is this engine's prefix cache from now on."""
        await asyncio.to_thread(self._books.adopt, room)
        self._engine.submit(lambda engine: None)  # a queue that waits for pages looks again

    def give_back(self, pages: Pages) -> None:
        """Lent pages, or those of a room, when nobody reads or writes them any more."""
        self._engine.submit(lambda engine: engine.take_back(pages))


async def _kept(take: Callable[[], T], give_back: Callable[[T], None]) -> T:
    """What ``take`` returns, taken in a thread; given back if nobody waits for it any more."""
    asked = asyncio.ensure_future(asyncio.to_thread(take))
    try:
        return await asyncio.shield(asked)
    except asyncio.CancelledError:
        asked.add_done_callback(lambda done: give_back(done.result()) if _succeeded(done) else None)
        raise


def _succeeded(done: asyncio.Future[T]) -> bool:
    return not done.cancelled() and done.exception() is None
