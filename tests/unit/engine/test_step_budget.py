"""A step's budget in seconds: the promise is kept, prompts always go on, and what bounds them is said."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.compute import StepSample
from core.errors import InvalidConfig
from engine import step_budget
from engine.chunked_prefill import ChunkedPrefillScheduler
from engine.config import EngineConfig
from engine.step_budget import TILE, Bound, StepBudget, StepBudgets
from engine.step_plan import StepPlan
from engine.step_seconds import StepClock, StepSeconds
from tests.unit.engine.test_chunked_prefill import EOS, Bench, SchedulerMachine, shape, spec

COSTS = StepSeconds(once=6e-3, prompted=0.0, token=3e-5, pair=1e-9, row=5e-5, context=1e-7)
SMALL = st.just(0.0) | st.floats(1e-9, 1e-3)
ANY_COSTS = st.builds(
    StepSeconds, st.floats(0, 1e-1), SMALL, SMALL, st.just(0.0) | st.floats(1e-12, 1e-6), SMALL, SMALL, SMALL
)


# ---- seconds ----


@given(ANY_COSTS, st.just(0.0) | st.floats(1e-6, 10), st.integers(0, 100_000))
def test_what_fits_takes_no_longer_and_one_token_more_would(costs: StepSeconds, seconds: float, start: int) -> None:
    fitting = costs.fitting(seconds, start)
    assert fitting >= 0

    def took(num_tokens: int) -> float:
        return costs.prompts(num_tokens, num_tokens * (start + num_tokens / 2))

    if fitting < 1 << 40:
        assert took(fitting) <= seconds * (1 + 1e-9)
        assert took(fitting + 1) >= seconds * (1 - 1e-9)


def samples(costs: StepSeconds, noise: float = 1.0) -> list[StepSample]:
    made = []
    for tokens in (0, 64, 256, 1024, 4096):
        for batch, context in ((0, 0), (1, 700), (8, 9000), (64, 60_000)):
            if tokens or batch:
                seconds = costs.decode(batch, context) + costs.prompts(tokens, tokens * tokens / 2)
                seconds += costs.prompted if tokens else 0.0
                made.append(StepSample(tokens, tokens * tokens / 2, batch, context, seconds * noise))
    return made


def test_a_clock_learns_what_steps_take_and_follows_when_they_change() -> None:
    clock, costs = StepClock(), replace(COSTS, prompted=2e-3)
    assert clock.seconds is None
    for sample in samples(costs):
        clock.observe(sample)
    for name in StepSeconds.__slots__:
        assert getattr(clock.seconds, name) == pytest.approx(getattr(costs, name), rel=0.02)
    clock.observe(StepSample(1024, 0.0, 0, 0, 40.0))  # a compiler
    clock.observe(StepSample(0, 0.0, 1, 700, math.inf))
    for _ in range(16):
        clock.observe(StepSample(0, 0.0, 1, 700, costs.decode(1, 700)))
    assert clock.seconds is not None
    assert clock.seconds.prompts(1024, 1024 * 512) == pytest.approx(costs.prompts(1024, 1024 * 512), rel=0.3)
    for _ in range(200):
        for sample in samples(costs, noise=2.0):
            clock.observe(sample)
    assert clock.seconds.decode(8, 9000) == pytest.approx(2 * costs.decode(8, 9000), rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.builds(StepSample, *[st.integers(0, 9000), st.floats(0, 1e7)] * 2, st.floats(1e-4, 9)), max_size=40))
def test_nothing_is_predicted_below_zero(steps: list[StepSample]) -> None:
    clock = StepClock((step, 0.0) for step in steps)
    if steps:
        assert clock.seconds is not None
        assert min(getattr(clock.seconds, name) for name in StepSeconds.__slots__) >= 0


def test_a_step_that_waited_for_its_host_says_nothing_of_tokens() -> None:
    clock = StepClock((sample, 0.0) for sample in samples(COSTS))
    for _ in range(50):
        clock.observe(StepSample(64, 64 * 32.0, 8, 9000, 0.030), launch_s=0.029)
        clock.observe(StepSample(64, 64 * 32.0, 8, 9000, 0.012), launch_s=0.030)  # launched while another was computed
    known = clock.seconds
    assert known is not None
    assert known.launch == pytest.approx(0.0295, abs=1e-3)
    for name in ("once", "token", "row"):
        assert getattr(known, name) == pytest.approx(getattr(COSTS, name), rel=0.02)
    assert known.left(0.040, 8, 9000) == pytest.approx(0.040 - COSTS.decode(8, 9000), rel=0.02)
    assert known.left(0.010, 8, 9000) == pytest.approx(0.0295 - COSTS.decode(8, 9000), rel=0.06), "it takes that anyway"


@pytest.mark.parametrize("tried_s", [0.001, 0.012, 0.150], ids=lambda s: f"tried {s}")
@pytest.mark.parametrize("launch_s", [0.002, 0.030, 0.037, 0.060], ids=lambda s: f"launch {s}")
def test_chunks_are_as_long_as_the_device_computes_while_the_host_launches(launch_s: float, tried_s: float) -> None:
    """A GPU whose host is slow, or was when the first steps were tried: chunks must not stay small for ever."""

    def took(tokens: int, start: int, batch: int, context: int, host_s: float) -> float:
        return max(host_s, COSTS.decode(batch, context) + COSTS.prompts(tokens, tokens * (start + tokens / 2)))

    trials = [(StepSample(n, n * n / 2, 0, 0, took(n, 0, 0, 0, tried_s)), tried_s) for n in (64, 256, 1024, 4096)]
    trials[-1] = (trials[-1][0], 0.0)  # as step_trials.py
    trials += [(StepSample(0, 0.0, b, c, COSTS.decode(b, c)), 0.0) for b, c in ((1, 1), (8, 8), (64, 64), (8, 32768))]
    clock, slo_s, start, chunks = StepClock(trials), 0.040, 0, []
    budgets = StepBudgets(16384, slo_s, lambda: clock.seconds)
    for _ in range(200):
        budget = budgets.beside(8, lambda: 9000)
        tokens = budget.take(start, 16384 - start)
        seconds = took(tokens, start, 8, 9000, launch_s)
        chunks.append((tokens, seconds))
        clock.observe(StepSample(tokens, tokens * (start + tokens / 2), 8, 9000, seconds), launch_s)
        start = (start + tokens) % 16384
    most_s = max(slo_s, launch_s)
    fitting = COSTS.fitting(most_s - COSTS.decode(8, 9000), 16384)
    late = chunks[100:]
    assert sum(tokens for tokens, _ in late) > 0.9 * (fitting - TILE) * len(late)
    assert max(seconds for _, seconds in late) <= 1.1 * most_s


# ---- budget ----


@given(
    costs=ANY_COSTS,
    num_tokens=st.integers(1, 8192),
    seconds=st.floats(-0.1, 1),
    prompts=st.lists(st.tuples(st.integers(0, 50_000), st.integers(1, 9000)), min_size=1, max_size=6),
)
def test_a_promise_is_kept_or_prompts_get_one_tile(
    costs: StepSeconds, num_tokens: int, seconds: float, prompts: list[tuple[int, int]]
) -> None:
    budget, spent, taken = StepBudget(num_tokens, seconds, costs), 0.0, 0
    for start, wanted in prompts:
        could = budget.fits(start, wanted)
        got = budget.take(start, wanted)
        assert could == (got > 0)
        assert got <= wanted
        assert taken or got, "prompts go on in every step"
        spent += costs.prompts(got, got * (start + got / 2))
        taken += got
    assert taken == budget.num_taken <= num_tokens
    if budget.bound is Bound.LEAST:
        assert taken <= TILE
    else:
        assert spent <= max(seconds, 0) * (1 + 1e-9) + 1e-12
    if taken == sum(wanted for _, wanted in prompts):
        assert budget.bound in (Bound.WHOLE, Bound.LEAST)


def test_what_bounds_a_step_is_said_and_counted() -> None:
    budgets = StepBudgets(2048, 0.040, lambda: COSTS)

    def step(batch: int, context: int, *prompts: tuple[int, int]) -> tuple[int, Bound]:
        budget = budgets.beside(batch, lambda: context)
        for start, wanted in prompts:
            budget.take(start, wanted)
        budgets.note(budget, batch, lambda: context)
        return budget.num_taken, budget.bound

    assert step(0, 0, (0, 4000)) == (2048, Bound.TOKENS), "nobody waits for a token"
    assert step(8, 8000, (0, 500)) == (500, Bound.WHOLE)
    assert step(8, 8000, (0, 4000)) == (1024, Bound.TPOT), "(40 - 7.2) ms at 30 us, in whole tiles"
    assert step(64, 330_000, (0, 4000)) == (64, Bound.LEAST), "decoding takes 42 ms"
    assert step(8, 8000, (100_000, 4000)) == (192, Bound.TPOT), "far into a prompt a token attends to more"
    assert budgets.counts == {Bound.TOKENS: 1, Bound.WHOLE: 1, Bound.TPOT: 2, Bound.LEAST: 1}
    assert str(budgets.latest) == "192 prompt tokens beside 8 decoding, bound: tpot; decoding takes 7.2 of 40.0 ms"


def test_what_launching_takes_is_said() -> None:
    budgets = StepBudgets(2048, 0.040, lambda: replace(COSTS, launch=0.05))
    budget = budgets.beside(8, lambda: 8000)
    budget.take(0, 4000)
    budgets.note(budget, 8, lambda: 8000)
    assert str(budgets.latest) == (
        "1,344 prompt tokens beside 8 decoding, bound: tpot; decoding takes 7.2 of 40.0 ms, launching 50.0"
    )


# ---- the scheduler ----


def with_costs(bench: Bench, costs: StepSeconds, **config: Any) -> Bench:
    limits: dict[str, Any] = {"max_batch_size": 4, "max_batch_tokens": 1000, **config}
    bench.scheduler = ChunkedPrefillScheduler(EngineConfig(**limits), bench.allocator, 1000, (EOS,), lambda: costs)
    return bench


def test_chunks_shrink_beside_decoding_and_nobody_starts_who_would_get_nothing() -> None:
    costs = StepSeconds(once=1.0, prompted=0.0, token=0.01, pair=0.0, row=0.5, context=0.0)
    bench = with_costs(Bench(num_pages=400), costs, tpot_slo_s=3.6)
    bench.add(spec("a", [1] * 200, max_tokens=9), spec("b", [2] * 300, max_tokens=9))
    assert shape(bench.step()) == [("a", 200), ("b", 300)], "nobody decodes"
    bench.add(spec("c", [3] * 200, max_tokens=9), spec("d", [4] * 90, max_tokens=9))
    assert shape(bench.step()) == [("a", 1), ("b", 1), ("c", 128)], "1.6 s are left: two tiles; d waits for its turn"
    assert bench.scheduler.load().num_waiting == 1
    assert shape(bench.step()) == [("a", 1), ("b", 1), ("c", 72), ("d", 64)]
    assert shape(bench.step()) == [("a", 1), ("b", 1), ("c", 1), ("d", 26)]
    bench.drain()
    assert bench.allocator.whole()


class PromiseMachine(SchedulerMachine):
    """The same where a promise bounds chunks, and tiles are small."""

    COSTS = StepSeconds(once=1.0, prompted=0.0, token=0.5, pair=0.01, row=0.25, context=0.01)

    def __init__(self) -> None:
        super().__init__()
        self.tile, step_budget.TILE = step_budget.TILE, 2
        limits = {"max_batch_size": 3, "max_batch_tokens": 5, "max_prefill_chunk": 4}
        with_costs(self.bench, self.COSTS, tpot_slo_s=2.6, **limits)
        self.plans: list[StepPlan] = []
        commit = self.bench.commit

        def recorded(plan: StepPlan) -> Any:
            self.plans.append(plan)
            return commit(plan)

        self.bench.commit = recorded  # type: ignore[method-assign]

    def step(self) -> bool:
        before = self.bench.scheduler.budgets.counts[Bound.LEAST]
        going = super().step()
        if going:
            self.check(self.plans[-1], self.bench.scheduler.budgets.counts[Bound.LEAST] > before)
        return going

    def check(self, plan: StepPlan, least: bool) -> None:
        """The predicted seconds of what was planned."""
        started = {one.spec.sequence_id for one in plan.started}
        decoding = [i for i in plan.items if len(i.token_ids) == 1 and i.samples and i.sequence_id not in started]
        prompts = [item for item in plan.items if item not in decoding]
        if not decoding or not prompts or least:
            return
        seconds = self.COSTS.decode(len(decoding), sum(item.start + 1 for item in decoding))
        for item in prompts:
            num_tokens = len(item.token_ids)
            seconds += self.COSTS.prompts(num_tokens, num_tokens * (item.start + num_tokens / 2))
        assert seconds <= 2.6 + 1e-9

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            step_budget.TILE = self.tile


TestPromise = PromiseMachine.TestCase
TestPromise.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("colocated_mode", {"colocated_mode": "both"}),
        ("tpot_slo_s", {"tpot_slo_s": 0.0}),
        ("prefill_order", {"prefill_order": "slack", "colocated_mode": "layered"}),
    ],
)
def test_what_the_configuration_refuses(key: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=f"engine.{key}"):
        EngineConfig(**wrong)


def test_a_promise_without_costs_is_no_bound() -> None:
    budgets = StepBudgets(100, 1e-9, lambda: None)
    assert budgets.beside(4, lambda: 9).take(0, 500) == 96
