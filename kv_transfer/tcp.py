"""The transport between processes and hosts: one long-lived TCP connection for each (sending, receiving) pair.

The life of a write: a session queues it in the link's Outbox -> the link's writer thread takes it in its turn and sends
head and pages with one gathered ``sendmsg`` straight out of the pool -> at the peer the reader thread reads the head,
asks ``admit``, and receives the payload straight into the destination pages; a payload that may not land is read into a
scratch buffer and thrown away. No byte is copied in user memory and no system call is made per page.

Each end of a link has a writer and a reader thread; the end that dials does so in its writer, the end that accepts
shakes hands in its reader. Rules:

- A frame under way is always finished or the connection ends: so cancelling costs at most one write.
- Whatever ends one thread of an end ends the other, by shutting the socket down; the last of them reports ``lost``. So
  after ``lost`` neither thread touches the region.
- A peer that speaks nonsense, or is not of our cache, loses its connection and is counted; nothing it said took effect.
- A link with nothing to send sends KEEPALIVE four times per lease: a process that is stopped or cut off falls silent.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Condition, Lock, Thread, current_thread

from core.clock import Clock
from core.credentials import Credentials
from core.errors import Incompatible, PeerLost, ProtocolViolation, TransferError
from core.fingerprint import CacheFingerprint
from core.request import SessionId
from kv_transfer.config import KvTransferConfig
from kv_transfer.frames import (
    HEADER_BYTES,
    KEEPALIVE,
    KEY_BYTES,
    FrameKind,
    Header,
    Hello,
    LinkRole,
    WriteHead,
    pack_hello,
    pack_message,
    pack_write,
    parse_header,
    parse_hello,
    parse_write,
)
from kv_transfer.outbox import Notice, Outbox, Taker
from kv_transfer.transport import (
    ANONYMOUS,
    LinkStats,
    PeerIdentity,
    ReceiveEvents,
    Region,
    SendEvents,
    TransportCounters,
    Write,
)

logger = logging.getLogger(__name__)

_DESCRIPTOR = struct.Struct("<5sH16s")  # then the host, UTF-8
_DESCRIPTOR_MAGIC = b"tcp/1"
_NO_KEY = bytes(KEY_BYTES)
_HANDSHAKE_S = 5.0
_KEEPALIVES_PER_LEASE = 4
_SCRATCH_BYTES = 1 << 18
_BACKLOG = 128


class TcpTransport:
    """One process's listening socket and every link that it made or accepted."""

    def __init__(
        self,
        config: KvTransferConfig,
        fingerprint: CacheFingerprint,
        clock: Clock,
        identity: PeerIdentity = ANONYMOUS,
        credentials: Credentials | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.clock = clock
        self.lease_s = config.lease_s
        self.keepalive_s = config.lease_s / _KEEPALIVES_PER_LEASE
        self.key = secrets.token_bytes(KEY_BYTES)
        self._host = config.host
        self._port = config.port
        self._region: Region | None = None
        self._events: ReceiveEvents | None = None
        self._listener: socket.socket | None = None
        self._acceptor: Thread | None = None
        self._changed = Condition()
        self._ends: set[_End] = set()
        self._closed = False
        self._counters = TransportCounters()

    @property
    def region(self) -> Region:
        assert self._region is not None, "register comes first"
        return self._region

    @property
    def counters(self) -> TransportCounters:
        return self._counters

    def register(self, region: Region) -> None:
        assert self._region is None, "a region is registered once"
        self._region = region

    def serve(self, events: ReceiveEvents) -> None:
        """Also raises OSError when the address cannot be bound."""
        assert self._listener is None, "a transport serves once"
        self._events = events
        self._listener = socket.create_server((self._host or "", self._port), backlog=_BACKLOG)
        self._acceptor = Thread(target=self._accept, args=(self._listener, events), name="kv-accept", daemon=True)
        self._acceptor.start()

    def describe(self) -> bytes:
        assert self._listener is not None, "serve comes first"
        port: int = self._listener.getsockname()[1]
        return _DESCRIPTOR.pack(_DESCRIPTOR_MAGIC, port, self.key) + (self._host or socket.gethostname()).encode()

    def connect(self, descriptor: bytes, events: SendEvents) -> _SendEnd:
        host, port, key = _parse_descriptor(descriptor)
        end = _SendEnd(self, f"{host}:{port}", events, (host, port), key)
        self._start(end)
        return end

    def invite(self, descriptor: bytes) -> None:
        """Every link is dialled by its sending end."""

    def stats(self) -> tuple[LinkStats, ...]:
        return ()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            ends = list(self._ends)
        if self._listener is not None and self._acceptor is not None:
            _shut_down(self._listener)  # wakes accept
            self._acceptor.join()
            self._listener.close()
        for end in ends:
            end.close(PeerLost("this end's transport was closed"))
        with self._changed:
            self._changed.wait_for(lambda: not self._ends)
        for end in ends:
            end.join()

    def count_refused_link(self) -> None:
        with self._changed:
            self._counters = replace(self._counters, links_refused=self._counters.links_refused + 1)

    def count_bad_frame(self) -> None:
        with self._changed:
            self._counters = replace(self._counters, bad_frames=self._counters.bad_frames + 1)

    def count_refused_write(self) -> None:
        with self._changed:
            self._counters = replace(self._counters, writes_refused=self._counters.writes_refused + 1)

    def forget(self, end: _End) -> None:
        """The end's last event was called."""
        with self._changed:
            self._ends.discard(end)
            self._changed.notify_all()

    def _accept(self, listener: socket.socket, events: ReceiveEvents) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError as error:
                if not self._closed:
                    logger.error("kv transfer accepts no more links: %s", error)
                return
            self._start(_ReceiveEnd(self, f"{address[0]}:{address[1]}", events, connection))

    def _start(self, end: _End) -> None:
        with self._changed:
            closed = self._closed
            self._ends.add(end)
        if closed:
            end.close(PeerLost("this end's transport is closed"))
        end.start()


def _parse_descriptor(descriptor: bytes) -> tuple[str, int, bytes]:
    if len(descriptor) <= _DESCRIPTOR.size:
        raise ProtocolViolation("the descriptor is not of a tcp transport")
    magic, port, key = _DESCRIPTOR.unpack_from(descriptor)
    if magic != _DESCRIPTOR_MAGIC:
        raise ProtocolViolation("the descriptor is not of a tcp transport")
    try:
        return descriptor[_DESCRIPTOR.size :].decode(), port, key
    except UnicodeDecodeError as error:
        raise ProtocolViolation("the descriptor's host is not UTF-8") from error


def _tune(connection: socket.socket, lease_s: float) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A host that vanished acknowledges nothing: the kernel gives up within the lease, not after a quarter of an hour.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(lease_s * 1000))
    # Buffer sizes stay the kernel's: setting them caps them at net.core.{r,w}mem_max and ends its autotuning, which
    # goes further on a long link; on loopback 4 MiB by hand made no difference.


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):  # not connected (any more): nobody waits on it
        connection.shutdown(socket.SHUT_RDWR)


