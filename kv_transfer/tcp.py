"""The transport between processes and hosts: several long-lived TCP connections for each (sending, receiving) pair.

tcp_link.py says what a link is, tcp_ends.py how a write travels, frames.py what is on the wire, outbox.py in which
order, tcp_stream.py how bytes get through a socket (plain, or TLS 1.3 when the transport was given credentials).

This file answers: who listens, and whose connection is that? Whoever dials says HELLO first: with the access key of
the transport that it dials, the link's id, and the connection's number. Rules:

- A stranger (no certificate of ours, no access key, no HELLO in time, an unknown link) is told nothing, reaches nothing
  and is counted. A peer with our key but another version or cache is told ours, and counted, too.
- Either end may dial (``LinkConfig.dial``). The receiving end does so when it is invited: a grant for the peer is about
  to leave. The sending end then takes the link that came, or waits for it for as long as a handshake may take.
- A link with nothing to send sends KEEPALIVE four times per lease: a process that is stopped or cut off falls silent.
"""

from __future__ import annotations

import errno
import hmac
import logging
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from threading import Condition, Thread, current_thread

from core.clock import Clock
from core.credentials import Credentials
from core.errors import Incompatible, PeerLost, PrfaasError, ProtocolViolation, TransferError
from core.fingerprint import CacheFingerprint
from kv_transfer.config import KvTransferConfig
from kv_transfer.frames import ID_BYTES, Hello, LinkRole, pack_hello
from kv_transfer.tcp_endpoint import Descriptor, Endpoint, parse_descriptor, read_hello
from kv_transfer.tcp_ends import ReceiveEnd, SendEnd
from kv_transfer.tcp_link import Connection, LinkEnd
from kv_transfer.tcp_stream import Stream
from kv_transfer.transport import (
    ANONYMOUS,
    LinkStats,
    PeerIdentity,
    PieceLimits,
    ReceiveEvents,
    Region,
    SendEvents,
    TransportCounters,
)

logger = logging.getLogger(__name__)

