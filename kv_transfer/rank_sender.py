"""How does a worker of several ranks send? Each rank has a KvSender of its own, and rank 0 says what it does.

    rank 0's process    RankedSender   the hand-overs of the worker; its KvSender, and a line to each other rank
    every other one     RankSending    does what rank 0 says with its own KvSender, and tells how sessions closed

A step's pages are announced before the step, and offered by each rank as it has computed them. Invariants: a session is
open on every rank or on none; it closes once, when it has closed on all of them, so no rank reads a page after that; a
commit never overtakes what a rank has not stored yet.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from core.errors import PrfaasError, RankLost, TransferError
from core.rank_channel import RankChannel, RankLines
from core.request import SessionId
from kv_transfer.rank_parts import grant_for, together
from kv_transfer.sender import KvSender, LinkSpeed, OnClosed, StoredPages
from kv_transfer.session import Grant, SendReport
from kv_transfer.transport import SendOrder


@dataclass(frozen=True, slots=True)
class OpenSession:
    """As ``KvSender.open``."""

    session_id: SessionId
    num_pages: int
    order: SendOrder
    num_tokens: int | None
    raw: bool


@dataclass(frozen=True, slots=True)
class PagesStored:
    """As ``KvSender.pages_stored``: what every rank has stored already."""

    layer: int
    pages: StoredPages


@dataclass(frozen=True, slots=True)
class StepStores:
    """As ``KvSender.step_stores``, of the step that is sent next."""

    stores: tuple[StoredPages, ...]


@dataclass(frozen=True, slots=True)
class Granted:
    """As ``KvSender.granted``, with what is known of the link's speed."""

    session_id: SessionId
    grant: Grant
    bytes_per_s: float | None


@dataclass(frozen=True, slots=True)
class CommitSession:
    """As ``KvSender.commit``, once all of its announced pages are stored."""

    session_id: SessionId
    payload: bytes


@dataclass(frozen=True, slots=True)
class AbortSending:
    """As ``KvSender.abort``."""

    session_id: SessionId
    reason: str


@dataclass(frozen=True, slots=True)
class SendingClosed:
    """A rank's ``on_closed``."""

    session_id: SessionId
    report: SendReport


@dataclass(slots=True)
class _Handover:
    """One session, on all ranks."""

    left: set[int]  # ranks on which it has not closed
    reports: dict[int, SendReport] = field(default_factory=dict)
    error: TransferError | None = None  # of the rank that was first to fail


class RankedSender:
    """``KvSender`` of a worker of several ranks. Any thread may call it, but for ``granted`` and ``abort``, which may
    call ``on_closed``, the same holds as there."""

    def __init__(self, lines: RankLines, on_closed: OnClosed, link_speed: LinkSpeed = lambda peer: None) -> None:
        self._lines = lines
        self._on_closed = on_closed
        self._link_speed = link_speed
        self._lock = threading.Lock()
        self._handovers: dict[SessionId, _Handover] = {}
        self._sender: KvSender | None = None
        lines.hear(SendingClosed, lambda rank, closed: self.closed(rank, closed.session_id, closed.report))

    def attach(self, sender: KvSender) -> None:
        """Give rank 0's own, whose ``on_closed`` is ``closed`` with rank 0."""
        self._sender = sender

    @property
    def num_sessions(self) -> int:
        """Sessions whose ``on_closed`` was not called yet."""
        return len(self._handovers)

    def open(
        self,
        session_id: SessionId,
        num_pages: int,
        order: SendOrder = SendOrder(),
        num_tokens: int | None = None,
        *,
        raw: bool = False,
    ) -> None:
        self._own.open(session_id, num_pages, order, num_tokens, raw=raw)
        with self._lock:
            self._handovers[session_id] = _Handover(set(range(self._lines.num_ranks)))
        self._tell(OpenSession(session_id, num_pages, order, num_tokens, raw))

    def pages_stored(self, session_id: SessionId, layer: int, first_page: int, src_page_ids: Sequence[int]) -> None:
        self._own.pages_stored(session_id, layer, first_page, src_page_ids)
        self._tell(PagesStored(layer, StoredPages(session_id, first_page, tuple(src_page_ids))))

    def step_stores(self, stores: Sequence[StoredPages]) -> Callable[[int], None]:
        if stores:
            self._tell(StepStores(tuple(stores)))
        return self._own.step_stores(stores)

    def granted(self, session_id: SessionId, grant: Grant) -> None:
        of_rank = [grant_for(grant, rank) for rank in range(self._lines.num_ranks)]
        speed = self._link_speed(grant.receiver)
        self._own.granted(session_id, of_rank[0])
        for rank in range(1, self._lines.num_ranks):
            self._lines.send(rank, Granted(session_id, of_rank[rank], speed))

    def commit(self, session_id: SessionId, payload: bytes) -> None:
        self._own.commit(session_id, payload)
        self._tell(CommitSession(session_id, payload))

    def abort(self, session_id: SessionId, reason: str) -> None:
        with self._lock:
            if session_id not in self._handovers:
                return
        self._tell(AbortSending(session_id, reason))
        self._own.abort(session_id, reason)

    def closed(self, rank: int, session_id: SessionId, report: SendReport) -> None:
        """The session is over on one rank."""
        with self._lock:
            handover = self._handovers.get(session_id)
            if handover is None:
                return
            handover.left.discard(rank)
            handover.reports[rank] = report
            is_first = report.error is not None and handover.error is None
            handover.error = handover.error or report.error
            is_over = not handover.left
            if is_over:
                del self._handovers[session_id]
        if is_over:
            reports = sorted(handover.reports.items(), key=lambda item: item[1].error is not handover.error)
            self._on_closed(session_id, together([report for _, report in reports]))
        elif is_first:
            self.abort(session_id, f"it failed on rank {rank}: {report.error}")

    @property
    def _own(self) -> KvSender:
        assert self._sender is not None, "attach() comes first"
        return self._sender

    def _tell(self, message: object) -> None:
        with suppress(RankLost):  # the line has told whoever ends the worker
            self._lines.send_all(message)


