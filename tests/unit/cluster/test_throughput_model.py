"""Equations 3 to 8 by hand on a small fleet, against the paper's printed case study, and their monotonicity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.length_distribution import LengthDistribution
from cluster.throughput_model import (
    DECODE,
    LOCAL_PREFILL,
    OFFLOAD_NOTHING,
    PRFAAS_COMPUTE,
    PRFAAS_LINK,
    Backlog,
    Fleet,
    Horizon,
    Polynomial,
    PrfaasCluster,
    best_operating_point,
    best_threshold_tokens,
    cluster_egress_bytes_per_s,
    egress_bytes_per_s,
    idle_ttft,
    kv_throughput_bytes_per_s,
    operating_point,
    outcome,
    prefill_capacity_rps,
    sooner_beyond_tokens,
    threshold_for,
)

MIB = 2**20
# Four lengths, equally likely. Remote prefill takes 1 ms a token, local 4 ms; K/V is 1,000 bytes a token.
LENGTHS = LengthDistribution.from_sample([100, 200, 300, 400])
SMALL = Fleet(
    lengths=LENGTHS,
    mean_output_tokens=10,
    kv_bytes=Polynomial((0.0, 1000.0)),
    prfaas=(PrfaasCluster("remote", 2, Polynomial((0.0, 1e-3)), 1e6),),
    num_local_gpus=3,
    local_prefill_s=Polynomial((0.0, 4e-3)),
    local_link_bytes_per_s=1e9,
    max_batch_size=4,
    decode_step_s=0.02,
)


def test_equations_by_hand() -> None:
    """t = 200: p = 1/2, l_long = 350, l_short = 150.

    (3) min(2 / 0.35, 1e6 / 350e3) = 2.857: the link; (4) 1 / 0.6 = 1.667; (5) 2 * 4 / (0.02 * 10) = 40;
    (6) min(2.857 / 0.5, 1.667 / 0.5, 40) = 3.333, local prefill; egress 3.333 * 0.5 * 350,000 = 583,333 B/s.
    """
    point = operating_point(SMALL, num_prefill=1, threshold_tokens=200)

    assert point.theta_prfaas_rps == pytest.approx(1e6 / 350e3)
    assert point.theta_prefill_rps == pytest.approx(1 / 0.6)
    assert point.theta_decode_rps == pytest.approx(40)
    assert point.throughput_rps == pytest.approx(1 / 0.3)
    assert point.bottleneck == LOCAL_PREFILL
    assert point.egress_bytes_per_s == pytest.approx(583_333, rel=1e-5)
    assert (point.offload_fraction, point.l_long_tokens, point.l_short_tokens) == (0.5, 350, 150)


@pytest.mark.parametrize(
    ("fleet", "threshold", "bottleneck"),
    [
        (SMALL, 0, PRFAAS_LINK),
        (replace(SMALL, prfaas=(replace(SMALL.prfaas[0], egress_bytes_per_s=1e9),)), 0, PRFAAS_COMPUTE),
        (SMALL, OFFLOAD_NOTHING, LOCAL_PREFILL),
        (replace(SMALL, max_batch_size=0.1), 200, DECODE),
    ],
)
def test_bottleneck_is_the_stage_that_limits(fleet: Fleet, threshold: float, bottleneck: str) -> None:
    assert operating_point(fleet, 1, threshold).bottleneck == bottleneck


def test_best_threshold_by_hand() -> None:
    """Capacity at t = 100, 200, 300: local 1/(0.25*0.4) = 10, 3.33, 1.67; remote 1e6 over 225,000, 175,000, 100,000 B
    a request = 4.44, 5.71, 10. So 100 is best: min(10, 4.44)."""
    capacity = prefill_capacity_rps(SMALL, 1, np.array([0.0, 100, 200, 300, 400]))

    assert capacity == pytest.approx([4.0, 1e6 / 225e3, 1 / 0.3, 1 / 0.6, 1.0])
    assert 100 <= best_threshold_tokens(SMALL, 1) < 200


def test_roles_go_where_they_are_needed() -> None:
    few_steps = best_operating_point(SMALL)
    many_steps = best_operating_point(replace(SMALL, mean_output_tokens=1000))

    assert (few_steps.num_prefill, few_steps.num_decode) == (2, 1)
    assert (many_steps.num_prefill, many_steps.num_decode) == (0, 3)
    assert many_steps.bottleneck == DECODE


def test_roles_may_take_different_numbers_of_gpus() -> None:
    """10 GPUs, prefill on 2, decode on 4: one prefill instance leaves 8 GPUs, which are two decode instances."""
    fleet = replace(SMALL, num_local_gpus=10, gpus_per_prefill=2, gpus_per_decode=4)

    assert fleet.most_prefill == 3
    assert [fleet.num_decode(n) for n in range(4)] == [2, 2, 1, 1]


def test_without_prfaas_nothing_is_offloaded() -> None:
    point = best_operating_point(replace(SMALL, prfaas=()))

    assert point.threshold_tokens == OFFLOAD_NOTHING
    assert (point.theta_prfaas_rps, point.egress_bytes_per_s, point.l_long_tokens) == (0, 0, None)
    assert point.throughput_rps == pytest.approx(2 / (4e-3 * 250))


def test_two_prfaas_clusters_add_up_and_share_by_their_rates() -> None:
    near, far = SMALL.prfaas[0], replace(SMALL.prfaas[0], name="far", egress_bytes_per_s=0.5e6)
    both = replace(SMALL, prfaas=(near, far))

    point = operating_point(both, 1, 200)

    assert point.theta_prfaas_rps == pytest.approx(1.5e6 / 350e3)
    near_bytes, far_bytes = egress_bytes_per_s(both, point, rate_rps=2.0)
    assert (near_bytes, far_bytes) == pytest.approx((2 / 3 * 350e3, 1 / 3 * 350e3))


def test_idle_ttft_by_hand() -> None:
    """Local: 4 ms + 1 us a token; remote: 1 ms + 1 ms a token (1,000 B over 1e6 B/s)."""
    ttft = idle_ttft(SMALL, operating_point(SMALL, 1, 200))

    assert ttft.seconds == pytest.approx([0.4001, 0.8002, 0.6, 0.8])
    assert ttft.mean_s == pytest.approx((0.4001 + 0.8002 + 0.6 + 0.8) / 4)
    assert ttft.quantile_s(0.5) == pytest.approx(0.6)


def test_equations_1_and_2_by_the_papers_examples() -> None:
    """Table 5 at 32K, and section 2.3: 512 H200 of MiniMax-M2.5 at 32K send 3.8 Tbit/s."""
    phi = kv_throughput_bytes_per_s(701.3 * MIB, 1.84)

    assert phi * 8e-9 == pytest.approx(3.19, rel=0.005)
    assert cluster_egress_bytes_per_s(512, 8, 59.93e9 / 8) * 8e-12 == pytest.approx(3.8, rel=0.015)


def test_fit_goes_through_as_many_points_as_it_has_coefficients() -> None:
    points = [(1000.0, 1.0), (10_000.0, 3.0), (100_000.0, 40.0)]

    fitted = Polynomial.fit(points)

    assert fitted(np.array([1000.0, 10_000.0, 100_000.0])) == pytest.approx([1, 3, 40])
    assert Polynomial.fit(points[:1])(np.array([7.0])) == pytest.approx([1])


@pytest.fixture(scope="module")
def case_study() -> Fleet:
    """PrfaaS section 4, from table 5; what is inferred there is said in PAPERS.md A.12."""
    table_5 = [(1000, 190.8, 0.44), (8000, 308.9, 0.72), (32_000, 701.3, 1.84), (128_000, 2316.3, 7.40)]
    h200 = Polynomial.fit([(tokens, seconds) for tokens, _, seconds in table_5])
    return Fleet(
        lengths=LengthDistribution.log_normal(9.90, 1.00, 128, 131_072),
        mean_output_tokens=1024,
        kv_bytes=Polynomial.fit([(tokens, mib * MIB) for tokens, mib, _ in table_5], degree=1),
        prfaas=(PrfaasCluster("prfaas", 4, h200, 100e9 / 8),),
        num_local_gpus=8,
        local_prefill_s=Polynomial.fit([(10_224, 3 / 1.64), (27_486, 9 / 2.11), (62_410, 9.73)]),
        local_link_bytes_per_s=800e9 / 8,
        max_batch_size=20,
        decode_step_s=0.025,
    )


def test_table_6_prfaas(case_study: Fleet) -> None:
    point = best_operating_point(case_study)
    ttft = idle_ttft(case_study, point)

    assert (point.num_prfaas, point.num_prefill, point.num_decode) == (4, 3, 5)
    assert point.threshold_tokens == pytest.approx(19_400, rel=0.015)
    assert point.offload_fraction == pytest.approx(0.496, rel=0.015)
    assert point.theta_prfaas_rps == pytest.approx(1.61, rel=0.015)
    assert point.theta_prefill_rps == pytest.approx(1.64, rel=0.015)
    assert point.theta_decode_rps == pytest.approx(3.91, rel=0.015)
    assert point.throughput_rps == pytest.approx(3.24, rel=0.015)
    assert (ttft.mean_s, ttft.quantile_s(0.9)) == pytest.approx((2.22, 3.51), rel=0.015)


def test_table_6_homogeneous(case_study: Fleet) -> None:
    fleet = replace(case_study, prfaas=(), num_local_gpus=12)

    point = best_operating_point(fleet)
    ttft = idle_ttft(fleet, point)

    assert (point.num_prefill, point.num_decode) == (9, 3)
    assert point.throughput_rps == pytest.approx(2.11, rel=0.015)
    assert (ttft.mean_s, ttft.quantile_s(0.9)) == pytest.approx((4.44, 9.73), rel=0.015)


def test_table_6_naive(case_study: Fleet) -> None:
    point = operating_point(case_study, num_prefill=0, threshold_tokens=0)

    assert point.theta_decode_rps == pytest.approx(6.25)
    assert point.throughput_rps == pytest.approx(2.45, rel=0.015)


FLEETS = st.builds(
    lambda sample, remote, local, link, c0, c1, c2: replace(
        SMALL,
        lengths=LengthDistribution.from_sample(sample),
        prfaas=(PrfaasCluster("remote", remote, Polynomial((c0, c1, c2)), link),),
        num_local_gpus=local,
        local_prefill_s=Polynomial((c0, 3 * c1, 3 * c2)),
    ),
    st.lists(st.integers(1, 200_000), min_size=1, max_size=40),
    st.integers(1, 8),
    st.integers(2, 6),
    st.floats(1e5, 1e10),
    st.floats(1e-3, 1),
    st.floats(1e-6, 1e-3),
    st.floats(0, 1e-9),
)


@settings(max_examples=40)
@given(FLEETS)
def test_the_search_is_no_worse_than_any_threshold_and_role(fleet: Fleet) -> None:
    best = best_operating_point(fleet)
    tried = [
        operating_point(fleet, num_prefill, float(t)).throughput_rps
        for num_prefill in range(1, fleet.most_prefill + 1)
        for t in [0.0, *fleet.lengths.tokens]
    ]

    assert best.throughput_rps >= max(tried) * (1 - 1e-6)


@settings(max_examples=40)
@given(FLEETS, st.floats(1, 10))
def test_more_bandwidth_never_lowers_throughput(fleet: Fleet, factor: float) -> None:
    wider = replace(
        fleet, prfaas=(replace(fleet.prfaas[0], egress_bytes_per_s=factor * fleet.prfaas[0].egress_bytes_per_s),)
    )

    assert best_operating_point(wider).throughput_rps >= best_operating_point(fleet).throughput_rps * (1 - 1e-6)


# ---- a threshold for the next seconds ----


def test_what_is_served_within_a_horizon_by_hand() -> None:
    """20 requests in 10 s, t = 200: 10 long ones at 2.857/s over the link take 3.5 s, 10 short ones at 1.667/s 6 s.

    With 5 s of backlog on the link and 6 s before the local worker, of the short ones 4 s * 1.667/s = 6.67 are served.
    """
    empty = outcome(SMALL, 1, np.array([200.0]), Horizon(2.0, 10.0))
    queued = outcome(SMALL, 1, np.array([200.0]), Horizon(2.0, 10.0, Backlog(link_s=5.0, local_s=6.0)))

    assert (empty.served[0], empty.fullness[0]) == (1.0, pytest.approx(0.6))
    assert queued.served[0] == pytest.approx((10 + 4 / 0.6) / 20)
    assert queued.fullness[0] == pytest.approx(1.2)


def test_a_stage_that_may_not_be_filled_serves_less() -> None:
    found = outcome(SMALL, 1, np.array([200.0]), Horizon(2.0, 10.0, share=0.5))

    assert found.served[0] == pytest.approx((10 + 5 / 0.6) / 20)


def test_a_link_on_which_nothing_arrives_in_time_serves_nothing() -> None:
    slow = replace(SMALL, prfaas=(replace(SMALL.prfaas[0], egress_bytes_per_s=100.0),))
    found = outcome(slow, 1, np.array([200.0, 400.0]), Horizon(2.0, 10.0))

    assert found.served[0] == 0
    assert found.served[1] == pytest.approx(10 / 20)
    assert threshold_for(slow, 1, Horizon(2.0, 10.0)) == 400


@pytest.mark.parametrize("egress", [1e5, 1e6, 1e8])
def test_without_a_backlog_and_with_room_for_all_it_is_equation_7(egress: float) -> None:
    lengths = LengthDistribution.from_sample(list(range(10, 2000, 7)))
    fleet = replace(SMALL, lengths=lengths, prfaas=(replace(SMALL.prfaas[0], egress_bytes_per_s=egress),))
    chosen, best = threshold_for(fleet, 1, Horizon(0.05, 200.0)), best_threshold_tokens(fleet, 1)
    capacities = prefill_capacity_rps(fleet, 1, np.array([chosen, best]))

    assert capacities[0] == pytest.approx(capacities[1], rel=0.01)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.1, 10),
    st.floats(1, 60),
    st.builds(Backlog, st.floats(0, 30), st.floats(0, 30), st.floats(0, 30)),
    st.floats(0.1, 1),
)
def test_no_other_threshold_serves_more(rate: float, seconds: float, backlog: Backlog, share: float) -> None:
    horizon = Horizon(rate, seconds, backlog, share)
    chosen = threshold_for(SMALL, 1, horizon)
    others = outcome(SMALL, 1, np.array([0.0, 100, 200, 300, 400]), horizon)
    found = outcome(SMALL, 1, np.array([chosen]), horizon)

    assert 0 <= found.served[0] <= 1
    assert found.served[0] >= others.served.max() - 2e-3
    as_good = others.served >= others.served.max() - 1e-9
    assert found.fullness[0] <= others.fullness[as_good].min() + 1e-9


def test_without_a_side_there_is_no_choice() -> None:
    assert threshold_for(replace(SMALL, prfaas=()), 1, Horizon(1.0, 10.0)) == OFFLOAD_NOTHING
    assert threshold_for(SMALL, 0, Horizon(1.0, 10.0)) == 0


@pytest.mark.parametrize(
    ("egress", "beyond"),
    # 1,000 n bytes against 0.004 n s, prefill there 0.001 n + 0.1 s: sooner there from 33.3 tokens on, or never
    [(1e9, 32.0), (2e5, OFFLOAD_NOTHING)],
)
def test_beyond_which_length_an_idle_cluster_is_sooner(egress: float, beyond: float) -> None:
    cluster = PrfaasCluster("remote", 2, Polynomial((0.1, 1e-3)), egress)

    assert sooner_beyond_tokens(cluster, SMALL.local_prefill_s, SMALL.kv_bytes) == beyond
