"""May this request start now, must it wait for its turn, or is it refused?

The life of a request here; the router owns the request, this file its ``Ticket``:
1. ``join``: it stands in line, in the order of fair_queue.py: shares between tenants; within a tenant the higher class
   (priority, and one more for each ``ageing_s`` that it came earlier), in it the earlier deadline, then who came first.
2. ``serve`` releases the first whose route has room (``lack_of_room``), at most one at a time, so that the next one is
   judged on a view in which the last one shows. One that waits for a worker lets others pass to other workers, never
   to that one: nothing waits while there is room for it, and nothing is overtaken on its way.
3. Whoever is not released at once has ``arrived`` in the queue: it is refused if it would miss an objective after the
   wait that is predicted for it, or if more wait than may. It is judged again when its turn has come, and refused when
   it has waited for too long.
4. ``first_token``, ``begun`` (again) and ``leave`` keep the books: what is where of this gateway's own, and how long
   that took. A refused or cancelled request leaves nothing behind.

Deciding is pure (``judge``, ``lack_of_room``, load_forecast.py); ``Admission`` is the one writer of tickets, queue and
measurements, on the gateway's event loop, and knows neither workers nor the policy: the router says what the policy
would do with a request now (``Proposal``). What nothing is known of is admitted.
"""

from __future__ import annotations

import asyncio
import logging
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from itertools import accumulate, count, islice

from cluster.config import AdmissionConfig
from cluster.fair_queue import FairQueue, Place
from cluster.load_forecast import (
    DecodeLoad,
    Demand,
    Outlook,
    Released,
    RunningSum,
    load_at,
    pages_needed,
    predict_tpot,
    predict_ttft,
    queue_s,
    seconds_until_tpot,
    waiting_tokens,
)
from cluster.metric_catalogue import WAIT_BUCKETS_S
from cluster.service_times import DrainRate, Measurements
from cluster.view import ClusterView, Route, WorkerLoad, WorkerView
from core.clock import Clock
from core.errors import Overloaded, PrfaasError
from core.prefix_hash import tenant_of
from core.request import NO_SLO, GenerateRequest, Slo, WorkerId

logger = logging.getLogger(__name__)

LOOK_AHEAD = 8  # places whose routes are asked for in one go: each costs a decision of the policy
MAX_RETRY_AFTER_S = 60.0
_LOG_INTERVAL_S = 10.0
_ROUNDING_S = 1e-6


class Bound(StrEnum):
    """What a request was refused for, as the ``reason`` of the error and of the counter."""

    MAX_INFLIGHT = "max_inflight"
    MAX_QUEUED = "max_queued"
    MAX_QUEUED_PER_TENANT = "max_queued_per_tenant"
    MAX_WAIT = "max_wait"
    SLO_TTFT = "slo_ttft"
    SLO_TPOT = "slo_tpot"


@dataclass(frozen=True, slots=True)
class Proposal:
    """What the policy would do with a request, in ``view``."""

    route: Route
    uncached_tokens: int  # of its prompt, where it would be prefilled
    view: ClusterView


@dataclass(frozen=True, slots=True)
class Miss:
    """An objective that would be missed: what is predicted, what is allowed and when it should be met, in seconds."""

    bound: Bound
    predicted_s: float
    allowed_s: float
    retry_after_s: float
    hopeless: bool = False  # it would be missed with nothing ahead of the request, too

    def __str__(self) -> str:
        name = "TTFT" if self.bound is Bound.SLO_TTFT else "TPOT"
        why = ", even with nothing ahead of it" if self.hopeless else ""
        return f"a {name} of {self.predicted_s:.3g} s is predicted{why}, {self.allowed_s:.3g} s is allowed"


@dataclass(frozen=True, slots=True)
class AdmissionCounters:
    """A snapshot. Counts run from the start; ``wait_counts`` are cumulative, one for each of ``WAIT_BUCKETS_S`` and one
    for all; tenants that the configuration does not name are ``other``."""

    num_queued: int = 0  # continuations that wait
    queued_by_tenant: Mapping[str, int] = field(default_factory=dict)
    refusals_by_reason: Mapping[str, int] = field(default_factory=dict)
    misses_served_by_reason: Mapping[str, int] = field(default_factory=dict)
    wait_counts: tuple[int, ...] = (0,) * (len(WAIT_BUCKETS_S) + 1)
    wait_sum_s: float = 0.0


