"""What do the two ends of a link over NIXL do? Everything of them that needs no NIXL: order, slots, events, endings.

The life of a write: a session queues it in the link's Outbox -> the sending end's writer thread takes it in its turn,
with as many more as are queued and fit, gathers them into a slot of its ring (from here on the pool's pages are free:
``written``) and has the carrier write the slot into the peer's slot of that number, with a SLOT note behind it -> the
receiving end's reader thread takes the notes in the order of their numbers; of each write in the slot it checks the
checksum, asks ``admit``, scatters the bytes into the pages, tells ``landed``, and gives the slot back (CREDIT).

So while one slot is gathered another is on its way and a third is being scattered; a peer can write only into a ring,
never into pages; and what is on the way is bounded by the slots. On a device, copies to and from the ring are only
begun: while one runs, the thread begins the next, if that is at hand, and then waits for the first. Rules:

- Every note but keep-alives has a number, and each end takes its peer's in that order: messages overtake nothing.
- Each end has a reader and a writer thread. Whatever ends one ends the other; the last of them reports ``lost``.
- Whatever the peer says, a slot is only read while it is the receiving end's to read.
- A message goes, or is told, behind the copies that were begun before it; a thread ends behind all that it began.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Condition, Lock, Thread, current_thread
from typing import ClassVar, Protocol

import xxhash

from core.clock import Clock
from core.errors import PeerLost, ProtocolViolation, TransferError
from core.request import SessionId
from kv_transfer.nixl_notes import (
    NUMBERED,
    Note,
    NoteKind,
    Parcel,
    RingPlace,
    Role,
    pack_credit,
    pack_note,
    pack_number,
    pack_slot,
    parse_credit,
    parse_message,
    parse_number,
    parse_slot,
)
from kv_transfer.outbox import Barrier, Notice, Outbox, Taker
from kv_transfer.spans import SentTables, Spans, SpanTables
from kv_transfer.staging import Ring, Slots, Wait, pieces_of
from kv_transfer.transport import ANONYMOUS, LinkStats, PeerIdentity, ReceiveEvents, SendEvents, Write

logger = logging.getLogger(__name__)

Item = Write | Notice | Barrier  # what an Outbox gives

MAX_NOTES_WAITING = 1 << 16
_IDLE_S = 3600.0  # the carrier keeps links alive: a writer has nothing to do while nothing is queued


class Carrier(Protocol):
    """Who brings notes and slots to the peer, on a thread of its own. Every method only queues."""

    @property
    def clock(self) -> Clock: ...

    def send(self, end: LinkEnd, note: bytes) -> None: ...

    def post(self, end: SendEnd, slot: int, num_bytes: int, note: bytes) -> None:
        """Write the slot's first ``num_bytes`` bytes into the peer's slot of that number, and the note behind them."""
        ...

    def ended(self, end: LinkEnd) -> None:
        """The end's last event was called."""
        ...

    def count(self, *, bad_frames: int = 0, writes_refused: int = 0, writes_damaged: int = 0) -> None: ...


class Inbox:
    """A peer's numbered notes, taken in the order of their numbers."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._waiting: dict[int, Note | None] = {}  # None: it was acted on when it arrived
        self._next = 0
        self._num_announced = 0  # how many the peer has sent, as far as we know
        self._missing: tuple[int, float] | None = None  # the number that is awaited, since when
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, number: int, note: Note | None) -> bool:
        """``note`` None: it needs nobody who takes it, and is only counted.

        False: it came before, and is dropped. Raises ProtocolViolation when too many wait.
        """
        with self._changed:
            if self._closed:
                return True
            if number < self._next or number in self._waiting:
                return False
            if len(self._waiting) >= MAX_NOTES_WAITING or number >= self._next + MAX_NOTES_WAITING:
                raise ProtocolViolation(f"note {number} is too far ahead of {self._next}")
            self._waiting[number] = note
            self._num_announced = max(self._num_announced, number + 1)
            self._pass_over()
            if self._next in self._waiting:
                self._changed.notify()
            return True

    def take(self, timeout_s: float | None = None) -> Note | None:
        """The next note, waiting for it; None if it did not come in time, or when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._next in self._waiting, timeout_s)
            if self._closed or self._next not in self._waiting:
                return None
            note = self._waiting.pop(self._next)
            self._next += 1
            self._pass_over()
            return note

    def _pass_over(self) -> None:
        """With the lock held: nobody takes what was acted on when it arrived."""
        while self._next in self._waiting and self._waiting[self._next] is None:
            del self._waiting[self._next]
            self._next += 1

    def announce(self, num_sent: int) -> None:
        """The peer says that it has sent so many."""
        self._num_announced = max(self._num_announced, num_sent)

    def missing_for(self, now: float) -> float:
        """For how many seconds a note has been missing that the peer sent."""
        with self._changed:
            number = self._next
            if number >= self._num_announced or number in self._waiting:
                self._missing = None
                return 0.0
            if self._missing is None or self._missing[0] != number:
                self._missing = (number, now)
            return now - self._missing[1]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify()


