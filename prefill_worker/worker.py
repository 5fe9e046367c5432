"""A prefill worker: an engine that computes prompts and a sender that ships their K/V while it does.

The life of one hand-over, and who moves it on:

    1  prefill()            event loop      the sequence is queued; nothing is held at the decode worker. If pages of
                                            its prefix are to be pulled from another worker, or its grammar is to be
                                            compiled, it is queued after that
    2  sequence_started()   engine thread   its first step is planned: the session opens, a grant is asked for, and
                                            pages found in this worker's prefix cache are offered at once
    3  step_planned()       engine thread   which pages will be complete after this step
       layer_stored()       engine thread   those pages of one layer may travel, while the next layer computes
    4  on_chunk()           engine thread   the one token: to the gateway, and into the session's commit
    5  closed()             transport       acknowledged, or broken: the pages go back to the engine, the gateway
                                            hears what the transfer cost or that it failed

The engine holds a sequence's pages until step 5 (``hold_kv``), so no page is reused while it may still be read.
A hand-over is forgotten exactly once, in step 5, or in step 4 if there is nothing to ship.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from core.clock import Clock
from core.errors import GrantRefused, InvalidRequest, PeerLost, TransferError
from core.request import (
    GatewayId,
    PullReport,
    PullTask,
    Role,
    SequenceFailure,
    SequenceId,
    SequenceSpec,
    SessionId,
    StageStats,
    TokenChunk,
    WorkerId,
)
from core.request_log import REQUESTS, about
from core.tracing import TRACING_OFF, AttributeValue, Span, SpanKind, TraceContext, Tracer, record_steps
from engine.engine import Engine
from engine.engine_thread import EngineThread
from engine.grammar import CompiledGrammar
from engine.step_plan import StepPlan
from kv_transfer.sender import SendingEnd, StoredPages
from kv_transfer.session import Grant, SendReport
from kv_transfer.transport import SendOrder

logger = logging.getLogger(__name__)

Check = Callable[[SequenceSpec], None]  # Engine.check
CompileGrammar = Callable[[SequenceSpec], Future[CompiledGrammar] | None]  # Engine.compile_grammar
Publish = Callable[[GatewayId, TokenChunk | SequenceFailure], None]
MakeCommit = Callable[[SequenceId, Sequence[int]], bytes]


@dataclass(frozen=True, slots=True)
class GrantQuery:
    """What a prefill worker asks a decode worker for; ``address`` is that worker's gRPC server."""

    session_id: SessionId
    address: str
    trace: TraceContext | None = None  # the hand-over's span; None: it is not traced


AskGrant = Callable[[GrantQuery], Awaitable[Grant]]
Pull = Callable[[SequenceSpec, PullTask, SendOrder], Awaitable[PullReport]]  # PagePuller.fetch
RunOnLoop = Callable[[Awaitable[None]], None]


@dataclass(slots=True)
class _Handover:
    """One sequence between ``prefill`` and the end of its session.

    The engine's thread writes the fields; ``fault`` and ``reason`` are written by whoever breaks the session, before
    it does. Which hand-overs there are is under the worker's lock.
    """

    spec: SequenceSpec
    gateway_id: GatewayId
    query: GrantQuery | None  # None: the one token is all that is wanted
    order: SendOrder
    arrived_at: float
    trace: TraceContext | None  # its span here, of which the hand-over's is a child; None: it is not traced
    preparing: asyncio.Task[None] | None = None  # the event loop's alone
    pull: PullReport | None = None  # written before it is queued
    grammar: CompiledGrammar | None = None  # likewise; held, so that no step has to compile it
    num_pages_stored: int = 0  # pages whose K/V was offered to the sender
    opened: bool = False
    opened_at: float = 0.0
    token: TokenChunk | None = None
    stats: StageStats | None = None
    fault: Role = Role.PREFILL  # whose fault a failure is: the router avoids that worker
    reason: str = ""


def _no_grammar(spec: SequenceSpec) -> None:
    """For engines to which no sequence comes with one."""
    assert spec.sampling.grammar is None, "this engine compiles no grammars"


