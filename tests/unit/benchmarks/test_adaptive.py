"""Who is ahead of whom, and that every planner gets the same requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.adaptive import FLUCTUATING, ahead, behind_best, mean_of_seeds, runs
from benchmarks.case_study import PLANNERS, at_instants_of, requests
from benchmarks.report import Cell


def row(case: str, planner: str, goodput: float | None) -> dict[str, Cell]:
    return {"case": case, "planner": planner, "goodput_rps": goodput}


ROWS = [row("a", "adaptive", 1.8), row("a", "local", 2.0), row("b", "adaptive", 1.1), row("b", "local", 1.0)]


def test_behind_is_relative_to_the_best_of_the_same_case() -> None:
    assert [found["behind_best"] for found in behind_best(ROWS)] == pytest.approx([0.1, 0.0, 0.0, 1 / 11])


def test_of_a_case_in_which_nothing_was_good_nobody_is_behind() -> None:
    assert [found["behind_best"] for found in behind_best([row("a", "adaptive", 0.0), row("a", "local", None)])] == [
        0,
        0,
    ]


def test_ahead_is_relative_to_the_best_other_one() -> None:
    assert ahead(ROWS, "a") == pytest.approx(-0.1)
    assert ahead(ROWS, "b") == pytest.approx(0.1)


def test_draws_of_a_case_become_their_mean() -> None:
    drawn = [row("a", "adaptive", 1.0), row("a", "local", 2.0), row("a", "adaptive", 2.0), row("a", "local", None)]
    assert mean_of_seeds(drawn) == [
        {"case": "a", "planner": "adaptive", "goodput_rps": 1.5, "goodput_rps_min": 1.0, "goodput_rps_max": 2.0},
        {"case": "a", "planner": "local", "goodput_rps": 1.0, "goodput_rps_min": 0.0, "goodput_rps_max": 2.0},
    ]


def test_every_planner_gets_the_same_draws() -> None:
    planned = runs(10, 2.0, None, num_seeds=3)
    assert len(planned) == 3 * len(runs(10, 2.0, None))
    for planner in PLANNERS:
        assert [run.seed for run in planned if run.planner == planner and run.case == FLUCTUATING] == [0, 1, 2]


def test_every_planner_plays_every_case() -> None:
    planned = runs(10, 2.0, Path("traces"))
    cases = {run.case for run in planned}

    assert len(planned) == len(cases) * len(PLANNERS) == 9 * 4
    assert FLUCTUATING in cases
    assert [run.trace is not None for run in planned].count(True) == 4
    assert {run.case for run in runs(10, 2.0, None)} < cases


def test_a_traces_instants_are_stretched_to_the_rate_and_the_lengths_are_the_case_studys(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"{at},5,5" for at in (0, 0, 0, 10, 40)]
    trace.write_text("\n".join(["t_s,input_length,output_length", *lines]))
    workload = at_instants_of(trace, 4, 2.0)
    starts = [conversation.starts_at for conversation in workload.conversations]

    assert starts == pytest.approx([0, 0, 0, 2.0])
    evenly = requests(4, 2.0)
    assert [c.turns[0].input_tokens for c in workload.conversations] == [
        c.turns[0].input_tokens for c in evenly.conversations
    ]
