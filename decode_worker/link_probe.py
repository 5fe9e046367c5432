"""Did the pages of a self-test arrive as they were sent? The receiving end of a link's self-test.

    grant()       event loop   pages that nobody needs are lent and granted to the sending worker
    committed()   transport    every page arrived: their digest is taken, then they go back
    released()    transport    the session broke and nothing can land any more: they go back
    digest()      event loop   the sending worker asks what arrived

Sessions of self-tests are this class's, all others are the decode worker's: ``committed`` and ``released`` say whose.
Invariants: lent pages go back exactly once, whether or not anybody asks for the digest; results of the last
``MAX_RESULTS`` self-tests are kept.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from core.errors import GrantRefused, Overloaded, TransferError
from core.kv_layout import KvEnd, KvLayout
from core.request import SessionId
from engine.page_loan import PageLoans, Pages
from kv_transfer.probe_pages import ProbePages
from kv_transfer.receiver import ReceivingEnd
from kv_transfer.session import Grant

MAX_RESULTS = 256

RunOnLoop = Callable[[Awaitable[None]], None]


@dataclass(frozen=True, slots=True)
class _Lent:
    """Pages of one session, and from which ranks it comes, if either end has several."""

    pages: Pages
    senders: tuple[KvEnd, ...]


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a self-test put into this worker's pages."""

    digest: bytes
    num_bytes: int


class ProbeReceiver:
    """Lends pages to self-tests of other workers, and tells what arrived in them."""

    def __init__(self, loans: PageLoans, pages: ProbePages, layout: KvLayout, run_on_loop: RunOnLoop) -> None:
        """``layout``: what the pages hold (on rank 0)."""
        self._loans = loans
        self._layout = layout
        self._pages = pages
        self._run_on_loop = run_on_loop
        self._receiver: ReceivingEnd | None = None
        self._lock = threading.Lock()
        self._lent: dict[SessionId, _Lent] = {}
        self._results: OrderedDict[SessionId, asyncio.Future[Arrived]] = OrderedDict()  # the event loop's alone

    def attach(self, receiver: ReceivingEnd) -> None:
        """Give the receiver, whose callbacks ask ``committed`` and ``released`` first."""
        self._receiver = receiver

    async def grant(
        self,
        session_id: SessionId,
        max_tokens: int,
        sender: KvLayout,
        sender_descriptor: bytes,
        sender_ranks: Sequence[KvEnd] = (),
    ) -> Grant:
        """Pages for at most ``max_tokens`` tokens, but at least one page; the descriptor is for links that this end
        dials. What no token fills of that one page is zeros.

        Raises ``Overloaded`` if there is none, ``GrantRefused`` for a name in use, ``ProtocolViolation`` for nonsense.
        """
        assert self._receiver is not None, "attach() comes before the first self-test"
        if session_id in self._results:
            raise GrantRefused(f"session {session_id} was granted already")
        pages = await self._loans.borrow(max(1, max_tokens // self._layout.page_size))
        if not pages:
            raise Overloaded("the receiving worker has no page to spare")
        num_tokens = min(max_tokens, len(pages) * self._layout.page_size)
        if num_tokens < self._layout.page_size:
            self._pages.clear(pages)
        senders = tuple(sender_ranks) or ((KvEnd(sender, sender_descriptor),) if self._receiver.waits else ())
        with self._lock:
            self._lent[session_id] = _Lent(pages, senders)
        try:
            grant = self._receiver.issue(session_id, 0, pages, num_tokens, sender, sender_descriptor, senders)
        except TransferError:
            self._take(session_id)
            self._loans.give_back(pages)
            raise
        self._results[session_id] = asyncio.get_running_loop().create_future()
        while len(self._results) > MAX_RESULTS:
            self._results.popitem(last=False)[1].cancel()
        return grant

    async def digest(self, session_id: SessionId, wait_s: float) -> Arrived:
        """What arrived, once all of it has. Raises ``GrantRefused`` if nothing has within ``wait_s``, or why not."""
        result = self._results.get(session_id)
        if result is None:
            raise GrantRefused(f"session {session_id} is no self-test of this worker")
        try:
            async with asyncio.timeout(wait_s):
                return await asyncio.shield(result)
        except TimeoutError:
            raise GrantRefused(f"session {session_id} was not committed within {wait_s:g} s") from None

    def give_up(self, session_id: SessionId, reason: str) -> None:
        """The sender says that nothing more will come; a session that has ended, or is not known, is left alone."""
        assert self._receiver is not None, "attach() comes before the first self-test"
        if session_id in self._results:
            self._receiver.abort(session_id, reason)

    # ---- transport threads ----

    def committed(self, session_id: SessionId) -> bool:
        """Every page arrived; False: it is no self-test's session."""
        lent = self._take(session_id)
        if lent is None:
            return False
        self._run_on_loop(self._conclude(session_id, lent))
        return True

    def released(self, session_id: SessionId, error: TransferError) -> bool:
        """The session broke; False: it is no self-test's."""
        lent = self._take(session_id)
        if lent is None:
            return False
        self._loans.give_back(lent.pages)
        self._run_on_loop(self._fail(session_id, error))
        return True

    # ---- inside ----

    def _take(self, session_id: SessionId) -> _Lent | None:
        with self._lock:
            return self._lent.pop(session_id, None)

    async def _conclude(self, session_id: SessionId, lent: _Lent) -> None:
        pages = lent.pages
        try:
            digest = await asyncio.to_thread(self._pages.digest, session_id, pages, lent.senders)
        finally:
            self._loans.give_back(pages)  # reading a page that is somebody else's by now would harm nobody
        result = self._results.get(session_id)
        if result is not None and not result.done():
            result.set_result(Arrived(digest, len(pages) * self._pages.page_bytes))

    async def _fail(self, session_id: SessionId, error: TransferError) -> None:
        result = self._results.get(session_id)
        if result is not None and not result.done():
            result.set_exception(error)
            result.exception()  # whoever asks gets it; nobody has to
