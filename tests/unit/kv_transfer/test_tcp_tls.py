"""Links under mutual TLS: who is let in, who is not, and what both ends say of it."""

from __future__ import annotations

import gc
import random
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.certificates import Authority, write_files
from core.clock import WallClock
from core.credentials import Credentials
from core.errors import PeerLost, Unauthenticated
from kv_transfer.config import LinkConfig
from kv_transfer.tcp_stream import Stream
from tests.unit.kv_transfer.tcp_peers import NUM_PAGES, PATIENCE_S, A, Relay, Worker, make_worker, opening, write

Make = Callable[..., Worker]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("service")


@pytest.fixture(scope="module")
def good(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return write_files(tmp_path_factory.mktemp("good"), authority.issue("worker"), authority)


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Worker] = []

    def make_one(credentials: Credentials | None, **kwargs: object) -> Worker:
        made.append(make_worker(credentials=credentials, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make_one
    for worker in made:
        worker.transport.close()


def bad_credentials(kind: str, authority: Authority, directory: Path) -> Credentials | None:
    match kind:
        case "none":
            return None
        case "expired":
            return write_files(directory, authority.issue("worker", days=-0.01), authority)
        case "another authority":
            stranger = Authority.create("stranger")
            return write_files(directory, stranger.issue("worker"), stranger)
    raise AssertionError(kind)


def test_pages_travel_encrypted_and_the_path_says_so(make: Make, good: Credentials) -> None:
    prefill, decode = make(good, fill=1), make(good)
    seen: list[bytes] = []

    def watch(connection: int, data: bytes) -> bytes:
        seen.append(data)
        return data

    relay = Relay(decode, watch)
    link = prefill.transport.connect(relay.descriptor, prefill.sent)
    for page in range(NUM_PAGES):
        link.write(write(page))
        link.write(write(page, layer=1))
    link.notify(A, b"a message in the clear")
    decode.received.until_told("notified", b"a message in the clear")
    assert decode.pool == prefill.pool
    assert prefill.transport.stats()[0].path == "tcp+tls1.3"
    wire = b"".join(seen)
    assert b"a message in the clear" not in wire
    assert prefill.page(0, 0)[:32] not in wire
    prefill.transport.close()
    relay.close()


def test_both_ends_may_talk_at_once(make: Make, good: Credentials) -> None:
    """OpenSSL does not bear two threads on one connection; messages come back here while pages go out."""
    prefill, decode = make(good, fill=1, link=LinkConfig(connections=1)), make(good)
    link = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    link.notify(A, b"hello")
    decode.received.until_told("notified", b"hello")
    (end,) = decode.transport._ends
    for i in range(300):
        link.write(write(i % NUM_PAGES, num_pages=1))
        end.notify(A, b"%d" % i)
    link.notify(A, b"end")
    decode.received.until_told("notified", b"end")
    told = prefill.sent.until_told("notified", b"299")
    assert [what[1] for what in told if what[0] == "notified"] == [b"%d" % i for i in range(300)]
    assert decode.pool[0] == prefill.pool[0]


@pytest.mark.parametrize("dial", ["sender", "receiver"])
@pytest.mark.parametrize("wrong_end", ["prefill", "decode"])
@pytest.mark.parametrize("kind", ["none", "expired", "another authority"])
def test_a_worker_without_a_valid_certificate_gets_no_link(
    make: Make, good: Credentials, authority: Authority, tmp_path: Path, kind: str, wrong_end: str, dial: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("kv_transfer.tcp_ends.HANDSHAKE_S", 1.0)  # how long a link waits to be dialled
    bad = bad_credentials(kind, authority, tmp_path)
    link_config = LinkConfig(connections=2, dial=dial)
    prefill = make(bad if wrong_end == "prefill" else good, fill=1, link=link_config)
    decode = make(bad if wrong_end == "decode" else good, link=link_config)
    decode.transport.invite(prefill.transport.describe())
    link = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    link.write(write(0))
    link.notify(A, b"end")
    error = prefill.sent.until_lost()
    assert isinstance(error, Unauthenticated | PeerLost)
    accepting = decode if dial == "sender" else prefill
    accepting.received.until(lambda: accepting.transport.counters.links_refused >= 1)
    assert decode.received.told == []
    assert not any(decode.pool[0])
    assert link.cancel(A) is True


def test_the_end_that_refuses_says_why(
    make: Make, good: Credentials, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decode = make(bad_credentials("expired", authority, tmp_path))
    prefill = make(good)
    prefill.transport.connect(decode.transport.describe(), prefill.sent)
    error = prefill.sent.until_lost()
    assert isinstance(error, Unauthenticated)
    assert "expired" in str(error)


def said_to(connection: socket.socket, opening: bytes) -> bytes:
    """What a stranger is told who opens so; a reset is an answer of nothing."""
    said = b""
    with suppress(ConnectionError, ssl.SSLError):
        connection.sendall(opening)
        while part := connection.recv(4096):
            said += part
    return said


def test_the_access_key_opens_nothing_without_a_certificate(make: Make, good: Credentials) -> None:
    decode = make(good)
    address = ("127.0.0.1", decode.descriptor.port)
    with socket.create_connection(address, timeout=PATIENCE_S) as connection:
        assert b"KV" not in said_to(connection, opening(decode))
    decode.received.until(lambda: decode.transport.counters.links_refused == 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(good.ca_file)
    context.check_hostname = False
    with socket.create_connection(address, timeout=PATIENCE_S) as connection:
        with context.wrap_socket(connection) as tls:
            assert said_to(tls, opening(decode)) == b""
    decode.received.until(lambda: decode.transport.counters.links_refused == 2)
    assert decode.received.told == []


def test_a_certificate_without_the_access_key_opens_nothing(make: Make, good: Credentials) -> None:
    decode = make(good)
    with socket.create_connection(("127.0.0.1", decode.descriptor.port), timeout=PATIENCE_S) as connection:
        with good.client_context().wrap_socket(connection) as tls:
            assert said_to(tls, opening(decode, key=bytes(16))) == b""
    decode.received.until(lambda: decode.transport.counters.links_refused == 1)


def test_a_bit_that_flips_on_the_way_never_lands(make: Make, good: Credentials) -> None:
    """A record that fails its authentication ends its connection, and with one connection the link."""
    prefill, decode = make(good, fill=1, link=LinkConfig(connections=1)), make(good)
    passed = 0

    def flip(connection: int, data: bytes) -> bytes:
        nonlocal passed
        before, passed = passed, passed + len(data)
        if before <= 1_000_000 < passed:
            at = 1_000_000 - before
            return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        return data

    relay = Relay(decode, flip)
    link = prefill.transport.connect(relay.descriptor, prefill.sent)
    link.write(write(0, num_pages=NUM_PAGES))
    assert isinstance(decode.received.until_lost(), PeerLost)
    assert [what[0] for what in decode.received.told] == ["admit", "damaged", "lost"]
    assert isinstance(prefill.sent.until_lost(), PeerLost)
    prefill.transport.close()
    relay.close()


def test_new_certificates_serve_new_links_and_old_links_go_on(make: Make, authority: Authority, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    mine = write_files(here, authority.issue("p"), authority)
    theirs = write_files(there, authority.issue("d"), authority)
    prefill, decode = make(mine, fill=1), make(theirs)
    link = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    link.notify(A, b"before")
    decode.received.until_told("notified", b"before")
    other = Authority.create("new authority")
    for directory, name in ((here, "p2"), (there, "d2")):
        for file in directory.iterdir():
            file.unlink()
        write_files(directory, other.issue(name), other)
    link.notify(A, b"still")
    decode.received.until_told("notified", b"still")
    second = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    second.write(write(random.Random(1).randrange(NUM_PAGES)))
    second.notify(A, b"after")
    decode.received.until_told("notified", b"after")


def test_a_peer_that_resets_before_the_handshake_leaves_no_socket_open(good: Credentials) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
    stream = Stream(ours, WallClock(), "the peer")
    with pytest.raises(ConnectionResetError):
        stream.secured(good.client_context(), accepted=False)
    stream.close()
    gc.collect()  # an unclosed socket would warn, and a warning fails the test
