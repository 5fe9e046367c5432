"""Pages of what has ended are free when, and only when, no step that holds it is under way."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from core.request import SamplingParams, SequenceId
from engine.step_plan import StepItem, StepPlan
from engine.steps_under_way import StepsUnderWay


def plan_of(*names: str) -> StepPlan:
    tokens = array("q", [1])
    return StepPlan(
        tuple(StepItem(SequenceId(name), (1,), 0, (0,), True, SamplingParams(), tokens, 1) for name in names)
    )


def test_what_no_step_holds_is_free_at_once() -> None:
    under_way = StepsUnderWay()
    under_way.begin(plan_of("a"))

    assert not under_way.keep(SequenceId("b"), (1,))


def test_pages_are_kept_until_the_last_step_that_holds_them_has_ended() -> None:
    under_way = StepsUnderWay()
    first, second = plan_of("a", "b"), plan_of("a")
    under_way.begin(first)
    under_way.begin(second)

    assert under_way.keep(SequenceId("a"), (1, 2))
    assert under_way.keep(SequenceId("b"), (3,))

    under_way.end(first)
    assert under_way.freed_by(first) == [(3,)]
    under_way.end(second)
    assert under_way.freed_by(second) == [(1, 2)]
    assert under_way.freed_by(second) == []


def test_a_step_that_has_ended_keeps_nothing() -> None:
    under_way = StepsUnderWay()
    plan = plan_of("a")
    under_way.begin(plan)
    under_way.end(plan)

    assert not under_way.keep(SequenceId("a"), (1,))


def test_a_step_that_was_never_told_may_end() -> None:
    under_way = StepsUnderWay()
    plan = plan_of("a")

    under_way.end(plan)

    assert under_way.freed_by(plan) == []


@given(st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=4), st.data())
def test_every_page_is_freed_once_and_by_the_last_of_its_writers(members: list[set[int]], data: st.DataObject) -> None:
    under_way = StepsUnderWay()
    plans = [plan_of(*map(str, sorted(names))) for names in members]
    for plan in plans:
        under_way.begin(plan)
    left = list(range(len(plans)))
    gone: dict[int, set[int]] = {}  # sequence |-> steps that may write its pages
    while left:
        present = sorted(set(range(6)) - gone.keys())
        for name in data.draw(st.sets(st.sampled_from(present)) if present else st.just(set())):
            gone[name] = {step for step in left if name in members[step]}
            assert under_way.keep(SequenceId(str(name)), (name,)) == bool(gone[name])
        ended = data.draw(st.sampled_from(left))
        left.remove(ended)
        under_way.end(plans[ended])
        expected = {name for name, steps in gone.items() if steps == {ended}}
        for steps in gone.values():
            steps.discard(ended)
        assert sorted(under_way.freed_by(plans[ended])) == sorted((name,) for name in expected)
