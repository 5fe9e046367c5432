"""Where is this prompt computed, and where does it decode? PrfaaS's routing (PAPERS.md A.8), in predicted seconds.

The decision, drawn and worked through in docs/routing.md:

1. Which decode workers can hold it? First those that nothing speaks against; then those with room for the prompt but
   not for what all are expected to generate; then full ones; last those that failed it before.
2. For each cluster with decode workers (a PD cluster): does the prompt stay, or go to a PrfaaS cluster? It goes if more
   tokens of it must be computed than the planner's threshold. While bandwidth is scarce each cluster's caches count for
   itself; while it is abundant the best cache of any cluster does, and may be fetched.
3. For each pair of a prefill worker in that pool and a decode worker of the cluster, in seconds:

       time to first token  = queue + pull + prefill
       cost                 = time to first token + exposed + shipping + suffered + decode worker's queue
                              + later tokens * step + displaced

   pull      cached pages come from the worker that holds most of the prefix, if it holds more than ``fetch_ratio``
             times what this one does (Mooncake's rule, PAPERS.md C.2) and that is predicted to beat computing them
   exposed   what is left of the transfer when prefill ends: K/V streams layer by layer while prefill computes, so at
             least the last layer of the last step. It delays the second token, not the first, which prefill sends
   shipping  a share of the seconds for which the link is kept from others
   displaced the prompt's K/V pushes cached pages out of a prefill worker that has no empty ones: the seconds to compute
             as many tokens again, times the share of prompt tokens that this worker has found in its cache so far

   A worker whose prefix goes on in a lower tier of its own cache (host memory, disk) loads that first, if that is
   predicted to beat computing it: ``prefill`` is then the seconds of both. Other workers' lower tiers count for
   nothing, for pages are fetched from devices alone.

4. The best *colocated* route, on which the decode worker prefills: its queue and prefill, slowed by its own batch, and
   what each sequence that decodes there suffers meanwhile. It is always predicted; ``colocate`` says if it may win.

Not all pairs are compared. Links between the same two clusters are about alike, so only those pairs are compared with
their links that are cheapest before: a few decode workers of each PD cluster, each with a few prefill workers of each
cluster, passing over those between which nothing may be shipped.

Pure: what does not depend on the request is digested once for each view (routing_digest.py) and kept, which changes no
answer. Equal costs go to the smaller worker ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.routing_digest import ClusterPlaces, Floats, Pool, RoutingDigest, cached_tokens
from cluster.routing_policy import (
    Fallback,
    RouteRequest,
    RoutingSettings,
    census,
    last_resorts,
    why_no_prefill,
)
from cluster.view import ClusterView, Forecast, PagePull, Route, WorkerView
from core.cache_tiers import LOWER_TIERS, Tier
from core.errors import NoRoute
from core.request import ClusterId

# Sequences that are taken to join a decode worker while it computes a prompt, beside those that it has: it is there to
# decode, so keeping it from that costs something even in a moment in which it idles.
JOINING = 1.0
# Seconds that a second of a link is worth: others wait for the link too, and of two routes that are equal for this
# request the one that ships less is better for them.
SHIPPING_WEIGHT = 0.1
COMPARED = 2  # decode workers of a PD cluster, and prefill workers of each cluster, that are compared with their links

# What speaks against a decode worker; a sum of them is its rank. (_TIGHT is what numpy's True is as a number.)
_TIGHT, _FULL, _FAILED = 1, 2, 4
_RANKS = (
    (0, _TIGHT),
    (_FULL, _FULL | _TIGHT),
    (_FAILED, _FAILED | _TIGHT),
    (_FAILED | _FULL, _FAILED | _FULL | _TIGHT),
)


class PrfaasRouting:
    """The policy ``prfaas``."""

    uses_prefixes = True

    def __init__(self, settings: RoutingSettings = RoutingSettings()) -> None:
        self._settings = settings
        self._digest: RoutingDigest | None = None  # of the view that was asked about last

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        """The cheapest route, with what it is expected to cost; ``NoRoute`` without a decode worker."""
        digest = self._digest
        if digest is None:
            digest = self._digest = RoutingDigest(view)
        else:
            digest.follow(view)
        if not digest.num_decode:
            raise NoRoute(f"no decode worker is ready ({census(view)})")
        return _Decision(request, view, digest, self._settings).route()


class _Source(NamedTuple):
    """Of whom pages may be fetched, and how many tokens at most: whole pages."""

    place: int
    num_tokens: int


class _Prefill(NamedTuple):
    """One prefill worker as it would serve this request."""

    place: int
    ttft_s: float  # queue, pull and prefill
    prefill_s: float  # with what is loaded from its lower tiers first
    last_share: float  # of its K/V that cannot leave before prefill ends: the last layer of the last step
    displaced_s: float  # that others are expected to compute again
    pull: PagePull | None = None
    pull_s: float = 0.0
    pull_bytes: int = 0
    load_s: float = 0.0  # of ``prefill_s``: nothing is computed meanwhile


class _Pair(NamedTuple):
    """A prefill and a decode worker."""

    cost: float
    prefill: _Prefill
    decode: int
    num_bytes: int
    exposed_s: float


class _Colocated(NamedTuple):
    """A decode worker that does both."""

    cost: float
    place: int


class Reloads(NamedTuple):
    """What workers would load from lower tiers of their caches, by place."""

    num_tokens: Floats  # of the prompt that are on the device then
    load_s: Floats  # 0 of who loads nothing


class _Offloading(NamedTuple):
    """Does the prompt go from a PD cluster to PrfaaS clusters, and by which count of tokens?"""

    goes: bool
    num_uncached: int
    mode: str


class _Decision:
    """One request on one view. Arrays have a place for each ready worker, as in the digest."""

    def __init__(
        self, request: RouteRequest, view: ClusterView, digest: RoutingDigest, settings: RoutingSettings
    ) -> None:
        self._request = request
        self._view = view
        self._digest = digest
        self._settings = settings
        self._num_tokens = request.num_tokens
        self._num_later = max(0, request.num_output - 1)  # tokens after the first
        self._failed = {place for e in request.excluded if (place := digest.place_of(e)) is not None}
        cached = cached_tokens(digest, request.matches, request.num_tokens)
        self._levels, self._cached_tokens = cached.levels, cached.on_device
        self._reloads: Reloads | None = None  # None: nobody would load from a lower tier
        self._ranks = self._rank_all()
        self._prefill_s = self._seconds_of_prefill(self._cached_tokens)
        if cached.within:
            self._reloads = self._choose_reloads(cached.within)
        self._first_s: Floats = self._prefill_s + digest.queue_s
        self._tpot_s = self._seconds_per_token()
        self._later_s: Floats = self._tpot_s * self._num_later  # all tokens but the first
        self._prefills: dict[int, _Prefill] = {}
        self._sources: dict[ClusterId, _Source | None] = {}

    def route(self) -> Route:
        """The cheapest route of the least rank that has one."""
        for alike in _RANKS:
            for find in (self._best, self._alone):
                for rank in alike:
                    route = find(rank)
                    if route is not None:
                        return route
        raise AssertionError("every decode worker has a rank")

    # ---- 1: which decode workers ----

    def _rank_all(self) -> NDArray[np.int8] | None:
        """place |-> what speaks against it as a decode worker; None: nothing speaks against any."""
        digest, request = self._digest, self._request
        needed = self._num_tokens + request.num_output
        spare, least = digest.spare(request.mean_output)
        if least >= needed and not self._failed:
            return None
        ranks = (spare < needed).view(np.int8)  # _TIGHT or 0
        full = digest.room <= self._num_tokens
        if full.any():
            ranks[full] += _FULL
        if self._failed:
            ranks[list(self._failed)] += _FAILED
        return ranks

    def _of_rank(self, costs: Floats, places: slice, rank: int) -> Floats:
        """``costs`` of ``places``, infinite where the worker has another rank. They are written to."""
        if self._ranks is not None:
            np.putmask(costs, self._ranks[places] != rank, math.inf)
        elif rank:
            costs[:] = math.inf
        return costs

    # ---- 2: which prefill pool ----

    def _offloading(self, pd: ClusterPlaces) -> _Offloading:
        """PAPERS.md A.8, with caches that can be fetched counted as the cluster's own."""
        offload, pulls = self._view.offload, self._settings.pulls
        if offload.abundant and pulls:
            cached, mode = self._most_cached(tuple(self._levels)), "abundant"
        else:
            cached, mode = self._most_cached(pd.pools if pulls else pd.prefill_pools), "scarce"
        if self._reloads is not None and pd.prefill.start < pd.prefill.stop:
            cached = max(cached, int(self._reloads.num_tokens[pd.prefill].max()))
        num_uncached = self._num_tokens - cached
        return _Offloading(num_uncached > offload.threshold_tokens, num_uncached, mode)

    def _most_cached(self, pools: Sequence[Pool]) -> int:
        if not self._levels:
            return 0
        return max((levels[0][0] for pool in pools if (levels := self._levels.get(pool))), default=0)

    def _cached(self, place: int) -> int:
        """Tokens at the prompt's beginning that the worker holds."""
        return 0 if self._cached_tokens is None else int(self._cached_tokens[place])

    # ---- 3: which pair ----

    def _best(self, rank: int) -> Route | None:
        """The cheapest route on decode workers of that rank; None if no prefill worker can ship to any of them."""
        if self._settings.colocate == "always":
            return None
        colocated = self._colocated(rank)
        if colocated is None:
            return None  # there is no decode worker of that rank
        for avoided in (self._failed, set[int]()) if self._failed else (self._failed,):
            found: tuple[_Pair, _Offloading, Fallback | None, str] | None = None
            for pd in self._digest.pd:
                offloading = self._offloading(pd)
                pair, fallback, why = self._in_cluster(pd, offloading, rank, avoided)
                if pair is not None and (found is None or self._key(pair) < self._key(found[0])):
                    found = (pair, offloading, fallback, why)
            if found is None:
                continue
            if self._settings.colocate == "auto" and colocated.cost < found[0].cost:
                lead = f"shipping is not worth it, {colocated.cost:.3f} s in all against {found[0].cost:.3f} s"
                return self._colocated_route(colocated, lead, "")
            return self._pair_route(*found, colocated)
        return None

    def _key(self, pair: _Pair) -> tuple[float, str, str]:
        workers = self._digest.workers
        return pair.cost, workers[pair.decode].worker_id, workers[pair.prefill.place].worker_id

    def _in_cluster(
        self, pd: ClusterPlaces, offloading: _Offloading, rank: int, avoided: set[int]
    ) -> tuple[_Pair | None, Fallback | None, str]:
        """The best pair for the cluster's decode workers, and if it is not in the pool that it should be in, why."""
        if not offloading.goes:
            return self._cheapest((pd,), pd, rank, avoided), None, ""
        pair = self._cheapest(self._digest.prfaas, pd, rank, avoided)
        if pair is not None:
            return pair, None, ""
        pair = self._cheapest((pd,), pd, rank, avoided)
        if pair is None:
            return None, None, ""
        workers = [w for cluster in self._digest.prfaas for w in self._digest.workers[cluster.prefill]]
        return pair, *why_no_prefill(self._view, workers, self._digest.workers[pair.decode], "PrfaaS")

    def _cheapest(
        self, clusters: Sequence[ClusterPlaces], pd: ClusterPlaces, rank: int, avoided: set[int]
    ) -> _Pair | None:
        """The cheapest pair of a prefill worker in ``clusters`` and a decode worker of ``pd``, of those that are
        compared: the cheapest before links are looked at, between which something may be shipped. None: there is none.
        """
        orders = [
            self._prefill_order(cluster, avoided)
            for cluster in clusters
            if cluster.prefill.start < cluster.prefill.stop
        ]
        fastest = min((first for order in orders if (first := order.get(0)) is not None), key=_cost, default=None)
        if fastest is None or pd.decode.start == pd.decode.stop:
            return None
        best: _Pair | None = None
        num_decodes = 0
        for decode, _ in self._decode_order(pd, fastest[0], rank):
            decode_s = self._decode_s(decode)
            is_usable = False
            for order in orders:
                num_usable = 0
                for place, least_s in order:
                    if best is not None and least_s + decode_s > best.cost:
                        is_usable = True  # nothing that comes later here is cheaper than what there is
                        break
                    pair = self._pair(place, decode, decode_s)
                    if pair is None:
                        continue
                    is_usable = True
                    if best is None or pair.cost < best.cost or self._key(pair) < self._key(best):
                        best = pair
                    num_usable += 1
                    if num_usable == COMPARED:
                        break
            num_decodes += is_usable
            if num_decodes == COMPARED:
                break
        return best

    def _decode_order(self, pd: ClusterPlaces, prefill: int, rank: int) -> _Ascending:
        """The cluster's decode workers of that rank, as they would cost behind ``prefill`` on a link that is as the
        two clusters' links are."""
        digest, places = self._digest, pd.decode
        costs: Floats = self._later_s[places] + digest.queue_s[places]
        if self._cached_tokens is not None and any(pool in self._levels for pool in pd.decode_pools):
            ends = (digest.workers[prefill].cluster_id, pd.cluster_id)
            token_s = self._view.costs.transfer(ends, 1e9) * 1e-9 * pd.decode_pools[0].kv_bytes
            transfer_s = (self._num_tokens - self._cached_tokens[places]) * token_s
            costs += SHIPPING_WEIGHT * transfer_s
            costs += np.maximum(transfer_s - float(self._prefill_s[prefill]), 0.0)
        return _Ascending(self._of_rank(costs, places, rank), places.start)

    def _prefill_order(self, cluster: ClusterPlaces, avoided: set[int]) -> _Ascending:
        """The cluster's prefill workers, by the seconds to the first token that each needs at least."""
        digest, places = self._digest, cluster.prefill
        source = self._source(cluster)
        if source is None:
            least_s = self._first_s[places].copy()
        else:
            uncached = self._num_tokens - source.num_tokens
            fetched_s = min(self._seconds(pool, source.num_tokens, uncached) for pool in cluster.prefill_pools)
            least_s = np.minimum(self._first_s[places], digest.queue_s[places] + fetched_s)
        least_s += self._all_displaced_s(places)
        for place in avoided:
            if places.start <= place < places.stop:
                least_s[place - places.start] = math.inf
        return _Ascending(least_s, places.start)

    def _pair(self, prefill: int, decode: int, decode_s: float) -> _Pair | None:
        """The two as they would serve this request; None if nothing may be shipped between them."""
        digest, view = self._digest, self._view
        source, target = digest.workers[prefill], digest.workers[decode]
        pool, others = digest.pool_of[prefill], digest.pool_of[decode]
        if pool.fingerprint is not others.fingerprint and not pool.fingerprint.compatible(others.fingerprint):
            return None
        link = view.links.get((source.worker_id, target.worker_id))
        if link is not None and not link.usable:
            return None
        one = self._prefills.get(prefill)
        if one is None:
            one = self._prefills[prefill] = self._prefill(prefill)
        num_bytes = (self._num_tokens - self._cached(decode)) * others.kv_bytes
        ends = (source.cluster_id, target.cluster_id)
        transfer_s = view.costs.transfer(ends, num_bytes, 0, None if link is None else link.estimate)
        exposed_s = max(one.last_share * transfer_s, transfer_s - one.prefill_s)
        # What a worker that has become a prefill worker decodes still, waits as beside a colocated prompt.
        suffered_s = (one.prefill_s - one.load_s) * source.load.num_other_role
        cost = one.ttft_s + exposed_s + SHIPPING_WEIGHT * transfer_s + suffered_s + one.displaced_s + decode_s
        return _Pair(cost, one, decode, num_bytes, exposed_s)

    def _prefill(self, place: int) -> _Prefill:
        """With its own cache, or with pages that it fetches first, whichever is faster."""
        digest, cached = self._digest, self._cached(place)
        worker, pool = digest.workers[place], digest.pool_of[place]
        last_share = min(pool.step_tokens, self._num_tokens) / self._num_tokens / pool.num_layers
        ttft_s = float(self._first_s[place])
        displaced_s = self._displaced_s(place)
        own = _Prefill(
            place, ttft_s, float(self._prefill_s[place]), last_share, displaced_s, load_s=self._load_s(place)
        )
        source = self._source(digest.clusters[worker.cluster_id])
        if source is None or cached * self._settings.fetch_ratio >= source.num_tokens:
            return own
        prefill_s = self._seconds(pool, source.num_tokens, self._num_tokens - source.num_tokens)
        fetched_s = float(digest.queue_s[place]) + prefill_s
        if fetched_s >= ttft_s or digest.pool_of[source.place].fingerprint != pool.fingerprint:
            return own
        holder = digest.workers[source.place]
        link = self._view.links.get((holder.worker_id, worker.worker_id))
        if link is not None and not link.usable:
            return own
        num_bytes = (source.num_tokens - cached) * pool.kv_bytes
        ends = (holder.cluster_id, worker.cluster_id)
        pull_s = self._view.costs.transfer(ends, num_bytes, 0, None if link is None else link.estimate)
        if fetched_s + pull_s >= ttft_s:
            return own
        pull = PagePull(holder, source.num_tokens)
        return _Prefill(place, fetched_s + pull_s, prefill_s, last_share, displaced_s, pull, pull_s, num_bytes)

    def _source(self, cluster: ClusterPlaces) -> _Source | None:
        """Of whom the cluster's prefill workers may fetch: the ready worker that caches the longest prefix, in the
        cluster or while bandwidth is abundant in any; the least busy of those that cache as much. None: of nobody."""
        if not self._levels or not self._settings.pulls:
            return None
        if cluster.cluster_id not in self._sources:
            pools = tuple(self._levels) if self._view.offload.abundant else cluster.pools
            self._sources[cluster.cluster_id] = self._find_source(pools)
        return self._sources[cluster.cluster_id]

    def _find_source(self, pools: Sequence[Pool]) -> _Source | None:
        digest = self._digest
        best: tuple[tuple[int, float, str], _Source] | None = None
        for pool in pools:
            for tokens, holders in self._levels.get(pool, ()):
                places = digest.places(holders)
                queues = digest.queue_s[places]
                for failed in self._failed:
                    queues[places == failed] = math.inf
                index = int(queues.argmin())
                if queues[index] == math.inf:
                    continue  # all of them failed this sequence
                num_tokens = tokens // pool.fingerprint.page_size * pool.fingerprint.page_size
                place = int(places[index])
                key = (-num_tokens, float(queues[index]), digest.workers[place].worker_id)
                if num_tokens and (best is None or key < best[0]):
                    best = (key, _Source(place, num_tokens))
                break  # further holders hold less
        return None if best is None else best[1]

    # ---- 4: one worker alone ----

    def _colocated(self, rank: int) -> _Colocated | None:
        """The best decode worker of that rank to do all of it; None if there is none."""
        digest, best = self._digest, None
        for pd in digest.pd:
            places = pd.decode
            if places.start == places.stop:
                continue
            costs = digest.batch[places] + JOINING
            costs *= self._prefill_s[places] if self._reloads is None else self._computing_s(self._reloads, places)
            costs += self._first_s[places]
            costs += self._later_s[places]
            costs = self._of_rank(costs, places, rank)
            index = int(costs.argmin())
            found = _Colocated(float(costs[index]), places.start + index)
            if found.cost < math.inf and (best is None or self._alone_key(found) < self._alone_key(best)):
                best = found
        return best

    def _alone_key(self, one: _Colocated) -> tuple[float, str]:
        return one.cost, self._digest.workers[one.place].worker_id

    def _alone(self, rank: int) -> Route | None:
        """The decode worker prefills: it was asked for, or there is no other way."""
        colocated = self._colocated(rank)
        if colocated is None:
            return None
        if self._settings.colocate == "always":
            return self._colocated_route(colocated, "always colocated", "")
        digest, decode = self._digest, self._digest.workers[colocated.place]
        prefills = digest.workers[digest.clusters[decode.cluster_id].prefill]
        fallback, why = why_no_prefill(self._view, prefills, decode)
        return self._colocated_route(colocated, f"{decode.worker_id} prefills: {why}", fallback)

    # ---- what it comes to ----

    def _pair_route(
        self, pair: _Pair, offloading: _Offloading, fallback: Fallback | None, why: str, colocated: _Colocated
    ) -> Route:
        digest = self._digest
        one, decode = pair.prefill, digest.workers[pair.decode]
        prefill = digest.workers[one.place]
        where = "local" if prefill.cluster_id == decode.cluster_id else "offloaded"  # as Route.place says
        bound = "more than" if offloading.goes else "at most"
        fetched = ""
        if one.pull is not None:
            fetched = f"{one.pull_s:.3f} s pull of {one.pull.num_tokens} tokens from {one.pull.source.worker_id}, "
        displaced = f", {one.displaced_s:.3f} s displaced" if one.displaced_s else ""
        # Mean time of a later token: the wait for the K/V is spread over all of them.
        tpot_s = float(self._tpot_s[pair.decode]) + pair.exposed_s / max(1, self._num_later)
        alone_s = float(self._first_s[colocated.place])
        reason = (
            f"{where}: {offloading.num_uncached} of {self._num_tokens} tokens uncached, {bound} "
            f"{self._view.offload.threshold_tokens:g} ({offloading.mode}); {prefill.worker_id}: "
            f"{digest.queue_s[one.place]:.3f} s queue, {fetched}{one.prefill_s:.3f} s prefill"
            f"{'' if one.pull is not None else self._loading(one.place)}{displaced}; "
            f"{decode.worker_id}: {tpot_s * 1e3:.1f} ms a token, {pair.num_bytes / 1e6:.1f} MB shipped, "
            f"{pair.exposed_s:.3f} s exposed; "
            f"alone {digest.workers[colocated.place].worker_id} would take {alone_s:.3f} s"
        )
        return Route(
            prefill=prefill,
            decode=decode,
            reason=self._completed(reason, why, prefill, decode),
            pull=one.pull,
            expected=Forecast(
                ttft_s=one.ttft_s,
                tpot_s=tpot_s,
                bytes_shipped=pair.num_bytes,
                bytes_pulled=one.pull_bytes,
                colocated_ttft_s=alone_s,
                colocated_tpot_s=float(self._tpot_s[colocated.place]),
            ),
            fallback=fallback or "",
        )

    def _colocated_route(self, chosen: _Colocated, lead: str, fallback: str) -> Route:
        digest, place = self._digest, chosen.place
        decode = digest.workers[place]
        ttft_s, tpot_s = float(self._first_s[place]), float(self._tpot_s[place])
        reason = (
            f"colocated: {lead}; {decode.worker_id}: {self._num_tokens - self._cached(place)} of {self._num_tokens} "
            f"tokens uncached, {digest.queue_s[place]:.3f} s queue, {self._prefill_s[place]:.3f} s prefill"
            f"{self._loading(place)} beside "
            f"{digest.batch[place]:.0f} sequences, {tpot_s * 1e3:.1f} ms a token"
        )
        return Route(
            prefill=None,
            decode=decode,
            reason=self._completed(reason, "", None, decode),
            expected=Forecast(ttft_s, tpot_s, 0, 0, ttft_s, tpot_s),
            fallback=fallback,
        )

    def _completed(self, reason: str, why: str, prefill: WorkerView | None, decode: WorkerView) -> str:
        """The reason, with whatever was not as it should be."""
        notes = [why] if why else []
        if self._request.excluded:
            notes += last_resorts(self._request, prefill, decode)
        return "; ".join([reason, *notes]) if notes else reason

    # ---- seconds ----

    def _choose_reloads(self, within: Mapping[Tier, Floats]) -> Reloads | None:
        """What each worker would load from its lower tiers; ``_prefill_s`` is with that from now on. The candidates are
        those of the workers' own decision (engine/reload_choice.py)."""
        digest = self._digest
        device = self._cached_tokens if self._cached_tokens is not None else np.zeros(len(digest.workers))
        best_s, num_tokens, load_s = self._prefill_s, device.copy(), np.zeros(len(digest.workers))
        reached, so_far_s = device, np.zeros(len(digest.workers))
        for tier in LOWER_TIERS:
            if tier not in within:
                continue
            depth = np.maximum(reached, within[tier])
            further = depth - reached
            for passed in (Tier.HOST,) if tier is Tier.HOST else (Tier.DISK, Tier.HOST):
                so_far_s = so_far_s + _where_any(further, digest.load_t0_s[passed], digest.load_token_s[passed])
            seconds = so_far_s + self._seconds_of_prefill(depth)
            better = (further > 0) & (seconds < best_s)
            best_s = np.where(better, seconds, best_s)
            num_tokens[better], load_s[better] = depth[better], so_far_s[better]
            reached = depth
        if not load_s.any():
            return None
        self._prefill_s = best_s
        return Reloads(num_tokens, load_s)

    def _load_s(self, place: int) -> float:
        return 0.0 if self._reloads is None else float(self._reloads.load_s[place])

    def _computing_s(self, reloads: Reloads, places: slice) -> Floats:
        seconds: Floats = self._prefill_s[places] - reloads.load_s[places]
        return seconds

    def _loading(self, place: int) -> str:
        """For the reason: how much of the prefill is loading."""
        if not (load_s := self._load_s(place)):
            return ""
        assert self._reloads is not None, "there is something to load"
        num_tokens = int(self._reloads.num_tokens[place]) - self._cached(place)
        return f" (with {load_s:.3f} s to load {num_tokens} tokens from lower tiers)"

    def _seconds_of_prefill(self, cached: Floats | None) -> Floats:
        """place |-> seconds to compute all but what is cached there."""
        digest, num_tokens = self._digest, self._num_tokens
        if cached is None:
            seconds = digest.half_pair_s * num_tokens
            seconds += digest.token_s
            seconds *= num_tokens
            num_steps = digest.per_step * num_tokens
        else:
            uncached = num_tokens - cached
            seconds = cached + num_tokens
            seconds *= digest.half_pair_s
            seconds += digest.token_s
            seconds *= uncached
            num_steps = uncached
            num_steps *= digest.per_step
        np.ceil(num_steps, out=num_steps)
        num_steps *= digest.step_s
        seconds += num_steps
        return seconds

    def _displaced_s(self, place: int) -> float:
        """Seconds to compute again what the prompt's K/V pushes out there and somebody comes back for, which is taken
        for part of a prompt like this one. Fetched or computed, the K/V needs the same pages."""
        digest = self._digest
        num_lost = self._num_tokens - self._cached(place) - float(digest.empty[place])
        if num_lost <= 0:
            return 0.0
        pool = digest.pool_of[place]
        return num_lost * float(digest.reuse[place]) * (pool.token_s + pool.half_pair_s * self._num_tokens)

    def _all_displaced_s(self, places: slice) -> Floats:
        """Likewise, of several workers."""
        digest, num_tokens = self._digest, self._num_tokens
        seconds: Floats = num_tokens - digest.empty[places]
        if self._cached_tokens is not None:
            seconds -= self._cached_tokens[places]
        np.maximum(seconds, 0.0, out=seconds)
        seconds *= digest.reuse[places]
        seconds *= digest.half_pair_s[places] * num_tokens + digest.token_s[places]
        return seconds

    def _seconds(self, pool: Pool, cached: int, uncached: int) -> float:
        """Likewise, on a prefill worker of ``pool`` that caches so many."""
        num_steps = math.ceil(uncached / pool.step_tokens)
        return pool.step_s * num_steps + uncached * (pool.token_s + pool.half_pair_s * (2 * cached + uncached))

    def _seconds_per_token(self) -> Floats:
        """place |-> seconds of a decode step with this request in it."""
        digest = self._digest
        seconds: Floats = digest.tpot_growth * self._request.num_output
        seconds += digest.tpot_base
        seconds += digest.tpot_context * self._num_tokens
        return seconds

    def _decode_s(self, place: int) -> float:
        """All tokens but the first; what the worker prefills for others goes first, in the same steps."""
        return float(self._later_s[place]) + float(self._digest.queue_s[place])


class _Ascending:
    """(place, cost) from the cheapest on, found as far as they are asked for; equal ones by place. What has an infinite
    cost is not in it."""

    def __init__(self, costs: Floats, offset: int) -> None:
        """``costs`` is written to."""
        self._left = costs
        self._offset = offset
        self._found: list[tuple[int, float]] = []

    def get(self, index: int) -> tuple[int, float] | None:
        """The one at that position; None: there are not so many."""
        found, left = self._found, self._left
        while len(found) <= index:
            least = int(left.argmin())
            cost = float(left[least])
            if cost == math.inf:
                return None
            left[least] = math.inf
            found.append((self._offset + least, cost))
        return found[index]

    def __iter__(self) -> Iterator[tuple[int, float]]:
        index = 0
        while (item := self.get(index)) is not None:
            yield item
            index += 1


def _where_any(num_tokens: Floats, t0_s: Floats, token_s: Floats) -> Floats:
    """place |-> seconds to load so many tokens; 0 of none, whoever cannot load."""
    seconds = np.zeros(len(num_tokens))
    some = num_tokens > 0
    seconds[some] = t0_s[some] + token_s[some] * num_tokens[some]
    return seconds


def _cost(item: tuple[int, float]) -> float:
    return item[1]
