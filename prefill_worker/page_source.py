"""Another worker wants pages of a prefix that this one caches: the sending end of a page pull.

    offer()    event loop   pages of the prefix are lent by the engine, so that none is evicted while it is read
    push()     event loop   they travel as every hand-over does: a session, all layers, a commit
    closed()   transport    the session is over and reads no page any more: they go back

What is not cached here (any more) is not offered: a shorter prefix, or none, is no error. Sessions of pushes are this
class's, others are not: ``closed`` says whose. Invariant: lent pages go back exactly once, after the last byte of them
was read, whether the other worker takes them, goes away or falls silent.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from core.errors import PrfaasError, ProtocolViolation
from core.kv_layout import KvLayout
from core.prefix_hash import PageHash
from core.request import SessionId
from engine.page_loan import Pages
from engine.prefix_loan import PrefixLoans
from kv_transfer.sender import SendingEnd
from kv_transfer.session import Grant, SendReport
from kv_transfer.transport import SendOrder


@dataclass(frozen=True, slots=True)
class _Push:
    """A session between ``KvSender.open`` and ``closed``."""

    pages: Pages
    ended: asyncio.Future[SendReport]


@dataclass(slots=True)
class Offer:
    """Pages of one prefix, lent until the offer ends or, once they are pushed, until their session has."""

    pages: Pages
    pushed: bool = False


class PageSource:
    """Sends cached pages of one worker to others. Lives on one event loop."""

    def __init__(self, loans: PrefixLoans, layout: KvLayout) -> None:
        """``layout``: what the pages hold."""
        self._loans = loans
        self._layout = layout
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._pushes: dict[SessionId, _Push] = {}
        self._sender: SendingEnd | None = None

    def attach(self, sender: SendingEnd) -> None:
        """Give the sender, whose ``on_closed`` asks ``closed`` first."""
        self._sender = sender

    @property
    def num_sessions(self) -> int:
        """Pushes under way."""
        return len(self._pushes)

    @asynccontextmanager
    async def offer(self, page_hashes: Sequence[PageHash]) -> AsyncIterator[Offer]:
        """What is cached here of these pages that follow each other, from the first on; perhaps nothing."""
        offer = Offer(await self._loans.lend(page_hashes))
        try:
            yield offer
        finally:
            if not offer.pushed:
                self._loans.give_back(offer.pages)

    async def push(self, offer: Offer, session_id: SessionId, grant: Grant, order: SendOrder) -> SendReport:
        """Send all of it to where ``grant`` says; how that ended. Cancelling gives the session up.

        Raises ``ProtocolViolation`` for the name of a session that is open here.
        """
        assert not offer.pushed, "an offer is pushed once"
        ended = self._open(session_id, offer, order)
        for layer in range(len(self._layout.layers)):
            self._kv.pages_stored(session_id, layer, 0, offer.pages)
        self._kv.commit(session_id, b"")
        try:
            self._kv.granted(session_id, grant)
        except PrfaasError as error:
            self._kv.abort(session_id, str(error))
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            self._kv.abort(session_id, "the other worker does not want the pages any more")
            raise

    def closed(self, session_id: SessionId, report: SendReport) -> bool:
        """The session is over and reads no page any more; False: it is no push's. Called by any thread."""
        with self._lock:
            push = self._pushes.pop(session_id, None)
        if push is None:
            return False
        self._loans.give_back(push.pages)
        self._loop.call_soon_threadsafe(_settle, push.ended, report)
        return True

    # ---- inside ----

    def _open(self, session_id: SessionId, offer: Offer, order: SendOrder) -> asyncio.Future[SendReport]:
        """From here on ``closed`` gives the pages back."""
        push = _Push(offer.pages, self._loop.create_future())
        with self._lock:
            if session_id in self._pushes:
                raise ProtocolViolation(f"session {session_id} is open already")
            self._pushes[session_id] = push
        try:
            self._kv.open(session_id, len(offer.pages), order)
        except PrfaasError:
            with self._lock:
                del self._pushes[session_id]
            raise
        offer.pushed = True
        return push.ended

    @property
    def _kv(self) -> SendingEnd:
        assert self._sender is not None, "attach() comes before the first offer"
        return self._sender


def _settle(ended: asyncio.Future[SendReport], report: SendReport) -> None:
    if not ended.done():
        ended.set_result(report)
