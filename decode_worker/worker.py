"""A decode worker: a receiver that takes K/V in, and an engine that goes on from there.

The life of one sequence, and who moves it on:

    1  decode()        event loop    announced by the gateway: the tokens are known, no page is held
    2  grant()         event loop    the prefill worker started it: pages for what the prefix cache lacks are
                                     reserved, or waited for in order of asking, and granted under a session
    3  committed()     transport     every granted page arrived: the engine admits the sequence, which now decodes
       released()      transport     the session broke, and no write can land any more: the pages go back
    4  on_chunk()      engine thread its tokens go to the gateway

Between 2 and 3 the pages belong to the session (KvReceiver) and are in nobody's batch. A sequence announced without
a session is prefilled here; if pages of its prefix are to be pulled from another worker, it is queued after that. A
grammar is compiled between 1 and 2, or before the sequence is queued.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from core.clock import Clock
from core.errors import GrantRefused, InvalidRequest, TransferError
from core.kv_layout import KvEnd, KvLayout
from core.request import (
    FinishReason,
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
from engine.engine_thread import EngineThread
from engine.grammar import CompiledGrammar
from engine.scheduler import Reservation
from kv_transfer.receiver import ReceivingEnd
from kv_transfer.session import Grant
from kv_transfer.transport import SendOrder

logger = logging.getLogger(__name__)

Check = Callable[[SequenceSpec], None]  # Engine.check
CompileGrammar = Callable[[SequenceSpec], Future[CompiledGrammar] | None]  # Engine.compile_grammar
Reserve = Callable[[SequenceSpec], Reservation | None]  # Engine.reserve
Pull = Callable[[SequenceSpec, PullTask, SendOrder], Awaitable[PullReport]]  # PagePuller.fetch
Publish = Callable[[GatewayId, TokenChunk | SequenceFailure], None]
ReadCommit = Callable[[bytes], tuple[SequenceId, tuple[int, ...]]]

PAGE_WAIT_S = 0.5  # a waiting grant looks again after so long even if nobody rang


@dataclass(slots=True)
class _Arrival:
    """One announced sequence until it ends. What is known later than its announcement is written under the lock."""

    spec: SequenceSpec
    gateway_id: GatewayId
    session_id: SessionId | None
    arrived_at: float
    committed_at: float | None = None  # its K/V was here
    first_stats: StageStats | None = None  # with its first token from here
    reservation: Reservation | None = None
    compiling: Future[CompiledGrammar] | None = None  # what its output has to obey
    preparing: asyncio.Task[None] | None = None  # the event loop's alone
    pull: PullReport | None = None  # written before it is queued
    grammar: CompiledGrammar | None = None  # likewise, or before its grant; held, so that no step has to compile it
    admitted: bool = False
    aborted: bool = False


@dataclass(frozen=True, slots=True)
class Announced:
    """Sequences between their announcement and their admission. ``num_tokens``: of those that hold no pages yet."""

    num_sequences: int = 0
    num_tokens: int = 0


def _no_grammar(spec: SequenceSpec) -> None:
    """For engines to which no sequence comes with one."""
    assert spec.sampling.grammar is None, "this engine compiles no grammars"


class DecodeWorker:
    """The decode half of a worker process.

    ``publish`` gives a gateway its chunks and is called from the engine's and the transport's threads.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        engine: EngineThread,
        *,
        page_size: int,
        check: Check,
        reserve: Reserve,
        publish: Publish,
        read_commit: ReadCommit,
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
        self._check = check
        self._reserve_pages = reserve
        self._clock = clock
        self._tracer = tracer
        self._pull = pull
        self._publish = publish
        self._read_commit = read_commit
        self._lock = threading.Lock()
        self._arrivals: dict[SequenceId, _Arrival] = {}
        self._by_session: dict[SessionId, SequenceId] = {}
        self._receiver: ReceivingEnd | None = None
        self._grant_turn = asyncio.Lock()  # waiting grants are served in order of asking, so a large one never starves
        self._pages_freed = asyncio.Event()

    def attach(self, receiver: ReceivingEnd) -> None:
        """Give the receiver, whose callbacks are this worker's ``committed`` and ``released``."""
        self._receiver = receiver

    @property
    def num_sequences(self) -> int:
        """Sequences announced, arriving or decoding."""
        return len(self._arrivals)

    @property
    def num_sessions(self) -> int:
        """Hand-overs announced or under way."""
        return len(self._by_session)

    def announced(self) -> Announced:
        """The sequences whose K/V is to come: the engine knows nothing of them yet."""
        with self._lock:
            coming = [a for a in self._arrivals.values() if a.session_id is not None and not a.admitted]
        return Announced(
            len(coming),
            sum(len(a.spec.prompt_token_ids) + len(a.spec.output_token_ids) for a in coming if a.reservation is None),
        )

    # ---- event loop ----

    def decode(
        self,
        spec: SequenceSpec,
        gateway_id: GatewayId,
        session_id: SessionId | None,
        order: SendOrder = SendOrder(),
        pull: PullTask | None = None,
    ) -> None:
        """Announce ``spec``. Without a session it is prefilled here, after fetching what ``pull`` says in ``order``.

        Raises ``InvalidRequest`` if the engine can never run it; waits for no step.
        """
        self._check(spec)
        assert session_id is None or pull is None, "who prefills pulls"
        arrival = _Arrival(spec, gateway_id, session_id, self._clock.now(), admitted=session_id is None)
        with self._lock:
            if spec.sequence_id in self._arrivals:
                raise ValueError(f"sequence {spec.sequence_id} is already here")
            self._arrivals[spec.sequence_id] = arrival
            if session_id is not None:
                self._by_session[session_id] = spec.sequence_id
        arrival.compiling = self._compile_grammar(spec)
        if session_id is not None:
            return
        if pull is None and arrival.compiling is None:
            self._queue(arrival)
        else:
            preparing = self._prepare_and_queue(arrival, pull, order)
            arrival.preparing = asyncio.get_running_loop().create_task(preparing)

    async def grant(
        self,
        session_id: SessionId,
        wait_s: float,
        sender: KvLayout | None = None,
        sender_descriptor: bytes = b"",
        trace: TraceContext | None = None,
        sender_ranks: Sequence[KvEnd] = (),
    ) -> Grant:
        """Reserve pages for an announced session, for K/V that comes from a pool of layout ``sender``, or from those of
        ``sender_ranks``. ``trace``: the hand-over's span at the sender.

        Raises ``GrantRefused`` if the session is unknown or pages stay short, and what ``KvReceiver.issue`` raises.
        """
        asked_at, error = self._clock.now(), ""
        try:
            return await self._grant(session_id, wait_s, sender, sender_descriptor, sender_ranks)
        except TransferError as refused:
            error = str(refused)
            raise
        finally:
            if trace is not None:
                now, attributes = self._clock.now(), {"prfaas.session_id": session_id}
                self._tracer.record(
                    Span("grant", trace.child(), trace, asked_at, now, SpanKind.SERVER, attributes, error)
                )

    async def _grant(
        self,
        session_id: SessionId,
        wait_s: float,
        sender: KvLayout | None,
        sender_descriptor: bytes,
        sender_ranks: Sequence[KvEnd],
    ) -> Grant:
        arrival = self._find(session_id)
        if arrival is None or arrival.reservation is not None:
            raise GrantRefused(f"session {session_id} was not announced here, or has its grant")
        try:
            async with asyncio.timeout(wait_s):
                await self._compiled(arrival)
        except TimeoutError:
            raise GrantRefused(f"its grammar was not compiled within {wait_s:g} s") from None
        except InvalidRequest as error:
            raise GrantRefused(str(error)) from error
        try:
            async with asyncio.timeout(wait_s), self._grant_turn:
                reservation = await self._reserve(arrival)
        except TimeoutError:
            pages = -(-len(arrival.spec.token_ids) // self._page_size)
            raise GrantRefused(f"no {pages} pages came free within {wait_s:g} s") from None
        with self._lock:
            gone = arrival.aborted
            if not gone:
                arrival.reservation = reservation
        if gone:
            self._engine.submit(lambda engine: engine.cancel(reservation))
            raise GrantRefused(f"session {session_id} was aborted")
        if self._transport.waits:
            return await asyncio.to_thread(
                self._issue, arrival, session_id, reservation, sender, sender_descriptor, sender_ranks
            )
        return self._issue(arrival, session_id, reservation, sender, sender_descriptor, sender_ranks)

    def pages_may_be_free(self) -> None:
        """Called on the event loop whenever the engine may have given pages back."""
        self._pages_freed.set()

    def abort(self, sequence_id: SequenceId, reason: str) -> None:
        """End a sequence in any state, quietly; granted pages come back when no write can land any more."""
        with self._lock:
            arrival = self._arrivals.get(sequence_id)
            if arrival is None:
                return
            arrival.aborted = True
            arriving = arrival.reservation is not None and not arrival.admitted
        if arriving and arrival.session_id is not None:
            self._transport.abort(arrival.session_id, reason)
            return
        if arrival.preparing is not None:
            arrival.preparing.cancel()  # it will not be queued
        self._forget(arrival)
        self._trace_decode(arrival, None, reason)
        self._engine.submit(lambda engine: engine.abort(sequence_id))

    def abort_gateway(self, gateway_id: GatewayId) -> None:
        """End every sequence of a gateway that is gone."""
        with self._lock:
            gone = [a.spec.sequence_id for a in self._arrivals.values() if a.gateway_id == gateway_id]
        for sequence_id in gone:
            self.abort(sequence_id, f"gateway {gateway_id} is gone")

    # ---- transport threads ----

    def committed(self, session_id: SessionId, payload: bytes) -> None:
        """Every granted page arrived: ``KvReceiver``'s ``on_committed``. From here on the engine owns the pages."""
        sequence_id, token_ids = self._read_commit(payload)
        arrival = self._find(session_id)
        assert arrival is not None, "a session is forgotten only after its pages were given back"
        assert arrival.reservation is not None, "pages arrived for a session that was granted none"
        assert arrival.spec.sequence_id == sequence_id, f"{session_id} committed {sequence_id}"
        reservation, arrived_at = arrival.reservation, self._clock.now()
        with self._lock:
            arrival.admitted, arrival.committed_at = True, arrived_at
            self._by_session.pop(session_id, None)
            aborted = arrival.aborted
        queued = self._engine.submit(lambda engine: engine.admit(reservation, token_ids, arrived_at))
        queued.add_done_callback(lambda done: self._fail_if_refused(arrival, done))
        if aborted:
            self.abort(sequence_id, "aborted while its K/V arrived")

    def released(self, session_id: SessionId, error: TransferError) -> None:
        """The session broke and no write can land any more: ``KvReceiver``'s ``on_released``."""
        arrival = self._find(session_id)
        if arrival is None or arrival.reservation is None:
            return
        reservation = arrival.reservation
        self._forget(arrival)
        self._trace_decode(arrival, None, str(error))
        self._engine.submit(lambda engine: engine.cancel(reservation))
        if not arrival.aborted:
            failure = SequenceFailure(
                arrival.spec.sequence_id, f"KV did not arrive: {error}", retryable=True, stage=Role.PREFILL
            )
            logger.warning("sequence %s: %s", failure.sequence_id, failure.message, extra=about(failure.sequence_id))
            self._publish(arrival.gateway_id, failure)

    # ---- engine thread ----

    def on_chunk(self, chunk: TokenChunk) -> bool:
        """The engine made tokens of one of ours; False: the sequence is not ours."""
        arrival = self._arrivals.get(chunk.sequence_id)
        if arrival is None:
            return False
        if chunk.stats is not None:
            stats = chunk.stats._replace(
                worker_id=self._worker_id,
                role=Role.DECODE,
                received_tokens=self._num_received(arrival),
                pull=arrival.pull,
            )
            chunk = chunk._replace(stats=stats)
            arrival.first_stats = arrival.first_stats or stats
        if chunk.finish_reason is not None:
            self._forget(arrival)
        self._publish(arrival.gateway_id, chunk)
        if chunk.finish_reason is not None and chunk.stats is not None:
            self._tell_end(arrival, chunk.stats, chunk.finish_reason)
        return True

    def on_failure(self, failure: SequenceFailure) -> bool:
        """The engine gave one of ours up; False: the sequence is not ours."""
        arrival = self._arrivals.get(failure.sequence_id)
        if arrival is None:
            return False
        self._forget(arrival)
        self._trace_decode(arrival, None, failure.message)
        self._publish(arrival.gateway_id, replace(failure, stage=Role.DECODE))
        return True

    # ---- inside ----

    @property
    def _transport(self) -> ReceivingEnd:
        assert self._receiver is not None, "attach() comes before the first sequence"
        return self._receiver

    async def _prepare_and_queue(self, arrival: _Arrival, pull: PullTask | None, order: SendOrder) -> None:
        if pull is not None:
            assert self._pull is not None, "this worker pulls nothing"
            arrival.pull = await self._pull(arrival.spec, pull, order)
        try:
            await self._compiled(arrival)
        except InvalidRequest as error:
            arrival.preparing = None
            self.on_failure(SequenceFailure(arrival.spec.sequence_id, str(error), False, Role.DECODE))
            return
        arrival.preparing = None
        self._queue(arrival)

    async def _compiled(self, arrival: _Arrival) -> None:
        """Wait for its grammar, if it has one; raises ``InvalidRequest``."""
        if arrival.compiling is not None:
            arrival.grammar = await asyncio.shield(asyncio.wrap_future(arrival.compiling))

    def _queue(self, arrival: _Arrival) -> None:
        arrived_at = self._clock.now()
        queued = self._engine.submit(lambda engine: engine.add(arrival.spec, arrived_at))
        queued.add_done_callback(lambda done: self._fail_if_refused(arrival, done))

    def _find(self, session_id: SessionId) -> _Arrival | None:
        with self._lock:
            sequence_id = self._by_session.get(session_id)
            return self._arrivals.get(sequence_id) if sequence_id is not None else None

    def _issue(
        self,
        arrival: _Arrival,
        session_id: SessionId,
        reservation: Reservation,
        sender: KvLayout | None,
        sender_descriptor: bytes,
        sender_ranks: Sequence[KvEnd],
    ) -> Grant:
        first, num_tokens = reservation.num_cached_pages, len(arrival.spec.token_ids)
        try:
            grant = self._transport.issue(
                session_id, first, reservation.page_ids[first:], num_tokens, sender, sender_descriptor, sender_ranks
            )
        except TransferError:
            with self._lock:
                arrival.reservation = None
            self._engine.submit(lambda engine: engine.cancel(reservation))
            raise
        if arrival.aborted:  # while it was issued
            self._transport.abort(session_id, "aborted by the gateway")
        return grant

    async def _reserve(self, arrival: _Arrival) -> Reservation:
        while True:
            self._pages_freed.clear()
            if arrival.aborted:
                raise GrantRefused("the gateway aborted the sequence")
            # Not on the engine's thread: a grant waits for no step. Hashing a long prompt takes a while, though.
            asked = asyncio.ensure_future(asyncio.to_thread(self._reserve_pages, arrival.spec))
            try:
                reservation = await asyncio.shield(asked)
            except asyncio.CancelledError:
                asked.add_done_callback(self._give_back)
                raise
            if reservation is not None:
                return reservation
            try:
                await asyncio.wait_for(self._pages_freed.wait(), PAGE_WAIT_S)
            except TimeoutError:
                continue

    def _give_back(self, asked: asyncio.Future[Reservation | None]) -> None:
        """The asker is gone: pages that were reserved for it after all go back."""
        if not asked.cancelled() and asked.exception() is None and (reservation := asked.result()) is not None:
            self._engine.submit(lambda engine: engine.cancel(reservation))

    def _num_received(self, arrival: _Arrival) -> int:
        """Tokens whose K/V came over the wire: all but those of pages that were cached here."""
        if arrival.reservation is None:
            return 0
        return len(arrival.spec.token_ids) - arrival.reservation.num_cached_pages * self._page_size

    def _fail_if_refused(self, arrival: _Arrival, done: Future[None]) -> None:
        """The engine took the sequence, or the gateway hears why not."""
        error = done.exception()
        if error is None:
            return
        if (reservation := arrival.reservation) is not None:
            self._engine.submit(lambda engine: engine.cancel(reservation))
        failure = SequenceFailure(arrival.spec.sequence_id, str(error), retryable=True, stage=Role.DECODE)
        logger.error("sequence %s was not taken: %s", failure.sequence_id, error, extra=about(failure.sequence_id))
        self.on_failure(failure)

    def _forget(self, arrival: _Arrival) -> None:
        with self._lock:
            self._arrivals.pop(arrival.spec.sequence_id, None)
            if arrival.session_id is not None:
                self._by_session.pop(arrival.session_id, None)

    # ---- what is told of it ----

    def _tell_end(self, arrival: _Arrival, stats: StageStats, reason: FinishReason) -> None:
        """It has finished."""
        self._trace_decode(arrival, stats, "")
        if not REQUESTS.isEnabledFor(logging.INFO):
            return
        sequence_id = arrival.spec.sequence_id
        REQUESTS.info(
            "sequence %s: decoded here, %s",
            sequence_id,
            reason,
            extra=about(sequence_id)
            | {
                "queue_s": stats.queue_s,
                "decode_s": stats.compute_s,
                "received_tokens": stats.received_tokens,
                "cached_tokens": stats.cached_tokens,
                "num_preemptions": stats.num_preemptions,
                "finish_reason": reason.value,
            },
        )

    def _trace_decode(self, arrival: _Arrival, stats: StageStats | None, error: str) -> None:
        """``stats`` None: it did not finish, ``error`` says why."""
        parent, arrived_at = arrival.spec.trace, arrival.arrived_at
        if parent is None:
            return
        trace, now = parent.child(), self._clock.now()
        record_steps(self._tracer, trace, arrived_at, _steps(arrival, stats))
        attributes: dict[str, AttributeValue] = {"prfaas.sequence_id": arrival.spec.sequence_id}
        if stats is not None:
            attributes |= {
                "prfaas.received_tokens": stats.received_tokens,
                "prfaas.cached_tokens": stats.cached_tokens,
                "prfaas.num_preemptions": stats.num_preemptions,
            }
        self._tracer.record(Span("decode", trace, parent, arrived_at, now, SpanKind.SERVER, attributes, error))


def _steps(arrival: _Arrival, stats: StageStats | None) -> dict[str, float]:
    """What was done one after the other, as far as it came: span |-> seconds."""
    first = arrival.first_stats
    steps: dict[str, float] = {}
    if arrival.session_id is None:
        steps["decode.pull"] = 0.0 if arrival.pull is None else arrival.pull.seconds
    elif arrival.committed_at is not None:
        steps["decode.await_kv"] = arrival.committed_at - arrival.arrived_at
    if first is not None:
        steps["decode.queue"] = first.queue_s
        steps["decode.prefill" if arrival.session_id is None else "decode.first_step"] = first.compute_s
        if stats is not None:
            steps["decode.later_steps"] = stats.compute_s - first.compute_s
    return steps
