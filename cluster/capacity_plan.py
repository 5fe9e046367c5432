"""What should a fleet look like, what does it give, and what would it give otherwise? The plan behind ``prfaas plan``.

    plan          best threshold and roles (throughput_model.py), latencies and goodput (latency_model.py)
    homogeneous   all GPUs of the serving cluster's kind, prefill and decode apart, nothing offloaded
    naive         every prompt to the PrfaaS clusters, every local GPU decodes
    colocated     the same GPUs, each instance prefilling and decoding what it gets
    changes       one more instance in each cluster, 10 Gbit/s more on each link: planned again

Pure: a planning document and a demand in, a frozen ``CapacityPlan`` out, every number with its unit in its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from cluster.catalogue import Catalogue
from cluster.colocation import colocated_rate
from cluster.latency_model import Latency, LatencySlo, goodput_rps, latency
from cluster.planned_fleet import GBPS, Demand, PlannedFleet, Pool, plan_fleet
from cluster.planning_config import PlanConfig
from cluster.throughput_model import (
    Fleet,
    OperatingPoint,
    best_operating_point,
    egress_bytes_per_s,
    idle_ttft,
    operating_point,
)

MORE_GBPS = 10.0
_SHARE_WITHOUT_SLO = 0.8  # of the throughput: the rate at which latencies are told when nothing else says one
PERCENTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class LinkUse:
    """What one link carries at the plan's throughput."""

    name: str
    gbps: float
    egress_gbps: float

    @property
    def utilisation(self) -> float:
        """Share of the link."""
        return self.egress_gbps / self.gbps


@dataclass(frozen=True)
class Alternative:
    """Another way to use as many GPUs."""

    name: str
    point: OperatingPoint
    ttft_mean_s: float
    ttft_p90_s: float


@dataclass(frozen=True)
class Colocated:
    """The same GPUs without disaggregation: a prefill holds up the steps of the sequences beside it.

    ``tpot_s`` is a step over the share of time that prefill leaves; ``goodput_rps`` the rate at which it still
    meets the TPOT SLO (the throughput if there is none).
    """

    throughput_rps: float
    tpot_s: float
    goodput_rps: float
    assumed: tuple[str, ...]  # clusters whose decode is not known, taken as serving-cluster hardware


@dataclass(frozen=True)
class Change:
    """What more hardware would buy."""

    what: str
    throughput_rps: float
    gain_rps: float
    gain_per_unit_rps: float  # per GPU, or per Gbit/s


@dataclass(frozen=True)
class Cost:
    """What the fleet costs at the plan's throughput, in the prices' currency."""

    per_hour: float
    per_million_tokens: float  # prompt and answer tokens together
    per_million_output_tokens: float


@dataclass(frozen=True)
class CapacityPlan:
    """The answer."""

    planned: PlannedFleet
    demand: Demand
    point: OperatingPoint
    links: tuple[LinkUse, ...]
    ttft_mean_s: float  # idle, the whole transfer after prefill: the paper's convention
    ttft_p90_s: float
    goodput_rps: float
    rate_rps: float  # at which the latencies are
    latency: Latency
    attainment: float  # at rate_rps
    homogeneous: Alternative
    naive: Alternative | None  # None without a PrfaaS cluster
    colocated: Colocated
    changes: tuple[Change, ...]
    cost: Cost | None  # None if a price is missing
    inferred: tuple[tuple[str, str], ...]  # key |-> why


def make_plan(config: PlanConfig, catalogue: Catalogue, demand: Demand) -> CapacityPlan:
    """The best plan for the document; ``InvalidConfig`` where the document cannot be planned."""
    planned = plan_fleet(config, catalogue, demand)
    fleet = planned.fleet
    point = best_operating_point(fleet)
    slo = LatencySlo(config.slo.ttft_s, config.slo.tpot_s, config.slo.attainment)
    idle = idle_ttft(fleet, point)
    goodput = goodput_rps(fleet, point, slo)
    # Without a TTFT limit the goodput is where queues begin to grow without end: no latency to be told there.
    settled = goodput if slo.ttft_s is not None and goodput else _SHARE_WITHOUT_SLO * point.throughput_rps
    rate = settled if demand.rate_rps is None else demand.rate_rps
    seen = latency(fleet, point, rate)
    return CapacityPlan(
        planned=planned,
        demand=demand,
        point=point,
        links=_links(config, fleet, point),
        ttft_mean_s=idle.mean_s,
        ttft_p90_s=idle.quantile_s(0.9),
        goodput_rps=goodput,
        rate_rps=rate,
        latency=seen,
        attainment=seen.attainment(slo),
        homogeneous=_homogeneous(planned),
        naive=_alternative("naive", fleet, operating_point(fleet, 0, 0.0)) if fleet.prfaas else None,
        colocated=_colocated(planned, slo.tpot_s),
        changes=tuple(_changes(config, planned, catalogue, demand, point.throughput_rps)),
        cost=_cost(planned, demand, point),
        inferred=tuple(config.inferred.items()),
    )


def _links(config: PlanConfig, fleet: Fleet, point: OperatingPoint) -> tuple[LinkUse, ...]:
    sent = egress_bytes_per_s(fleet, point, point.throughput_rps)
    named = (config.link_from(cluster.name) for cluster in fleet.prfaas)
    return tuple(
        LinkUse(name, link.gbps, num_bytes / GBPS) for (name, link), num_bytes in zip(named, sent, strict=True)
    )


