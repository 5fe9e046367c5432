"""Lazy decoding must not be seen: whatever happens happens as if every step had been made at its instant."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cost_model import ComputeCost, LinearCost
from cluster.simulator.answers import Answer, AnswerBook
from cluster.simulator.engine import SimulatedEngine
from cluster.simulator.step_cost import FittedCost, PromptChunk
from cluster.simulator.virtual_loop import run, running_loop
from core.errors import InvalidConfig
from core.request import SamplingParams, SequenceId, SequenceSpec, TokenChunk
from engine.config import EngineConfig
from engine.scheduler import SchedulerLoad
from engine.step_plan import StepPlan

COST = FittedCost(ComputeCost(LinearCost((0.01, 1e-3, 1e-6)), LinearCost((0.02, 1e-3, 1e-5))))

APART_S = 1e-5  # between what happens: what is due at one instant has no order

Arrival = tuple[float, int, int]  # (at, prompt tokens, output tokens)
Log = list[tuple[str, float, str, int]]


class EagerEngine(SimulatedEngine):
    """Wakes up for every step."""

    def _quiet_steps(self, plan: StepPlan) -> int:
        return 0


class Listener:
    """Notes what it hears, of first and last tokens."""

    def __init__(self) -> None:
        self.log: Log = []

    def step_begun(self, plan: StepPlan, begins_at: float, ends_at: float) -> None:
        self.log.append(("prompts until", round(ends_at, 9), "", plan.num_tokens))

    def step_ended(self, chunks: Sequence[TokenChunk]) -> None:
        for chunk in chunks:
            if chunk.stats is not None:
                now = round(running_loop().now(), 9)
                self.log.append((str(chunk.finish_reason), now, chunk.sequence_id, chunk.position))


def spec(number: int, prompt: int, outputs: int) -> SequenceSpec:
    sampling = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True, seed=number)
    return SequenceSpec(SequenceId(str(number)), tuple(range(number, number + prompt)), sampling)


def play(
    make: type[SimulatedEngine],
    num_pages: int,
    arrivals: Sequence[Arrival],
    looks: Sequence[float],
    tpot_slo_s: float | None = None,
) -> tuple[Log, list[SchedulerLoad], float]:
    async def main() -> tuple[Log, list[SchedulerLoad], float]:
        loop, answers, listener = running_loop(), AnswerBook(), Listener()
        limits = {"max_batch_tokens": 32, "max_batch_size": 6}
        config = EngineConfig(page_size=4, num_pages=num_pages, tpot_slo_s=tpot_slo_s, **limits)  # type: ignore[arg-type]
        engine = make(loop, config, COST, 200, answers, listener)
        loads: list[SchedulerLoad] = []

        def look() -> None:
            engine.settle()
            engine.allocator.check_integrity()
            loads.append(engine.scheduler.load())

        for number, (at, prompt, outputs) in enumerate(arrivals):
            asked = spec(number, prompt, outputs)
            answers.add(number, Answer(number))
            loop.call_later(at + number * APART_S, engine.submit, lambda s=asked: engine.add(s))
        for number, at in enumerate(looks):
            loop.call_later(at + (number + 0.5) * APART_S, look)
        await asyncio.sleep(500.0)
        engine.allocator.check_integrity()
        assert engine.allocator.whole()
        return listener.log, loads, round(engine.busy_s, 6)

    return run(main())


arrivals = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.integers(25, 60), arrivals, st.lists(st.floats(0, 6), max_size=4), st.sampled_from((None, 0.03, 0.06)))
def test_a_lazy_engine_does_what_an_eager_one_does(
    num_pages: int, given_arrivals: list[Arrival], looks: list[float], tpot_slo_s: float | None
) -> None:
    eager = play(EagerEngine, num_pages, given_arrivals, looks, tpot_slo_s)
    lazy = play(SimulatedEngine, num_pages, given_arrivals, looks, tpot_slo_s)

    assert lazy == eager


def test_a_lazy_engine_wakes_up_for_what_happens() -> None:
    """Three sequences of 50 tokens: an eager engine has a timer for each of some 150 steps."""

    def num_timers(make: type[SimulatedEngine]) -> int:
        fired: list[float] = []

        class Counting(make):  # type: ignore[misc, valid-type]
            def _on_timer(self) -> None:
                fired.append(running_loop().now())
                super()._on_timer()

        play(Counting, 60, [(float(i), 8, 50) for i in range(3)], ())
        return len(fired)

    assert num_timers(EagerEngine) > 100
    assert num_timers(SimulatedEngine) < 30


def test_steps_that_follow_one_another_cannot_be_those_of_every_mode() -> None:
    async def main() -> None:
        config = EngineConfig(num_pages=60, colocated_mode="partitioned")
        with pytest.raises(InvalidConfig, match=r"engine\.colocated_mode: must be chunked in a simulation"):
            SimulatedEngine(running_loop(), config, COST, 200, AnswerBook(), Listener())

    run(main())


def test_a_paused_engine_computes_nothing_and_forgets_nothing() -> None:
    async def main() -> Log:
        loop, answers, listener = running_loop(), AnswerBook(), Listener()
        config = EngineConfig(page_size=4, num_pages=60, max_batch_tokens=32, max_batch_size=6)
        engine = SimulatedEngine(loop, config, COST, 200, answers, listener)
        answers.add(0, Answer(0))
        engine.pause(5.0)
        engine.submit(lambda: engine.add(spec(0, 10, 1)))
        await asyncio.sleep(20.0)
        return listener.log

    (begun, ended) = run(main())

    assert begun[1] == ended[1] == round(5.0 + COST.step_s([PromptChunk(10, 0, True)], 0, 0), 9)