class LinkEnd(ABC):
    """What both ends share: an outbox, an inbox, two threads, and one way to end."""

    role: ClassVar[Role]  # which end this is
    peer_role: ClassVar[Role]
    at_once: ClassVar[frozenset[NoteKind]] = frozenset()  # acted on when they arrive; earlier ones may be missing

    def __init__(self, carrier: Carrier, link_id: bytes, agent: str) -> None:
        """``agent``: NIXL's name of the peer."""
        self.link_id = link_id
        self.agent = agent
        self.identity: PeerIdentity = ANONYMOUS
        self.ring: Ring | None = None
        self.sent_at = self.made_at = carrier.clock.now()
        self.peer_is_done = False  # it said BYE: nothing of it is under way any more
        self._heard_at = self.sent_at
        self._carrier = carrier
        self._outbox = Outbox(carrier.clock)
        self._taker = Taker(control=True)
        self._inbox = Inbox()
        self._numbering = Lock()
        self._num_sent = 0
        self._lock = Lock()
        self._error: TransferError | None = None
        self._sending: Callable[[], None] | None = None  # the rest of what the writer's thread began; its own
        self._taking: Callable[[], None] | None = None  # likewise the reader's
        self._threads: list[Thread] = []
        self._num_running = 0

    # ---- Link ----

    @property
    def peer(self) -> str:
        return f"{self.identity.worker_id or 'a worker'} ({self.agent})"

    @property
    def heard_at(self) -> float:
        return self._heard_at

    def notify(self, session_id: SessionId, message: bytes) -> None:
        self._outbox.put(session_id, message)

    def close(self, error: TransferError) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self._outbox.close()
        self._inbox.close()

    # ---- for the carrier, on its thread ----

    @property
    def error(self) -> TransferError | None:
        """Why it ends; None: it lives."""
        return self._error

    def heard(self, note: Note) -> None:
        """A note for this end came. Raises ProtocolViolation for one that cannot be."""
        self._heard_at = self._carrier.clock.now()
        self.peer_is_done = self.peer_is_done or note.kind is NoteKind.BYE
        if note.kind in NUMBERED:
            at_once = note.kind in self.at_once
            if self._inbox.put(parse_number(note.body), None if at_once else note):
                if at_once:
                    self._take_at_once(note)
            else:
                self._carrier.count(bad_frames=1)
                logger.warning("kv link with %s: a note came twice and was dropped", self.peer)
        elif note.kind is NoteKind.ALIVE:
            self._inbox.announce(parse_number(note.body))
        else:
            raise ProtocolViolation(f"a second {note.kind.name}")

    def alive_note(self) -> bytes:
        return pack_note(NoteKind.ALIVE, self.peer_role, self.link_id, pack_number(self._num_sent))

    def bye_note(self) -> bytes:
        """The last note of an end that has ended."""
        return self._pack(NoteKind.BYE, lambda number: pack_number(number, str(self._error).encode()[:1000]))

    def silence(self, now: float) -> float:
        """For how many seconds the peer was not heard, or something that it sent has been missing."""
        return max(now - self._heard_at, self._inbox.missing_for(now))

    def join(self) -> None:
        for thread in self._threads:
            if thread is not current_thread():
                thread.join()

    # ---- threads ----

    def _spawn(self, body: Callable[[], None], name: str) -> None:
        thread = Thread(target=self._guard, args=(body,), name=name, daemon=True)
        with self._lock:
            if self._threads and not self._num_running:
                return  # it ended meanwhile
            self._num_running += 1
            self._threads.append(thread)
            thread.start()

    def _guard(self, body: Callable[[], None]) -> None:
        try:
            body()
        except ProtocolViolation as error:
            self._carrier.count(bad_frames=1)
            logger.warning("kv link with %s closed: %s", self.peer, error)
            self.close(error)
        except TransferError as error:
            self.close(error)
        finally:
            self.close(PeerLost(f"the link with {self.peer} has ended"))
            self._thread_ended()

    def _thread_ended(self) -> None:
        with self._lock:
            self._num_running -= 1
            last, error = self._num_running == 0, self._error
        if not last:
            return
        assert error is not None, "a thread ends only when the end is closed"
        try:
            self._report_lost(error)
        finally:
            self._carrier.ended(self)

    def _write_loop(self) -> None:
        try:
            while not self._outbox.closed:
                item = self._outbox.take(self._taker, 0.0)
                if item is None:
                    self._finish_sending()
                    item = self._outbox.take(self._taker, _IDLE_S)
                while item is not None:
                    item = self._send_item(item)
        finally:
            self._finish_sending()

    def _send_item(self, item: Item) -> Item | None:
        """Send it; return what was taken behind it but not sent yet."""
        assert isinstance(item, Notice), "one taker gets no barriers, and only the sending end is given writes"
        self._send(NoteKind.MESSAGE, lambda number: pack_number(number, item.message))
        return None

    def _finish_sending(self) -> None:
        """On the writer's thread: send what was only begun."""
        finish, self._sending = self._sending, None
        if finish is not None:
            finish()

    def _read_loop(self) -> None:
        try:
            while not self._inbox.closed:
                note = self._inbox.take(0.0)
                if note is None:
                    self._finish_taking()
                    note = self._inbox.take()
                if note is not None and note.kind is NoteKind.BYE:
                    reason = parse_message(note.body).decode(errors="replace")
                    raise PeerLost(f"{self.peer} ended the link: {reason}")
                if note is not None:
                    self._take(note)
        finally:
            self._finish_taking()

    def _finish_taking(self) -> None:
        """On the reader's thread: take to its end what was only begun."""
        finish, self._taking = self._taking, None
        if finish is not None:
            finish()

    def _pack(self, kind: NoteKind, body: Callable[[int], bytes]) -> bytes:
        number = self._num_sent
        self._num_sent += 1
        return pack_note(kind, self.peer_role, self.link_id, body(number))

    def _send(self, kind: NoteKind, body: Callable[[int], bytes]) -> None:
        with self._numbering:
            self._carrier.send(self, self._pack(kind, body))

    def _take_at_once(self, note: Note) -> None:
        """A note of ``at_once`` came, the first of its number. On the carrier's thread."""
        raise AssertionError(f"{note.kind.name} is taken in its turn")

    @abstractmethod
    def _take(self, note: Note) -> None: ...

    @abstractmethod
    def _report_lost(self, error: TransferError) -> None: ...


