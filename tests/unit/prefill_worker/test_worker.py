"""The life of a hand-over at the prefill worker: what is shipped when, and that pages come back exactly once.

The engine and the sender are recorders that run everything at once, so each test reads as a sequence of calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from core.clock import VirtualClock
from core.errors import GrantRefused, InvalidRequest, PeerLost, TransferAborted
from core.request import (
    ClusterId,
    EngineId,
    FinishReason,
    GatewayId,
    PullOutcome,
    PullReport,
    PullTask,
    Role,
    SamplingParams,
    SequenceFailure,
    SequenceId,
    SequenceSpec,
    SessionId,
    StageStats,
    TokenChunk,
    WorkerId,
)
from core.request_log import REQUESTS
from core.tracing import SpanLog, TraceContext
from engine.grammar import CompiledGrammar
from engine.step_plan import StepItem, StepPlan
from kv_transfer.sender import StoredPages
from kv_transfer.session import Grant, SendReport
from kv_transfer.transport import SendOrder
from prefill_worker.worker import GrantQuery, PrefillWorker

PAGE = 4
GATEWAY = GatewayId("gateway")
QUERY = GrantQuery(SessionId("session"), "decode:1")
SPEC = SequenceSpec(SequenceId("s"), tuple(range(10)), SamplingParams(seed=1), hold_kv=True)
PAGES = (7, 8, 9)
GRANT = Grant(QUERY.session_id, b"t" * 16, 0, (1, 2, 3), b"", 30.0)
TASK = PullTask(WorkerId("decode-1"), ClusterId("here"), EngineId("engine"), "decode:2", 8)
STATS = StageStats(WorkerId(""), Role.PREFILL, queue_s=1.0, compute_s=2.0, cached_tokens=4)


class Recorder:
    """Stands for the engine and for the sender: writes down what is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((name, *arguments))

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class RecordedSender(Recorder):
    def step_stores(self, stores: Sequence[StoredPages]) -> Callable[[int], None]:
        def layer_stored(layer: int) -> None:
            for pages in stores:
                self.calls.append(("pages_stored", pages.session_id, layer, pages.first_page, pages.page_ids))

        return layer_stored


class InstantEngineThread:
    """Runs what is submitted at once."""

    def __init__(self, engine: Recorder) -> None:
        self.engine = engine

    def submit(self, fn: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(self.engine))
        except Exception as error:
            future.set_exception(error)
        return future


class Bench:
    """One worker, its recorders, and what it published."""

    def __init__(self, grant: Grant | Exception = GRANT) -> None:
        self.engine, self.sender, self.spans = Recorder(), RecordedSender(), SpanLog()
        self.published: list[TokenChunk | SequenceFailure] = []
        self.grant = grant
        self.refused: str | None = None
        self.worker = PrefillWorker(
            WorkerId("prefill-0"),
            InstantEngineThread(self.engine),  # type: ignore[arg-type]
            page_size=PAGE,
            num_layers=2,
            check=self.check,
            publish=lambda gateway, item: self.published.append(item),
            ask_grant=self.ask,
            make_commit=lambda sequence_id, tokens: f"{sequence_id}:{list(tokens)}".encode(),
            run_on_loop=self.run,
            clock=VirtualClock(7.0),
            pull=self.pull,
            compile_grammar=lambda spec: self.compiling,
            tracer=self.spans,
        )
        self.compiling: Future[CompiledGrammar] | None = None  # what sequences wait for
        self.pulls: list[tuple[SequenceId, PullTask, SendOrder]] = []
        self.pulled: asyncio.Future[PullReport] | None = None  # what the next pull waits for
        self.worker.attach(self.sender)  # type: ignore[arg-type]

    def check(self, spec: SequenceSpec) -> None:
        if self.refused:
            raise InvalidRequest("prompt", self.refused)

    async def ask(self, query: GrantQuery) -> Grant:
        if isinstance(self.grant, Exception):
            raise self.grant
        return self.grant

    async def pull(self, spec: SequenceSpec, task: PullTask, order: SendOrder) -> PullReport:
        self.pulls.append((spec.sequence_id, task, order))
        assert self.pulled is not None
        return await self.pulled

    def run(self, work: Awaitable[None]) -> None:
        async def await_it() -> None:
            await work

        asyncio.run(await_it())

    def step(self, start: int, count: int, *, samples: bool, page_ids: Sequence[int] = PAGES) -> None:
        tokens = SPEC.prompt_token_ids[start : start + count]
        item = StepItem(SPEC.sequence_id, tokens, start, tuple(page_ids), samples, SPEC.sampling, None, 10)  # type: ignore[arg-type]
        layer_stored = self.worker.step_planned(StepPlan((item,)))
        for layer in range(2):
            layer_stored(layer)

    def token(self, finish: FinishReason | None = None) -> None:
        assert self.worker.on_chunk(TokenChunk(SPEC.sequence_id, 0, (42,), finish_reason=finish, stats=STATS))

    def close(self, error: Exception | None = None) -> None:
        self.worker.closed(QUERY.session_id, SendReport(error, 96, 4, 0.5, 0.1))  # type: ignore[arg-type]


