"""Our end of the KV benchmark: the real KvSender and KvReceiver, with grants, commit and acknowledgement."""

from __future__ import annotations

import logging
import time
from threading import Condition

from benchmarks.fixed_codec import FixedCodecTransport
from benchmarks.kv_arms import Ours
from benchmarks.kv_end import MOVE_TIMEOUT_S, Moved
from benchmarks.kv_prompt import FINGERPRINT, NUM_LAYERS, geometry, layer_views
from core.clock import WallClock
from core.credentials import Credentials
from core.errors import TransferError
from core.request import ClusterId, SessionId, WorkerId
from kv_transfer.codec import Codec
from kv_transfer.config import KvTransferConfig, LinkConfig
from kv_transfer.link_monitor import LinkMonitor
from kv_transfer.receiver import KvReceiver
from kv_transfer.sender import KvSender
from kv_transfer.session import Grant, SendReport
from kv_transfer.transport import PeerIdentity, Region, Transport, create_transport

_SENDER, _RECEIVER = WorkerId("left"), WorkerId("right")
_LINK_TIMEOUT_S = 3.0  # for connections that are still being made
_LEASE_S = 3600.0  # the process is stopped while other arms have their turn


def make_end(
    arm: Ours, sends: bool, memory: memoryview, pool_pages: int, host: str, credentials: Credentials | None
) -> OurEnd:
    """One end of ``arm`` on the pool in ``memory``."""
    identity = PeerIdentity(_SENDER if sends else _RECEIVER, ClusterId("bench"))
    transport: Transport = create_transport(_config(arm, host), FINGERPRINT, WallClock(), identity, credentials)
    transport.register(Region(geometry(pool_pages), layer_views(memory, pool_pages)))
    if arm.codec != "raw":
        transport = FixedCodecTransport(transport, Codec[arm.codec.upper()])
    return OurEnd(transport, arm)


def _config(arm: Ours, host: str) -> KvTransferConfig:
    codecs = ("raw",) if arm.codec == "raw" else ("raw", arm.codec)
    link = LinkConfig(connections=arm.connections, checksum=arm.checksum, codecs=codecs)
    return KvTransferConfig(transport=arm.transport, host=host, lease_s=_LEASE_S, links=(link,))


class OurEnd:
    """A KvSender and a KvReceiver on one transport, as in a worker; one of the two is used.

    A whole prompt is offered at once, layer by layer, as if it had been computed already.
    """

    def __init__(self, transport: Transport, arm: Ours) -> None:
        self._transport = transport
        self._arm = arm
        self._changed = Condition()
        self._reports: dict[SessionId, SendReport] = {}
        self._links = LinkMonitor(WallClock())  # asked as a worker asks it: how large pieces are depends on it
        self._sender = KvSender(
            transport, WallClock(), self._on_closed, link_speed=lambda _: self._links.rate(_RECEIVER)
        )
        self._receiver = KvReceiver(transport, WallClock(), _committed, _released, _LEASE_S)

    def greet(self) -> None:
        return None  # the grant says it all

    def meet(self, greeting: object) -> None: ...

    def expect(self, session: str, pages: tuple[int, ...]) -> Grant:
        return self._receiver.issue(SessionId(session), 0, pages)

    def move(self, session: str, pages: tuple[int, ...], offer: Grant) -> Moved:
        session_id = SessionId(session)
        began = time.perf_counter()
        self._sender.open(session_id, len(pages))
        self._sender.granted(session_id, offer)
        for layer in range(NUM_LAYERS):
            self._sender.pages_stored(session_id, layer, 0, pages)
        self._sender.commit(session_id, b"")
        with self._changed:
            if not self._changed.wait_for(lambda: session_id in self._reports, MOVE_TIMEOUT_S):
                raise TimeoutError(f"the hand-over has not ended after {MOVE_TIMEOUT_S:.0f} s")
            report = self._reports.pop(session_id)
        seconds = time.perf_counter() - began
        if report.error is not None:
            raise report.error
        self._links.tick(self._transport.stats())
        return Moved(seconds, len(pages) * geometry(1).bytes_per_page, self._path())

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()
        self._transport.close()

    def _on_closed(self, session_id: SessionId, report: SendReport) -> None:
        with self._changed:
            self._reports[session_id] = report
            self._changed.notify_all()

    def _path(self) -> str:
        """What carried the bytes. Raises RuntimeError when it is not what the arm is about."""
        deadline = time.monotonic() + _LINK_TIMEOUT_S
        while True:
            stats = self._transport.stats()
            found = stats[0] if stats else None
            complaint = self._arm.complaint(found)
            if complaint is None:
                assert found is not None, "no complaint means that the link was seen"
                return found.path
            if found is None or time.monotonic() > deadline:
                raise RuntimeError(complaint)
            time.sleep(0.05)


def _committed(session_id: SessionId, payload: bytes) -> None: ...


def _released(session_id: SessionId, error: TransferError) -> None:
    logging.getLogger(__name__).warning("session %s was given up: %s", session_id, error)
