"""Which workers take this sequence? Pure functions of a request and a frozen view; the router does what they say.

Invariants, of every policy:
- only workers of ``view.ready(role)`` are chosen: live lease, not draining, advertising the role;
- a prefill worker is paired only with a decode worker whose pool may take its K/V, on a link that may be used;
- an engine that failed this sequence before (``excluded``) is chosen only when nothing else is left;
- equal arguments give equal routes, and every route says why it was taken;
- a route that an intact cluster would not take names its ``Fallback``.

A worker is preferred in this order: not excluded, then what the policy looks at, then the smaller worker id.
How to add a policy: implement ``RoutingPolicy`` and add a line to ``POLICIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np

from cluster.prefix_index import PrefixMatch
from cluster.view import ClusterView, Flags, Integers, Pools, Route, WorkerPool, WorkerView
from core.errors import Incompatible, InvalidConfig, NoRoute
from core.request import EngineId, RequestId, Role


class Fallback(StrEnum):
    """Why a route is not what an intact cluster would take: ``Route.fallback``."""

    NO_PREFILL_WORKER = "no_prefill_worker"  # none is ready where the decode worker could be shipped to from
    NO_PRFAAS_WORKER = "no_prfaas_worker"  # the prompt is long enough for a PrfaaS cluster, and none has one ready
    INCOMPATIBLE = "incompatible"  # there is one, but its cache is not the decode worker's
    LINK_DOWN = "link_down"  # there is one, but no link from it may be used


COLOCATE = ("auto", "never", "always")


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """What an operator may say of routing; ``RouterConfig`` explains each."""

    colocate: str = "auto"
    pulls: bool = True
    fetch_ratio: float = 1.5


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What a policy may know of a sequence.

    num_tokens: tokens whose K/V must exist before the next one is sampled (the prompt, and what was generated so far).
    ordinal: how many sequences this gateway placed before this one, a retry counted as another; the same however
        often the route of one is asked for while it waits.
    excluded: engines that failed this sequence before. A restarted worker is a new engine, hence not excluded.
    matches: for each page size in the cluster, which workers cache how many of the leading pages of those tokens.
    num_output: tokens that it is expected to generate yet.
    mean_output: tokens that sequences generate, on average.
    """

    request_id: RequestId
    num_tokens: int
    ordinal: int
    excluded: frozenset[EngineId] = frozenset()
    matches: Mapping[int, PrefixMatch] = field(default_factory=dict)
    num_output: int = 256
    mean_output: float = 256.0

    def cached_tokens(self, worker: WorkerView) -> int:
        """Tokens at the sequence's beginning whose K/V ``worker`` holds, as far as is known; never all of them."""
        page_size = worker.model.fingerprint.page_size
        match = self.matches.get(page_size)
        return 0 if match is None else min(match.pages_on(worker.engine_id) * page_size, self.num_tokens - 1)

    def cached_tokens_in(self, *pools: WorkerPool) -> list[Integers]:
        """``cached_tokens`` of every worker of each pool."""
        if len(self.matches) == 1:
            ((page_size, match),) = self.matches.items()
            if all(pool.roster.page_size == page_size for pool in pools):
                held = match.tokens_by_slot(page_size, self.num_tokens - 1)
                return [held.take(pool.roster.slots(match.slots), mode="clip") for pool in pools]
        return [np.array([self.cached_tokens(w) for w in pool.workers], np.int64) for pool in pools]


class RoutingPolicy(Protocol):
    """Chooses where a sequence is prefilled and decoded."""

    @property
    def uses_prefixes(self) -> bool:
        """Does it look at ``RouteRequest.matches``? Hashing a prompt costs about a microsecond for each page."""
        ...

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        """A route, or ``NoRoute`` naming the empty pool. Pure: changes nothing, keeps nothing, reads no clock."""
        ...


class RoundRobin:
    """Takes workers in turn, by the request's ordinal; looks at no load."""

    uses_prefixes = False

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        candidates = _candidates(request, view)
        decode = candidates.decode.in_turn(request.ordinal)
        senders = candidates.prefill_for(decode)
        prefill = senders.in_turn(request.ordinal) if senders else None
        return candidates.route(prefill, decode, f"round robin, turn {request.ordinal}")


class LeastLoaded:
    """Takes the prefill worker with the fewest tokens ahead of the request and the decode worker with the fewest
    sequences among those whose free pages can hold it.

    A worker's own report lags by one Watch message, so what this gateway has assigned since is added to it: that
    counts some sequences twice, on every worker alike.
    """

    uses_prefixes = False

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        candidates = _candidates(request, view)
        pools = view.pools
        decode = candidates.with_room().least(pools.decode.num_sequences)
        ahead = _tokens_ahead(pools.prefill, request)
        senders = candidates.prefill_for(decode)
        prefill = senders.least(ahead) if senders else None
        worker = pools.decode.workers[decode]
        said = (
            f"{worker.worker_id} has {pools.decode.num_sequences[decode]} sequences"
            f" and {worker.load.pages_free} free pages"
        )
        if prefill is not None:
            said = f"{pools.prefill.workers[prefill].worker_id} has {ahead[prefill]} tokens ahead, {said}"
        return candidates.route(prefill, decode, f"least loaded: {said}")


