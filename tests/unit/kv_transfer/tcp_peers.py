"""Peers for tests of TCP links: a receiving transport that records, a sending one, a bare socket, and a relay.

The relay stands between two transports and sees every byte: it counts connections in the order in which they came,
and a test may delay, damage or cut each of them.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Condition, Event, Thread
from typing import Any

from core.clock import WallClock
from core.credentials import Credentials
from core.errors import TransferError
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, SessionId, WorkerId
from kv_transfer.config import KvTransferConfig, LinkConfig
from kv_transfer.frames import Hello, LinkRole, pack_hello
from kv_transfer.tcp import TcpTransport
from kv_transfer.tcp_endpoint import Descriptor, parse_descriptor
from kv_transfer.transport import LayerPages, PageGeometry, PeerIdentity, Region, Span, Strip, Write

FINGERPRINT = CacheFingerprint("model", "revision", "bfloat16", 16, "layout")
NUM_PAGES, PAGE_BYTES = 64, 65536
GEOMETRY = PageGeometry((LayerPages(PAGE_BYTES, "bfloat16", 8192),) * 2, NUM_PAGES)
TOKEN = b"t" * 16
A = SessionId("a")
PATIENCE_S = 20.0
Change = Callable[[int, bytes], bytes | None]  # (connection, bytes towards the listener) |-> bytes; None: cut it


class Told:
    """What events told, in order."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.told: list[tuple[Any, ...]] = []

    def tell(self, *what: Any) -> None:
        with self.changed:
            self.told.append(what)
            self.changed.notify_all()

    def until(self, enough: Callable[[], Any]) -> list[tuple[Any, ...]]:
        """Wait for any state of the world; looked at when something is told and every 10 ms."""
        with self.changed:
            assert any(self.changed.wait_for(enough, 0.01) for _ in range(int(PATIENCE_S * 100))), self.told
            return list(self.told)

    def until_told(self, *what: Any) -> list[tuple[Any, ...]]:
        return self.until(lambda: what in self.told)

    def until_lost(self) -> TransferError:
        self.until(lambda: any(what[0] == "lost" for what in self.told))
        (error,) = [what[1] for what in self.told if what[0] == "lost"]
        assert self.told[-1][0] == "lost", "nothing comes after it"
        return error  # type: ignore[no-any-return]

    def count(self, name: str) -> int:
        return len([what for what in self.told if what[0] == name])


class Received(Told):
    def __init__(self) -> None:
        super().__init__()
        self.judge: Callable[[Sequence[Span]], bool] = lambda spans: True

    def admit(self, link: Any, token: bytes, layers: range, spans: Sequence[Span]) -> SessionId | None:
        self.tell("admit", layers, spans)
        return A if token == TOKEN and self.judge(spans) else None

    def landed(self, link: Any, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        self.tell("landed", layers, spans)

    def damaged(self, link: Any, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        self.tell("damaged", layers, spans)

    def notified(self, link: Any, message: bytes) -> None:
        self.tell("notified", message)

    def lost(self, link: Any, error: TransferError) -> None:
        self.tell("lost", error)


class Sent(Told):
    def written(self, link: Any, write: Write) -> None:
        self.tell("written", write)

    def drained(self, link: Any, session_id: SessionId) -> None:
        self.tell("drained", session_id)

    def notified(self, link: Any, message: bytes) -> None:
        self.tell("notified", message)

    def lost(self, link: Any, error: TransferError) -> None:
        self.tell("lost", error)


@dataclass
class Worker:
    """One transport with its pool."""

    transport: TcpTransport
    pool: list[bytearray]
    received: Received = field(default_factory=Received)
    sent: Sent = field(default_factory=Sent)

    @property
    def descriptor(self) -> Descriptor:
        return parse_descriptor(self.transport.describe())

    def page(self, layer: int, page: int) -> bytes:
        return bytes(self.pool[layer][page * PAGE_BYTES : (page + 1) * PAGE_BYTES])


def make_worker(
    *,
    fill: int | None = None,
    link: LinkConfig | None = None,
    credentials: Credentials | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    last_port: int | None = None,
    lease_s: float = 5.0,
    name: str = "w",
    fingerprint: CacheFingerprint = FINGERPRINT,
) -> Worker:
    config = KvTransferConfig(host=host, port=port, last_port=last_port, lease_s=lease_s, links=(link or LinkConfig(),))
    identity = PeerIdentity(WorkerId(name), ClusterId("c"))
    size = NUM_PAGES * PAGE_BYTES
    pool = [bytearray(size if fill is None else random.Random(fill + i).randbytes(size)) for i in range(2)]
    worker = Worker(TcpTransport(config, fingerprint, WallClock(), identity, credentials), pool)
    worker.transport.register(Region(GEOMETRY, tuple(memoryview(layer) for layer in pool)))
    worker.transport.serve(worker.received)
    return worker


def write(page: int, *, layer: int = 0, num_pages: int = 1, session_id: SessionId = A) -> Write:
    strip = Strip(page * PAGE_BYTES, page * PAGE_BYTES, num_pages * PAGE_BYTES)
    return Write(session_id, TOKEN, layer, 1, (strip,))


def opening(worker: Worker, *, index: int = 0, num_connections: int = 1, **differs: Any) -> bytes:
    """The HELLO of a peer that knows the worker's key."""
    fields: dict[str, Any] = {
        "role": LinkRole.SENDS_PAGES,
        "key": worker.descriptor.key,
        "fingerprint": FINGERPRINT,
        "identity": PeerIdentity(WorkerId("stranger"), ClusterId("elsewhere")),
        "transport_id": b"s" * 16,
        "link_id": b"l" * 16,
        **differs,
    }
    return pack_hello(Hello(index=index, num_connections=num_connections, **fields))


class Relay:
    """Listens in place of a worker, and passes bytes on."""

    def __init__(self, to: Worker, change: Change = lambda connection, data: data, chunk_bytes: int = 65536) -> None:
        self._to = to.descriptor
        self._change = change
        self._chunk_bytes = chunk_bytes
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[Thread] = []
        self.blocked: dict[int, Event] = {}  # connection |-> what it waits for before anything more passes
        self._spawn(self._accept)

    @property
    def descriptor(self) -> bytes:
        return replace(self._to, port=self._server.getsockname()[1]).pack()

    @property
    def num_connections(self) -> int:
        return len(self._sockets)

    def cut(self, connection: int) -> None:
        for end in self._sockets[connection]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for event in self.blocked.values():
            event.set()
        self._server.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for connection in range(len(self._sockets)):
            self.cut(connection)
        for thread in self._threads:
            thread.join()
        for ends in self._sockets:
            for end in ends:
                end.close()
        self._server.close()

    def _spawn(self, body: Callable[..., None], *args: Any) -> None:
        thread = Thread(target=body, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._server.accept()
            except OSError:
                return
            there = socket.create_connection((self._to.host, self._to.port))
            self._sockets.append((here, there))
            number = len(self._sockets) - 1
            self._spawn(self._pass, here, there, number, self._change)
            self._spawn(self._pass, there, here, number, lambda connection, data: data)

    def _pass(self, source: socket.socket, target: socket.socket, number: int, change: Change) -> None:
        with suppress(OSError):
            while data := source.recv(self._chunk_bytes):
                if source is self._sockets[number][0] and number in self.blocked:
                    self.blocked[number].wait(PATIENCE_S)
                changed = change(number, data)
                if changed is None:
                    break
                target.sendall(changed)
        self.cut(number)
