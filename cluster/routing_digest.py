"""What of a view does not depend on the request? Everything PrfaasRouting needs of it, as arrays with a place for each
ready worker.

    places   PD clusters first, then PrfaaS clusters (those that have prefill workers in the view and no decode worker
             at all); in a cluster prefill workers, then decode workers; then those that are alike; then by id. So each
             cluster, each of its two roles and each pool is a slice
    pool     workers of one cluster and role that are alike in everything but their load: model, device, cache

``RoutingDigest.follow`` is the one function that reads a view. What has not changed since the last view (the same
``WorkerView`` objects, which Membership keeps for that) is not looked at again; a new worker, a changed role, a lease
that ran out or new costs make everything anew. So a digest is a function of its view alone, whatever it followed.

    queue_s       seconds until a worker could begin with one more prompt
    step_s        a prefill step's constant part; of a decode worker with what the decoding batch adds to every step
    token_s       a prompt token's part, and half of that of a pair of tokens that attend: a prompt of L tokens of which
    half_pair_s   k are cached takes step_s * ceil((L - k) * per_step) + (L - k) * (token_s + half_pair_s * (L + k))
    batch         sequences of a decode worker, those counted whose K/V is still to come
    empty         tokens that a prefill worker's pages can take without pushing out what is cached in them
    reuse         the share of its prompts' tokens that it has found in its cache so far; 0 of decode workers
    load_t0_s     to load n tokens from a lower cache tier takes load_t0_s + n * load_token_s, behind what is being
    load_token_s  loaded from there; infinite of a worker that has no such tier. What comes from the disk goes through
                  host memory, whose seconds come on top
    room          tokens that its pages can take, those taken off that were promised to somebody
    tpot_base     a decode step with one sequence more, which has L tokens now and generates O, takes
    tpot_context  tpot_base + tpot_context * L + tpot_growth * O: every sequence of the batch grows by a token a step,
    tpot_growth   so by O / 2 on average over the time of this one. Of more sequences than a batch holds it is the mean
                  time between two tokens of one, its wait for a place spread over them
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from cluster.cost_model import ComputeCost
from cluster.prefix_index import PrefixMatch
from cluster.view import ClusterView, WorkerView
from core.cache_tiers import LOWER_TIERS, Tier
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, EngineId, Role

Floats = NDArray[np.float64]

_MANY = 1e300  # tokens: finite, so that any number of them is one step at least
_NOWHERE = -1  # the place of a slot whose worker is not ready
_FEW_BITS = 12  # of a bitmap: up to so many are walked one by one, which is faster than unpacking all


@dataclass(eq=False)
class Pool:
    """Workers that differ in their load alone. ``bits``: their slots in the prefix index; ``lower_bits``: those of each
    lower tier, empty if none of them has any."""

    fingerprint: CacheFingerprint
    kv_bytes: int  # of a token
    num_layers: int
    step_tokens: float
    costs: ComputeCost
    bits: int = 0
    lower_bits: dict[Tier, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.page_size = self.fingerprint.page_size
        self.step_s, self.token_s, pair_s = self.costs.prefill_cost.coefficients
        self.half_pair_s = pair_s / 2
        self.decode_s, self.sequence_s, self.context_s = self.costs.decode_cost.coefficients


@dataclass(eq=False, slots=True)
class ClusterPlaces:
    """One cluster's ready workers."""

    cluster_id: ClusterId
    prefill: slice
    decode: slice
    prefill_pools: tuple[Pool, ...]
    decode_pools: tuple[Pool, ...]

    @property
    def pools(self) -> tuple[Pool, ...]:
        return self.prefill_pools + self.decode_pools


