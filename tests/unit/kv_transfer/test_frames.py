from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from core.errors import Incompatible, ProtocolViolation
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, WorkerId
from kv_transfer.codec import Codec
from kv_transfer.frames import (
    CHECK_BYTES,
    HEADER_BYTES,
    KEEPALIVE,
    MAX_HEAD_BYTES,
    MAX_WRITE_PAYLOAD_BYTES,
    Checksum,
    FrameKind,
    Header,
    Hello,
    LinkRole,
    pack_barrier,
    pack_hello,
    pack_message,
    pack_write,
    parse_barrier,
    parse_body,
    parse_header,
    parse_hello,
    parse_keepalive,
    parse_message,
    parse_write,
)
from kv_transfer.run_table import MAX_OFFSET
from kv_transfer.spans import Spans
from kv_transfer.transport import PeerIdentity, Span

FINGERPRINT = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")
IDENTITY = PeerIdentity(WorkerId("w"), ClusterId("c"))
HELLO = Hello(LinkRole.SENDS_PAGES, bytes(range(16)), FINGERPRINT, IDENTITY, bytes(range(16, 32)), b"l" * 16, 1, 4)
TOKEN = bytes(16)
WRITE = pack_write(TOKEN, range(2, 5), Spans([Span(64, 32), Span(0, 7)]), 117, checksum=0xFEDCBA9876543210)
u16, u32, u64 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
ids = st.binary(min_size=16, max_size=16)
texts = st.text(max_size=30)
hellos = st.builds(
    Hello,
    role=st.sampled_from(LinkRole),
    key=ids,
    fingerprint=st.builds(CacheFingerprint, texts, texts, texts, u32, texts),
    identity=st.builds(PeerIdentity, texts, texts),
    transport_id=ids,
    link_id=ids,
    index=st.just(0),
    num_connections=st.integers(1, 64),
)
FRAMES = {
    "hello": pack_hello(HELLO),
    "write": WRITE,
    "message": pack_message(3, b"hello"),
    "barrier": pack_barrier(12),
    "keepalive": KEEPALIVE,
}


def parse(frame: bytes) -> Any:
    """A whole frame without its payload, as a reader takes it."""
    raw, head = frame[:HEADER_BYTES], frame[HEADER_BYTES:]
    header = parse_header(raw)
    if header.head_bytes != len(head):
        raise ProtocolViolation("a reader would have read another head, and its check would fail")
    if header.kind is FrameKind.HELLO:
        return parse_hello(raw, head)
    body = parse_body(raw, head)
    match header.kind:
        case FrameKind.WRITE:
            return header, parse_write(body)
        case FrameKind.MESSAGE:
            return parse_message(body)
        case FrameKind.BARRIER:
            return parse_barrier(body)
        case FrameKind.KEEPALIVE:
            return parse_keepalive(body)


def framed(kind: FrameKind, body: bytes, payload_bytes: int = 0) -> bytes:
    """A frame with a valid guard and check around any body."""
    header = bytearray(struct.pack("<2sBBIQ", b"KV", kind, 0, len(body) + CHECK_BYTES, payload_bytes))
    for byte in bytes(header) if kind is not FrameKind.HELLO else b"":
        header[3] ^= byte
    return bytes(header) + body + struct.pack("<Q", xxh3_64_intdigest(bytes(header) + body))


def write_of(
    *, layers: int = 1, codec: int = 0, algorithm: int = 0, spans: int = 1, checksum: int = 0, num_bytes: int = 1
) -> bytes:
    """A WRITE with one span, which says that it has ``spans``."""
    body = struct.pack("<16sHHBBHQQI", TOKEN, 0, layers, codec, algorithm, spans, checksum, 0, num_bytes)
    return framed(FrameKind.WRITE, body)


@given(hellos)
def test_a_hello_is_read_as_it_was_written(hello: Hello) -> None:
    assert parse(pack_hello(hello)) == hello


@given(
    token=ids,
    layers=st.tuples(u16, st.integers(1, 2**16 - 1)),
    spans=st.lists(st.builds(Span, st.integers(0, MAX_OFFSET), st.integers(1, 2**32 - 1)), min_size=1, max_size=20),
    payload_bytes=st.integers(0, MAX_WRITE_PAYLOAD_BYTES),
    codec=st.sampled_from(Codec),
    checksum=st.none() | u64,
)
def test_a_write_is_read_as_it_was_written(
    token: bytes,
    layers: tuple[int, int],
    spans: list[Span],
    payload_bytes: int,
    codec: Codec,
    checksum: int | None,
) -> None:
    wanted = range(layers[0], layers[0] + layers[1])
    header, head = parse(pack_write(token, wanted, Spans(spans), payload_bytes, codec, checksum))
    assert (header.kind, header.payload_bytes) == (FrameKind.WRITE, payload_bytes)
    assert (head.token, head.layers, head.codec) == (token, wanted, codec)
    assert (head.algorithm, head.checksum) == ((Checksum.NONE, 0) if checksum is None else (Checksum.XXH3, checksum))
    assert head.spans == spans


