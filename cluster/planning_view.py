"""What does the planner see? A ``ClusterView`` and the measured demand, as the few numbers that a policy plans with.

    serving clusters   the gateway's own, and every other one with a decode worker: their workers are local
    PrfaaS clusters    the others: they only prefill, and reach the serving ones over links between clusters

Workers that differ are added up by their rates: N workers with seconds T1(l), T2(l), ... prefill as N alike ones with
T(l) = N / (1/T1(l) + 1/T2(l) + ...). Seconds are the live costs' (``ClusterView.costs``). A worker whose costs are not
known yet is taken as the others of its side, PrfaaS workers none of whose are known as the local ones: what they get
to prefill tells their own. Without costs of a local worker nothing is predicted; ``unknown`` says so. Pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.cluster_links import Capacity, ClusterPair, by_cluster_pair
from cluster.cost_model import ASSUMED_LINK_BYTES_PER_S, ComputeCost, CostView
from cluster.length_distribution import Curve, Numbers
from cluster.planning_policy import MeasuredDemand, PlanningView
from cluster.scaling_policy import PoolView, ScalingView
from cluster.throughput_model import Polynomial
from cluster.view import ClusterView, LinkView, WorkerView
from core.request import ClusterId, EngineId, Role

_UNKNOWN_CURVE = Polynomial((0.0,))
_ASSUMED_BATCH = 64  # sequences of a step, of a worker that did not say
_LEAST_S = 1e-9  # no work takes no time: rates stay finite


@dataclass(frozen=True, slots=True)
class Fleets:
    """The workers of a view by what they are to the planner; draining ones are none of it."""

    local: tuple[WorkerView, ...]  # of the serving clusters, in either role
    prfaas: tuple[WorkerView, ...]  # prefill workers of the PrfaaS clusters
    paths: tuple[ClusterPair, ...] = ()  # from a PrfaaS to a serving cluster, with a link that may be used


def fleets(view: ClusterView, own: ClusterId, capacity: Capacity) -> Fleets:
    """Who serves and who only prefills; ``own`` is the gateway's cluster, which serves even while it cannot decode."""
    live = view.ready(Role.PREFILL) + view.ready(Role.DECODE)
    serving = {own} | {worker.cluster_id for worker in live if worker.role is Role.DECODE}
    local = tuple(worker for worker in live if worker.cluster_id in serving)
    prfaas = tuple(worker for worker in live if worker.cluster_id not in serving)
    if not prfaas:
        return Fleets(local, prfaas)
    pairs = by_cluster_pair(view, capacity, {worker.cluster_id for worker in prfaas})
    return Fleets(local, prfaas, tuple(p for p in pairs if p.to_cluster in serving and p.num_usable))


def planning_view(
    found: Fleets,
    costs: CostView,
    demand: MeasuredDemand,
    *,
    becoming: Mapping[EngineId, Role],
    tpot_s: float | None,
    num_queued: int,
    now: float,
) -> PlanningView:
    """The fleet now. ``becoming``: local workers whose change of role is under way, and what they will be. ``tpot_s``:
    objective for a decode step, to which batches are kept. ``num_queued``: requests that wait in the gateway."""
    by_role = {role: [w for w in found.local if becoming.get(w.engine_id, w.role) is role] for role in Role}
    local, prfaas = _Costs.of(found.local, costs), _Costs.of(found.prfaas, costs)
    cached = demand.mean_cached_tokens
    batch, step_s, step_of = _decode(found.local, local, demand, tpot_s)
    uncached = 0.0 if demand.lengths is None else demand.lengths.mean_tokens
    local_s = local.prefill(cached)
    prfaas_s = prfaas.prefill(cached) if prfaas.known else local_s
    return PlanningView(
        at_s=now,
        num_prefill=len(by_role[Role.PREFILL]),
        num_decode=len(by_role[Role.DECODE]),
        num_changing=len(becoming),
        num_prfaas=len(found.prfaas),
        prfaas_prefill_s=prfaas_s,
        local_prefill_s=local_s,
        kv_bytes=Polynomial((0.0, float(_kv_bytes_per_token(found)))),
        max_batch_size=batch,
        decode_step_s=step_s,
        link_bytes_per_s=sum(_carries(pair) for pair in found.paths),
        link_utilisation=max((_utilisation(pair) for pair in found.paths), default=0.0),
        prfaas_queue_s=_queue_s(found.prfaas, prfaas_s, uncached),
        local_queue_s=_queue_s(by_role[Role.PREFILL], local_s, uncached),
        decode_queue=sum(_waiting_to_decode(worker, demand) for worker in by_role[Role.DECODE]),
        link_queue_s=max((pair.bytes_queued / max(1.0, _carries(pair)) for pair in found.paths), default=0.0),
        decode_step_of=step_of,
        num_queued=num_queued,
        tpot_s=tpot_s,
        unknown="" if local.known else "no costs are known yet",
        num_draining=sum(role is Role.PREFILL for role in becoming.values()),
    )


