"""What do the bytes on a TCP link mean? The frame format, without I/O.

    frame   = header [16] | head [head_bytes] | payload [payload_bytes]
    header  = magic "KV" | kind u8 | guard u8 | head_bytes u32 | payload_bytes u64
    head    = body | check u64                  check: xxh3_64 of header and body
    HELLO     body: version u16 | role u8 | access key [16] | page_size u32
                    model, revision, dtype, layout, worker, cluster, each: length u16 | UTF-8
                    transport id [16] | link id [16] | connection index u16 | connections u16
    WRITE     body: token [16] | first layer u16 | layers u16 | codec u8 | checksum algorithm u8 | spans u16
                    checksum u64
                    then the spans (kv_transfer/spans.py; in the receiver's memory of each of the layers)
              payload: layer after layer, the bytes of each span in order; or what the codec made of them
    MESSAGE   body: barrier u64 | what kv_transfer/messages.py makes
    BARRIER   body: number u64
    KEEPALIVE body: nothing

All numbers are little endian. Each end of a connection opens with HELLO and speaks nothing else before it has read the
other's. The header, and the version first in HELLO, stay as they are in every later format, so that each can tell an
older peer apart. The guard is the exclusive or of the header's other bytes (in HELLO it is zero, as in version 1): a
damaged length is seen before anybody waits for that many bytes. Codecs are kv_transfer/codec.py's. Checksum algorithm 0
is none; 1 is xxh3_64 of the payload as it is on the wire.

Invariants: whatever the bytes, a parser here returns a value that its serialiser could have made, or raises
ProtocolViolation (Incompatible for a HELLO of another version), before anything is allocated in proportion to them. One
flipped bit anywhere in a header or a head never parses.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import reduce
from operator import xor

from xxhash import xxh3_64_intdigest

from core.errors import Incompatible, ProtocolViolation
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, WorkerId
from kv_transfer.codec import Codec
from kv_transfer.messages import MAX_PAYLOAD_BYTES
from kv_transfer.spans import SPAN_BYTES, Spans
from kv_transfer.transport import PeerIdentity

VERSION = 2
KEY_BYTES = 16
ID_BYTES = 16
MAX_HEAD_BYTES = MAX_PAYLOAD_BYTES + (1 << 17)  # the largest message: a commit and its session id
MAX_WRITE_PAYLOAD_BYTES = 1 << 30
MAX_CONNECTIONS = 64

_MAGIC = b"KV"
_HEADER = struct.Struct("<2sBBIQ")
_CHECK = struct.Struct("<Q")
_VERSION = struct.Struct("<H")
_HELLO = struct.Struct("<HB16sI")
_HELLO_END = struct.Struct("<16s16sHH")
_TEXT = struct.Struct("<H")
_WRITE = struct.Struct("<16sHHBBHQ")
_NUMBER = struct.Struct("<Q")
_NUM_TEXTS = 6
HEADER_BYTES = _HEADER.size
CHECK_BYTES = _CHECK.size


class FrameKind(IntEnum):
    HELLO = 1
    WRITE = 2
    MESSAGE = 3
    KEEPALIVE = 4
    BARRIER = 5


class LinkRole(IntEnum):
    """What the end that says so will do on this link."""

    SENDS_PAGES = 1
    RECEIVES_PAGES = 2


class Checksum(IntEnum):
    """The checksum algorithm byte of a WRITE frame."""

    NONE = 0
    XXH3 = 1


@dataclass(frozen=True, slots=True)
class Header:
    kind: FrameKind
    head_bytes: int  # with its check
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks, and which connection of which link this is; the end that dialled names the link."""

    role: LinkRole
    key: bytes  # [KEY_BYTES] the secret of the descriptor, from the end that dialled; zeros in the answer
    fingerprint: CacheFingerprint
    identity: PeerIdentity
    transport_id: bytes  # [ID_BYTES]
    link_id: bytes  # [ID_BYTES]
    index: int  # of this connection, below num_connections; 0 is the control connection
    num_connections: int


