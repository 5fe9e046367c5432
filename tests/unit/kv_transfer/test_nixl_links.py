from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from core.clock import WallClock
from core.errors import PeerLost, ProtocolViolation
from core.request import SessionId
from kv_transfer.nixl_links import MAX_NOTES_WAITING, Inbox, LinkEnd, ReceiveEnd, SendEnd
from kv_transfer.nixl_notes import (
    Memory,
    Note,
    NoteKind,
    Parcel,
    RingPlace,
    Role,
    pack_credit,
    pack_number,
    pack_slot,
    parse_note,
)
from kv_transfer.spans import Spans
from kv_transfer.transport import ANONYMOUS, Span, Strip, Write

A = SessionId("a")
SLOT_BYTES = 64


def note(number: int) -> Note:
    return Note(NoteKind.MESSAGE, Role.SENDS_PAGES, bytes(16), b"%d" % number)


def take(inbox: Inbox) -> Note | None:
    first = inbox.first
    if first is not None:
        inbox.pop()
    return first


def test_notes_are_taken_in_the_order_of_their_numbers_whatever_order_they_came_in() -> None:
    inbox = Inbox()
    numbers = list(range(50))
    random.Random(1).shuffle(numbers)
    assert all(inbox.put(number, note(number)) for number in numbers)
    assert [take(inbox) for _ in range(50)] == [note(number) for number in range(50)]


def test_a_note_that_comes_twice_is_dropped() -> None:
    inbox = Inbox()
    assert inbox.put(0, note(0))
    assert not inbox.put(0, note(0))
    assert take(inbox) == note(0)
    assert not inbox.put(0, note(0))


def test_a_note_from_far_ahead_is_nonsense() -> None:
    inbox = Inbox()
    with pytest.raises(ProtocolViolation, match="too far ahead"):
        inbox.put(MAX_NOTES_WAITING, note(0))


def test_a_missing_note_is_noticed_by_what_came_behind_it_or_by_what_the_peer_says_it_sent() -> None:
    inbox = Inbox()
    assert inbox.missing_for(10.0) == 0.0
    inbox.put(1, note(1))
    assert (inbox.missing_for(11.0), inbox.missing_for(13.0)) == (0.0, 2.0)
    inbox.put(0, note(0))
    assert inbox.missing_for(14.0) == 0.0
    assert [take(inbox), take(inbox)] == [note(0), note(1)]
    inbox.announce(3)
    assert (inbox.missing_for(15.0), inbox.missing_for(16.5)) == (0.0, 1.5)


# ---- ends, whose copies take until they are told that they are done ----


