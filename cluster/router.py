"""How does a request become tokens, whatever dies on the way?

The life of a request, and who owns what at each step:

1. ``Router.generate`` takes it (bounded in flight, no two with one id), splits it into n *continuations* and waits for
   its turn (admission.py), or raises ``Overloaded``. The router owns the request from here to the end of the generator;
   nothing else remembers it.
2. A continuation makes an *attempt*: ``policy.route(request, membership.view())`` chooses a prefill worker P and a
   decode worker D. No worker: it waits for one, up to ``no_route_wait_s``. No prefill worker that could be used:
   D prefills, or it waits, or fails, as ``without_prefill`` says.
3. The attempt is announced to D (``Decode``; D owns a name, no pages), then queued at P (``Prefill``; P owns the
   prompt's pages). If the route says so (``Route.pull``), whoever prefills first fetches cached pages from a third
   worker; that may fail, the request does not. Both answer on their Outputs streams, into the continuation's one inbox.
4. P's first token goes to the client at once. P hands the K/V over to D under a session that is theirs alone.
5. From the commit on D owns the sequence; its tokens follow P's by ``position``. They may come before P's first
   token does, and then wait for it. P reports what the hand-over cost, and is out of it.
6. The chunk with a finish reason is the last. What a worker may still hold is aborted: D's announcement if P's first
   token ended it, both halves if the client went away, the text side found a stop string, or the deadline passed.
7. A lost worker or a retryable failure ends the attempt, not the request: both halves are aborted and another attempt
   starts at step 2, elsewhere, with the tokens that the client already has as part of the context. Losing P after
   the commit is not a failure.
8. n > 1: the siblings start when the first continuation's first token has come, on the same workers while those live,
   so that both prefix caches hold the prompt.

Invariants:
- the client gets the tokens of positions 0, 1, 2, ... of each continuation, each exactly once, in order;
- an attempt's sequence id is never used again, by any gateway, so a late chunk of an old attempt meets nobody;
- every attempt that ends before its workers know of it is aborted on them, after they were told of it, never before;
- a token costs no task, and one wake-up of one coroutine.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cluster.admission import Admission, AdmissionCounters, Bound, Proposal, Ticket
from cluster.config import AdmissionConfig, RouterConfig
from cluster.membership import Membership
from cluster.output_lengths import OutputLengths
from cluster.prefix_index import PrefixMatch
from cluster.routing_policy import RouteRequest, RoutingPolicy
from cluster.view import ClusterView, Route, WorkerView
from cluster.worker_client import Assignment, SequenceEvent, WorkerClient, WorkerLost
from core.cache_tiers import joined_reloads
from core.clock import Clock
from core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NoRoute,
    PeerLost,
    PrfaasError,
    SequenceFailed,
)
from core.latency_parts import TtftParts, TtstParts, ttst_parts
from core.prefix_hash import PageHash, extend_page_hashes, tenant_of
from core.request import (
    EngineId,
    FinishReason,
    GatewayId,
    GenerateRequest,
    OutputChunk,
    RequestId,
    RequestTiming,
    Role,
    SequenceFailure,
    SequenceSpec,
    SessionId,
    StageStats,
    TokenChunk,
    WorkerId,
    joined_chunk,
    sequence_id,
)
from core.request_log import about
from core.tracing import TRACING_OFF, AttributeValue, Span, SpanKind, TraceContext, Tracing

logger = logging.getLogger(__name__)

HANDOVER_REPORT_WAIT_S = 0.1  # a finish waits so long for P's report of the hand-over, for the timing only
SAME_WORKER_BACKOFF_S = 0.1  # before the first retry on a worker that failed the sequence; doubles with each attempt
STOPPING = "the gateway is stopping and takes no new requests"
FALLBACK_LOG_S = 10.0  # a fallback is logged when it begins, and so long after the last time while it lasts
WIND_UP_S = 1.0  # after a drain: for generators to end and for workers to hear of aborts
RELEASE_POLL_S = 0.05  # while requests wait for their turn: how often the workers' loads are looked at
WAKES_A_TURN = 8  # continuations whose readers run before the event loop looks at its sockets again
RELEASE_GAP_S = 0.01  # after nobody's turn came, whatever happens meanwhile: asking costs decisions of the policy


class RequestObserver(Protocol):
    """Hears once of each request that was given a route, and once of its end. ``cluster.demand.DemandMeter`` is one."""

    def routed(self, request: RouteRequest, route: Route) -> None:
        """The first route of the request's first continuation."""
        ...

    def ended(self, output_tokens: int) -> None:
        """A request that was routed has ended, in whatever way; tokens of all its continuations."""
        ...


@dataclass(frozen=True, slots=True)
class RouterCounters:
    """What the router counted since its start.

    A retry is a repeated attempt before the continuation's first token, a resume one after it. Reasons:
    ``prefill_lost``, ``decode_lost`` (the process is gone), ``prefill_failed``, ``decode_failed`` (it gave up).
    A fallback is a route that an intact cluster would not have taken (``routing_policy.Fallback``), or that was not
    taken because ``without_prefill`` forbids it. Routes are counted by where prompts were prefilled: ``local`` (in the
    decode worker's cluster), ``offloaded`` (in another) or ``colocated`` (on the decode worker).
    """

    num_requests: int
    num_retries: int
    num_resumes: int
    retries_by_reason: Mapping[str, int]
    resumes_by_reason: Mapping[str, int]
    admission: AdmissionCounters
    fallbacks_by_reason: Mapping[str, int]
    routes_by_place: Mapping[str, int]


