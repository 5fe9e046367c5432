"""The expected length of an output: a moving mean, within what the request allows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.output_lengths import ASSUMED_TOKENS, OutputLengths


def test_before_the_first_sequence_ends_a_length_is_assumed() -> None:
    lengths = OutputLengths()
    assert (lengths.mean, lengths.expected(0, None), lengths.expected(0, 100)) == (ASSUMED_TOKENS, ASSUMED_TOKENS, 100)


def test_the_mean_is_that_of_what_ended_and_follows_a_change() -> None:
    lengths = OutputLengths()
    for num_tokens in (10, 20, 30):
        lengths.note(num_tokens)
    assert lengths.mean == 20
    for _ in range(2000):
        lengths.note(500)
    assert 495 < lengths.mean <= 500


def test_of_a_sequence_under_way_the_rest_is_expected() -> None:
    lengths = OutputLengths()
    lengths.note(100)
    assert [lengths.expected(num_tokens, None) for num_tokens in (0, 60, 99)] == [100, 40, 1]
    assert lengths.expected(150, None) == 100, "longer than the mean already: it may go on as long again"


@given(st.lists(st.integers(1, 5000)), st.integers(0, 4999), st.none() | st.integers(5000, 9000))
def test_at_least_one_token_is_expected_and_never_more_than_is_allowed(
    ended: list[int], num_tokens: int, limit: int | None
) -> None:
    lengths = OutputLengths()
    for length in ended:
        lengths.note(length)
    expected = lengths.expected(num_tokens, limit)
    assert expected >= 1
    assert limit is None or expected <= limit - num_tokens