class RankSending:
    """The sending half of a rank other than 0. ``sender``'s ``on_closed`` is ``closed``."""

    def __init__(self, channel: RankChannel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._announced: Counter[SessionId] = Counter()  # steps that store pages of it and are not computed yet
        self._commits: dict[SessionId, bytes] = {}  # that wait for them
        self._speeds: dict[object, float | None] = {}  # by receiving worker
        self._next: tuple[StoredPages, ...] = ()
        self._sender: KvSender | None = None

    def attach(self, sender: KvSender) -> None:
        """Give the rank's own, and hear rank 0."""
        self._sender = sender
        hear = self._channel.hear
        hear(OpenSession, lambda m: sender.open(m.session_id, m.num_pages, m.order, m.num_tokens, raw=m.raw))
        hear(PagesStored, lambda m: self._stored(m.layer, m.pages))
        hear(StepStores, self._announce)
        hear(Granted, self._granted)
        hear(CommitSession, self._commit)
        hear(AbortSending, lambda m: sender.abort(m.session_id, m.reason))

    def link_speed(self, receiver: object) -> float | None:
        """What rank 0 knows of the way to a worker; ``KvSender``'s ``link_speed``."""
        return self._speeds.get(receiver)

    def closed(self, session_id: SessionId, report: SendReport) -> None:
        """``KvSender``'s ``on_closed``."""
        with self._lock:
            self._commits.pop(session_id, None)
        with suppress(RankLost):  # rank 0 is gone, and this process ends with it
            self._channel.send(SendingClosed(session_id, report))

    # ---- the thread that hears rank 0, and then computes ----

    def take_stores(self) -> tuple[StoredPages, ...]:
        """What was announced for the step that has just come."""
        stores, self._next = self._next, ()
        return stores

    def step_stores(self, stores: Sequence[StoredPages]) -> Callable[[int], None]:
        """``KvSender.step_stores``, when the step is computed."""
        return self._own.step_stores(stores)

    def step_ended(self, stores: Sequence[StoredPages]) -> None:
        """All of ``stores`` are: commits that waited for them follow."""
        ready: list[tuple[SessionId, bytes]] = []
        with self._lock:
            for pages in stores:
                self._announced[pages.session_id] -= 1
                if self._announced[pages.session_id] <= 0:
                    del self._announced[pages.session_id]
                    if pages.session_id in self._commits:
                        ready.append((pages.session_id, self._commits.pop(pages.session_id)))
        for session_id, payload in ready:
            self._own.commit(session_id, payload)

    # ---- inside ----

    @property
    def _own(self) -> KvSender:
        assert self._sender is not None, "attach() comes first"
        return self._sender

    def _stored(self, layer: int, pages: StoredPages) -> None:
        self._own.pages_stored(pages.session_id, layer, pages.first_page, pages.page_ids)

    def _announce(self, message: StepStores) -> None:
        with self._lock:
            self._announced.update(pages.session_id for pages in message.stores)
        self._next = message.stores

    def _granted(self, message: Granted) -> None:
        self._speeds[message.grant.receiver] = message.bytes_per_s
        try:
            self._own.granted(message.session_id, message.grant)
        except PrfaasError as error:
            self._own.abort(message.session_id, str(error))

    def _commit(self, message: CommitSession) -> None:
        with self._lock:
            if self._announced[message.session_id] > 0:
                self._commits[message.session_id] = message.payload
                return
        self._own.commit(message.session_id, message.payload)
