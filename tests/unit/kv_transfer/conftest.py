"""A transport of one thread: it records what is queued, and the test plays the peer."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from core.clock import VirtualClock
from core.errors import ProtocolViolation, TransferError
from core.request import SessionId
from kv_transfer.messages import Message, decode
from kv_transfer.transport import (
    HOST_PIECES,
    LayerPages,
    LinkStats,
    PageGeometry,
    PieceLimits,
    ReceiveEvents,
    Region,
    SendEvents,
    TransportCounters,
    Write,
)

GEOMETRY = PageGeometry((LayerPages(8), LayerPages(8)), num_pages=10)


@dataclass(eq=False)
class FakeLink:
    peer: str = "peer"
    heard_at: float = 0.0
    sent: list[Write | Message] = field(default_factory=list)
    idle: bool = True  # what cancel finds
    closed: TransferError | None = None

    def write(self, write: Write) -> None:
        self.sent.append(write)

    def notify(self, session_id: SessionId, message: bytes) -> None:
        self.sent.append(decode(message))

    def cancel(self, session_id: SessionId) -> bool:
        return self.idle

    def close(self, error: TransferError) -> None:
        self.closed = self.closed or error


@dataclass
class FakeTransport:
    clock: VirtualClock
    links: list[FakeLink] = field(default_factory=list)
    counters: TransportCounters = field(default_factory=TransportCounters)
    pieces: PieceLimits = HOST_PIECES
    invited: list[bytes] = field(default_factory=list)
    region: Region = field(
        default_factory=lambda: Region(GEOMETRY, tuple(memoryview(bytearray(80)) for _ in GEOMETRY.layers))
    )

    def register(self, region: Region) -> None:
        raise NotImplementedError

    def serve(self, events: ReceiveEvents) -> None:
        pass

    def describe(self) -> bytes:
        return b"here"

    def connect(self, descriptor: bytes, events: SendEvents) -> FakeLink:
        if descriptor == b"nonsense":
            raise ProtocolViolation("nonsense")
        self.links.append(FakeLink(heard_at=self.clock.now()))
        return self.links[-1]

    def invite(self, descriptor: bytes) -> None:
        self.invited.append(descriptor)

    def stats(self) -> tuple[LinkStats, ...]:
        return ()

    def close(self) -> None:
        pass


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def transport(clock: VirtualClock) -> FakeTransport:
    return FakeTransport(clock)
