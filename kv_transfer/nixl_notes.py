"""What do the notifications between two NIXL transports mean? The format, without I/O.

    note     = checksum u64 (xxh3 of all that follows) | kind u8 | role u8 | link id [16] | body
    HELLO      version u16 | mac [32] | page_size u32 | model, revision, dtype, layout, worker, cluster, each:
                 length u16 | UTF-8; then the sending agent's connection metadata
    WELCOME    version u16 | slots u16 | slot bytes u64 | address u64 | device u32 | memory u8 | page_size u32
                 | six texts as in HELLO; then the metadata of the ring
    SLOT       number u64 | slot u16 | writes u16, then for each write:
                 token [16] | first layer u16 | layers u16 | codec u8 | checksum algorithm u8 | spans u16 | checksum u64
                 then the spans (kv_transfer/spans.py; in the receiver's memory of each of the layers)
    MESSAGE    number u64 | what kv_transfer/messages.py makes
    CREDIT     number u64 | slot u16
    BYE        number u64 | reason, UTF-8
    ALIVE      number u64 (of the last numbered note)

All numbers are little endian. ``role`` says which end the note is for. A SLOT is delivered by NIXL behind the bytes of
the slot: write after write, each layer after layer, the spans in order. SLOT, MESSAGE, CREDIT and BYE are numbered from
0 on, each direction of a link for itself: their reader takes them in that order, whatever order they arrived in.

The access key of a descriptor never travels: HELLO holds a keyed digest of its other fields. A WELCOME without slots
is a refusal: the sender finds in its fingerprint what differs.

Invariant: whatever the bytes, a parser here returns a value that its packer could have made, or raises
ProtocolViolation.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from core.errors import Incompatible, ProtocolViolation
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, WorkerId
from kv_transfer.codec import Codec
from kv_transfer.spans import SPAN_BYTES, Spans
from kv_transfer.transport import PeerIdentity

VERSION = 1
KEY_BYTES = 16
LINK_ID_BYTES = 16
MAC_BYTES = 32

_NOTE = struct.Struct("<QBB16s")
_HELLO = struct.Struct("<H32sI")
_WELCOME = struct.Struct("<HHQQIBI")
_TEXT = struct.Struct("<H")
_NUMBER = struct.Struct("<Q")
_SLOT = struct.Struct("<QHH")
_PARCEL = struct.Struct("<16sHHBBHQ")
_CREDIT = struct.Struct("<QH")
_CHECKSUM_BYTES = 8
_UNCHECKED, _XXH3 = 0, 1

ParseSpans = Callable[[bytes], Spans]


class NoteKind(IntEnum):
    HELLO = 1
    WELCOME = 2
    SLOT = 3
    MESSAGE = 4
    CREDIT = 5
    BYE = 6
    ALIVE = 7


NUMBERED = frozenset({NoteKind.SLOT, NoteKind.MESSAGE, NoteKind.CREDIT, NoteKind.BYE})


class Role(IntEnum):
    """Which end of a link a note is for."""

    RECEIVES_PAGES = 1
    SENDS_PAGES = 2


class Memory(IntEnum):
    """Where a ring lies."""

    HOST = 1
    DEVICE = 2


@dataclass(frozen=True, slots=True)
class Note:
    """The frame that every note has; ``body`` is for the parser of its kind."""

    kind: NoteKind
    role: Role
    link_id: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    """The sending end's first words. ``connection``: NIXL metadata by which its agent is reached."""

    fingerprint: CacheFingerprint
    identity: PeerIdentity
    connection: bytes


@dataclass(frozen=True, slots=True)
class RingPlace:
    """Where a peer's ring is, and what NIXL must know to write there."""

    num_slots: int
    slot_bytes: int
    address: int
    device: int
    memory: Memory
    metadata: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    fingerprint: CacheFingerprint
    identity: PeerIdentity
    ring: RingPlace | None  # None: refused


@dataclass(frozen=True, slots=True)
class Parcel:
    """One write within a slot. ``checksum``: xxh3 of its payload; None: the sender could not read it cheaply."""

    token: bytes
    layers: range
    spans: Spans
    checksum: int | None

    @property
    def num_bytes(self) -> int:
        return len(self.layers) * self.spans.num_bytes


