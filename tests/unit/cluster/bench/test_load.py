"""Who sends what when, in virtual time: open and closed loops, sessions, failures, lateness."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cluster.bench.client_record import MEASURED, WARM_UP, ClientRecord
from cluster.bench.load import LoadLimits, RunResult, run_load
from cluster.bench.prompts import TokenWording
from cluster.bench.schedule import Schedule, make_schedule
from cluster.bench.target import Ask, Facts, Reply, Stopwatch
from cluster.simulator.virtual_loop import run, running_loop
from cluster.simulator.workload import POISSON, TRACE, USERS, ArrivalPlan
from cluster.workload_traces import TraceRequest
from core.clock import Clock


@dataclass
class ScriptedTarget:
    """First token after ``ttft_s``, one every ``gap_s`` after it; the answer of request k is token ids k, k, ..."""

    ttft_s: float = 1.0
    gap_s: float = 0.25
    fails: Callable[[int], bool] = lambda number: False
    asked: list[Ask] = field(default_factory=list)

    async def open(self) -> Facts:
        return Facts("scripted")

    def prepare(self, ask: Ask) -> Ask:
        return ask

    async def send(self, prepared: Ask, watch: Stopwatch) -> Reply:
        number = len(self.asked)
        self.asked.append(prepared)
        watch.send()
        await asyncio.sleep(self.ttft_s)
        if self.fails(number):
            watch.end()
            return Reply(error="http_503")
        watch.chunk()
        for _ in range(prepared.output_tokens - 1):
            await asyncio.sleep(self.gap_s)
            watch.chunk()
        ids = (number + 1,) * prepared.output_tokens
        return Reply(token_ids=ids, output_tokens=len(ids))

    async def close(self) -> None: ...


async def at_once(work: Callable[[], Any]) -> Any:
    return work()


def play(
    schedule: Schedule, target: ScriptedTarget | None = None, limits: LoadLimits = LoadLimits()
) -> tuple[list[ClientRecord], RunResult]:
    heard: list[ClientRecord] = []

    async def main() -> RunResult:
        loop: Clock = _LoopClock()
        wording = TokenWording(1000)
        return await run_load(
            schedule, target or ScriptedTarget(), wording, wording, loop, limits, heard.append, offload=at_once
        )

    return heard, run(main())


class _LoopClock:
    def now(self) -> float:
        return running_loop().time()


def trace(*instants: float, output: int = 3) -> list[TraceRequest]:
    return [TraceRequest(4, output, at) for at in instants]


def test_an_open_loop_sends_at_the_instants_however_many_are_under_way() -> None:
    _, result = play(make_schedule(trace(0.0, 0.1, 0.2), ArrivalPlan(TRACE)))

    assert [one.sent_at for one in result.records] == pytest.approx([0.0, 0.1, 0.2])
    assert [one.chunk_s for one in result.records] == [pytest.approx((1.0, 1.25, 1.5))] * 3
    assert [one.late_s for one in result.records] == pytest.approx([0.0] * 3)


def test_max_concurrency_holds_requests_back_and_says_so() -> None:
    _, result = play(make_schedule(trace(0.0, 0.5), ArrivalPlan(TRACE)), limits=LoadLimits(max_concurrency=1))

    second = result.records[1]
    assert (second.due_at, second.sent_at, second.held_s) == pytest.approx((0.5, 1.5, 1.0))
    assert second.late_s == pytest.approx(0.0)
    assert second.ttft_s == pytest.approx(1.0)


def test_a_closed_loop_keeps_so_many_users_busy() -> None:
    schedule = make_schedule(trace(*range(6)), ArrivalPlan(USERS, num_users=2))

    _, result = play(schedule)

    assert [one.sent_at for one in result.records] == pytest.approx([0, 0, 1.5, 1.5, 3.0, 3.0])
    assert [one.due_at for one in result.records] == pytest.approx([0, 0, 1.5, 1.5, 3.0, 3.0])


def sessions() -> list[TraceRequest]:
    """Two turns; the second begins with the first's prompt and answer and comes 2 s after it."""
    return [
        TraceRequest(4, 3, session_id="s", turn=0),
        TraceRequest(9, 2, session_id="s", turn=1, think_s=2.0, appended=True),
    ]


