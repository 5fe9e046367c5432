from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Incompatible, ProtocolViolation
from core.fingerprint import CacheFingerprint
from kv_transfer.frames import (
    HEADER_BYTES,
    KEEPALIVE,
    MAX_HEAD_BYTES,
    MAX_WRITE_PAYLOAD_BYTES,
    FrameKind,
    Hello,
    LinkRole,
    pack_hello,
    pack_message,
    pack_write,
    parse_header,
    parse_hello,
    parse_write,
)
from kv_transfer.transport import PageSpan

FINGERPRINT = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")
HELLO = Hello(LinkRole.SENDS_PAGES, bytes(range(16)), FINGERPRINT)
TOKEN = bytes(16)
u32 = st.integers(0, 2**32 - 1)
texts = st.text(max_size=30)


@given(
    role=st.sampled_from(LinkRole),
    key=st.binary(min_size=16, max_size=16),
    fingerprint=st.builds(CacheFingerprint, texts, texts, texts, u32, texts),
)
def test_a_hello_is_read_as_it_was_written(role: LinkRole, key: bytes, fingerprint: CacheFingerprint) -> None:
    frame = pack_hello(Hello(role, key, fingerprint))
    header = parse_header(frame[:HEADER_BYTES])
    assert (header.kind, header.head_bytes) == (FrameKind.HELLO, len(frame) - HEADER_BYTES)
    assert parse_hello(frame[HEADER_BYTES:]) == Hello(role, key, fingerprint)


@given(
    token=st.binary(min_size=16, max_size=16),
    layer=u32,
    spans=st.lists(st.tuples(u32, st.integers(1, 2**32 - 1)), min_size=1, max_size=20),
    payload_bytes=st.integers(0, MAX_WRITE_PAYLOAD_BYTES),
)
def test_a_write_is_read_as_it_was_written(
    token: bytes, layer: int, spans: list[tuple[int, int]], payload_bytes: int
) -> None:
    frame = pack_write(token, layer, spans, payload_bytes)
    header = parse_header(frame[:HEADER_BYTES])
    head = parse_write(frame[HEADER_BYTES:])
    assert (header.kind, header.payload_bytes) == (FrameKind.WRITE, payload_bytes)
    assert (head.token, head.layer) == (token, layer)
    assert head.spans == tuple(PageSpan(first, count) for first, count in spans)


def test_a_message_is_its_head_and_a_keepalive_is_nothing() -> None:
    frame = pack_message(b"hello")
    assert parse_header(frame[:HEADER_BYTES]).kind is FrameKind.MESSAGE
    assert frame[HEADER_BYTES:] == b"hello"
    assert parse_header(KEEPALIVE).kind is FrameKind.KEEPALIVE


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_any_header_is_bounded_or_a_violation(data: bytes) -> None:
    try:
        header = parse_header(data)
    except ProtocolViolation:
        return
    assert header.head_bytes <= MAX_HEAD_BYTES
    assert header.payload_bytes <= MAX_WRITE_PAYLOAD_BYTES


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(struct.pack("<2sBBIQ", b"GE", 2, 0, 0, 0), id="magic"),
        pytest.param(struct.pack("<2sBBIQ", b"KV", 9, 0, 0, 0), id="kind"),
        pytest.param(struct.pack("<2sBBIQ", b"KV", 2, 1, 0, 0), id="zero byte"),
        pytest.param(struct.pack("<2sBBIQ", b"KV", 3, 0, 2**31, 0), id="huge head"),
        pytest.param(struct.pack("<2sBBIQ", b"KV", 2, 0, 32, 2**40), id="huge payload"),
        pytest.param(struct.pack("<2sBBIQ", b"KV", 3, 0, 10, 1), id="message with payload"),
        pytest.param(struct.pack("<2sBBIQ", b"KV", 4, 0, 1, 0), id="keepalive with head"),
    ],
)
def test_a_wrong_header_is_a_violation(header: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        parse_header(header)


@given(st.binary(max_size=120))
def test_any_write_head_parses_or_is_a_violation(data: bytes) -> None:
    try:
        head = parse_write(data)
    except ProtocolViolation:
        return
    assert head.num_pages >= 1


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(struct.pack("<16sIBBHQII", TOKEN, 0, 1, 0, 1, 0, 0, 1), id="codec"),
        pytest.param(struct.pack("<16sIBBHQII", TOKEN, 0, 0, 1, 1, 0, 0, 1), id="checksum algorithm"),
        pytest.param(struct.pack("<16sIBBHQ", TOKEN, 0, 0, 0, 0, 0), id="no spans"),
        pytest.param(struct.pack("<16sIBBHQII", TOKEN, 0, 0, 0, 2, 0, 0, 1), id="fewer spans than said"),
        pytest.param(struct.pack("<16sIBBHQII", TOKEN, 0, 0, 0, 1, 0, 0, 0), id="empty span"),
    ],
)
def test_a_wrong_write_head_is_a_violation(head: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        parse_write(head)


@given(st.binary(max_size=120))
def test_any_hello_parses_or_is_refused(data: bytes) -> None:
    try:
        hello = parse_hello(data)
    except (ProtocolViolation, Incompatible):
        return
    assert pack_hello(hello)[HEADER_BYTES:] == data


@given(st.data())
def test_a_hello_that_is_cut_anywhere_is_a_violation(data: st.DataObject) -> None:
    head = pack_hello(HELLO)[HEADER_BYTES:]
    with pytest.raises(ProtocolViolation):
        parse_hello(head[: data.draw(st.integers(0, len(head) - 1))])


def test_a_hello_of_another_version_is_incompatible_whatever_follows() -> None:
    with pytest.raises(Incompatible) as caught:
        parse_hello(struct.pack("<H", 7) + b"who knows")
    assert caught.value.theirs == "7"
