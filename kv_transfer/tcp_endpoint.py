"""What do all TCP links of one process share? Who we are, what peers are told, and how a connection is opened.

Invariant: a stream is handed to ``adopt`` before anything on it can block, so that whoever closes a link (or the
transport) can wake the thread that opens it.
"""

from __future__ import annotations

import logging
import secrets
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from threading import Lock

from core.clock import Clock
from core.credentials import Credentials, Reloaded
from core.errors import PeerLost, ProtocolViolation
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, WorkerId
from kv_transfer.config import KvTransferConfig
from kv_transfer.frames import (
    HEADER_BYTES,
    ID_BYTES,
    KEY_BYTES,
    FrameKind,
    Header,
    Hello,
    LinkRole,
    parse_body,
    parse_header,
    parse_hello,
)
from kv_transfer.tcp_stream import Stream
from kv_transfer.transport import PeerIdentity, Region, TransportCounters

logger = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
NO_KEY = bytes(KEY_BYTES)
_KEEPALIVES_PER_LEASE = 4
_MAGIC = b"tcp/2"
_DESCRIPTOR = struct.Struct(f"<5sH{KEY_BYTES}s{ID_BYTES}sHH")  # then worker, cluster and host, UTF-8

Adopt = Callable[[Stream], None]


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where a transport listens, who it is, and the secret that opens it."""

    host: str
    port: int
    key: bytes = field(repr=False)
    transport_id: bytes
    identity: PeerIdentity

    def __str__(self) -> str:
        return f"{self.identity.worker_id or 'a worker'} at {self.host}:{self.port}"

    def pack(self) -> bytes:
        worker, cluster = self.identity.worker_id.encode(), self.identity.cluster_id.encode()
        fixed = _DESCRIPTOR.pack(_MAGIC, self.port, self.key, self.transport_id, len(worker), len(cluster))
        return fixed + worker + cluster + self.host.encode()


def parse_descriptor(data: bytes) -> Descriptor:
    """Raises ProtocolViolation when it is malformed or of another kind of transport."""
    if len(data) <= _DESCRIPTOR.size or not data.startswith(_MAGIC):
        raise ProtocolViolation("the descriptor is not of a tcp transport")
    _, port, key, transport_id, worker_bytes, cluster_bytes = _DESCRIPTOR.unpack_from(data)
    end_of_worker = _DESCRIPTOR.size + worker_bytes
    end_of_cluster = end_of_worker + cluster_bytes
    try:
        worker = data[_DESCRIPTOR.size : end_of_worker].decode()
        cluster = data[end_of_worker:end_of_cluster].decode()
        host = data[end_of_cluster:].decode()
    except UnicodeDecodeError as error:
        raise ProtocolViolation("the descriptor's names are not UTF-8") from error
    if not host or not port:
        raise ProtocolViolation("the descriptor names no host and port")
    return Descriptor(host, port, key, transport_id, PeerIdentity(WorkerId(worker), ClusterId(cluster)))


class Endpoint:
    """This process's end of every link."""

    def __init__(
        self,
        config: KvTransferConfig,
        fingerprint: CacheFingerprint,
        clock: Clock,
        identity: PeerIdentity,
        credentials: Credentials | None,
    ) -> None:
        """Raises InvalidConfig for credentials that cannot be used."""
        self.config = config
        self.fingerprint = fingerprint
        self.clock = clock
        self.identity = identity
        self.lease_s = config.lease_s
        self.keepalive_s = config.lease_s / _KEEPALIVES_PER_LEASE
        self.key = secrets.token_bytes(KEY_BYTES)
        self.transport_id = secrets.token_bytes(ID_BYTES)
        self._region: Region | None = None
        self._server_context: Reloaded[ssl.SSLContext] | None = None
        self._client_context: Reloaded[ssl.SSLContext] | None = None
        if credentials is not None:
            self._server_context = Reloaded(credentials, Credentials.server_context)
            self._client_context = Reloaded(credentials, Credentials.client_context)
        self._lock = Lock()
        self._counters = TransportCounters()

    @property
    def region(self) -> Region:
        assert self._region is not None, "register comes first"
        return self._region

    @region.setter
    def region(self, region: Region) -> None:
        assert self._region is None, "a region is registered once"
        self._region = region

    @property
    def counters(self) -> TransportCounters:
        return self._counters

    def count(self, name: str) -> None:
        """Add one to the counter ``name`` of TransportCounters."""
        with self._lock:
            values = {one.name: getattr(self._counters, one.name) for one in fields(TransportCounters)}
            self._counters = TransportCounters(**{**values, name: values[name] + 1})

    def hello(self, role: LinkRole, link_id: bytes, index: int, num_connections: int, key: bytes = NO_KEY) -> Hello:
        """What this end says first on a connection."""
        return Hello(role, key, self.fingerprint, self.identity, self.transport_id, link_id, index, num_connections)

    def dial(self, to: Descriptor, adopt: Adopt) -> Stream:
        """A connection to ``to``, TLS done, its handshake still to come and due. Raises TransferError or OSError."""
        failure: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(to.host, to.port, type=socket.SOCK_STREAM):
            stream = Stream(socket.socket(family, kind, protocol), self.clock, str(to))
            try:
                adopt(stream)
                stream.tune(self.lease_s)
                stream.hurry(self.clock.now() + HANDSHAKE_S)
                stream.connect(address)
            except OSError as error:
                stream.close()
                failure = error
            except BaseException:
                stream.close()
                raise
            else:
                return self._secure(stream, self._client_context, adopt, accepted=False)
        raise failure or PeerLost(f"{to.host} has no address")

    def accept(self, connection: socket.socket, peer: str, adopt: Adopt) -> Stream:
        """A connection that a peer made, TLS done, its handshake still to come and due."""
        stream = Stream(connection, self.clock, peer)
        adopt(stream)
        try:
            stream.tune(self.lease_s)
            stream.hurry(self.clock.now() + HANDSHAKE_S)
        except BaseException:
            stream.close()
            raise
        return self._secure(stream, self._server_context, adopt, accepted=True)

    def _secure(
        self, stream: Stream, context: Reloaded[ssl.SSLContext] | None, adopt: Adopt, *, accepted: bool
    ) -> Stream:
        try:
            if context is not None:
                stream = stream.secured(context.current(), accepted=accepted)
                adopt(stream)
                stream.handshake()
        except BaseException:
            stream.close()
            raise
        return stream


def read_frame(stream: Stream) -> tuple[Header, bytes]:
    """The next frame's header and body, up to its payload. Raises ProtocolViolation for nonsense."""
    header, parsed, head = _read_head(stream)
    return parsed, parse_body(header, head)


def read_hello(stream: Stream) -> Hello:
    """Raises ProtocolViolation for anything else, Incompatible for a HELLO of another version."""
    header, parsed, head = _read_head(stream)
    if parsed.kind is not FrameKind.HELLO:
        raise ProtocolViolation(f"a {parsed.kind.name} frame before HELLO")
    return parse_hello(header, head)


def _read_head(stream: Stream) -> tuple[bytearray, Header, bytes]:
    header = bytearray(HEADER_BYTES)
    stream.receive([memoryview(header)], at_border=True)
    parsed = parse_header(header)
    head = bytearray(parsed.head_bytes)
    stream.receive([memoryview(head)])
    return header, parsed, bytes(head)