def _send_all(connection: socket.socket, views: Sequence[memoryview]) -> None:
    while views:
        views = _after(views, connection.sendmsg(views))


def _after(views: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """What of ``views`` is left when their first ``count`` bytes are done."""
    for i, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[i + 1 :]]
        count -= view.nbytes
    return []


class _End(ABC):
    """What both ends of a link share: a socket, an outbox, two threads, and one way to end."""

    def __init__(self, transport: TcpTransport, peer: str) -> None:
        self._transport = transport
        self._peer = peer
        self._heard_at = transport.clock.now()
        self._outbox = Outbox(transport.clock)
        self._lock = Lock()
        self._socket: socket.socket | None = None
        self._error: TransferError | None = None
        self._threads: list[Thread] = []
        self._num_running = 0

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def heard_at(self) -> float:
        return self._heard_at

    def notify(self, session_id: SessionId, message: bytes) -> None:
        self._outbox.put(session_id, message)

    def close(self, error: TransferError) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
            connection = self._socket
        self._outbox.close()
        if connection is not None:
            _shut_down(connection)

    @abstractmethod
    def start(self) -> None:
        """Start the first thread, which starts the second."""

    def join(self) -> None:
        for thread in self._threads:
            if thread is not current_thread():
                thread.join()

    @abstractmethod
    def _report_lost(self, error: TransferError) -> None: ...

    def _spawn(self, body: Callable[[], None], name: str) -> None:
        thread = Thread(target=self._guard, args=(body,), name=name, daemon=True)
        with self._lock:
            self._num_running += 1
            self._threads.append(thread)
        thread.start()

    def _guard(self, body: Callable[[], None]) -> None:
        try:
            body()
        except ProtocolViolation as error:
            self._transport.count_bad_frame()
            logger.warning("kv link with %s closed: %s", self._peer, error)
            self.close(error)
        except TransferError as error:
            self.close(error)
        except OSError as error:
            self.close(PeerLost(f"the link with {self._peer} broke: {error}"))
        finally:
            self.close(PeerLost(f"the link with {self._peer} has ended"))
            self._thread_ended()

    def _thread_ended(self) -> None:
        with self._lock:
            self._num_running -= 1
            last = self._num_running == 0
            error, connection = self._error, self._socket
        if not last:
            return
        assert error is not None, "a thread ends only when the end is closed"
        if connection is not None:
            connection.close()
        try:
            self._report_lost(error)
        finally:
            self._transport.forget(self)

    def _adopt(self, connection: socket.socket) -> None:
        """Take a socket over, so that ``close`` can wake whoever waits on it."""
        with self._lock:
            self._socket = connection
            closed = self._error is not None
        if closed:
            _shut_down(connection)

    def _opened(self) -> socket.socket:
        assert self._socket is not None, "only called after _adopt"
        return self._socket

    # ---- writer thread ----

    def _write_loop(self) -> None:
        connection = self._opened()
        taker = Taker(control=True)
        while not self._outbox.closed:
            item = self._outbox.take(taker, self._transport.keepalive_s)
            if isinstance(item, Write):
                self._send_write(connection, item)
            elif isinstance(item, Notice):
                connection.sendall(pack_message(item.message))
            elif not self._outbox.closed:
                connection.sendall(KEEPALIVE)

    def _send_write(self, connection: socket.socket, write: Write) -> None:
        raise ProtocolViolation("only the sending end writes")

    # ---- reader thread ----

    def _read_loop(self) -> None:
        data = bytearray(HEADER_BYTES)
        while True:
            self._receive([memoryview(data)], at_border=True)
            header = parse_header(data)
            head = bytearray(header.head_bytes)
            self._receive([memoryview(head)])
            match header.kind:
                case FrameKind.WRITE:
                    self._take_write(header, parse_write(bytes(head)))
                case FrameKind.MESSAGE:
                    self._take_message(bytes(head))
                case FrameKind.HELLO:
                    raise ProtocolViolation("a second HELLO")
                case FrameKind.KEEPALIVE:
                    pass

    def _take_write(self, header: Header, head: WriteHead) -> None:
        raise ProtocolViolation("only the receiving end is written to")

    @abstractmethod
    def _take_message(self, message: bytes) -> None: ...

    def _receive(self, views: Sequence[memoryview], *, at_border: bool = False) -> None:
        """Fill ``views`` from the socket. Raises PeerLost when the stream ends first.

        MSG_WAITALL: one call and one turn of the interpreter's lock for a whole write, a third faster than piecemeal.
        """
        connection = self._opened()
        views = [view for view in views if view.nbytes]
        filled = 0
        while views:
            count = connection.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            if count == 0:
                where = "" if at_border and filled == 0 else " in the middle of a frame"
                raise PeerLost(f"{self._peer} closed the link{where}")
            self._heard_at = self._transport.clock.now()
            filled += count
            views = _after(views, count)

    def _receive_hello(self) -> Hello:
        data = bytearray(HEADER_BYTES)
        self._receive([memoryview(data)], at_border=True)
        header = parse_header(data)
        if header.kind is not FrameKind.HELLO:
            raise ProtocolViolation(f"a {header.kind.name} frame before HELLO")
        head = bytearray(header.head_bytes)
        self._receive([memoryview(head)])
        return parse_hello(bytes(head))


