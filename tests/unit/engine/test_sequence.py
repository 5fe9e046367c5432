from __future__ import annotations

from itertools import product

import pytest

from core.request import FinishReason, SamplingParams, SequenceId, SequenceSpec
from engine.sequence import ALLOWED_MOVES, Sequence, SequenceEnd, SequenceStatus
from engine.step_plan import PENDING_TOKEN


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


def test_a_stop_token_ends_it_and_is_named_unless_the_output_is_too_short() -> None:
    assert make(output=(4, 9)).end == SequenceEnd(FinishReason.STOP, 9)
    assert make(output=(9, 4)).end is None, "the newest token counts"
    assert make(output=(4, 9), min_tokens=2).end is None


def test_the_last_token_that_it_may_have_ends_it() -> None:
    assert make(output=(4,), max_tokens=2).end is None
    assert make(output=(4, 5), max_tokens=2).end == SequenceEnd(FinishReason.LENGTH)
    assert make(output=(4, 9), max_tokens=2).end == SequenceEnd(FinishReason.STOP, 9)


def test_an_item_samples_if_it_goes_to_the_newest_token() -> None:
    sequence = make(output=(4,))
    sequence.num_computed = 1

    chunk, rest = sequence.item(2), sequence.item(1, start=3)

    assert (chunk.token_ids, chunk.start, chunk.samples) == ((2, 3), 1, False)
    assert (rest.token_ids, rest.start, rest.samples) == ((4,), 3, True)
    assert chunk.known_token_ids is sequence.token_ids, "a reference, not a copy"


def test_a_token_that_is_being_sampled_is_pending_and_the_next_is_one_further() -> None:
    sequence = make(output=(4,))

    known, pending = sequence.next_item(3, None), sequence.next_item(4, row=2)

    assert (known.token_ids, known.pending_row, known.position) == ((4,), None, 1)
    assert (pending.token_ids, pending.pending_row, pending.position) == ((PENDING_TOKEN,), 2, 2)
