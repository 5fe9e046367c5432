"""The life of a sequence at the decode worker: pages are reserved, granted, admitted or given back, exactly once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from core.clock import VirtualClock
from core.errors import GrantRefused, Incompatible, InvalidRequest, PeerLost, ProtocolViolation, TransferError
from core.kv_layout import KvEnd, KvLayer, KvLayout
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
from decode_worker.worker import Announced, DecodeWorker
from engine.grammar import CompiledGrammar
from engine.scheduler import Reservation
from kv_transfer.session import Grant
from kv_transfer.transport import SendOrder

PAGE = 4
GATEWAY = GatewayId("gateway")
SESSION = SessionId("session")
SPEC = SequenceSpec(SequenceId("s"), tuple(range(10)), SamplingParams(seed=1))
ORDER = SendOrder("acme", deadline_at=7.0)
TASK = PullTask(WorkerId("prefill-1"), ClusterId("here"), EngineId("engine"), "prefill:2", 8)
RESERVATION = Reservation(SPEC, (7, 8, 9), 1)


class FakeEngine:
    """An engine whose pages come free when the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.reservation: Reservation | None = RESERVATION
        self.refuses: Exception | None = None

    def add(self, spec: SequenceSpec, arrived_at: float) -> None:
        assert arrived_at == 7.0, "when it joined the queue, not when the engine had time for it"
        if self.refuses:
            raise self.refuses
        self.calls.append(("add", spec.sequence_id))

    def abort(self, sequence_id: SequenceId) -> None:
        self.calls.append(("abort", sequence_id))

    def reserve(self, spec: SequenceSpec) -> Reservation | None:
        self.calls.append(("reserve",))
        return self.reservation

    def cancel(self, reservation: Reservation) -> None:
        self.calls.append(("cancel", reservation))

    def admit(self, reservation: Reservation, token_ids: tuple[int, ...], arrived_at: float) -> None:
        assert arrived_at == 7.0, "when its K/V was there, not when the engine had time for it"
        if self.refuses:
            raise self.refuses
        self.calls.append(("admit", reservation, token_ids))


class InstantEngineThread:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine

    def submit(self, fn: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(self.engine))
        except Exception as error:
            future.set_exception(error)
        return future


class FakeReceiver:
    waits = False

    def __init__(self) -> None:
        self.issued: list[tuple[SessionId, int, tuple[int, ...]]] = []
        self.aborted: list[SessionId] = []
        self.told: list[tuple[int, KvLayout | None, bytes]] = []
        self.refuses: TransferError | None = None

    def issue(
        self,
        session_id: SessionId,
        first_page: int,
        pages: tuple[int, ...],
        num_tokens: int,
        sender: KvLayout | None,
        sender_descriptor: bytes,
        sender_ranks: Sequence[KvEnd],
    ) -> Grant:
        if self.refuses:
            raise self.refuses
        self.issued.append((session_id, first_page, pages))
        self.told.append((num_tokens, sender, sender_descriptor))
        return Grant(session_id, b"t" * 16, first_page, pages, b"", 30.0)

    def abort(self, session_id: SessionId, reason: str) -> None:
        self.aborted.append(session_id)


class Bench:
    def __init__(self) -> None:
        self.engine, self.receiver, self.spans = FakeEngine(), FakeReceiver(), SpanLog()
        self.published: list[TokenChunk | SequenceFailure] = []
        self.refused: str | None = None
        self.worker = DecodeWorker(
            WorkerId("decode-0"),
            InstantEngineThread(self.engine),  # type: ignore[arg-type]
            page_size=PAGE,
            check=self.check,
            reserve=self.engine.reserve,
            publish=lambda gateway, item: self.published.append(item),
            read_commit=lambda payload: (SPEC.sequence_id, tuple(payload)),
            clock=VirtualClock(7.0),
            pull=self.pull,
            compile_grammar=lambda spec: self.compiling,
            tracer=self.spans,
        )
        self.compiling: Future[CompiledGrammar] | None = None  # what sequences wait for
        self.pulled: asyncio.Future[PullReport] | None = None  # what the next pull waits for
        self.worker.attach(self.receiver)  # type: ignore[arg-type]

    def check(self, spec: SequenceSpec) -> None:
        if self.refused:
            raise InvalidRequest("prompt", self.refused)

    async def pull(self, spec: SequenceSpec, task: PullTask, order: SendOrder) -> PullReport:
        assert (spec, task, order) == (SPEC, TASK, ORDER)
        assert self.pulled is not None
        return await self.pulled

    async def granted(self) -> Grant:
        self.worker.decode(SPEC, GATEWAY, SESSION)
        return await self.worker.grant(SESSION, 1.0)


