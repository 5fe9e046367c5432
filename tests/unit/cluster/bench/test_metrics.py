"""Percentiles, throughput and goodput of a few requests, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.client_record import USAGE, ClientRecord
from cluster.bench.metrics import Slos, attainment_curve, peak_concurrency, summary
from core.errors import InvalidConfig


def request(number: int, sent_at: float, ttft_s: float, tpot_s: float, tokens: int = 5) -> ClientRecord:
    chunks = tuple(ttft_s + index * tpot_s for index in range(tokens))
    return ClientRecord(number, number, 0, sent_at, sent_at, 100, tokens, chunks, chunks[-1], tokens, USAGE, 100, 50)


# Ends at 1.4, 2.2 and 3.8 s; the fourth fails at 4 s.
DONE = (request(0, 0.0, 1.0, 0.1), request(1, 1.0, 0.8, 0.1), request(2, 2.0, 1.0, 0.2))
FAILED = replace(request(3, 3.0, 0.5, 0.1), error="http_429", ended_s=1.0)
SLOS = Slos({"ttft": 0.9, "tpot": 0.15})


def test_rates_are_of_finished_requests_over_the_whole_span() -> None:
    found = summary([*DONE, FAILED])

    assert found["seconds"] == pytest.approx(4.0)
    assert found["request_rps"] == pytest.approx(3 / 4)
    assert found["output_tokens_per_s"] == pytest.approx(15 / 4)
    assert found["total_tokens_per_s"] == pytest.approx((15 + 300) / 4)
    assert found["errors"] == {"http_429": 1}
    assert found["cached_share"] == pytest.approx(0.5)


def test_percentiles_interpolate_as_numpy_and_vllm_do() -> None:
    found = summary(DONE)

    assert found["ttft_s"]["p50"] == pytest.approx(1.0)
    assert found["ttft_s"]["p90"] == pytest.approx(1.0)
    assert found["tpot_s"]["mean"] == pytest.approx(0.4 / 3)
    assert found["tpot_s"]["p90"] == pytest.approx(0.1 + 0.8 * 0.1)
    assert found["itl_s"]["max"] == pytest.approx(0.2)


def test_a_failure_is_a_miss_and_stays_in_the_denominator() -> None:
    found = summary([*DONE, FAILED], SLOS)

    assert found["num_good"] == 1  # 0 and 2 are beyond ttft, 2 beyond tpot as well
    assert found["slo_attainment"] == 1 / 4
    assert found["goodput_rps"] == pytest.approx(1 / 4)
    assert found["misses"] == {"ttft": 2, "tpot": 1, "failed": 1}
    assert found["slo_met"] is False


def test_goodput_is_joint_and_not_of_each_limit_alone() -> None:
    slow_start, slow_tokens = request(0, 0.0, 5.0, 0.01), request(1, 0.0, 0.1, 5.0)

    assert summary([slow_start, slow_tokens], Slos({"ttft": 1, "tpot": 1}))["num_good"] == 0


def test_a_single_token_misses_no_limit_on_tpot() -> None:
    assert Slos({"tpot": 0.001}).met_by(request(0, 0.0, 1.0, 0.0, tokens=1))


def test_attainment_grows_with_the_scale_of_the_limits() -> None:
    curve = attainment_curve([*DONE, FAILED], SLOS)

    assert (curve["0.5"], curve["1"], curve["1.25"], curve["4"]) == (0.0, 0.25, 0.5, 0.75)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.01, 9), st.floats(0.001, 1)), min_size=1, max_size=20))
def test_attainment_never_falls_with_the_scale(drawn: list[tuple[float, float, float]]) -> None:
    records = [request(number, *one) for number, one in enumerate(drawn)]

    curve = list(attainment_curve(records, Slos({"ttft": 1.0, "tpot": 0.1})).values())

    assert curve == sorted(curve)


def test_most_at_once_counts_no_request_that_ends_as_another_begins() -> None:
    one, two = request(0, 0.0, 1.0, 0.25), request(1, 2.0, 1.0, 0.25)

    assert peak_concurrency([one, two]) == 1
    assert peak_concurrency([one, replace(two, sent_at=1.9)]) == 2


def test_a_generator_that_is_late_says_so() -> None:
    late = replace(DONE[1], due_at=DONE[1].sent_at - 0.05)

    assert summary(DONE)["generator"]["kept_up"]
    health = summary([DONE[0], late])["generator"]
    assert (health["kept_up"], health["late_share"]) == (False, 0.5)
    assert not summary(DONE, loop_lag_s=[0.0, 0.2])["generator"]["kept_up"]


def test_latency_from_the_instant_due_contains_lateness_and_what_was_held_back() -> None:
    held = replace(DONE[0], due_at=-3.0, held_s=2.0)

    assert summary([held])["ttft_s"]["p50"] == 1.0
    assert summary([held])["ttft_from_due_s"]["p50"] == 4.0


def test_nothing_at_all_is_a_summary_of_nulls() -> None:
    found = summary([], SLOS)

    assert (found["request_rps"], found["ttft_s"]["p99"], found["slo_met"]) == (None, None, None)


def test_limits_are_read_from_one_text() -> None:
    assert Slos.parse("ttft=2, tpot=0.05,attainment=0.99") == Slos({"ttft": 2.0, "tpot": 0.05}, 0.99)


@pytest.mark.parametrize("wrong", ["ttft", "itl=1", "ttft=0", "ttft=soon", "", "attainment=2"])
def test_wrong_limits_are_refused_with_what_is_allowed(wrong: str) -> None:
    with pytest.raises(InvalidConfig, match="--slo: "):
        Slos.parse(wrong)
