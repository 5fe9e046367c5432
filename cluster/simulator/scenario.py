"""What is simulated? Clusters, links, a gateway's settings, and what goes wrong when; frozen and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.config import PLANNER_OFF, AdmissionConfig, PlannerConfig, PoolConfig, RouterConfig
from cluster.simulator.host import WorkerKind
from cluster.simulator.network import LinkSpec
from core.errors import InvalidConfig
from core.request import ClusterId, Role, WorkerId


@dataclass(frozen=True)
class ClusterSpec:
    """Workers of one kind in one place. ``latency_s``: of a message within it."""

    cluster_id: ClusterId
    kind: WorkerKind
    num_prefill: int
    num_decode: int
    latency_s: float = 0.0005
    shares_device: bool = False  # all its workers compute in turns (``engine.turns_file``)

    @property
    def num_workers(self) -> int:
        """In either role."""
        return self.num_prefill + self.num_decode


@dataclass(frozen=True)
class WorkerDeath:
    """A worker's process ends ``at_s``, and a new one joins ``restart_s`` later; None: none does."""

    at_s: float
    worker_id: WorkerId
    restart_s: float | None = None


@dataclass(frozen=True)
class Scenario:
    """A simulation without its workload. Seconds count from the workload's beginning, bytes/s are those of K/V."""

    clusters: tuple[ClusterSpec, ...]
    links: tuple[LinkSpec, ...] = ()
    gateway: ClusterId | None = None  # where the gateway is; None: in the first cluster that decodes
    router: RouterConfig = field(default_factory=lambda: RouterConfig(max_inflight=1_000_000))
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    tpot_slo_s: float | None = None  # that the planner keeps decode batches to; None: admission's
    planner: PlannerConfig = field(default_factory=lambda: PlannerConfig(mode=PLANNER_OFF))
    learn_costs: bool = False  # policies predict with what workers report, as live ones do; False: they know
    deaths: tuple[WorkerDeath, ...] = ()
    pools: Mapping[Role, PoolConfig] = field(default_factory=dict)  # of the home cluster, those that may grow
    start_s: float = 30.0  # from asking for one more worker to its registration
    capacities: Mapping[tuple[ClusterId, ClusterId], float] = field(default_factory=dict)  # as configured; else links'
    sample_s: float = 1.0  # between two looks at utilisation, queues and roles
    settle_s: float = 2.0  # between the last worker's joining and the workload's beginning

    def __post_init__(self) -> None:
        names = [cluster.cluster_id for cluster in self.clusters]
        if len(set(names)) != len(names) or not names:
            raise InvalidConfig("clusters", f"must have names of their own, and be at least one, got {names}")
        if not any(cluster.num_decode for cluster in self.clusters):
            raise InvalidConfig("clusters", "must have a decode worker")
        for role, pool in self.pools.items():
            has = self.home_cluster.num_prefill if role is Role.PREFILL else self.home_cluster.num_decode
            if pool.count != has:
                raise InvalidConfig(
                    f"pools.{role}.count", f"must be the {has} workers of {self.home}, got {pool.count}"
                )
        linked = {(link.from_cluster, link.to_cluster) for link in self.links}
        for sender in self.clusters:
            for receiver in self.clusters:
                pair = (sender.cluster_id, receiver.cluster_id)
                if sender is not receiver and receiver.num_decode and pair not in linked:
                    raise InvalidConfig("links", f"must have one from {pair[0]} to {pair[1]}, where sequences decode")

    def capacity(self, from_cluster: ClusterId, to_cluster: ClusterId) -> float | None:
        """Configured bytes/s between two clusters; None: not configured."""
        links = {(link.from_cluster, link.to_cluster): link.bytes_per_s for link in self.links}
        return (links | dict(self.capacities)).get((from_cluster, to_cluster))

    @property
    def home_cluster(self) -> ClusterSpec:
        """The gateway's own."""
        return next(cluster for cluster in self.clusters if cluster.cluster_id == self.home)

    @property
    def home(self) -> ClusterId:
        """Where the gateway is."""
        if self.gateway is not None:
            return self.gateway
        return next(cluster.cluster_id for cluster in self.clusters if cluster.num_decode)