async def test_a_grant_covers_the_pages_that_are_not_cached() -> None:
    bench = Bench()
    grant = await bench.granted()
    assert bench.receiver.issued == [(SESSION, 1, (8, 9))]
    assert (grant.first_page, grant.pages) == (1, (8, 9))


async def test_no_page_is_taken_before_the_grammar_is_compiled() -> None:
    bench = Bench()
    bench.compiling = Future()
    granted = asyncio.ensure_future(bench.granted())
    await asyncio.sleep(0.01)
    assert bench.engine.calls == []
    bench.compiling.set_result(CompiledGrammar(None, 1))
    await granted
    assert bench.engine.calls == [("reserve",)]


async def test_a_grammar_that_does_not_compile_gets_no_grant_and_is_not_queued() -> None:
    bench = Bench()
    bench.compiling = Future()
    bench.compiling.set_exception(InvalidRequest("grammar", "is none"))
    with pytest.raises(GrantRefused, match="grammar: is none"):
        await bench.granted()
    bench.worker.decode(replace(SPEC, sequence_id=SequenceId("local")), GATEWAY, None)
    await asyncio.sleep(0.01)
    assert bench.published == [SequenceFailure(SequenceId("local"), "grammar: is none", False, Role.DECODE)]
    assert bench.engine.calls == []


async def test_what_is_announced_counts_until_it_is_admitted_and_its_tokens_until_they_have_pages() -> None:
    bench = Bench()
    assert bench.worker.announced() == Announced()
    bench.worker.decode(SPEC, GATEWAY, SESSION)
    assert bench.worker.announced() == Announced(1, len(SPEC.token_ids))
    await bench.worker.grant(SESSION, 1.0)
    assert bench.worker.announced() == Announced(1, 0)
    bench.worker.committed(SESSION, b"\x07")
    assert bench.worker.announced() == Announced()


async def test_the_grant_is_issued_for_the_sequences_tokens_and_the_senders_pool() -> None:
    bench = Bench()
    layout = KvLayout(16, (KvLayer(8, 4, 4, "bfloat16", 2),))
    bench.worker.decode(SPEC, GATEWAY, SESSION)
    await bench.worker.grant(SESSION, 1.0, layout, b"sender")
    assert bench.receiver.told == [(10, layout, b"sender")]


async def test_a_grant_that_cannot_be_issued_gives_its_pages_back_and_may_be_asked_for_again() -> None:
    bench = Bench()
    bench.receiver.refuses = Incompatible("layout", "a", "b")
    with pytest.raises(Incompatible):
        await bench.granted()
    assert bench.engine.calls[-1] == ("cancel", RESERVATION)
    bench.receiver.refuses = None
    await bench.worker.grant(SESSION, 1.0)
    assert bench.receiver.issued == [(SESSION, 1, (8, 9))]


async def test_what_arrived_is_admitted_and_its_tokens_reach_the_gateway() -> None:
    bench = Bench()
    await bench.granted()
    bench.worker.committed(SESSION, bytes([42]))
    assert bench.engine.calls[-1] == ("admit", RESERVATION, (42,))
    assert bench.worker.num_sessions == 0
    stats = StageStats(WorkerId(""), Role.PREFILL, cached_tokens=4)
    assert bench.worker.on_chunk(TokenChunk(SPEC.sequence_id, 1, (5,), stats=stats))
    assert bench.worker.on_chunk(TokenChunk(SPEC.sequence_id, 2, (6,), finish_reason=FinishReason.STOP))
    first, last = bench.published
    assert isinstance(first, TokenChunk)
    assert first.stats == StageStats(WorkerId("decode-0"), Role.DECODE, cached_tokens=4, received_tokens=6)
    assert isinstance(last, TokenChunk)
    assert last.finish_reason is FinishReason.STOP
    assert bench.worker.num_sequences == 0


async def test_an_unannounced_or_twice_asked_session_is_refused() -> None:
    bench = Bench()
    with pytest.raises(GrantRefused, match="not announced"):
        await bench.worker.grant(SESSION, 1.0)
    await bench.granted()
    with pytest.raises(GrantRefused, match="has its grant"):
        await bench.worker.grant(SESSION, 1.0)


async def test_a_grant_waits_for_pages_and_takes_them_when_they_come_free() -> None:
    bench = Bench()
    bench.engine.reservation = None
    bench.worker.decode(SPEC, GATEWAY, SESSION)
    asking = asyncio.create_task(bench.worker.grant(SESSION, 5.0))
    await asyncio.sleep(0.02)
    assert not asking.done()
    bench.engine.reservation = RESERVATION
    bench.worker.pages_may_be_free()
    assert (await asking).pages == (8, 9)


