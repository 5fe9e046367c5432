"""How did utilisation, queues, roles and links develop? A sample of each cluster and link every few virtual seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.simulator.gateway import SimulatedGateway
from cluster.simulator.network import Network
from cluster.simulator.scenario import Scenario
from cluster.simulator.worker import SimulatedWorker
from core.request import ClusterId, EngineId, Role


@dataclass(frozen=True, slots=True)
class ClusterSample:
    """One cluster at one instant; utilisation is of the time since the last sample."""

    cluster_id: ClusterId
    num_prefill: int
    num_decode: int
    prefill_utilisation: float  # share of the time in which a step was computed, mean over workers of that role
    decode_utilisation: float
    num_waiting: int  # sequences, of prefill workers
    num_running: int  # sequences, of decode workers
    pages_used: float  # share, of decode workers


@dataclass(frozen=True, slots=True)
class LinkSample:
    """One link between clusters; rates are of the time since the last sample."""

    from_cluster: ClusterId
    to_cluster: ClusterId
    bytes_per_s: float  # sent
    capacity: float  # bytes/s, now
    num_flows: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The world at one instant."""

    at_s: float
    num_inflight: int
    threshold_tokens: float  # the planner's; inf: nothing is offloaded, or nothing was planned
    clusters: tuple[ClusterSample, ...]
    links: tuple[LinkSample, ...]


class Timeline:
    """Takes samples until it is cancelled."""

    def __init__(self, scenario: Scenario, network: Network, gateway: SimulatedGateway) -> None:
        self._scenario = scenario
        self._network = network
        self._gateway = gateway
        self._busy_s: dict[EngineId, float] = {}
        self._bytes = dict.fromkeys(network.links, 0.0)
        self.samples: list[Sample] = []

    async def watch(self, workers: Callable[[], Iterable[SimulatedWorker]]) -> None:
        """Look every ``sample_s``."""
        interval_s = self._scenario.sample_s
        self._look(workers(), 0.0, interval_s)
        self.samples.clear()  # it only noted where everything began
        number = 0
        while True:
            await asyncio.sleep(interval_s)
            number += 1
            self._look(workers(), number * interval_s, interval_s)

    def _look(self, workers: Iterable[SimulatedWorker], at_s: float, passed_s: float) -> None:
        by_cluster: dict[ClusterId, list[SimulatedWorker]] = {c.cluster_id: [] for c in self._scenario.clusters}
        for worker in workers:
            by_cluster[worker.description.cluster_id].append(worker)
        membership = self._gateway.membership
        self.samples.append(
            Sample(
                at_s=at_s,
                num_inflight=self._gateway.router.num_inflight,
                threshold_tokens=membership.view().offload.threshold_tokens,
                clusters=tuple(self._cluster(name, mates, passed_s) for name, mates in by_cluster.items()),
                links=tuple(self._link(pair, passed_s) for pair in self._network.links),
            )
        )

    def _cluster(self, name: ClusterId, workers: list[SimulatedWorker], passed_s: float) -> ClusterSample:
        busy: dict[Role, list[float]] = {role: [] for role in Role}
        num_waiting = num_running = 0
        used: list[float] = []
        for worker in workers:
            worker.engine.settle()
            engine_id, busy_s = worker.description.engine_id, worker.engine.busy_s
            busy[worker.role].append((busy_s - self._busy_s.get(engine_id, 0.0)) / passed_s)
            self._busy_s[engine_id] = busy_s
            load = worker.engine.scheduler.load()
            if worker.role is Role.PREFILL:
                num_waiting += load.num_waiting
            else:
                num_running += load.num_running
                used.append(1 - worker.engine.allocator.num_free / worker.engine.allocator.num_pages)
        return ClusterSample(
            cluster_id=name,
            num_prefill=len(busy[Role.PREFILL]),
            num_decode=len(busy[Role.DECODE]),
            prefill_utilisation=_mean(busy[Role.PREFILL]),
            decode_utilisation=_mean(busy[Role.DECODE]),
            num_waiting=num_waiting,
            num_running=num_running,
            pages_used=_mean(used),
        )

    def _link(self, pair: tuple[ClusterId, ClusterId], passed_s: float) -> LinkSample:
        link = self._network.links[pair]
        sent = link.bytes_sent
        rate, self._bytes[pair] = (sent - self._bytes[pair]) / passed_s, sent
        return LinkSample(pair[0], pair[1], rate, link.bytes_per_s, link.num_flows)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