class SendEnd(LinkEnd):
    """The end that writes."""

    role = Role.SENDS_PAGES
    peer_role = Role.RECEIVES_PAGES
    at_once = frozenset({NoteKind.CREDIT})  # a slot is free whatever else the peer said before

    def __init__(self, carrier: Carrier, link_id: bytes, agent: str, events: SendEvents) -> None:
        super().__init__(carrier, link_id, agent)
        self._events = events
        self._slots = Slots(0)  # none before the peer's WELCOME
        self._slot_bytes = 0
        self._checked = False
        self._tables = SentTables()
        self.theirs: RingPlace | None = None
        self.bytes_sent = 0
        self.path = "ucx"  # what carries the bytes, once it is known

    def start(self) -> None:
        """Take what the peer says; nothing is sent before ``opened``."""
        self._spawn(self._read_loop, "kv-nixl-reader")

    def opened(self, ring: Ring, theirs: RingPlace, identity: PeerIdentity, *, checked: bool) -> None:
        """The peer's ring is known. ``checked``: send checksums, where the host can read the ring."""
        self.ring = ring
        self.theirs = theirs
        self.identity = identity
        self._slot_bytes = min(ring.slot_bytes, theirs.slot_bytes)
        self._checked = checked and ring.device is None
        with self._lock:
            self._slots = Slots(min(ring.num_slots, theirs.num_slots))
        if self._error is not None:
            self._slots.close()
        self._spawn(self._write_loop, "kv-nixl-writer")

    def write(self, write: Write) -> None:
        assert not write.codec, "nixl carries raw bytes"
        self._outbox.put(write.session_id, write)

    def cancel(self, session_id: SessionId) -> bool:
        return self._outbox.cancel(session_id)

    def close(self, error: TransferError) -> None:
        super().close(error)
        with self._lock:
            self._slots.close()

    def stats(self) -> LinkStats:
        return LinkStats(
            peer=self.identity,
            path=self.path,
            connections=1,
            bytes_sent=self.bytes_sent,
            busy_s=self._outbox.busy_s,
            bytes_queued=self._outbox.bytes_queued,
            checksum="xxh3" if self._checked else "none",
        )

    def _send_item(self, item: Item) -> Item | None:
        if not isinstance(item, Write):
            self._finish_sending()
            return super()._send_item(item)
        if item.num_bytes > self._slot_bytes:
            pieces = list(pieces_of(item, self._slot_bytes))
            for piece in pieces:
                self._send_slot((piece,), (item,) if piece is pieces[-1] else ())
            return None
        batch, behind = self._batch(item, self._slot_bytes)
        self._send_slot(batch, batch)
        return behind

    def _batch(self, first: Write, max_bytes: int) -> tuple[list[Write], Item | None]:
        """``first`` and what is queued behind it, up to ``max_bytes``; and what was taken but is not of the batch."""
        batch, num_bytes = [first], first.num_bytes
        while (item := self._outbox.take(self._taker, 0.0)) is not None:
            if not isinstance(item, Write) or num_bytes + item.num_bytes > max_bytes:
                return batch, item
            batch.append(item)
            num_bytes += item.num_bytes
        return batch, None

    def _send_slot(self, writes: Sequence[Write], whole: Sequence[Write]) -> None:
        """Begin to gather ``writes``, with which the queued writes ``whole`` end, and send the slot before them."""
        assert self.ring is not None, "the writer starts when the ring is known"
        slot = self._slots.take(0.0)
        if slot is None:
            self._finish_sending()
            slot = self._slots.take()
        if slot is None:
            return  # the link was closed while it waited
        wait = self.ring.gather(slot, writes)
        self._finish_sending()
        self._sending = partial(self._post, self.ring, slot, writes, whole, wait)
        if self._slots.num_held == 1:
            self._finish_sending()  # nothing is on its way: the wire need not wait for what comes next

    def _post(self, ring: Ring, slot: int, writes: Sequence[Write], whole: Sequence[Write], wait: Wait) -> None:
        """Send the slot once its bytes are there."""
        wait()
        parcels = tuple(self._parcels(ring, slot, writes))
        num_bytes = sum(write.num_bytes for write in writes)
        with self._numbering:
            note = self._pack(NoteKind.SLOT, lambda number: pack_slot(number, slot, parcels))
            self._carrier.post(self, slot, num_bytes, note)
        for write in whole:
            self._written(write)

    def _parcels(self, ring: Ring, slot: int, writes: Sequence[Write]) -> Iterator[Parcel]:
        at = 0
        for write in writes:
            payload = ring.payload(slot, at, write.num_bytes) if self._checked else None
            checksum = None if payload is None else xxhash.xxh3_64_intdigest(payload)
            yield Parcel(write.token, write.layers, self._tables.of(write.table), checksum)
            at += write.num_bytes

    def _written(self, write: Write) -> None:
        drained = self._outbox.done(write)
        self._events.written(self, write)
        if drained:
            self._events.drained(self, write.session_id)

    def _take_at_once(self, note: Note) -> None:
        if not self._slots.give_back(parse_credit(note.body)):
            raise ProtocolViolation("a CREDIT for a slot that was not lent")

    def _take(self, note: Note) -> None:
        match note.kind:
            case NoteKind.MESSAGE:
                self._events.notified(self, parse_message(note.body))
            case other:
                raise ProtocolViolation(f"a receiving end does not send {other.name}")

    def _report_lost(self, error: TransferError) -> None:
        self._events.lost(self, error)


