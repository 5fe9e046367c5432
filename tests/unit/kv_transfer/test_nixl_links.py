from __future__ import annotations

import random

import pytest

from core.errors import ProtocolViolation
from kv_transfer.nixl_links import MAX_NOTES_WAITING, Inbox
from kv_transfer.nixl_notes import Note, NoteKind, Role


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
