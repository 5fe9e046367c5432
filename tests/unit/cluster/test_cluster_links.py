"""Links are summed per ordered pair of clusters."""

from __future__ import annotations

from cluster.cluster_links import by_cluster_pair
from cluster.view import ClusterView, LinkView
from core.link import LinkEstimate
from core.request import ClusterId, WorkerId

EAST, WEST = ClusterId("east"), ClusterId("west")


def link(number: int, source: ClusterId, usable: bool = True, **numbers: object) -> LinkView:
    """From worker ``p<number>`` to ``d``, which is in west; without numbers nothing was sent yet."""
    sender, receiver = WorkerId(f"p{number}"), WorkerId("d")
    estimate = LinkEstimate(receiver, WEST, **numbers) if numbers else None  # type: ignore[arg-type]
    return LinkView(sender, source, receiver, WEST, heard_at=0.0, estimate=estimate, usable=usable)


def view(*links: LinkView) -> ClusterView:
    return ClusterView(at=0.0, links={(found.from_worker, found.to_worker): found for found in links})


def test_cluster_pairs_are_sums_over_their_workers() -> None:
    one = link(1, EAST, path="tcp", connections=4, throughput=30.0, goodput=50.0, rtt_s=0.01, bytes_sent=7)
    two = link(2, EAST, False, path="tcp+tls1.3", connections=2, throughput=20.0, rtt_s=0.03, retransmits=2, falls=1)
    capacity = {(EAST, WEST): 200.0}

    over, within = by_cluster_pair(view(link(3, WEST), one, two), lambda *pair: capacity.get(pair))

    assert (over.from_cluster, over.to_cluster, within.from_cluster) == (EAST, WEST, WEST)
    assert (over.num_links, over.num_usable, over.connections) == (2, 1, 6)
    assert over.paths == ("tcp", "tcp+tls1.3")
    assert (over.throughput, over.measured, over.capacity) == (50.0, 50.0, 200.0)
    assert (over.utilisation, over.rtt_s) == (0.25, 0.02)
    assert (over.retransmits, over.bytes_sent, over.falls) == (2, 7, 1)
    assert (within.num_links, within.measured, within.utilisation, within.rtt_s) == (1, None, None, None)


def test_without_a_configured_capacity_use_is_a_share_of_what_was_seen_to_fit() -> None:
    (pair,) = by_cluster_pair(view(link(1, EAST, throughput=30.0, goodput=120.0)), lambda *_: None)

    assert (pair.measured, pair.utilisation) == (120.0, 0.25)
