"""Which way do messages and K/V go between two workers? Paths by pairs of clusters, and who shares which link.

K/V within a cluster shares what its sending worker sends (``WorkerKind.send_bytes_per_s``); K/V between two clusters
shares the one link of that direction, each flow at most what its worker sends. Messages take the latency of their path
and no bandwidth. A link that is cut carries neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.simulator.control_path import ControlPath
from cluster.simulator.shaped_link import Flow, SharedLink
from core.request import ClusterId, EngineId

ClusterPair = tuple[ClusterId, ClusterId]  # from, to


@dataclass(frozen=True)
class RateChange:
    """From ``at_s`` on a link carries ``share`` of its rate; 0: it is cut, messages as well."""

    at_s: float
    share: float


@dataclass(frozen=True)
class LinkSpec:
    """One direction between two clusters."""

    from_cluster: ClusterId
    to_cluster: ClusterId
    bytes_per_s: float
    latency_s: float
    changes: tuple[RateChange, ...] = ()  # in order of time


class Network:
    """All paths and links of a simulation. ``latencies_s``: of messages within a cluster, by its name."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, latencies_s: Mapping[ClusterId, float], links: tuple[LinkSpec, ...]
    ) -> None:
        self._loop = loop
        self._inner = {cluster: ControlPath(loop, latency_s) for cluster, latency_s in latencies_s.items()}
        self._specs = {(spec.from_cluster, spec.to_cluster): spec for spec in links}
        self._paths = {pair: ControlPath(loop, spec.latency_s) for pair, spec in self._specs.items()}
        self._links = {pair: SharedLink(loop, spec.bytes_per_s) for pair, spec in self._specs.items()}
        self._nics: dict[EngineId, SharedLink] = {}

    @property
    def links(self) -> Mapping[ClusterPair, SharedLink]:
        """Links between clusters."""
        return self._links

    def spec(self, pair: ClusterPair) -> LinkSpec:
        """What a link between two clusters is when nothing is wrong."""
        return self._specs[pair]

    def path(self, from_cluster: ClusterId, to_cluster: ClusterId) -> ControlPath:
        """The way of messages. Clusters without a link of that direction share the one of the other direction."""
        if from_cluster == to_cluster:
            return self._inner[from_cluster]
        pair = (from_cluster, to_cluster)
        if pair not in self._paths:
            there = self._specs.get((to_cluster, from_cluster))
            assert there is not None, f"no link joins {from_cluster} and {to_cluster}"
            self._paths[pair] = ControlPath(self._loop, there.latency_s)
        return self._paths[pair]

    def open_flow(
        self,
        engine_id: EngineId,
        pair: ClusterPair,
        send_bytes_per_s: float,
        on_sent: Callable[[], None],
    ) -> Flow:
        """A flow from that engine, whose worker sends at most ``send_bytes_per_s``, to a worker of the pair's end."""
        if pair[0] != pair[1]:
            return self._links[pair].open(on_sent, send_bytes_per_s)
        nic = self._nics.get(engine_id)
        if nic is None:
            nic = self._nics[engine_id] = SharedLink(self._loop, send_bytes_per_s)
        return nic.open(on_sent)

    def set_share(self, pair: ClusterPair, share: float) -> None:
        """A link carries ``share`` of its rate from now on; 0 cuts messages too, in both directions."""
        self._links[pair].set_rate(self._specs[pair].bytes_per_s * share)
        for path in (self.path(*pair), self.path(pair[1], pair[0])):
            if share <= 0 and path.up:
                path.cut()
            elif share > 0 and not path.up:
                path.mend()
