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
- A receiving session ends in COMMITTED (every byte that it waited for landed exactly once) or in RELEASED (nothing can
  land any more), never in both. Between an abort here and the sender's word that it stopped, it is QUARANTINED: pages
  that were admitted before may still be landing.
- A commit that finds bytes missing, because they came damaged or were lost with a connection, asks for them again and
  for another commit behind them, ``MAX_RESENDS`` times at most; meanwhile both states stay what they are.
- Stored layers are held back until a group of them is worth a piece, and never beyond the last layer or the commit.
- Losing the link ends a session of either end from any state.
- Sessions lock nothing: each has one owner (KvSender, KvReceiver), which does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from enum import Enum, auto

from core.errors import Corrupted, ProtocolViolation, TransferError
from core.kv_layout import KvLayer, KvLayout
from core.request import SessionId
from kv_transfer.byte_ranges import ByteRanges
from kv_transfer.messages import MAX_PAYLOAD_BYTES, MAX_RESEND_SPANS, Begin, Commit, Missing
from kv_transfer.spans import Spans, spans_of
from kv_transfer.transfer_plan import (
    PageTable,
    granted_bytes,
    layer_group_size,
    missing_spans,
    plan_layer,
    spare_bytes,
    writes_for,
)
from kv_transfer.transport import (
    ANONYMOUS,
    HOST_PIECES,
    PageGeometry,
    PeerIdentity,
    PieceLimits,
    SendOrder,
    Span,
    Strips,
    Write,
)

MAX_RESENDS = 3
_LONG_TABLE = 64  # spans of which taking costs more than copying the set that they are taken from
_MAX_TAKEN = 1024


@dataclass(frozen=True, slots=True)
class GrantPart:
    """Of a grant to or by a worker of several ranks: what one of the sender's may write into one of the receiver's."""

    sender: int  # rank
    session_id: SessionId
    token: bytes
    descriptor: bytes
    layout: KvLayout


@dataclass(frozen=True, slots=True)
class Grant:
    """The receiver's permission to write, issued by ``KvReceiver.issue`` and handed to ``KvSender.granted``.

    ``pages[i]`` is the receiver's page id for the sequence's page ``first_page + i``, in pages of the receiver's size;
    what lies before them is cached there.
    """

    session_id: SessionId
    token: bytes  # random secret of this session; every write names it
    first_page: int
    pages: tuple[int, ...]
    descriptor: bytes  # of the receiver's transport
    lease_s: float
    layout: KvLayout | None = None  # of the receiver's pool; None: the same as the sender's
    receiver: PeerIdentity = ANONYMOUS
    parts: tuple[GrantPart, ...] = ()  # what is sent by each pair of ranks (rank_parts.py); empty: there is one of each

    def of_part(self, part: GrantPart) -> Grant:
        """The grant of one of its parts, as of a session of its own."""
        return replace(
            self,
            session_id=part.session_id,
            token=part.token,
            descriptor=part.descriptor,
            layout=part.layout,
            parts=(),
        )


@dataclass(frozen=True, slots=True)
class Expected:
    """What a grant lets in: the heads that ``sender`` holds of every layer of ``pages``.

    ``pages`` are the sequence's from ``first_page`` on; slots beyond ``num_tokens`` may be written and need not be.
    """

    layout: KvLayout
    first_page: int
    pages: tuple[int, ...]
    num_tokens: int
    sender: KvLayout

    def allowed(self) -> list[ByteRanges]:
        """Of each layer. Layers that are alike share one set."""
        known: dict[tuple[KvLayer, range], ByteRanges] = {}
        allowed: list[ByteRanges] = []
        for layer, here in enumerate(self.layout.layers):
            key = (here, self.sender.layers[layer].heads)
            if key not in known:
                known[key] = granted_bytes(self.layout, layer, self.pages, key[1])
            allowed.append(known[key])
        return allowed

    def spare(self, layer: int) -> list[tuple[int, int]]:
        """(first, end) of the slots of the last page that hold no token."""
        used = self.num_tokens - (self.first_page + len(self.pages) - 1) * self.layout.page_size
        if not self.pages or used >= self.layout.page_size:
            return []
        return spare_bytes(self.layout, layer, self.pages[-1], used, self.sender.layers[layer].heads)