# ---- deciding ----


def judge(
    slo: Slo, outlook: Outlook, demand: Demand, waited_s: float, delay_s: float = 0.0, *, ahead: bool = True
) -> Miss | None:
    """The objective that a request would miss which has waited ``waited_s`` and would be released ``delay_s`` from now.

    ``ahead`` False: decode is judged by the load as it is now (load_forecast.py says why that is worse).
    """
    if slo == NO_SLO:
        return None
    prefill_s = predict_ttft(outlook, demand) or 0.0
    if slo.ttft_s is not None:
        ttft_s = waited_s + delay_s + prefill_s
        if ttft_s > slo.ttft_s:
            excess_s, ahead_s = ttft_s - slo.ttft_s, queue_s(outlook)
            hopeless = ahead_s is not None and excess_s > waited_s + delay_s + ahead_s + _ROUNDING_S
            return Miss(
                Bound.SLO_TTFT, ttft_s, slo.ttft_s, MAX_RETRY_AFTER_S if hopeless else excess_s, hopeless=hopeless
            )
    if slo.tpot_s is not None and demand.max_tokens > 1:
        tpot_s = predict_tpot(outlook, demand, delay_s + prefill_s, ahead=ahead)
        if tpot_s is not None and tpot_s > slo.tpot_s:
            later_s = seconds_until_tpot(outlook, demand, slo.tpot_s, delay_s + prefill_s)
            return Miss(Bound.SLO_TPOT, tpot_s, slo.tpot_s, MAX_RETRY_AFTER_S if later_s is None else delay_s + later_s)
    return None


def lack_of_room(outlook: Outlook, demand: Demand, config: AdmissionConfig) -> WorkerId | None:
    """The worker of the route that holds as much as it should; None: there is room.

    An idle worker has room for anything. The prefill worker is full when the prompts ahead take longer than
    ``prefill_queue_s``; the decode worker when, at the end of this prompt's prefill, its slots or its pages, the growth
    of what is there included, would not do.
    """
    tokens = waiting_tokens(outlook)
    if tokens:
        ahead_s = queue_s(outlook)
        if tokens > config.prefill_queue_tokens if ahead_s is None else ahead_s > config.prefill_queue_s:
            return outlook.prefill.worker_id
    if demand.max_tokens <= 1:
        return None  # it ends where it is prefilled
    slots = config.decode_slots or outlook.decode.max_batch_size or math.inf
    pages = pages_needed(outlook, demand)

    def has_room(load: DecodeLoad) -> bool:
        sequences = round(load.sequences)  # chances add up to fractions; half a sequence is none
        return not sequences or (sequences + demand.num_sequences <= slots and pages <= load.pages_free)

    # Most often there is room whatever becomes of the rest, which takes no prediction of each.
    if has_room(load_at(outlook, None)) or has_room(load_at(outlook, predict_ttft(outlook, demand) or 0.0)):
        return None
    return outlook.decode.worker_id


# ---- keeping the books ----


class _State(Enum):
    WAITING = "waiting"
    RELEASED = "released"
    OVER = "over"  # refused, or gone


class Ticket:
    """One request at admission. Only ``Admission`` writes it."""

    def __init__(self, request: GenerateRequest, num_output: int) -> None:
        self.request = request
        self._num_output = num_output
        self.proposal: Proposal | None = None  # that it was released with, until it has begun
        self.waited_s = 0.0  # for its turn
        self.slo_miss_expected = ""  # in words, if it is served all the same
        self._state = _State.WAITING
        self._decided = asyncio.Event()
        self._refusal: PrfaasError | None = None
        self._place: Place[Ticket]
        self._joined_at = 0.0
        self._arrived = False  # in the queue: it was not released at once
        self._demand: Demand | None = None
        self._decode: WorkerId | None = None
        self._released_at = 0.0
        self._tokens_to_first: int | None = None  # ahead of it when it was released, and its own; None: started anew
        self._decodes_from = 0.0
        self._begun = False
        self._decodes = False
        self._batch_at_first = 0

    @property
    def waits(self) -> bool:
        """Is its turn still to come?"""
        return self._state is _State.WAITING

    async def decided(self) -> bool:
        """Wait until its turn has come, or it is refused."""
        return await self._decided.wait()

    def check(self) -> None:
        """Raise what it was refused with."""
        if self._refusal is not None:
            raise self._refusal

    def _as_released(self) -> Released:
        assert self._demand is not None, "what is on a worker is known"
        return Released(self._demand, self._decodes_from, self._decodes)

    def __repr__(self) -> str:
        return f"<ticket of {self.request.request_id}, {self._state.value}>"


