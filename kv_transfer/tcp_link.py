"""What is one end of a TCP link made of? Connections that come and go, two threads for each, and one way to end.

A link is a control connection, number 0, and stripes. Every connection takes writes from the one Outbox when it has
sent what it had: a slow one gets less and stalls nobody. Messages travel on the control connection alone; one is
delivered when every stripe that lives has shown the message's barrier, which travels on each stripe behind what it was
sending (outbox.py). So no message overtakes a write, and nothing is acknowledged.

- The sending end uses a connection from the first frame that it heard on it after HELLO, and the receiving end says
  that (KEEPALIVE) only when it counts the connection among the stripes: no barrier is ever waited for too little.
- The control connection's end is the link's end. A stripe's is not: the end that dialled dials again, ever more rarely.
- What one thread of a connection finds wrong ends the other one, by shutting the socket down. When the link's last
  thread ends, ``lost`` is reported: no thread can touch the region afterwards.
- Whatever an event raises ends the link; whatever makes no sense on a stripe ends the stripe.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from threading import Condition, Thread, current_thread
from typing import ClassVar

from core.errors import PeerLost, PrfaasError, ProtocolViolation, TransferError
from core.request import SessionId
from kv_transfer.frames import (
    KEEPALIVE,
    FrameKind,
    Header,
    Hello,
    LinkRole,
    pack_barrier,
    pack_hello,
    pack_message,
    parse_barrier,
    parse_keepalive,
    parse_message,
)
from kv_transfer.outbox import Barrier, Notice, Outbox, Taker
from kv_transfer.tcp_endpoint import Descriptor, Endpoint, read_frame, read_hello
from kv_transfer.tcp_stream import Stream
from kv_transfer.transport import PeerIdentity, Write

logger = logging.getLogger(__name__)

_BACKOFF_S = (0.05, 5.0)  # before a lost stripe is dialled again: at first, at most


class Connection:
    """One socket of a link, past its handshake."""

    def __init__(self, stream: Stream, index: int) -> None:
        self.stream = stream
        self.index = index
        self.taker = Taker(control=index == 0)
        self.shown = 0  # the highest barrier that the peer has shown on it
        self.failure: TransferError | None = None  # why it is lost; None: it lives
        self.num_threads = 2  # a reader and a writer; the last one closes the socket
        self._scratch = memoryview(b"")

    def scratch(self, num_bytes: int) -> memoryview:
        """The reader's own buffer, for what may not or cannot be received in its place."""
        if self._scratch.nbytes < num_bytes:
            self._scratch = memoryview(bytearray(num_bytes))
        return self._scratch[:num_bytes]


