"""Links are summed per ordered pair of clusters."""

from __future__ import annotations

from dataclasses import replace

from cluster.cluster_links import believed_rate, by_cluster_pair
from cluster.view import ClusterView, LinkView
from core.link import LinkEstimate, ProbeReport
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


def test_only_pairs_from_the_asked_clusters_are_summed() -> None:
    links = view(link(1, EAST), link(2, WEST))

    assert [pair.from_cluster for pair in by_cluster_pair(links, lambda *_: None, {EAST})] == [EAST]


# ---- what a path is believed to carry ----


def test_senders_that_were_busy_together_carry_the_sum_but_no_more_than_went() -> None:
    one = link(1, EAST, goodput=50.0, throughput=50.0)
    two = link(2, EAST, goodput=50.0, throughput=50.0)
    alone = link(2, EAST, goodput=90.0, throughput=5.0)  # each has had the path for itself, in turn

    assert believed_rate([one, two], 0.0, None) == 100.0
    assert believed_rate([replace(one, estimate=alone.estimate), alone], 0.0, None) == 90.0
    assert believed_rate([one, two], 0.0, 80.0) == 80.0, "never above the capacity"


def test_what_was_seen_last_counts_however_long_ago() -> None:
    slow, fast = link(1, EAST, goodput=10.0, age_s=1.0), link(2, EAST, goodput=100.0, age_s=60.0)

    assert believed_rate([slow, fast], 0.0, None) == 10.0
    assert believed_rate([slow, fast], 1000.0, None) == 10.0


def test_a_path_that_narrows_is_believed_as_soon_as_its_links_say_so() -> None:
    # Throughput is of two seconds and still that of the wide path; the rates are of half a second.
    after = [link(n, EAST, goodput=6.0, throughput=50.0) for n in (1, 2)]

    assert believed_rate(after, 0.0, 200.0) == 12.0


def test_before_anything_went_the_capacity_is_believed_or_what_self_tests_found() -> None:
    tested = replace(link(1, EAST), probe=ProbeReport("tcp", 8, True, 30, 0.5), probed_at=0.0)

    assert believed_rate([link(1, EAST)], 0.0, None) is None
    assert believed_rate([link(1, EAST)], 0.0, 7.0) == 7.0
    assert believed_rate([tested], 1.0, None) == 60.0


def test_a_self_test_is_believed_until_something_else_goes() -> None:
    report = ProbeReport("tcp", 8, True, 30, 0.5)
    quiet = replace(link(1, EAST, goodput=9.0, age_s=5.1), probe=report, probed_at=-5.0)
    used = replace(link(1, EAST, goodput=9.0, age_s=1.0), probe=report, probed_at=-5.0)

    assert believed_rate([quiet], 0.0, None) == 60.0
    assert believed_rate([used], 0.0, None) == 9.0


def test_a_pair_says_what_it_is_believed_to_carry_and_when_it_last_did() -> None:
    (pair,) = by_cluster_pair(view(link(1, EAST, goodput=50.0, age_s=3.0)), lambda *_: None)
    (unknown,) = by_cluster_pair(view(link(1, EAST)), lambda *_: None)

    assert (pair.carries, pair.age_s) == (50.0, 3.0)
    assert (unknown.carries, unknown.age_s) == (None, None)
