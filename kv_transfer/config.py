"""What the KV-transfer layer of one worker is told."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidConfig
from core.request import ClusterId

DIALS = ("sender", "receiver")
CHECKSUMS = ("xxh3", "none")
CODECS = ("raw", "lossless", "int8", "fp8")
ANY_CLUSTER = "*"
BYTES_PER_GBIT = 1e9 / 8


@dataclass(frozen=True)
class LinkConfig:
    """How KV travels from workers of one cluster to workers of one cluster. The first entry that fits a link is used.

    from_cluster: cluster of the sending worker (one that prefills, or the source of a page pull); ``*``: any.
    to_cluster: cluster of the receiving worker (one that decodes, or pulls pages to prefill); ``*``: any.
    connections: TCP connections of each pair of workers.
    dial: which end opens the connections, ``sender`` or ``receiver``: firewalls often allow one direction only.
    capacity_gbps: what the path between the clusters carries, Gbit/s, for all workers together; null: not known.
    pace_gbps: no pair of workers sends faster, Gbit/s; null: as fast as TCP allows.
    checksum: ``xxh3`` of every piece, checked by the receiver; ``none`` leaves it to TCP and TLS.
    codecs: what may be on the wire. Anything but ``raw`` is used only while raw does not fit the measured bandwidth:
        ``lossless`` costs CPU, ``int8`` and ``fp8`` change the tokens a little.
    """

    from_cluster: str = ANY_CLUSTER
    to_cluster: str = ANY_CLUSTER
    connections: int = 4
    dial: str = "sender"
    capacity_gbps: float | None = None
    pace_gbps: float | None = None
    checksum: str = "xxh3"
    codecs: tuple[str, ...] = ("raw",)

    def __post_init__(self) -> None:
        _require(bool(self.from_cluster), "from_cluster", "must be * or a cluster's name", self.from_cluster)
        _require(bool(self.to_cluster), "to_cluster", "must be * or a cluster's name", self.to_cluster)
        _require(1 <= self.connections <= 64, "connections", "must be between 1 and 64", self.connections)
        _require(self.dial in DIALS, "dial", f"must be one of {', '.join(DIALS)}", self.dial)
        _require(self.checksum in CHECKSUMS, "checksum", f"must be one of {', '.join(CHECKSUMS)}", self.checksum)
        for name in ("capacity_gbps", "pace_gbps"):
            rate = getattr(self, name)
            _require(rate is None or rate > 0, name, "must be null or above 0 Gbit/s", rate)
        for index, codec in enumerate(self.codecs):
            _require(codec in CODECS, f"codecs[{index}]", f"must be some of {', '.join(CODECS)}", codec)
        _require("raw" in self.codecs, "codecs", "must hold raw", list(self.codecs))

    def fits(self, from_cluster: ClusterId, to_cluster: ClusterId) -> bool:
        """Is this entry about links from ``from_cluster`` to ``to_cluster``?"""
        return self.from_cluster in (ANY_CLUSTER, from_cluster) and self.to_cluster in (ANY_CLUSTER, to_cluster)


@dataclass(frozen=True)
class KvTransferConfig:
    """One worker's end of every link.

    transport: ``tcp`` between processes and hosts; ``nixl`` over RDMA, NVLink or shared memory; ``local`` only inside
        one process (tests, one-process demos).
    host: address that peers connect to; null: the worker's own host.
    port: TCP port of a worker's end; 0: any free one.
    last_port: workers that share a host, and their ranks, take the first free one from ``port`` to this; null: only
        ``port``.
    lease_s: how long pages stay granted, or held, for a peer from which nothing is heard.
    self_test: before a prefill worker ships to a decode worker, random pages must have gone that way unchanged, and
        the service is not ready before one pair works; false: every pair is used untested.
    grant_wait_s: how long a finished prefill waits for the decode worker to have pages before it is given up.
    staging_mib: memory, MiB, of each end of a nixl link, through which its bytes are staged, on the pool's device;
        null: 64 in host memory, 256 on a GPU, 512 on one of 64 GiB or more.
    pull_timeout_s: how long a worker fetches cached pages from another one, at most, before it computes them itself.
    links: settings of links between clusters; what no entry fits has the defaults.
    """

    transport: str = "tcp"
    host: str | None = None
    port: int = 0
    last_port: int | None = None
    lease_s: float = 30.0
    grant_wait_s: float = 60.0
    pull_timeout_s: float = 10.0
    self_test: bool = True
    staging_mib: int | None = None
    links: tuple[LinkConfig, ...] = ()

    def __post_init__(self) -> None:
        if not self.transport:
            raise InvalidConfig("kv_transfer.transport", "must name a transport")
        for name in ("lease_s", "grant_wait_s", "pull_timeout_s"):
            if getattr(self, name) <= 0:
                raise InvalidConfig(f"kv_transfer.{name}", f"must be above 0 s, got {getattr(self, name)!r}")
        if self.staging_mib is not None and not 1 <= self.staging_mib <= 65536:
            allowed = "must be null or between 1 and 65536 MiB"
            raise InvalidConfig("kv_transfer.staging_mib", f"{allowed}, got {self.staging_mib!r}")
        require_ports("kv_transfer", self.port, self.last_port)

    @property
    def ports(self) -> range:
        """What is tried, in this order."""
        return range(self.port, (self.last_port or self.port) + 1)

    @property
    def may_encode(self) -> bool:
        """Whether any link may carry something else than raw bytes."""
        return any(link.codecs != ("raw",) for link in self.links)

    def link(self, from_cluster: ClusterId, to_cluster: ClusterId) -> LinkConfig:
        """The settings of links from ``from_cluster`` to ``to_cluster``."""
        fitting = (link for link in self.links if link.fits(from_cluster, to_cluster))
        return next(fitting, LinkConfig())

    def capacity(self, from_cluster: ClusterId, to_cluster: ClusterId) -> float | None:
        """Bytes/s that the path between the clusters is configured to carry; None: not configured."""
        gbps = self.link(from_cluster, to_cluster).capacity_gbps
        return None if gbps is None else gbps * BYTES_PER_GBIT


def require_ports(section: str, port: int, last_port: int | None) -> None:
    """``InvalidConfig`` unless they are one TCP port (0: any), or the first and the last of some."""
    _require(0 <= port < 65536, f"{section}.port", "must be between 0 and 65535", port)
    if last_port is not None:
        ok = 0 < port <= last_port < 65536
        _require(ok, f"{section}.last_port", f"must be null or from {section}.port, above 0, to 65535", last_port)


def _require(ok: bool, key: str, allowed: str, value: object) -> None:
    if not ok:
        raise InvalidConfig(key, f"{allowed}, got {value!r}")
