"""What the meter says of requests that came and went, by hand; and for any stream of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.demand import REMEMBERED, DemandMeter
from cluster.planning_policy import MeasuredDemand
from cluster.prefix_index import PrefixLevel, PrefixMatch
from cluster.routing_policy import RouteRequest
from cluster.view import PagePull, Route
from core.clock import VirtualClock
from core.request import EngineId, RequestId, Role
from tests.unit.cluster.scripted_router import worker

PREFILL, DECODE, SOURCE = (
    worker("prefill-0", Role.PREFILL),
    worker("decode-0", Role.DECODE),
    worker("decode-1", Role.DECODE),
)
ROUTE = Route(PREFILL, DECODE, "a test's")
PAGE = PREFILL.model.fingerprint.page_size


def request(num_tokens: int, cached_pages: int = 0) -> RouteRequest:
    """One of whose pages prefill-0 caches so many."""
    match = PrefixMatch((PrefixLevel(cached_pages, 1),), {EngineId("prefill-0-e"): 0})
    return RouteRequest(RequestId("r"), num_tokens, 0, matches={PAGE: match})


def meter(window_s: float = 30.0) -> tuple[DemandMeter, VirtualClock]:
    clock = VirtualClock(50.0)
    return DemandMeter(clock, window_s), clock


def lengths(demand: MeasuredDemand) -> dict[float, float]:
    assert demand.lengths is not None
    return dict(zip(demand.lengths.tokens.tolist(), demand.lengths.weights.tolist(), strict=True))


def test_before_the_first_request_nothing_is_known() -> None:
    demand = meter()[0].measured(0, 0)

    assert (demand.lengths, demand.rate_rps, demand.mean_output_tokens, demand.num_requests) == (None, 0.0, 0.0, 0.0)
    assert demand.relative_error == math.inf


def test_a_prompt_counts_with_what_must_be_computed_of_it() -> None:
    counted, _ = meter()
    counted.routed(request(100), ROUTE)
    counted.routed(request(100, cached_pages=3), ROUTE)  # 48 cached, 52 not
    counted.routed(request(100, cached_pages=3), Route(PREFILL, DECODE, "", pull=PagePull(SOURCE, 64)))
    counted.routed(request(100, cached_pages=3), Route(None, DECODE, "decode-0 caches nothing"))

    assert lengths(counted.measured(0, 0)) == {36.0: 0.25, 52.0: 0.25, 100.0: 0.5}
    assert counted.measured(0, 0).mean_cached_tokens == (48 + 64) / 4


def test_lengths_of_one_bin_are_their_mean() -> None:
    counted, _ = meter()
    for tokens in (10_300, 10_400, 10_500):  # one bin, 10,174 to 10,624
        counted.routed(request(tokens), ROUTE)

    assert lengths(counted.measured(0, 0)) == {10_400.0: pytest.approx(1.0)}


def test_the_rate_is_that_of_the_window_also_while_it_is_not_full() -> None:
    counted, clock = meter(window_s=10.0)
    for _ in range(20):
        clock.advance(0.5)
        counted.routed(request(100), ROUTE)
        clock.advance(0.0)
    assert counted.measured(0, 0).rate_rps == pytest.approx(2.0, rel=0.05)

    clock.advance(10.0)
    assert counted.measured(0, 0).rate_rps == pytest.approx(2.0 * math.exp(-1), rel=0.3)
    clock.advance(1000.0)
    assert counted.measured(0, 0).rate_rps < 1e-9


def test_old_requests_fade_but_the_last_ones_are_never_forgotten() -> None:
    counted, clock = meter(window_s=10.0)
    for _ in range(1000):
        counted.routed(request(100), ROUTE)
    clock.advance(1e6)
    counted.measured(0, 0)
    for _ in range(round(REMEMBERED)):
        counted.routed(request(200), ROUTE)

    shares = lengths(counted.measured(0, 0))
    assert shares == {100.0: pytest.approx(0.5), 200.0: pytest.approx(0.5)}
    clock.advance(1e6)
    assert lengths(counted.measured(0, 0)) == shares  # a quiet night


def test_answers_are_those_that_ended_and_what_others_have_beyond_what_so_many_would_have() -> None:
    counted, _ = meter()
    for _ in range(5):
        counted.routed(request(100), ROUTE)
    for _ in range(2):
        counted.ended(20)

    assert counted.measured(0, 0).mean_output_tokens == 20
    assert counted.measured(30, 3).mean_output_tokens == 20  # half of 20 each
    assert counted.measured(150, 3).mean_output_tokens == 20 + (150 - 30 - 10) / 2  # 10: what chance makes of three
    assert counted.measured(150, 3).mean_output_tokens == 75  # nothing happened meanwhile


def test_before_any_answer_has_ended_all_are_taken_to_be_halfway() -> None:
    counted, _ = meter()
    counted.routed(request(100), ROUTE)
    assert counted.measured(0, 0).mean_output_tokens == 0
    assert counted.measured(40, 2).mean_output_tokens == 40


@settings(max_examples=12, deadline=None)  # each is a simulation of up to 2,000 measurements
@given(st.integers(1, 20), st.integers(2, 400))
def test_a_service_that_fills_up_with_answers_all_alike_has_no_longer_ones(every: int, length: int) -> None:
    counted, clock = meter(window_s=30.0)
    begun: list[int] = []
    num_ended = 0
    for tick in range(3 * length + 40 * every):  # of one token each
        clock.advance(0.05)
        if tick % every == 0:
            counted.routed(request(100), ROUTE)
            begun.append(tick)
        if begun and tick - begun[0] == length:
            begun.pop(0)
            num_ended += 1
            counted.ended(length)
        answers = counted.measured(sum(tick - start for start in begun), len(begun)).mean_output_tokens
        if num_ended >= 1:
            assert answers == pytest.approx(length, rel=0.2)


def test_a_surge_of_long_answers_is_seen_before_any_of_them_ends() -> None:
    counted, clock = meter(window_s=30.0)
    for _ in range(100):
        clock.advance(0.5)
        counted.routed(request(100), ROUTE)
        counted.ended(20)
        counted.measured(0, 0)
    assert counted.measured(0, 0).mean_output_tokens == pytest.approx(20)

    open_tokens = 0
    for second in range(10):  # two requests a second, none ends, each makes 50 tokens a second
        clock.advance(1.0)
        counted.routed(request(100), ROUTE)
        counted.routed(request(100), ROUTE)
        open_tokens += 2 * second * 50
        demand = counted.measured(open_tokens, 2 * second + 2)
    assert demand.mean_output_tokens > 100


def test_a_request_that_ended_without_a_token_is_no_short_answer() -> None:
    counted, _ = meter()
    counted.routed(request(100), ROUTE)
    counted.ended(40)
    for _ in range(10):
        counted.routed(request(100), ROUTE)
        counted.ended(0)

    assert counted.measured(0, 0).mean_output_tokens == 40
    assert counted.measured(0, 0).num_requests == 1


def test_equal_requests_leave_nothing_to_chance_and_mixed_ones_less_with_their_number() -> None:
    def error(answers: list[int]) -> float:
        counted, _ = meter()
        for answer in answers:
            counted.routed(request(100), ROUTE)
            counted.ended(answer)
        return counted.measured(0, 0).relative_error

    assert error([50] * 20) == pytest.approx(0.0, abs=1e-6)
    assert error([10, 90] * 8) == pytest.approx(0.8 / 4)  # deviation 40, mean 50, 16 of them
    assert error([10, 90] * 32) == pytest.approx(0.8 / 8)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 10_000_000), st.integers(0, 100_000), st.floats(0, 1e4)), min_size=1, max_size=200
    )
)
def test_whatever_comes_it_stays_a_distribution_of_bounded_size(stream: list[tuple[int, int, float]]) -> None:
    counted, clock = meter(window_s=5.0)
    for tokens, answer, passed_s in stream:
        clock.advance(passed_s)
        counted.routed(request(tokens), ROUTE)
        counted.ended(answer)
        demand = counted.measured(0, 0)
        assert demand.lengths is not None
        assert len(demand.lengths.tokens) <= 384
        assert demand.lengths.tokens[0] >= 1
        assert min(t for t, *_ in stream) * 0.95 - 1 <= demand.lengths.mean_tokens
        assert demand.lengths.mean_tokens <= max(t for t, *_ in stream) * 1.05 + 1
        assert 0 <= demand.rate_rps < math.inf
        assert 0 <= demand.mean_output_tokens <= 100_001
        assert 0 <= demand.num_requests <= len(stream) + 1e-6
