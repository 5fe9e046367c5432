"""Who prefills and who decodes at the start, if the configuration leaves that open? The planner's offline half.

``planner.initial: search`` takes the workers of both pools together and splits them for the section ``plan``: its
workload, SLO and hardware. For one cluster with an SLO that is DistServe's algorithm 1 with the parallelism that the
workers have (placement_search.py): the goodput of one prefill and of one decode instance under TTFT and TPOT, each
simulated, and as many of each as sustain most together. With PrfaaS clusters, or without an SLO, it is the paper's
grid: the split of highest goodput (latency_model.py), or throughput. From there on the live planner goes.

Pure but for a trace that the section names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.catalogue import load_catalogue
from cluster.config import INITIAL_CONFIGURED, PoolConfig, ServiceConfig
from cluster.latency_model import LatencySlo, goodput_rps
from cluster.placement_search import (
    Objective,
    Parallelism,
    Request,
    Search,
    Workload,
    decode_goodput_rps,
    prefill_goodput_rps,
)
from cluster.plan_document import SECTION, section_values
from cluster.planned_fleet import Demand, PlannedFleet, Pool, demand_of, plan_fleet, read_trace_of
from cluster.planning_config import PlanConfig, SloPlan, read_plan_config
from cluster.planning_policy import Roles
from cluster.throughput_model import operating_point
from core.errors import InvalidConfig

_ALIKE = (
    "tensor_parallel",
    "num_cpus",
    "num_gpus",
    "resources",
    "engine",
)  # what a worker of either pool must have, to be of the other
_SAMPLES = 300  # requests of a simulated run, as in DistServe's simulator
_STEPS = 100  # of the rates that are tried

Goodput = Callable[[int], float]  # requests/s by the number of prefill workers, the others decoding


@dataclass(frozen=True, slots=True)
class InitialRoles:
    """The split that was found, and why."""

    roles: Roles
    reason: str


def with_initial_roles(config: ServiceConfig, folder: Path) -> tuple[ServiceConfig, str]:
    """The service with the counts of its pools as they start, and what to say of it (nothing if they are configured).

    ``folder``: to which the section's trace and catalogue are relative. Raises ``InvalidConfig`` if the pools differ in
    more than their counts, or if the section ``plan`` does not say enough.
    """
    if config.planner.initial == INITIAL_CONFIGURED:
        return config, ""
    _require_alike(config)
    try:
        found = _search(config, folder)
    except InvalidConfig as error:
        raise InvalidConfig(f"{SECTION}.{error.key}", error.message) from error
    roles = found.roles
    started = replace(
        config,
        prefill=replace(config.prefill, count=roles.num_prefill),
        decode=replace(config.decode, count=roles.num_decode),
    )
    return started, f"starting with {roles.num_prefill} prefill and {roles.num_decode} decode workers: {found.reason}"


def _require_alike(config: ServiceConfig) -> None:
    for name in _ALIKE:
        prefill, decode = (getattr(pool, name) for pool in (config.prefill, config.decode))
        if prefill != decode:
            message = f"must be that of prefill ({prefill!r}) with planner.initial: search, got {decode!r}"
            raise InvalidConfig(f"decode.{name}", message)
    for role in config.elastic_roles:
        bounds = f"{config.pool(role).least} to {config.pool(role).most}"
        message = f"must be null, as min_replicas must, with planner.initial: search, which sets count; got {bounds}"
        raise InvalidConfig(f"{role}.max_replicas", message)
    num_workers = config.prefill.count + config.decode.count
    if num_workers < 2:
        raise InvalidConfig("prefill.count", f"must be at least 1 with planner.initial: search, got {num_workers - 1}")


def _search(config: ServiceConfig, folder: Path) -> InitialRoles:
    document = read_plan_config(_section(config))
    demand = demand_of(document.workload, read_trace_of(document.workload, folder))
    catalogue = load_catalogue(None if document.catalogue is None else folder / document.catalogue)
    planned = plan_fleet(document, catalogue, demand)
    num_workers = config.prefill.count + config.decode.count
    allowed = [n for n in range(1, num_workers) if config.planner.dual.allows(Roles(n, num_workers - n))]
    if not allowed:
        raise InvalidConfig("clusters", f"leaves no split of {num_workers} workers that planner.dual allows")
    goodput, what = _goodput(document, planned, demand, num_workers)
    best = max(allowed, key=lambda n: (round(goodput(n), 9), -abs(2 * n - num_workers)))
    return InitialRoles(Roles(best, num_workers - best), f"{goodput(best):.3g} req/s is the best {what} of any split")


def _section(config: ServiceConfig) -> dict[str, Any]:
    """The section, whose own cluster has one instance for each worker."""
    values = section_values(config)
    clusters = values.get("clusters")
    if isinstance(clusters, dict) and isinstance(own := clusters.get(config.cluster_id), dict):
        own = {"gpus_per_instance": _gpus(config.decode)} | own
        values["clusters"] = clusters | {config.cluster_id: own}
    return values


def _gpus(pool: PoolConfig) -> int:
    """GPUs of one worker; one without counts as one device, as in plan_document.py."""
    return max(1, round(pool.num_gpus))


def _goodput(document: PlanConfig, planned: PlannedFleet, demand: Demand, num_workers: int) -> tuple[Goodput, str]:
    """What to maximise, and what it is called."""
    slo = document.slo
    fleet = planned.fleet
    if slo.ttft_s is None and slo.tpot_s is None:
        return lambda n: operating_point(fleet, n).throughput_rps, "throughput"
    if not fleet.prfaas:
        prefill_rps, decode_rps = _instance_goodputs(planned.serving, demand, slo)
        return lambda n: min(n * prefill_rps, (num_workers - n) * decode_rps), "goodput (DistServe's search)"
    limits = LatencySlo(slo.ttft_s, slo.tpot_s, slo.attainment)
    return lambda n: goodput_rps(fleet, operating_point(fleet, n), limits), "goodput"


def _instance_goodputs(pool: Pool, demand: Demand, slo: SloPlan) -> tuple[float, float]:
    """Requests/s that one prefill and one decode instance sustain within their halves of the SLO."""
    assert pool.decode is not None, "a serving cluster decodes"
    points = (np.arange(_SAMPLES) * 0.6180339887 + 0.5) % 1  # evenly over the distribution, in no order of length
    answer = max(1, round(demand.mean_output_tokens))
    requests = tuple(Request(round(demand.lengths.quantile(float(point))), answer) for point in points)
    # A prompt goes alone: the profile is of one prompt, and says nothing of batches.
    workload = Workload(requests, prefill_batch_tokens=1, max_batch_size=int(pool.decode.max_batch_size))
    objective = Objective(slo.ttft_s or float("inf"), slo.tpot_s or float("inf"), slo.attainment)
    costs, one = _PoolCosts(pool), Parallelism(1)
    most_prefill = 2 / demand.lengths.mean_of(pool.prefill_s)
    most_decode = 2 * pool.decode.max_batch_size / (pool.decode.step_s * demand.mean_output_tokens)
    return (
        prefill_goodput_rps(costs, one, workload, objective, Search(most_prefill, most_prefill / _STEPS)),
        decode_goodput_rps(costs, one, workload, objective, Search(most_decode, most_decode / _STEPS)),
    )


@dataclass(frozen=True)
class _PoolCosts:
    """One instance of a pool for the placement search; it is what it is, whatever the parallelism is called."""

    pool: Pool

    def fits(self, parallelism: Parallelism) -> bool:
        return True

    def prefill_s(self, parallelism: Parallelism, prompts: Sequence[int]) -> float:
        return float(sum(self.pool.prefill_s(np.asarray(float(tokens))) for tokens in prompts))

    def decode_step_s(self, parallelism: Parallelism, batch_size: int, context_tokens: int) -> float:
        assert self.pool.decode is not None, "a serving cluster decodes"
        return self.pool.decode.step_of(batch_size)
