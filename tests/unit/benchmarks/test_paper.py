"""Tolerances and verdicts by hand, and the papers' checks: what disagrees is known and says why."""

from __future__ import annotations

import pytest

from benchmarks.paper import make_report
from benchmarks.paper_check import Check
from benchmarks.paper_mooncake import break_even_bytes_per_s, prefill_flops


@pytest.mark.parametrize(
    ("printed", "computed", "verdict"),
    [
        ("1.61", 1.609, "within"),
        ("1.61", 1.65, "outside"),
        ("13", 12.5, "within"),  # rounds to it
        ("13", 12.4, "outside"),
        ("-50", -49.6, "within"),
        ("100", 101.4, "within"),  # 1.5 % is more than half a unit
        ("5", None, "not checked"),
    ],
)
def test_a_printed_number_stands_for_all_that_round_to_it(printed: str, computed: float | None, verdict: str) -> None:
    assert Check("n", "s", printed, computed).verdict == verdict


def test_scale_and_stated_tolerance() -> None:
    assert Check("n", "s", "44", 45_064, scale=1024).verdict == "within"
    assert Check("n", "s", "2", 2.2, tolerance=0.1).verdict == "within"
    assert Check("n", "s", "2", 2.21, tolerance=0.1).verdict == "outside"


def test_what_disagrees_is_known_and_says_why() -> None:
    report = make_report(traces=None)
    outside = [row for row in report.rows if row["verdict"] == "outside"]

    assert all(row["note"] for row in outside)
    others = {row["name"] for row in outside if row["source"] != "PrfaaS table 3"}
    assert others == {"naive against PrfaaS-PD", "input over output tokens of the arXiv trace"}
    assert report.figures["checked"] == len(report.rows) - 1  # the reference case needs a trace
    assert report.figures["within_tolerance"] == report.figures["checked"] - len(outside)


def test_a_break_even_is_where_loading_takes_as_long_as_computing() -> None:
    """Of a prefix p: 2 l d s / gqa bytes a token against l (a p d + b d^2) operations a token."""
    p, rate = 8192, 8 * 312e12

    load_s = p * 80 * (2 * 8192 / 8) * 2 / break_even_bytes_per_s(p, rate)

    assert load_s == pytest.approx(prefill_flops(p) / rate)
