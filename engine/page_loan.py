"""How are pages of a running engine used for something else than a sequence, for a moment? They are lent.

A self-test of a link writes into real pages. It gets what no sequence needs (``Scheduler.lend``), waits for nothing,
and whatever happens to the asker, cancelling included, the pages come back: the loan belongs to whoever holds it until
``give_back``, and to nobody if the asker is gone before it is made.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from engine.engine_thread import EngineThread

Pages = tuple[int, ...]


class PageLoans:
    """Lends pages of one engine. ``borrow`` is called on an event loop, ``give_back`` from any thread."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine

    async def borrow(self, max_pages: int) -> Pages:
        """Up to ``max_pages`` pages with unknown contents, as many as can be spared now, perhaps none."""
        asked = self._engine.submit(lambda engine: engine.lend(max_pages))
        try:
            return await asyncio.shield(asyncio.wrap_future(asked))
        except asyncio.CancelledError:
            asked.add_done_callback(self._take_back)
            raise

    def give_back(self, pages: Pages) -> None:
        """Only when nobody reads or writes them any more."""
        self._engine.submit(lambda engine: engine.take_back(pages))

    def _take_back(self, asked: Future[Pages]) -> None:
        if not asked.cancelled() and asked.exception() is None:
            self.give_back(asked.result())