@dataclass(frozen=True, slots=True)
class FullSlot:
    slot: int
    parcels: tuple[Parcel, ...]


def pack_note(kind: NoteKind, role: Role, link_id: bytes, body: bytes) -> bytes:
    assert len(link_id) == LINK_ID_BYTES, "a link id has a fixed size"
    rest = _NOTE.pack(0, kind, role, link_id)[_CHECKSUM_BYTES:] + body
    return xxhash.xxh3_64_intdigest(rest).to_bytes(_CHECKSUM_BYTES, "little") + rest


def parse_note(data: bytes) -> Note:
    if len(data) < _NOTE.size:
        raise ProtocolViolation("a note that is too short")
    checksum, kind, role, link_id = _NOTE.unpack_from(data)
    if checksum != xxhash.xxh3_64_intdigest(memoryview(data)[_CHECKSUM_BYTES:]):
        raise ProtocolViolation("a note whose checksum does not fit")
    if kind not in set(NoteKind) or role not in set(Role):
        raise ProtocolViolation(f"a note of kind {kind} for role {role}")
    return Note(NoteKind(kind), Role(role), link_id, data[_NOTE.size :])


def pack_hello(hello: Hello, link_id: bytes, key: bytes) -> bytes:
    rest = _pack_names(hello.fingerprint, hello.identity) + hello.connection
    head = _HELLO.pack(VERSION, _mac(key, link_id, hello.fingerprint.page_size, rest), hello.fingerprint.page_size)
    return pack_note(NoteKind.HELLO, Role.RECEIVES_PAGES, link_id, head + rest)


def parse_hello(note: Note, key: bytes) -> Hello:
    """Raises ProtocolViolation also for a HELLO that was not made with ``key``, Incompatible for another version."""
    _require_version(note.body)
    if len(note.body) < _HELLO.size:
        raise ProtocolViolation("a HELLO that is too short")
    _, mac, page_size = _HELLO.unpack_from(note.body)
    rest = note.body[_HELLO.size :]
    if not hmac.compare_digest(mac, _mac(key, note.link_id, page_size, rest)):
        raise ProtocolViolation("its HELLO was not made with our access key")
    fingerprint, identity, connection = _parse_names(rest, page_size)
    return Hello(fingerprint, identity, connection)


def pack_welcome(welcome: Welcome, link_id: bytes) -> bytes:
    ring = welcome.ring or RingPlace(0, 0, 0, 0, Memory.HOST, b"")
    page_size = welcome.fingerprint.page_size
    head = _WELCOME.pack(
        VERSION, ring.num_slots, ring.slot_bytes, ring.address, ring.device, ring.memory, page_size
    ) + _pack_names(welcome.fingerprint, welcome.identity)
    return pack_note(NoteKind.WELCOME, Role.SENDS_PAGES, link_id, head + ring.metadata)


def parse_welcome(note: Note) -> Welcome:
    """Raises Incompatible for another version, before anything else of the body is looked at."""
    _require_version(note.body)
    if len(note.body) < _WELCOME.size:
        raise ProtocolViolation("a WELCOME that is too short")
    _, num_slots, slot_bytes, address, device, memory, page_size = _WELCOME.unpack_from(note.body)
    fingerprint, identity, metadata = _parse_names(note.body[_WELCOME.size :], page_size)
    if memory not in set(Memory) or (num_slots > 0) != (slot_bytes > 0):
        raise ProtocolViolation(f"a WELCOME with {num_slots} slots of {slot_bytes} bytes in memory {memory}")
    if num_slots == 0:
        return Welcome(fingerprint, identity, None)
    return Welcome(fingerprint, identity, RingPlace(num_slots, slot_bytes, address, device, Memory(memory), metadata))


def pack_slot(number: int, slot: int, parcels: Sequence[Parcel]) -> bytes:
    body = [_SLOT.pack(number, slot, len(parcels))]
    for parcel in parcels:
        algorithm = _UNCHECKED if parcel.checksum is None else _XXH3
        layers, spans = parcel.layers, parcel.spans
        body.append(
            _PARCEL.pack(
                parcel.token, layers.start, len(layers), Codec.RAW, algorithm, len(spans), parcel.checksum or 0
            )
        )
        body.append(spans.packed)
    return b"".join(body)