class _Booked:
    """What of this gateway's own decodes on one worker, or will. What it adds up to is kept: it is asked for with every
    decision."""

    def __init__(self) -> None:
        self.released: dict[Ticket, Released] = {}
        self.sum = RunningSum()

    def put(self, ticket: Ticket) -> None:
        """It is there, as it is now."""
        before, now = self.released.get(ticket), ticket._as_released()
        if before is not None:
            self.sum.subtract(before)
        self.released[ticket] = now
        self.sum.add(now)

    def drop(self, ticket: Ticket) -> None:
        """It is there no more."""
        self.sum.subtract(self.released.pop(ticket))


_NOBODY = _Booked()  # never written
Propose = Callable[[Ticket], Proposal | None]  # None: no worker can take it now


class Admission:
    """Lets requests start in turn. Everything happens on one event loop."""

    def __init__(self, config: AdmissionConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._queue: FairQueue[Ticket] = FairQueue(config.weight_of)
        self._numbers = count()
        self._on_decode: dict[WorkerId, _Booked] = {}
        self._foreign: dict[WorkerId, tuple[WorkerLoad, int]] = {}  # last report |-> sequences in it that are not ours
        self._measured = Measurements()
        self._drain = DrainRate()
        self._refusals: Counter[str] = Counter()
        self._misses_served: Counter[str] = Counter()
        self._said: dict[str, tuple[float, int]] = {}  # reason |-> when it was logged last, how often it came since
        self._wait_counts = [0] * (len(WAIT_BUCKETS_S) + 1)
        self._wait_sum_s = 0.0
        self._next_expiry_at = math.inf
        self.moved = asyncio.Event()  # something began, went on or ended since it was cleared: there may be room

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    @property
    def counters(self) -> AdmissionCounters:
        """A snapshot."""
        queued: Counter[str] = Counter()
        for tenant, size in self._queue.sizes.items():
            queued[self._config.label_of(tenant)] += size
        return AdmissionCounters(
            num_queued=self._queue.size,
            queued_by_tenant=queued,
            refusals_by_reason=dict(self._refusals),
            misses_served_by_reason=dict(self._misses_served),
            wait_counts=tuple(accumulate(self._wait_counts)),
            wait_sum_s=self._wait_sum_s,
        )

    # ---- what the router calls ----

    def join(self, request: GenerateRequest, num_output: int) -> Ticket:
        """Stand in line. ``num_output``: tokens that each continuation is expected to have. ``leave`` must follow."""
        now, config, sampling = self._clock.now(), self._config, request.sampling
        deadlines = [math.inf if request.deadline_at is None else request.deadline_at]
        if request.slo.ttft_s is not None:
            deadlines.append(request.arrived_at + request.slo.ttft_s)
        ticket = Ticket(request, num_output)
        ticket._joined_at = now
        ticket._place = Place(
            item=ticket,
            tenant=tenant_of(request.salt),
            cost=len(request.prompt_token_ids) + sampling.n * num_output,
            size=sampling.n,
            order=(math.floor(now / config.ageing_s) - request.priority, min(deadlines), next(self._numbers)),
        )
        if not len(self._queue):
            self._drain.rest(now)
        self._queue.push(ticket._place)
        self._next_expiry_at = min(self._next_expiry_at, self._expires_at(ticket))
        return ticket

    def serve(self, propose: Propose) -> Ticket | None:
        """Release the first that may start, if one may, and refuse those before it whose objectives would be missed."""
        now = self._clock.now()
        self._expire(now)
        full: set[WorkerId] = set()  # and waited for by somebody whose turn comes first
        for place in tuple(islice(self._queue.turns(), LOOK_AHEAD)):
            ticket = place.item
            proposal = propose(ticket)
            if proposal is None:
                self._release(ticket, None, now)
                return ticket
            if full & _workers(proposal.route):
                continue
            outlook, demand = self._outlook(proposal, now), _demand(ticket, proposal.uncached_tokens)
            lacking = lack_of_room(outlook, demand, self._config)
            if lacking is not None:
                full.add(lacking)
            elif self._accept(ticket, judge(ticket.request.slo, outlook, demand, self._waited(ticket, now)), now):
                self._release(ticket, proposal, now, outlook, demand)
                return ticket
        return None

    def arrived(self, ticket: Ticket, propose: Propose) -> None:
        """It was not released at once: refuse it if it would wait too long for its objectives, or if too many wait."""
        now, request = self._clock.now(), ticket.request
        ticket._arrived = True
        if request.slo != NO_SLO:
            proposal = propose(ticket)
            if proposal is not None:
                outlook, demand = self._outlook(proposal, now), _demand(ticket, proposal.uncached_tokens)
                miss = judge(request.slo, outlook, demand, self._waited(ticket, now), self._delay_s(ticket, now) or 0.0)
                self._accept(ticket, miss, now)
        self._bound_queue(ticket, now)

    def begun(self, ticket: Ticket, route: Route) -> None:
        """Its workers are told of it: those of its proposal, or others by now, or others again."""
        if ticket._state is _State.RELEASED:
            if ticket._begun or ticket._demand is None:
                ticket._tokens_to_first = None
                ticket._decodes_from = ticket._decodes_from if ticket._decodes else self._clock.now()
            ticket._demand = ticket._demand or _demand(ticket, len(ticket.request.prompt_token_ids))
            if ticket._begun or ticket._decode != route.decode.worker_id:  # else it is booked as it should be
                self._unbook(ticket)
                self._book(ticket, route)
            ticket._begun, ticket.proposal = True, None  # a view is large
        self.moved.set()

    def first_token(self, ticket: Ticket) -> None:
        """The client has its first token: its prefill is over. Again: nothing."""
        if ticket._state is not _State.RELEASED or ticket._decodes:
            return
        now = self._clock.now()
        ticket._decodes, ticket._decodes_from = True, now
        if ticket._tokens_to_first is not None:
            self._measured.first_token(ticket._tokens_to_first, now - ticket._released_at, now)
        if ticket._decode is not None:
            self._on_decode[ticket._decode].put(ticket)
            ticket._batch_at_first = self._present(ticket._decode)
        self.moved.set()

    def leave(self, ticket: Ticket, num_output_tokens: int | None = None) -> None:
        """It is over, in whatever state. ``num_output_tokens``: of its first continuation, if that has finished."""
        now = self._clock.now()
        if ticket.waits:
            self._end_wait(ticket, now)
        elif ticket._state is _State.RELEASED:
            alone = ticket._place.size == 1  # of several, the last one's end tells nothing of the first one's tokens
            if alone and ticket._decode is not None and ticket._decodes and num_output_tokens is not None:
                batch = (ticket._batch_at_first + self._present(ticket._decode)) / 2
                self._measured.finished(batch, num_output_tokens, now - ticket._decodes_from, now)
            self._unbook(ticket)
        ticket._state = _State.OVER
        self.moved.set()

    def close(self, error: Callable[[], PrfaasError]) -> None:
        """Whoever waits is refused with an ``error`` of its own."""
        now = self._clock.now()
        for place in tuple(self._queue.places()):
            self._refuse(place.item, error(), now)

    def overloaded(
        self, bound: Bound, message: str, retry_after_s: float, predicted: float, allowed: float
    ) -> Overloaded:
        """The error of a refusal, which it counts."""
        self._refusals[bound] += 1
        self._say(bound, f"refused with {bound}", message)
        return Overloaded(
            message,
            min(max(0.0, retry_after_s), MAX_RETRY_AFTER_S),
            reason=bound,
            predicted=predicted,
            allowed=allowed,
        )

    # ---- inside ----

    def _outlook(self, proposal: Proposal, now: float) -> Outlook:
        route = proposal.route
        ours = self._on_decode.get(route.decode.worker_id, _NOBODY)
        return Outlook(
            now=now,
            prefill=route.prefill or route.decode,
            decode=route.decode,
            costs=proposal.view.costs,
            times=self._measured.times(now),
            expected=route.expected,
            released=tuple(ours.released.values()),
            foreign=self._count_foreign(route.decode),
            known_sum=ours.sum.now(),
        )

    def _count_foreign(self, worker: WorkerView) -> int:
        """Sequences in the worker's last report that other gateways sent. Counted when the report is first seen: what
        ends until the next one is still in it then."""
        known = self._foreign.get(worker.worker_id)
        if known is None or known[0] is not worker.load:
            load, ours = worker.load, worker.num_assigned - worker.num_unreported
            foreign = max(0, load.num_running + load.num_waiting + load.num_announced - ours)
            known = self._foreign[worker.worker_id] = (load, foreign)
        return known[1]

    def _present(self, decode: WorkerId) -> int:
        """Sequences there now."""
        _, foreign = self._foreign.get(decode, (None, 0))
        return foreign + self._on_decode.get(decode, _NOBODY).sum.present

    def _release(
        self,
        ticket: Ticket,
        proposal: Proposal | None,
        now: float,
        outlook: Outlook | None = None,
        demand: Demand | None = None,
    ) -> None:
        if len(self._queue) > 1 or ticket._arrived:
            self._drain.note(ticket._place.cost, now)
        self._queue.serve(ticket._place)
        self._note_wait(ticket, now)
        ticket.proposal, ticket._state, ticket._released_at = proposal, _State.RELEASED, now
        if proposal is not None and outlook is not None and demand is not None:
            ticket._demand = demand
            ticket._tokens_to_first = waiting_tokens(outlook) + demand.uncached_tokens
            ticket._decodes_from = now + (predict_ttft(outlook, demand) or 0.0)
            self._book(ticket, proposal.route)
        ticket._decided.set()

    def _book(self, ticket: Ticket, route: Route) -> None:
        assert ticket._demand is not None, "it is set when it is released"
        if ticket._demand.max_tokens > 1:
            ticket._decode = route.decode.worker_id
            self._on_decode.setdefault(ticket._decode, _Booked()).put(ticket)

    def _unbook(self, ticket: Ticket) -> None:
        if ticket._decode is not None:
            booked = self._on_decode[ticket._decode]
            booked.drop(ticket)
            if not booked.released:
                del self._on_decode[ticket._decode]
            ticket._decode = None

    def _accept(self, ticket: Ticket, miss: Miss | None, now: float) -> bool:
        """May it go on? One that would miss an objective may if misses are served."""
        if miss is None:
            return True
        if self._config.on_miss == "serve":
            if not ticket.slo_miss_expected:
                ticket.slo_miss_expected = f"{miss.bound}: {miss}"
                self._misses_served[miss.bound] += 1
                self._say(f"served {miss.bound}", f"served although {miss.bound} is expected to be missed", str(miss))
            return True
        error = self.overloaded(miss.bound, str(miss), miss.retry_after_s, miss.predicted_s, miss.allowed_s)
        self._refuse(ticket, error, now)
        return False

    def _refuse(self, ticket: Ticket, error: PrfaasError, now: float) -> None:
        self._end_wait(ticket, now)
        ticket._state, ticket._refusal = _State.OVER, error
        ticket._decided.set()

    def _end_wait(self, ticket: Ticket, now: float) -> None:
        self._queue.remove(ticket._place)
        self._note_wait(ticket, now)

    def _note_wait(self, ticket: Ticket, now: float) -> None:
        # What is released at once has waited for the policy's decision only, which is part of finding a route.
        ticket.waited_s = now - ticket._joined_at if ticket._arrived else 0.0
        self._wait_counts[bisect_left(WAIT_BUCKETS_S, ticket.waited_s)] += 1
        self._wait_sum_s += ticket.waited_s

    def _bound_queue(self, ticket: Ticket, now: float) -> None:
        """Too many wait: the last of the tenant with the longest wait gives way, be it the one that came or another."""
        config, tenant = self._config, ticket._place.tenant
        own, limit = config.max_queued_per_tenant, config.max_queued
        while ticket.waits and own is not None and self._queue.size_of(tenant) > own:
            victim = ticket if ticket._place.size > own else self._queue.last_of(tenant).item
            self._give_way(victim, Bound.MAX_QUEUED_PER_TENANT, self._queue.size_of(tenant), own, now)
        while ticket.waits and self._queue.size > limit:
            victim = ticket if ticket._place.size > limit else self._queue.last_of_longest().item
            self._give_way(victim, Bound.MAX_QUEUED, self._queue.size, limit, now)

    def _give_way(self, victim: Ticket, bound: Bound, queued: int, limit: int, now: float) -> None:
        whose = "of this tenant " if bound is Bound.MAX_QUEUED_PER_TENANT else ""
        message = f"{queued} continuations {whose}would wait for their turn, {limit} may"
        self._refuse(victim, self.overloaded(bound, message, self._delay_s(victim, now) or 1.0, queued, limit), now)

    def _expires_at(self, ticket: Ticket) -> float:
        """When waiting longer makes no sense."""
        slo = ticket.request.slo.ttft_s
        expires_at = ticket._joined_at + self._config.max_wait_s
        if slo is None or ticket.slo_miss_expected:
            return expires_at
        return min(expires_at, ticket.request.arrived_at + slo)

    def _expire(self, now: float) -> None:
        """Refuse those that have waited for too long, or past their TTFT already."""
        if now < self._next_expiry_at:
            return
        for place in tuple(self._queue.places()):
            ticket = place.item
            if now < self._expires_at(ticket):
                continue
            waited_s, limit_s = now - ticket._joined_at, self._config.max_wait_s
            if waited_s >= limit_s:
                message = f"its turn did not come in {limit_s:g} s, the longest that a request may wait"
                retry_after_s = self._delay_s(ticket, now) or limit_s
                self._refuse(ticket, self.overloaded(Bound.MAX_WAIT, message, retry_after_s, waited_s, limit_s), now)
                continue
            slo_s = ticket.request.slo.ttft_s
            assert slo_s is not None, "it expires for its TTFT"
            predicted_s = self._waited(ticket, now) + (self._delay_s(ticket, now) or 0.0)
            self._accept(ticket, Miss(Bound.SLO_TTFT, predicted_s, slo_s, max(1.0, predicted_s - slo_s)), now)
        self._next_expiry_at = min((self._expires_at(p.item) for p in self._queue.places()), default=math.inf)

    def _waited(self, ticket: Ticket, now: float) -> float:
        """Seconds of the request's TTFT that have passed."""
        return now - ticket.request.arrived_at

    def _delay_s(self, ticket: Ticket, now: float) -> float | None:
        """Seconds until its turn comes, by how fast the queue moves; None: not known."""
        rate = self._drain.rate(now)
        return None if rate is None else (self._queue.cost_ahead(ticket._place) + ticket._place.cost) / rate

    def _say(self, key: str, what: str, message: str) -> None:
        """Log it, and how often it came meanwhile, but not for every request of a flood."""
        now = self._clock.now()
        said_at, since = self._said.get(key, (-math.inf, 0))
        if now - said_at < _LOG_INTERVAL_S:
            self._said[key] = (said_at, since + 1)
            return
        self._said[key] = (now, 0)
        more = f" ({since} more since the last such line)" if since else ""
        logger.warning("a request is %s: %s%s", what, message, more)


def _demand(ticket: Ticket, uncached_tokens: int) -> Demand:
    request, limit = ticket.request, ticket.request.sampling.max_tokens
    return Demand(
        num_tokens=len(request.prompt_token_ids),
        uncached_tokens=uncached_tokens,
        num_sequences=request.sampling.n,
        num_output=ticket._num_output,
        max_tokens=math.inf if limit is None else limit,
    )


def _workers(route: Route) -> set[WorkerId]:
    return {route.decode.worker_id} | (set() if route.prefill is None else {route.prefill.worker_id})
