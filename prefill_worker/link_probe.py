"""Do bytes arrive unchanged on the way from this worker's pages into another's? The sending end of a link's self-test.

Nothing is simulated: pages that no sequence needs are lent at both ends, filled with random bytes here, shipped by the
same KvSender over the same links as every hand-over, committed, and digested in the other worker's pool.

    run()      event loop   two transfers: a small one, which also opens the link, and one as long as the small one's
                            speed allows in about ``AIM_S``, which is timed
    closed()   transport    a transfer of ours is over and reads no page any more: the pages go back

Sessions of self-tests are this class's, all others are the prefill worker's: ``closed`` says whose. Invariants: one
self-test at a time, so that it measures the link and not its like; lent pages go back exactly once, after the last
byte of them was read.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from core.errors import Corrupted, Overloaded, PeerLost, PrfaasError
from core.kv_layout import KvLayout
from core.link import ProbeReport
from core.request import SessionId
from engine.page_loan import PageLoans, Pages
from kv_transfer.link_monitor import LinkMonitor
from kv_transfer.probe_pages import ProbePages, bytes_there
from kv_transfer.sender import SendingEnd
from kv_transfer.session import Grant, SendReport
from kv_transfer.transport import LinkStats, PeerIdentity

FIRST_BYTES = 1 << 20
MAX_BYTES = 64 << 20
AIM_S = 0.1
GIVE_UP_S = 1.0  # for a receiver to hear that its pages need not wait; if it does not, they wait for the lease
DIGEST_WAIT_S = 5.0  # the commit was acknowledged: only the reading of the pages is waited for


class ProbeTarget(Protocol):
    """The receiving worker; each method raises a ``TransferError``, or ``Overloaded`` while it has no page."""

    async def grant(self, session_id: SessionId, max_tokens: int) -> Grant:
        """Pages there for this session, for at most ``max_tokens`` tokens, or one page."""
        ...

    async def digest(self, session_id: SessionId, wait_s: float) -> tuple[bytes, int]:
        """The digest of what arrived there, and its bytes."""
        ...

    async def give_up(self, session_id: SessionId, reason: str) -> None:
        """Nothing more will come of that session."""
        ...


@dataclass(frozen=True, slots=True)
class _Transfer:
    num_bytes: int
    seconds: float
    exact: bool


@dataclass(frozen=True, slots=True)
class _Open:
    """A session between ``KvSender.open`` and ``closed``."""

    pages: Pages
    ended: asyncio.Future[SendReport]


class LinkProber:
    """Runs the self-tests that this worker is the sending end of. Lives on one event loop."""

    def __init__(
        self,
        loans: PageLoans,
        stats: Callable[[], tuple[LinkStats, ...]],
        pages: ProbePages,
        layout: KvLayout,
        monitor: LinkMonitor,
        default_path: str,
    ) -> None:
        """``stats``: of every link that the worker sends on; ``layout``: what the pages hold (on rank 0);
        ``default_path``: what a link is said to be of which the transport keeps no books."""
        self._layout = layout
        self._loans = loans
        self._stats = stats
        self._pages = pages
        self._monitor = monitor
        self._default_path = default_path
        self._turn = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._open: dict[SessionId, _Open] = {}
        self._sender: SendingEnd | None = None

    def attach(self, sender: SendingEnd) -> None:
        """Give the sender, whose ``on_closed`` asks ``closed`` first."""
        self._sender = sender

    async def run(self, peer: PeerIdentity, target: ProbeTarget, timeout_s: float) -> ProbeReport:
        """How the self-test ended. Raises ``Overloaded`` if either end has no page to spare: that tells nothing."""
        async with self._turn:
            try:
                async with asyncio.timeout(timeout_s):
                    transfers = await self._transfers(peer, target)
            except Overloaded:
                raise
            except TimeoutError:
                return self._failed(peer, PeerLost(f"the self-test was not over after {timeout_s:g} s"))
            except PrfaasError as error:
                return self._failed(peer, error)
        path, rtt_s = self._seen(peer)
        num_bytes = sum(transfer.num_bytes for transfer in transfers)
        if not all(transfer.exact for transfer in transfers):
            reason = f"of {num_bytes} bytes some arrived changed: the receiver's digest differs"
            return ProbeReport(path, num_bytes, rtt_s=rtt_s, error=Corrupted.__name__, reason=reason)
        timed = max(transfers, key=lambda transfer: transfer.num_bytes)
        return ProbeReport(path, num_bytes, True, timed.num_bytes, timed.seconds, rtt_s)

    def closed(self, session_id: SessionId, report: SendReport) -> bool:
        """The session is over and reads no page any more; False: it is no self-test's. Called by any thread."""
        with self._lock:
            session = self._open.pop(session_id, None)
        if session is None:
            return False
        self._loans.give_back(session.pages)
        self._loop.call_soon_threadsafe(_settle, session.ended, report)
        return True

    # ---- inside ----

    async def _transfers(self, peer: PeerIdentity, target: ProbeTarget) -> list[_Transfer]:
        first = await self._transfer(target, FIRST_BYTES)
        if not first.exact:
            return [first]
        second = await self._transfer(target, next_bytes(first.num_bytes, first.seconds))
        self._monitor.transferred(peer, second.num_bytes, second.seconds)
        return [first, second]

    async def _transfer(self, target: ProbeTarget, num_bytes: int) -> _Transfer:
        """Ship up to ``num_bytes`` random bytes, at least a page, and compare what arrived."""
        layout = self._layout
        session_id = SessionId(f"probe-{uuid.uuid4().hex}")
        lent = await self._loans.borrow(-(-num_bytes // self._pages.page_bytes))
        opened = granted = False
        try:
            if not lent:
                raise Overloaded("the sending worker has no page to spare")
            max_tokens = len(lent) * layout.page_size
            grant = await target.grant(session_id, max_tokens)
            granted = True
            there, num_pages = grant.layout or layout, len(grant.pages)
            layout.require_compatible(there)
            num_tokens = min(max_tokens, num_pages * there.page_size)
            pages = lent[: layout.num_pages(num_tokens)]

            def prepare() -> bytes:
                return self._pages.fill(pages, grant, num_pages, num_tokens)

            expected = await _to_the_end(prepare)
            ended = self._ship(session_id, grant, lent, pages, num_tokens)
            opened = True
            report = await self._end_of(session_id, ended)
            if report.error is not None:
                raise report.error
        except (PrfaasError, asyncio.CancelledError) as error:
            if granted:  # the other end may never have heard of this one: its pages would wait for the lease
                with suppress(PrfaasError, TimeoutError):
                    async with asyncio.timeout(GIVE_UP_S):
                        await target.give_up(session_id, str(error) or "the self-test took too long")
            raise
        finally:
            if not opened:
                self._loans.give_back(lent)
        digest, num_arrived = await target.digest(session_id, DIGEST_WAIT_S)
        exact = digest == expected and num_arrived == bytes_there(grant, layout, num_pages)
        return _Transfer(report.bytes_sent, report.transfer_s, exact)

    def _ship(
        self, session_id: SessionId, grant: Grant, lent: Pages, pages: Pages, num_tokens: int
    ) -> asyncio.Future[SendReport]:
        """From here on the lent pages are given back by ``closed``."""
        assert self._sender is not None, "attach() comes before the first self-test"
        session = _Open(lent, self._loop.create_future())
        with self._lock:
            self._open[session_id] = session
        try:
            self._sender.open(session_id, len(pages), num_tokens=num_tokens, raw=True)
        except PrfaasError:
            with self._lock:
                del self._open[session_id]
            raise
        for layer in range(len(self._layout.layers)):
            self._sender.pages_stored(session_id, layer, 0, pages)
        self._sender.commit(session_id, b"")
        try:
            self._sender.granted(session_id, grant)
        except PrfaasError as error:
            self._sender.abort(session_id, str(error))
        return session.ended

    async def _end_of(self, session_id: SessionId, ended: asyncio.Future[SendReport]) -> SendReport:
        assert self._sender is not None, "it has shipped"
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            self._sender.abort(session_id, "the self-test took too long")
            raise

    def _seen(self, peer: PeerIdentity) -> tuple[str, float | None]:
        """(path, round trip) of the link, as the transport has found them."""
        self._monitor.tick(self._stats())
        estimate = self._monitor.estimate(peer.worker_id)
        if estimate is None:
            return self._default_path, None
        return estimate.path or self._default_path, estimate.rtt_s

    def _failed(self, peer: PeerIdentity, error: PrfaasError) -> ProbeReport:
        path, rtt_s = self._seen(peer)
        return ProbeReport(path, rtt_s=rtt_s, error=type(error).__name__, reason=str(error))


def next_bytes(num_bytes: int, seconds: float) -> int:
    """Bytes of the timed transfer, after one of ``num_bytes`` that opened the link: what takes about ``AIM_S``.

    Opening a link is slow, so the first speed is taken for a quarter of the link's at most.
    """
    return MAX_BYTES if seconds <= 0 else max(num_bytes, min(MAX_BYTES, int(4 * num_bytes / seconds * AIM_S)))


async def _to_the_end(work: Callable[[], bytes]) -> bytes:
    """Run ``work`` in a thread. Cancelling waits for it: a thread that still writes pages must not lose them."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _settle(ended: asyncio.Future[SendReport], report: SendReport) -> None:
    if not ended.done():
        ended.set_result(report)