def test_the_session_opens_with_the_sequences_tokens_and_its_place_among_others() -> None:
    bench = Bench()
    order = SendOrder("acme", deadline_at=7.0)
    bench.worker.prefill(SPEC, GATEWAY, QUERY, order)
    bench.worker.sequence_started(SPEC, 0, PAGES)
    assert bench.sender.calls[0] == ("open", QUERY.session_id, 3, order, 10)


def test_pages_travel_when_they_are_full_and_the_last_one_with_the_last_chunk() -> None:
    bench = Bench()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    bench.worker.sequence_started(SPEC, 4, PAGES)  # one page was cached
    bench.step(4, 3, samples=False)  # tokens 4..6: page 1 is not full yet
    bench.step(7, 3, samples=True)  # tokens 7..9: page 1 is, and page 2 is the last
    bench.token()
    stored = [call[1:] for call in bench.sender.calls if call[0] == "pages_stored"]
    session = QUERY.session_id
    assert stored == [
        (session, 0, 0, (7,)),
        (session, 1, 0, (7,)),
        (session, 0, 1, (8, 9)),
        (session, 1, 1, (8, 9)),
    ]
    assert bench.sender.names() == ["open", "granted", *["pages_stored"] * 4, "commit"]
    assert bench.sender.calls[0] == ("open", session, 3, SendOrder(), 10)
    assert bench.sender.calls[-1] == ("commit", session, b"s:[42]")


def test_the_gateway_gets_the_token_before_the_transfer_ends_and_its_cost_after() -> None:
    bench = Bench()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    bench.worker.sequence_started(SPEC, 0, PAGES)
    bench.step(0, 10, samples=True)
    bench.token()
    (chunk,) = bench.published
    assert isinstance(chunk, TokenChunk)
    assert chunk.token_ids == (42,)
    assert chunk.stats == StageStats(WorkerId("prefill-0"), Role.PREFILL, 1.0, 2.0, cached_tokens=4)
    assert ("release", SPEC.sequence_id) not in bench.engine.calls

    bench.close()
    last = bench.published[-1]
    assert isinstance(last, TokenChunk)
    assert (last.position, last.token_ids) == (1, ())
    assert last.stats is not None
    assert (last.stats.transfer_s, last.stats.exposed_transfer_s, last.stats.bytes_shipped) == (0.5, 0.1, 96)
    assert bench.engine.calls[-1] == ("release", SPEC.sequence_id)
    assert bench.worker.num_sessions == 0


def test_a_first_token_that_is_the_last_is_not_handed_over() -> None:
    bench = Bench()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    bench.worker.sequence_started(SPEC, 0, PAGES)
    bench.step(0, 10, samples=True)
    bench.token(FinishReason.STOP)
    assert bench.sender.names()[-1] == "abort"
    bench.close(TransferAborted("the first token was the last"))
    assert len(bench.published) == 1, "the client has everything; the ended session is nobody's failure"
    assert bench.engine.calls[-1] == ("release", SPEC.sequence_id)


def test_without_a_session_the_pages_go_back_with_the_token() -> None:
    bench = Bench()
    bench.worker.prefill(SPEC, GATEWAY, None)
    bench.worker.sequence_started(SPEC, 0, PAGES)
    bench.step(0, 10, samples=True)
    bench.token(FinishReason.LENGTH)
    assert bench.sender.calls == []
    assert bench.engine.names() == ["add", "release"]
    assert bench.worker.num_sessions == 0


@pytest.mark.parametrize("error", [GrantRefused("unknown"), PeerLost("gone")], ids=["refused", "lost"])
def test_a_grant_that_is_not_given_is_the_decode_workers_fault(error: Exception) -> None:
    bench = Bench(grant=error)
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    bench.worker.sequence_started(SPEC, 0, PAGES)
    assert bench.sender.names() == ["open", "abort"]
    bench.close(TransferAborted("no grant"))
    (failure,) = bench.published
    assert isinstance(failure, SequenceFailure)
    assert (failure.retryable, failure.stage) == (True, Role.DECODE)
    assert str(error) in failure.message
    assert bench.engine.calls[-1] == ("abort", SPEC.sequence_id)
    assert bench.worker.num_sessions == 0


