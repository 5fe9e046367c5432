"""What does a plan assume? The planning document: clusters, links, workload and SLO, as frozen dataclasses.

It is a file of its own, or the ``plan`` section of a service's YAML (docs/planning.md, ADR 0011): then ``prfaas plan``
plans the very file that ``prfaas serve`` runs, and takes from the service what the section leaves out. Hardware is
given either by a measured profile or by the name of a device in the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster import config_schema
from cluster.roofline import Efficiency
from core.errors import InvalidConfig

SERVE, PREFILL_ONLY = "serve", "prefill"
CLUSTER_ROLES = (SERVE, PREFILL_ONLY)
PREFIX_CACHES = ("none", "ideal")


@dataclass(frozen=True)
class PrefillPoint:
    """One measurement of prefill on one instance.

    tokens: length of the prompt.
    seconds: its prefill latency, alone.
    """

    tokens: float
    seconds: float

    def __post_init__(self) -> None:
        _above_zero(self, "tokens", "seconds")


@dataclass(frozen=True)
class KvPoint:
    """One measurement of the cache of a prompt, recurrent states included.

    tokens: length of the prompt.
    mib: size of its cache, MiB.
    """

    tokens: float
    mib: float

    def __post_init__(self) -> None:
        _above_zero(self, "tokens", "mib")


@dataclass(frozen=True)
class DecodePoint:
    """Decode on one instance at the largest batch that the SLO allows.

    max_batch_size: sequences of that batch.
    step_s: seconds of its step.
    """

    max_batch_size: float
    step_s: float

    def __post_init__(self) -> None:
        _above_zero(self, "max_batch_size", "step_s")


@dataclass(frozen=True)
class ClusterPlan:
    """One cluster of equal GPUs.

    role: ``serve`` prefills and decodes, exactly one cluster does; ``prefill`` is a PrfaaS cluster.
    num_gpus: GPUs that may be used.
    gpus_per_instance: GPUs of one copy of the model; null: chosen by the plan, from the device.
    device: name in the catalogue; needed for what no profile gives.
    prefill: measured prefill latencies on one instance; a quadratic is fitted. Empty: a roofline of the device.
    decode: measured decode of one instance; null: a roofline of the device.
    network_gbps: what one prefill instance sends to decode instances of its own cluster, Gbit/s.
    price_per_gpu_hour: overrides the device's price.
    efficiency: shares of the device's peaks that the roofline takes as sustained.
    """

    num_gpus: int
    role: str = SERVE
    gpus_per_instance: int | None = None
    device: str | None = None
    prefill: tuple[PrefillPoint, ...] = ()
    decode: DecodePoint | None = None
    network_gbps: float = 400.0
    price_per_gpu_hour: float | None = None
    efficiency: Efficiency = field(default_factory=Efficiency)

    def __post_init__(self) -> None:
        _above_zero(self, "num_gpus", "network_gbps")
        size = self.gpus_per_instance
        _require(size is None or 1 <= size <= self.num_gpus, "gpus_per_instance", "must be null or 1 to num_gpus", size)
        price = self.price_per_gpu_hour
        _require(price is None or price >= 0, "price_per_gpu_hour", "must be null or at least 0", price)
        needed = [name for name, given in (("prefill", self.prefill), ("decode", self.decode)) if not given]
        if self.role == PREFILL_ONLY and "decode" in needed:
            needed.remove("decode")
        _require(
            not needed or self.device is not None, "device", f"is needed, or a profile ({', '.join(needed)})", None
        )
        profiled = bool(self.prefill) or self.decode is not None
        _require(not profiled or size is not None, "gpus_per_instance", "must be given with a profile", size)


@dataclass(frozen=True)
class LinkPlan:
    """The path from a PrfaaS cluster to the serving one.

    from_cluster: name of the PrfaaS cluster.
    to_cluster: name of the serving cluster.
    gbps: what it carries, Gbit/s, for all workers together.
    """

    from_cluster: str
    to_cluster: str
    gbps: float

    def __post_init__(self) -> None:
        _above_zero(self, "gbps")


@dataclass(frozen=True)
class LogNormal:
    """exp(Normal(mu, sigma)) tokens, truncated.

    mu: mean of the logarithm.
    sigma: standard deviation of the logarithm.
    minimum: shortest prompt, tokens.
    maximum: longest prompt, tokens.
    """

    mu: float
    sigma: float
    minimum: float = 1
    maximum: float = 131072


@dataclass(frozen=True)
class Histogram:
    """Counted prompts.

    edges: borders of the bins in tokens, ascending, one more than counts.
    counts: prompts in each bin.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass(frozen=True)
