"""What is read of AIPerf's export, and what is made of the differences."""

from __future__ import annotations

import json

import pytest

from benchmarks.load_generators import comparison, figures, seen_percentiles, stock_percentiles
from cluster.bench.client_record import USAGE, ClientRecord


def exported(ttft_ms: float, itl_ms: float) -> dict[str, object]:
    def metric(value: float) -> dict[str, object]:
        return {"unit": "ms", **{f"p{percent}": value for percent in (50, 90, 95, 99)}}

    return {"time_to_first_token": metric(ttft_ms), "inter_token_latency": metric(itl_ms)}


def test_the_same_request_is_the_same_number_in_both() -> None:
    one = ClientRecord(0, 0, 0, 0.0, 0.0, 10, 3, (0.5, 0.6, 0.7), 0.7, 3, USAGE)

    seen = seen_percentiles(json.dumps(one.as_dict()) + "\n")

    rows = comparison("a run", stock_percentiles(exported(500.0, 100.0)), seen)
    assert [row["difference_percent"] for row in rows] == pytest.approx([0.0] * 8)


def test_the_largest_difference_of_each_metric_counts_whichever_way() -> None:
    ours = {"TTFT": dict.fromkeys((50, 90, 95), 100.0) | {99: 97.0}, "TPOT": dict.fromkeys((50, 90, 95, 99), 10.1)}

    found = figures(comparison("one run, scripted", stock_percentiles(exported(100.0, 10.0)), ours))

    assert found == {
        "one_run_scripted_ttft_percent": pytest.approx(3.0),
        "one_run_scripted_tpot_percent": pytest.approx(1.0),
    }
