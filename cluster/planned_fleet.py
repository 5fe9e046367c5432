"""What does a planning document amount to? Its profiles, shapes and devices as one ``Fleet``, its lengths as a demand.

Pure but for ``read_trace_of``, which reads the one file. Where the document leaves the parallelism open, it is
chosen here: of prefill per GPU by DistServe's search under the TTFT SLO (placement_search.py), of decode by the
throughput of the whole fleet with the batch that the TPOT SLO and the memory allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.catalogue import Catalogue, DeviceSpec, ModelShape
from cluster.length_distribution import Curve, LengthDistribution
from cluster.placement_search import Objective, Parallelism, Request, Search, Workload, prefill_goodput_rps
from cluster.planning_config import PREFILL_ONLY, SERVE, ClusterPlan, PlanConfig, WorkloadPlan
from cluster.roofline import Instance
from cluster.throughput_model import Fleet, Polynomial, PrfaasCluster, best_operating_point
from cluster.workload_traces import TraceSummary, read_trace, summarise
from core.errors import InvalidConfig

MIB = 2**20
GBPS = 1e9 / 8
_SIZES = (1, 2, 4, 8, 16)
_SAMPLES = 200
_MOST_SEQUENCES = 1024  # of a decode batch that no SLO bounds


@dataclass(frozen=True)
class Demand:
    """What comes."""

    lengths: LengthDistribution  # uncached prompt tokens
    mean_input_tokens: float  # cached part included
    mean_output_tokens: float
    rate_rps: float | None


@dataclass(frozen=True)
class Decode:
    """One decode instance."""

    max_batch_size: float
    step_s: float  # of that batch
    step_of: Callable[[float], float]  # seconds by batch size; constant where only one batch is known


@dataclass(frozen=True)
class Pool:
    """One cluster's hardware as curves."""

    name: str
    num_gpus: int
    gpus_per_prefill: int
    prefill_s: Curve
    gpus_per_decode: int
    decode: Decode | None  # None: what its decode takes is not known
    price_per_gpu_hour: float | None


@dataclass(frozen=True)
class PlannedFleet:
    """A document with its hardware worked out."""

    fleet: Fleet
    serving: Pool
    prefill_only: tuple[Pool, ...]

    @property
    def pools(self) -> tuple[Pool, ...]:
        """All clusters, the serving one first."""
        return (self.serving, *self.prefill_only)

    @property
    def num_gpus(self) -> int:
        """GPUs of all clusters."""
        return sum(pool.num_gpus for pool in self.pools)


def read_trace_of(
    workload: WorkloadPlan, folder: Path, on_bytes: Callable[[int], None] | None = None
) -> TraceSummary | None:
    """What the workload's trace says; None if it names none. Errors name the trace's file and line."""
    if workload.trace is None:
        return None
    path = folder / workload.trace
    ideal = workload.prefix_cache == "ideal"
    return summarise(read_trace(path, on_bytes), ideal_prefix_cache=ideal, path=str(path))


def demand_of(workload: WorkloadPlan, trace: TraceSummary | None = None) -> Demand:
    """The demand that a document states; ``InvalidConfig`` where it states too little or too much."""
    sources = workload.length_sources
    if len(sources) != 1:
        given = ", ".join(sources) or "none"
        raise InvalidConfig(
            "workload", f"must give one of log_normal, histogram, fixed_tokens and trace, gives {given}"
        )
    output, rate = workload.output_tokens, workload.rate_rps
    if workload.trace is not None:
        assert trace is not None, "the trace has been read"
        lengths, mean_input = LengthDistribution.from_sample(trace.input_tokens), trace.mean_input_tokens
        output = trace.mean_output_tokens if output is None else output
        rate = trace.rate_rps if rate is None else rate
    else:
        lengths = _stated_lengths(workload)
        mean_input = lengths.mean_tokens
    if not output:
        raise InvalidConfig("workload.output_tokens", "is required unless a trace gives it, and above 0")
    return Demand(lengths, mean_input, output, rate)


def _stated_lengths(workload: WorkloadPlan) -> LengthDistribution:
    try:
        if workload.log_normal is not None:
            shape = workload.log_normal
            return LengthDistribution.log_normal(shape.mu, shape.sigma, shape.minimum, shape.maximum)
        if workload.histogram is not None:
            return LengthDistribution.from_histogram(workload.histogram.edges, workload.histogram.counts)
    except InvalidConfig as error:
        key = workload.length_sources[0]
        raise InvalidConfig(f"workload.{error.key.replace('lengths', key, 1)}", error.message) from error
    assert workload.fixed_tokens is not None, "one source of lengths is given"
    return LengthDistribution.from_sample([workload.fixed_tokens])