def parse_slot(body: bytes, parse_spans: ParseSpans = Spans.parse) -> FullSlot:
    if len(body) < _SLOT.size:
        raise ProtocolViolation("a SLOT that is too short")
    _, slot, num_parcels = _SLOT.unpack_from(body)
    parcels, at = [], _SLOT.size
    for _ in range(num_parcels):
        parcel, at = _parse_parcel(body, at, parse_spans)
        parcels.append(parcel)
    if not parcels or at != len(body):
        raise ProtocolViolation(f"a SLOT of {len(body)} bytes for {num_parcels} writes")
    return FullSlot(slot, tuple(parcels))


def pack_number(number: int, rest: bytes = b"") -> bytes:
    """The body of MESSAGE, BYE and ALIVE."""
    return _NUMBER.pack(number) + rest


def parse_number(body: bytes) -> int:
    """The number that a numbered note, or ALIVE, begins with."""
    if len(body) < _NUMBER.size:
        raise ProtocolViolation("a note without a number")
    number: int = _NUMBER.unpack_from(body)[0]
    return number


def parse_message(body: bytes) -> bytes:
    """What follows the number."""
    return body[_NUMBER.size :]


def pack_credit(number: int, slot: int) -> bytes:
    return _CREDIT.pack(number, slot)


def parse_credit(body: bytes) -> int:
    """The slot that is free again."""
    if len(body) != _CREDIT.size:
        raise ProtocolViolation(f"a CREDIT of {len(body)} bytes")
    slot: int = _CREDIT.unpack(body)[1]
    return slot


def _parse_parcel(body: bytes, at: int, parse_spans: ParseSpans) -> tuple[Parcel, int]:
    if len(body) < at + _PARCEL.size:
        raise ProtocolViolation("a SLOT that is cut short")
    token, first_layer, num_layers, codec, algorithm, num_spans, checksum = _PARCEL.unpack_from(body, at)
    if codec != Codec.RAW or algorithm not in (_UNCHECKED, _XXH3):
        raise ProtocolViolation(f"a write with codec {codec} and checksum algorithm {algorithm}")
    start, end = at + _PARCEL.size, at + _PARCEL.size + num_spans * SPAN_BYTES
    if num_layers == 0 or num_spans == 0 or len(body) < end:
        raise ProtocolViolation(f"a write of {num_spans} spans of {num_layers} layers")
    layers = range(first_layer, first_layer + num_layers)
    return Parcel(token, layers, parse_spans(body[start:end]), checksum if algorithm == _XXH3 else None), end


def _mac(key: bytes, link_id: bytes, page_size: int, rest: bytes) -> bytes:
    return hmac.digest(key, link_id + page_size.to_bytes(4, "little") + rest, "sha256")


def _require_version(body: bytes) -> None:
    if len(body) < _TEXT.size:
        raise ProtocolViolation("a handshake without a version")
    (version,) = _TEXT.unpack_from(body)
    if version != VERSION:
        raise Incompatible("kv_transfer nixl protocol version", str(VERSION), str(version))


def _pack_names(fingerprint: CacheFingerprint, identity: PeerIdentity) -> bytes:
    texts = (fingerprint.model, fingerprint.revision, fingerprint.dtype, fingerprint.layout)
    return b"".join(_pack_texts((*texts, identity.worker_id, identity.cluster_id)))


def _pack_texts(texts: Iterable[str]) -> Iterable[bytes]:
    for text in texts:
        data = text.encode()
        yield _TEXT.pack(len(data)) + data


def _parse_names(data: bytes, page_size: int) -> tuple[CacheFingerprint, PeerIdentity, bytes]:
    texts, at = [], 0
    for _ in range(6):
        if len(data) < at + _TEXT.size:
            raise ProtocolViolation("a handshake that is cut short")
        start = at + _TEXT.size
        at = start + _TEXT.unpack_from(data, at)[0]
        if len(data) < at:
            raise ProtocolViolation("a handshake that is cut short")
        try:
            texts.append(data[start:at].decode())
        except UnicodeDecodeError as error:
            raise ProtocolViolation("a handshake with a text that is not UTF-8") from error
    model, revision, dtype, layout, worker, cluster = texts
    fingerprint = CacheFingerprint(model, revision, dtype, page_size, layout)
    return fingerprint, PeerIdentity(WorkerId(worker), ClusterId(cluster)), data[at:]
