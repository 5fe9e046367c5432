"""What counts as in time, and what an arm with half of the load is told to have done."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.colocated_modes import TINY_DENSE, Arm, Place, Served, _groups, arrivals, draw, figures, row
from core.request import Role

ARM = Arm("layered", "layered", (Place(Role.DECODE, "0"),))
HALF = Arm("layered", "layered", (Place(Role.DECODE, "0"),), share=0.5)


def test_a_faster_rate_has_the_same_requests_closer_together() -> None:
    slow, fast = arrivals(1.0, 50.0), arrivals(2.0, 25.0)
    assert slow == pytest.approx([2 * at_s for at_s in fast])
    assert all(earlier < later < 50 for earlier, later in pairwise(slow))


def test_in_time_is_who_keeps_both_promises() -> None:
    seen = [Served(1.9, 0.4, 0.9, 100), Served(2.1, 0.4, 0.5, 100), Served(1.0, 0.6, 0.7, 100)]
    made = row(TINY_DENSE, ARM, "4/s", seen, asked=4, took_s=2.0)
    assert (made["goodput_rps"], made["in_time"], made["lost"]) == (0.5, pytest.approx(1 / 3), 1)
    assert (made["ttft_p50_s"], made["tpot_p50_ms"], made["gap_p90_ms"]) == (1.9, 400.0, pytest.approx(860.0))
    assert made["tokens_per_s"] == 150.0
    assert row(TINY_DENSE, HALF, "4/s", seen, 4, 2.0)["tokens_per_s"] == 300.0
    assert row(TINY_DENSE, ARM, "4/s", [], 4, 2.0)["ttft_p50_s"] is None, "all were lost"


def test_figures_are_the_best_of_each_arm_and_its_burst(tmp_path: Path) -> None:
    seen = [Served(1.0, 0.1, 0.2, 100)]
    rows = [
        row(TINY_DENSE, ARM, load, seen, 1, took_s) for load, took_s in (("4/s", 2.0), ("8/s", 1.0), ("burst", 0.5))
    ]
    assert figures(rows) == {"goodput_dense_layered": 1.0, "burst_tokens_per_s_dense_layered": 200.0}
    draw(rows, tmp_path / "plot.png")


@pytest.mark.parametrize(("devices", "share", "arms"), [(["0", "1"], 1.0, 4), (["0"], 0.5, 3)])
def test_with_one_gpu_a_replica_gets_half_of_the_load(devices: list[str], share: float, arms: int) -> None:
    names = ["chunked", "layered", "partitioned", "1P+1D"]
    groups = _groups(argparse.Namespace(tiny=False, devices=devices, models=["dense"], arms=names))
    assert [arm.name for group in groups for arm, _ in group] == names[:arms]
    assert {arm.share for group in groups for arm, _ in group} == {share}