class WorkloadPlan:
    """What comes. Prompt lengths are given in exactly one way.

    log_normal: a distribution.
    histogram: counts.
    fixed_tokens: every prompt is so long.
    trace: a trace file, relative to this file; its mean output and rate are taken where not given here.
    prefix_cache: of a trace: ``none``; ``ideal`` leaves out the leading blocks seen before, as an endless cache would.
    output_tokens: mean length of an answer; null: the trace's.
    rate_rps: requests/s at which latencies are predicted; null: the trace's, else the goodput, else 80 % of the most.
    """

    log_normal: LogNormal | None = None
    histogram: Histogram | None = None
    fixed_tokens: float | None = None
    trace: str | None = None
    prefix_cache: str = "none"
    output_tokens: float | None = None
    rate_rps: float | None = None

    def __post_init__(self) -> None:
        for name in ("fixed_tokens", "output_tokens", "rate_rps"):
            if getattr(self, name) is not None:
                _above_zero(self, name)

    @property
    def length_sources(self) -> tuple[str, ...]:
        """The keys by which lengths are given."""
        names = ("log_normal", "histogram", "fixed_tokens", "trace")
        return tuple(name for name in names if getattr(self, name) is not None)


@dataclass(frozen=True)
class SloPlan:
    """What a good request is; a request must meet both.

    ttft_s: longest time to the first token; null: any.
    tpot_s: longest mean time between later tokens; null: any. It bounds the decode batch where a roofline is used.
    attainment: share of requests that must be good at the goodput.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    attainment: float = 0.9

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if getattr(self, name) is not None:
                _above_zero(self, name)
        _require(0 < self.attainment < 1, "attainment", "must be above 0 and below 1", self.attainment)


@dataclass(frozen=True)
class PlanConfig:
    """A planning document.

    clusters: by name.
    links: by name; each PrfaaS cluster has one to the serving cluster.
    model: name in the catalogue; null: ``kv_cache`` and profiles say all.
    kv_cache: measured sizes of the cache; a line is fitted. Empty: from the model's shape.
    catalogue: a file with more models and devices, relative to this file.
    inferred: key of this document |-> why its value is not published or measured; printed with every plan.
    """

    clusters: dict[str, ClusterPlan]
    links: dict[str, LinkPlan] = field(default_factory=dict)
    workload: WorkloadPlan = field(default_factory=WorkloadPlan)
    slo: SloPlan = field(default_factory=SloPlan)
    model: str | None = None
    kv_cache: tuple[KvPoint, ...] = ()
    catalogue: str | None = None
    inferred: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        serving = [name for name, cluster in self.clusters.items() if cluster.role == SERVE]
        _require(len(serving) == 1, "clusters", "must hold exactly one cluster of role serve", sorted(serving))
        for name, link in self.links.items():
            start, end = link.from_cluster, link.to_cluster
            known = start in self.clusters and self.clusters[start].role == PREFILL_ONLY
            _require(known, f"links.{name}.from_cluster", "must be a cluster of role prefill", start)
            _require(end == serving[0], f"links.{name}.to_cluster", f"must be the serving cluster, {serving[0]}", end)
        for name in self.prefill_clusters:
            found = [link for link in self.links.values() if link.from_cluster == name]
            _require(len(found) == 1, "links", f"must hold exactly one link from cluster {name}", len(found))
        modelled = any(self._needs_model(cluster) for cluster in self.clusters.values())
        needed = modelled or not self.kv_cache
        _require(
            not needed or self.model is not None, "model", "is needed where a profile or kv_cache is missing", None
        )

    @staticmethod
    def _needs_model(cluster: ClusterPlan) -> bool:
        return not cluster.prefill or (cluster.role == SERVE and cluster.decode is None)

    @property
    def serving_cluster(self) -> str:
        """The cluster that decodes."""
        return next(name for name, cluster in self.clusters.items() if cluster.role == SERVE)

    @property
    def prefill_clusters(self) -> tuple[str, ...]:
        """The PrfaaS clusters, in the document's order."""
        return tuple(name for name, cluster in self.clusters.items() if cluster.role == PREFILL_ONLY)

    def link_from(self, cluster: str) -> tuple[str, LinkPlan]:
        """Name and settings of the link of a PrfaaS cluster."""
        return next((name, link) for name, link in self.links.items() if link.from_cluster == cluster)


CHOICES: config_schema.Choices = {
    (ClusterPlan, "role"): CLUSTER_ROLES,
    (WorkloadPlan, "prefix_cache"): PREFIX_CACHES,
}


def read_plan_config(values: Mapping[str, object]) -> PlanConfig:
    """The document that ``values`` hold; ``InvalidConfig`` with the key otherwise."""
    return config_schema.read(PlanConfig, values, CHOICES)


def _above_zero(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, name, "must be above 0", value)


def _require(ok: bool, key: str, allowed: str, value: object) -> None:
    if not ok:
        raise InvalidConfig(key, f"{allowed}, got {value!r}")