@dataclass(frozen=True, slots=True)
class WriteHead:
    token: bytes
    layers: range
    spans: Spans
    codec: Codec
    algorithm: Checksum
    checksum: int  # of the payload; 0 without an algorithm

    @property
    def num_bytes(self) -> int:
        """Bytes that the write puts into the receiver's memory."""
        return len(self.layers) * self.spans.num_bytes


def pack_hello(hello: Hello) -> bytes:
    mine, who = hello.fingerprint, hello.identity
    texts = (mine.model, mine.revision, mine.dtype, mine.layout, who.worker_id, who.cluster_id)
    body = _HELLO.pack(VERSION, hello.role, hello.key, mine.page_size)
    body += b"".join(_pack_text(text) for text in texts)
    body += _HELLO_END.pack(hello.transport_id, hello.link_id, hello.index, hello.num_connections)
    return _frame(FrameKind.HELLO, body)


def pack_message(barrier: int, message: bytes) -> bytes:
    assert len(message) + _NUMBER.size + CHECK_BYTES <= MAX_HEAD_BYTES, "messages are small"
    return _frame(FrameKind.MESSAGE, _NUMBER.pack(barrier) + message)


def pack_barrier(number: int) -> bytes:
    return _frame(FrameKind.BARRIER, _NUMBER.pack(number))


def pack_write(
    token: bytes,
    layers: range,
    spans: Spans,
    payload_bytes: int,
    codec: Codec = Codec.RAW,
    checksum: int | None = None,
) -> bytes:
    """Header and head of a write; ``spans`` are the receiver's. The payload follows."""
    algorithm = Checksum.NONE if checksum is None else Checksum.XXH3
    fixed = _WRITE.pack(token, layers.start, len(layers), codec, algorithm, len(spans), checksum or 0)
    return _frame(FrameKind.WRITE, fixed + spans.packed, payload_bytes)


def parse_header(data: bytes | bytearray) -> Header:
    magic, kind, guard, head_bytes, payload_bytes = _HEADER.unpack(data)
    if magic != _MAGIC or kind not in _KINDS or guard != _guard(data):
        raise ProtocolViolation("the peer does not speak our protocol: no frame begins like this")
    header = Header(FrameKind(kind), head_bytes, payload_bytes)
    if not CHECK_BYTES <= header.head_bytes <= MAX_HEAD_BYTES:
        raise ProtocolViolation(f"a head of {header.head_bytes} bytes")
    if header.payload_bytes > (MAX_WRITE_PAYLOAD_BYTES if header.kind is FrameKind.WRITE else 0):
        raise ProtocolViolation(f"a {header.kind.name} frame with a payload of {header.payload_bytes} bytes")
    return header


def parse_body(header: bytes | bytearray, head: bytes) -> bytes:
    """The head without its check. Raises ProtocolViolation if that is not the check of ``header`` and head."""
    body = head[:-CHECK_BYTES]
    if _CHECK.unpack_from(head, len(body))[0] != xxh3_64_intdigest(bytes(header) + body):
        raise ProtocolViolation("a frame whose head fails its checksum")
    return body


def parse_hello(header: bytes | bytearray, head: bytes) -> Hello:
    """Raises Incompatible for another version, before anything else of the head is looked at."""
    if len(head) < _VERSION.size:
        raise ProtocolViolation("a HELLO without a version")
    (version,) = _VERSION.unpack_from(head)
    if version == 1:  # had no check
        raise Incompatible("kv_transfer protocol version", str(VERSION), str(version))
    body = parse_body(header, head)
    if len(body) < _VERSION.size:
        raise ProtocolViolation("a HELLO without a version")
    if version != VERSION:
        raise Incompatible("kv_transfer protocol version", str(VERSION), str(version))
    if len(body) < _HELLO.size + _HELLO_END.size:
        raise ProtocolViolation("a HELLO that is too short")
    _, role, key, page_size = _HELLO.unpack_from(body)
    if role not in set(LinkRole):
        raise ProtocolViolation(f"a HELLO with role {role}")
    texts = _parse_texts(body[_HELLO.size : -_HELLO_END.size], _NUM_TEXTS)
    model, revision, dtype, layout, worker, cluster = texts
    transport_id, link_id, index, num_connections = _HELLO_END.unpack(body[-_HELLO_END.size :])
    if not index < num_connections <= MAX_CONNECTIONS:
        raise ProtocolViolation(f"a HELLO of connection {index} of {num_connections}")
    fingerprint = CacheFingerprint(model, revision, dtype, page_size, layout)
    identity = PeerIdentity(WorkerId(worker), ClusterId(cluster))
    return Hello(LinkRole(role), key, fingerprint, identity, transport_id, link_id, index, num_connections)