def scaling_view(
    found: Fleets, pools: Mapping[Role, PoolView], *, missed: Mapping[Role, int], ttft_s: float | None
) -> ScalingView:
    """The pools now. ``missed``: requests that were to miss an objective lately, by the role that is too slow for it.
    ``ttft_s``: the objective; None: there is none."""
    decode = [worker for worker in found.local if worker.role is Role.DECODE]
    sequences = sum(worker.load.num_running + worker.load.num_waiting for worker in decode)
    places = sum(worker.max_batch_size or _ASSUMED_BATCH for worker in decode)
    pages_used = sum(worker.pages_total - worker.load.pages_free for worker in decode)
    pages = sum(worker.pages_total for worker in decode)
    return ScalingView(
        pools=pools,
        decode_fullness=max(sequences / max(1, places), pages_used / max(1, pages)),
        num_running=sum(_num_sequences(worker) for worker in found.local),
        missed=missed,
        ttft_s=ttft_s,
    )


def _num_sequences(worker: WorkerView) -> int:
    """In a batch, in its queue, or with K/V on its way; as it says, or as this gateway knows if that is more."""
    load = worker.load
    return max(load.num_running + load.num_waiting + load.num_announced, worker.num_assigned)


# ---- links ----


def silent_links(view: ClusterView, found: Fleets, silent_s: float) -> tuple[LinkView, ...]:
    """One link of each path on which nothing moved for ``silent_s``: one that is tested (cluster/link_tester.py), from
    a worker that prefills to one that decodes. Others have carried pulled pages, or are of roles that workers had."""
    role_of = {worker.worker_id: worker.role for worker in view.workers}
    quiet = {
        (pair.from_cluster, pair.to_cluster) for pair in found.paths if pair.age_s is None or pair.age_s >= silent_s
    }
    chosen: dict[tuple[ClusterId, ClusterId], LinkView] = {}
    for link in view.links.values():
        ends, roles = (link.from_cluster, link.to_cluster), (role_of.get(link.from_worker), role_of.get(link.to_worker))
        if link.usable and ends in quiet and roles == (Role.PREFILL, Role.DECODE):
            chosen.setdefault(ends, link)
    return tuple(chosen.values())


def _carries(pair: ClusterPair) -> float:
    return ASSUMED_LINK_BYTES_PER_S if pair.carries is None else pair.carries


def _utilisation(pair: ClusterPair) -> float:
    """Share of what it carries now, not of what it was built for: a link that has narrowed is full earlier."""
    return min(1.0, pair.throughput / max(1.0, _carries(pair)))


# ---- seconds ----


@dataclass(frozen=True, slots=True)
class _Costs:
    """Costs of a group of workers, each profile with the number of workers that have it."""

    known: tuple[tuple[ComputeCost, int], ...]

    @classmethod
    def of(cls, workers: Sequence[WorkerView], costs: CostView) -> _Costs:
        counts = Counter(worker.profile for worker in workers)
        return cls(tuple((costs.profiles[name], n) for name, n in sorted(counts.items()) if name in costs.profiles))

    def prefill(self, cached: float) -> Curve:
        """Seconds of one of them for so many uncached tokens behind ``cached`` ones."""
        curves = [(_prefill_curve(cost, cached), n) for cost, n in self.known]
        if not curves:
            return _UNKNOWN_CURVE
        if len(curves) == 1:
            return curves[0][0]
        total = sum(n for _, n in curves)

        def mixed(tokens: Numbers) -> Numbers:
            rates = (n / np.maximum(curve(tokens), _LEAST_S) for curve, n in curves)
            return np.asarray(total / sum(rates, np.zeros_like(tokens, dtype=float)), dtype=float)

        return mixed


