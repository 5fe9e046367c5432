"""Is what the processes of a service tell each other encrypted and checked, why, and with whose certificates?

Decided once, at the start, from ``tls`` and from where the workers listen; the decision is logged and in the status.
With files given, every process reads them on its own node. Without, an authority is made for this run of the service:
its key stays in this process's memory, each worker is handed a certificate of its own, and when the service ends
nothing that it signed is worth anything.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from cluster.certificates import AUTHORITY_DAYS, Authority, private_files, require_grpc_accepts
from cluster.config import TlsConfig
from core.credentials import Credentials, Pem
from core.request import ClusterId, GatewayId, WorkerId

logger = logging.getLogger(__name__)

# What one worker process shows its peers: files on its node, or what it is to put into files of its own, or nothing.
Proof = Credentials | Pem | None
IssueProof = Callable[[WorkerId], Proof]


@dataclass(frozen=True, slots=True)
class TlsDecision:
    """Whether internal calls and KV links are mutual TLS; the reason is for logs and the status."""

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.on else 'off'}: {self.reason}"


def decide_tls(config: TlsConfig, addresses: Iterable[str]) -> TlsDecision:
    """What ``config`` means for workers that listen on ``addresses`` (IP addresses or host names, no ports)."""
    reachable = sorted({address for address in addresses if not is_loopback(address)})
    listening = f"workers listen on {', '.join(reachable)}" if reachable else "workers listen on loopback only"
    whose = "with the certificates given" if config.has_files else "with certificates made for this run"
    match config.mode:
        case "on":
            return TlsDecision(True, f"tls.mode says so, {whose}")
        case "off":
            return TlsDecision(False, f"tls.mode says so; {listening}")
        case _ if config.has_files:
            return TlsDecision(True, "certificates are given")
        case _:
            return TlsDecision(bool(reachable), f"{listening}{f', {whose}' if reachable else ''}")


def is_loopback(host: str) -> bool:
    """Does ``host`` name this machine's loopback interface? A host name other than ``localhost`` may be anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class InternalTls:
    """The certificates of one run of a service, for this process and for its workers."""

    def __init__(self, config: TlsConfig, addresses: Iterable[str], cluster_id: ClusterId) -> None:
        addresses = tuple(addresses)
        self.decision = decide_tls(config, addresses)
        self._given = config.credentials
        self._authority: Authority | None = None
        if self.decision.on and self._given is None:
            self._authority = Authority.create(cluster_id)
        self._files = ExitStack()
        exposed = not self.decision.on and not all(map(is_loopback, addresses))
        logger.log(logging.WARNING if exposed else logging.INFO, "internal TLS is %s", self.decision)

    def open(self, gateway_id: GatewayId) -> Credentials | None:
        """This process's own credentials, until ``close``; None: TLS is off.

        Raises ``InvalidConfig`` for given files that cannot be used, here and now.
        """
        if not self.decision.on:
            return None
        if self._authority is None:
            assert self._given is not None, "on without files means an authority"
            self._given.check()
            require_grpc_accepts(self._given.cert_file)
            return self._given
        return self._files.enter_context(private_files(self._authority.issue(gateway_id, AUTHORITY_DAYS)))

    def proof_of(self, worker_id: WorkerId) -> Proof:
        """What that worker is to be handed."""
        if not self.decision.on:
            return None
        return self._given if self._authority is None else self._authority.issue(worker_id, AUTHORITY_DAYS)

    def close(self) -> None:
        """Forget this process's own files, if they were made here."""
        self._files.close()
