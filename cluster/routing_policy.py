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

from cluster.prefix_index import PrefixMatch
from cluster.view import ClusterView, Route, WorkerView
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
    ordinal: how many routes this gateway asked for before this one.
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
        found = candidates(request, view)
        decode = found.decode[request.ordinal % len(found.decode)]
        pool = found.prefill_for(decode)
        prefill = pool[request.ordinal % len(pool)] if pool else None
        return found.route(prefill, decode, f"round robin, turn {request.ordinal}")


class LeastLoaded:
    """Takes the prefill worker with the fewest tokens ahead of the request and the decode worker with the fewest
    sequences among those whose free pages can hold it.

    A worker's own report lags by one Watch message, so what this gateway has assigned since is added to it: that
    counts some sequences twice, on every worker alike.
    """

    uses_prefixes = False

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        found = candidates(request, view)
        decode = min(found.decode, key=lambda w: (not _fits(w, request), _num_sequences(w), w.worker_id))
        pool = found.prefill_for(decode)
        prefill = min(pool, key=lambda w: (_tokens_ahead(w, request), w.worker_id)) if pool else None
        return found.route(prefill, decode, f"least loaded: {_loads(prefill, decode, request)}")


class CacheAware:
    """Takes the prefill worker that has the fewest tokens to compute before this sequence's first token: those ahead of
    it, and those of its own that the worker does not cache (the longest-prefix-and-queue choice of Mooncake's
    Conductor, PAPERS.md C.2, in tokens instead of predicted seconds).

    The decode worker is the one to which the fewest tokens must be shipped, among those that can hold the sequence and
    are about as idle as the idlest: a cached prefix saves bytes once, a crowded batch slows every token.
    """

    uses_prefixes = True

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        found = candidates(request, view)
        decode = self._decode(request, found.decode)
        pool = found.prefill_for(decode)
        prefill = min(pool, key=lambda w: (_tokens_to_first(w, request), w.worker_id)) if pool else None
        missing = request.num_tokens - request.cached_tokens(decode)
        num_sequences = _num_sequences(decode)
        said = f"{decode.worker_id} lacks {missing} of {request.num_tokens} tokens, has {num_sequences} sequences"
        if prefill is not None:
            ahead, cached = _tokens_ahead(prefill, request), request.cached_tokens(prefill)
            said = f"{prefill.worker_id} caches {cached} tokens and has {ahead} ahead, {said}"
        return found.route(prefill, decode, f"cache aware: {said}")

    def _decode(self, request: RouteRequest, workers: Sequence[WorkerView]) -> WorkerView:
        pool = [w for w in workers if _fits(w, request)] or list(workers)
        crowded = _CROWDED * min(map(_num_sequences, pool)) + _CROWDED_SLACK
        return min(
            (w for w in pool if _num_sequences(w) <= crowded),
            key=lambda w: (-request.cached_tokens(w), _num_sequences(w), w.worker_id),
        )


_MAX_REASONS = 4  # of many links that fail alike, a few say it
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
class Candidates:
    """Workers that may be chosen. ``decode`` is never empty; ``prefill`` holds every ready one, excluded or not."""

    request: RouteRequest
    view: ClusterView
    decode: tuple[WorkerView, ...]
    prefill: tuple[WorkerView, ...]

    def prefill_for(self, decode: WorkerView) -> tuple[WorkerView, ...]:
        """Prefill workers that may be paired with ``decode``."""
        return _avoid(tuple(w for w in self.prefill if _may_pair(self.view, w, decode)), self.request.excluded)

    def route(self, prefill: WorkerView | None, decode: WorkerView, reason: str) -> Route:
        """The route, its reason completed with whatever was not as it should be."""
        notes, fallback = [reason], ""
        if prefill is None:
            fallback, why = why_no_prefill(self.view, self.prefill, decode)
            notes.append(f"{decode.worker_id} prefills: {why}")
        notes += last_resorts(self.request, prefill, decode)
        return Route(prefill=prefill, decode=decode, reason="; ".join(notes), fallback=fallback)


def candidates(request: RouteRequest, view: ClusterView) -> Candidates:
    """The workers that a policy chooses among; ``NoRoute`` if no decode worker is ready."""
    decode, prefill = view.ready(Role.DECODE), view.ready(Role.PREFILL)
    if not decode:
        raise NoRoute(f"no decode worker is ready ({census(view)})")
    fresh = tuple(w for w in decode if w.engine_id not in request.excluded)
    fresh_prefill = tuple(w for w in prefill if w.engine_id not in request.excluded)
    # A decode worker that some prefill worker can ship to is better than one that would have to prefill alone.
    pool = (
        _shippable(view, fresh, fresh_prefill)
        or _shippable(view, fresh, prefill)
        or fresh
        or _shippable(view, decode, prefill)
        or decode
    )
    return Candidates(request=request, view=view, decode=pool, prefill=prefill)


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


def _shippable(
    view: ClusterView, decode: tuple[WorkerView, ...], prefill: tuple[WorkerView, ...]
) -> tuple[WorkerView, ...]:
    """Those of ``decode`` that some worker of ``prefill`` can ship K/V to."""
    return tuple(d for d in decode if any(_may_pair(view, p, d) for p in prefill))


def _may_pair(view: ClusterView, prefill: WorkerView, decode: WorkerView) -> bool:
    """May the K/V of one be put into the pool of the other, and does the link between them work?"""
    return prefill.model.fingerprint.compatible(decode.model.fingerprint) and view.can_ship(prefill, decode)


def _avoid(workers: tuple[WorkerView, ...], excluded: frozenset[EngineId]) -> tuple[WorkerView, ...]:
    """``workers`` without the excluded ones, or all of them if that leaves none."""
    return tuple(w for w in workers if w.engine_id not in excluded) or workers


def census(view: ClusterView) -> str:
    """How many workers there are, for an error message."""
    if not view.workers:
        return "no worker is registered"
    num_draining = sum(w.draining for w in view.workers)
    num_prefill = sum(w.role is Role.PREFILL for w in view.workers)
    num_decode = len(view.workers) - num_prefill
    return f"registered: {num_prefill} prefill, {num_decode} decode; {num_draining} of them draining"


def _fits(worker: WorkerView, request: RouteRequest) -> bool:
    """Can the free pages hold the known tokens and the next one?"""
    return worker.load.pages_free * worker.model.fingerprint.page_size > request.num_tokens


def _num_sequences(worker: WorkerView) -> int:
    return worker.load.num_running + worker.load.num_waiting + worker.num_assigned


def _tokens_ahead(worker: WorkerView, request: RouteRequest) -> int:
    """Prompt tokens that the worker must compute first; an assigned sequence is taken to be as long as this one."""
    return worker.load.num_waiting_tokens + worker.num_assigned * request.num_tokens


def _tokens_to_first(worker: WorkerView, request: RouteRequest) -> int:
    """Tokens that the worker must compute before the sequence's first one."""
    return _tokens_ahead(worker, request) + request.num_tokens - request.cached_tokens(worker)


def _loads(prefill: WorkerView | None, decode: WorkerView, request: RouteRequest) -> str:
    parts: Sequence[str] = (
        *([f"{prefill.worker_id} has {_tokens_ahead(prefill, request)} tokens ahead"] if prefill else []),
        f"{decode.worker_id} has {_num_sequences(decode)} sequences and {decode.load.pages_free} free pages",
    )
    return ", ".join(parts)
