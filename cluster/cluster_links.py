"""What do all workers of two clusters together know of the path between them? Sums of LinkEstimates, pure.

Ordered pairs: what ``east`` sends to ``west`` says nothing of the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.view import ClusterView, LinkView
from core.request import ClusterId


@dataclass(frozen=True, slots=True)
class ClusterPair:
    """All links from the workers of one cluster to the workers of one cluster."""

    from_cluster: ClusterId
    to_cluster: ClusterId
    num_links: int  # pairs of workers
    num_usable: int
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
    codec_changes: int

    @property
    def utilisation(self) -> float | None:
        """Share of the capacity that is in use: of the configured one, or else of what was seen to fit."""
        capacity = self.capacity or self.measured
        return None if capacity is None else self.throughput / capacity


Capacity = Callable[[ClusterId, ClusterId], float | None]


def by_cluster_pair(view: ClusterView, capacity: Capacity) -> tuple[ClusterPair, ...]:
    """The view's links summed per ordered pair of clusters, in order of names.

    ``capacity``: configured bytes/s of a pair (from, to), or None.
    """
    pairs: dict[tuple[ClusterId, ClusterId], list[LinkView]] = {}
    for link in view.links.values():
        pairs.setdefault((link.from_cluster, link.to_cluster), []).append(link)
    return tuple(_sum(source, target, pairs[source, target], capacity) for source, target in sorted(pairs))


def _sum(source: ClusterId, target: ClusterId, views: list[LinkView], capacity: Capacity) -> ClusterPair:
    links = [view.estimate for view in views if view.estimate is not None]
    throughput = sum(link.throughput for link in links)
    rtts = [link.rtt_s for link in links if link.rtt_s is not None]
    measured = max([throughput, *(link.rate or 0.0 for link in links)])
    return ClusterPair(
        from_cluster=source,
        to_cluster=target,
        num_links=len(views),
        num_usable=sum(view.usable for view in views),
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
        codec_changes=sum(link.codec_changes for link in links),
    )
