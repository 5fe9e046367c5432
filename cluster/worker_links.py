"""What is known of the links that a worker sends on, on all its ranks, and as what is a write on them encoded?

    Transport.stats(), every quarter second ──tick──┬──> LinkCodecs    this rank's writes; other ranks choose their own
    other ranks' stats, as they tell them ──────────┴──> LinkMonitor   estimates, of all ranks' links to a peer together
    hand-overs that ended ──note────────────────────────────^

Any thread may call; nothing here waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cluster.config import WorkerConfig
from cluster.rank_processes import RankProcesses
from core.clock import Clock
from core.link import LinkEstimate
from kv_transfer.codec_policy import LinkCodecs
from kv_transfer.link_monitor import LinkMonitor, timed_part
from kv_transfer.sender import CodecFor
from kv_transfer.session import SendReport
from kv_transfer.transport import ANONYMOUS, LinkStats, PeerIdentity, Transport


class WorkerLinks:
    """Joins what measures the links of one worker."""

    def __init__(self, config: WorkerConfig, transport: Transport, ranks: RankProcesses | None, clock: Clock) -> None:
        """``transport``: this rank's; ``ranks``: the others, if there are any."""
        kv_transfer = config.kv_transfer
        self._transport = transport
        self._ranks = ranks
        self._codecs = LinkCodecs(clock, lambda to_cluster: kv_transfer.link(config.cluster_id, to_cluster).codecs)
        self.monitor = LinkMonitor(clock)
        self.codec_for: CodecFor | None = self._codecs.codec_of_write if kv_transfer.may_encode else None

    def stats(self) -> tuple[LinkStats, ...]:
        """Of this rank's links now, and of the others' as they were last told."""
        others = () if self._ranks is None else self._ranks.counts
        return self._transport.stats() + tuple(link for counts in others for link in counts.links)

    def speed(self, peer: PeerIdentity) -> float | None:
        """Bytes/s that the way there carries; None while it is not known."""
        return self.monitor.rate(peer.worker_id)

    def note(self, report: SendReport) -> None:
        """A hand-over has ended: what it tells of its link."""
        part = timed_part(report)
        if part is not None and report.receiver != ANONYMOUS:
            self.monitor.transferred(report.receiver, *part)

    def tick(self) -> None:
        """Called every ``TICK_S``."""
        self._codecs.tick(self._transport.stats())
        self.monitor.tick(self.stats())

    def estimates(self) -> Iterator[LinkEstimate]:
        """What is known of each link, its codec included."""
        codecs = {state.worker_id: state for state in self._codecs.states()}
        for estimate in self.monitor.estimates():
            state = codecs.get(estimate.worker_id)
            if state is None:
                yield estimate
            else:
                name, num_changes = state.choice.codec.name.lower(), sum(state.changes.values())
                yield replace(estimate, codec=name, codec_changes=num_changes)
