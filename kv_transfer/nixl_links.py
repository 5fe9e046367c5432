"""What do the two ends of a link over NIXL do? Everything of them that needs no NIXL: order, slots, events, endings.

The life of a write: a session queues it in the link's Outbox -> the sending end takes it in its turn, with as many more
as are queued and fit, and begins to gather them into a slot of its ring -> the bytes are there (from here on the pool's
pages are free: ``written``), and the carrier writes the slot into the peer's slot of that number, with a SLOT note
behind it -> the receiving end takes the notes in the order of their numbers; for each write in the slot it asks
``admit``, checks the checksum, and begins to scatter the bytes into the pages -> they are there: it tells ``landed``,
and gives the slot back (CREDIT).

So while one slot is gathered another is on its way and a third is being scattered; a peer can write only into a ring,
never into pages; and what is on the way is bounded by the slots. Rules:

- Everything here runs in ``step``, on the carrier's thread, but for what a worker's threads call of a Link, which only
  queues. A step never waits: copies on a device are begun and asked for, as writes are. (With a reader's and a writer's
  thread for each end three threads of a process took the interpreter from each other, 40% of all its work.)
- Every note but keep-alives has a number, and each end takes its peer's in that order: messages overtake nothing.
- A message goes, or is told, behind the copies that were begun before it. An end ends behind all that it began, and
  then reports ``lost``.
- Whatever the peer says, a slot is only read while it is the receiving end's to read.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
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
from kv_transfer.staging import Copy, Ring, Slots, pieces_of
from kv_transfer.transport import ANONYMOUS, LinkStats, PeerIdentity, ReceiveEvents, SendEvents, Write

logger = logging.getLogger(__name__)

Item = Write | Notice | Barrier  # what an Outbox gives

MAX_NOTES_WAITING = 1 << 16
_MAX_GATHERING = 2  # slots of a link: what was taken for a slot has lost its turn to what is more urgent


class Carrier(Protocol):
    """Who brings notes and slots to the peer, and steps the ends, on a thread of its own."""

    @property
    def clock(self) -> Clock: ...

    def wake(self) -> None:
        """From any thread: step the ends soon."""
        ...

    def send(self, end: LinkEnd, note: bytes) -> bool:
        """Within a step. False: the peer is gone, and the end is closed."""
        ...

    def post(self, end: SendEnd, slot: int, num_bytes: int, note: bytes) -> None:
        """Within a step: begin to write the slot's first ``num_bytes`` bytes into the peer's slot of that number, and
        the note behind them. Nothing, if the end is closed."""
        ...

    def ended(self, end: LinkEnd) -> None:
        """Within a step: the end's last event was called."""
        ...

    def count(self, *, bad_frames: int = 0, writes_refused: int = 0, writes_damaged: int = 0) -> None: ...