class Router:
    """Runs requests on the workers of one ``Membership``. Everything happens on one event loop."""

    def __init__(
        self,
        membership: Membership,
        policy: RoutingPolicy,
        config: RouterConfig,
        clock: Clock,
        gateway_id: GatewayId,
        admission: AdmissionConfig | None = None,
        observer: RequestObserver | None = None,
        tracing: Tracing = TRACING_OFF,
    ) -> None:
        """``admission`` None: its defaults."""
        self._observer = observer
        self._tracer = tracing.tracer
        self._membership = membership
        self._policy = policy
        self._config = config
        self._clock = clock
        self._gateway_id = gateway_id
        self._admission = Admission(admission or AdmissionConfig(), clock)
        self._releasing: asyncio.Task[None] | None = None  # while requests wait for their turn
        self._flights: dict[RequestId, _Flight] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._num_requests = 0
        self._num_routes = 0
        self._retries: Counter[str] = Counter()
        self._resumes: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._fallbacks_logged_at: dict[str, float] = {}
        self._routes: Counter[str] = Counter()
        self._output_lengths = OutputLengths()
        self._tasks: set[asyncio.Task[None]] = set()
        self._wakes = _Wakes()

    # ---- what the front doors call ----

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputChunk, None]:
        """Stream every continuation; each ends with one chunk that has ``finish_reason`` and ``timing``.

        Closing the generator aborts the request on its workers. Raises ``InvalidRequest`` (``request_id`` is in
        flight already, or a worker cannot ever run it), ``Overloaded``, ``NoRoute``, ``DeadlineExceeded``,
        ``Cancelled`` or ``SequenceFailed``.
        """
        flight = self._admit(request)
        try:
            await self._wait_for_turn(flight)
            flight.began_at = self._clock.now()
            async with aclosing(self._stream(flight)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self._dismiss(flight)

    async def stop(self, request_id: RequestId, index: int) -> None:
        """End one continuation as finished by a stop string; ``generate`` yields one more chunk of it, its last.

        Ignored: unknown requests, continuations that ended, and those that have no token yet, hence no stop string.
        """
        flight = self._flights.get(request_id)
        if flight is None or not 0 <= index < len(flight.continuations):
            return
        continuation = flight.continuations[index]
        if continuation.num_tokens:
            continuation.inbox.stop()

    def abort(self, request_id: RequestId) -> bool:
        """End a request: its ``generate`` raises ``Cancelled``. False if it is not in flight."""
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        flight.interrupt(Cancelled(f"request {request_id} was aborted"))
        return True

    @property
    def num_inflight(self) -> int:
        """Requests taken and not ended, those that wait for their turn included."""
        return len(self._flights)

    @property
    def num_queued(self) -> int:
        """Requests that wait for their turn."""
        return self._admission.num_waiting

    @property
    def num_open_tokens(self) -> int:
        """Tokens that the requests in flight have so far."""
        return sum(flight.num_tokens for flight in self._flights.values())

    @property
    def num_missed(self) -> Mapping[Role, int]:
        """Requests so far that were predicted to miss an objective, refused for it or not: their first token waits for
        who prefills, their later ones for who decodes."""
        counters = self._admission.counters
        by_bound = {Role.PREFILL: Bound.SLO_TTFT, Role.DECODE: Bound.SLO_TPOT}
        counts = (counters.refusals_by_reason, counters.misses_served_by_reason)
        return {role: sum(each.get(bound, 0) for each in counts) for role, bound in by_bound.items()}

    @property
    def num_answering(self) -> int:
        """Requests in flight that have a token."""
        return sum(flight.num_tokens > 0 for flight in self._flights.values())

    @property
    def counters(self) -> RouterCounters:
        """A snapshot."""
        return RouterCounters(
            num_requests=self._num_requests,
            num_retries=self._retries.total(),
            num_resumes=self._resumes.total(),
            retries_by_reason=dict(self._retries),
            resumes_by_reason=dict(self._resumes),
            admission=self._admission.counters,
            fallbacks_by_reason=dict(self._fallbacks),
            routes_by_place=dict(self._routes),
        )

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and those that wait for their turn, let the others end for up to ``timeout_s``, then
        cancel the rest.

        True if none had to be cancelled. When it returns, the workers were told of every abort that they could hear.
        """
        self._draining = True
        self._admission.close(lambda: NoRoute(STOPPING))
        finished = await self._wait_idle(timeout_s)
        if not finished:
            logger.warning("%d requests are cancelled: not finished %g s after the drain", self.num_inflight, timeout_s)
            for flight in self._flights.values():
                flight.interrupt(Cancelled("the gateway stops"))
            await self._wait_idle(WIND_UP_S)
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=WIND_UP_S)
            for task in pending:
                task.cancel()
        return finished

    # ---- one request ----

    def _admit(self, request: GenerateRequest) -> _Flight:
        if self._draining:
            raise NoRoute(STOPPING)
        if request.request_id in self._flights:
            raise InvalidRequest("request_id", f"{request.request_id!r} is in flight already")
        num_inflight, most = len(self._flights), self._config.max_inflight
        if num_inflight >= most:
            message = f"{num_inflight} requests are in flight, which is the most this gateway takes"
            raise self._admission.overloaded(Bound.MAX_INFLIGHT, message, 1.0, num_inflight + 1, most)
        if request.deadline_at is not None and request.deadline_at <= self._clock.now():
            raise DeadlineExceeded("the deadline had passed before the request was started")
        # Clients may use one request id again, and at several gateways at once: what workers see must be unique.
        name = RequestId(f"{self._gateway_id}/{self._num_requests}/{request.request_id}")
        self._num_requests += 1
        num_output = self._output_lengths.expected(0, request.sampling.max_tokens)
        ticket = self._admission.join(request, num_output)
        flight = _Flight(request, name, ticket, self._clock.now(), self._wakes)
        self._flights[request.request_id] = flight
        self._idle.clear()
        if request.deadline_at is not None:
            flight.timer = asyncio.get_running_loop().call_later(
                request.deadline_at - self._clock.now(), flight.interrupt, DeadlineExceeded("the deadline passed")
            )
        return flight

    def _dismiss(self, flight: _Flight) -> None:
        if flight.timer is not None:
            flight.timer.cancel()
        self._admission.leave(flight.ticket, flight.continuations[0].num_finished_tokens)
        del self._flights[flight.request.request_id]
        if self._observer is not None and flight.route is not None:
            self._observer.ended(flight.num_tokens)
        if not self._flights:
            self._idle.set()

    async def _wait_for_turn(self, flight: _Flight) -> None:
        """Returns when it may start. Raises ``Overloaded`` if it is refused, or what interrupts it."""
        ticket = flight.ticket
        self._admission.serve(self._propose)
        if ticket.waits:
            self._admission.arrived(ticket, self._propose)
        if ticket.waits:
            if self._releasing is None or self._releasing.done():
                self._releasing = self._spawn(self._keep_releasing())
            await flight.continuations[0].inbox.guard(ticket.decided())
        ticket.check()

    async def _keep_releasing(self) -> None:
        """Let those that wait start as room comes, one after the other: the next is judged when the last has begun."""
        while self._admission.num_waiting:
            self._admission.moved.clear()
            if self._admission.serve(self._propose) is None:
                await asyncio.sleep(RELEASE_GAP_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(RELEASE_POLL_S):
                    await self._admission.moved.wait()

    def _propose(self, ticket: Ticket) -> Proposal | None:
        """What the policy would do with a request that waits; None: no worker can take it."""
        continuation, view = self._flights[ticket.request.request_id].continuations[0], self._membership.view()
        request = self._route_request(continuation)
        try:
            route = self._policy.route(request, view)
        except NoRoute:
            return None
        if self._refusal(route) is not None:
            return None
        return Proposal(route, request.num_tokens - continuation.cached_tokens(route), view)

    def _stream(self, flight: _Flight) -> AsyncGenerator[OutputChunk, None]:
        if len(flight.continuations) == 1:
            return self._run(flight, flight.continuations[0])
        return self._run_all(flight)

    async def _run_all(self, flight: _Flight) -> AsyncGenerator[OutputChunk, None]:
        """Merge n > 1 continuations, each in a task of its own; the siblings start after the first's first chunk."""
        merged: asyncio.Queue[OutputChunk | Exception] = asyncio.Queue()
        first, *siblings = flight.continuations
        tasks = [asyncio.create_task(self._feed(flight, first, merged))]
        num_running = len(flight.continuations)
        try:
            while num_running:
                item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                if len(tasks) == 1:
                    tasks += [asyncio.create_task(self._feed(flight, sibling, merged)) for sibling in siblings]
                num_running -= item.finish_reason is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(
        self, flight: _Flight, continuation: _Continuation, merged: asyncio.Queue[OutputChunk | Exception]
    ) -> None:
        try:
            async with aclosing(self._run(flight, continuation)) as chunks:
                async for chunk in chunks:
                    merged.put_nowait(chunk)
        except Exception as error:  # whatever it is, the one who reads must not wait for ever
            merged.put_nowait(error)

    # ---- one continuation ----

    async def _run(self, flight: _Flight, continuation: _Continuation) -> AsyncGenerator[OutputChunk, None]:
        """Attempts, one after the other, until one of them brings the last chunk."""
        continuation.began_at = self._clock.now()
        try:
            while True:
                if continuation.attempt is None:
                    await self._begin(flight, continuation)
                received = await continuation.inbox.get()
                if received is None:
                    self._end(continuation, "stopped by the gateway: stop string")
                    self._output_lengths.note(continuation.num_tokens)
                    yield continuation.last_chunk(flight, self._clock.now(), FinishReason.STOP)
                    return
                stage, event = received
                attempt = continuation.attempt
                assert attempt is not None, "only a continuation that was stopped has no attempt here"
                if not isinstance(event, TokenChunk):
                    self._survive(continuation, attempt, stage, event)
                    continue
                due = attempt.take(stage, event)
                while (later := continuation.inbox.next_chunk()) is not None:  # what has come meanwhile goes along
                    due += attempt.take(*later)
                if not due:
                    continue
                source, chunk = due[-1][0], due[0][1] if len(due) == 1 else joined_chunk([one for _, one in due])
                if not continuation.num_tokens:
                    self._admission.first_token(flight.ticket)
                if chunk.finish_reason is None:
                    yield continuation.next_chunk(self._clock.now(), chunk)
                    continue
                async with aclosing(self._finish(flight, continuation, attempt, source, chunk)) as last_chunks:
                    async for last in last_chunks:
                        yield last
                return
        finally:
            reason = "the request was ended by its client, its deadline or a failure"
            self._end(continuation, reason, error=reason)

    async def _finish(
        self, flight: _Flight, continuation: _Continuation, attempt: _Attempt, stage: Role, chunk: TokenChunk
    ) -> AsyncGenerator[OutputChunk, None]:
        """The last tokens at once; the finish as soon as P has reported the hand-over, for which it waits a little."""
        if stage is Role.PREFILL:
            attempt.finished_by_prefill = True
        elif not attempt.handed_over:
            if chunk.token_ids:
                yield continuation.next_chunk(self._clock.now(), chunk._replace(finish_reason=None))
                chunk = chunk._replace(token_ids=(), logprobs=())
            await self._hear_handover(continuation, attempt)
        attempt.finished = True
        self._end(continuation, "the first token was the last")
        self._output_lengths.note(continuation.num_tokens + len(chunk.token_ids))
        yield continuation.last_chunk(flight, self._clock.now(), chunk.finish_reason, chunk)

    async def _hear_handover(self, continuation: _Continuation, attempt: _Attempt) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(HANDOVER_REPORT_WAIT_S):
                while not attempt.handed_over:
                    received = await continuation.inbox.get()
                    if received is None or not isinstance(received[1], TokenChunk):
                        return
                    after = attempt.take(received[0], received[1])
                    assert not after, "a token came after the finish"

    # ---- one attempt ----

    async def _begin(self, flight: _Flight, continuation: _Continuation) -> None:
        """Choose workers and tell them; the answer comes to the inbox. Nothing is begun if it was stopped meanwhile."""
        route = await self._find_route(flight, continuation)
        if route is None:
            return
        decode = self._membership.client(route.decode.engine_id)
        prefill = self._membership.client(route.prefill.engine_id) if route.prefill is not None else None
        assert decode is not None, "a route is made of workers in the view"
        assert (prefill is None) == (route.prefill is None), "a route is made of workers in the view"
        spec = continuation.next_spec(flight)
        attempt = _Attempt(spec, route, prefill, decode)
        continuation.started(attempt, self._clock.now())
        if continuation.index == 0:
            flight.route = route
            self._admission.begun(flight.ticket, route)
            if self._observer is not None and continuation.num_attempts == 1 and continuation.asked is not None:
                self._observer.routed(continuation.asked, route)
        self._count(route)
        num_known = len(spec.prompt_token_ids) + len(spec.output_token_ids)
        num_output = self._output_lengths.expected(continuation.num_tokens, continuation.max_tokens)
        num_uncached = num_known - continuation.cached_tokens(route)
        self_prefills = Assignment(num_uncached if prefill is None else 0, num_known + num_output)
        decode.open_sequence(spec.sequence_id, partial(continuation.inbox.put, Role.DECODE), self_prefills)
        if prefill is not None:
            deliver = partial(continuation.inbox.put, Role.PREFILL)
            prefill.open_sequence(spec.sequence_id, deliver, Assignment(num_uncached))
        attempt.announcing = self._spawn(self._announce(continuation, attempt))
        if continuation.num_attempts > 1:
            said = "sequence %s: attempt %d: %s"
            logger.info(said, spec.sequence_id, continuation.num_attempts, route.reason, extra=about(spec.sequence_id))

    async def _find_route(self, flight: _Flight, continuation: _Continuation) -> Route | None:
        """A route, waited for if need be; None if the continuation was stopped first."""
        now = self._clock.now()
        give_up_at, patience_ends_at = now + self._config.no_route_wait_s, now + continuation.backoff_s
        while not continuation.inbox.stopped:
            view, now = self._membership.view(), self._clock.now()
            may_wait = not self._draining and now < give_up_at
            wait_until = give_up_at
            try:
                route = (
                    self._sibling_route(flight, continuation, view)
                    or self._proposed_route(flight, continuation, view)
                    or self._policy.route(self._route_request(continuation), view)
                )
            except NoRoute:
                if not may_wait:
                    raise
            else:
                refusal = self._refusal(route)
                if refusal is None and (not continuation.was_failed_by(route) or now >= patience_ends_at):
                    return route
                if refusal is None:
                    wait_until = patience_ends_at
                elif not may_wait or self._config.without_prefill == "fail":
                    self._note_fallback(route.fallback, str(refusal))
                    raise refusal
            change = self._membership.wait_until(_is_not(view), wait_until - self._clock.now())
            await continuation.inbox.guard(change)
        return None

    def _route_request(self, continuation: _Continuation) -> RouteRequest:
        matches = {}
        if self._policy.uses_prefixes:
            for page_size in self._membership.page_sizes:
                matches[page_size] = self._membership.match_prefix(continuation.page_hashes(page_size))
        num_output = self._output_lengths.expected(continuation.num_tokens, continuation.max_tokens)
        if continuation.ordinal is None:
            continuation.ordinal = self._num_routes
            self._num_routes += 1
        return continuation.route_request(matches, num_output, self._output_lengths.mean)

    def _proposed_route(self, flight: _Flight, continuation: _Continuation, view: ClusterView) -> Route | None:
        """What the policy said when the request was released, for its first attempt, while the workers are ready."""
        proposal = flight.ticket.proposal
        if proposal is None or continuation.index or continuation.num_attempts:
            return None
        if proposal.view is view:
            return proposal.route
        route, pools = proposal.route, view.pools
        workers = (route.decode,) if route.prefill is None else (route.prefill, route.decode)
        is_ready = all(worker.engine_id in pools.of(worker.role).roster.position_of for worker in workers)
        return route if is_ready else None

    def _refusal(self, route: Route) -> NoRoute | None:
        """Why the route is not to be taken: there should be a prefill worker, and ``without_prefill`` minds."""
        mode = self._config.without_prefill
        if route.prefill is not None or not route.fallback or mode == "local":
            return None
        return NoRoute(f"router.without_prefill is {mode}, and {route.reason}")

    def _count(self, route: Route) -> None:
        """A route is taken."""
        self._routes[route.place] += 1
        if route.fallback:
            self._note_fallback(route.fallback, route.reason)

    def _note_fallback(self, fallback: str, reason: str) -> None:
        self._fallbacks[fallback] += 1
        now = self._clock.now()
        if now - self._fallbacks_logged_at.get(fallback, -FALLBACK_LOG_S) >= FALLBACK_LOG_S:
            self._fallbacks_logged_at[fallback] = now
            logger.warning("fallback %s, %d so far: %s", fallback, self._fallbacks[fallback], reason)

    def _sibling_route(self, flight: _Flight, continuation: _Continuation, view: ClusterView) -> Route | None:
        """The first continuation's workers, for a sibling's first attempt, while they are ready."""
        if continuation.index == 0 or continuation.num_attempts or flight.route is None:
            return None
        ready = {w.engine_id: w for role in Role for w in view.ready(role)}
        prefill = ready.get(flight.route.prefill.engine_id) if flight.route.prefill else None
        decode = ready.get(flight.route.decode.engine_id)
        if decode is None or (prefill is None) != (flight.route.prefill is None):
            return None
        reason = f"with continuation 0, whose prompt is cached there ({flight.route.reason})"
        return Route(prefill, decode, reason, fallback=flight.route.fallback)

    async def _announce(self, continuation: _Continuation, attempt: _Attempt) -> None:
        """Tell D, then P; what goes wrong is an event like any other."""
        stage = Role.DECODE
        spec, tenant = attempt.spec, tenant_of(attempt.spec.salt)
        pull = attempt.route.pull.task if attempt.route.pull is not None else None
        try:
            if attempt.prefill is None:
                await attempt.decode.decode(spec, None, tenant, continuation.deadline_s(self._clock.now()), pull)
                return
            await attempt.decode.decode(spec, attempt.session_id)
            if attempt.ended:
                return
            stage = Role.PREFILL
            await attempt.prefill.prefill(
                spec,
                attempt.session_id,
                attempt.route.decode.address,
                tenant,
                continuation.deadline_s(self._clock.now()),
                pull,
            )
        except PrfaasError as error:
            if attempt.ended:
                return
            match error:
                case PeerLost():
                    continuation.inbox.put(stage, WorkerLost(attempt.worker(stage).worker_id, str(error)))
                case SequenceFailed():
                    continuation.inbox.put(
                        stage, SequenceFailure(spec.sequence_id, str(error), error.retryable, stage=stage)
                    )
                case _:
                    continuation.inbox.interrupt(error)

    def _survive(
        self, continuation: _Continuation, attempt: _Attempt, stage: Role, event: SequenceFailure | WorkerLost
    ) -> None:
        """A worker gave up or is gone: end the attempt, unless nothing was lost; raise if no other may be made."""
        if stage is Role.PREFILL and attempt.is_decodes_alone(continuation.num_tokens):
            attempt.leave_prefill()
            return
        if isinstance(event, WorkerLost):
            blamed, message, label = stage, f"worker {event.worker_id} lost: {event.reason}", f"{stage}_lost"
        else:
            blamed, message, label = event.stage, event.message, f"{event.stage}_failed"
        self._end(continuation, f"another attempt replaces it: {message}", error=message)
        if isinstance(event, SequenceFailure) and not event.retryable:
            raise SequenceFailed(message, retryable=False)
        if continuation.num_attempts >= self._config.max_attempts:
            raise SequenceFailed(f"{continuation.num_attempts} attempts failed, the last: {message}", retryable=True)
        continuation.excluded.add(attempt.worker(blamed).engine_id)
        kind, counter = ("resume", self._resumes) if continuation.num_tokens else ("retry", self._retries)
        counter[label] += 1
        logger.warning(
            "%s of sequence %s with %d tokens: %s (%s)",
            kind,
            attempt.spec.sequence_id,
            continuation.num_tokens,
            label,
            message,
            extra=about(attempt.spec.sequence_id),
        )

    def _end(self, continuation: _Continuation, reason: str, error: str = "") -> None:
        """The attempt is over here; whatever its workers may still hold of it is aborted. Again: nothing. ``error``:
        why it did not bring the end of its sequence; empty: it did."""
        attempt = continuation.attempt
        if attempt is None:
            return
        continuation.attempt = None
        continuation.inbox.clear()
        attempt.close()
        if attempt.spec.trace is not None:
            self._tracer.record(attempt.span(attempt.spec.trace, continuation.trace, self._clock.now(), error))
        stages = attempt.stages_to_abort()
        if stages:
            self._spawn(self._abort(attempt, stages, reason))

    async def _abort(self, attempt: _Attempt, stages: tuple[Role, ...], reason: str) -> None:
        if attempt.announcing is not None:
            await asyncio.wait({attempt.announcing})  # an abort that overtakes the announcement would do nothing
        calls = (attempt.client(stage).abort(attempt.spec.sequence_id, stage, reason) for stage in stages)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            # A worker that cannot be reached has lost our stream too, and aborts by itself.
            if isinstance(result, Exception) and not isinstance(result, PrfaasError):
                raise result

    # ---- inside ----

    async def _wait_idle(self, timeout_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _is_not(view: ClusterView) -> Callable[[ClusterView], bool]:
    """True of every other view: views are made anew at each change."""
    return lambda current: current is not view


class _Flight:
    """One request in flight."""

    def __init__(
        self, request: GenerateRequest, name: RequestId, ticket: Ticket, entered_at: float, wakes: _Wakes
    ) -> None:
        self.request = request
        self.entered_at = entered_at  # the router, on its Clock
        self.began_at = entered_at  # when its turn had come
        self.name = name  # unique over gateways and time
        self.ticket = ticket
        self.continuations = tuple(_Continuation(request, index, ticket, wakes) for index in range(request.sampling.n))
        self.route: Route | None = None  # of continuation 0's last attempt
        self.timer: asyncio.TimerHandle | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the client has, of all continuations."""
        return sum(continuation.num_tokens for continuation in self.continuations)

    def interrupt(self, error: PrfaasError) -> None:
        """Whatever its continuations wait for, they raise ``error``."""
        for continuation in self.continuations:
            continuation.inbox.interrupt(error)


class _Continuation:
    """One of n: the tokens that the client has, and the attempt under way."""

    def __init__(self, request: GenerateRequest, index: int, ticket: Ticket, wakes: _Wakes) -> None:
        self.index = index
        self.inbox = _Inbox(wakes)
        self.attempt: _Attempt | None = None
        self.ordinal: int | None = None  # ``RouteRequest.ordinal`` of the attempt to come; None: none was asked for
        self.excluded: set[EngineId] = set()
        self._request = request
        self._ticket = ticket
        self._finished = False
        self._sampling = request.sampling.for_index(index)
        self._token_ids: list[int] = []
        self._attempts: list[_Attempt] = []
        self.asked: RouteRequest | None = None  # what the policy was asked last
        self._matches: Mapping[int, PrefixMatch] = {}  # as the last route was decided by
        self._page_hashes: dict[int, list[PageHash]] = {}  # page size |-> digests so far
        self.began_at = 0.0  # it could be routed from then on
        self._first: _EarlyToken | None = None
        self._second: _EarlyToken | None = None
        self._is_early = True  # its first two tokens are still to be noted
        self._last_token_at = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that the client has."""
        return len(self._token_ids)

    @property
    def num_finished_tokens(self) -> int | None:
        """``num_tokens`` if those are all; None: it has not finished."""
        return self.num_tokens if self._finished else None

    @property
    def num_attempts(self) -> int:
        return len(self._attempts)

    @property
    def trace(self) -> TraceContext | None:
        """The request's span; None: it is not traced."""
        return self._request.trace

    @property
    def backoff_s(self) -> float:
        """How long to look for another worker before one that failed this continuation is taken again."""
        return SAME_WORKER_BACKOFF_S * 2 ** (self.num_attempts - 1) if self._attempts else 0.0

    def was_failed_by(self, route: Route) -> bool:
        """Does the route use an engine that failed this continuation?"""
        workers = (route.prefill, route.decode)
        return any(worker is not None and worker.engine_id in self.excluded for worker in workers)

    def deadline_s(self, now: float) -> float | None:
        """Seconds until the request's deadline; None if it has none."""
        deadline_at = self._request.deadline_at
        return None if deadline_at is None else max(0.0, deadline_at - now)

    def page_hashes(self, page_size: int) -> Sequence[PageHash]:
        """Digests of the full pages of every known token; those that were computed before are kept."""
        known = self._page_hashes.setdefault(page_size, [])
        tokens = self._request.prompt_token_ids + tuple(self._token_ids)  # the prompt itself while there is no output
        return extend_page_hashes(known, tokens, page_size, self._request.salt)

    @property
    def max_tokens(self) -> int | None:
        return self._sampling.max_tokens

    def cached_tokens(self, route: Route) -> int:
        """Tokens that the worker which prefills was thought to cache, or will have fetched, when it was chosen."""
        worker = route.prefill or route.decode
        match = self._matches.get(worker.model.fingerprint.page_size)
        cached = 0 if match is None else match.pages_on(worker.engine_id) * worker.model.fingerprint.page_size
        fetched = 0 if route.pull is None else route.pull.num_tokens
        return min(max(cached, fetched), len(self._request.prompt_token_ids) + self.num_tokens - 1)

    def route_request(self, matches: Mapping[int, PrefixMatch], num_output: int, mean_output: float) -> RouteRequest:
        assert self.ordinal is not None, "the router has given it one"
        self._matches = matches
        self.asked = RouteRequest(
            request_id=self._request.request_id,
            num_tokens=len(self._request.prompt_token_ids) + self.num_tokens,
            ordinal=self.ordinal,
            excluded=frozenset(self.excluded),
            matches=matches,
            num_output=num_output,
            mean_output=mean_output,
        )
        return self.asked

    def next_spec(self, flight: _Flight) -> SequenceSpec:
        return SequenceSpec(
            sequence_id=sequence_id(flight.name, self.index, self.num_attempts),
            prompt_token_ids=self._request.prompt_token_ids,
            sampling=self._sampling,
            output_token_ids=tuple(self._token_ids),
            salt=self._request.salt,
            trace=None if self.trace is None else self.trace.child(),
        )

    def started(self, attempt: _Attempt, now: float) -> None:
        attempt.began_at = now
        self._attempts.append(attempt)
        self.attempt, self.ordinal = attempt, None

    def next_chunk(self, now: float, chunk: TokenChunk) -> OutputChunk:
        """Tokens for the client, who has them from here on."""
        self._take(now, chunk)
        return OutputChunk(
            index=self.index,
            token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
            cached_tokens=self._cached_tokens(),
        )

    def _take(self, now: float, chunk: TokenChunk) -> None:
        self._token_ids += chunk.token_ids
        if chunk.token_ids:
            self._last_token_at = now
            if self._is_early:
                self._note_early(_EarlyToken(now, self._attempts[-1], chunk.stats), len(chunk.token_ids))

    def _note_early(self, token: _EarlyToken, num_tokens: int) -> None:
        """Keep where the first two tokens came from; of a second that came with the first there is nothing to say."""
        if self._first is None:
            self._first, self._is_early = token, num_tokens == 1
        else:
            self._second, self._is_early = token, False

    def last_chunk(
        self, flight: _Flight, now: float, reason: FinishReason | None, chunk: TokenChunk | None = None
    ) -> OutputChunk:
        """The end; ``chunk`` brings the last tokens, if there are any."""
        if chunk is not None:
            self._take(now, chunk)
        self._finished = True
        return OutputChunk(
            index=self.index,
            token_ids=() if chunk is None else chunk.token_ids,
            logprobs=() if chunk is None else chunk.logprobs,
            finish_reason=reason,
            stop_token_id=None if chunk is None else chunk.stop_token_id,
            cached_tokens=self._cached_tokens(),
            timing=self._timing(flight, now),
        )

    def _cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache of the first worker that computed the prompt."""
        for attempt in self._attempts:
            stats = attempt.stats.get(Role.DECODE if attempt.prefill is None else Role.PREFILL)
            if stats is not None:
                return stats.cached_tokens
        return 0

    def _timing(self, flight: _Flight, now: float) -> RequestTiming:
        """Seconds and bytes are summed over the attempts; workers and the reason are the last one's."""
        last = self._attempts[-1]
        prefills = [stats for a in self._attempts if (stats := a.stats.get(Role.PREFILL)) is not None]
        decodes = [stats for a in self._attempts if (stats := a.stats.get(Role.DECODE)) is not None]
        pulls = [stats.pull for stats in (*prefills, *decodes) if stats.pull is not None]
        reload = joined_reloads([stats.reload for stats in (*prefills, *decodes) if stats.reload is not None])
        arrived_at = self._request.arrived_at
        first_token_at = now if self._first is None else self._first.at
        slo, admission_s = self._request.slo, self._ticket.waited_s
        prefill, decode = _summed(prefills), _summed(decodes)
        num_later, expected = self.num_tokens - 1, last.route.expected
        tpot_s = (self._last_token_at - first_token_at) / num_later if num_later > 0 else None
        return RequestTiming(
            prefill_worker=last.route.prefill.worker_id if last.route.prefill is not None else None,
            decode_worker=None if last.finished_by_prefill else last.route.decode.worker_id,
            route_reason=last.route.reason,
            admission_s=admission_s,
            route_s=self._attempts[0].began_at - arrived_at - admission_s,
            prefill_queue_s=prefill.queue_s,
            prefill_s=prefill.compute_s,
            transfer_s=prefill.transfer_s,
            exposed_transfer_s=prefill.exposed_transfer_s,
            decode_queue_s=decode.queue_s,
            decode_s=decode.compute_s,
            ttft_s=first_token_at - arrived_at,
            total_s=now - arrived_at,
            bytes_shipped=prefill.bytes_shipped,
            cached_tokens=self._cached_tokens(),
            decode_cached_tokens=decodes[-1].cached_tokens if decodes else 0,
            num_attempts=len(self._attempts),
            num_preemptions=prefill.num_preemptions + decode.num_preemptions,
            pull_outcome=pulls[-1].outcome if pulls else "",
            pulled_tokens=sum(pull.num_tokens for pull in pulls),
            bytes_pulled=sum(pull.num_bytes for pull in pulls),
            pull_s=sum(pull.seconds for pull in pulls),
            reload=reload,
            slo_ttft_met=None if slo.ttft_s is None else first_token_at - arrived_at <= slo.ttft_s,
            slo_tpot_met=None if slo.tpot_s is None else (tpot_s or 0.0) <= slo.tpot_s,
            slo_miss_expected=self._ticket.slo_miss_expected,
            tpot_s=tpot_s,
            fallback=last.route.fallback,
            expected_ttft_s=None if expected is None else expected.ttft_s,
            expected_tpot_s=None if expected is None else expected.tpot_s,
            expected_bytes_shipped=None if expected is None else expected.bytes_shipped,
            colocated_ttft_s=None if expected is None else expected.colocated_ttft_s,
            colocated_tpot_s=None if expected is None else expected.colocated_tpot_s,
            ttft_parts=self._ttft_parts(flight),
            ttst_parts=self._ttst_parts(),
        )

    def _ttft_parts(self, flight: _Flight) -> TtftParts | None:
        first, request = self._first, self._request
        if first is None:
            return None
        began_at, stats = first.attempt.began_at, first.stats or _NO_STATS
        pull_s = 0.0 if stats.pull is None else stats.pull.seconds
        siblings_s = self.began_at - flight.began_at if self.index else 0.0
        return TtftParts(
            receive_s=flight.entered_at - request.arrived_at - request.tokenize_s,
            tokenize_s=request.tokenize_s,
            admission_s=flight.began_at - flight.entered_at,
            siblings_s=siblings_s,
            route_s=self._attempts[0].began_at - flight.began_at - siblings_s,
            retries_s=began_at - self._attempts[0].began_at,
            messages_s=first.at - began_at - pull_s - stats.queue_s - stats.compute_s,
            pull_s=pull_s,
            prefill_queue_s=stats.queue_s,
            prefill_s=stats.compute_s,
        )

    def _ttst_parts(self) -> TtstParts | None:
        first, second = self._first, self._second
        if first is None or second is None:
            return None
        gap_s = second.at - first.at
        if second.attempt is not first.attempt:
            return TtstParts(retries_s=gap_s)
        if first.attempt.prefill is None:
            return TtstParts(first_step_s=gap_s)
        sent, decoded = first.attempt.stats.get(Role.PREFILL) or _NO_STATS, second.stats or _NO_STATS
        return ttst_parts(
            gap_s,
            wait_s=sent.transfer_wait_s,
            exposed_s=sent.exposed_transfer_s,
            decode_queue_s=decoded.queue_s,
            first_step_s=decoded.compute_s,
        )


@dataclass(frozen=True, slots=True)
class _EarlyToken:
    """The first token of a continuation, or the second: when it came, from where, and what its worker said with it."""

    at: float
    attempt: _Attempt
    stats: StageStats | None


_NO_STATS = StageStats(WorkerId(""), Role.DECODE)


def _summed(stages: Sequence[StageStats]) -> StageStats:
    """Of one stage in all attempts: seconds, bytes and preemptions added up, the rest the last one's."""
    if len(stages) == 1:  # nearly always
        return stages[0]
    last = stages[-1] if stages else StageStats(WorkerId(""), Role.DECODE)
    return last._replace(
        queue_s=sum(s.queue_s for s in stages),
        compute_s=sum(s.compute_s for s in stages),
        transfer_s=sum(s.transfer_s for s in stages),
        exposed_transfer_s=sum(s.exposed_transfer_s for s in stages),
        bytes_shipped=sum(s.bytes_shipped for s in stages),
        num_preemptions=sum(s.num_preemptions for s in stages),
    )


class _Attempt:
    """One try at one continuation on one route: what its two workers said so far."""

    def __init__(self, spec: SequenceSpec, route: Route, prefill: WorkerClient | None, decode: WorkerClient) -> None:
        self.spec = spec
        self.route = route
        self.prefill = prefill  # None: the decode worker prefills
        self.decode = decode
        self.session_id = SessionId(spec.sequence_id)  # one hand-over per attempt, so one name does
        self.announcing: asyncio.Task[None] | None = None
        self.began_at = 0.0  # on the router's Clock
        self.stats: dict[Role, StageStats] = {}  # each stage's latest report, which includes its earlier ones
        self.handed_over = prefill is None  # P has nothing more to say
        self.finished = False
        self.finished_by_prefill = False
        self.ended = False
        self._committed = prefill is None  # D has the K/V
        self._next_position = len(spec.output_token_ids)
        self._early: dict[int, tuple[Role, TokenChunk]] = {}  # position |-> chunk that came before its predecessor

    def take(self, stage: Role, chunk: TokenChunk) -> list[tuple[Role, TokenChunk]]:
        """Note a chunk; those whose turn it is, in order of position, each with the stage that sent it."""
        if chunk.stats is not None:
            self.stats[stage] = chunk.stats
        is_report = not chunk.token_ids and chunk.finish_reason is None
        self._committed = self._committed or stage is Role.DECODE or is_report
        if is_report:
            if stage is Role.PREFILL:
                self.leave_prefill()
            return []
        self._early[chunk.position] = (stage, chunk)
        due: list[tuple[Role, TokenChunk]] = []
        while (following := self._early.pop(self._next_position, None)) is not None:
            self._next_position += len(following[1].token_ids)
            due.append(following)
        return due

    def is_decodes_alone(self, num_tokens: int) -> bool:
        """D has the K/V and the client has P's token: P may go, nothing is lost."""
        return self._committed and num_tokens > len(self.spec.output_token_ids)

    def leave_prefill(self) -> None:
        """P has done its part."""
        self.handed_over = True
        if self.prefill is not None:
            self.prefill.close_sequence(self.spec.sequence_id)

    def worker(self, stage: Role) -> WorkerView:
        """The worker of that stage; D's, if it prefills itself."""
        if stage is Role.PREFILL and self.route.prefill is not None:
            return self.route.prefill
        return self.route.decode

    def client(self, stage: Role) -> WorkerClient:
        """The connection to ``worker(stage)``."""
        return self.prefill if stage is Role.PREFILL and self.prefill is not None else self.decode

    def span(self, context: TraceContext, request: TraceContext | None, now: float, error: str) -> Span:
        """This attempt as a span of its request's trace."""
        attributes: dict[str, AttributeValue] = {
            "prfaas.sequence_id": self.spec.sequence_id,
            "prfaas.decode_worker": self.route.decode.worker_id,
            "prfaas.place": self.route.place,
            "prfaas.route_reason": self.route.reason,
        }
        if self.route.prefill is not None:
            attributes["prfaas.prefill_worker"] = self.route.prefill.worker_id
        if self.route.fallback:
            attributes["prfaas.fallback"] = self.route.fallback
        return Span("attempt", context, request, self.began_at, now, SpanKind.CLIENT, attributes, error)

    def close(self) -> None:
        """Hear nothing more of it."""
        self.ended = True
        self.decode.close_sequence(self.spec.sequence_id)
        if self.prefill is not None:
            self.prefill.close_sequence(self.spec.sequence_id)

    def stages_to_abort(self) -> tuple[Role, ...]:
        """Stages whose worker may still hold something of it."""
        stages: list[Role] = []
        if not self.finished or self.finished_by_prefill:
            stages.append(Role.DECODE)
        if not self.finished and not self.handed_over:
            stages.append(Role.PREFILL)
        return tuple(stages)


class _Wakes:
    """Lets readers run, a few in each turn of the event loop; the others keep their order.

    One engine step brings tokens for hundreds of continuations. If all their readers ran before the loop looks at its
    sockets again, a gateway that is too slow for one message per token would fall ever further behind. So it reads the
    next step meanwhile, and whoever still waits takes all its tokens at once: the busier, the fewer messages.
    """

    def __init__(self) -> None:
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._num_woken = 0  # in this turn
        self._turning = False

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Its reader may run: in this turn, if few do, else in a later one."""
        if not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)
        if self._num_woken < WAKES_A_TURN and not self._waiters:
            self._num_woken += 1
            waiter.set_result(None)
        else:
            self._waiters.append(waiter)

    def _turn(self) -> None:
        self._num_woken = 0
        while self._waiters and self._num_woken < WAKES_A_TURN:
            waiter = self._waiters.popleft()
            if not waiter.done():  # its reader was cancelled
                self._num_woken += 1
                waiter.set_result(None)
        self._turning = bool(self._num_woken)
        if self._turning:
            asyncio.get_running_loop().call_soon(self._turn)


class _Inbox:
    """What one continuation waits for, in order of arrival; one reader."""

    def __init__(self, wakes: _Wakes) -> None:
        self._wakes = wakes
        self._is_waking = False
        self._events: deque[tuple[Role, SequenceEvent]] = deque()
        self._error: PrfaasError | None = None
        self.stopped = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, stage: Role, event: SequenceEvent) -> None:
        """An event of the current attempt, from the worker of that stage."""
        self._events.append((stage, event))
        self._wake()

    def interrupt(self, error: PrfaasError) -> None:
        """The reader raises ``error``, before any event; the first one counts."""
        self._error = self._error or error
        self._wake()

    def stop(self) -> None:
        """The reader gets None, before any event."""
        self.stopped = True
        self._wake()

    def clear(self) -> None:
        """Forget the events of an attempt that is over."""
        self._events.clear()

    async def get(self) -> tuple[Role, SequenceEvent] | None:
        """The next event; None: the text side stopped the continuation."""
        while True:
            if self._error is not None:
                raise self._error
            if self.stopped:
                return None
            if self._events:
                return self._events.popleft()
            await self._wait()

    def next_chunk(self) -> tuple[Role, TokenChunk] | None:
        """The next event if it is there and a chunk; None if there is something else to look at first."""
        if not self._events or self._error is not None or self.stopped:
            return None
        stage, event = self._events[0]
        if not isinstance(event, TokenChunk):
            return None
        self._events.popleft()
        return stage, event

    async def guard(self, work: Coroutine[None, None, bool]) -> None:
        """Wait for ``work``, or until interrupted or stopped, whichever comes first."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._wake())
        try:
            while not task.done() and self._error is None and not self.stopped:
                await self._wait()
        finally:
            task.cancel()
        if self._error is not None:
            raise self._error

    async def _wait(self) -> None:
        assert self._waiter is None, "an inbox has one reader"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter, self._is_waking = None, False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and not self._is_waking:
            self._is_waking = True
            self._wakes.wake(self._waiter)