async def test_pages_that_do_not_come_free_in_time_refuse_the_grant() -> None:
    bench = Bench()
    bench.engine.reservation = None
    bench.worker.decode(SPEC, GATEWAY, SESSION)
    with pytest.raises(GrantRefused, match="no 3 pages came free within"):
        await bench.worker.grant(SESSION, 0.02)


async def test_grants_are_given_in_the_order_in_which_they_were_asked() -> None:
    bench = Bench()
    bench.engine.reservation = None
    other = SequenceSpec(SequenceId("s2"), (1,), SamplingParams(seed=1))
    bench.worker.decode(SPEC, GATEWAY, SESSION)
    bench.worker.decode(other, GATEWAY, SessionId("session-2"))
    first = asyncio.create_task(bench.worker.grant(SESSION, 5.0))
    second = asyncio.create_task(bench.worker.grant(SessionId("session-2"), 5.0))
    await asyncio.sleep(0.02)
    bench.engine.reservation = RESERVATION
    bench.worker.pages_may_be_free()
    await asyncio.gather(first, second)
    assert [session for session, _, _ in bench.receiver.issued] == [SESSION, "session-2"]


async def test_a_broken_session_gives_the_pages_back_and_is_a_retryable_failure() -> None:
    bench = Bench()
    await bench.granted()
    bench.worker.released(SESSION, PeerLost("connection reset"))
    assert bench.engine.calls[-1] == ("cancel", RESERVATION)
    (failure,) = bench.published
    assert isinstance(failure, SequenceFailure)
    assert (failure.retryable, failure.stage) == (True, Role.PREFILL)
    assert bench.worker.num_sequences == 0


async def test_an_abort_while_pages_arrive_waits_for_their_release() -> None:
    bench = Bench()
    await bench.granted()
    bench.worker.abort(SPEC.sequence_id, "the client left")
    assert bench.receiver.aborted == [SESSION]
    assert ("cancel", RESERVATION) not in bench.engine.calls
    bench.worker.released(SESSION, PeerLost("aborted"))
    assert bench.engine.calls[-1] == ("cancel", RESERVATION)
    assert bench.published == []
    assert bench.worker.num_sequences == 0


async def test_an_abort_that_the_commit_overtook_ends_the_admitted_sequence() -> None:
    bench = Bench()
    await bench.granted()
    bench.worker.abort(SPEC.sequence_id, "the client left")
    bench.worker.committed(SESSION, bytes([42]))
    assert [call[0] for call in bench.engine.calls[-2:]] == ["admit", "abort"]
    assert bench.worker.num_sequences == 0


async def test_an_abort_while_a_grant_waits_refuses_it() -> None:
    bench = Bench()
    bench.engine.reservation = None
    bench.worker.decode(SPEC, GATEWAY, SESSION)
    asking = asyncio.create_task(bench.worker.grant(SESSION, 5.0))
    await asyncio.sleep(0.02)
    bench.worker.abort_gateway(GATEWAY)
    bench.worker.pages_may_be_free()
    with pytest.raises(GrantRefused, match="aborted"):
        await asking
    assert bench.receiver.issued == []


async def test_a_sequence_without_a_session_is_prefilled_here() -> None:
    bench = Bench()
    bench.worker.decode(SPEC, GATEWAY, None)
    assert bench.engine.calls == [("add", SPEC.sequence_id)]
    assert bench.worker.on_failure(SequenceFailure(SPEC.sequence_id, "step failed", True, Role.PREFILL))
    (failure,) = bench.published
    assert isinstance(failure, SequenceFailure)
    assert failure.stage is Role.DECODE


async def test_what_the_engine_can_never_run_is_refused_and_forgotten() -> None:
    bench = Bench()
    bench.refused = "too long"
    with pytest.raises(InvalidRequest, match="too long"):
        bench.worker.decode(SPEC, GATEWAY, SESSION)
    assert bench.worker.num_sequences == 0


async def test_a_sequence_is_taken_once() -> None:
    bench = Bench()
    bench.worker.decode(SPEC, GATEWAY, SESSION)
    with pytest.raises(ValueError, match="already here"):
        bench.worker.decode(SPEC, GATEWAY, SessionId("again"))


