"""DistServe's equations by hand, their relations, and M/G/c against the cases that have exact answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.queueing import (
    NO_WAIT,
    Wait,
    erlang_c,
    md1_pipelined_ttft_s,
    md1_tensor_parallel_ttft_s,
    md1_ttft_s,
    mgc_wait,
)


def test_md1_by_hand() -> None:
    """R = 5/s, D = 0.1 s: 0.1 + 5 * 0.01 / (2 * 0.5); / (4 * 1.5); K = 1.6: 0.0625 + 0.05 / (3.2 * 1.1)."""
    assert md1_ttft_s(5, 0.1) == pytest.approx(0.15)
    assert md1_pipelined_ttft_s(5, 0.1) == pytest.approx(0.1 + 0.05 / 6)
    assert md1_tensor_parallel_ttft_s(5, 0.1, 1.6) == pytest.approx(0.0625 + 0.05 / 3.52)


def test_tensor_parallelism_wins_at_low_rates_and_pipelines_at_high_ones() -> None:
    """DistServe section 3.1, figure 4."""
    assert md1_tensor_parallel_ttft_s(1, 0.1, 1.6) < md1_pipelined_ttft_s(1, 0.1)
    assert md1_tensor_parallel_ttft_s(15.5, 0.1, 1.6) > md1_pipelined_ttft_s(15.5, 0.1)


def test_a_full_queue_waits_forever() -> None:
    assert md1_ttft_s(10, 0.1) == math.inf
    assert mgc_wait(10, 1, 0.1, 0).mean_s == math.inf
    assert mgc_wait(10, 1, 0.1, 0).at_most(1e9) == 0
    assert mgc_wait(1, 0, 0.1, 0).mean_s == math.inf


@given(st.floats(0.01, 9.9))
def test_one_server_of_fixed_service_is_md1(rate: float) -> None:
    assert 0.1 + mgc_wait(rate, 1, 0.1, 0.0).mean_s == pytest.approx(md1_ttft_s(rate, 0.1))


def test_erlang_c_by_hand() -> None:
    """Two servers at load 1/2: 2 rho^2 / (1 + rho) = 1/3; one server: rho."""
    assert erlang_c(2, 0.5) == pytest.approx(1 / 3)
    assert erlang_c(1, 0.7) == pytest.approx(0.7)


@given(st.integers(1, 40), st.floats(0.01, 0.98), st.floats(0, 3))
def test_the_tail_has_the_mean_that_it_states(num_servers: int, load: float, variation: float) -> None:
    wait = mgc_wait(load * num_servers, num_servers, 1.0, variation)
    step = wait.mean_if_any_s / 200
    tail = float(np.sum(1 - wait.each_at_most(np.arange(4000) * step)) * step)

    assert 0 <= wait.probability <= 1
    assert tail == pytest.approx(wait.mean_s, rel=0.01)


def test_nobody_waits_where_nobody_comes() -> None:
    assert mgc_wait(0, 3, 1, 1) == NO_WAIT
    assert NO_WAIT.at_most(0) == 1


def test_a_wait_is_none_or_exponential_and_many_are_asked_for_at_once() -> None:
    seconds = np.array([-1e-3, 0.0, 2.0, math.inf])
    quarter = [0.0, 0.75, 1 - 0.25 / math.e, 1.0]  # one in four waits, for 2 s on average

    assert Wait(0.25, 2.0).each_at_most(seconds).tolist() == pytest.approx(quarter)
    assert Wait(0.25, 2.0).at_most(2.0) == pytest.approx(quarter[2])
    assert NO_WAIT.each_at_most(seconds).tolist() == [0.0, 1.0, 1.0, 1.0]
    assert Wait(1.0, math.inf).each_at_most(seconds[:3]).tolist() == [0.0, 0.0, 0.0]
