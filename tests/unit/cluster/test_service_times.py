"""Measurements become lines, means and durations, and are forgotten when they are old."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.service_times import MEASUREMENT_LIFE_S, DrainRate, Line, Measurements, ServiceTimes


def test_nothing_measured_is_nothing_known() -> None:
    assert Measurements().times(0.0) == ServiceTimes()
    assert DrainRate().rate(100.0) is None


def test_points_on_a_line_give_that_line() -> None:
    measured = Measurements()
    for tokens in (100, 200, 300):
        measured.first_token(tokens, 0.5 + 0.001 * tokens, now=1.0)

    line = measured.times(1.0).first_token

    assert line is not None
    assert (line.constant, line.slope) == (pytest.approx(0.5), pytest.approx(0.001))
    assert line.at(1000) == pytest.approx(1.5)


def test_points_at_one_x_lie_through_the_origin_for_prompts_and_on_a_level_for_batches() -> None:
    measured = Measurements()
    measured.first_token(100, 0.2, now=1.0)
    measured.finished(batch=4, num_tokens=11, seconds=0.5, now=1.0)

    times = measured.times(1.0)

    assert times.first_token == Line(0.0, pytest.approx(0.002))  # type: ignore[arg-type]
    assert times.token == Line(pytest.approx(0.05), 0.0)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(1, 10**5), st.floats(1e-4, 1e3)), min_size=1, max_size=30))
def test_whatever_was_measured_no_line_falls_or_begins_below_nothing(samples: list[tuple[int, float]]) -> None:
    measured = Measurements()
    for tokens, seconds in samples:
        measured.first_token(tokens, seconds, now=0.0)

    line = measured.times(0.0).first_token

    assert line is not None
    assert line.constant >= 0
    assert line.slope >= 0
    assert math.isfinite(line.at(10**6))


def test_durations_are_in_order_and_the_oldest_are_dropped() -> None:
    measured = Measurements()
    for seconds in (9.0, *(3.0 + k % 3 for k in range(256))):
        measured.finished(batch=1, num_tokens=2, seconds=seconds, now=0.0)

    decode = measured.times(0.0).decode

    assert list(decode) == sorted(decode)
    assert len(decode) == 256
    assert 9.0 not in decode


def test_a_single_token_has_no_time_between_tokens() -> None:
    measured = Measurements()
    measured.finished(batch=1, num_tokens=1, seconds=0.0, now=0.0)

    assert measured.times(0.0) == ServiceTimes()


def test_lines_that_nothing_was_added_to_lately_are_forgotten_so_that_refusals_end() -> None:
    measured = Measurements()
    measured.first_token(100, 1000.0, now=0.0)
    measured.finished(batch=1, num_tokens=2, seconds=1.0, now=5.0)

    assert measured.times(MEASUREMENT_LIFE_S).first_token is not None
    assert measured.times(MEASUREMENT_LIFE_S + 1.0).first_token is None
    assert measured.times(MEASUREMENT_LIFE_S + 1.0).token is not None
    assert measured.times(MEASUREMENT_LIFE_S + 6.0) == ServiceTimes(decode=(1.0,), token_s=1.0)


def test_the_rate_of_a_queue_is_what_went_in_the_time_that_something_waited_and_falls_when_nothing_goes() -> None:
    drain = DrainRate()
    drain.rest(100.0)
    assert drain.rate(100.1) is None
    for second in (101.0, 102.0, 103.0):
        drain.note(50.0, second)

    assert drain.rate(103.0) == pytest.approx(50.0, rel=0.15)
    assert drain.rate(106.0) == pytest.approx(25.0, rel=0.15)
    drain.rest(200.0)
    assert drain.rate(201.0) is None
