"""What may happen to one hand-over, in which order? Two state machines, one for each end, without I/O.

    sending end                                     receiving end

    OPEN ──grant──> SENDING ──commit──> COMMITTING  ISSUED ──begin──> RECEIVING ──commit──> COMMITTED
      │               │                  │    │       │                │    │
      │             abort              abort  ack   abort            abort  peer's abort, link lost
      │               └──> ABORTING <────┘    │       │                v    │
      └─abort─> CLOSED <───drained─┘ <────────┘       └─> RELEASED <─ack─ QUARANTINED

Rules:

- Everything that changes a session's state is in this file; an illegal move raises ProtocolViolation, changing nothing.
- A sending session ends in CLOSED with one report; until then its source pages may be read, after it never.
- A receiving session ends in COMMITTED (every page of every layer landed exactly once) or in RELEASED (nothing can land
  any more), never in both. Between an abort here and the sender's word that it stopped, it is QUARANTINED: pages
  that were admitted before may still be landing.
- Losing the link ends a session of either end from any state.
- Sessions lock nothing: each has one owner (KvSender, KvReceiver), which does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from core.errors import ProtocolViolation, TransferError
from core.request import SessionId
from kv_transfer.messages import MAX_PAYLOAD_BYTES, Begin, Commit
from kv_transfer.transfer_plan import plan_writes
from kv_transfer.transport import PageGeometry, Span, Strip, Write


@dataclass(frozen=True, slots=True)
class Grant:
    """The receiver's permission to write, issued by ``KvReceiver.issue`` and handed to ``KvSender.granted``.

    ``pages[i]`` is the receiver's page id for the sequence's page ``first_page + i``; earlier pages are cached there.
    """

    session_id: SessionId
    token: bytes  # random secret of this session; every write names it
    first_page: int
    pages: tuple[int, ...]
    descriptor: bytes  # of the receiver's transport
    lease_s: float


@dataclass(frozen=True, slots=True)
class SendReport:
    """How a hand-over ended at the sending end. ``error`` None: the receiver acknowledged the commit."""

    error: TransferError | None
    bytes_sent: int = 0
    num_writes: int = 0
    transfer_s: float = 0.0  # first write queued to acknowledged commit
    exposed_s: float = 0.0  # commit call to acknowledged commit


class SendState(Enum):
    OPEN = auto()  # not granted: what is stored is remembered
    SENDING = auto()
    COMMITTING = auto()  # the commit is queued behind the last write
    ABORTING = auto()  # one last write is being read
    CLOSED = auto()


class ReceiveState(Enum):
    ISSUED = auto()  # no peer has begun: nothing can land
    RECEIVING = auto()
    QUARANTINED = auto()  # aborted here, the sender has not acknowledged
    COMMITTED = auto()
    RELEASED = auto()


SEND_MOVES: Mapping[SendState, frozenset[SendState]] = {
    SendState.OPEN: frozenset({SendState.SENDING, SendState.CLOSED}),
    SendState.SENDING: frozenset({SendState.COMMITTING, SendState.ABORTING, SendState.CLOSED}),
    SendState.COMMITTING: frozenset({SendState.ABORTING, SendState.CLOSED}),
    SendState.ABORTING: frozenset({SendState.CLOSED}),
    SendState.CLOSED: frozenset(),
}

RECEIVE_MOVES: Mapping[ReceiveState, frozenset[ReceiveState]] = {
    ReceiveState.ISSUED: frozenset({ReceiveState.RECEIVING, ReceiveState.RELEASED}),
    ReceiveState.RECEIVING: frozenset({ReceiveState.COMMITTED, ReceiveState.QUARANTINED, ReceiveState.RELEASED}),
    ReceiveState.QUARANTINED: frozenset({ReceiveState.RELEASED}),
    ReceiveState.COMMITTED: frozenset(),
    ReceiveState.RELEASED: frozenset(),
}

Outgoing = Begin | Write | Commit


@dataclass(frozen=True, slots=True)
class _StoredPages:
    """Pages of one layer that are complete at the sending end."""

    layer: int
    first_page: int
    src_pages: tuple[int, ...]


class SendSession:
    """The sending end of one hand-over. Methods that return ``Outgoing`` say what is to be queued, in order."""

    def __init__(self, session_id: SessionId, num_pages: int, geometry: PageGeometry) -> None:
        self.session_id = session_id
        self._num_pages = num_pages
        self._geometry = geometry
        self._state = SendState.OPEN
        self._grant: Grant | None = None
        self._stored: list[_StoredPages] = []  # before the grant
        self._payload: bytes | None = None
        self._committed_at: float | None = None
        self._first_write_at: float | None = None
        self._bytes_sent = 0
        self._num_writes = 0
        self._error: TransferError | None = None
        self._report: SendReport | None = None
        # A step stores the same pages in every layer: one plan serves them all.
        self._planned: tuple[int, tuple[int, ...], int] | None = None  # first page, source pages, bytes of a page
        self._pieces: list[tuple[Strip, ...]] = []

    @property
    def state(self) -> SendState:
        return self._state

    @property
    def token(self) -> bytes | None:
        """The grant's secret; None before the grant."""
        return None if self._grant is None else self._grant.token

    @property
    def report(self) -> SendReport | None:
        """How it ended; None until then."""
        return self._report

    def grant(self, grant: Grant, now: float) -> list[Outgoing]:
        """The receiver gave pages."""
        self._require(SendState.SENDING)
        if grant.first_page + len(grant.pages) != self._num_pages:
            raise ProtocolViolation(
                f"session {self.session_id}: granted pages {grant.first_page} to "
                f"{grant.first_page + len(grant.pages)} of {self._num_pages}"
            )
        self._move(SendState.SENDING)
        self._grant = grant
        outgoing: list[Outgoing] = [Begin(self.session_id, grant.token)]
        for stored in self._stored:
            outgoing += self._plan(grant, stored, now)
        self._stored.clear()
        if self._payload is not None:
            self._move(SendState.COMMITTING)
            outgoing.append(Commit(self.session_id, grant.token, self._payload))
        return outgoing

    def store(self, layer: int, first_page: int, src_pages: Sequence[int], now: float) -> list[Outgoing]:
        """Pages are complete. Nothing is to be sent once the session is aborting or closed."""
        if self._state in (SendState.ABORTING, SendState.CLOSED):
            return []
        stored = _StoredPages(layer, first_page, tuple(src_pages))
        self._check(stored)
        if self._grant is None:
            self._stored.append(stored)
            return []
        return self._plan(self._grant, stored, now)

    def commit(self, payload: bytes, now: float) -> list[Outgoing]:
        """Everything was stored."""
        if self._state in (SendState.ABORTING, SendState.CLOSED):
            return []
        if self._payload is not None:
            raise ProtocolViolation(f"session {self.session_id} is committed twice")
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ProtocolViolation(f"a commit of {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} may be sent")
        if self._state is SendState.SENDING:
            self._move(SendState.COMMITTING)
        self._payload = payload
        self._committed_at = now
        return [] if self._grant is None else [Commit(self.session_id, self._grant.token, payload)]

    def written(self, write: Write) -> None:
        """A write's source pages were read for the last time."""
        self._num_writes += 1
        self._bytes_sent += write.num_bytes

    def acknowledged(self, now: float) -> None:
        """The receiver's ``on_committed`` returned."""
        if self._state is not SendState.COMMITTING:
            raise ProtocolViolation(f"session {self.session_id} is acknowledged in state {self._state.name}")
        self._close(None, now)

    def abort(self, error: TransferError, now: float) -> None:
        """Either end gave up. Closed at once if nothing was granted, else when ``drained``."""
        if self._state is SendState.OPEN:
            self._close(error, now)
            return
        self._move(SendState.ABORTING)
        self._error = error

    def drained(self, now: float) -> None:
        """No page of the aborted session is being read."""
        if self._state is not SendState.ABORTING:
            raise ProtocolViolation(f"session {self.session_id} is drained in state {self._state.name}")
        self._close(self._error, now)

    def lost(self, error: TransferError, now: float) -> None:
        """The link is gone; an abort that came before it stays the reason."""
        self._close(self._error or error, now)

    def _plan(self, grant: Grant, stored: _StoredPages, now: float) -> list[Outgoing]:
        page_bytes = self._geometry.layers[stored.layer].page_bytes
        key = (stored.first_page, stored.src_pages, page_bytes)
        if self._planned != key:
            skip = max(0, grant.first_page - stored.first_page)
            start = stored.first_page + skip - grant.first_page
            src_pages = stored.src_pages[skip:]
            self._pieces = plan_writes(src_pages, grant.pages[start : start + len(src_pages)], page_bytes)
            self._planned = key
        if self._pieces and self._first_write_at is None:
            self._first_write_at = now
        return [Write(self.session_id, grant.token, stored.layer, 1, strips) for strips in self._pieces]

    def _check(self, stored: _StoredPages) -> None:
        if self._payload is not None:
            raise ProtocolViolation(f"session {self.session_id}: pages are stored after the commit")
        if not 0 <= stored.layer < self._geometry.num_layers:
            raise ProtocolViolation(f"session {self.session_id}: there is no layer {stored.layer}")
        if stored.first_page < 0 or stored.first_page + len(stored.src_pages) > self._num_pages:
            raise ProtocolViolation(f"session {self.session_id}: pages beyond its {self._num_pages}")
        if stored.src_pages and not 0 <= min(stored.src_pages) <= max(stored.src_pages) < self._geometry.num_pages:
            raise ProtocolViolation(f"session {self.session_id}: source pages outside the pool")

    def _require(self, to: SendState) -> None:
        if to not in SEND_MOVES[self._state]:
            raise ProtocolViolation(f"session {self.session_id} cannot go from {self._state.name} to {to.name}")

    def _move(self, to: SendState) -> None:
        self._require(to)
        self._state = to

    def _close(self, error: TransferError | None, now: float) -> None:
        self._move(SendState.CLOSED)
        started = now if self._first_write_at is None else self._first_write_at
        committed = now if self._committed_at is None else self._committed_at
        self._report = SendReport(error, self._bytes_sent, self._num_writes, now - started, now - committed)
        self._stored.clear()