def test_a_broken_link_after_the_token_releases_the_pages_and_is_a_retryable_failure() -> None:
    bench = Bench()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    bench.worker.sequence_started(SPEC, 0, PAGES)
    bench.step(0, 10, samples=True)
    bench.token()
    bench.close(PeerLost("connection reset"))
    failure = bench.published[-1]
    assert isinstance(failure, SequenceFailure)
    assert (failure.retryable, failure.stage) == (True, Role.DECODE)
    assert bench.engine.calls[-1] == ("release", SPEC.sequence_id)


def test_an_abort_waits_for_the_session_before_the_pages_go_back() -> None:
    bench = Bench()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    bench.worker.sequence_started(SPEC, 0, PAGES)
    bench.step(0, 5, samples=False)
    bench.worker.abort(SPEC.sequence_id, "the client left")
    assert bench.sender.names()[-1] == "abort"
    assert "abort" not in bench.engine.names()
    bench.close(TransferAborted("the client left"))
    assert bench.engine.calls[-1] == ("abort", SPEC.sequence_id)
    assert bench.worker.num_sessions == 0


def test_an_abort_before_the_first_step_needs_no_session() -> None:
    bench = Bench()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    bench.worker.abort_gateway(GATEWAY)
    assert bench.sender.calls == []
    assert bench.engine.names() == ["add", "abort"]
    assert bench.worker.num_sessions == 0


def test_a_failed_step_breaks_the_session_and_reaches_the_gateway_once() -> None:
    bench = Bench()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    bench.worker.sequence_started(SPEC, 0, PAGES)
    assert bench.worker.on_failure(SequenceFailure(SPEC.sequence_id, "step failed", True, Role.DECODE))
    assert bench.sender.names()[-1] == "abort"
    bench.close(TransferAborted("step failed"))
    (failure,) = bench.published
    assert isinstance(failure, SequenceFailure)
    assert (failure.message, failure.stage) == ("step failed", Role.PREFILL)


def test_what_the_engine_can_never_run_is_refused_and_forgotten() -> None:
    bench = Bench()
    bench.refused = "too long"
    with pytest.raises(InvalidRequest, match="too long"):
        bench.worker.prefill(SPEC, GATEWAY, QUERY)
    assert bench.worker.num_sessions == 0
    assert bench.engine.calls == []


def test_a_sequence_is_taken_once() -> None:
    bench = Bench()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    with pytest.raises(ValueError, match="already here"):
        bench.worker.prefill(SPEC, GATEWAY, QUERY)


def test_other_peoples_chunks_are_not_ours() -> None:
    bench = Bench()
    assert not bench.worker.on_chunk(TokenChunk(SequenceId("other"), 0, (1,)))
    assert not bench.worker.on_failure(SequenceFailure(SequenceId("other"), "", True, Role.DECODE))


def test_a_sequence_that_the_engine_does_not_take_fails_and_leaves_nothing() -> None:
    bench = Bench()

    def refuse(spec: SequenceSpec, arrived_at: float) -> None:
        raise InvalidRequest("max_tokens", "must be above what is already there")

    bench.engine.add = refuse  # type: ignore[method-assign]
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    (failure,) = bench.published
    assert isinstance(failure, SequenceFailure)
    assert (failure.stage, "max_tokens" in failure.message) == (Role.PREFILL, True)
    assert bench.worker.num_sessions == 0


# ---- pages that are pulled first ----


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("outcome", [PullOutcome.PULLED, PullOutcome.TIMEOUT])
async def test_a_sequence_is_queued_when_its_pull_has_ended_however_and_its_stats_say_so(outcome: PullOutcome) -> None:
    bench = Bench()
    bench.pulled = asyncio.get_running_loop().create_future()
    order = SendOrder("acme", deadline_at=7.0)
    bench.worker.prefill(SPEC, GATEWAY, QUERY, order, TASK)
    await settle()
    assert bench.pulls == [(SPEC.sequence_id, TASK, order)]
    assert bench.engine.calls == []
    assert bench.worker.num_sessions == 1

    report = PullReport(outcome, 8, 512, 0.25)
    bench.pulled.set_result(report)
    await settle()

    assert bench.engine.calls == [("add", SPEC, 7.0)]
    await asyncio.to_thread(bench.worker.sequence_started, SPEC, 8, PAGES)
    bench.step(8, 2, samples=True)
    bench.token()
    bench.close()
    assert [chunk.stats.pull for chunk in bench.published if isinstance(chunk, TokenChunk) and chunk.stats] == [
        report,
        report,
    ]