def plan_fleet(config: PlanConfig, catalogue: Catalogue, demand: Demand) -> PlannedFleet:
    """The document's hardware for ``demand``; ``InvalidConfig`` where a model does not fit or is not known.

    Of several possible decode instances the one whose fleet has the highest throughput, then the smallest.
    """
    shape = None if config.model is None else catalogue.model(config.model)
    kv_bytes = _kv_bytes(config, shape)
    others = tuple(_pools(config, name, catalogue, shape, demand)[0] for name in config.prefill_clusters)
    possible = _pools(config, config.serving_cluster, catalogue, shape, demand)
    fleets = [PlannedFleet(_fleet(config, demand, kv_bytes, pool, others), pool, others) for pool in possible]
    feasible = [planned for planned in fleets if planned.fleet.most_prefill >= (0 if others else 1)]
    if not feasible:
        smallest = min(possible, key=lambda pool: pool.gpus_per_decode)
        needed = smallest.gpus_per_decode + (0 if others else smallest.gpus_per_prefill)
        key = f"clusters.{config.serving_cluster}.num_gpus"
        raise InvalidConfig(key, f"must be at least {needed} for a prefill and a decode instance")
    if len(feasible) == 1:
        return feasible[0]
    return max(feasible, key=lambda planned: round(best_operating_point(planned.fleet).throughput_rps, 6))


def _fleet(config: PlanConfig, demand: Demand, kv_bytes: Curve, serving: Pool, others: tuple[Pool, ...]) -> Fleet:
    assert serving.decode is not None, "a serving cluster decodes"
    return Fleet(
        lengths=demand.lengths,
        mean_output_tokens=demand.mean_output_tokens,
        kv_bytes=kv_bytes,
        prfaas=tuple(
            PrfaasCluster(
                name=pool.name,
                num_instances=pool.num_gpus // pool.gpus_per_prefill,
                prefill_s=pool.prefill_s,
                egress_bytes_per_s=config.link_from(pool.name)[1].gbps * GBPS,
            )
            for pool in others
        ),
        num_local_gpus=serving.num_gpus,
        local_prefill_s=serving.prefill_s,
        local_link_bytes_per_s=config.clusters[serving.name].network_gbps * GBPS,
        max_batch_size=serving.decode.max_batch_size,
        decode_step_s=serving.decode.step_s,
        gpus_per_prefill=serving.gpus_per_prefill,
        gpus_per_decode=serving.gpus_per_decode,
    )


def _kv_bytes(config: PlanConfig, shape: ModelShape | None) -> Curve:
    if config.kv_cache:
        return Polynomial.fit([(point.tokens, point.mib * MIB) for point in config.kv_cache], degree=1)
    assert shape is not None, "a document without kv_cache has a model"
    return shape.kv_bytes


def _pools(config: PlanConfig, name: str, catalogue: Catalogue, shape: ModelShape | None, demand: Demand) -> list[Pool]:
    """The cluster's hardware, once for each decode instance that it may have, small ones first."""
    cluster = config.clusters[name]
    try:
        device = None if cluster.device is None else catalogue.device(cluster.device)
    except InvalidConfig as error:
        raise InvalidConfig(f"clusters.{name}.{error.key}", error.message) from error
    instances = _instances(cluster, name, device, shape)
    prefill_s, prefill_gpus = _prefill(config, cluster, instances, demand)
    listed = None if device is None else device.price_per_hour
    price = listed if cluster.price_per_gpu_hour is None else cluster.price_per_gpu_hour
    return [
        Pool(name, cluster.num_gpus, prefill_gpus, prefill_s, decode_gpus, decode, price)
        for decode, decode_gpus in _decodes(config, cluster, instances, demand, name)
    ]


def _instances(
    cluster: ClusterPlan, name: str, device: DeviceSpec | None, shape: ModelShape | None
) -> tuple[Instance, ...]:
    """The model on each number of the cluster's GPUs that may be an instance; empty if model or device is not known."""
    if device is None or shape is None:
        return ()
    sizes: Sequence[int] = _SIZES if cluster.gpus_per_instance is None else (cluster.gpus_per_instance,)
    made = (Instance(shape, device, size, cluster.efficiency) for size in sizes if size <= cluster.num_gpus)
    fitting = tuple(instance for instance in made if instance.kv_capacity_bytes() > 0)
    if not fitting:
        weights = shape.weight_bytes() / 1e9
        tried = ", ".join(str(size) for size in sizes if size <= cluster.num_gpus)
        message = f"must hold the weights, {weights:.0f} GB; {device.memory_gb:.0f} GB a GPU on {tried} GPUs do not"
        raise InvalidConfig(f"clusters.{name}.num_gpus", message)
    return fitting


