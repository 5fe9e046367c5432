"""Percentiles, TPOT and ratios mean what the benchmark's docstrings say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report, serving
from benchmarks.measurement import RequestTimes, WaveTimes, row
from benchmarks.report import Cell


def test_tpot_leaves_the_first_token_out() -> None:
    assert RequestTimes(ttft_s=1.0, e2e_s=4.0, num_output_tokens=4).tpot_s == 1.0


def test_row_pools_requests_and_takes_the_median_repetition() -> None:
    repetitions = [WaveTimes(wall_s, (RequestTimes(wall_s / 2, wall_s, 10),)) for wall_s in (1.0, 2.0, 10.0)]

    cells = row("ours", 1, repetitions)

    assert (cells["tokens_per_s"], cells["tokens_per_s_min"], cells["tokens_per_s_max"]) == (5.0, 1.0, 10.0)
    assert (cells["num_requests"], cells["num_output_tokens"], cells["ttft_p50_s"]) == (3, 30, 1.0)


def test_percentile_interpolates_and_of_nothing_is_absent() -> None:
    assert report.percentile([1.0, 3.0], 50) == 2.0
    assert report.percentile([], 50) is None


def test_throughput_ratio_is_over_the_better_transformers_mode() -> None:
    rows = [
        _speed("ours", 8, 120.0),
        _speed("static", 8, 100.0),
        _speed("continuous", 8, 60.0),
        _speed("vllm", 8, 240.0),
    ]

    assert serving.figures(rows) == {"throughput_ratio_c8": 1.2, "vllm_ratio_c8": 0.5}


def test_arms_that_did_not_run_have_no_ratio() -> None:
    assert serving.figures([_speed("ours", 1, 20.0), _speed("static", 8, 100.0)]) == {}


def test_report_is_written_with_the_keys_that_readers_of_runs_expect(tmp_path: Path) -> None:
    path = tmp_path / "made" / "serving.json"

    report.Report("serving", "abc", {"cores": 2}, [_speed("ours", 1, 2.0)], {"ratio": 1.0}).write_json(path)

    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written) == ["benchmark", "commit", "machine", "rows", "figures"]
    assert written["rows"][0]["tokens_per_s"] == 2.0


@pytest.mark.parametrize("key", ["cpu", "cores", "memory_gib", "python", "torch", "transformers"])
def test_machine_is_described(key: str) -> None:
    assert report.machine()[key]


def _speed(arm: str, concurrency: int, tokens_per_s: float) -> dict[str, Cell]:
    return {"arm": arm, "concurrency": concurrency, "tokens_per_s": tokens_per_s}