@dataclass(frozen=True, slots=True)
class SendReport:
    """How a hand-over ended at the sending end. ``error`` None: the receiver acknowledged the commit."""

    error: TransferError | None
    bytes_sent: int = 0  # what was sent again included
    num_writes: int = 0
    transfer_s: float = 0.0  # first write queued to acknowledged commit
    exposed_s: float = 0.0  # the tail: commit call to acknowledged commit
    wait_s: float = 0.0  # of the tail: until the grant came, if it came after the commit call
    tail_bytes: int = 0  # not yet read for sending when the commit was called
    num_groups: int = 0  # groups of layers that were queued
    writes_resent: int = 0
    receiver: PeerIdentity = ANONYMOUS  # as the grant named it

    @property
    def bytes_overlapped(self) -> int:
        """Sent before the commit was called: while the prompt was computed."""
        return self.bytes_sent - self.tail_bytes


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
class _Group:
    """The same pages of layers that follow each other, complete at the sending end."""

    layers: range
    first_page: int
    src_pages: tuple[int, ...]


class SendSession:
    """The sending end of one hand-over. Methods that return ``Outgoing`` say what is to be queued, in order."""

    def __init__(
        self,
        session_id: SessionId,
        num_tokens: int,
        geometry: PageGeometry,
        layout: KvLayout,
        order: SendOrder,
        limits: PieceLimits = HOST_PIECES,
    ) -> None:
        self.session_id = session_id
        self._num_tokens = num_tokens
        self._num_pages = layout.num_pages(num_tokens)
        self._geometry = geometry
        self._layout = layout
        self._order = order
        self._limits = limits
        self._state = SendState.OPEN
        self._grant: Grant | None = None
        self._link_bytes_per_s: float | None = None
        self._stored: list[_Group] = []  # before the grant, one layer each
        self._held: _Group | None = None  # stored and not yet queued
        self._sent: list[Write] = []  # what may have to be sent again
        self._payload: bytes | None = None
        self._committed_at: float | None = None
        self._granted_at: float | None = None
        self._first_write_at: float | None = None
        self._bytes_sent = 0
        self._bytes_overlapped = 0
        self._num_writes = 0
        self._num_groups = 0
        self._num_resends = 0
        self._writes_resent = 0
        self._error: TransferError | None = None
        self._report: SendReport | None = None
        # A step stores the same pages in every layer: one plan serves them all.
        self._planned: tuple[object, ...] = ()
        self._pieces: list[Strips] = []
        self._checked_pages: tuple[int, ...] = ()

    @property
    def state(self) -> SendState:
        return self._state

    @property
    def token(self) -> bytes | None:
        """The grant's secret; None before the grant."""
        return None if self._grant is None else self._grant.token

    @property
    def receiver(self) -> PeerIdentity:
        """As the grant named it; anonymous before."""
        return ANONYMOUS if self._grant is None else self._grant.receiver

    @property
    def report(self) -> SendReport | None:
        """How it ended; None until then."""
        return self._report

    def part(self, session_id: SessionId) -> SendSession:
        """A session of that name with what was stored so far, for one of several receiving ranks; before the grant."""
        self._require(SendState.SENDING)
        session = copy(self)
        session.session_id = session_id
        session._stored = list(self._stored)
        session._sent = []
        return session

    def grant(self, grant: Grant, now: float, link_bytes_per_s: float | None = None) -> list[Outgoing]:
        """The receiver gave pages; ``link_bytes_per_s`` is what the way there carries, if that is known.

        Raises Incompatible if its pool cannot hold what this one does.
        """
        self._require(SendState.SENDING)
        layout = grant.layout or self._layout
        self._layout.require_compatible(layout)
        if grant.first_page + len(grant.pages) != layout.num_pages(self._num_tokens):
            raise ProtocolViolation(
                f"session {self.session_id}: granted pages {grant.first_page} to "
                f"{grant.first_page + len(grant.pages)} of {layout.num_pages(self._num_tokens)}"
            )
        self._move(SendState.SENDING)
        self._grant = grant
        self._granted_at = now
        self._link_bytes_per_s = link_bytes_per_s
        self._limits = self._limits.at(link_bytes_per_s)
        outgoing: list[Outgoing] = [Begin(self.session_id, grant.token)]
        for stored in self._stored:
            outgoing += self._hold(grant, stored, now)
        self._stored.clear()
        if self._payload is not None:
            outgoing += self._finish(grant, self._payload, now)
        return outgoing

    def store(self, layer: int, first_page: int, src_pages: Sequence[int], now: float) -> list[Outgoing]:
        """Pages are complete. Nothing is to be sent once the session is aborting or closed."""
        if self._state in (SendState.ABORTING, SendState.CLOSED):
            return []
        stored = _Group(range(layer, layer + 1), first_page, tuple(src_pages))
        self._check(stored)
        if self._grant is None:
            self._stored.append(stored)
            return []
        return self._hold(self._grant, stored, now)

    def commit(self, payload: bytes, now: float) -> list[Outgoing]:
        """Everything was stored."""
        if self._state in (SendState.ABORTING, SendState.CLOSED):
            return []
        if self._payload is not None:
            raise ProtocolViolation(f"session {self.session_id} is committed twice")
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ProtocolViolation(f"a commit of {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} may be sent")
        self._payload = payload
        self._committed_at = now
        self._bytes_overlapped = self._bytes_sent
        return [] if self._grant is None else self._finish(self._grant, payload, now)

    def resend(self, missing: Sequence[Missing]) -> list[Outgoing]:
        """The receiver waits for some of it still. Raises ProtocolViolation for what was never sent, or too often."""
        if self._state is not SendState.COMMITTING or self._grant is None or self._payload is None:
            raise ProtocolViolation(f"session {self.session_id}: asked to send again in state {self._state.name}")
        if self._num_resends == MAX_RESENDS:
            raise ProtocolViolation(f"session {self.session_id}: asked to send again more than {MAX_RESENDS} times")
        if any(entry.layers.stop > self._geometry.num_layers for entry in missing):
            raise ProtocolViolation(f"session {self.session_id}: layers are asked for that do not exist")
        again = writes_for(missing, self._sent)
        self._num_resends += 1
        self._writes_resent += len(again)
        return [*again, Commit(self.session_id, self._grant.token, self._payload)]

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

    def _hold(self, grant: Grant, stored: _Group, now: float) -> list[Outgoing]:
        """Let the layers pile up, and queue those that are a group now."""
        outgoing: list[Outgoing] = []
        held = self._held
        if held is not None and self._continues(held, stored):
            held = _Group(range(held.layers.start, stored.layers.stop), held.first_page, held.src_pages)
        else:
            outgoing = self._flush(grant, now)
            held = stored
        self._held = held
        layer_bytes = len(held.src_pages) * self._geometry.layers[held.layers.start].page_bytes
        num_layers = self._geometry.num_layers
        full = len(held.layers) >= layer_group_size(layer_bytes, num_layers, self._link_bytes_per_s)
        if full or held.layers.stop == num_layers:
            outgoing += self._flush(grant, now)
        return outgoing

    def _continues(self, held: _Group, stored: _Group) -> bool:
        """May ``stored``, one layer, travel as one write with ``held``?"""
        a, b = held.layers.start, stored.layers.start
        there = (self._grant.layout if self._grant else None) or self._layout
        return (
            held.layers.stop == b
            and (held.first_page, held.src_pages) == (stored.first_page, stored.src_pages)
            and self._geometry.layers[a] == self._geometry.layers[b]
            and (self._layout.layers[a], there.layers[a]) == (self._layout.layers[b], there.layers[b])
        )

    def _flush(self, grant: Grant, now: float) -> list[Outgoing]:
        """Queue what is held back."""
        held, self._held = self._held, None
        if held is None:
            return []
        first, num_layers = held.layers.start, len(held.layers)
        there = grant.layout or self._layout
        src_layer, dst_layer = self._layout.layers[first], there.layers[first]
        key = (held.first_page, held.src_pages, src_layer, dst_layer, num_layers)
        if self._planned != key:
            src = PageTable(self._layout.page_size, held.first_page, held.src_pages)
            dst = PageTable(there.page_size, grant.first_page, grant.pages)
            room = (max(1, self._limits.max_bytes // num_layers), max(1, self._limits.max_strips // num_layers))
            self._pieces = plan_layer(src, src_layer, dst, dst_layer, range(self._num_tokens), *room)
            self._planned = key
        if not self._pieces:
            return []
        if self._first_write_at is None:
            self._first_write_at = now
        self._num_groups += 1
        writes = [
            Write(self.session_id, grant.token, first, num_layers, strips, self._order) for strips in self._pieces
        ]
        self._sent += writes
        return list(writes)

    def _finish(self, grant: Grant, payload: bytes, now: float) -> list[Outgoing]:
        self._move(SendState.COMMITTING)
        return [*self._flush(grant, now), Commit(self.session_id, grant.token, payload)]

    def _check(self, stored: _Group) -> None:
        if self._payload is not None:
            raise ProtocolViolation(f"session {self.session_id}: pages are stored after the commit")
        if not 0 <= stored.layers.start < self._geometry.num_layers:
            raise ProtocolViolation(f"session {self.session_id}: there is no layer {stored.layers.start}")
        if stored.first_page < 0 or stored.first_page + len(stored.src_pages) > self._num_pages:
            raise ProtocolViolation(f"session {self.session_id}: pages beyond its {self._num_pages}")
        if stored.src_pages != self._checked_pages:
            if not 0 <= min(stored.src_pages) <= max(stored.src_pages) < self._geometry.num_pages:
                raise ProtocolViolation(f"session {self.session_id}: source pages outside the pool")
            self._checked_pages = stored.src_pages

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
        granted = now if self._granted_at is None else self._granted_at
        self._report = SendReport(
            error,
            bytes_sent=self._bytes_sent,
            num_writes=self._num_writes,
            transfer_s=now - started,
            exposed_s=now - committed,
            wait_s=max(0.0, granted - committed),
            tail_bytes=0 if self._committed_at is None else self._bytes_sent - self._bytes_overlapped,
            num_groups=self._num_groups,
            writes_resent=self._writes_resent,
            receiver=self.receiver,
        )
        self._stored.clear()
        self._sent.clear()


class ReceiveSession:
    """The receiving end of one hand-over: which bytes it still waits for, and how it ended."""

    def __init__(self, session_id: SessionId, token: bytes, expected: Expected, now: float) -> None:
        self.session_id = session_id
        self.token = token
        self.issued_at = now
        self._state = ReceiveState.ISSUED
        self._expected = expected
        self._waiting = expected.allowed()  # of each layer, the bytes that were not admitted, or came damaged
        # Layers that are alike lose the same spans in the same order: what a long table leaves of a set of bytes is
        # computed once. Sets in use there, or by several layers, are shared and never changed.
        self._taken: dict[tuple[int, int], tuple[ByteRanges, Spans, ByteRanges]] = {}
        self._is_shared = [True] * len(self._waiting)
        self._num_landing = 0
        self._num_resends = 0
        self._error: TransferError | None = None

    @property
    def state(self) -> ReceiveState:
        return self._state

    @property
    def error(self) -> TransferError | None:
        """Why it was given up; None while it was not."""
        return self._error

    @property
    def num_pages(self) -> int:
        """Pages of the grant."""
        return len(self._expected.pages)

    def begin(self) -> None:
        """A peer showed the token: its writes are admitted from now on."""
        self._move(ReceiveState.RECEIVING)

    def admit(self, layers: range, spans: Sequence[Span]) -> None:
        """A write is about to land. Raises ProtocolViolation if it may not, be it for one byte, and changes nothing."""
        if self._state is not ReceiveState.RECEIVING:
            raise ProtocolViolation(f"session {self.session_id} takes no writes in state {self._state.name}")
        if not layers or layers.start < 0 or layers.stop > len(self._waiting):
            raise ProtocolViolation(f"session {self.session_id}: a write names layers {layers} of {len(self._waiting)}")
        table = spans_of(spans)
        for layer in layers:
            refused = self._take(layer, table)
            if refused is not None:
                fault = self._describe_refusal(layer, refused)
                self._put_back(range(layers.start, layer), table)
                raise ProtocolViolation(fault)
        self._num_landing += 1

    def landed(self) -> None:
        """An admitted write is in the region."""
        assert self._num_landing > 0, "only an admitted write can land"
        self._num_landing -= 1

    def damaged(self, layers: range, spans: Sequence[Span]) -> None:
        """An admitted write will not land: its bytes are missing again, in whatever state."""
        assert self._num_landing > 0, "only an admitted write can come damaged"
        self._num_landing -= 1
        self._put_back(layers, spans_of(spans))

    def commit(self) -> tuple[Missing, ...]:
        """The sender says that it sent everything. Empty: so it is, and the session is COMMITTED. Else what to ask for
        again; the state stays as it is.

        Raises Corrupted when it was asked for often enough, or ProtocolViolation, and changes nothing.
        """
        self._require(ReceiveState.COMMITTED)
        if self._num_landing:
            raise ProtocolViolation(f"session {self.session_id}: a commit overtook {self._num_landing} writes")
        missing = [self._required(layer, waiting) for layer, waiting in enumerate(self._waiting)]
        if not any(missing):
            self._move(ReceiveState.COMMITTED)
            return ()
        if self._num_resends == MAX_RESENDS:
            num_bytes = sum(ranges.num_bytes for ranges in missing)
            raise Corrupted(
                f"session {self.session_id}: {num_bytes} bytes never arrived whole, sent {MAX_RESENDS + 1} times"
            )
        self._num_resends += 1
        return missing_spans(missing, MAX_RESEND_SPANS)

    def abort(self, error: TransferError) -> None:
        """Given up here: released at once if no peer has begun, else quarantined. Nothing more is admitted."""
        self._move(ReceiveState.RELEASED if self._state is ReceiveState.ISSUED else ReceiveState.QUARANTINED)
        self._error = error

    def stopped(self, error: TransferError) -> None:
        """Nothing can land any more: the sender said so, or the link is gone. An abort before it stays the reason."""
        self._move(ReceiveState.RELEASED)
        self._error = self._error or error

    def _required(self, layer: int, waiting: ByteRanges) -> ByteRanges:
        """What of ``waiting`` must still come."""
        if not waiting:
            return waiting
        required = waiting.copy()
        for start, end in self._expected.spare(layer):
            required.discard(start, end)
        return required

    def _take(self, layer: int, spans: Spans) -> Span | None:
        """Wait for these bytes no more. The first span that may not be taken, and then none is; None: all were."""
        waiting = self._waiting[layer]
        known = self._taken.get((id(waiting), id(spans)))  # which keeps both, so that nothing else gets their ids
        if known is not None:
            self._waiting[layer], self._is_shared[layer] = known[2], True
            return None
        if len(spans) >= _LONG_TABLE:
            starts = spans.rows[:, 0]
            remembered = waiting.without(starts, starts + spans.rows[:, 1])
            if remembered is not None:
                if len(self._taken) == _MAX_TAKEN:
                    self._taken.clear()
                self._taken[id(waiting), id(spans)] = (waiting, spans, remembered)
                self._waiting[layer], self._is_shared[layer] = remembered, True
                return None
            # else one of them may not be taken: which?
        left = waiting.copy() if self._is_shared[layer] else waiting
        runs = spans.rows.tolist()
        for index, (offset, num_bytes) in enumerate(runs):
            if not left.take(offset, offset + num_bytes):
                if left is waiting:
                    _put(left, runs[:index])
                return Span(offset, num_bytes)
        self._waiting[layer], self._is_shared[layer] = left, False
        return None

    def _put_back(self, layers: range, spans: Spans) -> None:
        runs = spans.rows.tolist()
        for layer in layers:
            if self._is_shared[layer]:
                self._waiting[layer], self._is_shared[layer] = self._waiting[layer].copy(), False
            _put(self._waiting[layer], runs)

    def _describe_refusal(self, layer: int, span: Span) -> str:
        granted = self._expected.allowed()[layer].copy()
        fault = "twice" if granted.take(span.offset, span.offset + span.num_bytes) else "outside the grant"
        where = f"{span.num_bytes} bytes at {span.offset} of layer {layer}"
        return f"session {self.session_id}: {where} are written {fault}"

    def _require(self, to: ReceiveState) -> None:
        if to not in RECEIVE_MOVES[self._state]:
            raise ProtocolViolation(f"session {self.session_id} cannot go from {self._state.name} to {to.name}")

    def _move(self, to: ReceiveState) -> None:
        self._require(to)
        self._state = to


def _put(ranges: ByteRanges, runs: Iterable[tuple[int, int]]) -> None:
    for offset, num_bytes in runs:
        ranges.put(offset, offset + num_bytes)