class ReceiveEnd(LinkEnd):
    """The end that is written to."""

    role = Role.RECEIVES_PAGES
    peer_role = Role.SENDS_PAGES

    def __init__(
        self, carrier: Carrier, link_id: bytes, agent: str, events: ReceiveEvents, ring: Ring, identity: PeerIdentity
    ) -> None:
        super().__init__(carrier, link_id, agent)
        self._events = events
        self.identity = identity
        self.ring: Ring = ring
        self._lent = set(range(ring.num_slots))  # slots into which the peer may write
        self._tables = SpanTables()

    def start(self) -> None:
        self._spawn(self._read_loop, "kv-nixl-reader")
        self._spawn(self._write_loop, "kv-nixl-writer")

    def _take(self, note: Note) -> None:
        match note.kind:
            case NoteKind.MESSAGE:
                self._finish_taking()
                self._events.notified(self, parse_message(note.body))
            case NoteKind.SLOT:
                self._take_slot(note)
            case other:
                raise ProtocolViolation(f"a sending end does not send {other.name}")

    def _take_slot(self, note: Note) -> None:
        full = parse_slot(note.body, self._tables.parse)
        if full.slot not in self._lent:
            raise ProtocolViolation(f"slot {full.slot} was not lent")
        if sum(parcel.num_bytes for parcel in full.parcels) > self.ring.slot_bytes:
            raise ProtocolViolation(f"more than the {self.ring.slot_bytes} bytes of a slot")
        self._lent.discard(full.slot)
        landing, wait = self._scatter(full.slot, full.parcels)
        self._finish_taking()
        self._taking = partial(self._give_back, full.slot, landing, wait)

    def _scatter(self, slot: int, parcels: tuple[Parcel, ...]) -> tuple[Sequence[tuple[SessionId, Parcel]], Wait]:
        """Begin to put what may land into the pool."""
        at = 0
        landing: list[tuple[SessionId, Parcel]] = []
        parts: list[tuple[int, range, Spans]] = []
        for parcel in parcels:
            session_id = self._events.admit(self, parcel.token, parcel.layers, parcel.spans)
            if session_id is None:
                self._carrier.count(writes_refused=1)
            elif not self._is_whole(slot, at, parcel):
                self._carrier.count(writes_damaged=1)
                self._events.damaged(self, session_id, parcel.layers, parcel.spans)
            else:
                landing.append((session_id, parcel))
                parts.append((at, parcel.layers, parcel.spans))
            at += parcel.num_bytes
        return landing, self.ring.scatter(slot, parts)

    def _give_back(self, slot: int, landing: Sequence[tuple[SessionId, Parcel]], wait: Wait) -> None:
        """Tell what landed, and let the peer have the slot."""
        wait()
        for session_id, parcel in landing:
            self._events.landed(self, session_id, parcel.layers, parcel.spans)
        self._lent.add(slot)
        self._send(NoteKind.CREDIT, lambda number: pack_credit(number, slot))

    def _is_whole(self, slot: int, at: int, parcel: Parcel) -> bool:
        payload = None if parcel.checksum is None else self.ring.payload(slot, at, parcel.num_bytes)
        return payload is None or xxhash.xxh3_64_intdigest(payload) == parcel.checksum

    def _report_lost(self, error: TransferError) -> None:
        self._events.lost(self, error)
