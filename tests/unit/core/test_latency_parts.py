"""Parts add up to their whole, whatever was measured."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.latency_parts import TtftParts, TtstParts, ttst_parts

SECONDS = st.floats(0, 100, allow_subnormal=False)


@given(gap_s=SECONDS, wait_s=SECONDS, exposed_s=SECONDS, decode_queue_s=SECONDS, first_step_s=SECONDS)
def test_the_parts_of_a_gap_are_its_length_and_none_is_negative(gap_s, wait_s, exposed_s, decode_queue_s, first_step_s):
    parts = ttst_parts(
        gap_s, wait_s=wait_s, exposed_s=exposed_s, decode_queue_s=decode_queue_s, first_step_s=first_step_s
    )

    assert parts.total_s == pytest.approx(gap_s, abs=1e-9)
    assert all(getattr(parts, field.name) >= 0 for field in fields(parts))
    assert parts.retries_s == 0


def test_what_fits_into_the_gap_is_taken_as_it_was_measured():
    parts = ttst_parts(1.0, wait_s=0.1, exposed_s=0.4, decode_queue_s=0.2, first_step_s=0.25)

    assert parts == TtstParts(0.1, pytest.approx(0.3), 0.2, 0.25, messages_s=pytest.approx(0.15))


def test_what_does_not_fit_was_hidden_and_the_earliest_is_shortened_first():
    parts = ttst_parts(0.5, wait_s=0.1, exposed_s=0.4, decode_queue_s=0.2, first_step_s=0.25)

    assert parts == TtstParts(0.0, pytest.approx(0.05), 0.2, 0.25)


def test_the_time_to_the_first_token_is_the_sum_of_its_parts():
    assert TtftParts(*range(1, 11)).total_s == 55
