"""Links of several connections, through a relay that delays, damages and cuts them."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from threading import Event, Lock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import PeerLost, ProtocolViolation, TransferAborted
from kv_transfer.codec import Codec
from kv_transfer.config import LinkConfig
from kv_transfer.transport import SendLink, Span, Strip, Write
from tests.unit.kv_transfer.tcp_peers import (
    GEOMETRY,
    NUM_PAGES,
    PAGE_BYTES,
    TOKEN,
    A,
    Change,
    Relay,
    Worker,
    make_worker,
    write,
)

NUM_CONNECTIONS = 3


class Rig:
    """A prefill worker that reaches a decode worker through a relay."""

    def __init__(self, change: Change = lambda connection, data: data, **link: object) -> None:
        config = LinkConfig(**{"connections": NUM_CONNECTIONS, **link})  # type: ignore[arg-type]
        self.prefill = make_worker(fill=1, link=config, name="p")
        self.decode = make_worker(link=config, name="d")
        self.relay = Relay(self.decode, change)

    def connect(self) -> SendLink:
        link = self.prefill.transport.connect(self.relay.descriptor, self.prefill.sent)
        self.until_connected(NUM_CONNECTIONS)
        return link

    def until_connected(self, count: int) -> None:
        """As many connections carry writes."""
        self.prefill.sent.until(lambda: [one.connections for one in self.prefill.transport.stats()] == [count])

    def same_page(self, page: int, layer: int = 0) -> bool:
        return self.decode.page(layer, page) == self.prefill.page(layer, page)

    def close(self) -> None:
        self.relay.close()
        self.prefill.transport.close()
        self.decode.transport.close()


@pytest.fixture
def rigs() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*args: object, **kwargs: object) -> Rig:
        made.append(Rig(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def spans_of(one: Write) -> tuple[Span, ...]:
    return tuple(Span(strip.dst, strip.num_bytes) for strip in one.strips)


class _Dice:
    """Random delays of what passes, drawn by several threads."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = Lock()
        self._never = Event()

    def __call__(self, connection: int, data: bytes) -> bytes:
        with self._lock:
            delay_s = self._random.choice([0, 0, 0, 0.001, 0.003])
        if delay_s:
            self._never.wait(delay_s)
        return data


@given(seed=st.integers(0, 2**32), steps=st.lists(st.booleans(), min_size=5, max_size=60))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_message_overtakes_a_write_whatever_the_connections_do(seed: int, steps: list[bool]) -> None:
    rig = Rig(_Dice(seed))
    try:
        link = rig.connect()
        before: dict[bytes, list[Write]] = {}
        writes: list[Write] = []
        for i, is_write in enumerate([*steps, False]):
            if is_write:
                writes.append(write(len(writes), num_pages=1))
                link.write(writes[-1])
            else:
                before[b"%d" % i] = list(writes)
                link.notify(A, b"%d" % i)
        told = rig.decode.received.until_told("notified", b"%d" % len(steps))
        assert [what[1] for what in told if what[0] == "notified"] == list(before)
        for message, earlier in before.items():
            landed = told[: told.index(("notified", message))]
            assert all(("landed", range(1), spans_of(one)) in landed for one in earlier)
        assert all(rig.same_page(page) for page in range(len(writes)))
    finally:
        rig.close()


