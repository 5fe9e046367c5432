"""What do the bytes on a TCP link mean? The frame format, without I/O.

    frame   = header [16] | head [head_bytes] | payload [payload_bytes]
    header  = magic "KV" | kind u8 | zero u8 | head_bytes u32 | payload_bytes u64
    HELLO     head: version u16 | role u8 | access key [16] | page_size u32
                    then model, revision, dtype, layout, each: length u16 | UTF-8
    WRITE     head: token [16] | first layer u16 | layers u16 | codec u8 | checksum algorithm u8 | spans u16
                    checksum u64
                    then for each span: offset u64 | bytes u32 (in the receiver's memory of each of the layers)
              payload: layer after layer, the bytes of each span in order
    MESSAGE   head: what kv_transfer/messages.py makes
    KEEPALIVE nothing

All numbers are little endian. Each end opens with HELLO and speaks nothing else before it has read the other's. The
version comes first in HELLO and stays there, so that every later format can tell an older peer apart. Codec and
checksum algorithm 0 mean raw bytes and no checksum; nothing else is spoken in version 1.

Invariant: whatever the bytes, a parser here returns a value that its serialiser could have made, or raises
ProtocolViolation (Incompatible for a HELLO of another version), before anything is allocated in proportion to them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from core.errors import Incompatible, ProtocolViolation
from core.fingerprint import CacheFingerprint
from kv_transfer.messages import MAX_PAYLOAD_BYTES
from kv_transfer.transport import TOKEN_BYTES, Span

VERSION = 1
KEY_BYTES = 16
MAX_HEAD_BYTES = MAX_PAYLOAD_BYTES + (1 << 17)  # the largest message: a commit and its session id
MAX_WRITE_PAYLOAD_BYTES = 1 << 30

_MAGIC = b"KV"
_HEADER = struct.Struct("<2sBBIQ")
_HELLO = struct.Struct("<HB16sI")
_TEXT = struct.Struct("<H")
_WRITE = struct.Struct("<16sHHBBHQ")
_SPAN = struct.Struct("<QI")
_RAW = 0
_NO_CHECKSUM = 0
HEADER_BYTES = _HEADER.size


class FrameKind(IntEnum):
    HELLO = 1
    WRITE = 2
    MESSAGE = 3
    KEEPALIVE = 4


class LinkRole(IntEnum):
    """What the end that says so will do on this link."""

    SENDS_PAGES = 1
    RECEIVES_PAGES = 2


@dataclass(frozen=True, slots=True)
class Header:
    kind: FrameKind
    head_bytes: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Hello:
    role: LinkRole
    key: bytes  # the secret of the descriptor, from the end that dialled; zeros in the answer
    fingerprint: CacheFingerprint


@dataclass(frozen=True, slots=True)
class WriteHead:
    token: bytes
    layers: range
    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that the write puts into the receiver's memory."""
        return len(self.layers) * sum(span.num_bytes for span in self.spans)


KEEPALIVE = _HEADER.pack(_MAGIC, FrameKind.KEEPALIVE, 0, 0, 0)


def pack_hello(hello: Hello) -> bytes:
    mine = hello.fingerprint
    head = _HELLO.pack(VERSION, hello.role, hello.key, mine.page_size)
    head += b"".join(_pack_text(text) for text in (mine.model, mine.revision, mine.dtype, mine.layout))
    return _frame(FrameKind.HELLO, head)


def pack_message(message: bytes) -> bytes:
    assert len(message) <= MAX_HEAD_BYTES, "messages are small"
    return _frame(FrameKind.MESSAGE, message)


def pack_write(token: bytes, layers: range, spans: Iterable[tuple[int, int]], payload_bytes: int) -> bytes:
    """Header and head of a write; ``spans`` are (offset, bytes) at the receiver. The payload follows."""
    packed = b"".join(_SPAN.pack(offset, num_bytes) for offset, num_bytes in spans)
    head = _WRITE.pack(token, layers.start, len(layers), _RAW, _NO_CHECKSUM, len(packed) // _SPAN.size, 0) + packed
    return _HEADER.pack(_MAGIC, FrameKind.WRITE, 0, len(head), payload_bytes) + head


def parse_header(data: bytes | bytearray) -> Header:
    magic, kind, zero, head_bytes, payload_bytes = _HEADER.unpack(data)
    if magic != _MAGIC or zero != 0 or kind not in set(FrameKind):
        raise ProtocolViolation("the peer does not speak our protocol: no frame begins like this")
    header = Header(FrameKind(kind), head_bytes, payload_bytes)
    if header.head_bytes > MAX_HEAD_BYTES:
        raise ProtocolViolation(f"a head of {header.head_bytes} bytes")
    if header.payload_bytes > (MAX_WRITE_PAYLOAD_BYTES if header.kind is FrameKind.WRITE else 0):
        raise ProtocolViolation(f"a {header.kind.name} frame with a payload of {header.payload_bytes} bytes")
    if header.kind is FrameKind.KEEPALIVE and header.head_bytes:
        raise ProtocolViolation(f"a KEEPALIVE frame with a head of {header.head_bytes} bytes")
    return header


def parse_hello(head: bytes) -> Hello:
    """Raises Incompatible for another version, before anything else of the head is looked at."""
    if len(head) < _TEXT.size:
        raise ProtocolViolation("a HELLO without a version")
    (version,) = _TEXT.unpack_from(head)
    if version != VERSION:
        raise Incompatible("kv_transfer protocol version", str(VERSION), str(version))
    if len(head) < _HELLO.size:
        raise ProtocolViolation("a HELLO that is too short")
    _, role, key, page_size = _HELLO.unpack_from(head)
    if role not in set(LinkRole):
        raise ProtocolViolation(f"a HELLO with role {role}")
    model, revision, dtype, layout = _parse_texts(head[_HELLO.size :], 4)
    return Hello(LinkRole(role), key, CacheFingerprint(model, revision, dtype, page_size, layout))


def parse_write(head: bytes) -> WriteHead:
    if len(head) < _WRITE.size:
        raise ProtocolViolation("a WRITE head that is too short")
    token, first_layer, num_layers, codec, algorithm, num_spans, _checksum = _WRITE.unpack_from(head)
    if codec != _RAW or algorithm != _NO_CHECKSUM:
        raise ProtocolViolation(f"a WRITE with codec {codec} and checksum algorithm {algorithm}")
    if num_layers == 0 or num_spans == 0 or len(head) != _WRITE.size + num_spans * _SPAN.size:
        raise ProtocolViolation(f"a WRITE head of {len(head)} bytes for {num_spans} spans")
    spans = tuple(Span(offset, num_bytes) for offset, num_bytes in _SPAN.iter_unpack(head[_WRITE.size :]))
    if not all(span.num_bytes for span in spans):
        raise ProtocolViolation("a WRITE with an empty span")
    assert len(token) == TOKEN_BYTES, "the struct says so"
    return WriteHead(token, range(first_layer, first_layer + num_layers), spans)


def _frame(kind: FrameKind, head: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, kind, 0, len(head), 0) + head


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
