"""What do all workers of two clusters together know of the path between them? Sums of LinkEstimates, pure.

Ordered pairs: what ``east`` sends to ``west`` says nothing of the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.link import LinkEstimate
from core.request import ClusterId

BYTES_PER_GBIT = 1e9 / 8


@dataclass(frozen=True, slots=True)
class ClusterPair:
    """All links from the workers of one cluster to the workers of one cluster."""

    from_cluster: ClusterId
    to_cluster: ClusterId
    num_links: int
    connections: int
    paths: tuple[str, ...]  # that are in use, in order
    capacity: float | None  # bytes/s, as configured; None: not configured
    measured: float | None  # bytes/s that were seen to fit: a lower bound of what the path carries
    throughput: float  # bytes/s, all workers together
    rtt_s: float | None  # mean of the links that know theirs
    retransmits: int
    bytes_sent: int
    bytes_queued: int
    reconnects: int
    falls: int

    @property
    def utilisation(self) -> float | None:
        """Share of the capacity that is in use: of the configured one, or else of what was seen to fit."""
        capacity = self.capacity or self.measured
        return None if capacity is None else self.throughput / capacity


Capacity = Callable[[ClusterId, ClusterId], float | None]


def by_cluster_pair(links: Iterable[tuple[ClusterId, LinkEstimate]], capacity: Capacity) -> tuple[ClusterPair, ...]:
    """The links, each with its sending worker's cluster, summed per ordered pair of clusters, in order of names.

    ``capacity``: configured bytes/s of a pair (from, to), or None.
    """
    pairs: dict[tuple[ClusterId, ClusterId], list[LinkEstimate]] = {}
    for from_cluster, link in links:
        pairs.setdefault((from_cluster, link.cluster_id), []).append(link)
    return tuple(_sum(source, target, pairs[source, target], capacity) for source, target in sorted(pairs))


def _sum(source: ClusterId, target: ClusterId, links: list[LinkEstimate], capacity: Capacity) -> ClusterPair:
    throughput = sum(link.throughput for link in links)
    rtts = [link.rtt_s for link in links if link.rtt_s is not None]
    measured = max(throughput, *(link.rate or 0.0 for link in links))
    return ClusterPair(
        from_cluster=source,
        to_cluster=target,
        num_links=len(links),
        connections=sum(link.connections for link in links),
        paths=tuple(sorted({link.path for link in links if link.path})),
        capacity=capacity(source, target),
        measured=measured or None,
        throughput=throughput,
        rtt_s=sum(rtts) / len(rtts) if rtts else None,
        retransmits=sum(link.retransmits for link in links),
        bytes_sent=sum(link.bytes_sent for link in links),
        bytes_queued=sum(link.bytes_queued for link in links),
        reconnects=sum(link.reconnects for link in links),
        falls=sum(link.falls for link in links),
    )
