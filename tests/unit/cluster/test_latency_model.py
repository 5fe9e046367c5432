"""Latencies of a fleet of round numbers by hand, and how they move with the rate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.latency_model import LatencySlo, goodput_rps, latency
from cluster.length_distribution import LengthDistribution
from cluster.throughput_model import Fleet, Polynomial, PrfaasCluster, operating_point

# Prompts of 100 and 300 tokens, alike often; local prefill 1 ms a token, remote half of it; 1,000 B a token.
FLEET = Fleet(
    lengths=LengthDistribution.from_sample([100, 300]),
    mean_output_tokens=11,
    kv_bytes=Polynomial((0.0, 1000.0)),
    prfaas=(PrfaasCluster("remote", 1, Polynomial((0.0, 0.5e-3)), 1e9),),
    num_local_gpus=2,
    local_prefill_s=Polynomial((0.0, 1e-3)),
    local_link_bytes_per_s=1e9,
    max_batch_size=100,
    decode_step_s=0.02,
)
POINT = operating_point(FLEET, 1, 200)


def test_idle_latencies_are_those_of_the_model() -> None:
    """100 tokens: 0.1 s + 0.1 ms; 300 tokens: 0.15 s + 0.3 ms."""
    seen = latency(FLEET, POINT, 0.0)

    assert seen.ttft_quantile_s(0.5) == pytest.approx(0.1001, abs=1e-6)
    assert seen.ttft_quantile_s(0.99) == pytest.approx(0.1503, abs=1e-6)
    assert seen.tpot_mean_s == 0.02


def test_each_side_waits_in_its_own_queue() -> None:
    """2 req/s to each side, M/D/1 with D = 0.15 and 0.1: waits 2 * 0.15^2 / (2 * 0.7) and 2 * 0.1^2 / (2 * 0.8)."""
    seen = latency(FLEET, POINT, 4.0)

    assert seen.remote.mean_s == pytest.approx(0.0225 / 0.7)
    assert seen.local.mean_s == pytest.approx(0.01 / 0.8)


def test_the_slower_of_prefill_and_link_is_the_remote_queue() -> None:
    """A link of 0.6 MB/s needs 0.5 s for 300 KB: longer than the 0.15 s of prefill."""
    narrow = replace(FLEET, prfaas=(replace(FLEET.prfaas[0], egress_bytes_per_s=0.6e6),))

    seen = latency(narrow, operating_point(narrow, 1, 200), 2.0)

    assert seen.remote.mean_s == pytest.approx(1.0 * 0.25 / (2 * 0.5))
    assert seen.remote_more_s == pytest.approx(1.0 * 0.0225 / (2 * 0.85))


def test_attainment_counts_both_limits() -> None:
    seen = latency(FLEET, POINT, 0.0)

    assert seen.attainment(LatencySlo(0.12, 0.03, 0.9)) == pytest.approx(0.5)
    assert seen.attainment(LatencySlo(1.0, 0.03, 0.9)) == pytest.approx(1.0)
    assert seen.attainment(LatencySlo(1.0, 0.01, 0.9)) == 0
    assert seen.attainment(LatencySlo(None, None, 0.9)) == 1


def test_goodput_is_where_attainment_ends() -> None:
    slo = LatencySlo(0.4, 0.03, 0.9)
    goodput = goodput_rps(FLEET, POINT, slo)

    assert 0 < goodput < POINT.throughput_rps
    assert latency(FLEET, POINT, goodput * 0.99).attainment(slo) > 0.9
    assert latency(FLEET, POINT, goodput * 1.01).attainment(slo) < 0.9


def test_goodput_without_limits_is_the_throughput_and_with_impossible_ones_nothing() -> None:
    assert goodput_rps(FLEET, POINT, LatencySlo(None, None, 0.9)) == POINT.throughput_rps
    assert goodput_rps(FLEET, POINT, LatencySlo(0.01, None, 0.9)) == 0


def test_beyond_its_capacity_a_fleet_has_no_latency() -> None:
    assert latency(FLEET, POINT, 2 * POINT.throughput_rps).ttft_quantile_s(0.99) == math.inf