class _SendEnd(_End):
    """The end that dials, and writes."""

    def __init__(
        self, transport: TcpTransport, peer: str, events: SendEvents, address: tuple[str, int], key: bytes
    ) -> None:
        super().__init__(transport, peer)
        self._events = events
        self._address = address
        self._key = key

    def write(self, write: Write) -> None:
        self._outbox.put(write.session_id, write)

    def cancel(self, session_id: SessionId) -> bool:
        return self._outbox.cancel(session_id)

    def start(self) -> None:
        self._spawn(self._run, "kv-writer")

    def _run(self) -> None:
        connection = self._dial()
        connection.sendall(pack_hello(Hello(LinkRole.SENDS_PAGES, self._key, self._transport.fingerprint)))
        theirs = self._receive_hello()
        self._transport.fingerprint.require_equal(theirs.fingerprint)
        if theirs.role is not LinkRole.RECEIVES_PAGES:
            raise ProtocolViolation("both ends want to send pages")
        connection.settimeout(None)
        self._spawn(self._read_loop, "kv-reader")
        self._write_loop()

    def _dial(self) -> socket.socket:
        family, kind, protocol, _, address = socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM)[0]
        connection = socket.socket(family, kind, protocol)
        self._adopt(connection)  # before connect, so that close() need not wait for it
        _tune(connection, self._transport.lease_s)
        connection.settimeout(_HANDSHAKE_S)
        connection.connect(address)
        with self._lock:
            if self._error is not None:  # closed before there was anything to shut down
                raise self._error
        return connection

    def _send_write(self, connection: socket.socket, write: Write) -> None:
        region = self._transport.region
        views = [region.bytes_at(layer, strip.src, strip.num_bytes) for layer in write.layers for strip in write.strips]
        spans = ((strip.dst, strip.num_bytes) for strip in write.strips)
        head = pack_write(write.token, write.layers, spans, write.num_bytes)
        _send_all(connection, [memoryview(head), *views])
        drained = self._outbox.done(write)
        self._events.written(self, write)
        if drained:
            self._events.drained(self, write.session_id)

    def _take_message(self, message: bytes) -> None:
        self._events.notified(self, message)

    def _report_lost(self, error: TransferError) -> None:
        self._events.lost(self, error)


