"""The engine's thread computes, runs what is submitted, and never ends without saying so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, cast

import pytest

from core.errors import SequenceFailed, UnsupportedModel
from core.request import SequenceId, TokenChunk
from engine.engine import Engine, StepOutput
from engine.engine_thread import EngineThread

TIMEOUT_S = 10


class CountingEngine:
    """Has ``work`` steps to do; each gives one chunk whose position is the step's number."""

    def __init__(self) -> None:
        self.work = 0
        self.num_steps = 0
        self.threads: set[int] = set()
        self.error: Exception | None = None
        self.empty = False
        self.between_layers: Callable[[], None] | None = None
        self.in_layers: Callable[[], None] | None = None  # called by the next step, in its middle
        self.urgent = 0  # steps that cannot wait; each gives one chunk, with a negative position

    @property
    def has_work(self) -> bool:
        return self.work > 0

    def step(self) -> StepOutput:
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        in_layers, self.in_layers = self.in_layers, None
        if in_layers is not None:
            in_layers()
        self.work -= 1
        self.num_steps += 1
        return StepOutput() if self.empty else StepOutput((TokenChunk(SequenceId("s"), self.num_steps),))

    def step_between(self) -> StepOutput:
        if not self.urgent:
            return StepOutput()
        self.urgent -= 1
        return StepOutput((TokenChunk(SequenceId("urgent"), -1 - self.urgent),))