class SlowCopy:
    """A copy on a device."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


class SlowRing:
    """Two slots. ``begun``: what was copied, in order, with its copy."""

    num_slots, slot_bytes, address = 2, SLOT_BYTES, 0
    device: int | None = 0

    def __init__(self) -> None:
        self.begun: list[tuple[object, SlowCopy]] = []

    def gather(self, slot: int, writes: Sequence[Write]) -> SlowCopy:
        return self._begin([write.first_layer for write in writes])

    def scatter(self, slot: int, parts: Sequence[tuple[int, range, Sequence[Span]]]) -> SlowCopy:
        return self._begin([layers.start for _, layers, _ in parts])

    def payload(self, slot: int, offset: int, num_bytes: int) -> None:
        return None

    def _begin(self, layers: object) -> SlowCopy:
        copy = SlowCopy()
        self.begun.append((layers, copy))
        return copy


class Hearing:
    """A Carrier, and both ends' events: remembers what it is told."""

    def __init__(self) -> None:
        self.clock = WallClock()
        self.told: list[tuple[object, ...]] = []
        self.fails = False

    def wake(self) -> None: ...

    def send(self, end: LinkEnd, packed: bytes) -> bool:
        self.told.append((parse_note(packed).kind.name,))
        return True

    def post(self, end: SendEnd, slot: int, num_bytes: int, packed: bytes) -> None:
        if end.error is None:
            self.told.append(("posted", slot, num_bytes))

    def ended(self, end: LinkEnd) -> None:
        self.told.append(("ended",))

    def count(self, **more: int) -> None: ...

    def admit(self, link: Any, token: bytes, layers: range, spans: Sequence[Span]) -> SessionId:
        return A

    def landed(self, link: Any, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        self.told.append(("landed", layers.start))

    def damaged(self, *what: Any) -> None:
        raise AssertionError("nothing is damaged here")

    def written(self, link: Any, write: Write) -> None:
        self.told.append(("written", write.first_layer))

    def drained(self, link: Any, session_id: SessionId) -> None:
        self.told.append(("drained",))

    def notified(self, link: Any, message: bytes) -> None:
        self.told.append(("notified", message))
        if self.fails:
            raise ValueError("a bug")

    def lost(self, link: Any, error: Exception) -> None:
        self.told.append(("lost", str(error)))


def sending() -> tuple[SendEnd, SlowRing, Hearing]:
    ring, hearing = SlowRing(), Hearing()
    end = SendEnd(hearing, bytes(16), "peer", hearing)
    end.opened(ring, RingPlace(2, SLOT_BYTES, 0, 0, Memory.DEVICE, b""), ANONYMOUS, checked=True)
    return end, ring, hearing


def receiving() -> tuple[ReceiveEnd, SlowRing, Hearing]:
    ring, hearing = SlowRing(), Hearing()
    return ReceiveEnd(hearing, bytes(16), "peer", hearing, ring, ANONYMOUS), ring, hearing


def write(layer: int, num_bytes: int = SLOT_BYTES) -> Write:
    return Write(A, bytes(16), layer, 1, (Strip(0, 0, num_bytes),))


def settle(end: LinkEnd) -> None:
    while end.step():
        pass


def hear(end: LinkEnd, kind: NoteKind, body: bytes) -> None:
    end.heard(Note(kind, end.role, bytes(16), body))


def hear_slot(end: LinkEnd, number: int, slot: int, layer: int) -> None:
    parcel = Parcel(bytes(16), range(layer, layer + 1), Spans([Span(0, SLOT_BYTES)]), None)
    hear(end, NoteKind.SLOT, pack_slot(number, slot, [parcel]))


def test_a_slot_is_posted_and_its_writes_are_written_when_its_bytes_are_there() -> None:
    end, ring, hearing = sending()
    for layer in range(4):
        end.write(write(layer, SLOT_BYTES // 2))
    end.notify(A, b"all")
    settle(end)
    assert [layers for layers, _ in ring.begun] == [[0, 1], [2, 3]]
    assert hearing.told == []
    ring.begun[1][1].done = True  # they are finished in the order in which they were begun
    settle(end)
    assert hearing.told == []
    ring.begun[0][1].done = True
    settle(end)
    posted = [("posted", 0, 64), ("written", 0), ("written", 1), ("posted", 1, 64), ("written", 2), ("written", 3)]
    assert hearing.told == [*posted, ("MESSAGE",)]


def test_a_write_waits_for_a_slot_and_a_message_for_the_write_before_it() -> None:
    end, ring, hearing = sending()
    for layer in range(3):
        end.write(write(layer))
    end.notify(A, b"all")
    settle(end)
    for _, copy in ring.begun:
        copy.done = True
    settle(end)
    assert hearing.told == [("posted", 0, 64), ("written", 0), ("posted", 1, 64), ("written", 1)]
    hear(end, NoteKind.CREDIT, pack_credit(0, 1))
    settle(end)
    ring.begun[2][1].done = True
    settle(end)
    assert hearing.told[4:] == [("posted", 1, 64), ("written", 2), ("MESSAGE",)]


def test_a_write_larger_than_a_slot_is_written_with_its_last_piece() -> None:
    end, ring, hearing = sending()
    end.write(write(7, SLOT_BYTES + 1))
    settle(end)
    for _, copy in ring.begun:
        copy.done = True
    settle(end)
    assert hearing.told == [("posted", 0, 64), ("posted", 1, 1), ("written", 7)]


def test_a_closed_end_is_lost_behind_the_copies_that_it_began() -> None:
    end, ring, hearing = sending()
    end.write(write(0))
    settle(end)
    end.close(PeerLost("enough"))
    settle(end)
    assert hearing.told == []
    ring.begun[0][1].done = True
    settle(end)
    assert hearing.told == [("written", 0), ("lost", "enough"), ("ended",)]


def test_who_stops_an_end_waits_for_its_copies() -> None:
    end, _, hearing = sending()
    end.write(write(0))
    settle(end)
    end.close(PeerLost("enough"))
    end.stop()
    assert hearing.told == [("written", 0), ("lost", "enough"), ("ended",)]


def test_a_credit_for_a_slot_that_was_not_lent_closes_the_link() -> None:
    end, _, hearing = sending()
    hear(end, NoteKind.CREDIT, pack_credit(0, 0))
    settle(end)
    assert hearing.told == [("lost", "a CREDIT for a slot that was not lent"), ("ended",)]


def test_what_lands_is_told_when_it_is_there_and_a_message_behind_it() -> None:
    end, ring, hearing = receiving()
    hear_slot(end, 0, 0, 3)
    hear_slot(end, 1, 1, 4)
    hear(end, NoteKind.MESSAGE, pack_number(2, b"all"))
    settle(end)
    assert [layers for layers, _ in ring.begun] == [[3], [4]]
    assert hearing.told == []
    for _, copy in ring.begun:
        copy.done = True
    settle(end)
    assert hearing.told == [("landed", 3), ("CREDIT",), ("landed", 4), ("CREDIT",), ("notified", b"all")]


def test_a_farewell_is_taken_behind_what_came_before_it() -> None:
    end, ring, hearing = receiving()
    hear_slot(end, 0, 0, 3)
    hear(end, NoteKind.BYE, pack_number(1, b"done"))
    settle(end)
    assert hearing.told == []
    ring.begun[0][1].done = True
    settle(end)
    assert hearing.told == [("landed", 3), ("CREDIT",), ("lost", "a worker (peer) ended the link: done"), ("ended",)]


def test_a_slot_that_is_being_emptied_is_not_the_peers() -> None:
    end, ring, hearing = receiving()
    hear_slot(end, 0, 0, 3)
    hear_slot(end, 1, 0, 4)
    settle(end)
    assert len(ring.begun) == 1
    ring.begun[0][1].done = True
    settle(end)
    assert hearing.told == [("landed", 3), ("CREDIT",), ("lost", "slot 0 was not lent"), ("ended",)]


def test_a_bug_of_who_is_told_ends_this_link_alone() -> None:
    end, _, hearing = receiving()
    hearing.fails = True
    hear(end, NoteKind.MESSAGE, pack_number(0, b"all"))
    settle(end)
    assert hearing.told == [("notified", b"all"), ("lost", "the link with a worker (peer) has ended"), ("ended",)]
