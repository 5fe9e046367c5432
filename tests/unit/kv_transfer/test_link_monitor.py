"""The monitor is told what transports count, and tells what the links are like."""

from __future__ import annotations

import logging
from dataclasses import replace
from threading import Thread

import pytest

from core.clock import VirtualClock
from core.errors import PeerLost
from core.request import ClusterId, WorkerId
from kv_transfer.link_monitor import FORGET_S, MAX_PEERS, TICK_S, LinkMonitor, timed_part
from kv_transfer.session import SendReport
from kv_transfer.transport import LinkStats, PeerIdentity

MB = 1_000_000
PEER = PeerIdentity(WorkerId("decode-0"), ClusterId("west"))


class Wire:
    """A monitor and the counters of a link to PEER that is always busy."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.monitor = LinkMonitor(self.clock)
        self.stats = LinkStats(PEER, "tcp", connections=4, rtt_s=0.01, min_rtt_s=0.009)
        self.monitor.tick([self.stats])

    def carry(self, rate: float, seconds: float, *, busy: float = 1.0, retransmits: int = 0) -> None:
        """``seconds`` of wall-clock time, of which ``busy`` is spent sending at ``rate``."""
        for _ in range(round(seconds / TICK_S)):
            self.clock.advance(TICK_S)
            self.stats = replace(
                self.stats,
                bytes_sent=self.stats.bytes_sent + int(rate * busy * TICK_S),
                busy_s=self.stats.busy_s + busy * TICK_S,
                retransmits=self.stats.retransmits + retransmits,
            )
            self.monitor.tick([self.stats])


def test_goodput_is_of_busy_time_and_throughput_of_all_time() -> None:
    wire = Wire()

    wire.carry(100 * MB, 20, busy=0.5)

    (estimate,) = wire.monitor.estimates()
    assert estimate.goodput == pytest.approx(100 * MB, rel=0.01)
    assert estimate.throughput == pytest.approx(50 * MB, rel=0.01)
    assert (estimate.path, estimate.connections, estimate.rtt_s) == ("tcp", 4, 0.01)
    assert estimate.age_s == 0
    assert estimate.bytes_sent == wire.stats.bytes_sent


def test_a_link_that_narrows_to_a_tenth_is_known_after_two_seconds_of_traffic() -> None:
    wire = Wire()
    wire.carry(1000 * MB, 30)

    wire.carry(100 * MB, 2)

    rate = wire.monitor.rate(PEER.worker_id)
    assert rate is not None
    assert 100 * MB <= rate < 125 * MB


def test_short_bursts_are_measured_together() -> None:
    wire = Wire()

    wire.carry(100 * MB, 1, busy=0.02)  # 5 ms of each tick

    (estimate,) = wire.monitor.estimates()
    assert estimate.goodput == pytest.approx(100 * MB, rel=0.01)


def test_an_idle_link_keeps_its_goodput_and_ages() -> None:
    wire = Wire()
    wire.carry(100 * MB, 5)

    wire.carry(0, 30, busy=0)

    (estimate,) = wire.monitor.estimates()
    assert estimate.goodput == pytest.approx(100 * MB, rel=0.01)
    assert estimate.throughput < 0.01 * MB
    assert estimate.age_s == pytest.approx(30)


def test_retransmits_are_counted_and_rated_by_bytes() -> None:
    wire = Wire()
    wire.carry(4 * (1 << 20), 20, retransmits=3)

    (estimate,) = wire.monitor.estimates()
    assert estimate.retransmits == 240
    assert estimate.retransmits_per_mib == pytest.approx(3, rel=0.01)


def test_counters_of_a_new_link_to_the_same_worker_go_on() -> None:
    wire = Wire()
    wire.carry(100 * MB, 1)
    wire.monitor.tick([])
    assert wire.monitor.estimates()[0].connections == 0

    wire.stats = LinkStats(PEER, "tcp", connections=2)
    wire.carry(100 * MB, 1)

    (estimate,) = wire.monitor.estimates()
    assert estimate.bytes_sent == 200 * MB
    assert estimate.goodput == pytest.approx(100 * MB, rel=0.01)


def test_two_links_to_one_worker_are_one_estimate() -> None:
    monitor = LinkMonitor(VirtualClock())
    one = LinkStats(PEER, "tcp", connections=2, rtt_s=0.01, min_rtt_s=0.01, delivery_rate=5.0, bytes_queued=7)
    two = LinkStats(PEER, "tcp", connections=1, rtt_s=0.03, min_rtt_s=0.02, bytes_queued=1)

    monitor.tick([one, two])

    (estimate,) = monitor.estimates()
    assert (estimate.connections, estimate.bytes_queued, estimate.delivery_rate) == (3, 8, 5.0)
    assert (estimate.rtt_s, estimate.min_rtt_s) == (pytest.approx(0.02), 0.01)


def test_transfers_make_the_fit_and_the_rate_of_a_path_without_books() -> None:
    monitor = LinkMonitor(VirtualClock())
    for size in (1, 2, 4, 8, 16, 32):
        monitor.transferred(PEER, size * MB, 0.01 + size / 100)

    (estimate,) = monitor.estimates()
    assert estimate.fit_beta == pytest.approx(100 * MB, rel=0.02)
    assert estimate.fit_t0_s == pytest.approx(0.01, rel=0.1)
    assert (estimate.goodput, estimate.rate) == (None, estimate.fit_beta)
    assert estimate.samples == 6


def test_a_transfer_of_less_than_two_round_trips_tells_nothing_of_bytes() -> None:
    wire = Wire()  # 10 ms
    wire.monitor.transferred(PEER, 1000, 0.015)
    assert wire.monitor.estimates()[0].fit_beta is None

    wire.monitor.transferred(PEER, 10 * MB, 0.11)
    assert wire.monitor.estimates()[0].samples == 1


@pytest.mark.parametrize(
    ("report", "part"),
    [
        (SendReport(None, 100, 1, transfer_s=2.0, exposed_s=0.5, tail_bytes=40), (40, 0.5)),
        (SendReport(None, 100, 1, transfer_s=2.0, exposed_s=9.0, tail_bytes=100), (100, 2.0)),
        (SendReport(None, 100, 1, transfer_s=1.0, exposed_s=0.1), None),
        (SendReport(PeerLost("gone"), 100, 1, transfer_s=1.0, exposed_s=1.0, tail_bytes=40), None),
    ],
    ids=["streamed while computed", "the grant came after the commit", "nothing was left", "failed"],
)
def test_only_what_was_left_at_the_commit_tells_of_the_link(report: SendReport, part: tuple[int, float] | None) -> None:
    assert timed_part(report) == part


def test_a_fall_to_tcp_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    monitor = LinkMonitor(VirtualClock())
    with caplog.at_level(logging.WARNING):
        for path in ("ucx:rc", "ucx:tcp", "ucx:tcp", "ucx:rc", "ucx:tcp"):
            monitor.tick([LinkStats(PEER, path)])

    assert monitor.estimates()[0].falls == 2
    assert [record.message for record in caplog.records] == [
        "kv link to decode-0: its path is ucx:tcp: it fell back to TCP"
    ] * 2


def test_workers_that_are_gone_are_forgotten_in_time() -> None:
    wire = Wire()
    wire.carry(MB, 1)

    wire.clock.advance(FORGET_S + 1)
    wire.monitor.tick([])

    assert wire.monitor.estimates() == ()
    assert wire.monitor.estimate(PEER.worker_id) is None
    assert wire.monitor.rate(PEER.worker_id) is None


def test_memory_is_bounded_whatever_peers_there_were() -> None:
    clock = VirtualClock()
    monitor = LinkMonitor(clock)
    for index in range(MAX_PEERS + 10):
        clock.advance(0.001)
        monitor.transferred(PeerIdentity(WorkerId(f"decode-{index:05}"), ClusterId("west")), MB, 0.1)

    names = [estimate.worker_id for estimate in monitor.estimates()]
    assert len(names) == MAX_PEERS
    assert names[0] == "decode-00010", "the one that was quiet longest goes first"


def test_threads_may_tell_and_ask_at_once() -> None:
    monitor = LinkMonitor(VirtualClock())

    def tell() -> None:
        for _ in range(200):
            monitor.transferred(PEER, MB, 0.01)
            monitor.tick([LinkStats(PEER, "tcp")])
            monitor.estimates()

    threads = [Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert monitor.estimates()[0].samples == 800
