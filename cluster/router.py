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
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cluster.admission import Admission, AdmissionCounters, Bound, Proposal, Ticket
from cluster.attempt import Attempt
from cluster.config import AdmissionConfig, RouterConfig
from cluster.flight import Continuation, Flight
from cluster.inbox import Wakes
from cluster.membership import Membership
from cluster.output_lengths import OutputLengths
from cluster.routing_policy import RouteRequest, RoutingPolicy
from cluster.view import ClusterView, Route
from cluster.worker_client import Assignment, WorkerLost
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
from core.prefix_hash import tenant_of
from core.request import (
    FinishReason,
    GatewayId,
    GenerateRequest,
    OutputChunk,
    RequestId,
    Role,
    SequenceFailure,
    TokenChunk,
    joined_chunk,
)
from core.request_log import about
from core.tracing import TRACING_OFF, Tracing

logger = logging.getLogger(__name__)

HANDOVER_REPORT_WAIT_S = 0.1  # a finish waits so long for P's report of the hand-over, for the timing only
STOPPING = "the gateway is stopping and takes no new requests"
FALLBACK_LOG_S = 10.0  # a fallback is logged when it begins, and so long after the last time while it lasts
WIND_UP_S = 1.0  # after a drain: for generators to end and for workers to hear of aborts
RELEASE_POLL_S = 0.05  # while requests wait for their turn: how often the workers' loads are looked at
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
        self._flights: dict[RequestId, Flight] = {}
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
        self._wakes = Wakes()

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

    def _admit(self, request: GenerateRequest) -> Flight:
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
        flight = Flight(request, name, ticket, self._clock.now(), self._wakes)
        self._flights[request.request_id] = flight
        self._idle.clear()
        if request.deadline_at is not None:
            flight.timer = asyncio.get_running_loop().call_later(
                request.deadline_at - self._clock.now(), flight.interrupt, DeadlineExceeded("the deadline passed")
            )
        return flight

    def _dismiss(self, flight: Flight) -> None:
        if flight.timer is not None:
            flight.timer.cancel()
        self._admission.leave(flight.ticket, flight.continuations[0].num_finished_tokens)
        del self._flights[flight.request.request_id]
        if self._observer is not None and flight.route is not None:
            self._observer.ended(flight.num_tokens)
        if not self._flights:
            self._idle.set()

    async def _wait_for_turn(self, flight: Flight) -> None:
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

    def _stream(self, flight: Flight) -> AsyncGenerator[OutputChunk, None]:
        if len(flight.continuations) == 1:
            return self._run(flight, flight.continuations[0])
        return self._run_all(flight)

    async def _run_all(self, flight: Flight) -> AsyncGenerator[OutputChunk, None]:
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
        self, flight: Flight, continuation: Continuation, merged: asyncio.Queue[OutputChunk | Exception]
    ) -> None:
        try:
            async with aclosing(self._run(flight, continuation)) as chunks:
                async for chunk in chunks:
                    merged.put_nowait(chunk)
        except Exception as error:  # whatever it is, the one who reads must not wait for ever
            merged.put_nowait(error)

    # ---- one continuation ----

    async def _run(self, flight: Flight, continuation: Continuation) -> AsyncGenerator[OutputChunk, None]:
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
        self, flight: Flight, continuation: Continuation, attempt: Attempt, stage: Role, chunk: TokenChunk
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

    async def _hear_handover(self, continuation: Continuation, attempt: Attempt) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(HANDOVER_REPORT_WAIT_S):
                while not attempt.handed_over:
                    received = await continuation.inbox.get()
                    if received is None or not isinstance(received[1], TokenChunk):
                        return
                    after = attempt.take(received[0], received[1])
                    assert not after, "a token came after the finish"

    # ---- one attempt ----

    async def _begin(self, flight: Flight, continuation: Continuation) -> None:
        """Choose workers and tell them; the answer comes to the inbox. Nothing is begun if it was stopped meanwhile."""
        route = await self._find_route(flight, continuation)
        if route is None:
            return
        decode = self._membership.client(route.decode.engine_id)
        prefill = self._membership.client(route.prefill.engine_id) if route.prefill is not None else None
        assert decode is not None, "a route is made of workers in the view"
        assert (prefill is None) == (route.prefill is None), "a route is made of workers in the view"
        spec = continuation.next_spec(flight)
        attempt = Attempt(spec, route, prefill, decode)
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

    async def _find_route(self, flight: Flight, continuation: Continuation) -> Route | None:
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

    def _route_request(self, continuation: Continuation) -> RouteRequest:
        matches = {}
        if self._policy.uses_prefixes:
            for page_size in self._membership.page_sizes:
                matches[page_size] = self._membership.match_prefix(continuation.page_hashes(page_size))
        num_output = self._output_lengths.expected(continuation.num_tokens, continuation.max_tokens)
        if continuation.ordinal is None:
            continuation.ordinal = self._num_routes
            self._num_routes += 1
        return continuation.route_request(matches, num_output, self._output_lengths.mean)

    def _proposed_route(self, flight: Flight, continuation: Continuation, view: ClusterView) -> Route | None:
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

    def _sibling_route(self, flight: Flight, continuation: Continuation, view: ClusterView) -> Route | None:
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

    async def _announce(self, continuation: Continuation, attempt: Attempt) -> None:
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
        self, continuation: Continuation, attempt: Attempt, stage: Role, event: SequenceFailure | WorkerLost
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

    def _end(self, continuation: Continuation, reason: str, error: str = "") -> None:
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

    async def _abort(self, attempt: Attempt, stages: tuple[Role, ...], reason: str) -> None:
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