class Output:
    """What came out, and a way to wait for the n-th."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self._arrived = threading.Condition()

    def __call__(self, output: StepOutput) -> None:
        with self._arrived:
            self.positions.extend(chunk.position for chunk in output.chunks)
            self._arrived.notify_all()

    def wait_for(self, count: int) -> None:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.positions) >= count, TIMEOUT_S)


@pytest.fixture
def counting() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def output() -> Output:
    return Output()


@pytest.fixture
def thread(counting: CountingEngine, output: Output) -> Iterator[EngineThread]:
    thread = EngineThread(lambda: cast(Engine, counting), output)
    thread.start()
    yield thread
    assert thread.stop(TIMEOUT_S)


def give_work(amount: int) -> Any:
    def give(engine: Any) -> None:
        engine.work += amount

    return give


def test_steps_while_there_is_work_and_then_sleeps(
    thread: EngineThread, counting: CountingEngine, output: Output
) -> None:
    thread.submit(give_work(3)).result(TIMEOUT_S)
    output.wait_for(3)

    assert output.positions == [1, 2, 3]
    assert thread.submit(lambda engine: engine.has_work).result(TIMEOUT_S) is False
    assert counting.num_steps == 3


def test_wakes_up_again(thread: EngineThread, output: Output) -> None:
    for count in (1, 2, 3):
        thread.submit(give_work(1))
        output.wait_for(count)


def test_submitted_calls_run_in_order_on_the_one_thread(thread: EngineThread, counting: CountingEngine) -> None:
    ran: list[int] = []
    futures = [thread.submit(lambda engine, i=i: ran.append(i) or threading.get_ident()) for i in range(50)]  # type: ignore[misc]
    threads = {future.result(TIMEOUT_S) for future in futures}
    thread.submit(give_work(1)).result(TIMEOUT_S)

    assert ran == list(range(50))
    assert threads == {thread.submit(lambda engine: threading.get_ident()).result(TIMEOUT_S)}
    assert counting.threads <= threads


def test_an_exception_belongs_to_whoever_submitted(thread: EngineThread, output: Output) -> None:
    def fail(engine: Engine) -> None:
        raise ValueError("theirs")

    with pytest.raises(ValueError, match="theirs"):
        thread.submit(fail).result(TIMEOUT_S)
    thread.submit(give_work(1))
    output.wait_for(1)


def test_a_call_may_submit_another(thread: EngineThread) -> None:
    inner: Future[Future[int]] = thread.submit(lambda engine: thread.submit(lambda _: 7))

    assert inner.result(TIMEOUT_S).result(TIMEOUT_S) == 7


def test_a_cancelled_call_does_not_run(thread: EngineThread) -> None:
    gate, ran = threading.Event(), threading.Event()
    thread.submit(lambda engine: gate.wait(TIMEOUT_S))
    future = thread.submit(lambda engine: ran.set())

    assert future.cancel()
    gate.set()
    thread.submit(lambda engine: None).result(TIMEOUT_S)

    assert not ran.is_set()
    with pytest.raises(CancelledError):
        future.result()


def test_empty_output_is_not_published(thread: EngineThread, counting: CountingEngine, output: Output) -> None:
    counting.empty = True
    thread.submit(give_work(2)).result(TIMEOUT_S)
    while thread.submit(lambda engine: engine.has_work).result(TIMEOUT_S):
        pass

    assert output.positions == []


def test_a_listener_that_fails_does_not_end_the_thread(
    counting: CountingEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(output: StepOutput) -> None:
        raise ValueError("listener")

    thread = EngineThread(lambda: cast(Engine, counting), fail)
    thread.start()
    thread.submit(give_work(2)).result(TIMEOUT_S)
    while thread.submit(lambda engine: engine.has_work).result(TIMEOUT_S):
        pass

    assert thread.alive
    assert counting.num_steps == 2
    assert "the listener failed" in caplog.text
    assert thread.stop(TIMEOUT_S)


def test_an_engine_that_raises_ends_the_thread_loudly(
    counting: CountingEngine, output: Output, caplog: pytest.LogCaptureFixture
) -> None:
    deaths: list[Exception] = []
    died = threading.Event()

    def on_death(error: Exception) -> None:
        deaths.append(error)
        died.set()

    thread = EngineThread(lambda: cast(Engine, counting), output, on_death)
    counting.error = AssertionError("the books are wrong")
    counting.work = 1
    thread.start()
    assert died.wait(TIMEOUT_S)

    assert deaths == [counting.error]
    assert "the engine thread died" in caplog.text
    with pytest.raises(SequenceFailed, match="the books are wrong") as raised:
        thread.submit(lambda engine: None).result(TIMEOUT_S)
    assert raised.value.retryable
    assert thread.stop(TIMEOUT_S)


def test_stop_fails_what_did_not_run_and_what_comes_later(counting: CountingEngine, output: Output) -> None:
    thread = EngineThread(lambda: cast(Engine, counting), output)
    thread.start()
    busy, gate = threading.Event(), threading.Event()
    thread.submit(lambda engine: (busy.set(), gate.wait(TIMEOUT_S)))
    assert busy.wait(TIMEOUT_S)
    before = thread.submit(lambda engine: 1)

    assert not thread.stop(timeout_s=0)
    gate.set()
    assert thread.stop(TIMEOUT_S)

    for future in (before, thread.submit(lambda engine: 2)):
        with pytest.raises(SequenceFailed, match="the engine has stopped"):
            future.result(TIMEOUT_S)
    assert not thread.alive


def test_stop_before_start_fails_what_was_submitted(counting: CountingEngine, output: Output) -> None:
    thread = EngineThread(lambda: cast(Engine, counting), output)
    before = thread.submit(lambda engine: 1)

    assert thread.stop(TIMEOUT_S)

    with pytest.raises(SequenceFailed, match="before it started"):
        before.result(TIMEOUT_S)


def test_stop_ends_between_steps_though_there_is_work(counting: CountingEngine, output: Output) -> None:
    thread = EngineThread(lambda: cast(Engine, counting), output)
    thread.start()
    thread.submit(give_work(10**9))
    output.wait_for(1)

    assert thread.stop(TIMEOUT_S)
    assert counting.work > 0


class ScriptedTurns:
    """Gives the turn when the test says so."""

    def __init__(self) -> None:
        self.allowed = threading.Event()
        self.num_given_back = 0

    def try_take(self) -> bool:
        return self.allowed.is_set()

    def give_back(self) -> None:
        self.num_given_back += 1


def test_a_step_waits_for_its_turn_and_callers_do_not(counting: CountingEngine, output: Output) -> None:
    turns = ScriptedTurns()
    thread = EngineThread(lambda: cast(Engine, counting), output, turns=turns)
    thread.start()
    thread.submit(lambda engine: setattr(counting, "work", 2)).result(TIMEOUT_S)
    assert thread.submit(lambda engine: counting.num_steps).result(TIMEOUT_S) == 0, "no turn, no step"
    turns.allowed.set()
    output.wait_for(2)
    assert thread.stop(TIMEOUT_S)
    assert turns.num_given_back >= 2


def test_what_keeps_the_engine_from_being_made_reaches_who_started_it(output: Output) -> None:
    def fail() -> Engine:
        raise UnsupportedModel("no such model")

    thread = EngineThread(fail, output)
    early = thread.submit(lambda engine: engine.has_work)
    with pytest.raises(UnsupportedModel, match="no such model"):
        thread.start()
    with pytest.raises(SequenceFailed, match="no such model"):
        early.result(TIMEOUT_S)


def test_what_comes_in_the_middle_of_a_step_is_run_between_two_layers(
    thread: EngineThread, counting: CountingEngine, output: Output
) -> None:
    seen: list[list[int]] = []

    def in_layers() -> None:
        assert counting.between_layers is not None
        came = thread.submit(lambda engine: setattr(engine, "urgent", 1))
        counting.between_layers()
        assert came.done()
        seen.append(list(output.positions))  # before the step's own token
        counting.between_layers()

    counting.in_layers = in_layers
    thread.submit(give_work(1))
    output.wait_for(2)

    assert seen == [[-1]]
    assert output.positions == [-1, 1]
