"""Decoding beside prompts: when, on how much of a device, and with whose pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from engine.colocated_mode import NO_PROMISE, Slowdowns, StepShape, layer_group
from engine.step_plan import StepPlan
from engine.step_seconds import StepSeconds
from tests.unit.engine.test_chunked_prefill import Bench, SchedulerMachine, expected, shape, spec

COSTS = StepSeconds(once=8e-3, prompted=0.0, token=3e-5, pair=0.0, row=1e-4, context=0.0)
PROMPTS = StepShape(prompt_tokens=8000)  # 248 ms, 31 for each of 8 layers
DECODING = StepShape(batch=20, context_tokens=9000)  # 10 ms


# ---- layers ----


def test_a_group_is_as_many_layers_as_the_promise_leaves() -> None:
    choice = layer_group(COSTS, 0.080, 8, PROMPTS, DECODING)
    assert (choice.number, choice.reason) == (2, "2 of 8 layers: a layer takes 31.00 ms, decoding 10.0 of 80.0")
    assert layer_group(COSTS, 0.001, 8, PROMPTS, DECODING).number == 1, "one at least"
    assert layer_group(COSTS, 9.0, 8, PROMPTS, DECODING).number == 8
    assert layer_group(COSTS, None, 8, PROMPTS, DECODING).number == 1, "8,000 tokens are 16 times 512"
    assert layer_group(COSTS, None, 8, StepShape(prompt_tokens=1200), DECODING).number == 3
    assert layer_group(None, 0.080, 8, StepShape(prompt_tokens=300), DECODING).number == 8


@given(st.floats(1e-4, 1), st.integers(1, 80), st.integers(1, 40_000), st.integers(0, 200))
def test_a_group_keeps_the_promise_or_is_one_layer(slo_s: float, layers: int, tokens: int, batch: int) -> None:
    prompts, decoding = StepShape(tokens), StepShape(batch=batch)
    number = layer_group(COSTS, slo_s, layers, prompts, decoding).number
    layer_s = (COSTS.once + COSTS.prompts(tokens, 0.0)) / layers
    assert 1 <= number <= layers
    assert number == 1 or number * layer_s + COSTS.decode(batch, 0) <= slo_s * (1 + 1e-9)


# ---- parts of a device ----


def test_prompts_get_the_largest_part_beside_which_decoding_is_in_time() -> None:
    parts = Slowdowns((1.0, 0.75, 0.5))
    assert parts.choose(COSTS, 0.001, StepShape()).number == 0, "nobody decodes"
    assert parts.choose(COSTS, 0.030, DECODING).number == 0, "three times as long is allowed, 2 are guessed"
    for _ in range(30):
        parts.learn(0, 0.010, 0.035)
    choice = parts.choose(COSTS, 0.030, DECODING)
    assert choice.number == 1
    assert choice.reason == "75% of the device for prompts: decoding takes 1.56 times its 10.0 ms, 3.00 are allowed"
    assert parts.choose(COSTS, 0.002, DECODING).number == 2, "the smallest, if none is small enough"
    assert parts.of(1) <= NO_PROMISE
    assert parts.choose(COSTS, None, DECODING).number == 1
    parts.learn(1, 0.0, 9.9)
    assert parts.of(1) == pytest.approx(1.5625), "what nobody can predict teaches nothing"


# ---- the scheduler ----


def apart(**config: int | str) -> Bench:
    return Bench(**{"num_pages": 40, "max_batch_tokens": 20, "colocated_mode": "layered", **config})  # type: ignore[arg-type]


def test_a_step_holds_either_prompts_or_decoding_sequences() -> None:
    bench = apart()
    bench.add(spec("a", [1] * 3, max_tokens=5))
    prompts = bench.scheduler.plan_prompts(bench.now)
    assert shape(prompts) == [("a", 3)]
    assert prompts is not None
    assert bench.scheduler.plan_between(prompts, bench.now) is None, "nobody decodes"
    bench.commit(prompts)
    assert bench.scheduler.plan_prompts(bench.now) is None
    bench.add(spec("b", [2] * 15, max_tokens=2))
    prompts = bench.scheduler.plan_prompts(bench.now)
    assert shape(prompts) == [("b", 15)]
    assert prompts is not None
    for _ in range(3):
        between = bench.scheduler.plan_between(prompts, bench.now)
        assert shape(between) == [("a", 1)]
        assert between is not None
        bench.commit(between)
    bench.commit(prompts)
    assert shape(bench.step()) == [("a", 1), ("b", 1)], "who was prefilled decodes from now on"
    bench.drain()
    assert bench.allocator.whole()


def test_decoding_beside_prompts_takes_no_page_that_it_cannot_have_and_preempts_nobody() -> None:
    bench = apart(num_pages=8)
    bench.add(spec("a", [1] * 4, max_tokens=8))
    bench.step()
    bench.add(spec("b", [2] * 6, max_tokens=2))
    prompts = bench.scheduler.plan_prompts(bench.now)
    assert prompts is not None
    lent = bench.allocator.allocate(bench.allocator.num_free)
    assert lent is not None
    assert bench.scheduler.plan_between(prompts, bench.now) is None
    assert bench.scheduler.load().num_preemptions == 0
    bench.commit(prompts)
    assert bench.scheduler.plan_prompts(bench.now) is None, "decoding has to find its page first"
    bench.allocator.release(lent)
    bench.drain()
    assert bench.outputs["a"] == expected(spec("a", [1] * 4, max_tokens=8))


class ApartMachine(SchedulerMachine):
    """The same with prompts under way and decoding beside them, each of which may end first; the device writes at the
    end of a step, so a page that was given away too early is seen."""

    def __init__(self) -> None:
        super().__init__()
        limits = {"max_batch_size": 3, "max_batch_tokens": 5, "max_prefill_chunk": 4}
        self.bench = Bench(num_pages=9, **limits, colocated_mode="partitioned")  # type: ignore[arg-type]
        self.prompts: StepPlan | None = None
        self.between: StepPlan | None = None

    @precondition(lambda self: self.prompts is None)
    @rule()
    def prompts_begin(self) -> None:
        self.prompts = self.bench.scheduler.plan_prompts(self.bench.now)
        if self.prompts is not None:
            self.check(self.prompts)

    @precondition(lambda self: self.prompts is not None and self.between is None)
    @rule()
    def decoding_begins(self) -> None:
        assert self.prompts is not None
        self.between = self.bench.scheduler.plan_between(self.prompts, self.bench.now)
        if self.between is not None:
            assert all(len(item.token_ids) == 1 and item.samples for item in self.between.items)
            names = {item.sequence_id for item in self.prompts.items}
            assert not names & {item.sequence_id for item in self.between.items}

    @precondition(lambda self: self.between is not None)
    @rule()
    def decoding_ends(self) -> None:
        assert self.between is not None
        plan, self.between = self.between, None
        self.book(plan)

    @precondition(lambda self: self.prompts is not None)
    @rule()
    def prompts_end(self) -> None:
        assert self.prompts is not None
        plan, self.prompts = self.prompts, None
        self.book(plan)

    def check(self, plan: StepPlan) -> None:
        assert plan.num_tokens <= 5
        for started in plan.started:
            if started.spec.sequence_id in self.queued:
                assert self.queued.pop(0) == started.spec.sequence_id, "the head of the queue was overtaken"

    def book(self, plan: StepPlan) -> None:
        for chunk in self.bench.commit(plan):
            if chunk.sequence_id in self.specs and self.specs[chunk.sequence_id].hold_kv:
                self.held.add(chunk.sequence_id)

    def step(self) -> bool:
        """What an engine does between two steps."""
        for plan in (self.between, self.prompts):
            if plan is not None:
                self.book(plan)
        self.between = self.prompts = None
        plan = self.bench.scheduler.plan_prompts(self.bench.now) or self.bench.scheduler.plan_step(self.bench.now)
        if plan is None:
            return False
        self.check(plan)
        assert len(plan.items) <= 3
        self.book(plan)
        return True


TestApart = ApartMachine.TestCase
TestApart.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