_BACKLOG = 256
_MAX_GREETINGS = 128  # connections at once that have not shown who they are; more are closed unheard
_ACCEPT_AGAIN_S = 0.1
_OTHER_ROLE = {LinkRole.SENDS_PAGES: LinkRole.RECEIVES_PAGES, LinkRole.RECEIVES_PAGES: LinkRole.SENDS_PAGES}
_REDIAL_WITHIN_S = 5.0  # a link that is lost so soon after an invitation was dying when it came


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
        """Raises InvalidConfig for credentials that cannot be used."""
        self._endpoint = Endpoint(config, fingerprint, clock, identity, credentials)
        self._events: ReceiveEvents | None = None
        self._listener: socket.socket | None = None
        self._acceptor: Thread | None = None
        self._changed = Condition()
        self._ends: set[LinkEnd] = set()
        self._greetings: dict[Thread, Stream | None] = {}  # threads that greet, and then write, with their stream
        self._num_strangers = 0
        # Links that the receiving end dials, by its transport id, at the sending end:
        self._awaited: dict[bytes, SendEnd] = {}  # asked for, not dialled yet
        self._offered: dict[bytes, SendEnd] = {}  # dialled, not asked for yet
        # and at the receiving end, by the sending transport's id:
        self._dialled: dict[bytes, tuple[ReceiveEnd, Descriptor]] = {}
        self._incompatible: dict[bytes, Incompatible] = {}  # transports with another cache: nothing will change that
        self._closed = False

    @property
    def region(self) -> Region:
        return self._endpoint.region

    @property
    def pieces(self) -> PieceLimits:
        return self.region.pieces

    @property
    def counters(self) -> TransportCounters:
        return self._endpoint.counters

    def register(self, region: Region) -> None:
        self._endpoint.region = region

    def serve(self, events: ReceiveEvents) -> None:
        """Also raises OSError when the address cannot be bound."""
        assert self._listener is None, "a transport serves once"
        self._events = events
        self._listener = _listen(self._endpoint.config.host, self._endpoint.config.ports)
        self._acceptor = Thread(target=self._accept, args=(self._listener,), name="kv-accept", daemon=True)
        self._acceptor.start()

    def describe(self) -> bytes:
        assert self._listener is not None, "serve comes first"
        host, port = self._endpoint.config.host or socket.gethostname(), self._listener.getsockname()[1]
        endpoint = self._endpoint
        return Descriptor(host, port, endpoint.key, endpoint.transport_id, endpoint.identity).pack()

    def connect(self, descriptor: bytes, events: SendEvents) -> SendEnd:
        to = parse_descriptor(descriptor)
        settings = self._endpoint.config.link(self._endpoint.identity.cluster_id, to.identity.cluster_id)
        dials = settings.dial == "sender"
        with self._changed:
            offered = None if dials else self._offered.pop(to.transport_id, None)
            if offered is not None and offered.claim(events):
                return offered
            end = SendEnd(self._endpoint, str(to), to.identity, to.transport_id, self._forget, settings, events)
            self._add(end)
            incompatible = self._incompatible.get(to.transport_id)
            if not dials and incompatible is None:
                self._awaited[to.transport_id] = end
        if incompatible is not None:
            end.close(incompatible)
        if dials:
            end.dial(to, secrets.token_bytes(ID_BYTES), settings.connections)
        else:
            end.wait_to_be_dialled()
        end.opened()
        return end

    def invite(self, descriptor: bytes) -> None:
        peer = parse_descriptor(descriptor)
        settings = self._endpoint.config.link(peer.identity.cluster_id, self._endpoint.identity.cluster_id)
        if settings.dial != "receiver":
            return
        with self._changed:
            known = self._dialled.get(peer.transport_id)
            if known is not None:
                known[0].invited_at = self._endpoint.clock.now()
                return
        self._dial(peer)

    def stats(self) -> tuple[LinkStats, ...]:
        with self._changed:
            ends = [end for end in self._ends if isinstance(end, SendEnd) and end.connected]
        stats = [end.stats() for end in ends]
        return tuple(sorted(stats, key=lambda one: (one.peer.cluster_id, one.peer.worker_id)))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            greeters = list(self._greetings)
            streams = [stream for stream in self._greetings.values() if stream is not None]
            self._changed.notify_all()
        if self._listener is not None and self._acceptor is not None:
            _wake(self._listener)
            self._acceptor.join()
            self._listener.close()
        for stream in streams:
            stream.shut_down()
        with self._changed:
            ends = list(self._ends)
        for end in ends:
            end.close(PeerLost("this end's transport was closed"))
        with self._changed:
            self._changed.wait_for(lambda: not self._ends and not self._greetings)
        for end in ends:
            end.wait_for_threads()
        for greeter in greeters:
            greeter.join()

    # ---- links ----

    def _add(self, end: LinkEnd) -> None:
        """With the lock held."""
        self._ends.add(end)
        if self._closed:
            end.close(PeerLost("this end's transport is closed"))

    def _forget(self, end: LinkEnd) -> None:
        """The end's last event was called."""
        redial = None
        with self._changed:
            self._ends.discard(end)
            for waiting in (self._awaited, self._offered):
                if waiting.get(end.transport_id) is end:
                    del waiting[end.transport_id]
            dialled = self._dialled.get(end.transport_id)
            if dialled is not None and dialled[0] is end:
                del self._dialled[end.transport_id]
                fresh = self._endpoint.clock.now() - dialled[0].invited_at < _REDIAL_WITHIN_S
                redial = dialled[1] if fresh and end.connected and not self._closed else None
            self._changed.notify_all()
        if redial is not None:
            self._dial(redial)

    def _dial(self, peer: Descriptor) -> None:
        """Make the link on which ``peer`` will send."""
        assert self._events is not None, "serve comes before any grant"
        settings = self._endpoint.config.link(peer.identity.cluster_id, self._endpoint.identity.cluster_id)
        with self._changed:
            if self._closed or peer.transport_id in self._dialled:
                return
            end = ReceiveEnd(self._endpoint, str(peer), peer.identity, peer.transport_id, self._forget, self._events)
            self._add(end)
            self._dialled[peer.transport_id] = (end, peer)
        end.dial(peer, secrets.token_bytes(ID_BYTES), settings.connections)
        end.opened()

    # ---- connections that peers make ----

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError as error:
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, _ACCEPT_AGAIN_S):
                        return
                logger.warning("kv transfer could not accept a connection, and tries again: %s", error)
                continue
            peer = f"{address[0]}:{address[1]}"
            thread = Thread(target=self._greet, args=(connection, peer), name="kv-greet", daemon=True)
            with self._changed:
                refused = self._closed or self._num_strangers >= _MAX_GREETINGS
                if not refused:
                    self._greetings[thread] = None
                    self._num_strangers += 1
            if refused:
                connection.close()
                self._endpoint.count("links_refused")
                logger.warning("kv connection from %s closed unheard: too many at once", peer)
            else:
                thread.start()

    def _greet(self, connection: socket.socket, peer: str) -> None:
        thread = current_thread()
        made: LinkEnd | None = None
        try:
            try:
                stream = self._endpoint.accept(connection, peer, partial(self._adopt, thread))
                try:
                    theirs = self._recognise(stream)
                    end, is_new = self._end_for(theirs, peer)
                    made = end if is_new else None
                    self._answer(stream, theirs)  # from here on the peer may dial the link's other connections
                    end.finish_handshake(stream)
                except BaseException:
                    stream.close()
                    raise
            except (PrfaasError, OSError) as error:
                self._endpoint.count("links_refused")
                logger.warning("kv connection from %s refused: %s", peer, error)
                return
            finally:
                with self._changed:
                    self._greetings[thread] = None
                    self._num_strangers -= 1
            with suppress(TransferError):  # the link was closed meanwhile
                end.run(Connection(stream, theirs.index))
        finally:
            if made is not None:
                made.opened()
            with self._changed:
                del self._greetings[thread]
                self._changed.notify_all()

    def _adopt(self, thread: Thread, stream: Stream) -> None:
        with self._changed:
            if self._closed:
                stream.close()
                raise PeerLost("this end's transport is closed")
            self._greetings[thread] = stream

    def _recognise(self, stream: Stream) -> Hello:
        """Read the peer's HELLO. Raises TransferError for whom we have no links with."""
        try:
            theirs = read_hello(stream)
        except Incompatible:  # answered so that the peer, too, sees which versions there are
            stream.say(pack_hello(self._endpoint.hello(LinkRole.RECEIVES_PAGES, bytes(ID_BYTES), 0, 1)))
            raise
        if not hmac.compare_digest(theirs.key, self._endpoint.key):
            raise ProtocolViolation("its HELLO does not hold our access key")
        try:
            self._endpoint.fingerprint.require_compatible(theirs.fingerprint)
        except Incompatible as error:
            self._answer(stream, theirs)  # it finds out by itself which field differs
            self._refuse_for_good(theirs, error)
            raise
        return theirs

    def _answer(self, stream: Stream, theirs: Hello) -> None:
        role = _OTHER_ROLE[theirs.role]
        stream.say(pack_hello(self._endpoint.hello(role, theirs.link_id, theirs.index, theirs.num_connections)))

    def _refuse_for_good(self, theirs: Hello, error: Incompatible) -> None:
        with self._changed:
            self._incompatible[theirs.transport_id] = error
            awaited = self._awaited.get(theirs.transport_id)
        if awaited is not None:
            awaited.close(error)

    def _stripe_of(self, theirs: Hello) -> LinkEnd:
        with self._changed:
            for end in self._ends:
                if end.expects(theirs):
                    return end
        raise ProtocolViolation(f"its HELLO is of connection {theirs.index} of a link that does not live")

    def _end_for(self, theirs: Hello, peer: str) -> tuple[LinkEnd, bool]:
        """Whose connection is it? And: is the link new, with the caller as its user?"""
        if theirs.index > 0:
            return self._stripe_of(theirs), False
        name = f"{theirs.identity.worker_id or 'a worker'} at {peer}"
        with self._changed:
            end: LinkEnd | None = None
            if theirs.role is LinkRole.RECEIVES_PAGES:
                end = self._awaited.pop(theirs.transport_id, None)
            is_new = end is None
            if end is None:
                end = self._make_end(theirs, name)
                self._add(end)
            end.name(theirs.link_id, theirs.num_connections)
        return end, is_new

    def _make_end(self, theirs: Hello, name: str) -> LinkEnd:
        """With the lock held."""
        if theirs.role is LinkRole.SENDS_PAGES:
            assert self._events is not None, "who listens serves"
            return ReceiveEnd(self._endpoint, name, theirs.identity, theirs.transport_id, self._forget, self._events)
        settings = self._endpoint.config.link(self._endpoint.identity.cluster_id, theirs.identity.cluster_id)
        end = SendEnd(self._endpoint, name, theirs.identity, theirs.transport_id, self._forget, settings, None)
        replaced = self._offered.get(theirs.transport_id)
        if replaced is not None:
            replaced.close(PeerLost(f"{name} dialled again"))
        self._offered[theirs.transport_id] = end
        return end


def _listen(host: str | None, ports: Sequence[int]) -> socket.socket:
    """A listening socket on the first port that is free. Raises OSError."""
    for port in ports:
        try:
            return _listen_at(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise
    raise AssertionError("there is a port to try")


def _listen_at(host: str | None, port: int) -> socket.socket:
    """A listening socket, on every address of both families where no host is given."""
    if host is None:
        if socket.has_dualstack_ipv6():
            with suppress(OSError):  # compiled in, but switched off
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=_BACKLOG)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address, family=family, backlog=_BACKLOG)


def _wake(listener: socket.socket) -> None:
    with suppress(OSError):  # nobody waits on it
        listener.shutdown(socket.SHUT_RDWR)
