"""What a full fleet does, by hand; and what is counted of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.case_study import CaseStudy
from benchmarks.saturation import busy, ended_between, with_own_seconds
from cluster.length_distribution import LengthDistribution
from cluster.simulator.records import RequestRecord
from cluster.simulator.timeline import ClusterSample, Sample
from cluster.throughput_model import Fleet, Polynomial, PrfaasCluster, operating_point
from core.request import NO_SLO, ClusterId

# A prompt of n tokens takes n^2 us locally, half of it there; K/V is 1,000 bytes a token.
FLEET = Fleet(
    lengths=LengthDistribution.from_sample([100, 300, 500, 700]),
    mean_output_tokens=10,
    kv_bytes=Polynomial((0.0, 1000.0)),
    prfaas=(PrfaasCluster("remote", 2, Polynomial((0.0, 0.0, 0.5e-6)), 1e9),),
    num_local_gpus=3,
    local_prefill_s=Polynomial((0.0, 0.0, 1e-6)),
    local_link_bytes_per_s=1e9,
    max_batch_size=1000,
    decode_step_s=0.02,
)


def record(arrived_at: float, total_s: float, outcome: str = "ok") -> RequestRecord:
    return RequestRecord(0, arrived_at, 100, 10, outcome, 0.1, total_s, NO_SLO, None)


def test_each_prompt_takes_its_own_seconds_which_is_longer_than_the_mean_prompt_takes() -> None:
    """Long: 0.5e-6 * (500^2 + 700^2) / 2 = 0.185 s, two of them at a time; short: (100^2 + 300^2) / 2 us = 0.05 s."""
    assert with_own_seconds(FLEET, 1, 300, FLEET.lengths) == pytest.approx(2 / 0.185 + 1 / 0.05)
    point = operating_point(FLEET, 1, 300)
    assert point.theta_prfaas_rps + point.theta_prefill_rps == pytest.approx(2 / 0.18 + 1 / 0.04)


def test_a_narrow_link_and_slow_decoding_limit_it() -> None:
    narrow = replace(FLEET, prfaas=(replace(FLEET.prfaas[0], egress_bytes_per_s=6e5),))
    assert with_own_seconds(narrow, 1, 300, FLEET.lengths) == pytest.approx(1 + 1 / 0.05)  # 600,000 bytes each
    slow = replace(FLEET, mean_output_tokens=1e6)
    assert with_own_seconds(slow, 1, 300, FLEET.lengths) == pytest.approx(2 * 1000 / (0.02 * 1e6))


@pytest.mark.parametrize(("threshold", "rps"), [(0, 2 / 0.105), (1000, 1 / 0.21)])
def test_a_side_without_prompts_does_nothing(threshold: float, rps: float) -> None:
    assert with_own_seconds(FLEET, 1, threshold, FLEET.lengths) == pytest.approx(rps)


def test_what_ended_meanwhile_counts_whenever_it_came() -> None:
    records = [record(0, 50), record(50, 20), record(50, 60), record(60, 5, "Overloaded")]

    assert ended_between(records, 60, 100) == [records[1]]


def test_a_stage_is_busy_as_its_workers_are_on_average_from_when_it_is_full() -> None:
    def sample(at_s: float, prefill: float, running: int) -> Sample:
        local = ClusterSample(ClusterId("local"), 3, 5, prefill, 1.0, 0, running, 0.0)
        away = ClusterSample(ClusterId("prfaas"), 4, 0, prefill / 2, 0.0, 0, 0, 0.0)
        return Sample(at_s, 0, 0.0, (local, away), ())

    samples = [sample(10, 0.1, 1), sample(70, 0.8, 80), sample(80, 1.0, 100), sample(200, 0.1, 1)]
    shares = busy(samples, 100, 20)

    assert shares == {"prfaas_busy": pytest.approx(0.45), "prefill_busy": pytest.approx(0.9), "decode_busy": 0.9}


def test_the_case_study_is_the_papers() -> None:
    fleet = CaseStudy(4.0).fleet()

    assert (fleet.num_prfaas, fleet.prfaas[0].egress_bytes_per_s) == (4, 0.5e9)