def _alternative(name: str, fleet: Fleet, point: OperatingPoint) -> Alternative:
    idle = idle_ttft(fleet, point)
    return Alternative(name, point, idle.mean_s, idle.quantile_s(0.9))


def _homogeneous(planned: PlannedFleet) -> Alternative:
    fleet = replace(planned.fleet, prfaas=(), num_local_gpus=planned.num_gpus)
    return _alternative("homogeneous", fleet, best_operating_point(fleet))


# ---- colocated ----


def _colocated(planned: PlannedFleet, tpot_s: float | None) -> Colocated:
    """Each pool by itself, requests spread in proportion to what it takes; the slowest pool's TPOT is told."""
    pools = [(pool, pool if pool.decode is not None else planned.serving) for pool in planned.pools]
    at_most = [_colocated_rate(planned.fleet, hardware, None) for _, hardware in pools]
    within = [_colocated_rate(planned.fleet, hardware, tpot_s) for _, hardware in pools]
    counts = [pool.num_gpus / hardware.gpus_per_decode for pool, hardware in pools]
    return Colocated(
        throughput_rps=sum(n * rate for n, (rate, _) in zip(counts, at_most, strict=True)),
        tpot_s=max(tpot for _, tpot in at_most),
        goodput_rps=sum(n * rate for n, (rate, _) in zip(counts, within, strict=True)),
        assumed=tuple(pool.name for pool, hardware in pools if hardware is not pool),
    )


def _colocated_rate(fleet: Fleet, pool: Pool, tpot_s: float | None) -> tuple[float, float]:
    """The highest rate of one instance, and its TPOT then."""
    assert pool.decode is not None, "the pool's decode is known"
    prefill_s = fleet.lengths.mean_of(pool.prefill_s) * pool.gpus_per_prefill / pool.gpus_per_decode
    step_of = np.vectorize(pool.decode.step_of, otypes=[float])
    return colocated_rate(prefill_s, fleet.mean_output_tokens, step_of, pool.decode.max_batch_size, tpot_s)


# ---- what more would buy ----


def _changes(
    config: PlanConfig, planned: PlannedFleet, catalogue: Catalogue, demand: Demand, now_rps: float
) -> Iterator[Change]:
    for pool in planned.pools:
        cluster = config.clusters[pool.name]
        size = max(pool.gpus_per_prefill, pool.gpus_per_decode)
        sizes = {pool.name: replace(cluster, num_gpus=cluster.num_gpus + size)}
        more = replace(config, clusters=config.clusters | sizes)
        what = f"one more instance ({size} GPUs) in {pool.name}" if size > 1 else f"one more GPU in {pool.name}"
        yield _change(what, more, catalogue, demand, now_rps, size)
    for name, link in config.links.items():
        more = replace(config, links=config.links | {name: replace(link, gbps=link.gbps + MORE_GBPS)})
        yield _change(f"{MORE_GBPS:.0f} Gbit/s more on {name}", more, catalogue, demand, now_rps, MORE_GBPS)


def _change(
    what: str, config: PlanConfig, catalogue: Catalogue, demand: Demand, now_rps: float, units: float
) -> Change:
    throughput = best_operating_point(plan_fleet(config, catalogue, demand).fleet).throughput_rps
    gain = throughput - now_rps
    return Change(what, throughput, gain, gain / units)


def _cost(planned: PlannedFleet, demand: Demand, point: OperatingPoint) -> Cost | None:
    per_hour = 0.0
    for pool in planned.pools:
        if pool.price_per_gpu_hour is None:
            return None
        per_hour += pool.num_gpus * pool.price_per_gpu_hour
    requests = point.throughput_rps * 3600
    tokens = requests * (demand.mean_input_tokens + demand.mean_output_tokens)
    return Cost(per_hour, per_hour / tokens * 1e6, per_hour / (requests * demand.mean_output_tokens) * 1e6)


# ---- curves, for plots ----


def throughput_by_threshold(plan: CapacityPlan, num_points: int = 200) -> list[tuple[float, float]]:
    """(threshold, throughput) with the plan's roles (PrfaaS figure 5b)."""
    longest = float(plan.demand.lengths.tokens[-1])
    shortest = max(1.0, float(plan.demand.lengths.tokens[0]))
    thresholds = np.unique(np.geomspace(shortest, longest, num_points)) if plan.planned.fleet.prfaas else np.zeros(0)
    fleet, roles = plan.planned.fleet, plan.point.num_prefill
    return [(float(t), operating_point(fleet, roles, float(t)).throughput_rps) for t in thresholds]


def throughput_by_roles(plan: CapacityPlan) -> list[tuple[int, float]]:
    """(N_p, throughput) with the plan's threshold (PrfaaS figure 5a)."""
    fleet = plan.planned.fleet
    first = 0 if fleet.prfaas else 1
    threshold = plan.point.threshold_tokens
    return [(n, operating_point(fleet, n, threshold).throughput_rps) for n in range(first, fleet.most_prefill + 1)]


def throughput_by_link(plan: CapacityPlan, num_points: int = 40) -> list[tuple[float, OperatingPoint]]:
    """(Gbit/s of all links together, best point), the links scaled together from a 50th to twice what they are."""
    fleet, total = plan.planned.fleet, sum(link.gbps for link in plan.links)
    found = []
    for factor in np.geomspace(0.02, 2, num_points):
        scaled = (replace(c, egress_bytes_per_s=c.egress_bytes_per_s * float(factor)) for c in fleet.prfaas)
        found.append((total * float(factor), best_operating_point(replace(fleet, prfaas=tuple(scaled)))))
    return found