class PrefillWorker:
    """The prefill half of a worker process; implements the engine's ``StepListener``.

    ``publish`` gives a gateway its chunks and is called from the engine's and the transport's threads;
    ``ask_grant`` and ``run_on_loop`` are how a coroutine is started from the engine's thread.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        engine: EngineThread,
        *,
        page_size: int,
        num_layers: int,
        check: Check,
        publish: Publish,
        ask_grant: AskGrant,
        make_commit: MakeCommit,
        run_on_loop: RunOnLoop,
        clock: Clock,
        pull: Pull | None = None,
        compile_grammar: CompileGrammar = _no_grammar,
        tracer: Tracer = TRACING_OFF.tracer,
    ) -> None:
        """``clock``: the engine's. ``pull`` None: no sequence will come with pages to pull."""
        self._compile_grammar = compile_grammar
        self._worker_id = worker_id
        self._engine = engine
        self._page_size = page_size
        self._num_layers = num_layers
        self._check = check
        self._publish = publish
        self._ask_grant = ask_grant
        self._clock = clock
        self._tracer = tracer
        self._pull = pull
        self._make_commit = make_commit
        self._run_on_loop = run_on_loop
        self._lock = threading.Lock()
        self._handovers: dict[SequenceId, _Handover] = {}
        self._by_session: dict[SessionId, SequenceId] = {}
        self._sender: SendingEnd | None = None

    def attach(self, sender: SendingEnd) -> None:
        """Give the sender, whose ``on_closed`` is this worker's ``closed``."""
        self._sender = sender

    @property
    def num_sessions(self) -> int:
        """Hand-overs queued or under way."""
        return len(self._handovers)

    # ---- event loop ----

    def prefill(
        self,
        spec: SequenceSpec,
        gateway_id: GatewayId,
        query: GrantQuery | None,
        order: SendOrder = SendOrder(),
        pull: PullTask | None = None,
    ) -> None:
        """Queue ``spec`` (``hold_kv``), its K/V to be sent in ``order``; first fetch what ``pull`` says.

        Raises ``InvalidRequest`` if the engine can never run it; waits for no step.
        """
        self._check(spec)
        assert spec.hold_kv, "a prefill worker keeps the pages until they have arrived"
        trace = None if spec.trace is None else spec.trace.child()
        if trace is not None and query is not None:
            query = replace(query, trace=trace.child())
        handover = _Handover(spec, gateway_id, query, order, self._clock.now(), trace)
        with self._lock:
            if spec.sequence_id in self._handovers:
                raise ValueError(f"sequence {spec.sequence_id} is already here")
            self._handovers[spec.sequence_id] = handover
            if query is not None:
                self._by_session[query.session_id] = spec.sequence_id
        compiling = self._compile_grammar(spec)
        if pull is None and compiling is None:
            self._queue(handover)
        else:
            preparing = self._prepare_and_queue(handover, pull, compiling)
            handover.preparing = asyncio.get_running_loop().create_task(preparing)

    def abort(self, sequence_id: SequenceId, reason: str) -> None:
        """End a sequence in any state, quietly; its pages come back once its session can read no more of them."""
        with self._lock:
            handover = self._handovers.get(sequence_id)
        if handover is None:
            return
        if handover.preparing is not None:
            handover.preparing.cancel()  # it will not be queued
        self._engine.submit(lambda engine: self._abort_on_engine(engine, handover, reason))

    def abort_gateway(self, gateway_id: GatewayId) -> None:
        """End every sequence of a gateway that is gone."""
        with self._lock:
            gone = [h.spec.sequence_id for h in self._handovers.values() if h.gateway_id == gateway_id]
        for sequence_id in gone:
            self.abort(sequence_id, f"gateway {gateway_id} is gone")

    # ---- engine thread: StepListener ----

    def sequence_started(self, spec: SequenceSpec, num_cached_tokens: int, page_ids: Sequence[int]) -> None:
        handover = self._handovers.get(spec.sequence_id)
        if handover is None or handover.query is None or handover.opened:
            return
        handover.opened, handover.opened_at = True, self._clock.now()
        query = handover.query
        num_tokens = len(spec.token_ids)
        self._transport.open(query.session_id, _pages(num_tokens, self._page_size), handover.order, num_tokens)
        self._run_on_loop(self._obtain_grant(handover, query))
        num_cached = num_cached_tokens // self._page_size
        if num_cached:
            handover.num_pages_stored = num_cached
            for layer in range(self._num_layers):
                self._transport.pages_stored(query.session_id, layer, 0, page_ids[:num_cached])

    def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
        completed: list[StoredPages] = []
        for item in plan.items:
            handover = self._handovers.get(item.sequence_id)
            if handover is None or handover.query is None or handover.token is not None:
                continue
            num_stored = item.start + len(item.token_ids)
            end = _pages(num_stored, self._page_size) if item.samples else num_stored // self._page_size
            first, handover.num_pages_stored = handover.num_pages_stored, end
            if end > first:
                pages = tuple(item.page_ids[first:end])
                completed.append(StoredPages(handover.query.session_id, first, pages))
        return self._transport.step_stores(completed)

    def on_chunk(self, chunk: TokenChunk) -> bool:
        """The engine made a token of one of ours; False: the sequence is not ours."""
        handover = self._handovers.get(chunk.sequence_id)
        if handover is None:
            return False
        if chunk.stats is not None:
            handover.stats = chunk.stats._replace(worker_id=self._worker_id, role=Role.PREFILL, pull=handover.pull)
        handover.token = chunk
        self._publish(handover.gateway_id, chunk._replace(stats=handover.stats))
        self._trace_prefill(handover)
        if handover.query is None:
            self._engine.submit(lambda engine: engine.release(chunk.sequence_id))
            self._forget(handover)
        elif chunk.finish_reason is not None:
            self._transport.abort(handover.query.session_id, "the first token was the last")
        else:
            payload = self._make_commit(chunk.sequence_id, chunk.token_ids)
            self._transport.commit(handover.query.session_id, payload)
        return True

    def on_failure(self, failure: SequenceFailure) -> bool:
        """The engine gave one of ours up (its pages are free already); False: the sequence is not ours."""
        handover = self._handovers.get(failure.sequence_id)
        if handover is None:
            return False
        if handover.opened and handover.query is not None:
            handover.reason = failure.message
            self._transport.abort(handover.query.session_id, failure.message)
        else:
            self._forget(handover, failure.message)
            self._publish(handover.gateway_id, replace(failure, stage=Role.PREFILL))
        return True

    # ---- transport threads ----

    def closed(self, session_id: SessionId, report: SendReport) -> None:
        """The session is over and reads no page any more: ``KvSender``'s ``on_closed``."""
        with self._lock:
            sequence_id = self._by_session.get(session_id)
            handover = self._handovers.get(sequence_id) if sequence_id is not None else None
        if handover is not None:
            self._trace_handover(handover, report)
            self._engine.submit(lambda engine: self._close_on_engine(engine, handover, report))

    # ---- inside ----

    @property
    def _transport(self) -> SendingEnd:
        assert self._sender is not None, "attach() comes before the first sequence"
        return self._sender

    async def _prepare_and_queue(
        self, handover: _Handover, pull: PullTask | None, compiling: Future[CompiledGrammar] | None
    ) -> None:
        if pull is not None:
            assert self._pull is not None, "this worker pulls nothing"
            handover.pull = await self._pull(handover.spec, pull, handover.order)
        if compiling is not None:
            try:
                handover.grammar = await asyncio.shield(asyncio.wrap_future(compiling))
            except InvalidRequest as error:
                handover.preparing = None
                self.on_failure(SequenceFailure(handover.spec.sequence_id, str(error), False, Role.PREFILL))
                return
        handover.preparing = None
        self._queue(handover)

    def _queue(self, handover: _Handover) -> None:
        spec, arrived_at = handover.spec, self._clock.now()
        queued = self._engine.submit(lambda engine: engine.add(spec, arrived_at))
        queued.add_done_callback(lambda done: self._fail_if_refused(spec, done))

    async def _obtain_grant(self, handover: _Handover, query: GrantQuery) -> None:
        try:
            self._transport.granted(query.session_id, await self._ask_grant(query))
        except TransferError as error:
            handover.fault = Role.DECODE
            handover.reason = f"no grant from {query.address}: {error}"
            self._transport.abort(query.session_id, str(error))

    def _abort_on_engine(self, engine: Engine, handover: _Handover, reason: str) -> None:
        """On the engine's thread, so that it cannot race with the session's opening."""
        if handover.opened and handover.query is not None:
            self._transport.abort(handover.query.session_id, reason)
        else:
            self._forget(handover, reason)
            engine.abort(handover.spec.sequence_id)

    def _close_on_engine(self, engine: Engine, handover: _Handover, report: SendReport) -> None:
        """Step 5, on the engine's thread: give the pages back, then tell the gateway."""
        sequence_id = handover.spec.sequence_id
        if handover.token is None:
            engine.abort(sequence_id)
        else:
            engine.release(sequence_id)
        self._forget(handover, "" if handover.token is not None else handover.reason or str(report.error))
        if handover.token is not None and handover.token.finish_reason is not None:
            return
        if report.error is None:
            stats = handover.stats or StageStats(self._worker_id, Role.PREFILL, pull=handover.pull)
            stats = stats._replace(
                transfer_s=report.transfer_s,
                exposed_transfer_s=report.exposed_s,
                transfer_wait_s=report.wait_s,
                bytes_shipped=report.bytes_sent,
            )
            position = len(handover.spec.output_token_ids) + 1
            self._publish(handover.gateway_id, TokenChunk(sequence_id, position, stats=stats))
            self._log_handover(sequence_id, stats, report)
            return
        fault = Role.DECODE if isinstance(report.error, PeerLost | GrantRefused) else handover.fault
        message = handover.reason or f"KV hand-over failed: {report.error}"
        logger.warning("sequence %s: %s", sequence_id, message, extra=about(sequence_id))
        failure = SequenceFailure(sequence_id, message, retryable=True, stage=fault)
        self._publish(handover.gateway_id, failure)

    def _fail_if_refused(self, spec: SequenceSpec, done: Future[None]) -> None:
        """The engine took the sequence, or the gateway hears why not."""
        error = done.exception()
        if error is not None:
            logger.error("sequence %s was not taken: %s", spec.sequence_id, error, extra=about(spec.sequence_id))
            self.on_failure(SequenceFailure(spec.sequence_id, str(error), retryable=True, stage=Role.PREFILL))

    def _forget(self, handover: _Handover, error: str = "") -> None:
        """``error``: why it made no token; empty: it did."""
        with self._lock:
            self._handovers.pop(handover.spec.sequence_id, None)
            if handover.query is not None:
                self._by_session.pop(handover.query.session_id, None)
        if error and handover.token is None:
            self._trace_prefill(handover, error)

    # ---- what is told of it ----

    def _trace_prefill(self, handover: _Handover, error: str = "") -> None:
        trace, arrived_at = handover.trace, handover.arrived_at
        if trace is None:
            return
        stats, pull = handover.stats, handover.pull
        if stats is not None:
            pull_s = 0.0 if pull is None else pull.seconds
            steps = {"prefill.pull": pull_s, "prefill.queue": stats.queue_s, "prefill.compute": stats.compute_s}
            record_steps(self._tracer, trace, arrived_at, steps)
        attributes: dict[str, AttributeValue] = {
            "prfaas.sequence_id": handover.spec.sequence_id,
            "prfaas.prompt_tokens": len(handover.spec.token_ids),
            "prfaas.cached_tokens": 0 if stats is None else stats.cached_tokens,
        }
        if pull is not None:
            attributes["prfaas.pull_outcome"] = pull.outcome.value
        now, parent = self._clock.now(), handover.spec.trace
        self._tracer.record(Span("prefill", trace, parent, arrived_at, now, SpanKind.SERVER, attributes, error))

    def _trace_handover(self, handover: _Handover, report: SendReport) -> None:
        if handover.query is None or handover.query.trace is None or not handover.opened:
            return
        attributes: dict[str, AttributeValue] = {
            "prfaas.sequence_id": handover.spec.sequence_id,
            "prfaas.decode_worker": report.receiver.worker_id,
            "prfaas.bytes_shipped": report.bytes_sent,
            "prfaas.exposed_s": report.exposed_s,
            "prfaas.wait_s": report.wait_s,
        }
        ended = handover.token is not None and handover.token.finish_reason is not None  # then nothing was to be sent
        error = "" if report.error is None or ended else str(report.error)
        span = Span(
            "transfer",
            handover.query.trace,
            handover.trace,
            handover.opened_at,
            self._clock.now(),
            SpanKind.CLIENT,
            attributes,
            error,
        )
        self._tracer.record(span)

    def _log_handover(self, sequence_id: SequenceId, stats: StageStats, report: SendReport) -> None:
        if not REQUESTS.isEnabledFor(logging.INFO):
            return
        REQUESTS.info(
            "sequence %s: prefilled here, its K/V is at %s",
            sequence_id,
            report.receiver.worker_id,
            extra=about(sequence_id)
            | {
                "queue_s": stats.queue_s,
                "prefill_s": stats.compute_s,
                "transfer_s": stats.transfer_s,
                "exposed_transfer_s": stats.exposed_transfer_s,
                "bytes_shipped": stats.bytes_shipped,
                "cached_tokens": stats.cached_tokens,
                "decode_worker": report.receiver.worker_id,
            },
        )


def _pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)
