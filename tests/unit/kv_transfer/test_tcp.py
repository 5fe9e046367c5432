"""Peers that do not keep to the protocol, played with a bare socket."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Condition
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.clock import WallClock
from core.errors import PeerLost, ProtocolViolation, TransferError
from core.fingerprint import CacheFingerprint
from core.request import SessionId
from kv_transfer.config import KvTransferConfig
from kv_transfer.frames import HEADER_BYTES, KEEPALIVE, Hello, LinkRole, pack_hello, pack_message, pack_write
from kv_transfer.messages import Begin, encode
from kv_transfer.receiver import KvReceiver
from kv_transfer.tcp import TcpTransport
from kv_transfer.transport import LayerPages, PageGeometry, Region

FINGERPRINT = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")
PAGE_BYTES = 64
NUM_PAGES = 8
A = SessionId("a")
PATIENCE_S = 20.0


class Decode:
    """A receiving transport with one grant of pages 2 and 3, and what became of it."""

    def __init__(self) -> None:
        config = KvTransferConfig(host="127.0.0.1", lease_s=5.0)
        self.transport = TcpTransport(config, FINGERPRINT, WallClock())
        self.layers = [bytearray(NUM_PAGES * PAGE_BYTES) for _ in range(2)]
        geometry = PageGeometry((LayerPages(PAGE_BYTES),) * 2, NUM_PAGES)
        self.transport.register(Region(geometry, tuple(memoryview(layer) for layer in self.layers)))
        self.changed = Condition()
        self.committed: list[SessionId] = []
        self.released: list[TransferError] = []
        self.receiver = KvReceiver(self.transport, WallClock(), self._on_committed, self._on_released, 5.0)
        self.grant = self.receiver.issue(A, 0, (2, 3))

    def _on_committed(self, session_id: SessionId, payload: bytes) -> None:
        self.committed.append(session_id)

    def _on_released(self, session_id: SessionId, error: TransferError) -> None:
        with self.changed:
            self.released.append(error)
            self.changed.notify_all()

    def release(self) -> TransferError:
        with self.changed:
            assert self.changed.wait_for(lambda: self.released, PATIENCE_S)
        return self.released[0]

    def until(self, enough: Callable[[], bool]) -> None:
        with self.changed:
            assert any(self.changed.wait_for(enough, 0.01) for _ in range(2000))

    def dial(self) -> socket.socket:
        _, port, _ = struct.unpack_from("<5sH16s", self.grant.descriptor)
        return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)

    def greeted(self) -> socket.socket:
        """A connection that has shaken hands and begun the session."""
        connection = self.dial()
        connection.sendall(pack_hello(Hello(LinkRole.SENDS_PAGES, self.transport.key, FINGERPRINT)))
        answer = pack_hello(Hello(LinkRole.RECEIVES_PAGES, bytes(16), FINGERPRINT))
        assert connection.recv(len(answer), socket.MSG_WAITALL) == answer
        connection.sendall(pack_message(encode(Begin(A, self.grant.token))))
        return connection

    def close(self) -> None:
        self.receiver.close()
        self.transport.close()
        assert self.receiver.num_quarantined == 0


@pytest.fixture
def decode() -> Iterator[Decode]:
    end = Decode()
    yield end
    end.close()


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


def hello(**differs: Any) -> bytes:
    fields: dict[str, Any] = {"role": LinkRole.SENDS_PAGES, "key": bytes(16), "fingerprint": FINGERPRINT, **differs}
    return pack_hello(Hello(**fields))


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", id="http"),
        pytest.param(bytes(64), id="zeros"),
        pytest.param(KEEPALIVE, id="no hello"),
        pytest.param(hello()[:-3], id="cut short"),
        pytest.param(hello(), id="wrong access key"),
    ],
)
def test_a_stranger_is_told_nothing_and_counted(decode: Decode, opening: bytes) -> None:
    connection = decode.dial()
    say_and_finish(connection, opening)
    assert read_to_end(connection) == b""
    decode.until(lambda: decode.transport.counters.links_refused == 1)
    assert decode.released == []


def test_a_peer_of_another_version_is_told_ours(decode: Decode) -> None:
    opening = bytearray(hello(key=decode.transport.key))
    struct.pack_into("<H", opening, HEADER_BYTES, 9)
    connection = decode.dial()
    connection.sendall(opening)
    answer = read_to_end(connection)
    assert struct.unpack_from("<H", answer, HEADER_BYTES) == (1,)
    assert decode.transport.counters.links_refused == 1


@given(st.binary(min_size=1, max_size=200))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_in_place_of_a_handshake_changes_nothing(decode: Decode, noise: bytes) -> None:
    before = decode.transport.counters.links_refused
    connection = decode.dial()
    say_and_finish(connection, noise)
    assert read_to_end(connection) == b""
    decode.until(lambda: decode.transport.counters.links_refused == before + 1)
    assert decode.receiver.num_sessions == 1


def test_noise_after_the_handshake_ends_the_link_and_its_session(decode: Decode) -> None:
    connection = decode.greeted()
    say_and_finish(connection, random.Random(3).randbytes(500))
    read_to_end(connection)
    assert isinstance(decode.release(), ProtocolViolation)
    assert decode.transport.counters.bad_frames == 1


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(hello(), id="second hello"),
        pytest.param(pack_message(b"\x77"), id="message of no kind"),
        pytest.param(pack_write(bytes(16), 0, [(2, 1)], PAGE_BYTES - 1), id="fewer bytes than pages"),
        pytest.param(pack_write(bytes(16), 1, [(2, 2**32 - 1)], PAGE_BYTES), id="more pages than bytes"),
    ],
)
def test_a_frame_that_makes_no_sense_ends_the_link(decode: Decode, frame: bytes) -> None:
    connection = decode.greeted()
    connection.sendall(frame)
    read_to_end(connection)
    assert isinstance(decode.release(), ProtocolViolation)
    assert decode.transport.counters.bad_frames == 1


@pytest.mark.parametrize(
    ("layer", "spans"), [(7, [(2, 1)]), (2**32 - 1, [(2, 1)]), (0, [(1, 1)]), (0, [(3, 2)]), (0, [(2**32 - 1, 1)])]
)
def test_the_payload_of_a_write_outside_the_grant_is_thrown_away(
    decode: Decode, layer: int, spans: list[tuple[int, int]]
) -> None:
    connection = decode.greeted()
    payload = b"\xff" * PAGE_BYTES * sum(count for _, count in spans)
    connection.sendall(pack_write(decode.grant.token, layer, spans, len(payload)) + payload + KEEPALIVE)
    decode.until(lambda: decode.transport.counters.writes_refused == 1)
    decode.until(lambda: decode.receiver.num_quarantined == 2)
    connection.close()
    assert isinstance(decode.release(), ProtocolViolation)
    assert not any(any(layer) for layer in decode.layers)


@pytest.mark.parametrize("cut", [1, HEADER_BYTES, HEADER_BYTES + 5, -1])
def test_a_stream_that_ends_within_a_write_releases_its_pages(decode: Decode, cut: int) -> None:
    frame = pack_write(decode.grant.token, 0, [(2, 2)], 2 * PAGE_BYTES) + bytes(2 * PAGE_BYTES)
    connection = decode.greeted()
    connection.sendall(frame[:cut])
    connection.close()
    error = decode.release()
    assert isinstance(error, PeerLost)
    assert "middle of a frame" in str(error)
    assert decode.receiver.bytes_received == 0


def test_a_peer_that_answers_the_handshake_with_noise_is_a_violation(decode: Decode) -> None:
    told: list[TransferError] = []
    changed = Condition()

    class Events:
        def lost(self, link: Any, error: TransferError) -> None:
            with changed:
                told.append(error)
                changed.notify_all()

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        descriptor = struct.pack("<5sH16s", b"tcp/1", port, bytes(16)) + b"127.0.0.1"
        decode.transport.connect(descriptor, Events())  # type: ignore[arg-type]
        connection, _ = server.accept()
        connection.sendall(b"220 smtp.example.com ESMTP ready")
        with changed:
            assert changed.wait_for(lambda: told, PATIENCE_S)
        connection.close()
    assert isinstance(told[0], ProtocolViolation)


def test_a_peer_with_another_cache_is_told_ours(decode: Decode) -> None:
    connection = decode.dial()
    other = CacheFingerprint("another", "revision", "bfloat16", 16, "layout")
    connection.sendall(hello(key=decode.transport.key, fingerprint=other))
    answer = read_to_end(connection)
    assert answer == hello(role=LinkRole.RECEIVES_PAGES)
    assert decode.transport.counters.links_refused == 1