def test_a_turn_comes_when_its_client_has_thought_and_holds_the_answer() -> None:
    target = ScriptedTarget()

    _, result = play(make_schedule(sessions(), ArrivalPlan(USERS)), target)

    assert [(one.conversation, one.turn, one.sent_at) for one in result.records] == [
        (0, 0, 0.0),
        (0, 1, pytest.approx(3.5)),
    ]
    first, second = (ask.prompt for ask in target.asked)
    assert second[:4] == first
    assert second[4:7] == (1, 1, 1)


def test_a_conversation_goes_on_after_a_failure_with_a_made_up_answer() -> None:
    target = ScriptedTarget(fails=lambda number: number == 0)

    _, result = play(make_schedule(sessions(), ArrivalPlan(USERS)), target)

    assert [one.error for one in result.records] == ["http_503", None]
    assert result.records[1].sent_at == pytest.approx(1.0 + 2.0)
    assert target.asked[1].prompt[:4] == target.asked[0].prompt


def test_a_request_that_takes_too_long_has_failed_at_its_timeout() -> None:
    _, result = play(make_schedule(trace(0.0), ArrivalPlan(TRACE)), limits=LoadLimits(timeout_s=1.1))

    (one,) = result.records
    assert (one.error, one.ended_s, one.chunk_s) == ("timeout", pytest.approx(1.1), pytest.approx((1.0,)))


def test_nothing_is_sent_after_the_duration_and_what_is_under_way_ends() -> None:
    _, result = play(make_schedule(trace(0.0, 1.0, 2.0), ArrivalPlan(TRACE)), limits=LoadLimits(duration_s=1.0))

    assert [one.error for one in result.records] == [None, None]

    closed = make_schedule(trace(*range(9)), ArrivalPlan(USERS))
    assert len(play(closed, limits=LoadLimits(duration_s=2.0))[1].records) == 2  # at 0 and 1.5


def test_warm_up_comes_first_is_heard_of_and_not_measured() -> None:
    heard, result = play(make_schedule(trace(0.0, 0.1), ArrivalPlan(TRACE), warm_up=1))

    assert [one.phase for one in heard] == [WARM_UP, MEASURED, MEASURED]
    assert [one.sent_at for one in result.records] == pytest.approx([0.0, 0.1])


def test_lateness_of_the_sender_is_in_no_latency() -> None:
    """A schedule that begins in the past is the extreme of it."""
    schedule = make_schedule(trace(0.0, 0.1), ArrivalPlan(TRACE))
    past = [replace(one, starts_at=one.starts_at - 3.0) for one in schedule.workload.conversations]
    schedule = replace(schedule, workload=replace(schedule.workload, conversations=past))

    _, result = play(schedule)

    assert [one.late_s for one in result.records] == pytest.approx([3.0, 2.9])
    assert [one.ttft_s for one in result.records] == pytest.approx([1.0, 1.0])


def test_two_runs_of_one_schedule_are_the_same_run() -> None:
    requests = trace(*[0.0] * 30)
    schedules = [make_schedule(requests, ArrivalPlan(POISSON, 4.0), seed=7) for _ in range(2)]

    assert play(schedules[0]) == play(schedules[1])


def test_what_a_writer_raises_ends_the_run_with_it() -> None:
    class Broken(ScriptedTarget):
        def prepare(self, ask: Ask) -> Ask:
            raise ValueError("cannot be written")

    with pytest.raises(ValueError, match="cannot be written"):
        play(make_schedule(trace(0.0), ArrivalPlan(TRACE)), Broken())