class CacheAware:
    """Takes the prefill worker that has the fewest tokens to compute before this sequence's first token: those ahead of
    it, and those of its own that the worker does not cache (the longest-prefix-and-queue choice of Mooncake's
    Conductor, PAPERS.md C.2, in tokens instead of predicted seconds).

    The decode worker is the one to which the fewest tokens must be shipped, among those that can hold the sequence and
    are about as idle as the idlest: a cached prefix saves bytes once, a crowded batch slows every token.
    """

    uses_prefixes = True

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        candidates = _candidates(request, view)
        pools = view.pools
        cached_by_prefill, cached_by_decode = request.cached_tokens_in(pools.prefill, pools.decode)
        num_sequences = pools.decode.num_sequences
        roomy = candidates.with_room()
        crowded = _CROWDED * int(num_sequences[roomy.least(num_sequences)]) + _CROWDED_SLACK
        idle = roomy.if_any(num_sequences <= crowded)
        decode = idle.least(num_sequences - (cached_by_decode << _SEQUENCE_BITS))
        ahead = _tokens_ahead(pools.prefill, request)
        senders = candidates.prefill_for(decode)
        prefill = senders.least(ahead - cached_by_prefill) if senders else None
        missing = request.num_tokens - int(cached_by_decode[decode])
        said = (
            f"{pools.decode.workers[decode].worker_id} lacks {missing} of {request.num_tokens} tokens,"
            f" has {num_sequences[decode]} sequences"
        )
        if prefill is not None:
            name = pools.prefill.workers[prefill].worker_id
            said = f"{name} caches {cached_by_prefill[prefill]} tokens and has {ahead[prefill]} ahead, {said}"
        return candidates.route(prefill, decode, f"cache aware: {said}")


_MAX_REASONS = 4  # of many links that fail alike, a few say it
_SEQUENCE_BITS = 24  # more sequences than a worker ever has: cached tokens come first, then fewer sequences
# A decode worker may have so many times the sequences of the idlest one, and a few more, and still be preferred for
# what it caches: its steps are longer by less than the sequence's share of them.
_CROWDED = 1.25
_CROWDED_SLACK = 2


def _prfaas(settings: RoutingSettings) -> RoutingPolicy:
    from cluster.prfaas_routing import PrfaasRouting  # here, because that file needs this one's nouns

    return PrfaasRouting(settings)


# name |-> factory. Routers take the name from ``router.policy``.
POLICIES: Mapping[str, Callable[[RoutingSettings], RoutingPolicy]] = {
    "round_robin": lambda _: RoundRobin(),
    "least_loaded": lambda _: LeastLoaded(),
    "cache_aware": lambda _: CacheAware(),
    "prfaas": _prfaas,
}


def make_policy(name: str, settings: RoutingSettings = RoutingSettings()) -> RoutingPolicy:
    """The policy of that name; ``InvalidConfig`` naming the known ones otherwise."""
    factory = POLICIES.get(name)
    if factory is None:
        raise InvalidConfig("router.policy", f"must be one of {', '.join(POLICIES)}, got {name!r}")
    return factory(settings)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Some of a pool's positions: how many, and which (None: all)."""

    count: int
    flags: Flags | None = None

    def __bool__(self) -> bool:
        return self.count > 0

    def if_any(self, flags: Flags) -> _Choice:
        """Those that have the flag; if none has it, all of these."""
        both = flags if self.flags is None else self.flags & flags
        count = int(np.count_nonzero(both))
        return self if count in (0, self.count) else _Choice(count, both)

    def least(self, values: Integers) -> int:
        """Where the value is least; of equal ones the first, hence the smallest worker id."""
        return int(values.argmin() if self.flags is None else np.where(self.flags, values, _FAR).argmin())

    def in_turn(self, ordinal: int) -> int:
        turn = ordinal % self.count
        return turn if self.flags is None else int(np.flatnonzero(self.flags)[turn])


