"""What does a simulated worker report of the links that it sends on? What the real LinkMonitor makes of what it sees.

Only links into other clusters are watched: those are what policies weigh, and a thousand workers have a million others.
"""

from __future__ import annotations

from cluster.simulator.shaped_link import Flow
from cluster.worker_client import WorkerDescription
from core.clock import Clock
from core.link import LinkEstimate
from kv_transfer.link_monitor import LinkMonitor
from kv_transfer.transport import LinkStats, PeerIdentity

_PATH = "tcp"
_CONNECTIONS = 4  # of a pair of workers, the default of ``kv_transfer.links[].connections``


class LinkReports:
    """One worker's eyes on its links."""

    def __init__(self, clock: Clock) -> None:
        self._monitor = LinkMonitor(clock)
        self._peers: dict[PeerIdentity, _Peer] = {}

    def opened(self, receiver: WorkerDescription, flow: Flow, rtt_s: float) -> None:
        """``flow`` goes to that worker."""
        identity = PeerIdentity(receiver.worker_id, receiver.cluster_id)
        peer = self._peers.setdefault(identity, _Peer(identity))
        peer.rtt_s = rtt_s
        peer.flows.append(flow)

    def transferred(self, receiver: WorkerDescription, num_bytes: int, seconds: float) -> None:
        """A hand-over's tail has arrived: so many bytes, all there when the time began."""
        if num_bytes > 0:
            self._monitor.transferred(PeerIdentity(receiver.worker_id, receiver.cluster_id), num_bytes, seconds)

    def estimates(self) -> tuple[LinkEstimate, ...]:
        """Every link that carried something, by worker id."""
        if not self._peers:
            return ()
        self._monitor.tick([peer.stats() for peer in self._peers.values()])
        return self._monitor.estimates()


class _Peer:
    """All flows to one worker, as if they were one link's."""

    def __init__(self, identity: PeerIdentity) -> None:
        self._identity = identity
        self._bytes_sent = 0.0  # of flows that are over
        self._busy_s = 0.0
        self.rtt_s = 0.0
        self.flows: list[Flow] = []

    def stats(self) -> LinkStats:
        for flow in self.flows:
            flow.settle()
        live = [flow for flow in self.flows if flow.open]
        for flow in self.flows:
            if not flow.open:
                self._bytes_sent += flow.sent
                self._busy_s += flow.busy_s
        self.flows = live
        return LinkStats(
            self._identity,
            _PATH,
            connections=_CONNECTIONS,
            bytes_sent=round(self._bytes_sent + sum(flow.sent for flow in live)),
            rtt_s=self.rtt_s,
            min_rtt_s=self.rtt_s,
            # Flows side by side have the link for as long as the busiest of them.
            busy_s=self._busy_s + max((flow.busy_s for flow in live), default=0.0),
            bytes_queued=round(sum(flow.backlog for flow in live)),
        )
