"""Links are summed per ordered pair of clusters."""

from __future__ import annotations

from cluster.cluster_links import by_cluster_pair
from core.link import LinkEstimate
from core.request import ClusterId, WorkerId


def estimate(**numbers: object) -> LinkEstimate:
    return LinkEstimate(WorkerId("decode-0"), ClusterId("west"), **numbers)  # type: ignore[arg-type]


def test_cluster_pairs_are_sums_over_their_workers() -> None:
    east, west = ClusterId("east"), ClusterId("west")
    one = estimate(path="tcp", connections=4, throughput=30.0, goodput=50.0, rtt_s=0.01, retransmits=1, bytes_sent=7)
    two = estimate(path="tcp+tls1.3", connections=2, throughput=20.0, goodput=40.0, rtt_s=0.03, retransmits=2, falls=1)
    idle = estimate()

    capacity = {(east, west): 200.0}
    over, within = by_cluster_pair([(west, idle), (east, one), (east, two)], lambda *pair: capacity.get(pair))

    assert (over.from_cluster, over.to_cluster, within.from_cluster) == (east, west, west)
    assert (over.num_links, over.connections, over.paths) == (2, 6, ("tcp", "tcp+tls1.3"))
    assert (over.throughput, over.measured, over.capacity) == (50.0, 50.0, 200.0)
    assert (over.utilisation, over.rtt_s) == (0.25, 0.02)
    assert (over.retransmits, over.bytes_sent, over.falls) == (3, 7, 1)
    assert (within.measured, within.utilisation, within.rtt_s, within.paths) == (None, None, None, ())


def test_without_a_configured_capacity_use_is_a_share_of_what_was_seen_to_fit() -> None:
    (pair,) = by_cluster_pair([(ClusterId("west"), estimate(throughput=30.0, goodput=120.0))], lambda *_: None)

    assert (pair.measured, pair.utilisation) == (120.0, 0.25)