class Inbox:
    """A peer's numbered notes, taken in the order of their numbers. For one thread."""

    def __init__(self) -> None:
        self._waiting: dict[int, Note] = {}
        self._next = 0
        self._num_announced = 0  # how many the peer has sent, as far as we know
        self._missing: tuple[int, float] | None = None  # the number that is awaited, since when

    def put(self, number: int, note: Note) -> bool:
        """False: it came before, and is dropped. Raises ProtocolViolation when too many wait."""
        if number < self._next or number in self._waiting:
            return False
        if len(self._waiting) >= MAX_NOTES_WAITING or number >= self._next + MAX_NOTES_WAITING:
            raise ProtocolViolation(f"note {number} is too far ahead of {self._next}")
        self._waiting[number] = note
        self._num_announced = max(self._num_announced, number + 1)
        return True

    @property
    def first(self) -> Note | None:
        """The note that is next; None: it has not come."""
        return self._waiting.get(self._next)

    def pop(self) -> None:
        """``first`` was taken."""
        del self._waiting[self._next]
        self._next += 1

    def announce(self, num_sent: int) -> None:
        """The peer says that it has sent so many."""
        self._num_announced = max(self._num_announced, num_sent)

    def missing_for(self, now: float) -> float:
        """For how many seconds a note has been missing that the peer sent."""
        number = self._next
        if number >= self._num_announced or number in self._waiting:
            self._missing = None
            return 0.0
        if self._missing is None or self._missing[0] != number:
            self._missing = (number, now)
        return now - self._missing[1]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A copy between pool and ring, and what follows when its bytes are there."""

    copy: Copy
    then: Callable[[], None]


class LinkEnd(ABC):
    """What both ends share: an outbox, an inbox, copies that were begun, and one way to end."""

    role: ClassVar[Role]  # which end this is
    peer_role: ClassVar[Role]

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
        self._held: Write | Notice | None = None  # taken, and to be sent next
        self._inbox = Inbox()
        self._begun: deque[_Begun] = deque()
        self._num_sent = 0
        self._closing = Lock()
        self._error: TransferError | None = None
        self._has_ended = False

    # ---- Link: from any thread ----

    @property
    def peer(self) -> str:
        return f"{self.identity.worker_id or 'a worker'} ({self.agent})"

    @property
    def heard_at(self) -> float:
        return self._heard_at

    def notify(self, session_id: SessionId, message: bytes) -> None:
        self._outbox.put(session_id, message)
        self._carrier.wake()

    def close(self, error: TransferError) -> None:
        with self._closing:
            if self._error is None:
                self._error = error
        self._outbox.close()
        self._carrier.wake()

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
            if not self._inbox.put(parse_number(note.body), note):
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

    def step(self) -> int:
        """Do whatever can be done now; how much that was. The last step of an end that was closed says ``ended``."""
        try:
            moved = self._finish_copies()
            if self._error is None:
                moved += self._take_notes() + self._send_items()
        except ProtocolViolation as error:
            self._carrier.count(bad_frames=1)
            logger.warning("kv link with %s closed: %s", self.peer, error)
            self.close(error)
            moved = 1
        except TransferError as error:
            self.close(error)
            moved = 1
        except Exception:
            logger.exception("kv link with %s closed by a bug", self.peer)
            self.close(PeerLost(f"the link with {self.peer} has ended"))
            moved = 1
        if self._error is not None and not self._begun and not self._has_ended:
            self._end(self._error)
        return moved

    def stop(self) -> None:
        """The last step of all: nobody will step a closed end again, so wait for what was begun."""
        for begun in self._begun:
            begun.copy.synchronize()
        self.step()
        while self._begun:  # what follows one of them failed
            self.step()

    # ---- within a step ----

    def _end(self, error: TransferError) -> None:
        self._has_ended = True
        try:
            self._report_lost(error)
        except Exception:
            logger.exception("kv link with %s: the end of it was not taken", self.peer)
        finally:
            self._carrier.ended(self)

    def _finish_copies(self) -> int:
        """In the order in which they were begun, as they run on one stream."""
        count = 0
        while self._begun and self._begun[0].copy.query():
            self._begun.popleft().then()
            count += 1
        return count

    def _take_notes(self) -> int:
        count = 0
        while (note := self._inbox.first) is not None and self._error is None:
            if note.kind is NoteKind.BYE and not self._begun:
                reason = parse_message(note.body).decode(errors="replace")
                raise PeerLost(f"{self.peer} ended the link: {reason}")
            if note.kind is NoteKind.BYE or not self._take(note):
                break
            self._inbox.pop()
            count += 1
        return count

    def _send_items(self) -> int:
        count = 0
        while self._error is None:
            item, self._held = self._held or self._next_item(), None
            if item is None:
                break
            if not self._send_item(item):
                self._held = item
                break
            count += 1
            if isinstance(item, Write):
                break  # on a host a slot takes milliseconds: look at NIXL between two
        return count

    def _next_item(self) -> Write | Notice | None:
        item = self._outbox.take(self._taker, 0.0)
        assert not isinstance(item, Barrier), "one taker gets no barriers"
        return item

    def _send_item(self, item: Write | Notice) -> bool:
        """False: it has to wait, and is the next one still."""
        assert isinstance(item, Notice), "only the sending end is given writes"
        self._send(NoteKind.MESSAGE, lambda number: pack_number(number, item.message))
        return True

    def _pack(self, kind: NoteKind, body: Callable[[int], bytes]) -> bytes:
        number = self._num_sent
        self._num_sent += 1
        return pack_note(kind, self.peer_role, self.link_id, body(number))

    def _send(self, kind: NoteKind, body: Callable[[int], bytes]) -> None:
        self._carrier.send(self, self._pack(kind, body))

    @abstractmethod
    def _take(self, note: Note) -> bool:
        """The note is next. False: it has to wait, and is next still."""

    @abstractmethod
    def _report_lost(self, error: TransferError) -> None: ...


class SendEnd(LinkEnd):
    """The end that writes."""

    role = Role.SENDS_PAGES
    peer_role = Role.RECEIVES_PAGES

    def __init__(self, carrier: Carrier, link_id: bytes, agent: str, events: SendEvents) -> None:
        super().__init__(carrier, link_id, agent)
        self._events = events
        self._slots = Slots(0)  # none before the peer's WELCOME
        self._slot_bytes = 0
        self._checked = False
        self._tables = SentTables()
        # What is to fill a slot each, and the queued writes that end with it: of a write larger than a slot.
        self._pieces: deque[tuple[Sequence[Write], Sequence[Write]]] = deque()
        self.theirs: RingPlace | None = None
        self.bytes_sent = 0
        self.path = "ucx"  # what carries the bytes, once it is known

    def opened(self, ring: Ring, theirs: RingPlace, identity: PeerIdentity, *, checked: bool) -> None:
        """The peer's ring is known. ``checked``: send checksums, where the host can read the ring."""
        self.ring = ring
        self.theirs = theirs
        self.identity = identity
        self._slot_bytes = min(ring.slot_bytes, theirs.slot_bytes)
        self._checked = checked and ring.device is None
        self._slots = Slots(min(ring.num_slots, theirs.num_slots))

    def write(self, write: Write) -> None:
        assert not write.codec, "nixl carries raw bytes"
        self._outbox.put(write.session_id, write)
        self._carrier.wake()

    def cancel(self, session_id: SessionId) -> bool:
        return self._outbox.cancel(session_id)

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

    def _send_items(self) -> int:
        return 0 if self.ring is None else super()._send_items()

    def _send_item(self, item: Write | Notice) -> bool:
        if isinstance(item, Notice):
            return not self._begun and super()._send_item(item)
        assert self.ring is not None, "nothing is sent before the ring is known"
        slot = self._slots.take() if len(self._begun) < _MAX_GATHERING else None
        if slot is None:
            return False
        if not self._pieces and item.num_bytes > self._slot_bytes:
            self._pieces.extend(((piece,), ()) for piece in pieces_of(item, self._slot_bytes))
            self._pieces[-1] = (self._pieces[-1][0], (item,))
        if self._pieces:
            writes, whole = self._pieces.popleft()
            self._held = item if self._pieces else None
        else:
            writes = whole = self._batch(item)
        copy = self.ring.gather(slot, writes)
        self._begun.append(_Begun(copy, partial(self._post, self.ring, slot, writes, whole)))
        self._finish_copies()
        return True

    def _batch(self, first: Write) -> Sequence[Write]:
        """``first`` and what is queued behind it, up to a slot."""
        batch, num_bytes = [first], first.num_bytes
        while (item := self._next_item()) is not None:
            if not isinstance(item, Write) or num_bytes + item.num_bytes > self._slot_bytes:
                self._held = item
                break
            batch.append(item)
            num_bytes += item.num_bytes
        return batch

    def _post(self, ring: Ring, slot: int, writes: Sequence[Write], whole: Sequence[Write]) -> None:
        """The slot holds the writes, with which the queued ones of ``whole`` end."""
        parcels = tuple(self._parcels(ring, slot, writes))
        num_bytes = sum(write.num_bytes for write in writes)
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

    def _take(self, note: Note) -> bool:
        match note.kind:
            case NoteKind.MESSAGE:
                self._events.notified(self, parse_message(note.body))
            case NoteKind.CREDIT:
                if not self._slots.give_back(parse_credit(note.body)):
                    raise ProtocolViolation("a CREDIT for a slot that was not lent")
            case other:
                raise ProtocolViolation(f"a receiving end does not send {other.name}")
        return True

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

    def _take(self, note: Note) -> bool:
        match note.kind:
            case NoteKind.MESSAGE:
                if self._begun:
                    return False
                self._events.notified(self, parse_message(note.body))
            case NoteKind.SLOT:
                self._take_slot(note)
                self._finish_copies()
            case other:
                raise ProtocolViolation(f"a sending end does not send {other.name}")
        return True

    def _take_slot(self, note: Note) -> None:
        full = parse_slot(note.body, self._tables.parse)
        if full.slot not in self._lent:
            raise ProtocolViolation(f"slot {full.slot} was not lent")
        if sum(parcel.num_bytes for parcel in full.parcels) > self.ring.slot_bytes:
            raise ProtocolViolation(f"more than the {self.ring.slot_bytes} bytes of a slot")
        self._lent.discard(full.slot)
        at = 0
        landing: list[tuple[SessionId, Parcel]] = []
        parts: list[tuple[int, range, Spans]] = []
        for parcel in full.parcels:
            session_id = self._events.admit(self, parcel.token, parcel.layers, parcel.spans)
            if session_id is None:
                self._carrier.count(writes_refused=1)
            elif not self._is_whole(full.slot, at, parcel):
                self._carrier.count(writes_damaged=1)
                self._events.damaged(self, session_id, parcel.layers, parcel.spans)
            else:
                landing.append((session_id, parcel))
                parts.append((at, parcel.layers, parcel.spans))
            at += parcel.num_bytes
        copy = self.ring.scatter(full.slot, parts)
        self._begun.append(_Begun(copy, partial(self._give_back, full.slot, landing)))

    def _give_back(self, slot: int, landing: Sequence[tuple[SessionId, Parcel]]) -> None:
        """The slot is empty: tell what landed, and let the peer have it."""
        for session_id, parcel in landing:
            self._events.landed(self, session_id, parcel.layers, parcel.spans)
        self._lent.add(slot)
        self._send(NoteKind.CREDIT, lambda number: pack_credit(number, slot))

    def _is_whole(self, slot: int, at: int, parcel: Parcel) -> bool:
        payload = None if parcel.checksum is None else self.ring.payload(slot, at, parcel.num_bytes)
        return payload is None or xxhash.xxh3_64_intdigest(payload) == parcel.checksum

    def _report_lost(self, error: TransferError) -> None:
        self._events.lost(self, error)
