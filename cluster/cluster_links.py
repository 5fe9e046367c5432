"""What do all workers of two clusters together know of the path between them? Sums of LinkEstimates, pure.

Ordered pairs: what ``east`` sends to ``west`` says nothing of the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from cluster.view import ClusterView, LinkView
from core.request import ClusterId

_TOGETHER_S = 0.5  # links whose bytes moved within so much of each other were busy at the same time


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
    carries: float | None  # bytes/s, what is believed that it carries now; None: nothing is known
    age_s: float | None  # since bytes last moved on it; None: none ever did
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


def by_cluster_pair(
    view: ClusterView, capacity: Capacity, from_clusters: Collection[ClusterId] | None = None
) -> tuple[ClusterPair, ...]:
    """The view's links summed per ordered pair of clusters, in order of names; None: from all clusters.

    ``capacity``: configured bytes/s of a pair (from, to), or None.
    """
    pairs: dict[tuple[ClusterId, ClusterId], list[LinkView]] = {}
    for link in view.links.values():
        if from_clusters is None or link.from_cluster in from_clusters:
            pairs.setdefault((link.from_cluster, link.to_cluster), []).append(link)
    return tuple(_sum(view.at, *pair, pairs[pair], capacity) for pair in sorted(pairs))


def believed_rate(links: Collection[LinkView], now: float, capacity: float | None) -> float | None:
    """Bytes/s that the links of one pair of clusters carry together now; None: nothing is known of any.

    What was seen last tells it: of links that were busy together the sum of their rates, but no more than went; of
    links that were not, the highest; never more than the configured capacity. Before anything went, the capacity. A
    path on which nothing goes is believed to be what it was; planner.py has it tested now and then.
    """
    seen = [(age, rate, throughput) for link in links for age, rate, throughput in _seen(link, now)]
    if not seen:
        return capacity
    newest_s = min(age for age, _, _ in seen)
    together = [(rate, throughput) for age, rate, throughput in seen if age <= newest_s + _TOGETHER_S]
    total, went = sum(rate for rate, _ in together), sum(throughput for _, throughput in together)
    found = max(max(rate for rate, _ in together), min(total, went))
    return found if capacity is None else min(found, capacity)


def _seen(link: LinkView, now: float) -> Iterator[tuple[float, float, float]]:
    """(age, bytes/s, throughput) of the newest that the link has told, if it has told anything.

    If nothing has gone since its self-test, that is the newest: it measured one transfer, while what the sender knows
    is of all traffic up to half a second before.
    """
    probed_s = now - link.probed_at
    age_s = link.age_s(now)
    tested = None if link.probe is None else link.probe.rate
    estimate = link.estimate
    if tested is not None and (estimate is None or age_s is None or age_s > probed_s - _TOGETHER_S):
        yield probed_s, tested, 0.0
    elif estimate is not None and age_s is not None and (rate := estimate.rate) is not None:
        yield age_s, rate, estimate.throughput


def _sum(now: float, source: ClusterId, target: ClusterId, views: list[LinkView], capacity_of: Capacity) -> ClusterPair:
    capacity = capacity_of(source, target)
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
        capacity=capacity,
        measured=measured or None,
        carries=believed_rate(views, now, capacity),
        age_s=min((age for view in views if (age := view.age_s(now)) is not None), default=None),
        throughput=throughput,
        rtt_s=sum(rtts) / len(rtts) if rtts else None,
        retransmits=sum(link.retransmits for link in links),
        bytes_sent=sum(link.bytes_sent for link in links),
        bytes_queued=sum(link.bytes_queued for link in links),
        reconnects=sum(link.reconnects for link in links),
        falls=sum(link.falls for link in links),
        codec_changes=sum(link.codec_changes for link in links),
    )