@pytest.mark.parametrize("ends", ["sequence", "gateway"])
async def test_an_abort_during_a_pull_ends_it_and_nothing_is_queued(ends: str) -> None:
    bench = Bench()
    bench.pulled = asyncio.get_running_loop().create_future()
    bench.worker.prefill(SPEC, GATEWAY, QUERY, pull=TASK)
    await settle()

    if ends == "sequence":
        bench.worker.abort(SPEC.sequence_id, "the client left")
    else:
        bench.worker.abort_gateway(GATEWAY)
    await settle()

    assert bench.pulled.cancelled(), "whoever pulls hears of it"
    assert "add" not in bench.engine.names()
    assert bench.sender.calls == []
    assert bench.published == []
    assert bench.worker.num_sessions == 0


async def test_an_abort_in_the_moment_in_which_a_pull_ends_queues_nothing() -> None:
    bench = Bench()
    bench.pulled = asyncio.get_running_loop().create_future()
    bench.worker.prefill(SPEC, GATEWAY, QUERY, pull=TASK)
    await settle()

    bench.pulled.set_result(PullReport(PullOutcome.PULLED))
    bench.worker.abort(SPEC.sequence_id, "the client left")
    await settle()

    assert "add" not in bench.engine.names()
    assert bench.worker.num_sessions == 0


# ---- grammars that are compiled first ----


async def test_a_sequence_is_queued_when_its_grammar_is_compiled() -> None:
    bench = Bench()
    bench.compiling = Future()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    await settle()
    assert bench.engine.calls == []

    bench.compiling.set_result(CompiledGrammar(None, 1))
    await settle()
    assert bench.engine.calls == [("add", SPEC, 7.0)]


async def test_a_grammar_that_does_not_compile_fails_its_sequence_for_good() -> None:
    bench = Bench()
    bench.compiling = Future()
    bench.compiling.set_exception(InvalidRequest("grammar", "is none"))
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    await settle()
    assert bench.published == [SequenceFailure(SPEC.sequence_id, "grammar: is none", False, Role.PREFILL)]
    assert bench.engine.calls == []
    assert bench.worker.num_sessions == 0


async def test_an_abort_while_a_grammar_is_compiled_queues_nothing_and_leaves_it_to_others() -> None:
    bench = Bench()
    bench.compiling = Future()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    await settle()
    bench.worker.abort(SPEC.sequence_id, "the client left")
    await settle()
    assert not bench.compiling.cancelled()
    bench.compiling.set_result(CompiledGrammar(None, 1))
    await settle()
    assert "add" not in bench.engine.names()
    assert bench.worker.num_sessions == 0


# ---- what is told of it ----


def test_a_hand_over_is_two_spans_of_its_attempt_and_a_line(caplog: pytest.LogCaptureFixture) -> None:
    bench, attempt = Bench(), TraceContext.new()
    with caplog.at_level(logging.INFO, logger=REQUESTS.name):
        bench.worker.prefill(replace(SPEC, trace=attempt), GATEWAY, QUERY)
        bench.worker.sequence_started(SPEC, 0, PAGES)
        bench.step(0, 10, samples=True)
        bench.token()
        bench.close()

    spans = {span.name: span for span in bench.spans.spans}
    assert set(spans) == {"prefill", "prefill.queue", "prefill.compute", "transfer"}
    assert spans["prefill"].parent == attempt
    assert spans["transfer"].parent == spans["prefill.queue"].parent == spans["prefill"].context
    assert spans["transfer"].attributes["prfaas.bytes_shipped"] == 96
    assert (spans["prefill.compute"].began_at, spans["prefill.compute"].ended_at) == (8.0, 10.0)
    assert not any(span.error for span in spans.values())
    (line,) = caplog.records
    assert (line.request_id, line.bytes_shipped) == (SPEC.sequence_id, 96)  # type: ignore[attr-defined]


def test_a_prompt_that_is_given_up_is_a_span_that_says_why() -> None:
    bench, attempt = Bench(), TraceContext.new()
    bench.worker.prefill(replace(SPEC, trace=attempt), GATEWAY, QUERY)
    bench.worker.abort(SPEC.sequence_id, "the client went away")

    (span,) = bench.spans.spans
    assert (span.name, span.parent, span.error) == ("prefill", attempt, "the client went away")


def test_what_is_not_traced_has_no_span() -> None:
    bench = Bench()
    bench.worker.prefill(SPEC, GATEWAY, QUERY)
    bench.worker.sequence_started(SPEC, 0, PAGES)
    bench.step(0, 10, samples=True)
    bench.token()
    bench.close()
    assert bench.spans.spans == []