def test_a_stripe_that_stands_still_stalls_no_write_but_its_own(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    link = rig.connect()
    held = rig.relay.blocked[1] = Event()
    for page in range(NUM_PAGES):
        for layer in range(2):
            link.write(write(page, layer=layer))
    link.notify(A, b"end")
    rig.decode.received.until(lambda: rig.decode.received.count("landed") >= NUM_PAGES)
    assert rig.decode.received.count("notified") == 0, "the message waits for what stands still"
    held.set()
    told = rig.decode.received.until_told("notified", b"end")
    assert len([what for what in told if what[0] == "landed"]) == 2 * NUM_PAGES
    assert all(rig.same_page(page, layer) for page in range(NUM_PAGES) for layer in range(2))


def test_a_stripe_that_is_cut_in_mid_write_costs_that_write_and_is_dialled_again(rigs: Callable[..., Rig]) -> None:
    cut = Event()

    def cut_once(connection: int, data: bytes) -> bytes | None:
        if connection == 1 and len(data) == 65536 and not cut.is_set():
            cut.set()
            return None
        return data

    rig = rigs(cut_once)
    link = rig.connect()
    num_rounds = 0
    while not cut.is_set():  # until connection 1 took one
        for page in range(0, NUM_PAGES, 8):
            link.write(write(page, num_pages=8))
        link.notify(A, b"%d" % num_rounds)
        told = rig.decode.received.until_told("notified", b"%d" % num_rounds)
        num_rounds += 1
    arrived = {what[2][0].offset // PAGE_BYTES for what in told if what[0] == "landed"}
    damaged = {what[2][0].offset // PAGE_BYTES for what in told if what[0] == "damaged"}
    assert len(damaged) == rig.decode.transport.counters.writes_damaged <= 1
    assert num_rounds > 1 or not arrived & damaged
    rig.prefill.sent.until(lambda: rig.prefill.sent.count("written") == num_rounds * NUM_PAGES // 8)
    rig.prefill.sent.until(lambda: rig.prefill.transport.stats()[0].reconnects == 1)
    rig.until_connected(NUM_CONNECTIONS)
    for page in set(range(0, NUM_PAGES, 8)) - arrived:
        link.write(write(page, num_pages=8))
    link.notify(A, b"again")
    rig.decode.received.until_told("notified", b"again")
    assert all(rig.same_page(page) for page in range(NUM_PAGES))
    assert rig.decode.received.count("lost") == rig.prefill.sent.count("lost") == 0


def test_a_link_without_its_control_connection_is_lost(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    link = rig.connect()
    link.notify(A, b"hello")
    rig.decode.received.until_told("notified", b"hello")
    rig.relay.cut(0)
    assert isinstance(rig.prefill.sent.until_lost(), PeerLost)
    assert isinstance(rig.decode.received.until_lost(), PeerLost)
    assert rig.relay.num_connections == NUM_CONNECTIONS, "nothing is dialled for a link that is lost"


def test_a_bit_that_flips_on_the_way_is_damage_and_the_write_can_be_sent_again(rigs: Callable[..., Rig]) -> None:
    passed = 0

    def flip(number: int, data: bytes) -> bytes:
        nonlocal passed
        before, passed = passed, passed + len(data)
        if before <= 1_000_000 < passed:  # in the payload of the first write
            at = 1_000_000 - before
            return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        return data

    rig = rigs(flip, connections=1)
    link = rig.prefill.transport.connect(rig.relay.descriptor, rig.prefill.sent)
    link.write(write(0, num_pages=NUM_PAGES))
    link.write(write(0, layer=1))
    link.notify(A, b"end")
    told = rig.decode.received.until_told("notified", b"end")
    assert [what[:2] for what in told if what[0] in ("damaged", "landed")] == [
        ("damaged", range(1)),
        ("landed", range(1, 2)),
    ]
    assert rig.decode.transport.counters.writes_damaged == 1
    assert [page for page in range(NUM_PAGES) if not rig.same_page(page)] == [15], "one page holds the wrong bit"
    link.write(write(0, num_pages=NUM_PAGES))
    link.notify(A, b"again")
    rig.decode.received.until_told("notified", b"again")
    assert all(rig.same_page(page) for page in range(NUM_PAGES))


def test_nonsense_on_a_stripe_ends_the_stripe_alone(rigs: Callable[..., Rig]) -> None:
    spoilt = Event()

    def spoil(number: int, data: bytes) -> bytes:
        if number == 2 and spoilt.is_set() and data.startswith(b"KV"):
            spoilt.clear()
            return b"GE" + data[2:]
        return data

    rig = rigs(spoil)
    link = rig.connect()
    spoilt.set()
    for round_ in range(50):
        link.write(write(round_))
        link.notify(A, b"%d" % round_)  # each raises a barrier, which every stripe shows
        rig.decode.received.until_told("notified", b"%d" % round_)
        if not spoilt.is_set():
            break
    assert not spoilt.is_set()
    rig.decode.received.until(lambda: rig.decode.transport.counters.bad_frames == 1)
    rig.prefill.sent.until(lambda: rig.prefill.transport.stats()[0].reconnects == 1)
    assert rig.prefill.sent.count("lost") == rig.decode.received.count("lost") == 0


def test_an_event_that_raises_on_a_stripe_ends_the_link(rigs: Callable[..., Rig]) -> None:
    rig = rigs()

    def refuse(spans: Sequence[Span]) -> bool:
        raise ProtocolViolation("not this one")

    rig.decode.received.judge = refuse
    link = rig.connect()
    rig.relay.blocked[0] = Event()  # so that a stripe brings it
    for _ in range(8):
        link.write(write(0, num_pages=NUM_PAGES))
    assert str(rig.decode.received.until_lost()) == "not this one"
    rig.relay.blocked[0].set()
    assert isinstance(rig.prefill.sent.until_lost(), PeerLost)


def test_a_cancel_in_mid_transfer_ends_in_drained_when_nothing_is_read(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    link = rig.connect()
    for connection in range(NUM_CONNECTIONS):
        rig.relay.blocked[connection] = Event()
    for _ in range(40):
        link.write(write(0, num_pages=NUM_PAGES))  # 4 MiB each: more than the kernels between the two hold
    rig.prefill.sent.until(lambda: rig.prefill.transport.stats()[0].bytes_queued < 38 * NUM_PAGES * PAGE_BYTES)
    assert link.cancel(A) is False
    link.notify(A, b"aborted")
    assert rig.prefill.sent.count("drained") == 0
    for event in rig.relay.blocked.values():
        event.set()
    told = rig.decode.received.until_told("notified", b"aborted")
    rig.prefill.sent.until(lambda: rig.prefill.sent.count("drained") == 1)
    assert rig.prefill.sent.told[-1][0] == "drained"
    assert told[-1] == ("notified", b"aborted")
    assert rig.decode.received.count("landed") == rig.prefill.sent.count("written") < 40


def test_a_closed_link_is_lost_once_although_every_connection_stands_still(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    link = rig.connect()
    for connection in range(NUM_CONNECTIONS):
        rig.relay.blocked[connection] = Event()
    for _ in range(40):
        link.write(write(0, num_pages=NUM_PAGES))
    link.close(TransferAborted("enough"))
    assert str(rig.prefill.sent.until_lost()) == "enough"


@pytest.mark.parametrize("codec", [Codec.LOSSLESS, Codec.INT8, Codec.FP8])
def test_encoded_writes_arrive_decoded_and_are_counted(rigs: Callable[..., Rig], codec: Codec) -> None:
    rig = rigs()
    for layer in rig.prefill.pool:  # ones and minus ones in bfloat16: every codec gives them back exactly
        layer[:] = b"".join(random.Random(9).choices([b"\x80\x3f", b"\x80\xbf"], k=len(layer) // 2))
    link = rig.connect()
    strips = tuple(Strip(page * PAGE_BYTES, page * PAGE_BYTES, PAGE_BYTES) for page in range(0, 16, 2))
    link.write(Write(A, TOKEN, 0, GEOMETRY.num_layers, strips, codec=codec))
    link.notify(A, b"end")
    rig.decode.received.until_told("notified", b"end")
    assert rig.decode.received.count("landed") == 1
    assert all(rig.same_page(page, layer) for page in range(0, 16, 2) for layer in range(2))
    rig.prefill.sent.until(lambda: rig.prefill.sent.count("written") == 1)
    stats = rig.prefill.transport.stats()[0]
    (use,) = stats.encoded
    assert (use.codec, use.raw_bytes, use.wire_bytes) == (codec, 16 * PAGE_BYTES, stats.bytes_sent)
    assert use.wire_bytes < use.raw_bytes
    assert use.encode_s > 0


def pacing_rates(worker: Worker) -> list[int]:
    """SO_MAX_PACING_RATE of each connection of the worker's links."""
    rates = []
    for end in worker.transport._ends:
        for connection in end._connections.values():
            data = connection.stream._socket.getsockopt(socket.SOL_SOCKET, 47, 8)
            rates.append(struct.unpack("=Q", data)[0] if len(data) == 8 else struct.unpack("=I", data)[0])
    return rates


def test_the_pace_of_a_link_is_shared_by_its_connections(rigs: Callable[..., Rig]) -> None:
    rig = rigs(pace_gbps=2.4)
    rig.connect()
    assert pacing_rates(rig.prefill) == [100_000_000] * NUM_CONNECTIONS  # bytes/s
    assert all(rate > 1 << 31 for rate in pacing_rates(rig.decode)), "the receiving end is not held back"


def test_the_peer_is_heard_in_the_middle_of_a_long_write(rigs: Callable[..., Rig]) -> None:
    """A write that trickles in is a sign of life, long before it is whole."""
    slow = Event()

    def trickle(connection: int, data: bytes) -> bytes:
        if len(data) == 65536 and not slow.is_set():
            slow.wait(0.02)
        return data

    rig = rigs(trickle)
    link = rig.connect()
    link.notify(A, b"hello")
    rig.decode.received.until_told("notified", b"hello")
    (end,) = rig.decode.transport._ends
    link.write(write(0, num_pages=NUM_PAGES))
    rig.decode.received.until(lambda: rig.decode.received.count("admit") == 1)
    heard = []
    for _ in range(5):
        heard.append(end.heard_at)
        rig.decode.received.until(lambda: end.heard_at > heard[-1])
    assert rig.decode.received.count("landed") == 0, "heard five times within one write"
    slow.set()
    rig.decode.received.until(lambda: rig.decode.received.count("landed") == 1)


def test_statistics_are_those_of_the_kernel(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    link = rig.connect()
    for page in range(NUM_PAGES):
        link.write(write(page))
    link.notify(A, b"end")
    rig.decode.received.until_told("notified", b"end")
    rig.prefill.sent.until(lambda: rig.prefill.sent.count("written") == NUM_PAGES)
    (stats,) = rig.prefill.transport.stats()
    assert (stats.path, stats.connections, stats.reconnects) == ("tcp", NUM_CONNECTIONS, 0)
    assert (stats.bytes_sent, stats.bytes_queued) == (NUM_PAGES * PAGE_BYTES, 0)
    assert stats.rtt_s is not None
    assert stats.min_rtt_s is not None
    assert 0 < stats.min_rtt_s <= stats.rtt_s * 10
    assert stats.delivery_rate is not None
    assert stats.delivery_rate > 0
    assert stats.peer.worker_id == "d"
