"""Queues by hand with costs of round numbers, and both algorithms where the answer is plain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from cluster.placement_search import (
    Objective,
    Parallelism,
    Request,
    Search,
    Workload,
    joint_goodput_rps,
    max_rate_rps,
    place_high_affinity,
    place_low_affinity,
    simulate_decode,
    simulate_prefill,
)
from cluster.queueing import md1_ttft_s


@dataclass(frozen=True)
class RoundCosts:
    """1 ms a prompt token and 1 s a decode step on one GPU; tensor parallel divides both, by ``scaling`` of it."""

    scaling: float = 1.0
    prefill_s_per_token: float = 1e-3
    step_s: float = 1.0
    min_gpus: int = 1

    def fits(self, parallelism: Parallelism) -> bool:
        return parallelism.num_gpus >= self.min_gpus

    def _speed(self, parallelism: Parallelism) -> float:
        return 1 + (parallelism.tensor - 1) * self.scaling

    def prefill_s(self, parallelism: Parallelism, prompts: Sequence[int]) -> float:
        return sum(prompts) * self.prefill_s_per_token / self._speed(parallelism)

    def decode_step_s(self, parallelism: Parallelism, batch_size: int, context_tokens: int) -> float:
        return self.step_s / self._speed(parallelism)


def workload(*requests: tuple[int, int], batch_tokens: int = 1000, max_batch_size: int = 8) -> Workload:
    return Workload(tuple(Request(*r) for r in requests), batch_tokens, max_batch_size)


ONE = Parallelism(1)


def test_prefill_waits_its_turn() -> None:
    """1 s each, arriving at 0, 0.5 and 5: done at 1, 2 and 6."""
    requests = workload((1000, 1), (1000, 1), (1000, 1))

    assert simulate_prefill(RoundCosts(), ONE, requests, [0, 0.5, 5]) == pytest.approx([1, 2, 6])


def test_prompts_that_wait_go_in_one_batch_up_to_its_size() -> None:
    """The first alone at 0; then 400 + 500 together at 1; 300 more would be over 1,000 tokens."""
    requests = workload((1000, 1), (400, 1), (500, 1), (300, 1))

    assert simulate_prefill(RoundCosts(), ONE, requests, [0, 0.1, 0.2, 0.3]) == pytest.approx([1, 1.9, 1.9, 2.2])


def test_a_pipeline_takes_the_next_batch_before_the_last_is_done() -> None:
    """Two stages of 0.5 s: the second prompt follows after 0.5 s."""
    requests = workload((1000, 1), (1000, 1))

    assert simulate_prefill(RoundCosts(), Parallelism(1, 2), requests, [0, 0]) == pytest.approx([1, 1.5])


def test_sequences_join_a_running_batch_between_steps() -> None:
    """A: 3 tokens from 0: steps end at 1, 2: TPOT 1. B: ready at 0.5, joins at 1, done at 3: (3 - 0.5) / 2."""
    requests = workload((10, 3), (10, 3))

    assert simulate_decode(RoundCosts(), ONE, requests, [0, 0.5]) == pytest.approx([1, 1.25])


def test_a_full_batch_makes_the_next_one_wait() -> None:
    requests = workload((10, 3), (10, 2), max_batch_size=1)

    assert simulate_decode(RoundCosts(), ONE, requests, [0, 0]) == pytest.approx([1, 3])


def test_an_answer_of_one_token_needs_no_step() -> None:
    assert simulate_decode(RoundCosts(), ONE, workload((10, 1), (10, 2)), [0, 0]) == pytest.approx([0, 1])


def test_simulated_prefill_waits_as_md1_says() -> None:
    """20,000 prompts of 100 ms at 5 a second, one at a time: 150 ms on average (DistServe equation 1)."""
    requests = workload(*[(100, 1)] * 20_000, batch_tokens=100)
    arrivals = requests.arrivals_s(5.0)

    done = simulate_prefill(RoundCosts(), ONE, requests, arrivals)

    mean = sum(b - a for a, b in zip(arrivals, done, strict=True)) / len(done)
    assert mean == pytest.approx(md1_ttft_s(5.0, 0.1), rel=0.03)


def test_joint_attainment_is_stricter_than_two_percentiles() -> None:
    ttfts, tpots = [9.0, 1, 1, 1], [1.0, 9, 1, 1]

    assert not Objective(2, 2, attainment=0.75).met(ttfts, tpots)
    assert Objective(2, 2, attainment=0.75, joint=False).met(ttfts, tpots)
    assert Objective(2, 2, attainment=0.5).met(ttfts, tpots)


def test_bisection_keeps_to_its_grid() -> None:
    assert max_rate_rps(lambda rate: rate <= 1.6, most_rps=5, step_rps=0.25) == 5 * 5 / 16
    assert max_rate_rps(lambda rate: False, most_rps=5, step_rps=0.25) == 0


FAST_DECODE = RoundCosts(step_s=0.01)
CHAT = workload(*[(100, 5)] * 200, max_batch_size=64)
LIMITS = Objective(ttft_s=0.3, tpot_s=0.05)


def test_perfect_scaling_gains_nothing_per_gpu_but_latency() -> None:
    """TTFT below what one GPU needs for a prompt: only more GPUs in tensor parallel serve at all."""
    tight = Objective(ttft_s=0.06, tpot_s=0.05)

    placement = place_high_affinity(FAST_DECODE, CHAT, tight, 10, num_nodes=1, gpus_per_node=4)

    assert placement is not None
    assert placement.prefill.tensor > 1
    assert placement.decode == ONE


def test_enough_instances_are_placed_for_the_rate() -> None:
    placement = place_high_affinity(FAST_DECODE, CHAT, LIMITS, 100, num_nodes=1, gpus_per_node=2)

    assert placement is not None
    assert placement.goodput_rps >= 100
    fewer = replace(placement, num_prefill=placement.num_prefill - 1)
    assert fewer.num_prefill * placement.goodput_rps / placement.num_prefill < 100


def test_low_affinity_keeps_both_segments_on_one_node() -> None:
    placement = place_low_affinity(RoundCosts(step_s=0.01, min_gpus=2), CHAT, LIMITS, 1, num_nodes=2, gpus_per_node=2)

    assert placement is not None
    assert (placement.prefill, placement.decode) == (Parallelism(1, 2), Parallelism(1, 2))


def test_what_meets_no_slo_has_no_placement() -> None:
    impossible = Objective(ttft_s=1e-6, tpot_s=1)

    assert place_high_affinity(FAST_DECODE, CHAT, impossible, 1, num_nodes=1, gpus_per_node=2) is None
    assert place_low_affinity(FAST_DECODE, CHAT, impossible, 1, num_nodes=1, gpus_per_node=2) is None
    assert place_high_affinity(RoundCosts(min_gpus=99), CHAT, LIMITS, 1, num_nodes=1, gpus_per_node=2) is None


def test_equal_seeds_give_equal_goodput_and_tighter_slos_never_more() -> None:
    search = Search(most_rps_per_gpu=20, step_rps_per_gpu=0.1)
    loose = [joint_goodput_rps(FAST_DECODE, ONE, ONE, CHAT, LIMITS, search) for _ in range(2)]
    tight = joint_goodput_rps(FAST_DECODE, ONE, ONE, CHAT, replace(LIMITS, ttft_s=0.15), search)

    assert loose[0] == loose[1]
    assert 0 < tight <= loose[0]