class LinkEnd(ABC):
    """What both ends of a link share. Made with one user, the caller, who calls ``opened`` when it is done."""

    role: ClassVar[LinkRole]

    def __init__(
        self,
        endpoint: Endpoint,
        peer: str,
        identity: PeerIdentity,
        transport_id: bytes,
        forget: Callable[[LinkEnd], None],
    ) -> None:
        self.identity = identity
        self.transport_id = transport_id  # the peer's
        self._endpoint = endpoint
        self._peer = peer
        self._forget = forget
        self._heard_at = endpoint.clock.now()
        self._outbox = Outbox(endpoint.clock)
        self._changed = Condition()
        self._link_id = b""
        self._num_connections = 0
        self._opening: dict[int, Stream] = {}
        self._connections: dict[int, Connection] = {}
        self._stripes: set[Connection] = set()  # whose reader lives
        self._seen: set[int] = set()  # indices that were connected once
        self._reconnects = 0
        self._pending: deque[tuple[int, bytes]] = deque()  # messages and their barriers
        self._delivering = False
        self._error: TransferError | None = None
        self._threads: list[Thread] = []
        self._num_users = 1

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def link_id(self) -> bytes:
        """Named by the end that dials; empty before."""
        return self._link_id

    @property
    def connected(self) -> bool:
        """The control connection has shaken hands, now or once."""
        return 0 in self._seen

    @property
    def heard_at(self) -> float:
        """The kernel knows when the last byte came, also in the middle of a long read."""
        with self._changed:
            connections = list(self._connections.values())
        now = self._endpoint.clock.now()
        for connection in connections:
            try:
                silent_s = connection.stream.info().silent_s
            except OSError:
                continue  # closed meanwhile
            self._heard_at = max(self._heard_at, now - silent_s)
        return self._heard_at

    def notify(self, session_id: SessionId, message: bytes) -> None:
        self._outbox.put(session_id, message)

    def close(self, error: TransferError) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            streams = [connection.stream for connection in self._connections.values()]
            streams += self._opening.values()
            self._changed.notify_all()
        self._outbox.close()
        for stream in streams:
            stream.shut_down()

    def wait_for_threads(self) -> None:
        """After ``lost``: the threads are about to end."""
        for thread in self._threads:
            if thread is not current_thread():
                thread.join()

    # ---- opening ----

    def dial(self, to: Descriptor, link_id: bytes, num_connections: int) -> None:
        """Open every connection from here, and keep them open."""
        self.name(link_id, num_connections)
        self._spawn(partial(self._keep_connected, to, 0), "kv-link-0")

    def name(self, link_id: bytes, num_connections: int) -> None:
        with self._changed:
            self._link_id, self._num_connections = link_id, num_connections

    def expects(self, theirs: Hello) -> bool:
        """Is this a stripe of this link?"""
        mine = (self._link_id, self.transport_id, self._num_connections)
        named = (theirs.link_id, theirs.transport_id, theirs.num_connections)
        return theirs.index > 0 and theirs.role is not self.role and mine == named

    def run(self, connection: Connection) -> None:
        """Use a connection that has shaken hands; this thread writes on it. Returns when it is gone.

        Raises what the link was closed with if it is closed.
        """
        with self._changed:
            if self._error is not None:
                connection.stream.close()
                raise self._error
            old = self._connections.get(connection.index)
            self._connections[connection.index] = connection
            if connection.index in self._seen:
                self._reconnects += 1
            self._seen.add(connection.index)
            if connection.index > 0:
                self._stripes.add(connection)
            self._num_users += 2
            reader = Thread(
                target=self._tend, args=(connection, self._read), name=f"kv-read-{connection.index}", daemon=True
            )
            self._threads = [thread for thread in self._threads if thread.ident is None or thread.is_alive()]
            self._threads.append(reader)
            self._changed.notify_all()
        if old is not None:
            self._lose(old, PeerLost(f"{self._peer} replaced the connection"))
        reader.start()
        self._tend(connection, self._write)

    def opened(self) -> None:
        """The one who made the link has done its part.

        The link may be lost already; a thread reports that, for no event may be called from within ``connect``.
        """
        with self._changed:
            if self._num_users > 1:
                self._num_users -= 1
                return
            reporter = Thread(target=self.leave, name="kv-lost", daemon=True)
            self._threads.append(reporter)
        reporter.start()

    def leave(self) -> None:
        """A user is done with the link: the last one reports its loss."""
        with self._changed:
            self._num_users -= 1
            last = self._num_users == 0
        if not last:
            return
        self.close(PeerLost(f"the link with {self._peer} has ended"))
        assert self._error is not None, "close has set it"
        try:
            self._report_lost(self._error)
        finally:
            self._forget(self)

    def _spawn(self, body: Callable[[], None], name: str) -> None:
        """Start a thread that uses the link; only called by one that does."""
        thread = Thread(target=self._guard, args=(body,), name=name, daemon=True)
        with self._changed:
            self._num_users += 1
            self._threads.append(thread)
        thread.start()

    def _guard(self, body: Callable[[], None]) -> None:
        try:
            body()
        finally:
            self.leave()

    def _keep_connected(self, to: Descriptor, index: int) -> None:
        backoff_s = _BACKOFF_S[0]
        failure: Exception | None = None
        while self._error is None:
            if failure is not None:
                logger.warning("kv link with %s: connection %d is dialled again: %s", self._peer, index, failure)
            try:
                connection = self._dial(to, index)
                if index == 0:
                    for stripe in range(1, self._num_connections):
                        self._spawn(partial(self._keep_connected, to, stripe), f"kv-link-{stripe}")
                made_at = self._endpoint.clock.now()
                self.run(connection)
                failure = connection.failure
                if self._endpoint.clock.now() - made_at > _BACKOFF_S[1]:  # it was of use
                    backoff_s = _BACKOFF_S[0]
            except (PrfaasError, OSError) as error:
                if index == 0:
                    logger.warning("kv link with %s cannot be made: %s", self._peer, error)
                    unreachable = PeerLost(f"{to} cannot be reached: {error}")
                    self.close(error if isinstance(error, TransferError) else unreachable)
                    return
                failure = error
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None, backoff_s)
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])

    def _dial(self, to: Descriptor, index: int) -> Connection:
        def adopt(stream: Stream) -> None:
            with self._changed:
                if self._error is not None:
                    raise self._error
                self._opening[index] = stream

        try:
            stream = self._endpoint.dial(to, adopt)
            try:
                ours = self._endpoint.hello(self.role, self._link_id, index, self._num_connections, to.key)
                stream.say(pack_hello(ours))
                theirs = read_hello(stream)
                self._endpoint.fingerprint.require_compatible(theirs.fingerprint)
                if theirs.role is self.role:
                    raise ProtocolViolation(f"both ends say {self.role.name}")
                if (theirs.link_id, theirs.transport_id) != (self._link_id, self.transport_id):
                    raise ProtocolViolation("it answers for another link, or is another transport")
                self.finish_handshake(stream)
            except BaseException:
                stream.close()
                raise
            return Connection(stream, index)
        finally:
            with self._changed:
                self._opening.pop(index, None)

    def finish_handshake(self, stream: Stream) -> None:
        """The last thing before ``run``, at both the end that dialled and the one that accepted."""
        stream.hurry(None)

    # ---- a connection's two threads ----

    def _tend(self, connection: Connection, loop: Callable[[Connection], None]) -> None:
        error: TransferError = PeerLost(f"the link with {self._peer} has ended")
        try:
            loop(connection)
        except ProtocolViolation as violation:
            self._endpoint.count("bad_frames")
            logger.warning("kv connection %d with %s closed: %s", connection.index, self._peer, violation)
            error = violation
        except TransferError as failure:
            error = failure
        except OSError as failure:
            error = PeerLost(f"the connection with {self._peer} broke: {failure}")
        except BaseException:
            self.close(PeerLost(f"a thread of the link with {self._peer} failed"))
            raise
        finally:
            self._lose(connection, error)
            try:
                if loop == self._read:
                    self._stop_waiting_for(connection)
            finally:
                self._let_go(connection)
                self.leave()

    def _lose(self, connection: Connection, error: TransferError) -> None:
        """The connection is of no more use. Both of its threads say so, or one that replaces it."""
        with self._changed:
            if self._connections.get(connection.index) is connection:
                del self._connections[connection.index]
            if connection.failure is None:
                connection.failure = error
        connection.stream.shut_down()
        self._outbox.leave(connection.taker)
        if connection.index == 0:
            self.close(error)

    def _stop_waiting_for(self, connection: Connection) -> None:
        with self._changed:
            self._stripes.discard(connection)
        try:
            self._deliver()
        except TransferError as error:
            self.close(error)

    def _let_go(self, connection: Connection) -> None:
        with self._changed:
            connection.num_threads -= 1
            last = connection.num_threads == 0
        if last:
            self._retire(connection)
            connection.stream.close()

    def _retire(self, connection: Connection) -> None:  # noqa: B027
        """Last look at a connection before its socket is closed."""

    def _write(self, connection: Connection) -> None:
        stream, taker, outbox = connection.stream, connection.taker, self._outbox
        self._greet(stream)
        while not taker.left and not outbox.closed:
            match outbox.take(taker, self._endpoint.keepalive_s):
                case Write() as write:
                    self._send_write(stream, write)
                case Notice(barrier, message):
                    stream.say(pack_message(barrier, message))
                case Barrier(number):
                    stream.say(pack_barrier(number))
                case None if not taker.left and not outbox.closed:
                    stream.say(KEEPALIVE)

    def _greet(self, stream: Stream) -> None:  # noqa: B027
        """What is said first on a connection of the link."""

    def _send_write(self, stream: Stream, write: Write) -> None:
        raise ProtocolViolation("only the sending end writes")

    def _read(self, connection: Connection) -> None:
        while True:
            header, body = read_frame(connection.stream)
            match header.kind:
                case FrameKind.WRITE:
                    self._take_write(connection, header, body)
                case FrameKind.MESSAGE:
                    self._take_message(connection, *parse_message(body))
                case FrameKind.BARRIER:
                    self._take_barrier(connection, parse_barrier(body))
                case FrameKind.KEEPALIVE:
                    parse_keepalive(body)
                case FrameKind.HELLO:
                    raise ProtocolViolation("a second HELLO")

    def _take_write(self, connection: Connection, header: Header, body: bytes) -> None:
        raise ProtocolViolation("only the receiving end is written to")

    def _take_message(self, connection: Connection, barrier: int, message: bytes) -> None:
        if connection.index != 0:
            raise ProtocolViolation("a MESSAGE on a connection that is not the link's first")
        with self._changed:
            self._pending.append((barrier, message))
        self._deliver()

    def _take_barrier(self, connection: Connection, number: int) -> None:
        with self._changed:
            if connection.index == 0 or number <= connection.shown:
                raise ProtocolViolation(f"barrier {number} on connection {connection.index} after {connection.shown}")
            connection.shown = number
        self._deliver()

    def _deliver(self) -> None:
        """Hand on the messages whose barrier every stripe has shown, one at a time, in order."""
        while True:
            with self._changed:
                if self._delivering or not self._pending or self._error is not None:
                    return
                barrier, message = self._pending[0]
                if any(stripe.shown < barrier for stripe in self._stripes):
                    return
                self._pending.popleft()
                self._delivering = True
            try:
                self._report_message(message)
            except TransferError as error:
                self.close(error)
                raise
            finally:
                with self._changed:
                    self._delivering = False

    @abstractmethod
    def _report_message(self, message: bytes) -> None: ...

    @abstractmethod
    def _report_lost(self, error: TransferError) -> None: ...
