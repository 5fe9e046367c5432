"""Workers' KV halves over every transport: a prefill worker's pool and sender, a decode worker's pool and receiver."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Condition

import pytest

from core.clock import WallClock
from core.errors import TransferError
from core.fingerprint import CacheFingerprint
from core.kv_layout import KvLayout
from core.request import SessionId
from kv_transfer.config import KvTransferConfig
from kv_transfer.receiver import KvReceiver
from kv_transfer.sender import KvSender
from kv_transfer.session import Grant, SendReport
from kv_transfer.transport import TRANSPORTS, LayerPages, PageGeometry, Region, Transport, create_transport

FINGERPRINT = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")
GEOMETRY = PageGeometry((LayerPages(512), LayerPages(512), LayerPages(2048)), num_pages=64)
PATIENCE_S = 20.0


class Outcomes:
    """What the callbacks told, by session; telling one session's end twice fails the test."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.closed: dict[SessionId, SendReport] = {}
        self.committed: dict[SessionId, bytes] = {}
        self.released: dict[SessionId, TransferError] = {}

    def on_closed(self, session_id: SessionId, report: SendReport) -> None:
        with self.changed:
            assert session_id not in self.closed
            self.closed[session_id] = report
            self.changed.notify_all()

    def on_committed(self, session_id: SessionId, payload: bytes) -> None:
        with self.changed:
            assert session_id not in self.committed.keys() | self.released.keys()
            self.committed[session_id] = payload
            self.changed.notify_all()

    def on_released(self, session_id: SessionId, error: TransferError) -> None:
        with self.changed:
            assert session_id not in self.committed.keys() | self.released.keys()
            self.released[session_id] = error
            self.changed.notify_all()

    def until(self, enough: Callable[[], bool]) -> None:
        """Wait, also for what no callback tells (a counter)."""
        with self.changed:
            for _ in range(int(PATIENCE_S / 0.01)):
                if self.changed.wait_for(enough, 0.01):
                    return
            raise AssertionError(f"{self.closed} {self.committed} {self.released}")

    def close_of(self, session_id: SessionId) -> SendReport:
        self.until(lambda: session_id in self.closed)
        return self.closed[session_id]

    def release_of(self, session_id: SessionId) -> TransferError:
        self.until(lambda: session_id in self.released)
        return self.released[session_id]

    def payload_of(self, session_id: SessionId) -> bytes:
        self.until(lambda: session_id in self.committed)
        return self.committed[session_id]


@dataclass
class Worker:
    """The KV half of a worker process."""

    transport: Transport
    layers: list[bytearray]
    geometry: PageGeometry = GEOMETRY
    outcomes: Outcomes = field(default_factory=Outcomes)
    layout: KvLayout | None = None
    link_bytes_per_s: float | None = 1.0  # so slow that each layer travels by itself; None: layers pile up
    rank: int = 0

    def __post_init__(self) -> None:
        self.region = Region(self.geometry, tuple(memoryview(layer) for layer in self.layers))
        self.transport.register(self.region)
        clock = WallClock()
        outcomes = self.outcomes
        self.sender = KvSender(
            self.transport, clock, outcomes.on_closed, self.layout, lambda peer: self.link_bytes_per_s
        )
        self.receiver = KvReceiver(
            self.transport, clock, outcomes.on_committed, outcomes.on_released, 30.0, self.layout, self.rank
        )

    def page(self, layer: int, page: int) -> bytes:
        return bytes(self.region.pages(layer, page, 1))

    def store_all(self, session_id: SessionId, src_pages: Sequence[int], num_layers: int = GEOMETRY.num_layers) -> None:
        for layer in range(num_layers):
            self.sender.pages_stored(session_id, layer, 0, src_pages)

    def hand_over(self, session_id: SessionId, src_pages: Sequence[int], grant: Grant, payload: bytes = b"") -> None:
        self.sender.open(session_id, len(src_pages))
        self.sender.granted(session_id, grant)
        self.store_all(session_id, src_pages)
        self.sender.commit(session_id, payload)

    def close(self) -> None:
        """Close, and ask both halves whether they are whole."""
        self.sender.close()
        self.receiver.close()
        self.transport.close()
        assert (self.sender.num_sessions, self.receiver.num_sessions, self.receiver.num_quarantined) == (0, 0, 0)


MakeWorker = Callable[..., Worker]


@pytest.fixture(params=sorted(TRANSPORTS))
def make_worker(request: pytest.FixtureRequest) -> Iterator[MakeWorker]:
    if request.param == "nixl":
        pytest.importorskip("nixl", reason="pip install 'prfaas[nixl]'")
    workers: list[Worker] = []

    def make(
        seed: int | None = None,
        layout: KvLayout | None = None,
        outcomes: Outcomes | None = None,
        rank: int = 0,
        **differs: str,
    ) -> Worker:
        config = KvTransferConfig(transport=request.param, host="127.0.0.1", lease_s=5.0, staging_mib=1)
        geometry = GEOMETRY
        if layout is not None:
            pages = (LayerPages(layout.page_bytes(i), layout.layers[i].dtype) for i in range(len(layout.layers)))
            geometry = PageGeometry(tuple(pages), num_pages=64)
        sizes = [geometry.num_pages * layer.page_bytes for layer in geometry.layers]
        layers = [bytearray(size if seed is None else random.Random(seed).randbytes(size)) for size in sizes]
        fingerprint = replace(FINGERPRINT, **differs)  # type: ignore[arg-type]
        transport = create_transport(config, fingerprint, WallClock())
        workers.append(Worker(transport, layers, geometry, outcomes or Outcomes(), layout, rank=rank))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def prefill(make_worker: MakeWorker) -> Worker:
    return make_worker(seed=1)


@pytest.fixture
def decode(make_worker: MakeWorker) -> Worker:
    return make_worker()