class ReceiveSession:
    """The receiving end of one hand-over: which pages it still waits for, and how it ended."""

    def __init__(
        self, session_id: SessionId, token: bytes, pages: Sequence[int], geometry: PageGeometry, now: float
    ) -> None:
        self.session_id = session_id
        self.token = token
        self.num_pages = len(pages)
        self.issued_at = now
        self._state = ReceiveState.ISSUED
        self._pages = frozenset(pages)
        assert len(self._pages) == len(pages), "a page is granted once"
        # layer |-> pages not admitted yet; a layer without an entry waits for nothing
        self._missing: dict[int, set[int]] = {layer: set(pages) for layer in range(geometry.num_layers) if pages}
        self._geometry = geometry
        self._num_landing = 0
        self._error: TransferError | None = None

    @property
    def state(self) -> ReceiveState:
        return self._state

    @property
    def error(self) -> TransferError | None:
        """Why it was given up; None while it was not."""
        return self._error

    def begin(self) -> None:
        """A peer showed the token: its writes are admitted from now on."""
        self._move(ReceiveState.RECEIVING)

    def admit(self, layers: range, spans: Sequence[Span]) -> None:
        """A write is about to land. Raises ProtocolViolation if it may not, be it for one byte, and changes nothing."""
        if self._state is not ReceiveState.RECEIVING:
            raise ProtocolViolation(f"session {self.session_id} takes no writes in state {self._state.name}")
        if not layers or layers.start < 0 or layers.stop > self._geometry.num_layers:
            num_layers = self._geometry.num_layers
            raise ProtocolViolation(f"session {self.session_id}: a write names layers {layers} of {num_layers}")
        pages_of = {layer: self._pages_to_admit(layer, spans) for layer in layers}
        for layer, pages in pages_of.items():
            missing = self._missing.get(layer, set())
            missing -= pages
            if not missing:
                self._missing.pop(layer, None)
        self._num_landing += 1

    def _pages_to_admit(self, layer: int, spans: Iterable[Span]) -> set[int]:
        page_bytes = self._geometry.layers[layer].page_bytes
        missing = self._missing.get(layer, set())
        pages: set[int] = set()
        for span in spans:
            if span.offset % page_bytes or span.num_bytes % page_bytes:
                raise ProtocolViolation(f"session {self.session_id}: a write of parts of pages of layer {layer}")
            first = span.offset // page_bytes
            for page in range(first, first + span.num_bytes // page_bytes):
                if page not in missing or page in pages:
                    raise ProtocolViolation(self._describe_refusal(layer, page))
                pages.add(page)
        return pages

    def landed(self) -> None:
        """An admitted write is in the region."""
        assert self._num_landing > 0, "only an admitted write can land"
        self._num_landing -= 1

    def commit(self) -> None:
        """The sender says that it sent everything. Raises ProtocolViolation if that is not so, and changes nothing."""
        self._require(ReceiveState.COMMITTED)
        if self._missing or self._num_landing:
            num_pages = sum(len(pages) for pages in self._missing.values())
            raise ProtocolViolation(
                f"session {self.session_id}: committed, but {num_pages} pages of {len(self._missing)} layers never came"
            )
        self._move(ReceiveState.COMMITTED)

    def abort(self, error: TransferError) -> None:
        """Given up here: released at once if no peer has begun, else quarantined. Nothing more is admitted."""
        self._move(ReceiveState.RELEASED if self._state is ReceiveState.ISSUED else ReceiveState.QUARANTINED)
        self._error = error

    def stopped(self, error: TransferError) -> None:
        """Nothing can land any more: the sender said so, or the link is gone. An abort before it stays the reason."""
        self._move(ReceiveState.RELEASED)
        self._error = self._error or error

    def _describe_refusal(self, layer: int, page: int) -> str:
        fault = "twice" if page in self._pages else "outside the grant"
        return f"session {self.session_id}: page {page} of layer {layer} is written {fault}"

    def _require(self, to: ReceiveState) -> None:
        if to not in RECEIVE_MOVES[self._state]:
            raise ProtocolViolation(f"session {self.session_id} cannot go from {self._state.name} to {to.name}")

    def _move(self, to: ReceiveState) -> None:
        self._require(to)
        self._state = to
