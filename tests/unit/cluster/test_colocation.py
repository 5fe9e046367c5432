"""Both ways of using the same workers, worked out by hand."""

from __future__ import annotations

import math

import pytest

from cluster.colocation import colocated_rate, disaggregation_gain
from cluster.length_distribution import LengthDistribution
from cluster.throughput_model import Fleet, Polynomial, operating_point

STEP_S = 0.02
STEP = Polynomial((STEP_S,))


def fleet(num_gpus: int = 4, prefill_s: float = 0.5, answer: float = 100, batch: float = 10) -> Fleet:
    """Prompts of 1,000 tokens, seconds that do not depend on length or batch."""
    return Fleet(
        lengths=LengthDistribution.from_sample([1000]),
        mean_output_tokens=answer,
        kv_bytes=Polynomial((0.0, 1000.0)),
        prfaas=(),
        num_local_gpus=num_gpus,
        local_prefill_s=Polynomial((prefill_s,)),
        local_link_bytes_per_s=math.inf,
        max_batch_size=batch,
        decode_step_s=STEP_S,
    )


def test_a_colocated_instance_shares_its_time_between_prompts_and_steps() -> None:
    # A full batch makes 10 answers in 100 * 0.02 = 2 s of steps; their 10 prompts take 5 s: 10 requests in 7 s.
    rate, tpot = colocated_rate(0.5, 100, STEP, 10, None)

    assert rate == pytest.approx(10 / 7)
    assert tpot == pytest.approx(STEP_S / (1 - 10 / 7 * 0.5))  # steps run in 2 of 7 seconds


def test_an_objective_for_tokens_limits_what_a_colocated_instance_takes() -> None:
    rate, tpot = colocated_rate(0.5, 100, STEP, 10, 0.04)

    assert tpot <= 0.04
    assert rate == pytest.approx(1.0, rel=0.05)  # half of the time may go to prompts: 0.5 / 0.5 s
    assert colocated_rate(0.5, 100, STEP, 10, 0.01) == (0.0, math.inf)


def test_gain_compares_throughput_and_both_latencies_at_one_rate() -> None:
    apart = fleet()
    point = operating_point(apart, 3)  # 3 / 0.5 s = 6 req/s of prefill, 10 / 2 s = 5 req/s of decode
    gain = disaggregation_gain(apart, point, STEP, 2.0, None)

    assert gain is not None
    assert gain.rate_rps == 2.0
    assert gain.disaggregated.throughput_rps == pytest.approx(5.0)
    assert gain.colocated.throughput_rps == pytest.approx(4 * 10 / 7)
    assert gain.throughput_ratio == pytest.approx(5 / (40 / 7))
    assert gain.disaggregated.tpot_s == STEP_S  # nothing holds a step up
    assert gain.colocated.tpot_s == pytest.approx(STEP_S / 0.75)  # each prefills 0.5 req/s: a quarter of its time
    assert gain.colocated.ttft_s == pytest.approx(0.5 + 0.25 * 0.5 / 0.75 / 2)  # M/D/1 at load 0.25
    assert gain.disaggregated.ttft_s > 0.5
    assert "disaggregated sustains 5 req/s, colocated 5.71" in gain.reason


def test_latencies_are_compared_at_a_rate_that_both_sustain() -> None:
    apart = fleet()
    gain = disaggregation_gain(apart, operating_point(apart, 3), STEP, 1000.0, None)

    assert gain is not None
    assert gain.rate_rps == pytest.approx(0.9 * 5)
    assert math.isfinite(gain.ttft_ratio)
    assert math.isfinite(gain.tpot_ratio)


def test_steps_that_grow_with_the_batch_make_the_smaller_batch_faster() -> None:
    apart = fleet(prefill_s=0.01)
    gain = disaggregation_gain(apart, operating_point(apart, 2), Polynomial((0.01, 0.002)), 8.0, None)

    assert gain is not None
    assert gain.tpot_ratio < 1, "with prompts this short four workers share the sequences better than two"


def test_where_one_way_serves_nothing_there_is_nothing_to_compare() -> None:
    apart = fleet()
    assert disaggregation_gain(apart, operating_point(apart, 4), STEP, 1.0, None) is None
    assert disaggregation_gain(apart, operating_point(apart, 2), STEP, 1.0, 0.001) is None