class RoutingDigest:
    """The digest of one view, and then of the next."""

    view: ClusterView
    workers: list[WorkerView]  # place |-> worker
    pool_of: list[Pool]  # place |-> its pool
    pd: list[ClusterPlaces]
    prfaas: list[ClusterPlaces]
    clusters: dict[ClusterId, ClusterPlaces]  # both
    pools_by_page_size: dict[int, list[Pool]]
    _first_expiry_at: float  # no ready worker's lease runs out before
    _spare: tuple[float, Floats, float] | None  # for which mean output, what and the least; None: something changed
    _slots: Mapping[EngineId, int] | None  # that ``Pool.bits`` are of

    def __init__(self, view: ClusterView) -> None:
        self._build(view)

    @property
    def num_decode(self) -> int:
        """Ready decode workers."""
        return sum(cluster.decode.stop - cluster.decode.start for cluster in self.pd)

    def follow(self, view: ClusterView) -> None:
        """Become the digest of ``view``."""
        known = self.view
        if view is known:
            return
        if view.costs is not known.costs or len(view.workers) != len(known.workers) or view.at < known.at:
            self._build(view)
            return
        for position in (view.identities != known.identities).nonzero()[0].tolist():
            worker = view.workers[position]
            place = self._place_of.get(worker.engine_id)
            is_ready = not worker.draining and _alive(worker, view)
            if is_ready != (place is not None) or not _keeps_place(worker, known.workers[position]):
                self._build(view)
                return
            if place is not None:
                self.workers[place] = worker
                self._fill(place, worker)
                self._spare = None
        self.view = view
        if self._first_expiry_at <= view.at:
            self._first_expiry_at = min((w.lease_expires_at for w in self.workers), default=math.inf)
            if self._first_expiry_at <= view.at:
                self._build(view)

    def place_of(self, engine_id: EngineId) -> int | None:
        """The place of a ready engine."""
        return self._place_of.get(engine_id)

    def spare(self, mean_output: float) -> tuple[Floats, float]:
        """place |-> tokens of room when the sequences that are there have grown by half of what one generates; and the
        least of them. Prefill workers have no end of it."""
        known = self._spare
        if known is None or known[0] != mean_output:
            spare = self.room - self.batch * (mean_output / 2)
            least = float(spare[spare.argmin()]) if len(spare) else math.inf
            known = self._spare = (mean_output, spare, least)
        return known[1:]

    def know_slots(self, match: PrefixMatch) -> None:
        """Who has which slot in the prefix index: ``Pool.bits`` are of these from now on, and ``places``."""
        slots = match.slots
        if slots is self._slots:
            return
        self._slots = slots
        lower = [slot for own in match.lower_slots.values() for slot in own.values()]
        self._place_of_slot = np.full(max((*slots.values(), *lower), default=-1) + 1, _NOWHERE, dtype=np.intp)
        for pool in self.pool_of:
            pool.bits = 0
            pool.lower_bits = {}
        for engine_id, slot in slots.items():
            place = self._place_of.get(engine_id)
            if place is not None:
                self._place_of_slot[slot] = place
                self.pool_of[place].bits |= 1 << slot
        for engine_id, own in match.lower_slots.items():
            place = self._place_of.get(engine_id)
            if place is not None:
                bits = self.pool_of[place].lower_bits
                for tier, slot in own.items():
                    self._place_of_slot[slot] = place
                    bits[tier] = bits.get(tier, 0) | 1 << slot

    def places(self, holders: int) -> NDArray[np.intp]:
        """The places of some slots, all of ready workers: a bitmap that is part of pools' ``bits``."""
        if holders.bit_count() <= _FEW_BITS:
            return self._place_of_slot[list(_bits(holders))]
        size = len(self._place_of_slot)
        packed = np.frombuffer(holders.to_bytes(-(-size // 8), "little"), dtype=np.uint8)
        return self._place_of_slot[np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)]

    # ---- inside ----

    def _build(self, view: ClusterView) -> None:
        decodes = {w.cluster_id for w in view.workers if w.role is Role.DECODE}
        ready = sorted(
            (w for w in view.workers if not w.draining and _alive(w, view)),
            key=lambda w: (w.cluster_id not in decodes, w.cluster_id, *_kind(w), w.worker_id),
        )
        self.view = view
        self.workers = ready
        self.pool_of = []
        self._place_of = {w.engine_id: place for place, w in enumerate(ready)}
        self.clusters = {}
        self.pools_by_page_size = {}
        for cluster_id, members in groupby(ready, key=lambda w: w.cluster_id):
            self.clusters[cluster_id] = self._add_cluster(cluster_id, list(members))
        self.pd = [cluster for cluster_id, cluster in self.clusters.items() if cluster_id in decodes]
        self.prfaas = [cluster for cluster_id, cluster in self.clusters.items() if cluster_id not in decodes]
        self._first_expiry_at = min((w.lease_expires_at for w in ready), default=math.inf)
        self.queue_s, self.step_s = _zeros(ready), _zeros(ready)
        self.token_s, self.half_pair_s, self.per_step = _zeros(ready), _zeros(ready), _zeros(ready)
        self.empty, self.reuse = _zeros(ready), _zeros(ready)
        self.load_t0_s = {tier: _zeros(ready) + math.inf for tier in LOWER_TIERS}
        self.load_token_s = {tier: _zeros(ready) + math.inf for tier in LOWER_TIERS}
        self.batch, self.room = _zeros(ready), _zeros(ready)
        self.tpot_base, self.tpot_context, self.tpot_growth = _zeros(ready), _zeros(ready), _zeros(ready)
        for place, worker in enumerate(ready):
            self._begin(place, worker)
            self._fill(place, worker)
        self._spare = None
        self._slots = None
        self._place_of_slot = np.empty(0, dtype=np.intp)

    def _add_cluster(self, cluster_id: ClusterId, members: list[WorkerView]) -> ClusterPlaces:
        """Workers of one cluster, in order, take the next places."""
        start = len(self.pool_of)
        middle = start + sum(w.role is Role.PREFILL for w in members)
        pools: dict[Role, list[Pool]] = {role: [] for role in Role}
        for _, alike in groupby(members, key=_kind):
            first, *others = alike
            costs = self.view.costs.compute(first.profile)
            model = first.model
            step_tokens = min(costs.step_tokens, _MANY)
            pool = Pool(model.fingerprint, model.kv_bytes_per_token, model.num_layers, step_tokens, costs)
            pools[first.role].append(pool)
            self.pools_by_page_size.setdefault(model.fingerprint.page_size, []).append(pool)
            self.pool_of += [pool] * (1 + len(others))
        return ClusterPlaces(
            cluster_id,
            slice(start, middle),
            slice(middle, len(self.pool_of)),
            tuple(pools[Role.PREFILL]),
            tuple(pools[Role.DECODE]),
        )

    def _begin(self, place: int, worker: WorkerView) -> None:
        """What of a worker stays from report to report."""
        pool = self.pool_of[place]
        self.token_s[place] = pool.token_s
        self.half_pair_s[place] = pool.half_pair_s
        self.per_step[place] = 1 / pool.step_tokens
        if worker.role is Role.DECODE:
            self.tpot_context[place] = pool.context_s
        else:
            self.step_s[place] = pool.step_s
            self.room[place] = math.inf  # nobody asks for it, and it must not look full

    def _fill(self, place: int, worker: WorkerView) -> None:
        """What changes."""
        load, pool, step_s = worker.load, self.pool_of[place], self.pool_of[place].step_s
        num_prompts = load.num_waiting + worker.num_unreported
        if worker.lease_expires_at < self._first_expiry_at:
            self._first_expiry_at = worker.lease_expires_at
        if worker.role is Role.DECODE:
            promised = load.num_announced_tokens + worker.unreported_kv_tokens
            batch = num_prompts + load.num_running + load.num_announced
            pages_taken = worker.pages_total - load.pages_free
            context_s = pool.context_s * ((pages_taken * pool.page_size if pages_taken > 0 else 0) + promised)
            step_s += pool.sequence_s * load.num_running + context_s
            self.step_s[place] = step_s
            self.batch[place] = batch
            self.room[place] = load.pages_free * pool.page_size - promised
            base_s = pool.decode_s
            if worker.max_batch_size is not None and batch >= worker.max_batch_size:
                # Those that a full batch leaves out wait for a place. All in all it is as if all took turns, a batch at
                # a time: what a step costs whatever it holds is paid for every turn.
                base_s *= (batch + 1) / worker.max_batch_size
            self.tpot_base[place] = base_s + pool.sequence_s * (batch + 1) + context_s
            self.tpot_growth[place] = pool.context_s * (batch + 1) / 2
        else:
            num_prompts += load.num_running
            self.empty[place] = (load.pages_free - load.pages_cached) * pool.page_size
            self.reuse[place] = load.cached_tokens / load.prompt_tokens if load.prompt_tokens else 0.0
        for state in load.tiers:
            if state.load_bytes_per_s > 0:
                self.load_t0_s[state.tier][place] = state.load_s(state.queued_bytes) or state.load_t0_s
                self.load_token_s[state.tier][place] = pool.kv_bytes / state.load_bytes_per_s
        queue_s, ahead = 0.0, load.num_waiting_tokens + worker.unreported_tokens
        if ahead:
            mean = ahead / (num_prompts or 1)  # lengths are not reported; equal ones attend least
            queue_s = step_s * math.ceil(ahead / pool.step_tokens) + ahead * (pool.token_s + pool.half_pair_s * mean)
        self.queue_s[place] = queue_s


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """Who caches how much of a prompt, of which at least one token is always computed.

    ``levels``: for each pool that caches any on devices, (tokens, who: a bitmap of slots), most tokens first.
    ``on_device``: place |-> tokens, None if nobody has any. ``within``: of each lower tier in which somebody has any,
    place |-> tokens in it or a better one; 0 of who has none there.
    """

    levels: dict[Pool, list[tuple[int, int]]]
    on_device: Floats | None
    within: dict[Tier, Floats]


def cached_tokens(digest: RoutingDigest, matches: Mapping[int, PrefixMatch], num_tokens: int) -> CachedTokens:
    """Of a prompt of ``num_tokens``."""
    levels: dict[Pool, list[tuple[int, int]]] = {}
    array: Floats | None = None
    within: dict[Tier, Floats] = {}
    for page_size, match in matches.items():
        if not match.levels:
            continue
        digest.know_slots(match)  # the same of all that have some: there is one prefix index
        pools = digest.pools_by_page_size.get(page_size, ())
        for level in match.levels:
            tokens, in_all = min(level.num_pages * page_size, num_tokens - 1), 0
            for pool in pools:
                if holders := level.holders & pool.bits:
                    in_all |= holders
                    levels.setdefault(pool, []).append((tokens, holders))
                for tier, bits in pool.lower_bits.items():
                    if below := level.holders & bits:
                        if tier not in within:
                            within[tier] = _zeros(digest.workers)
                        within[tier][digest.places(below)] = tokens
            if in_all:
                if array is None:
                    array = _zeros(digest.workers)
                array[digest.places(in_all)] = tokens
    return CachedTokens(levels, array, within)


def _zeros(workers: list[WorkerView]) -> Floats:
    return np.zeros(len(workers))


def _kind(worker: WorkerView) -> tuple[object, ...]:
    """Of workers in one pool all of this is equal; in an order that two workers can be compared by."""
    model, fingerprint = worker.model, worker.model.fingerprint
    return (
        worker.role is Role.DECODE,
        worker.profile,
        fingerprint.model,
        fingerprint.revision,
        fingerprint.dtype,
        fingerprint.layout,
        fingerprint.page_size,
        model.kv_bytes_per_token,
        model.num_layers,
    )


def _keeps_place(worker: WorkerView, known: WorkerView) -> bool:
    """Has nothing changed that decides about places and pools?"""
    return (
        worker.engine_id == known.engine_id
        and worker.draining == known.draining
        and worker.role is known.role
        and worker.cluster_id == known.cluster_id
        and worker.profile == known.profile
        and (worker.model is known.model or worker.model == known.model)
    )


def _alive(worker: WorkerView, view: ClusterView) -> bool:
    return worker.lease_expires_at > view.at


def _bits(bitmap: int) -> Iterator[int]:
    """Positions of the set bits, lowest first."""
    while bitmap:
        low = bitmap & -bitmap
        yield low.bit_length() - 1
        bitmap ^= low
