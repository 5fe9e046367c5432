"""Peers that do not keep to the protocol, played with a bare socket; who may dial whom."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from core.errors import Incompatible, PeerLost, ProtocolViolation
from kv_transfer.codec import Codec
from kv_transfer.config import LinkConfig
from kv_transfer.frames import HEADER_BYTES, KEEPALIVE, LinkRole, pack_barrier, pack_message, pack_write
from kv_transfer.spans import Spans
from kv_transfer.transport import Span
from tests.unit.kv_transfer.tcp_peers import (
    FINGERPRINT,
    PAGE_BYTES,
    PATIENCE_S,
    TOKEN,
    A,
    Worker,
    make_worker,
    opening,
    write,
)

PAYLOAD = random.Random(5).randbytes(PAGE_BYTES)
SPANS = Spans([Span(0, PAGE_BYTES)])


@pytest.fixture
def decode() -> Iterator[Worker]:
    worker = make_worker()
    yield worker
    worker.transport.close()
    alive = [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")]
    assert alive == [], "a closed transport leaves no thread"


def dial(worker: Worker) -> socket.socket:
    return socket.create_connection(("127.0.0.1", worker.descriptor.port), timeout=PATIENCE_S)


def greeted(worker: Worker, **hello: object) -> socket.socket:
    """A connection that has shaken hands and was heard."""
    connection = dial(worker)
    connection.sendall(opening(worker, **hello))  # type: ignore[arg-type]
    answer = opening(worker, role=LinkRole.RECEIVES_PAGES, key=bytes(16))
    head_bytes = struct.unpack_from("<I", connection.recv(HEADER_BYTES, socket.MSG_WAITALL), 4)[0]
    connection.recv(head_bytes, socket.MSG_WAITALL)
    assert answer[:2] == b"KV"
    assert connection.recv(len(KEEPALIVE), socket.MSG_WAITALL) == KEEPALIVE
    return connection


def say_and_finish(connection: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # the peer may have closed after the first bytes
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def read_to_end(connection: socket.socket) -> bytes:
    """What the peer still says before it closes; a reset is a close, too."""
    data = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(4096):
            data += part
    connection.close()
    return data


def write_frame(payload: bytes = PAYLOAD, *, token: bytes = TOKEN, checksum: int | None = None) -> bytes:
    summed = xxh3_64_intdigest(payload) if checksum is None else checksum
    return pack_write(token, range(1), SPANS, len(payload), Codec.RAW, summed) + payload


# ---- strangers ----


@pytest.mark.parametrize(
    "stranger", ["http", "zeros", "no hello", "cut short", "wrong key", "no such link", "version 9"]
)
def test_a_stranger_reaches_nothing_and_is_counted(decode: Worker, stranger: str) -> None:
    hello = opening(decode)
    said = {
        "http": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        "zeros": bytes(64),
        "no hello": KEEPALIVE,
        "cut short": hello[:-3],
        "wrong key": opening(decode, key=bytes(16)),
        "no such link": opening(decode, index=1, num_connections=2),
        "version 9": hello[:HEADER_BYTES] + b"\x09\x00" + hello[HEADER_BYTES + 2 :],
    }[stranger]
    connection = dial(decode)
    say_and_finish(connection, said)
    assert read_to_end(connection) == b""
    decode.received.until(lambda: decode.transport.counters.links_refused == 1)
    assert decode.received.told == []


def test_a_peer_of_the_first_version_is_told_ours(decode: Worker) -> None:
    head = struct.pack("<HB16sI", 1, 1, decode.descriptor.key, 16) + 4 * b"\0\0"
    connection = dial(decode)
    connection.sendall(struct.pack("<2sBBIQ", b"KV", 1, 0, len(head), 0) + head)
    answer = read_to_end(connection)
    assert struct.unpack_from("<H", answer, HEADER_BYTES) == (2,)
    decode.received.until(lambda: decode.transport.counters.links_refused == 1)


def test_a_peer_with_another_cache_is_told_ours(decode: Worker) -> None:
    connection = dial(decode)
    connection.sendall(opening(decode, fingerprint=replace(FINGERPRINT, model="another")))
    assert b"bfloat16" in read_to_end(connection)
    decode.received.until(lambda: decode.transport.counters.links_refused == 1)
    assert decode.received.told == []


@given(st.binary(min_size=1, max_size=200))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_in_place_of_a_handshake_changes_nothing(decode: Worker, noise: bytes) -> None:
    before = decode.transport.counters.links_refused
    connection = dial(decode)
    say_and_finish(connection, noise)
    assert read_to_end(connection) == b""
    decode.received.until(lambda: decode.transport.counters.links_refused == before + 1)
    assert decode.received.told == []


@given(st.integers(min_value=0))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_of_the_handshake_is_a_refusal(decode: Worker, bit: int) -> None:
    before = decode.transport.counters.links_refused
    hello = bytearray(opening(decode))
    hello[bit // 8 % len(hello)] ^= 1 << bit % 8
    connection = dial(decode)
    say_and_finish(connection, bytes(hello))
    read_to_end(connection)
    decode.received.until(lambda: decode.transport.counters.links_refused == before + 1)
    assert decode.received.told == []


def test_a_transport_closes_at_once_while_a_stranger_says_nothing(decode: Worker) -> None:
    connection = dial(decode)
    connection.sendall(b"KV")
    decode.transport.close()
    assert read_to_end(connection) == b""


# ---- after the handshake ----


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(random.Random(3).randbytes(500), id="noise"),
        pytest.param(b"hello again", id="second hello"),
        pytest.param(pack_barrier(1), id="barrier on the control connection"),
        pytest.param(pack_write(bytes(16), range(1), SPANS, PAGE_BYTES - 1), id="fewer bytes than spans"),
        pytest.param(pack_write(bytes(16), range(1), SPANS, PAGE_BYTES + 1), id="more bytes than spans"),
    ],
)
def test_a_frame_that_makes_no_sense_ends_the_link(decode: Worker, frame: bytes) -> None:
    connection = greeted(decode)
    say_and_finish(connection, opening(decode) if frame == b"hello again" else frame)
    read_to_end(connection)
    assert isinstance(decode.received.until_lost(), ProtocolViolation)
    assert decode.transport.counters.bad_frames == 1


@given(st.integers(min_value=0))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_anywhere_in_a_write_is_found(decode: Worker, bit: int) -> None:
    """In its head: the connection ends. In its payload: the write is damaged and the link lives. It never lands."""
    decode.received.told.clear()
    before = decode.transport.counters
    frame = write_frame()
    head_bytes = len(frame) - PAGE_BYTES
    at = bit // 8 % (2 * head_bytes)  # heads and payloads alike
    damaged = bytearray(frame)
    damaged[at] ^= 1 << bit % 8
    connection = greeted(decode)
    connection.sendall(damaged + pack_message(0, b"behind it"))
    if at < head_bytes:
        read_to_end(connection)
        assert isinstance(decode.received.until_lost(), ProtocolViolation)
        assert decode.transport.counters.bad_frames == before.bad_frames + 1
    else:
        told = decode.received.until_told("notified", b"behind it")
        assert [what[0] for what in told] == ["admit", "damaged", "notified"]
        assert decode.transport.counters.writes_damaged == before.writes_damaged + 1
        connection.close()
        decode.received.until_lost()
    assert decode.received.count("landed") == 0


@pytest.mark.parametrize("frame", [KEEPALIVE, pack_message(0, b"a message")])
def test_a_flipped_bit_anywhere_in_a_small_frame_ends_the_link(frame: bytes) -> None:
    for at in range(len(frame)):
        worker = make_worker()
        damaged = bytearray(frame)
        damaged[at] ^= 1 << at % 8
        connection = greeted(worker)
        connection.sendall(damaged)
        assert isinstance(worker.received.until_lost(), ProtocolViolation)
        assert worker.received.count("notified") == 0
        connection.close()
        worker.transport.close()


def test_a_write_without_a_checksum_lands_and_a_refused_one_is_thrown_away(decode: Worker) -> None:
    connection = greeted(decode)
    connection.sendall(write_frame(token=bytes(16)))
    connection.sendall(pack_write(TOKEN, range(1), SPANS, PAGE_BYTES) + PAYLOAD + pack_message(0, b"end"))
    told = decode.received.until_told("notified", b"end")
    assert [what[0] for what in told] == ["admit", "admit", "landed", "notified"]
    assert decode.page(0, 0) == PAYLOAD
    assert decode.transport.counters.writes_refused == 1
    connection.close()


@pytest.mark.parametrize("cut", [1, HEADER_BYTES, HEADER_BYTES + 5, -1])
def test_a_stream_that_ends_within_a_write_ends_the_link(decode: Worker, cut: int) -> None:
    connection = greeted(decode)
    connection.sendall(write_frame()[:cut])
    connection.close()
    error = decode.received.until_lost()
    assert isinstance(error, PeerLost)
    assert "middle of a frame" in str(error)
    assert decode.received.count("landed") == 0
    assert decode.received.count("admit") == decode.received.count("damaged") == (1 if cut == -1 else 0)
    assert decode.transport.counters.writes_damaged == decode.received.count("damaged")


@pytest.mark.parametrize("codec", [Codec.LOSSLESS, Codec.INT8])
@pytest.mark.parametrize("payload", [b"\xff" * 64, bytes(2 * PAGE_BYTES)])
def test_an_encoded_payload_that_cannot_be_one_is_a_violation_and_lands_nothing(
    decode: Worker, codec: Codec, payload: bytes
) -> None:
    connection = greeted(decode)
    frame = pack_write(TOKEN, range(1), SPANS, len(payload), codec, xxh3_64_intdigest(payload))
    say_and_finish(connection, frame + payload)
    read_to_end(connection)
    assert isinstance(decode.received.until_lost(), ProtocolViolation)
    assert [what[0] for what in decode.received.told] == ["admit", "damaged", "lost"]


# ---- the end that dials ----


@pytest.mark.parametrize("answer", [b"220 smtp.example.com ESMTP ready", b"", "hello of a sender"])
def test_a_peer_that_answers_the_handshake_wrongly_is_an_error(decode: Worker, answer: bytes | str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        descriptor = replace(decode.descriptor, port=server.getsockname()[1])
        decode.transport.connect(descriptor.pack(), decode.sent)
        connection, _ = server.accept()
        with connection:
            say_and_finish(connection, opening(decode) if isinstance(answer, str) else answer)
            error = decode.sent.until_lost()
    assert isinstance(error, PeerLost if answer == b"" else ProtocolViolation)


def test_a_link_can_be_closed_while_it_is_dialled(decode: Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        descriptor = replace(decode.descriptor, port=server.getsockname()[1])
        link = decode.transport.connect(descriptor.pack(), decode.sent)
        connection, _ = server.accept()
        with connection:
            link.close(PeerLost("enough"))
            assert str(decode.sent.until_lost()) == "enough"


def test_a_receiver_that_dials_a_sender_with_another_cache_is_incompatible_at_once() -> None:
    link = LinkConfig(connections=2, dial="receiver")
    prefill = make_worker(link=link)
    decode = make_worker(link=link, fingerprint=replace(FINGERPRINT, layout="other"))
    try:
        decode.transport.invite(prefill.transport.describe())
        prefill.sent.until(lambda: prefill.transport.counters.links_refused)
        prefill.transport.connect(decode.transport.describe(), prefill.sent)
        error = prefill.sent.until_lost()
        assert isinstance(error, Incompatible)
        assert error.field == "layout"
    finally:
        prefill.transport.close()
        decode.transport.close()


@pytest.mark.parametrize("invited_first", [True, False])
def test_a_link_that_the_receiver_dials_serves_whoever_comes_second(invited_first: bool) -> None:
    link_config = LinkConfig(connections=3, dial="receiver")
    prefill, decode = make_worker(link=link_config, fill=1, name="p"), make_worker(link=link_config, name="d")
    try:
        if invited_first:
            decode.transport.invite(prefill.transport.describe())
            prefill.sent.until(lambda: prefill.transport.stats())
        link = prefill.transport.connect(decode.transport.describe(), prefill.sent)
        decode.transport.invite(prefill.transport.describe())
        link.write(write(3))
        link.notify(A, b"end")
        decode.received.until_told("notified", b"end")
        assert decode.page(0, 3) == prefill.page(0, 3)
        prefill.sent.until(lambda: prefill.transport.stats()[0].connections == 3)
        assert prefill.transport.stats()[0].peer.worker_id == "d"
    finally:
        prefill.transport.close()
        decode.transport.close()


def test_ipv6_is_spoken_where_the_host_has_it() -> None:
    try:
        prefill, decode = make_worker(host="::1", fill=1), make_worker(host="::1")
    except OSError:
        pytest.skip("no IPv6 loopback here")
    try:
        link = prefill.transport.connect(decode.transport.describe(), prefill.sent)
        link.write(write(3))
        link.notify(A, b"end")
        decode.received.until_told("notified", b"end")
        assert decode.page(0, 3) == prefill.page(0, 3)
    finally:
        prefill.transport.close()
        decode.transport.close()


def test_workers_of_one_host_take_the_next_free_port_of_those_that_are_open(decode: Worker) -> None:
    first = decode.descriptor.port
    another = make_worker(port=first, last_port=min(first + 20, 65535))
    try:
        assert first < another.descriptor.port <= first + 20
        with pytest.raises(OSError, match="in use"):
            make_worker(port=first, last_port=first)
    finally:
        another.transport.close()
