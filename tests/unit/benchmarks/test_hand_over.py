"""What the rows and figures of a hand-over are made of."""

from __future__ import annotations

import pytest

from benchmarks.hand_over import ARMS, Served, _rows, figures
from core.latency_parts import TtftParts
from core.request import RequestTiming


def served(gap_s: float, tokens: tuple[int, ...] = (1, 2)) -> Served:
    parts = TtftParts(messages_s=0.5, prefill_s=2.0)
    timing = RequestTiming(None, None, "", prefill_s=2.0, transfer_s=0.5, exposed_transfer_s=0.1, ttft_parts=parts)
    return Served(tokens, ttft_s=2.5, gap_s=gap_s, tpot_s=0.01, timing=timing)


def test_what_is_added_is_told_round_by_round_without_the_first() -> None:
    together = [served(9.0), served(0.05), served(0.07), served(0.90)]
    alone = [served(0.01), served(0.01), served(0.05), served(0.80)]
    both, one = _rows(8192, ARMS[0], "rc", together, alone)
    assert both["added_ms"] == pytest.approx(40.0)  # the middle of 40, 20 and 100; the medians lie 20 apart
    assert both["share"] == pytest.approx(0.02)
    assert both["wait_ms"] == pytest.approx(500.0)
    assert (both["same"], both["path"], both["gap_ms"]) == ("4 of 4", "rc", pytest.approx(70.0))
    assert (one["arm"], one["share"], one["gap_ms"]) == ("one worker alone", None, pytest.approx(50.0))
    assert figures([both, one]) == {"added_over_prefill_nixl_8192": pytest.approx(0.02)}


def test_other_tokens_are_told_also_of_the_first_round() -> None:
    both, _ = _rows(8192, ARMS[0], "", [served(0.1, (1, 3)), served(0.1)], [served(0.1), served(0.1)])
    assert both["same"] == "1 of 2"