@given(u64, st.binary(max_size=100))
def test_a_message_is_read_with_its_barrier(barrier: int, message: bytes) -> None:
    assert parse(pack_message(barrier, message)) == (barrier, message)


@given(u64)
def test_a_barrier_is_its_number(number: int) -> None:
    assert parse(pack_barrier(number)) == number


@pytest.mark.parametrize("name", FRAMES)
def test_one_flipped_bit_anywhere_never_parses(name: str) -> None:
    frame = FRAMES[name]
    parse(frame)
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolViolation):
            parse(bytes(damaged))


@pytest.mark.parametrize("name", [name for name in FRAMES if name != "hello"])
def test_a_flipped_bit_of_a_length_is_seen_in_the_header_alone(name: str) -> None:
    for bit in range(8 * HEADER_BYTES):
        damaged = bytearray(FRAMES[name][:HEADER_BYTES])
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolViolation):
            parse_header(damaged)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_any_header_is_bounded_or_a_violation(data: bytes) -> None:
    try:
        header = parse_header(data)
    except ProtocolViolation:
        return
    assert CHECK_BYTES <= header.head_bytes <= MAX_HEAD_BYTES
    assert header.payload_bytes <= MAX_WRITE_PAYLOAD_BYTES


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"GET / HTTP/1.1\r\n" + bytes(8), id="another protocol"),
        pytest.param(framed(FrameKind.MESSAGE, b"", 1), id="message with payload"),
        pytest.param(framed(FrameKind.MESSAGE, bytes(7)), id="message without a barrier"),
        pytest.param(framed(FrameKind.MESSAGE, bytes(MAX_HEAD_BYTES)), id="huge head"),
        pytest.param(framed(FrameKind.WRITE, b"", 2**40), id="huge payload"),
        pytest.param(framed(FrameKind.KEEPALIVE, b"x"), id="keepalive with body"),
        pytest.param(framed(FrameKind.BARRIER, bytes(9)), id="long barrier"),
        pytest.param(write_of(codec=9), id="codec"),
        pytest.param(write_of(algorithm=7), id="algorithm"),
        pytest.param(write_of(checksum=5), id="checksum"),
        pytest.param(framed(FrameKind.WRITE, struct.pack("<16sHHBBHQ", TOKEN, 0, 1, 0, 0, 0, 0)), id="no spans"),
        pytest.param(write_of(layers=0), id="no layers"),
        pytest.param(write_of(spans=2), id="too few spans"),
        pytest.param(write_of(num_bytes=0), id="empty span"),
        pytest.param(framed(FrameKind.HELLO, b""), id="empty hello"),
        pytest.param(framed(FrameKind.HELLO, pack_hello(HELLO)[HEADER_BYTES:-12]), id="hello cut short"),
    ],
)
def test_a_frame_that_makes_no_sense_is_a_violation(frame: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        parse(frame)


@pytest.mark.parametrize(("index", "num_connections"), [(1, 1), (0, 0), (0, 65), (9, 4)])
def test_a_connection_outside_its_link_is_a_violation(index: int, num_connections: int) -> None:
    body = bytearray(pack_hello(HELLO)[HEADER_BYTES:-CHECK_BYTES])
    struct.pack_into("<HH", body, len(body) - 4, index, num_connections)
    with pytest.raises(ProtocolViolation):
        parse(framed(FrameKind.HELLO, bytes(body)))


@given(
    st.sampled_from([FrameKind.HELLO, FrameKind.WRITE, FrameKind.MESSAGE, FrameKind.BARRIER]), st.binary(max_size=150)
)
def test_any_body_parses_or_is_refused(kind: FrameKind, body: bytes) -> None:
    try:
        parsed = parse(framed(kind, body))
    except (ProtocolViolation, Incompatible):
        return
    match parsed:
        case Hello():
            assert pack_hello(parsed) == framed(kind, body)
        case (Header(), head):
            assert head.num_bytes >= 1
        case (barrier, message):
            assert pack_message(barrier, message) == framed(kind, body)
        case number:
            assert pack_barrier(number) == framed(kind, body)


@pytest.mark.parametrize(
    ("version", "head"),
    [
        pytest.param(1, struct.pack("<HB16sI", 1, 1, bytes(16), 16) + 4 * b"\0\0", id="the first, without a check"),
        pytest.param(7, None, id="a later one"),
    ],
)
def test_a_hello_of_another_version_is_incompatible_whatever_follows(version: int, head: bytes | None) -> None:
    frame = framed(FrameKind.HELLO, struct.pack("<H", version) + b"who knows")
    if head is not None:
        frame = struct.pack("<2sBBIQ", b"KV", 1, 0, len(head), 0) + head
    with pytest.raises(Incompatible) as caught:
        parse(frame)
    assert (caught.value.ours, caught.value.theirs) == ("2", str(version))
