"""What the KV-transfer layer of one worker is told."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidConfig


@dataclass(frozen=True)
class KvTransferConfig:
    """One worker's end of every link.

    transport: ``tcp`` between processes and hosts; ``local`` only inside one process (tests, one-process demos).
    host: address that peers connect to; null: the worker's own host.
    port: TCP port of the receiving end; 0: any free one (needed when workers share a host).
    lease_s: how long pages stay granted, or held, for a peer from which nothing is heard.
    grant_wait_s: how long a finished prefill waits for the decode worker to have pages before it is given up.
    """

    transport: str = "tcp"
    host: str | None = None
    port: int = 0
    lease_s: float = 30.0
    grant_wait_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.transport:
            raise InvalidConfig("kv_transfer.transport", "must name a transport")
        for name in ("lease_s", "grant_wait_s"):
            if getattr(self, name) <= 0:
                raise InvalidConfig(f"kv_transfer.{name}", f"must be above 0 s, got {getattr(self, name)!r}")
        if not 0 <= self.port < 65536:
            raise InvalidConfig("kv_transfer.port", f"must be between 0 and 65535, got {self.port!r}")