_FAR = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Decode workers that may be chosen, at least one, and for each the prefill workers."""

    request: RouteRequest
    view: ClusterView
    decode: _Choice

    def with_room(self) -> _Choice:
        """Decode workers whose free pages can hold the known tokens and the next one; all, if none can."""
        return self.decode.if_any(self.view.pools.decode.free_tokens > self.request.num_tokens)

    def prefill_for(self, decode: int) -> _Choice:
        """Prefill workers that may be paired with that decode worker: not the excluded ones, if that leaves any."""
        pools = self.view.pools
        allowed = _Choice(len(pools.prefill))
        if pools.may_ship is not None:
            flags = pools.may_ship[:, decode]
            allowed = _Choice(int(np.count_nonzero(flags)), flags)
        return allowed.if_any(_fresh(self.request, pools.prefill)) if self.request.excluded else allowed

    def route(self, prefill: int | None, decode: int, reason: str) -> Route:
        """The route, its reason completed with whatever was not as it should be."""
        pools = self.view.pools
        receiver = pools.decode.workers[decode]
        sender = None if prefill is None else pools.prefill.workers[prefill]
        notes, fallback = [reason], ""
        if sender is None:
            fallback, why = why_no_prefill(self.view, pools.prefill.workers, receiver)
            notes.append(f"{receiver.worker_id} prefills: {why}")
        if self.request.excluded:
            notes += last_resorts(self.request, sender, receiver)
        return Route(prefill=sender, decode=receiver, reason="; ".join(notes), fallback=fallback)


def _candidates(request: RouteRequest, view: ClusterView) -> _Candidates:
    pools = view.pools
    if not len(pools.decode):
        raise NoRoute(f"no decode worker is ready ({census(view)})")
    everybody = _Choice(len(pools.decode))
    if pools.may_ship is None and not request.excluded:
        return _Candidates(request, view, everybody)
    fresh, fresh_prefill = _fresh(request, pools.decode), _fresh(request, pools.prefill)
    from_fresh, from_any = _shippable(pools, fresh_prefill), _shippable(pools, np.ones_like(fresh_prefill))
    # A decode worker that some prefill worker can ship to is better than one that would have to prefill alone.
    for choice in (fresh & from_fresh, fresh & from_any, fresh, from_any):
        if choice.any():
            return _Candidates(request, view, everybody.if_any(choice))
    return _Candidates(request, view, everybody)


def last_resorts(request: RouteRequest, prefill: WorkerView | None, decode: WorkerView) -> list[str]:
    """What is to be said of workers that failed the sequence before."""
    return [
        f"{worker.worker_id} failed this sequence before, but no other {worker.role} worker is left"
        for worker in (prefill, decode)
        if worker is not None and worker.engine_id in request.excluded
    ]


def why_no_prefill(
    view: ClusterView, workers: Sequence[WorkerView], decode: WorkerView, kind: str = "prefill"
) -> tuple[Fallback, str]:
    """Why none of ``workers``, which are ready, can ship to ``decode``: a word, and words. ``kind``: of workers."""
    if not workers:
        none = Fallback.NO_PRFAAS_WORKER if kind == "PrfaaS" else Fallback.NO_PREFILL_WORKER
        return none, f"no {kind} worker is ready"
    alike = [w for w in workers if w.model.fingerprint.compatible(decode.model.fingerprint)]
    if not alike:
        try:
            workers[0].model.fingerprint.require_compatible(decode.model.fingerprint)
        except Incompatible as error:
            said = f"no {kind} worker holds the same cache ({workers[0].worker_id}: {error.field} differs)"
            return Fallback.INCOMPATIBLE, said
    links = (view.link(w.worker_id, decode.worker_id) for w in alike)
    unusable = [f"{link.from_worker} to it: {link.reason}" for link in links if link is not None]
    return Fallback.LINK_DOWN, f"no link from a {kind} worker can be used ({'; '.join(unusable[:_MAX_REASONS])})"


def _shippable(pools: Pools, prefill: Flags) -> Flags:
    """Which decode workers can some worker of ``prefill`` ship K/V to?"""
    if pools.may_ship is None:
        return np.full(len(pools.decode), bool(prefill.any()))
    shippable: Flags = np.logical_or.reduce(pools.may_ship[prefill], axis=0)
    return shippable


def _fresh(request: RouteRequest, pool: WorkerPool) -> Flags:
    """Who did not fail this sequence before?"""
    fresh = np.ones(len(pool), np.bool_)
    position_of = pool.roster.position_of
    fresh[[position_of[engine] for engine in request.excluded if engine in position_of]] = False
    return fresh


def census(view: ClusterView) -> str:
    """How many workers there are, for an error message."""
    if not view.workers:
        return "no worker is registered"
    num_draining = sum(w.draining for w in view.workers)
    num_prefill = sum(w.role is Role.PREFILL for w in view.workers)
    num_decode = len(view.workers) - num_prefill
    return f"registered: {num_prefill} prefill, {num_decode} decode; {num_draining} of them draining"


def _tokens_ahead(pool: WorkerPool, request: RouteRequest) -> Integers:
    """Prompt tokens that each must compute first; an assigned sequence is taken to be as long as this one."""
    return pool.num_waiting_tokens + pool.num_assigned * request.num_tokens
