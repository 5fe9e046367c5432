from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Incompatible, ProtocolViolation
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, WorkerId
from kv_transfer.nixl_notes import (
    FullSlot,
    Hello,
    Memory,
    Note,
    NoteKind,
    Parcel,
    RingPlace,
    Role,
    Welcome,
    pack_credit,
    pack_hello,
    pack_note,
    pack_number,
    pack_slot,
    pack_welcome,
    parse_credit,
    parse_hello,
    parse_message,
    parse_note,
    parse_number,
    parse_slot,
    parse_welcome,
)
from kv_transfer.run_table import MAX_OFFSET
from kv_transfer.spans import Spans
from kv_transfer.transport import PeerIdentity, Span

KEY, LINK = bytes(range(16)), bytes(range(16, 32))

texts = st.text(max_size=20)
fingerprints = st.builds(CacheFingerprint, texts, texts, texts, st.integers(0, 2**32 - 1), texts)
identities = st.builds(lambda w, c: PeerIdentity(WorkerId(w), ClusterId(c)), texts, texts)
spans = st.builds(Span, st.integers(0, MAX_OFFSET), st.integers(1, 2**32 - 1))
parcels = st.builds(
    lambda token, first, count, them, checksum: Parcel(token, range(first, first + count), Spans(them), checksum),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**16 - 1),
    st.integers(1, 2**16 - 1),
    st.lists(spans, min_size=1, max_size=5),
    st.none() | st.integers(0, 2**64 - 1),
)
places = st.builds(
    RingPlace,
    st.integers(1, 2**16 - 1),
    st.integers(1, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(Memory),
    st.binary(max_size=40),
)


@given(st.sampled_from(NoteKind), st.sampled_from(Role), st.binary(max_size=40))
def test_a_note_comes_back_as_it_was(kind: NoteKind, role: Role, body: bytes) -> None:
    assert parse_note(pack_note(kind, role, LINK, body)) == Note(kind, role, LINK, body)


@given(st.binary(max_size=30), st.data())
def test_a_note_with_one_flipped_bit_is_refused(body: bytes, data: st.DataObject) -> None:
    note = bytearray(pack_note(NoteKind.MESSAGE, Role.SENDS_PAGES, LINK, pack_number(7, body)))
    bit = data.draw(st.integers(0, len(note) * 8 - 1))
    note[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolViolation):
        parse_note(bytes(note))


@given(st.binary(max_size=80))
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        parse_note(data)


@given(st.builds(Hello, fingerprints, identities, st.binary(max_size=40)))
def test_a_hello_comes_back_for_who_knows_the_key_alone(hello: Hello) -> None:
    note = parse_note(pack_hello(hello, LINK, KEY))
    assert parse_hello(note, KEY) == hello
    assert KEY not in note.body
    with pytest.raises(ProtocolViolation, match="access key"):
        parse_hello(note, bytes(16))
    with pytest.raises(ProtocolViolation, match="access key"):
        parse_hello(Note(note.kind, note.role, KEY, note.body), KEY)  # it is for one link


@given(st.builds(Welcome, fingerprints, identities, st.none() | places))
def test_a_welcome_comes_back_as_it_was(welcome: Welcome) -> None:
    assert parse_welcome(parse_note(pack_welcome(welcome, LINK))) == welcome


def test_another_version_is_incompatible_whatever_follows() -> None:
    body = b"\x63\x00 anything"
    with pytest.raises(Incompatible, match="protocol version"):
        parse_hello(Note(NoteKind.HELLO, Role.RECEIVES_PAGES, LINK, body), KEY)
    with pytest.raises(Incompatible, match="protocol version"):
        parse_welcome(Note(NoteKind.WELCOME, Role.SENDS_PAGES, LINK, body))


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1), st.lists(parcels, min_size=1, max_size=4))
def test_a_slot_comes_back_as_it_was(number: int, slot: int, them: list[Parcel]) -> None:
    body = pack_slot(number, slot, them)
    assert parse_number(body) == number
    assert parse_slot(body) == FullSlot(slot, tuple(them))


@given(st.lists(parcels, min_size=1, max_size=3), st.data())
def test_a_slot_that_is_cut_or_has_bytes_left_over_is_refused(them: list[Parcel], data: st.DataObject) -> None:
    body = pack_slot(1, 2, them)
    for wrong in (body[: data.draw(st.integers(0, len(body) - 1))], body + b"\0"):
        with pytest.raises(ProtocolViolation):
            parse_slot(wrong)


@given(st.binary(max_size=120))
def test_parsers_of_bodies_return_or_refuse(body: bytes) -> None:
    note = Note(NoteKind.WELCOME, Role.SENDS_PAGES, LINK, body)
    for parse in (parse_slot, parse_number, parse_credit, lambda _: parse_welcome(note)):
        try:
            parse(body)
        except (ProtocolViolation, Incompatible):
            continue


def test_slots_that_cannot_be_are_refused() -> None:
    good = bytearray(pack_slot(1, 2, [Parcel(KEY, range(1), Spans((Span(0, 4),)), 5)]))
    head = 12  # number, slot, writes
    for offset, value in ((10, 0), (head + 18, 0), (head + 20, 1), (head + 21, 2), (head + 32 + 8, 0)):
        wrong = bytearray(good)
        wrong[offset] = value
        with pytest.raises(ProtocolViolation):
            parse_slot(bytes(wrong))


def test_small_notes_come_back_as_they_were() -> None:
    assert parse_credit(pack_credit(9, 3)) == 3
    body = pack_number(9, b"text")
    assert (parse_number(body), parse_message(body)) == (9, b"text")
    with pytest.raises(ProtocolViolation):
        parse_credit(b"\0")
