"""Which scenario does a planning document, or a service's YAML, describe? Instances as workers, links as links.

Seconds come, in this order, from a saved cost model (``costs``), from the document's profiles, or from the roofline of
its model and devices. Roles are the plan's best, unless a service's pools say them. A service's router, admission,
planner and engine are simulated as configured; a document of its own has their defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster.catalogue import Catalogue, ModelShape
from cluster.config import AdmissionConfig, PlannerConfig, RouterConfig, ServiceConfig
from cluster.cost_model import saved_costs
from cluster.planned_fleet import GBPS, MIB, Demand, plan_fleet
from cluster.planning_config import ClusterPlan, PlanConfig
from cluster.roofline import Instance
from cluster.simulator.hand_over import KvShape
from cluster.simulator.host import WorkerKind
from cluster.simulator.network import LinkSpec, RateChange
from cluster.simulator.scenario import ClusterSpec, Scenario
from cluster.simulator.step_cost import MeasuredCost, ProfiledCost, RooflineCost, StepCost
from cluster.throughput_model import Polynomial, best_operating_point
from cluster.view import ModelInfo
from core.compute import ComputeProfile
from core.errors import InvalidConfig
from core.fingerprint import CacheFingerprint
from core.request import ClusterId
from engine.config import EngineConfig

PAGE_TOKENS = 64  # where no service says it
MAX_MODEL_LEN = 262_144
_MOST_SEQUENCES = 256
# A document says nothing of a gateway's bounds: nothing is refused, and requests queue at workers.
UNBOUNDED = AdmissionConfig(
    max_queued=1_000_000, max_wait_s=1e9, prefill_queue_s=1e9, prefill_queue_tokens=1 << 60, decode_slots=1_000_000
)
_LOCAL_LATENCY_S = 0.0005
WAN_LATENCY_S = 0.005  # of a link between clusters, one way


@dataclass(frozen=True)
class ScenarioOptions:
    """What a document does not say.

    link_latency_s: one way, between clusters. costs: file of a live service's costs. fluctuation: of all links between
    clusters: from some second on a share of their rate.
    """

    link_latency_s: float = WAN_LATENCY_S
    costs: Path | None = None
    fluctuation: tuple[RateChange, ...] = ()


def scenario_of(
    config: PlanConfig,
    catalogue: Catalogue,
    demand: Demand,
    service: ServiceConfig | None = None,
    options: ScenarioOptions = ScenarioOptions(),
) -> Scenario:
    """The scenario; ``InvalidConfig`` where the document cannot be simulated."""
    planned = plan_fleet(config, catalogue, demand)
    point = best_operating_point(planned.fleet)
    shape = None if config.model is None else catalogue.model(config.model)
    saved = None if options.costs is None else saved_costs(options.costs)
    clusters = []
    for pool in planned.pools:
        cluster = config.clusters[pool.name]
        size = cluster.gpus_per_instance or max(pool.gpus_per_prefill, pool.gpus_per_decode)
        batch = _MOST_SEQUENCES if pool.decode is None else max(1, int(pool.decode.max_batch_size))
        cost = MeasuredCost(saved) if saved is not None else _cost(cluster, catalogue, shape, size)
        kind = _kind(pool.name, cluster, catalogue, config, shape, size, batch, cost, service, demand)
        num_instances = cluster.num_gpus // size
        if pool is not planned.serving:
            clusters.append(ClusterSpec(ClusterId(pool.name), kind, num_instances, 0, _LOCAL_LATENCY_S))
            continue
        num_prefill = min(point.num_prefill, num_instances - 1)
        num_decode = num_instances - num_prefill
        if service is not None:
            num_prefill, num_decode = service.prefill.count, service.decode.count
        in_turns = service is not None and service.engine.turns_file is not None
        name = ClusterId(pool.name)
        clusters.append(ClusterSpec(name, kind, num_prefill, num_decode, _LOCAL_LATENCY_S, in_turns))
    links = tuple(
        LinkSpec(
            ClusterId(link.from_cluster),
            ClusterId(link.to_cluster),
            link.gbps * GBPS,
            options.link_latency_s,
            options.fluctuation,
        )
        for link in config.links.values()
    )
    if service is None:
        router = RouterConfig(max_inflight=1_000_000)
        return Scenario(tuple(clusters), links, router=router, admission=UNBOUNDED, planner=PlannerConfig())
    return Scenario(
        tuple(clusters),
        links,
        router=service.router,
        admission=service.admission,
        planner=service.planner,
        pools={role: service.pool(role) for role in service.elastic_roles},
        start_s=service.planner.scaling.start_s,
    )


def _cost(cluster: ClusterPlan, catalogue: Catalogue, shape: ModelShape | None, size: int) -> StepCost:
    """Of one instance of ``size`` GPUs."""
    instance = None
    if cluster.device is not None and shape is not None:
        instance = Instance(shape, catalogue.device(cluster.device), size, cluster.efficiency)
    if not cluster.prefill:
        assert instance is not None, "a cluster without a profile has a device"
        return RooflineCost(instance)
    prefill = Polynomial.fit([(point.tokens, point.seconds) for point in cluster.prefill])
    if cluster.decode is not None:
        return ProfiledCost(prefill, cluster.decode.step_s)
    # A cluster that only prefills: what a token after the first would take there is not known, and not asked.
    return ProfiledCost(
        prefill, float(prefill(np.asarray(1.0))) if instance is None else instance.decode_step_s(1, 1.0)
    )


def _kind(
    name: str,
    cluster: ClusterPlan,
    catalogue: Catalogue,
    config: PlanConfig,
    shape: ModelShape | None,
    size: int,
    batch: int,
    cost: StepCost,
    service: ServiceConfig | None,
    demand: Demand,
) -> WorkerKind:
    kv = _kv_shape(config, shape)
    engine = EngineConfig(page_size=PAGE_TOKENS, max_batch_tokens=8192, max_batch_size=min(batch, 8192))
    if service is not None:
        engine = service.engine
    if engine.num_pages is None:
        engine = replace(engine, num_pages=_num_pages(cluster, catalogue, shape, size, kv, engine, service is not None))
    fingerprint = CacheFingerprint(config.model or "as profiled", "planned", "planned", engine.page_size, "planned")
    max_len = engine.max_model_len or MAX_MODEL_LEN
    # Policies know of bytes per token only: a recurrent state is spread over the mean prompt.
    token_bytes = max(1, round(kv.bytes_per_token + kv.state_bytes / demand.lengths.mean_tokens))
    model = ModelInfo(fingerprint.model, fingerprint, max_len, 1 << 62, (), token_bytes, kv.num_layers)
    compute = ComputeProfile(device=f"{name} {cluster.device or 'profile'}", num_devices=size)
    return WorkerKind(cost, engine, kv, model, compute, send_bytes_per_s=cluster.network_gbps * GBPS)


def _kv_shape(config: PlanConfig, shape: ModelShape | None) -> KvShape:
    layers = 32 if shape is None else shape.num_layers
    if config.kv_cache:
        fitted = Polynomial.fit([(point.tokens, point.mib * MIB) for point in config.kv_cache], degree=1)
        state, each, *_ = (*fitted.coefficients, 0.0)
        return KvShape(each, max(0.0, state), layers)
    assert shape is not None, "a document without kv_cache has a model"
    return KvShape(shape.kv_bytes_per_token, shape.state_bytes, layers)


def _num_pages(
    cluster: ClusterPlan,
    catalogue: Catalogue,
    shape: ModelShape | None,
    size: int,
    kv: KvShape,
    engine: EngineConfig,
    configured: bool,
) -> int:
    """Of one instance: what a service's ``kv_cache_bytes`` hold, what the device has beside the weights, or enough for
    the profile's batch of long sequences."""
    page_bytes = max(1.0, kv.bytes_per_token * engine.page_size)
    if configured and engine.kv_cache_bytes is not None:
        return max(1, int(engine.kv_cache_bytes / page_bytes))
    if cluster.device is not None and shape is not None and not cluster.prefill:
        spare = Instance(shape, catalogue.device(cluster.device), size, cluster.efficiency).kv_capacity_bytes()
        if spare <= page_bytes:
            raise InvalidConfig("clusters", f"of {size} x {cluster.device} an instance has no memory for K/V")
        return int(spare / page_bytes)
    return (engine.max_batch_size + 8) * MAX_MODEL_LEN // engine.page_size
