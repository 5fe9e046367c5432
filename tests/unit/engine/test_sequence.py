from __future__ import annotations

from itertools import product

import pytest

from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.sequence import ALLOWED_MOVES, Sequence, SequenceStatus


def make(output: tuple[int, ...] = (), **sampling: object) -> Sequence:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return Sequence(SequenceSpec(SequenceId("s"), (1, 2, 3), params, output), 0.0, frozenset({9}), 100)


def test_tokens_of_earlier_tries_are_known_and_not_computed() -> None:
    sequence = make(output=(4, 5))
    assert list(sequence.token_ids) == [1, 2, 3, 4, 5]
    assert list(sequence.output_token_ids) == [4, 5]
    assert (sequence.num_tokens, sequence.num_output_tokens, sequence.num_remaining) == (5, 2, 5)


def test_stop_ids_are_the_requests_and_the_models_unless_those_are_ignored() -> None:
    assert make(stop_token_ids=(7,)).stop_ids == {7, 9}
    assert make(stop_token_ids=(7,), ignore_eos=True).stop_ids == {7}


@pytest.mark.parametrize(("before", "after"), list(product(SequenceStatus, SequenceStatus)))
def test_a_move_that_is_not_allowed_raises_and_changes_nothing(before: SequenceStatus, after: SequenceStatus) -> None:
    sequence = make()
    sequence.status = before
    if after in ALLOWED_MOVES[before]:
        sequence.move(after)
        assert sequence.status is after
    else:
        with pytest.raises(AssertionError):
            sequence.move(after)
        assert sequence.status is before


def test_every_status_can_end() -> None:
    for status in SequenceStatus:
        assert status is SequenceStatus.FINISHED or SequenceStatus.FINISHED in ALLOWED_MOVES[status]


def test_a_sequence_ends_with_its_limit_or_with_the_longest_that_fits() -> None:
    assert make(max_tokens=5).most_tokens == 3 + 5
    assert make().most_tokens == 100
    assert make(max_tokens=500).most_tokens == 100
