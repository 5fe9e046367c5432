"""What is asked of both, and how they are set side by side."""

from __future__ import annotations

import pytest

from benchmarks.calibration import Seen, measures, part_rows, row, workload_of
from core.latency_parts import TtftParts


def test_measures_by_hand() -> None:
    seen = [Seen(0.1 * n, 0.01 * n, 100, 50, 2_000_000, TtftParts()) for n in range(1, 12)]
    found = measures(seen)

    assert found == {
        "requests": 11,
        "TTFT mean s": pytest.approx(0.6),
        "TTFT P90 s": pytest.approx(1.0),
        "TPOT mean s": pytest.approx(0.06),
        "TPOT P90 s": pytest.approx(0.1),
        "hit rate": 0.5,
        "shipped MB": 22,
    }


def test_parts_of_the_ttft_stand_side_by_side_where_they_are_something() -> None:
    real = [Seen(0.3, 0.01, 100, 0, 0, TtftParts(messages_s=s, prefill_s=0.2, route_s=1e-4)) for s in (0.1, 0.3)]
    simulated = [Seen(0.2, 0.01, 100, 0, 0, TtftParts(messages_s=0.002, prefill_s=0.2))]

    found = part_rows(real, simulated)

    assert [(one["measure"], one["real"], one["simulated"]) for one in found] == [
        ("of it messages s", pytest.approx(0.2), 0.002),
        ("of it prefill s", pytest.approx(0.2), 0.2),
    ]


def test_an_error_is_relative_to_what_is_real_and_there_is_none_of_nothing() -> None:
    assert row("TTFT mean s", 2.0, 1.8)["relative_error"] == pytest.approx(-0.1)
    assert row("shipped MB", 0.0, 1.8)["relative_error"] is None


def test_prompts_share_a_few_prefixes_and_are_the_same_each_time() -> None:
    workload = workload_of(200, 1.5, seed=2, first=0)
    turns = [conversation.turns[0] for conversation in workload.conversations]
    prefixes = {turn.prompt.tokens(0, 32) for turn in turns}

    assert len(prefixes) == 8
    assert len({turn.prompt.tokens() for turn in turns}) == 200
    assert all(33 <= turn.input_tokens <= 160 for turn in turns)
    assert all(4 <= turn.output_tokens <= 16 for turn in turns)
    assert workload.conversations[-1].starts_at == pytest.approx(200 / 1.5, rel=0.2)
    assert workload_of(200, 1.5, seed=2, first=0) == workload
