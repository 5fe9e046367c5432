"""NIXL itself, over shared memory and TCP of this host: what the contract suite (tests/contract) does not ask."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Condition
from typing import Any

import pytest

from core.clock import WallClock
from core.errors import InvalidConfig, PeerLost, ProtocolViolation, TransferError
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, SessionId, WorkerId
from kv_transfer.config import KvTransferConfig, LinkConfig
from kv_transfer.nixl_notes import NoteKind, Role, pack_note, pack_number
from kv_transfer.transport import (
    LayerPages,
    Link,
    PageGeometry,
    PeerIdentity,
    Region,
    SendLink,
    Span,
    Strip,
    Transport,
    Write,
    create_transport,
)

pytest.importorskip("nixl", reason="pip install 'prfaas[nixl]'")

ROOT = Path(__file__).resolve().parents[3]
FINGERPRINT = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")
PAGE_BYTES, NUM_PAGES, NUM_LAYERS = 4096, 512, 3
GEOMETRY = PageGeometry((LayerPages(PAGE_BYTES),) * NUM_LAYERS, NUM_PAGES)
A = SessionId("a")
TOKEN = bytes(range(16))
PATIENCE_S = 30.0


@dataclass
class Events:
    """Both ends' events of one transport, as a list that a test can wait on."""

    told: list[tuple[Any, ...]] = field(default_factory=list)
    changed: Condition = field(default_factory=Condition)
    links: list[Any] = field(default_factory=list)

    def tell(self, *what: Any) -> None:
        with self.changed:
            self.told.append(what)
            self.changed.notify_all()

    def until(self, enough: Callable[[], bool]) -> None:
        """Wait for any state of the world; looked at when something is told and every 10 ms."""
        with self.changed:
            assert any(self.changed.wait_for(enough, 0.01) for _ in range(int(PATIENCE_S * 100))), self.told

    def until_told(self, *what: Any) -> None:
        self.until(lambda: what in self.told)

    def until_lost(self) -> TransferError:
        self.until(lambda: any(what[0] == "lost" for what in self.told))
        (error,) = [what[1] for what in self.told if what[0] == "lost"]
        assert self.told[-1][0] == "lost"
        assert isinstance(error, TransferError)
        return error

    def admit(self, link: Link, token: bytes, layers: range, spans: Sequence[Span]) -> SessionId | None:
        return A if token == TOKEN else None

    def landed(self, link: Link, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        self.tell("landed", layers, spans)

    def damaged(self, link: Link, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        self.tell("damaged", layers, spans)

    def written(self, link: SendLink, write: Write) -> None:
        self.tell("written", write)

    def drained(self, link: SendLink, session_id: SessionId) -> None:
        self.tell("drained", session_id)

    def notified(self, link: Any, message: bytes) -> None:
        self.links.append(link)
        self.tell("notified", message)

    def lost(self, link: Any, error: TransferError) -> None:
        self.tell("lost", error)


@dataclass
class End:
    transport: Transport
    region: Region
    received: Events = field(default_factory=Events)
    sent: Events = field(default_factory=Events)

    def layer(self, layer: int) -> bytes:
        return bytes(self.region.pages(layer, 0, NUM_PAGES))


MakeEnd = Callable[..., End]


def make_region(seed: int | None) -> Region:
    size = PAGE_BYTES * NUM_PAGES
    layers = [bytearray(size if seed is None else random.Random(seed + i).randbytes(size)) for i in range(NUM_LAYERS)]
    return Region(GEOMETRY, tuple(memoryview(layer) for layer in layers))


@pytest.fixture
def make_end() -> Iterator[MakeEnd]:
    ends: list[End] = []

    def make(seed: int | None = None, **config: Any) -> End:
        settings = {"transport": "nixl", "host": "127.0.0.1", "staging_mib": 1, **config}
        identity = PeerIdentity(WorkerId(f"worker{len(ends)}"), ClusterId("here"))
        transport = create_transport(KvTransferConfig(**settings), FINGERPRINT, WallClock(), identity)
        end = End(transport, make_region(seed))
        transport.register(end.region)
        transport.serve(end.received)
        ends.append(end)
        return end

    yield make
    for end in ends:
        end.transport.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-nixl")] == []


def random_writes(dice: random.Random, sizes: Sequence[int]) -> list[Write]:
    """Every page of every layer once, to another page, in writes of ``sizes`` pages and one or all layers."""
    src, dst = dice.sample(range(NUM_PAGES), NUM_PAGES), dice.sample(range(NUM_PAGES), NUM_PAGES)
    writes, first = [], 0
    while first < NUM_PAGES:
        count = dice.choice(sizes)
        pairs = list(zip(src[first : first + count], dst[first : first + count], strict=True))
        strips = tuple(Strip(s * PAGE_BYTES, d * PAGE_BYTES, PAGE_BYTES) for s, d in pairs)
        if dice.random() < 0.5:
            writes.append(Write(A, TOKEN, 0, NUM_LAYERS, strips))
        else:
            writes += [Write(A, TOKEN, layer, 1, strips) for layer in range(NUM_LAYERS)]
        first += count
    return writes


def assert_moved(sender: End, receiver: End, writes: Sequence[Write]) -> None:
    expected = [bytearray(PAGE_BYTES * NUM_PAGES) for _ in range(NUM_LAYERS)]
    for write in writes:
        for layer in write.layers:
            for strip in write.strips:
                source = sender.region.bytes_at(layer, strip.src, strip.num_bytes)
                expected[layer][strip.dst : strip.dst + strip.num_bytes] = source
    assert [receiver.layer(layer) for layer in range(NUM_LAYERS)] == expected


@pytest.mark.parametrize("seed", range(3))
def test_writes_smaller_and_larger_than_a_slot_arrive_byte_for_byte(make_end: MakeEnd, seed: int) -> None:
    prefill, decode = make_end(seed=1), make_end()
    writes = random_writes(random.Random(seed), sizes=(1, 7, 60, 200))  # a slot holds 64 pages

    link = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    for write in writes:
        link.write(write)
    link.notify(A, b"all")
    decode.received.until_told("notified", b"all")

    assert_moved(prefill, decode, writes)
    prefill.sent.until(lambda: len(prefill.sent.told) == len(writes))
    assert [what[1] for what in prefill.sent.told] == writes
    landed = sum(len(what[1]) * sum(span.num_bytes for span in what[2]) for what in decode.received.told[:-1])
    assert landed == GEOMETRY.bytes_per_page * NUM_PAGES


def test_several_senders_write_to_one_receiver_at_once(make_end: MakeEnd) -> None:
    decode = make_end()
    senders = [make_end(seed=10 * i) for i in range(3)]
    writes = random_writes(random.Random(5), sizes=(1, 7, 20))
    for i, sender in enumerate(senders):
        link = sender.transport.connect(decode.transport.describe(), sender.sent)
        for write in writes[i::3]:
            link.write(write)
        link.notify(A, b"%d" % i)
    for i in range(3):
        decode.received.until_told("notified", b"%d" % i)
    for i, sender in enumerate(senders):
        for write in writes[i::3]:
            for layer in write.layers:
                for strip in write.strips:
                    there = decode.region.bytes_at(layer, strip.dst, strip.num_bytes)
                    assert there == sender.region.bytes_at(layer, strip.src, strip.num_bytes)


def test_a_flipped_bit_in_a_slot_is_damaged_and_never_lands(make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    from kv_transfer.staging import HostRing

    prefill, decode = make_end(seed=1), make_end()
    link = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    link.notify(A, b"open")
    decode.received.until_told("notified", b"open")
    payload = HostRing.payload
    flips = iter([False, True])  # the sender sums what it has, then a bit flips on the way

    def flip(ring: HostRing, slot: int, offset: int, num_bytes: int) -> memoryview:
        view = payload(ring, slot, offset, num_bytes)
        assert view is not None
        if next(flips, False):
            view[num_bytes // 2] ^= 1
        return view

    monkeypatch.setattr(HostRing, "payload", flip)
    link.write(Write(A, TOKEN, 0, 1, (Strip(0, PAGE_BYTES, PAGE_BYTES),)))
    link.notify(A, b"first")
    decode.received.until_told("notified", b"first")
    assert decode.received.told[-2] == ("damaged", range(1), (Span(PAGE_BYTES, PAGE_BYTES),))
    assert not any(decode.layer(0))
    assert decode.transport.counters.writes_damaged == 1

    link.write(Write(A, TOKEN, 0, 1, (Strip(0, PAGE_BYTES, PAGE_BYTES),)))
    link.notify(A, b"second")
    decode.received.until_told("notified", b"second")
    assert decode.region.pages(0, 1, 1) == prefill.region.pages(0, 0, 1)


def test_a_slot_that_was_not_lent_closes_the_link(make_end: MakeEnd) -> None:
    prefill, decode = make_end(seed=1), make_end()
    link: Any = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    link.notify(A, b"open")
    decode.received.until_told("notified", b"open")
    note = partial(pack_number, rest=b"\x63\x00\x01\x00")
    link._carrier.queue(partial(link._send, NoteKind.SLOT, note))  # NIXL is called by one thread
    assert isinstance(decode.received.until_lost(), ProtocolViolation)
    assert isinstance(prefill.sent.until_lost(), PeerLost)
    assert decode.transport.counters.bad_frames == 1


def test_a_link_of_a_transport_that_was_closed_is_lost(make_end: MakeEnd) -> None:
    prefill, decode = make_end(seed=1), make_end()
    prefill.transport.close()
    prefill.transport.connect(decode.transport.describe(), prefill.sent)
    assert isinstance(prefill.sent.until_lost(), PeerLost)


def test_a_bug_of_the_thread_loses_its_links_and_those_that_follow(
    make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = make_end(seed=1), make_end()
    link = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    link.notify(A, b"there?")
    decode.received.until_told("notified", b"there?")
    transport: Any = prefill.transport
    monkeypatch.setattr(transport._thread._agent, "received", lambda: 1 / 0)
    assert isinstance(prefill.sent.until_lost(), PeerLost)
    after = replace(prefill, sent=Events())
    after.transport.connect(decode.transport.describe(), after.sent)
    assert isinstance(after.sent.until_lost(), PeerLost)


def test_strangers_are_counted_and_get_no_answer(make_end: MakeEnd) -> None:
    prefill, decode = make_end(seed=1), make_end()
    descriptor = bytearray(decode.transport.describe())
    descriptor[7] ^= 1  # one bit of the access key
    prefill.transport.connect(bytes(descriptor), prefill.sent)
    assert isinstance(prefill.sent.until_lost(), PeerLost)
    assert decode.transport.counters.links_refused >= 1
    assert decode.received.told == []


def test_garbage_from_an_agent_is_counted_and_hurts_no_link(make_end: MakeEnd) -> None:
    prefill, decode = make_end(seed=1), make_end()
    link: Any = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    link.notify(A, b"open")
    decode.received.until_told("notified", b"open")
    alive = pack_note(NoteKind.ALIVE, Role.RECEIVES_PAGES, link.link_id, pack_number(0))
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(64), alive[:-1], bytes([alive[0] ^ 1]) + alive[1:]):
        link._carrier.queue(partial(link._carrier.send, link, garbage))
    decode.received.until(lambda: decode.transport.counters.bad_frames == 5)  # notes may overtake each other
    link.notify(A, b"still here")
    decode.received.until_told("notified", b"still here")
    assert decode.transport.counters.bad_frames == 5


def test_a_link_that_is_not_read_takes_no_more_than_its_slots(make_end: MakeEnd) -> None:
    prefill, decode = make_end(seed=1), make_end()
    gate = threading.Event()
    decode.received.landed = lambda *_: gate.wait(PATIENCE_S)  # type: ignore[assignment,method-assign]
    link = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    strips = tuple(Strip(page * PAGE_BYTES, page * PAGE_BYTES, PAGE_BYTES) for page in range(64))
    for _ in range(12):
        link.write(Write(A, TOKEN, 0, 1, strips))  # each fills a slot
    prefill.sent.until(lambda: len(prefill.sent.told) >= 4)
    with prefill.sent.changed:
        assert not prefill.sent.changed.wait_for(lambda: len(prefill.sent.told) > 4, 0.3)
    gate.set()
    prefill.sent.until(lambda: len(prefill.sent.told) == 12)


def test_statistics_name_the_peer_and_the_checksum(make_end: MakeEnd) -> None:
    prefill, decode = make_end(seed=1, links=(LinkConfig(checksum="none"),)), make_end()
    assert prefill.transport.stats() == ()
    link = prefill.transport.connect(decode.transport.describe(), prefill.sent)
    link.write(Write(A, TOKEN, 0, 1, (Strip(0, 0, PAGE_BYTES),)))
    link.notify(A, b"all")
    decode.received.until_told("notified", b"all")
    decode.received.links[0].notify(A, b"answer")
    prefill.sent.until_told("notified", b"answer")
    (stats,) = prefill.transport.stats()
    assert stats.peer == PeerIdentity(WorkerId("worker1"), ClusterId("here"))
    assert (stats.checksum, stats.connections, stats.bytes_queued) == ("none", 1, 0)
    assert decode.transport.stats() == ()


def test_codecs_are_refused(make_end: MakeEnd) -> None:
    with pytest.raises(InvalidConfig, match=r"links\[1\].codecs: nixl carries raw bytes only"):
        make_end(links=(LinkConfig(from_cluster="x"), LinkConfig(codecs=("raw", "int8"))))


def test_without_nixl_the_error_says_how_to_install_it(make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(InvalidConfig, match=r"nixl is not installed .*pip install 'prfaas\[nixl\]'"):
        make_end()


# ---- two processes ----


def serve_until_told() -> None:
    """The other process: receives into a pool of zeros, and answers each message with the pages' sum."""
    region = make_region(None)
    config = KvTransferConfig(transport="nixl", host="127.0.0.1", staging_mib=1, lease_s=5.0)
    identity = PeerIdentity(WorkerId("decode"), ClusterId("here"))
    transport = create_transport(config, FINGERPRINT, WallClock(), identity)

    class Answering(Events):
        def notified(self, link: Any, message: bytes) -> None:
            link.notify(A, b"".join(bytes(region.pages(layer, 0, NUM_PAGES)) for layer in range(NUM_LAYERS)))

    transport.register(region)
    transport.serve(Answering())
    print(transport.describe().hex(), flush=True)
    sys.stdin.readline()
    transport.close()


@pytest.fixture
def start_peer() -> Iterator[Callable[..., tuple[subprocess.Popen[str], bytes]]]:
    started: list[subprocess.Popen[str]] = []

    def start(**environment: str) -> tuple[subprocess.Popen[str], bytes]:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        started.append(process)
        assert process.stdout is not None
        return process, bytes.fromhex(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_share_memory_and_say_so(make_end: MakeEnd, start_peer: Callable[..., Any]) -> None:
    if "UCX_TLS" in os.environ:
        pytest.skip("UCX_TLS decides the path")
    process, descriptor = start_peer()
    prefill = make_end(seed=1)
    writes = random_writes(random.Random(7), sizes=(1, 7, 60))
    link = prefill.transport.connect(descriptor, prefill.sent)
    for write in writes:
        link.write(write)
    link.notify(A, b"what have you?")
    prefill.sent.until(lambda: any(what[0] == "notified" for what in prefill.sent.told))

    (answer,) = [what[1] for what in prefill.sent.told if what[0] == "notified"]
    arrived = End(prefill.transport, make_region(None))
    for layer in range(NUM_LAYERS):
        arrived.region.pages(layer, 0, NUM_PAGES)[:] = answer[layer * PAGE_BYTES * NUM_PAGES :][
            : PAGE_BYTES * NUM_PAGES
        ]
    assert_moved(prefill, arrived, writes)
    (stats,) = prefill.transport.stats()
    assert stats.bytes_sent == GEOMETRY.bytes_per_page * NUM_PAGES
    # Where the kernel forbids processes to reach each other's memory (ptrace scope, seccomp) UCX falls to TCP.
    assert stats.path in ("ucx:shm", "ucx:tcp")
    assert prefill.transport.counters.links_on_tcp == (stats.path == "ucx:tcp")
    process.communicate("stop\n")
    assert isinstance(prefill.sent.until_lost(), PeerLost)


def test_a_killed_peer_is_lost_and_its_successor_is_reached(make_end: MakeEnd, start_peer: Callable[..., Any]) -> None:
    process, descriptor = start_peer()
    prefill = make_end(seed=1, lease_s=2.0)
    link = prefill.transport.connect(descriptor, prefill.sent)
    link.notify(A, b"there?")
    prefill.sent.until(lambda: prefill.sent.told != [])
    process.send_signal(signal.SIGKILL)
    assert isinstance(prefill.sent.until_lost(), PeerLost)

    _, descriptor = start_peer()
    again = replace(prefill, sent=Events())
    link = again.transport.connect(descriptor, again.sent)
    link.write(Write(A, TOKEN, 0, 1, (Strip(0, 0, PAGE_BYTES),)))
    link.notify(A, b"there?")
    again.sent.until(lambda: any(what[0] == "notified" for what in again.sent.told))
    (answer,) = [what[1] for what in again.sent.told if what[0] == "notified"]
    assert answer[:PAGE_BYTES] == prefill.region.pages(0, 0, 1)


if __name__ == "__main__":
    serve_until_told()
