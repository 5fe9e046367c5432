"""What is known of the links between workers? The nouns that workers report, gateways read and policies decide by.

Bytes and bytes/s, never bits. Durations, no instants: these cross process borders. Where each number comes from is
told in docs/links.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.request import ClusterId, WorkerId

DELIVERY_MARGIN = 1.5  # a burst vanishes into socket buffers faster than the link; the kernel knows what arrived


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """One worker's links to one other worker, as the sending end knows them now. None: nothing has told it yet."""

    worker_id: WorkerId  # the receiving end
    cluster_id: ClusterId
    path: str = ""  # what carries the bytes, as found: ``tcp``, ``tcp+tls1.3``, ``ucx:shm``, ``local``
    connections: int = 0  # that live now
    goodput: float | None = None  # bytes/s while there were bytes to send, of the last half second of that
    delivery_rate: float | None = None  # bytes/s, the kernel's estimate, sum over the connections
    rtt_s: float | None = None
    min_rtt_s: float | None = None
    retransmits: int = 0  # segments sent again since the worker's start
    retransmits_per_mib: float = 0.0  # of recent traffic
    fit_t0_s: float | None = None
    fit_beta: float | None = None  # bytes/s
    fit_variance: float | None = None  # of ln(measured / expected seconds)
    samples: int = 0  # transfers that the fit has seen
    throughput: float = 0.0  # bytes/s of wall-clock time, of about the last two seconds
    bytes_sent: int = 0  # since the worker's start
    bytes_queued: int = 0
    reconnects: int = 0
    codec: str = "raw"  # what writes are encoded as now
    codec_changes: int = 0  # times that it was changed
    falls: int = 0  # times that a path meant for RDMA or shared memory was found to be TCP
    age_s: float = 0.0  # since bytes last moved

    @property
    def rate(self) -> float | None:
        """Bytes/s to expect of the next bytes: the fast evidence if there is any, else the fit's."""
        if self.goodput is None:
            return self.fit_beta or self.delivery_rate
        if self.delivery_rate is None:
            return self.goodput
        return min(self.goodput, DELIVERY_MARGIN * self.delivery_rate)

    def seconds(self, num_bytes: int) -> float | None:
        """Expected seconds until ``num_bytes`` more have arrived, behind what is queued; None: nothing is known."""
        rate = self.rate
        if rate is None:
            return None
        return (self.fit_t0_s or self.rtt_s or 0.0) + (self.bytes_queued + num_bytes) / rate


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """How the self-test of one ordered pair of workers ended: real bytes, on the real path, through real pages.

    ``error`` names the kind of what failed (a class of core/errors.py) and is empty if nothing did; ``reason`` is for
    people. ``num_bytes`` were compared at the receiver; ``seconds`` are those of the largest transfer, of
    ``timed_bytes`` bytes, first write to acknowledgement.
    """

    path: str
    num_bytes: int = 0
    exact: bool = False
    timed_bytes: int = 0
    seconds: float = 0.0
    rtt_s: float | None = None
    error: str = ""
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.exact and not self.error

    @property
    def rate(self) -> float | None:
        """Bytes/s of the largest transfer; None if none was completed."""
        return self.timed_bytes / self.seconds if self.seconds > 0 and self.timed_bytes else None
