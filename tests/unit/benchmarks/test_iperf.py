"""iperf3's JSON is read as its receiving side told it, and its failures are its own words."""

from __future__ import annotations

import json

import pytest

from benchmarks.iperf import parse


def test_the_receiving_side_counts() -> None:
    ended = {"sum_sent": {"seconds": 0.5, "bytes": 2_000}, "sum_received": {"seconds": 0.6, "bytes": 1_800}}

    moved = parse(json.dumps({"end": ended}))

    assert (moved.seconds, moved.num_bytes) == (0.6, 1_800)


@pytest.mark.parametrize(
    ("output", "words"), [('{"error": "unable to connect"}', "unable to connect"), ("killed", "no JSON: 'killed'")]
)
def test_a_failed_run_is_told_in_its_own_words(output: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        parse(output)
