"""One end of a link between two pools of tensors: the real KvSender and KvReceiver, and how long a hand-over took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from threading import Condition

from benchmarks.kv_prompt import FINGERPRINT, NUM_LAYERS
from core.clock import WallClock
from core.errors import TransferError
from core.request import ClusterId, SessionId, WorkerId
from kv_transfer.config import KvTransferConfig, LinkConfig
from kv_transfer.receiver import KvReceiver
from kv_transfer.sender import KvSender
from kv_transfer.session import Grant, SendReport
from kv_transfer.staging_device import DeviceRegion
from kv_transfer.transport import PeerIdentity, create_transport

_LEASE_S = 600.0
_MOVE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class HandOver:
    """One hand-over, as the sending end saw it. Seconds."""

    seconds: float  # first page stored to acknowledged commit
    tail_s: float  # last layer stored to acknowledged commit
    num_bytes: int
    path: str


class GpuEnd:
    """A KvSender and a KvReceiver on one transport, as in a worker; one of the two is used."""

    def __init__(self, region: DeviceRegion, transport: str, connections: int, staging_mib: int | None = None) -> None:
        links = (LinkConfig(connections=connections),)
        config = KvTransferConfig(
            transport=transport, host="127.0.0.1", lease_s=_LEASE_S, links=links, staging_mib=staging_mib
        )
        identity = PeerIdentity(WorkerId("end"), ClusterId("bench"))
        self._transport = create_transport(config, FINGERPRINT, WallClock(), identity)
        self._transport.register(region)
        self._changed = Condition()
        self._reports: dict[SessionId, SendReport] = {}
        self._sender = KvSender(self._transport, WallClock(), self._on_closed)
        self.receiver = KvReceiver(self._transport, WallClock(), _committed, _released, _LEASE_S)

    def move(self, session_id: SessionId, pages: tuple[int, ...], grant: Grant, prefill_s: float) -> HandOver:
        self._sender.open(session_id, len(pages))
        self._sender.granted(session_id, grant)
        began = time.perf_counter()
        for layer in range(NUM_LAYERS):
            due = began + prefill_s * (layer + 1) / NUM_LAYERS
            if (left_s := due - time.perf_counter()) > 0:  # to sleep for no time takes 55 us
                time.sleep(left_s)
            self._sender.pages_stored(session_id, layer, 0, pages)
        last_stored = time.perf_counter()
        self._sender.commit(session_id, b"")
        with self._changed:
            if not self._changed.wait_for(lambda: session_id in self._reports, _MOVE_TIMEOUT_S):
                raise TimeoutError(f"the hand-over has not ended after {_MOVE_TIMEOUT_S:.0f} s")
            report = self._reports.pop(session_id)
        ended = time.perf_counter()
        if report.error is not None:
            raise report.error
        (stats,) = self._transport.stats()
        return HandOver(ended - began, ended - last_stored, report.bytes_sent, stats.path)

    def close(self) -> None:
        self._sender.close()
        self.receiver.close()
        self._transport.close()

    def _on_closed(self, session_id: SessionId, report: SendReport) -> None:
        with self._changed:
            self._reports[session_id] = report
            self._changed.notify_all()


def _committed(session_id: SessionId, payload: bytes) -> None: ...


def _released(session_id: SessionId, error: TransferError) -> None: ...