def _prefill_curve(cost: ComputeCost, cached: float) -> Curve:
    """``ComputeCost.prefill`` of many lengths at once: a k + b n + c n (cached + n/2) in k steps."""
    constant, each, pair = cost.prefill_cost.coefficients
    of_one_step = Polynomial((max(constant, _LEAST_S), each + pair * cached, pair / 2))
    if math.isinf(cost.step_tokens):
        return of_one_step

    def seconds(tokens: Numbers) -> Numbers:
        further_steps = np.maximum(0.0, np.ceil(np.asarray(tokens) / cost.step_tokens) - 1)
        return np.asarray(of_one_step(tokens) + constant * further_steps, dtype=float)

    return seconds


def _decode(
    workers: Sequence[WorkerView], costs: _Costs, demand: MeasuredDemand, tpot_s: float | None
) -> tuple[float, float, Curve | None]:
    """The largest batch of one decode worker, the seconds of its step, and those of any batch.

    The batch is what the engine, its pages and the objective allow, at the mean context. Any local worker may decode.
    """
    if not costs.known or not workers:
        return float(_ASSUMED_BATCH), _LEAST_S, None
    context = _mean_context(demand)
    longest = max(1.0, context + demand.mean_output_tokens / 2)
    most = max(1.0, sum(_most_sequences(worker, longest) for worker in workers) / len(workers))
    parts = [(*_step_line(cost, context), n) for cost, n in costs.known]
    total = sum(n for *_, n in parts)
    batches = [max(1.0, min(most, _batch_within(tpot_s, fixed, each))) for fixed, each, _ in parts]
    rate = sum(
        n * batch / max(_LEAST_S, fixed + each * batch) for batch, (fixed, each, n) in zip(batches, parts, strict=True)
    )
    mean_batch = sum(n * batch for batch, (*_, n) in zip(batches, parts, strict=True)) / total
    fixed = sum(n * fixed for fixed, _, n in parts) / total
    each = sum(n * each for _, each, n in parts) / total
    return mean_batch, total * mean_batch / rate, Polynomial((max(fixed, _LEAST_S), each))


def _most_sequences(worker: WorkerView, longest: float) -> float:
    """Sequences of so many tokens that it can have in a step."""
    held = worker.pages_total * worker.model.fingerprint.page_size / longest
    return min(float(worker.max_batch_size or _ASSUMED_BATCH), held)


def _step_line(cost: ComputeCost, context: float) -> tuple[float, float]:
    """A step's seconds: fixed, and of each sequence with ``context`` tokens."""
    fixed, each, token = cost.decode_cost.coefficients
    return fixed, each + token * context


def _batch_within(tpot_s: float | None, fixed: float, each: float) -> float:
    """Sequences whose step keeps to the objective."""
    if tpot_s is None or each <= 0:
        return float("inf")
    return (tpot_s - fixed) / each


def _mean_context(demand: MeasuredDemand) -> float:
    """Tokens of context of a decoding sequence: its prompt and half of its answer."""
    uncached = 0.0 if demand.lengths is None else demand.lengths.mean_tokens
    return uncached + demand.mean_cached_tokens + demand.mean_output_tokens / 2


def _kv_bytes_per_token(found: Fleets) -> int:
    return max((worker.model.kv_bytes_per_token for worker in (*found.local, *found.prfaas)), default=0)


# ---- queues ----


def _queue_s(workers: Sequence[WorkerView], prefill_s: Curve, uncached: float) -> float:
    """Seconds of prefill that wait before one of them, on average; prompts are taken to be of mean length."""
    waiting = sum(worker.load.num_waiting_tokens for worker in workers)
    if not waiting or not uncached:
        return 0.0
    return waiting / len(workers) * float(prefill_s(np.asarray(uncached))) / uncached


def _waiting_to_decode(worker: WorkerView, demand: MeasuredDemand) -> int:
    """Sequences in its queue, and those whose K/V waits for pages that it has not."""
    needed = _mean_context(demand)
    full = worker.load.pages_free * worker.model.fingerprint.page_size < needed
    return worker.load.num_waiting + (worker.load.num_sessions if full else 0)
