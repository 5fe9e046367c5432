"""What a record computes from instants, by hand; and that a line of JSON gives it back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.client_record import CHUNKS, USAGE, ClientRecord
from core.errors import InvalidConfig

SECONDS = st.floats(0, 1e6, allow_nan=False)


def record(
    chunk_s: tuple[float, ...] = (), ended_s: float = 0.0, output_tokens: int = 0, **more: object
) -> ClientRecord:
    given = {
        "number": 0,
        "conversation": 0,
        "turn": 0,
        "due_at": 0.0,
        "sent_at": 0.0,
        "asked_input_tokens": 10,
        "asked_output_tokens": output_tokens,
        "counted_by": USAGE,
    }
    return ClientRecord(chunk_s=chunk_s, ended_s=ended_s, output_tokens=output_tokens, **(given | more))  # type: ignore[arg-type]


def test_every_latency_of_a_request_by_hand() -> None:
    one = record((0.5, 0.8, 1.0, 1.2), 1.2, 4, due_at=2.0, sent_at=2.25)

    assert one.ttft_s == 0.5
    assert one.ttst_s == pytest.approx(0.3)
    assert one.tpot_s == pytest.approx(0.7 / 3)
    assert one.itl_s == pytest.approx((0.3, 0.2, 0.2))
    assert one.tbt_s == pytest.approx(0.3)  # the longest tenth of three gaps: one
    assert (one.e2e_s, one.late_s) == (1.2, 0.25)


def test_several_tokens_in_one_chunk_make_one_gap_and_a_smaller_tpot() -> None:
    one = record((0.1, 0.5), 0.5, 9)

    assert one.itl_s == (0.4,)
    assert one.tpot_s == pytest.approx(0.05)


def test_a_single_token_has_no_tpot_and_a_failure_no_latency_but_what_came() -> None:
    assert (record((0.1,), 0.1, 1).tpot_s, record((0.1,), 0.1, 1).ttst_s) == (None, None)
    failed = record((0.1, 0.2), 0.9, 2, error="timeout")
    assert (failed.ok, failed.ttft_s, failed.tpot_s, failed.e2e_s) == (False, 0.1, None, None)


def test_the_longest_tenth_of_twenty_gaps_is_two() -> None:
    chunks = [0.0]
    for gap in (*[0.1] * 18, 1.0, 3.0):
        chunks.append(chunks[-1] + gap)

    assert record(tuple(chunks), chunks[-1], 21).tbt_s == pytest.approx(2.0)


def test_what_is_held_back_on_purpose_is_not_late() -> None:
    assert record((1.0,), 1.0, 1, due_at=1.0, sent_at=4.0, held_s=3.0).late_s == 0.0


@given(chunks=st.lists(SECONDS, max_size=5), due=SECONDS, error=st.none() | st.text(max_size=5))
def test_a_line_of_json_gives_the_record_back(chunks: list[float], due: float, error: str | None) -> None:
    one = record(tuple(sorted(chunks)), 3.0, len(chunks), due_at=due, error=error, counted_by=CHUNKS)

    assert ClientRecord.from_dict(json.loads(json.dumps(one.as_dict())), "file:1") == one


def test_a_foreign_line_is_refused_with_its_place() -> None:
    with pytest.raises(InvalidConfig, match=r"file:3: is no line of --records"):
        ClientRecord.from_dict({"number": 1}, "file:3")
