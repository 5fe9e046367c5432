"""Who goes first, by hand; and steps that hold others up: nothing is lost, written over, or promised in vain."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from core.request import SequenceSpec
from engine.prefill_order import PATIENCE_S, FirstCome, LeastSlack, Pace
from engine.sequence import Sequence
from engine.step_plan import StepPlan
from tests.unit.engine.test_chunked_prefill import PROMPTS, Bench, SchedulerMachine, expected, shape, spec

PACE = Pace(left_s=10.0, token_s=0.1, step_s=0.5)


def sequence(name: str, due: float | None, arrived_at: float = 0.0) -> Sequence:
    one = replace(spec(name, [1, 2, 3]), first_token_by=due)
    return Sequence(one, arrived_at, frozenset(), 100, array("q", one.token_ids))


def queue(*sequences: Sequence) -> deque[Sequence]:
    waiting: deque[Sequence] = deque()
    for one in sequences:
        LeastSlack().insert(waiting, one)
    return waiting


def names(waiting: deque[Sequence]) -> list[str]:
    return [one.sequence_id for one in waiting]


def test_whose_token_is_due_first_goes_first_and_equal_ones_as_they_came() -> None:
    waiting = queue(sequence("a", 9.0), sequence("b", 3.0), sequence("c", 9.0), sequence("d", None), sequence("e", 3.0))
    assert names(waiting) == ["b", "e", "a", "c", "d"], "what was promised nothing is due after a minute"
    assert names(queue(sequence("new", 70.0, 50.0), sequence("old", None, 5.0))) == ["old", "new"]
    assert PATIENCE_S == 60.0


def test_without_promises_the_orders_are_the_same() -> None:
    waiting = queue(*(sequence(name, None, at) for at, name in enumerate("abc")))
    assert names(waiting) == ["a", "b", "c"]
    assert LeastSlack().head(waiting, 2.0) == FirstCome().head(waiting, 2.0) == 0


def test_who_is_late_lets_others_pass_until_it_is_late_by_what_it_was_promised() -> None:
    waiting = queue(sequence("late", 4.0, 2.0), sequence("b", 9.0), sequence("c", 8.0))
    assert names(waiting) == ["late", "c", "b"]
    assert LeastSlack().head(waiting, 4.0) == 0
    assert LeastSlack().head(waiting, 5.0) == 1
    assert LeastSlack().head(waiting, 6.1) == 0, "2 s were promised, and it is late by 2.1"
    assert LeastSlack().head(queue(sequence("a", 4.0, 2.0), sequence("b", 4.5, 3.0)), 5.0) == 0, "all are late"


def test_what_was_preempted_stays_in_front() -> None:
    victim = sequence("victim", 50.0)
    victim.num_preemptions = 1
    waiting = deque([victim])
    LeastSlack().insert(waiting, sequence("a", 3.0))
    assert names(waiting) == ["victim", "a"]
    assert LeastSlack().head(waiting, 0.0) == 0


def test_urgent_is_who_is_in_time_now_and_late_after_the_step() -> None:
    order, now, own_s = LeastSlack(), 100.0, 2.0
    in_time = [due for due in range(95, 120) if order.is_urgent(sequence("a", float(due)), own_s, PACE, now)]
    assert in_time == list(range(102, 112)), "2 s of its own from now on, and 10 s of the step before it"
    assert not FirstCome().is_urgent(sequence("a", 105.0), own_s, PACE, now)


# ---- the scheduler ----


def due(one: SequenceSpec, at: float | None) -> SequenceSpec:
    return replace(one, first_token_by=at)


def slack_bench(**config: Any) -> Bench:
    return Bench(**{"num_pages": 40, "max_batch_tokens": 20, "prefill_order": "slack", **config})


def begin(bench: Bench, *specs: SequenceSpec) -> StepPlan:
    bench.add(*specs)
    plan = bench.scheduler.plan_step(bench.now)
    assert plan is not None
    return plan


def test_prompts_start_and_go_on_in_the_order_in_which_they_are_due() -> None:
    bench = slack_bench(max_batch_tokens=4)
    bench.add(due(spec("long", [1] * 10, max_tokens=1), 90.0))
    assert shape(bench.step()) == [("long", 4)]
    bench.add(due(spec("later", [3] * 3, max_tokens=1), 80.0), due(spec("soon", [2] * 6, max_tokens=1), 50.0))
    assert shape(bench.step()) == [("long", 4)], "what runs goes first"
    assert shape(bench.step()) == [("long", 2), ("soon", 2)]
    assert shape(bench.step()) == [("soon", 4)]
    assert shape(bench.step()) == [("later", 3)]


def test_a_prompt_that_would_be_late_is_computed_in_the_middle_of_a_step() -> None:
    bench = slack_bench()
    long, short = due(spec("long", [1] * 18, max_tokens=2), 60.0), due(spec("short", [2] * 4, max_tokens=2), 8.0)
    plan = begin(bench, long)
    assert bench.scheduler.plan_urgent(plan, PACE, bench.now) is None, "nobody waits"
    bench.add(short, due(spec("patient", [1] * 3, max_tokens=1), 40.0))

    urgent = bench.scheduler.plan_urgent(plan, PACE, bench.now)
    assert shape(urgent) == [("short", 4)]
    assert urgent is not None
    assert [started.spec.sequence_id for started in urgent.started] == ["short"]
    assert [c.sequence_id for c in bench.commit(urgent)] == ["short"]
    assert [c.sequence_id for c in bench.commit(plan)] == ["long"]
    bench.drain()
    assert all(bench.outputs[one.sequence_id] == expected(one) for one in (long, short))
    assert bench.allocator.whole()


def test_a_promise_is_not_kept_by_breaking_another() -> None:
    bench = slack_bench()
    plan = begin(bench, due(spec("long", [1] * 18, max_tokens=2), 10.4))
    bench.add(due(spec("short", [2] * 4, max_tokens=2), 8.0))
    assert bench.scheduler.plan_urgent(plan, PACE, 0.0) is None, (
        "10 s are left of it, and half a second more is too much"
    )
    assert bench.scheduler.plan_urgent(plan, PACE, 0.5) is not None, "it is late by now anyway"


def test_decoding_sequences_wait_no_longer_than_the_rest_of_their_step() -> None:
    bench = slack_bench()
    bench.add(due(spec("decoding", [1], max_tokens=9), 90.0))
    bench.step()
    plan = begin(bench, due(spec("long", [1] * 18, max_tokens=2), 90.0))
    assert shape(plan) == [("decoding", 1), ("long", 18)]
    bench.add(due(spec("short", [2] * 4, max_tokens=2), 1.6))
    soon_over = Pace(0.4, 0.1, 0.5)
    assert bench.scheduler.plan_urgent(plan, soon_over, bench.now) is None
    assert bench.scheduler.plan_urgent(plan, Pace(0.6, 0.1, 0.5), bench.now) is not None


def test_what_does_not_end_in_one_step_or_has_no_place_holds_nobody_up() -> None:
    bench = slack_bench(max_batch_size=2)
    plan = begin(bench, spec("long", [1] * 18, max_tokens=2))
    bench.add(due(spec("too long", [2] * 21, max_tokens=2), 8.0))
    assert bench.scheduler.plan_urgent(plan, PACE, 0.0) is None
    bench.add(due(spec("a", [2] * 4, max_tokens=2), 8.0), due(spec("b", [2] * 4, max_tokens=2), 8.0))
    assert shape(bench.scheduler.plan_urgent(plan, PACE, 0.0)) == [("a", 4)]


def test_with_first_come_first_served_nothing_is_held_up() -> None:
    bench = slack_bench(prefill_order="fcfs")
    plan = begin(bench, spec("long", [1] * 18, max_tokens=2))
    bench.add(due(spec("short", [2] * 4, max_tokens=2), 8.0))
    assert bench.scheduler.plan_urgent(plan, PACE, 0.0) is None


def test_pages_of_a_sequence_that_is_aborted_in_the_middle_are_not_given_to_another() -> None:
    bench = slack_bench(num_pages=11)
    plan = begin(bench, spec("long", [1] * 18, max_tokens=2))
    assert bench.scheduler.abort(plan.items[0].sequence_id)
    bench.add(due(spec("short", [2] * 6, max_tokens=2), 8.0))
    assert bench.scheduler.plan_urgent(plan, PACE, 0.0) is None, "2 pages are free; 9 are written until the step ends"
    assert bench.commit(plan) == []
    assert shape(bench.step()) == [("short", 6)]


class SlackMachine(SchedulerMachine):
    """The same with promises, and with calls and urgent steps in the middle of a step."""

    def __init__(self) -> None:
        super().__init__()
        limits = {"max_batch_size": 3, "max_batch_tokens": 5, "max_prefill_chunk": 4}
        self.bench = Bench(num_pages=9, **limits, prefill_order="slack")  # type: ignore[arg-type]
        self.promises: list[float | None] = []

    def make(self, prompt: list[int], max_tokens: int, hold_kv: bool = False) -> SequenceSpec:
        one = super().make(prompt, max_tokens, hold_kv)
        promise = self.promises.pop() if self.promises else None
        one = replace(one, first_token_by=None if promise is None else self.bench.now + promise)
        self.specs[one.sequence_id] = one
        return one

    @rule(promises=st.lists(st.none() | st.floats(0.5, 30), max_size=4))
    def promise(self, promises: list[float | None]) -> None:
        self.promises = promises

    @precondition(lambda self: self.bench.scheduler.has_work)
    @rule(prompt=PROMPTS, promise=st.floats(0.5, 12), left_s=st.floats(0, 20), aborts=st.booleans())
    def a_step_is_held_up(self, prompt: list[int], promise: float, left_s: float, aborts: bool) -> None:
        bench = self.bench
        plan = bench.scheduler.plan_step(bench.now)
        if plan is None:
            return
        ids = [item.sequence_id for item in plan.items]
        self.promises = [promise]
        self.add(prompt[:4], 3, False)
        if aborts and ids[0] in self.specs:
            bench.scheduler.abort(ids[0])
            self.forget(ids[0])
        urgent = bench.scheduler.plan_urgent(plan, Pace(left_s, 0.1, 0.5), bench.now)
        if urgent is not None:
            assert not {item.sequence_id for item in urgent.items} & set(ids)
            assert all(item.samples for item in urgent.items), "it ends in this step"
            self.book(urgent)
        self.book(plan)

    def book(self, plan: StepPlan) -> None:
        for chunk in self.bench.commit(plan):
            if chunk.sequence_id in self.specs and self.specs[chunk.sequence_id].hold_kv:
                self.held.add(chunk.sequence_id)

    def step(self) -> bool:
        plan = self.bench.scheduler.plan_step(self.bench.now)
        if plan is None:
            return False
        self.book(plan)
        return True


TestSlack = SlackMachine.TestCase
TestSlack.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(st.none() | st.floats(0, 50), st.floats(0, 50)), max_size=8))
def test_the_queue_is_always_in_order_of_what_is_due(given_: list[tuple[float | None, float]]) -> None:
    waiting = queue(*(sequence(str(i), promised, at) for i, (promised, at) in enumerate(given_)))
    dues = [
        one.arrived_at + PATIENCE_S if one.spec.first_token_by is None else one.spec.first_token_by for one in waiting
    ]
    assert dues == sorted(dues)