class _ReceiveEnd(_End):
    """The end that accepts, and is written to."""

    def __init__(self, transport: TcpTransport, peer: str, events: ReceiveEvents, connection: socket.socket) -> None:
        super().__init__(transport, peer)
        self._events = events
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._greeted = False  # before the handshake nobody was told of this link
        self._adopt(connection)

    def start(self) -> None:
        self._spawn(self._run, "kv-reader")

    def _run(self) -> None:
        try:
            self._greet()
        except (TransferError, OSError) as error:
            self._transport.count_refused_link()
            logger.warning("kv link from %s refused: %s", self._peer, error)
            self.close(PeerLost("refused"))
            return
        self._greeted = True
        self._spawn(self._write_loop, "kv-writer")
        self._read_loop()

    def _greet(self) -> None:
        connection = self._opened()
        _tune(connection, self._transport.lease_s)
        connection.settimeout(_HANDSHAKE_S)
        try:
            theirs = self._receive_hello()
        except Incompatible:
            self._answer(connection)  # so that the peer, too, sees which versions there are
            raise
        if not hmac.compare_digest(theirs.key, self._transport.key) or theirs.role is not LinkRole.SENDS_PAGES:
            raise ProtocolViolation("its HELLO does not hold our access key")
        self._answer(connection)  # also to a peer of another cache: it finds out by itself which field differs
        self._transport.fingerprint.require_equal(theirs.fingerprint)
        connection.settimeout(None)

    def _answer(self, connection: socket.socket) -> None:
        connection.sendall(pack_hello(Hello(LinkRole.RECEIVES_PAGES, _NO_KEY, self._transport.fingerprint)))

    def _take_write(self, header: Header, head: WriteHead) -> None:
        if header.payload_bytes != head.num_bytes:
            raise ProtocolViolation(f"a WRITE of {head.num_bytes} bytes with a payload of {header.payload_bytes}")
        session_id = self._events.admit(self, head.token, head.layers, head.spans)
        if session_id is None:
            self._transport.count_refused_write()
            self._drain(header.payload_bytes)
            return
        region = self._transport.region
        self._receive(
            [region.bytes_at(layer, span.offset, span.num_bytes) for layer in head.layers for span in head.spans]
        )
        self._events.landed(self, session_id, head.layers, head.spans)

    def _take_message(self, message: bytes) -> None:
        self._events.notified(self, message)

    def _drain(self, num_bytes: int) -> None:
        while num_bytes:
            part = min(num_bytes, _SCRATCH_BYTES)
            self._receive([self._scratch[:part]])
            num_bytes -= part

    def _report_lost(self, error: TransferError) -> None:
        if self._greeted:
            self._events.lost(self, error)
