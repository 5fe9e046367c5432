"""What does this worker know of its links? The owner of every ``LinkEstimate`` of the links that it sends on.

    Transport.stats(), every quarter second or so  ──tick────┐
                                                             ├──> one _Peer per receiving worker ──> LinkEstimate
    hand-overs and self-tests that ended      ──transferred──┘

Which evidence is fast and which is slow is link_estimate.py's; here it is collected. A peer may have several links in
its life (its process restarts, a connection breaks), each counting from 0: counters that went back have begun anew.

Invariants: estimates of at most ``MAX_PEERS`` peers are kept, and none that was quiet for ``FORGET_S``; nothing here
waits for anything, so every method may be called from any thread, a transport's too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from threading import Lock

from core.clock import Clock
from core.link import LinkEstimate
from core.request import WorkerId
from kv_transfer.link_estimate import (
    GOODPUT_WINDOW_S,
    THROUGHPUT_WINDOW_S,
    RecentRate,
    TransferFit,
    has_fallen,
)
from kv_transfer.session import SendReport
from kv_transfer.transport import LinkStats, PeerIdentity

logger = logging.getLogger(__name__)

TICK_S = 0.25
MAX_PEERS = 4096
FORGET_S = 600.0

_MIN_BUSY_S = 0.02  # less is added to the next tick's: the clock and the buffers would be measured
_RETRANSMIT_WINDOW_MIB = 64.0
_MIN_ROUND_TRIPS = 2.0  # a shorter transfer tells of the round trip, and nothing of the cost of bytes
_MIB = 1 << 20


def timed_part(report: SendReport) -> tuple[int, float] | None:
    """(bytes, seconds) of that part of a hand-over that was as fast as the link let it be; None: there is none.

    While a prompt is computed its bytes come when they come. What is left at the commit is all there: the tail. Where
    the grant came after the commit that is everything, from the first write on.
    """
    if report.error is not None or report.tail_bytes <= 0:
        return None
    return report.tail_bytes, min(report.exposed_s, report.transfer_s)


class LinkMonitor:
    """Makes estimates of what the transport and the sender saw. ``clock`` is the transport's."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = Lock()
        self._peers: dict[WorkerId, _Peer] = {}
        self._ticked_at: float | None = None

    def tick(self, stats: Iterable[LinkStats]) -> None:
        """What every living link counts now: ``Transport.stats()``."""
        by_peer: dict[PeerIdentity, list[LinkStats]] = {}
        for link in stats:
            by_peer.setdefault(link.peer, []).append(link)
        now = self._clock.now()
        with self._lock:
            passed_s = 0.0 if self._ticked_at is None else now - self._ticked_at
            self._ticked_at = now
            for identity, links in by_peer.items():
                self._peer(identity, now).observe(_together(links), passed_s, now)
            living = {identity.worker_id for identity in by_peer}
            for worker_id, peer in list(self._peers.items()):
                if worker_id not in living:
                    peer.disconnected(passed_s)
                    if now - peer.seen_at > FORGET_S:
                        del self._peers[worker_id]

    def transferred(self, identity: PeerIdentity, num_bytes: int, seconds: float) -> None:
        """``num_bytes`` arrived, and it took ``seconds`` from when all of them could be sent."""
        now = self._clock.now()
        with self._lock:
            self._peer(identity, now).transferred(num_bytes, seconds, now)

    def estimates(self) -> tuple[LinkEstimate, ...]:
        """Every peer that is known, by worker id."""
        now = self._clock.now()
        with self._lock:
            return tuple(peer.estimate(now) for _, peer in sorted(self._peers.items()))

    def estimate(self, worker_id: WorkerId) -> LinkEstimate | None:
        """What is known of the links to one worker; None: nothing."""
        now = self._clock.now()
        with self._lock:
            peer = self._peers.get(worker_id)
            return None if peer is None else peer.estimate(now)

    def rate(self, worker_id: WorkerId) -> float | None:
        """Bytes/s to expect of the links to one worker; None: nothing is known."""
        estimate = self.estimate(worker_id)
        return None if estimate is None else estimate.rate

    def _peer(self, identity: PeerIdentity, now: float) -> _Peer:
        peer = self._peers.get(identity.worker_id)
        if peer is None or peer.identity != identity:
            if len(self._peers) >= MAX_PEERS:
                del self._peers[min(self._peers, key=lambda worker_id: self._peers[worker_id].seen_at)]
            peer = self._peers[identity.worker_id] = _Peer(identity, seen_at=now, moved_at=now)
        peer.seen_at = now
        return peer