def _prefill(
    config: PlanConfig, cluster: ClusterPlan, instances: tuple[Instance, ...], demand: Demand
) -> tuple[Curve, int]:
    """T_prefill of an instance and its GPUs."""
    if cluster.prefill:
        assert cluster.gpus_per_instance is not None, "a profile is of an instance of known size"
        points = [(point.tokens, point.seconds) for point in cluster.prefill]
        return Polynomial.fit(points), cluster.gpus_per_instance
    best = max(instances, key=lambda instance: _prefill_rps_per_gpu(instance, config, demand))
    return best.prefill_s, best.num_gpus


def _prefill_rps_per_gpu(instance: Instance, config: PlanConfig, demand: Demand) -> float:
    """DistServe's goodput of prefill per GPU; of sizes that never meet the SLO, the fastest is best (below 0)."""
    most = 1 / float(instance.prefill_s(demand.lengths.mean_tokens)) / instance.num_gpus
    if config.slo.ttft_s is None:
        return most
    points = (np.arange(_SAMPLES) * 0.6180339887 + 0.5) % 1  # evenly over the distribution, in no order of length
    prompts = tuple(Request(round(demand.lengths.quantile(float(point))), 1) for point in points)
    saturating = int(instance.flops_per_s / instance.bytes_per_s)  # L_m: tokens whose compute outweighs the weights
    workload = Workload(prompts, prefill_batch_tokens=saturating, max_batch_size=1)
    objective = Objective(config.slo.ttft_s, float("inf"), config.slo.attainment)
    search = Search(most_rps_per_gpu=2 * most, step_rps_per_gpu=most / 50)
    found = prefill_goodput_rps(_PrefillCosts(instance), Parallelism(instance.num_gpus), workload, objective, search)
    return found / instance.num_gpus or -float(instance.prefill_s(demand.lengths.mean_tokens))


@dataclass(frozen=True)
class _PrefillCosts:
    """One instance for the placement search, which asks it for prefill only."""

    instance: Instance

    def fits(self, parallelism: Parallelism) -> bool:
        return parallelism == Parallelism(self.instance.num_gpus)

    def prefill_s(self, parallelism: Parallelism, prompts: Sequence[int]) -> float:
        return float(sum(self.instance.prefill_s(tokens) for tokens in prompts))

    def decode_step_s(self, parallelism: Parallelism, batch_size: int, context_tokens: int) -> float:
        return self.instance.decode_step_s(batch_size, context_tokens / batch_size)


def _decodes(
    config: PlanConfig, cluster: ClusterPlan, instances: tuple[Instance, ...], demand: Demand, name: str
) -> list[tuple[Decode | None, int]]:
    """Decode instances that meet the TPOT SLO, each with its GPUs; one None where decode is not known or not needed."""
    if cluster.decode is not None:
        assert cluster.gpus_per_instance is not None, "a profile is of an instance of known size"
        step_s = cluster.decode.step_s
        return [(Decode(cluster.decode.max_batch_size, step_s, lambda batch: step_s), cluster.gpus_per_instance)]
    context = demand.mean_input_tokens + demand.mean_output_tokens / 2
    tpot_s = float("inf") if config.slo.tpot_s is None else config.slo.tpot_s
    found = [_roofline_decode(instance, context, tpot_s) for instance in instances]
    meeting = [(decode, gpus) for decode, gpus in found if decode is not None]
    if meeting and cluster.role == SERVE:
        return list(meeting)
    if meeting:  # of a PrfaaS cluster decode matters only to the colocated alternative: the best per GPU
        best = max(meeting, key=lambda pair: pair[0].max_batch_size / pair[0].step_s / pair[1])
        return [best]
    if cluster.role == PREFILL_ONLY:
        return [(None, cluster.gpus_per_instance or 1)]
    fastest = min(instance.decode_step_s(1, context) for instance in instances)
    message = f"is met by no batch on cluster {name}: one sequence alone takes {fastest:.4f} s, or does not fit"
    raise InvalidConfig("slo.tpot_s", message)


def _roofline_decode(instance: Instance, context: float, tpot_s: float) -> tuple[Decode | None, int]:
    batch = min(instance.max_batch_size(context, tpot_s), _MOST_SEQUENCES)
    if not batch:
        return None, instance.num_gpus
    step_s = instance.decode_step_s(batch, context)
    return Decode(batch, step_s, lambda size: instance.decode_step_s(size, context)), instance.num_gpus
