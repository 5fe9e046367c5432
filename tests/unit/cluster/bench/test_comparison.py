"""Where an arm loses: straight lines between points, crossings by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.comparison import GOODPUT, LATENCIES, LEVEL, criteria, losses, regions_above

TTFT = LATENCIES[0]


def test_a_region_begins_and_ends_where_the_line_crosses_the_limit() -> None:
    assert regions_above([(1, 0.0), (2, 1.0), (3, 1.0), (4, 0.0)], limit=0.5) == [(1.5, 3.5)]
    assert regions_above([(1, 1.0), (2, 0.0), (3, 1.0)], limit=0.5) == [(1, 1.5), (2.5, 3)]


def test_a_single_load_makes_a_region_without_width() -> None:
    assert regions_above([(8, 0.2)]) == [(8, 8)]
    assert regions_above([(8, LEVEL)]) == []


def test_lower_latency_wins_and_the_worst_place_is_named() -> None:
    curves = {"ours": [(1, 1.0), (2, 1.0), (4, 3.0)], "theirs": [(1, 2.0), (2, 1.0), (4, 1.0)]}

    ours, theirs = losses(curves, TTFT)

    assert (ours.arm, ours.end, ours.ratio, ours.worst_at) == ("ours", 4, 2.0, 4)
    assert ours.begin == pytest.approx(2 + LEVEL / 2.0 * 2)
    assert (theirs.arm, theirs.begin, theirs.ratio, theirs.worst_at) == ("theirs", 1, 1.0, 1)


def test_higher_goodput_wins_against_the_best_of_several() -> None:
    curves = {"a": [(1, 4.0)], "b": [(1, 5.0)], "c": [(1, 2.0)]}

    assert [(one.arm, one.ratio) for one in losses(curves, GOODPUT)] == [("a", pytest.approx(0.2)), ("c", 0.6)]


def test_level_arms_lose_nothing_and_unshared_loads_are_left_out() -> None:
    assert losses({"a": [(1, 1.0)], "b": [(1, 1.01)]}, TTFT) == []
    assert losses({"a": [(1, 1.0), (2, 9.0)], "b": [(1, 1.0)]}, TTFT) == []
    assert losses({"a": [(1, 1.0)]}, TTFT) == []


def test_an_arm_without_goodput_loses_all_of_it() -> None:
    (lost,) = losses({"a": [(1, 0.0)], "b": [(1, 2.0)]}, GOODPUT)
    assert (lost.arm, lost.ratio) == ("a", 1.0)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)), min_size=1, max_size=8))
def test_two_arms_never_both_lose_at_one_measured_load(values: list[tuple[float, float]]) -> None:
    curves = {arm: [(load, pair[arm_index]) for load, pair in enumerate(values)] for arm_index, arm in enumerate("ab")}

    found = losses(curves, TTFT)

    for load in range(len(values)):
        inside = {one.arm for one in found if one.begin < load < one.end}
        assert len(inside) < 2


def test_goodput_is_compared_only_under_limits() -> None:
    assert GOODPUT in criteria(has_slo=True)
    assert GOODPUT not in criteria(has_slo=False)