@dataclass(slots=True)
class _Peer:
    """What was seen of one receiving worker. Only the monitor writes it, under its lock."""

    identity: PeerIdentity
    seen_at: float
    moved_at: float  # when bytes last moved; at first: when it was first seen
    stats: LinkStats | None = None  # of the last tick; None: no link lives
    path: str = ""
    goodput: RecentRate = field(default_factory=lambda: RecentRate(GOODPUT_WINDOW_S))
    throughput: RecentRate = field(default_factory=lambda: RecentRate(THROUGHPUT_WINDOW_S))
    # Segments sent again, where RecentRate has bytes, over MiB, where it has seconds.
    losses: RecentRate = field(default_factory=lambda: RecentRate(_RETRANSMIT_WINDOW_MIB))
    fit: TransferFit = field(default_factory=TransferFit)
    bytes_sent: int = 0
    retransmits: int = 0
    reconnects: int = 0
    falls: int = 0
    small_bytes: int = 0  # of ticks too short to be measured yet
    small_busy_s: float = 0.0

    def observe(self, stats: LinkStats, passed_s: float, now: float) -> None:
        before = self.stats or LinkStats(stats.peer, stats.path)
        num_bytes = _grown(before.bytes_sent, stats.bytes_sent)
        retransmits = _grown(before.retransmits, stats.retransmits)
        busy_s = stats.busy_s - before.busy_s if stats.busy_s >= before.busy_s else stats.busy_s
        self.stats = stats
        self.reconnects += _grown(before.reconnects, stats.reconnects)
        self._note_path(stats.path)
        self.bytes_sent += num_bytes
        self.retransmits += retransmits
        self.throughput = self.throughput.add(num_bytes, passed_s)
        self.losses = self.losses.add(retransmits, num_bytes / _MIB)
        if num_bytes:
            self.moved_at = now
        self._add_goodput(num_bytes, busy_s)

    def disconnected(self, passed_s: float) -> None:
        self.stats = None
        self.throughput = self.throughput.add(0, passed_s)

    def transferred(self, num_bytes: int, seconds: float, now: float) -> None:
        self.moved_at = now
        rtt_s = None if self.stats is None else self.stats.rtt_s
        if seconds >= _MIN_ROUND_TRIPS * (rtt_s or 0.0):
            self.fit = self.fit.observe(num_bytes, seconds)

    def estimate(self, now: float) -> LinkEstimate:
        stats = self.stats or LinkStats(self.identity, self.path)
        known = self.fit.num_samples > 0
        return LinkEstimate(
            worker_id=self.identity.worker_id,
            cluster_id=self.identity.cluster_id,
            path=self.path,
            connections=stats.connections,
            goodput=self.goodput.rate,
            delivery_rate=stats.delivery_rate or None,
            rtt_s=stats.rtt_s,
            min_rtt_s=stats.min_rtt_s,
            retransmits=self.retransmits,
            retransmits_per_mib=self.losses.rate or 0.0,
            fit_t0_s=self.fit.t0_s if known else None,
            fit_beta=self.fit.beta,
            fit_variance=self.fit.variance if known else None,
            samples=self.fit.num_samples,
            throughput=self.throughput.rate or 0.0,
            bytes_sent=self.bytes_sent,
            bytes_queued=stats.bytes_queued,
            reconnects=self.reconnects,
            falls=self.falls,
            age_s=max(0.0, now - self.moved_at),
        )

    def _add_goodput(self, num_bytes: int, busy_s: float) -> None:
        self.small_bytes += num_bytes
        self.small_busy_s += busy_s
        if self.small_busy_s >= _MIN_BUSY_S:
            self.goodput = self.goodput.add(self.small_bytes, self.small_busy_s)
            self.small_bytes, self.small_busy_s = 0, 0.0

    def _note_path(self, path: str) -> None:
        if path == self.path:
            return
        if has_fallen(path):
            self.falls += 1
            logger.warning("kv link to %s: its path is %s: it fell back to TCP", self.identity.worker_id, path)
        elif self.path:
            logger.info("kv link to %s: its path is %s now, it was %s", self.identity.worker_id, path, self.path)
        self.path = path


def _grown(before: int, now: int) -> int:
    """How far a counter has come; one that went back has begun anew."""
    return now - before if now >= before else now


def _together(links: list[LinkStats]) -> LinkStats:
    """The links to one worker as if they were one: what is counted is added, the round trip is the mean."""
    if len(links) == 1:
        return links[0]
    rtts = [link.rtt_s for link in links if link.rtt_s is not None]
    least = [link.min_rtt_s for link in links if link.min_rtt_s is not None]
    rates = [link.delivery_rate for link in links if link.delivery_rate is not None]
    return replace(
        links[0],
        connections=sum(link.connections for link in links),
        bytes_sent=sum(link.bytes_sent for link in links),
        rtt_s=sum(rtts) / len(rtts) if rtts else None,
        min_rtt_s=min(least, default=None),
        delivery_rate=sum(rates) if rates else None,
        retransmits=sum(link.retransmits for link in links),
        busy_s=max(link.busy_s for link in links),
        bytes_queued=sum(link.bytes_queued for link in links),
        reconnects=sum(link.reconnects for link in links),
    )
