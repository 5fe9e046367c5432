"""Every reader gets every step once, as far as the log reaches back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.step_log import StepLog
from core.compute import StepSample


def step(number: int) -> StepSample:
    return StepSample(number, 0.0, 0, 0, 1.0)


@given(st.lists(st.integers(0, 5)), st.integers(1, 8))
def test_a_reader_gets_the_latest_steps_that_it_lacks(batches: list[int], max_steps: int) -> None:
    log, recorded, told = StepLog(max_steps), 0, 0
    for size in batches:
        log.record([step(recorded + index) for index in range(size)])
        recorded += size
        if size % 2:  # it does not read every time
            expected = [step(number) for number in range(told, recorded)][-max_steps:]
            assert list(log.since(told)) == expected
            told = log.number
    assert log.number == recorded
    assert log.since(recorded) == ()
