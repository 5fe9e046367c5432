"""Seconds of steps as a live service measured them."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from cluster.cost_model import ComputeCost, CostModel, LinearCost, Roofline, SavedCosts, saved_costs
from cluster.simulator.step_cost import FittedCost, MeasuredCost, PromptChunk
from core.errors import InvalidConfig

LINE = ComputeCost(LinearCost((0.01, 1e-3, 0.0)), LinearCost((0.02, 1e-3, 0.0)))
ROOFLINE = Roofline(1e9, 1e3, 1e9, 1e3, 1e12, 1e11)


def _saved(path: Path, wobble: tuple[float, ...]) -> SavedCosts:
    """Of a service whose steps took those times of what they would on a quiet machine."""
    model = CostModel(path)
    model.add_profile("cpu", ROOFLINE)
    for number, times in enumerate(wobble):
        model.observe_prefill("cpu", 64 + number % 5, 0, times * 0.1)
        model.observe_decode_step("cpu", 4, 100 + number, times * 0.05)
    model.save()
    return saved_costs(path)


def test_steps_are_spread_as_those_of_the_service(tmp_path: Path) -> None:
    saved = _saved(tmp_path / "costs.json", (1.0, 1.0, 1.0, 1.1, 0.9, 1.0, 2.0, 1.0) * 2)
    spread, line = MeasuredCost(saved), FittedCost(saved.compute)

    drawn = [spread.step_s([PromptChunk(66, 0, True)], 0, context) for context in range(500)]
    on_line = line.step_s([PromptChunk(66, 0, True)], 0, 0)

    assert fmean(drawn) / on_line == pytest.approx(fmean(saved.prefill_ratios), rel=0.05)
    assert max(drawn) / on_line == pytest.approx(max(saved.prefill_ratios))
    assert max(saved.prefill_ratios) > 1.7  # the step that took twice as long is no outlier to be forgotten
    assert fmean(saved.decode_ratios) == pytest.approx(9 / 8, rel=0.05)


def test_an_equal_step_takes_equally_long_and_nothing_is_spread_that_was_not_measured() -> None:
    spread = MeasuredCost(SavedCosts(LINE, prefill_ratios=(0.5, 1.0, 3.0)))
    chunks = [PromptChunk(100, 0, True)]

    assert len({spread.step_s(chunks, 3, 700) for _ in range(9)}) == 1
    assert len({spread.step_s(chunks, batch, 700) for batch in range(1, 99)}) > 3
    assert spread.step_s([], 3, 700) == FittedCost(LINE).step_s([], 3, 700)
    assert spread.seen(2048).prefill_cost == LINE.prefill_cost


def test_a_file_that_knows_no_worker_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"costs\.json: holds no costs"):
        saved_costs(tmp_path / "costs.json")