@pytest.mark.parametrize("session_id", [SESSION, None], ids=["admitted", "added"])
async def test_a_sequence_that_the_engine_does_not_take_fails_and_leaves_nothing(session_id: SessionId | None) -> None:
    bench = Bench()
    bench.engine.refuses = ProtocolViolation("its first token already ended it")
    bench.worker.decode(SPEC, GATEWAY, session_id)
    if session_id is not None:
        await bench.worker.grant(session_id, 1.0)
        bench.worker.committed(session_id, bytes([42]))
        assert bench.engine.calls[-1] == ("cancel", RESERVATION)
    (failure,) = bench.published
    assert isinstance(failure, SequenceFailure)
    assert (failure.retryable, failure.stage) == (True, Role.DECODE)
    assert bench.worker.num_sequences == 0


# ---- pages that are pulled first ----


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_sequence_that_is_prefilled_here_is_queued_when_its_pull_has_ended() -> None:
    bench = Bench()
    bench.pulled = asyncio.get_running_loop().create_future()
    bench.worker.decode(SPEC, GATEWAY, None, ORDER, TASK)
    await settle()
    assert bench.engine.calls == []
    assert bench.worker.num_sequences == 1

    report = PullReport(PullOutcome.NOT_FOUND, seconds=0.25)
    bench.pulled.set_result(report)
    await settle()

    assert bench.engine.calls == [("add", SPEC.sequence_id)]
    assert bench.worker.on_chunk(TokenChunk(SPEC.sequence_id, 0, (5,), stats=StageStats(WorkerId(""), Role.DECODE)))
    (chunk,) = bench.published
    assert isinstance(chunk, TokenChunk)
    assert chunk.stats is not None
    assert chunk.stats.pull == report


@pytest.mark.parametrize("ended", [False, True], ids=["under way", "just over"])
async def test_an_abort_during_a_pull_ends_it_and_nothing_is_queued(ended: bool) -> None:
    bench = Bench()
    bench.pulled = asyncio.get_running_loop().create_future()
    bench.worker.decode(SPEC, GATEWAY, None, ORDER, TASK)
    await settle()

    if ended:
        bench.pulled.set_result(PullReport(PullOutcome.PULLED))
    bench.worker.abort_gateway(GATEWAY)
    await settle()

    assert bench.pulled.cancelled() is not ended
    assert ("add", SPEC.sequence_id) not in bench.engine.calls
    assert bench.worker.num_sequences == 0


# ---- what is told of it ----


async def test_a_sequence_that_was_handed_over_is_a_span_with_its_steps_and_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench, attempt, transfer = Bench(), TraceContext.new(), TraceContext.new()
    with caplog.at_level(logging.INFO, logger=REQUESTS.name):
        bench.worker.decode(replace(SPEC, trace=attempt), GATEWAY, SESSION)
        await bench.worker.grant(SESSION, 1.0, trace=transfer)
        bench.worker.committed(SESSION, bytes([42]))
        first = StageStats(WorkerId(""), Role.DECODE, queue_s=0.5, compute_s=1.0)
        last = first._replace(compute_s=4.0)
        bench.worker.on_chunk(TokenChunk(SPEC.sequence_id, 1, (5,), stats=first))
        bench.worker.on_chunk(TokenChunk(SPEC.sequence_id, 2, (6,), finish_reason=FinishReason.LENGTH, stats=last))

    spans = {span.name: span for span in bench.spans.spans}
    assert set(spans) == {"grant", "decode", "decode.queue", "decode.first_step", "decode.later_steps"}
    assert spans["grant"].parent == transfer
    assert spans["decode"].parent == attempt
    seconds = {name: span.ended_at - span.began_at for name, span in spans.items() if "." in name}
    assert seconds == {"decode.queue": 0.5, "decode.first_step": 1.0, "decode.later_steps": 3.0}
    assert not any(span.error for span in spans.values())
    (line,) = caplog.records
    assert (line.sequence_id, line.finish_reason) == (SPEC.sequence_id, "length")  # type: ignore[attr-defined]


async def test_a_grant_that_is_refused_and_a_sequence_that_is_aborted_say_why_in_their_spans() -> None:
    bench, attempt, transfer = Bench(), TraceContext.new(), TraceContext.new()
    with pytest.raises(GrantRefused):
        await bench.worker.grant(SESSION, 1.0, trace=transfer)
    bench.worker.decode(replace(SPEC, trace=attempt), GATEWAY, SESSION)
    bench.worker.abort(SPEC.sequence_id, "the client went away")

    refused, aborted = bench.spans.spans
    assert (refused.name, "not announced" in refused.error) == ("grant", True)
    assert (aborted.name, aborted.parent, aborted.error) == ("decode", attempt, "the client went away")