def parse_write(body: bytes, parse_spans: Callable[[bytes], Spans] = Spans.parse) -> WriteHead:
    if len(body) < _WRITE.size:
        raise ProtocolViolation("a WRITE head that is too short")
    token, first_layer, num_layers, codec, algorithm, num_spans, checksum = _WRITE.unpack_from(body)
    if codec not in _CODECS or algorithm not in _CHECKSUMS or (checksum and algorithm == Checksum.NONE):
        raise ProtocolViolation(f"a WRITE with codec {codec} and checksum algorithm {algorithm}")
    if num_layers == 0 or num_spans == 0 or len(body) != _WRITE.size + num_spans * SPAN_BYTES:
        raise ProtocolViolation(f"a WRITE head of {len(body)} bytes for {num_spans} spans")
    layers = range(first_layer, first_layer + num_layers)
    return WriteHead(token, layers, parse_spans(body[_WRITE.size :]), Codec(codec), Checksum(algorithm), checksum)


def parse_message(body: bytes) -> tuple[int, bytes]:
    """Barrier and message."""
    if len(body) < _NUMBER.size:
        raise ProtocolViolation("a MESSAGE without a barrier")
    return _NUMBER.unpack_from(body)[0], body[_NUMBER.size :]


def parse_barrier(body: bytes) -> int:
    if len(body) != _NUMBER.size:
        raise ProtocolViolation(f"a BARRIER of {len(body)} bytes")
    number: int = _NUMBER.unpack(body)[0]
    return number


def parse_keepalive(body: bytes) -> None:
    if body:
        raise ProtocolViolation(f"a KEEPALIVE frame with a body of {len(body)} bytes")


_KINDS = frozenset(FrameKind)
_CODECS = frozenset(Codec)
_CHECKSUMS = frozenset(Checksum)


def _frame(kind: FrameKind, body: bytes, payload_bytes: int = 0) -> bytes:
    header = bytearray(_HEADER.pack(_MAGIC, kind, 0, len(body) + CHECK_BYTES, payload_bytes))
    header[3] = _guard(header)
    opened = bytes(header) + body
    return opened + _CHECK.pack(xxh3_64_intdigest(opened))


def _guard(header: bytes | bytearray) -> int:
    if header[2] == FrameKind.HELLO:
        return 0
    return reduce(xor, header) ^ header[3]


def _pack_text(text: str) -> bytes:
    data = text.encode()
    return _TEXT.pack(len(data)) + data


def _parse_texts(data: bytes, count: int) -> list[str]:
    texts = []
    at = 0
    for _ in range(count):
        if len(data) < at + _TEXT.size:
            raise ProtocolViolation("a HELLO that is cut short")
        end = at + _TEXT.size + _TEXT.unpack_from(data, at)[0]
        texts.append(_parse_text(data[at + _TEXT.size : end], end - at - _TEXT.size))
        at = end
    if at != len(data):
        raise ProtocolViolation("a HELLO with bytes left over")
    return texts


def _parse_text(data: bytes, num_bytes: int) -> str:
    if len(data) != num_bytes:
        raise ProtocolViolation("a HELLO that is cut short")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ProtocolViolation("a HELLO with a text that is not UTF-8") from error


KEEPALIVE = _frame(FrameKind.KEEPALIVE, b"")
