"""What counts as in time, and that every arm gets the same prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.head_of_line import (
    ARMS,
    CPU,
    CUDA,
    GPU_LONG_S,
    Promise,
    Seen,
    arrivals,
    draw,
    figures,
    promise_of,
    row,
)

PROMISE = Promise(short_s=0.2, long_s=5.0)


def test_a_faster_rate_has_the_same_prompts_closer_together() -> None:
    slow, fast = arrivals(1.0, 50), arrivals(2.0, 50)
    assert [a.is_long for a in slow] == [a.is_long for a in fast]
    assert [a.at_s for a in slow] == pytest.approx([2 * a.at_s for a in fast])
    assert 0 < sum(a.is_long for a in slow) < 25


def test_promises_on_a_cpu_are_as_much_beside_a_long_prompt_as_on_a_gpu() -> None:
    assert promise_of(CUDA, 99.0) == Promise(0.25, 6.0)
    assert promise_of(CPU, 2 * GPU_LONG_S) == Promise(0.5, 12.0)


def test_a_row_counts_who_was_in_time() -> None:
    seen = [Seen(False, 0.1, 0.01), Seen(False, 0.3, 0.2), Seen(True, 4.0, 0.0), Seen(True, 6.0, 1.0)]
    made = row("slack", 0.5, 2.0, seen, PROMISE, held_up=3, took_s=4.0)
    assert (made["short_in_time"], made["long_in_time"], made["in_time"]) == (0.5, 0.5, 0.5)
    assert made["goodput_rps"] == 0.5
    assert made["waited_p90_ms"] == pytest.approx(181.0)
    assert (made["arm"], made["held_up"]) == ("slack", 3)


def test_figures_compare_the_best_goodput_of_each_arm(tmp_path: Path) -> None:
    rows = [
        row(arm, share, share, [Seen(False, ttft_s, 0.0)], PROMISE, held_up=0, took_s=took_s)
        for arm, ttft_s, took_s in (("whole", 9.0, 1.0), ("chunks", 0.1, 2.0), ("slack", 0.1, 1.0))
        for share in (0.5, 1.0)
    ]
    assert figures(rows) == {
        "goodput_whole": 0.0,
        "goodput_chunks": 0.5,
        "goodput_slack": 1.0,
        "slack_over_whole": 0.0,
        "slack_over_chunks": 2.0,
    }
    assert {r["arm"] for r in rows} == set(ARMS)
    draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
