"""How do bytes get from one process's page pool into another's? The seam that every transport implements.

A *link* joins one sending transport to one receiving transport. Its sending end reads pages out of the region that
was registered there and puts them into the pages that the receiving end's ``ReceiveEvents.admit`` allowed; both ends
exchange small messages on it. Links are made by the sending end, are long-lived and carry many sessions.

Rules that every implementation keeps:

- A message never overtakes an earlier write or message of its session: when ``notified`` is called, each write that was
  queued before it has landed, was refused, was damaged, or was lost with its connection. Writes of a session may land
  in any order, and may overtake an earlier message. Between sessions the link goes by ``SendOrder``.
- A link may lose a part of itself (one of several connections) and live on. Writes that this cut short are damaged,
  writes that had not begun to arrive are missing without a word: ``written`` says only that a source is free again.
  Who needs to know what arrived asks behind a message.
- ``write``, ``notify``, ``cancel`` and ``close`` of a link only queue: they never block on the peer and never call an
  event from within the call, so they may be called while holding the caller's own locks.
- Events are called from the transport's threads while no transport lock is held, ``admit``, ``landed``, ``damaged``,
  ``written`` and ``drained`` of one link also from several threads at once (a link may be several connections),
  ``notified`` one at a time. They must be short: they delay the link. An event that raises ``TransferError`` closes
  the link.
- ``lost`` is the last event of each end of a link and comes exactly once. After it no byte of this end's region is
  read or written for the link.
- Payload bytes land only where ``admit`` allowed, and are all there, as they were sent, when ``landed`` is called.
  After an admission exactly one of ``landed`` and ``damaged`` follows, or the link's ``lost``.
- A peer is heard at least every few seconds (``keep_alive``), also when there is nothing to send.

How to add one: implement ``Transport`` in a file of its own, name it in ``TRANSPORTS``, and put it through
tests/contract/test_transport_contract.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import Protocol

from core.clock import Clock
from core.credentials import Credentials
from core.errors import InvalidConfig, TransferError
from core.fingerprint import CacheFingerprint
from core.request import ClusterId, SessionId, WorkerId
from kv_transfer.codec import Codec, CodecUse
from kv_transfer.config import KvTransferConfig
from kv_transfer.run_table import RunTable

TOKEN_BYTES = 16
_PIECE_S = 1.5e-3


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer of a page pool: every page of it is one contiguous run of ``page_bytes`` bytes.

    ``dtype`` names its elements and ``block_bytes`` is the run that a lossy codec gives one scale: one head's keys, or
    values, within a page. Both matter to codecs alone; raw bytes need neither.
    """

    page_bytes: int
    dtype: str = "uint8"
    block_bytes: int = 0  # 0: the page is one block


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """The shape of a page pool in bytes: ``layers[i]`` describes layer i, every layer has ``num_pages`` pages."""

    layers: tuple[LayerPages, ...]
    num_pages: int

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers."""
        return sum(layer.page_bytes for layer in self.layers)


@dataclass(frozen=True, slots=True)
class PieceLimits:
    """How large the writes of a session should be for a transport.

    Large enough that headers, system calls and Python cost little beside the copy, small enough that a commit or
    another session waits little behind one: on a link that is known to be fast they may be larger.
    """

    max_bytes: int = 1 << 20  # about a millisecond on a 10 Gbit/s link
    max_strips: int = (
        256  # over all layers: each is one buffer of a gathered send or scattered receive, of 1,024 at most
    )
    fast_bytes: int = 0  # no piece is larger, however fast the link; 0: nor than ``max_bytes``

    def at(self, bytes_per_s: float | None) -> PieceLimits:
        """For a link of that speed, on which a piece may take ``_PIECE_S``; None: its speed is not known."""
        if bytes_per_s is None:
            return self
        return replace(self, max_bytes=max(self.max_bytes, min(self.fast_bytes, int(bytes_per_s * _PIECE_S))))


# A piece costs 100 us of Python at both ends together: at 3 GB/s, in pieces of a MiB, a fifth of all processor time.
HOST_PIECES = PieceLimits(fast_bytes=4 << 20)


class Region:
    """The memory of one page pool: per layer a writable memoryview of ``num_pages * page_bytes`` bytes.

    The views belong to the pool's owner, who keeps the memory alive until the transport is closed. This one is host
    memory, of which ``outgoing`` and ``incoming`` lend the bytes themselves; staging.py has the one for device memory.
    """

    def __init__(self, geometry: PageGeometry, layers: tuple[memoryview, ...]) -> None:
        assert len(layers) == geometry.num_layers, "one view for each layer"
        flat = tuple(view.cast("B") if view.format != "B" or view.ndim != 1 else view for view in layers)
        for view, pages in zip(flat, geometry.layers, strict=True):
            assert view.nbytes == geometry.num_pages * pages.page_bytes, "a layer's view is not the geometry's size"
            assert not view.readonly, "the pool must be writable"
        self.geometry = geometry
        self._layers = flat

    @property
    def pieces(self) -> PieceLimits:
        """How large the writes should be that are sent from here one by one."""
        return HOST_PIECES

    def layer_bytes(self, layer: int) -> int:
        """Size of one layer's memory."""
        return self._layers[layer].nbytes

    def bytes_at(self, layer: int, offset: int, num_bytes: int) -> memoryview:
        """``num_bytes`` bytes of ``layer`` from ``offset`` on, uncopied."""
        return self._layers[layer][offset : offset + num_bytes]

    def mark(self, layer: int) -> None:
        """Everything that writes pages of ``layer``, up to now, was at least launched; called by who launched it.

        In host memory what was launched is done. Device memory remembers the instant (staging_device.py).
        """

    @contextmanager
    def outgoing(self, write: Write) -> Iterator[list[memoryview]]:
        """Host views of the write's source bytes, in the payload's order; they may be read until the block ends."""
        runs = write.table.rows.tolist()
        memory = self._layers[write.first_layer : write.layers.stop]
        yield [view[src : src + num_bytes] for view in memory for src, _, num_bytes in runs]

    @contextmanager
    def incoming(self, layers: range, spans: Sequence[Span]) -> Iterator[list[memoryview]]:
        """Host views to be filled with a payload, in its order; the pool holds it when the block has ended.

        Raising out of the block leaves those bytes of the pool undefined.
        """
        runs = spans.rows.tolist() if isinstance(spans, RunTable) else [(run.offset, run.num_bytes) for run in spans]
        memory = self._layers[layers.start : layers.stop]
        yield [view[offset : offset + num_bytes] for view in memory for offset, num_bytes in runs]

    def pages(self, layer: int, first: int, count: int) -> memoryview:
        """The bytes of pages ``first .. first + count - 1`` of ``layer``, uncopied."""
        size = self.geometry.layers[layer].page_bytes
        return self.bytes_at(layer, first * size, count * size)


@dataclass(frozen=True, slots=True)
class Strip:
    """Bytes that follow each other at both ends: from offset ``src`` of a layer here to offset ``dst`` of it there."""

    src: int
    dst: int
    num_bytes: int


class Strips(RunTable[Strip]):
    """Strips of one layer. Layers of a session share them, so what they sum up to is computed once."""

    run = Strip
    columns = ("src", "dst", "num_bytes")

    @cached_property
    def num_bytes(self) -> int:
        """Of one layer, at the destination."""
        return int(self.rows[:, 2].sum())


@dataclass(frozen=True, slots=True)
class Span:
    """``num_bytes`` bytes from ``offset`` on of one layer's memory, at one end."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SendOrder:
    """Whose bytes go first on a link: tenants share it by weight, within a tenant the earliest deadline wins."""

    tenant: str = ""
    weight: float = 1.0
    deadline_at: float | None = None  # instant on the transport's Clock of the promised first token; None: no promise


@dataclass(frozen=True, slots=True)
class Write:
    """The same strips of one or several layers that follow each other, sent as one piece.

    Its payload is layer after layer, each with its strips in order. ``token`` is the grant's secret, by which the
    receiver knows it.
    """

    session_id: SessionId
    token: bytes  # [TOKEN_BYTES]
    first_layer: int
    num_layers: int
    strips: Sequence[Strip]
    order: SendOrder = SendOrder()
    codec: Codec = Codec.RAW
    table: Strips = field(init=False, compare=False, repr=False)  # the strips as one array
    layer_bytes: int = field(init=False, compare=False)  # of one layer's strips

    def __post_init__(self) -> None:
        table = self.strips if isinstance(self.strips, Strips) else Strips(self.strips)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "layer_bytes", table.num_bytes)

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)

    @property
    def num_bytes(self) -> int:
        """Bytes that it puts into the receiver's memory."""
        return self.num_layers * self.layer_bytes


@dataclass(frozen=True, slots=True)
class TransportCounters:
    """What went wrong at the receiving ends of one transport since its start, for metrics."""

    links_refused: int = 0  # handshakes that ended in a refusal: fingerprint, access key, nonsense
    bad_frames: int = 0  # links closed because the peer spoke nonsense
    writes_refused: int = 0  # writes that ``admit`` did not allow; drained, never landed
    writes_damaged: int = 0  # admitted writes whose checksum failed or whose connection broke; sent again
    links_on_tcp: int = 0  # links that a faster path was expected of (nixl), made by this end


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who is at one end of a link, in the cluster's terms. Named in descriptors and handshakes; proves nothing."""

    worker_id: WorkerId
    cluster_id: ClusterId


ANONYMOUS = PeerIdentity(WorkerId(""), ClusterId(""))


@dataclass(frozen=True, slots=True)
class LinkStats:
    """What one sending end of a link knows of the path to its peer, now. Counters run from the link's start."""

    peer: PeerIdentity
    path: str  # what carries the bytes, as found and not as configured: ``tcp``, ``tcp+tls1.3``, ``ucx:shm``, ``local``
    connections: int = 0  # that live now
    bytes_sent: int = 0  # payload bytes, as on the wire
    rtt_s: float | None = None  # smoothed, mean over the connections; None: the path does not tell
    min_rtt_s: float | None = None
    delivery_rate: float | None = None  # bytes/s, the kernel's estimate, sum over the connections
    retransmits: int = 0  # segments sent again
    busy_s: float = 0.0  # seconds in which at least one write was queued or under way
    bytes_queued: int = 0  # of writes not yet taken
    reconnects: int = 0  # connections that broke and were made again
    checksum: str = ""  # what the receiver checks each payload by: ``xxh3``, ``none``; empty: the path does not tell
    encoded: tuple[CodecUse, ...] = ()  # one for each codec but raw that was used


class Link(Protocol):
    """One end of a link."""

    @property
    def peer(self) -> str:
        """The other end, for people."""
        ...

    @property
    def heard_at(self) -> float:
        """Instant on the transport's Clock at which the peer was last heard (at first: when the link was made)."""
        ...

    def notify(self, session_id: SessionId, message: bytes) -> None:
        """Queue a message, behind everything queued for ``session_id``; dropped if the link is lost."""
        ...

    def close(self, error: TransferError) -> None:
        """Give the link up; ``lost(error)`` follows from a transport thread. Closing twice changes nothing."""
        ...


class SendLink(Link, Protocol):
    """The sending end."""

    def write(self, write: Write) -> None:
        """Queue a write, behind everything queued for its session; dropped if the link is lost."""
        ...

    def cancel(self, session_id: SessionId) -> bool:
        """Forget everything that is queued for the session.

        True: none of its pages is being read. False: writes of it are under way; behind the ``written`` of the last of
        them ``drained`` follows, once (or ``lost``). Nothing may be written for the session until then.
        """
        ...


class SendEvents(Protocol):
    """What the sending end of a link reports; one object serves all links of a transport."""

    def written(self, link: SendLink, write: Write) -> None:
        """The write's source pages were read for the last time: it was sent, or its connection broke."""
        ...

    def drained(self, link: SendLink, session_id: SessionId) -> None:
        """``cancel`` of the session had found writes under way; now none of its pages is being read."""
        ...

    def notified(self, link: SendLink, message: bytes) -> None:
        """The receiving end sent a message."""
        ...

    def lost(self, link: SendLink, error: TransferError) -> None:
        """The link is gone: ``Incompatible``, ``PeerLost``, ``ProtocolViolation`` or what ``close`` was given."""
        ...


class ReceiveEvents(Protocol):
    """What the receiving end of a link asks and reports; one object serves all links of a transport."""

    def admit(self, link: Link, token: bytes, layers: range, spans: Sequence[Span]) -> SessionId | None:
        """May this write land? The session that it belongs to, or None: not one byte of it lands.

        Called before the payload is read. Spans may name any layer and offset: judging them is the callee's work.
        """
        ...

    def landed(self, link: Link, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        """An admitted write is in the region, whole and as it was sent."""
        ...

    def damaged(self, link: Link, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        """An admitted write will not land: its checksum failed, or its connection broke while the link lives.

        Its bytes of the region may hold anything; they are missing again, and nothing of it can land any more.
        """
        ...

    def notified(self, link: Link, message: bytes) -> None:
        """The sending end sent a message; every earlier write of its session has landed or was refused."""
        ...

    def lost(self, link: Link, error: TransferError) -> None:
        """The link is gone, and nothing can land from it any more."""
        ...


class Transport(Protocol):
    """One process's end of every link, made by a ``TransportFactory``; thread-safe."""

    @property
    def region(self) -> Region:
        """What ``register`` was given."""
        ...

    @property
    def counters(self) -> TransportCounters: ...

    @property
    def pieces(self) -> PieceLimits:
        """What its links like best; after ``register``. A larger write is carried too."""
        ...

    def register(self, region: Region) -> None:
        """Name the memory that links read from and write into; once, before anything else."""
        ...

    def serve(self, events: ReceiveEvents) -> None:
        """Accept links from peers; at most once."""
        ...

    def describe(self) -> bytes:
        """How peers reach this end, opaque, for their ``connect``; after ``serve``. Holds a secret: do not log it."""
        ...

    def connect(self, descriptor: bytes, events: SendEvents) -> SendLink:
        """Make a link to the transport that ``descriptor`` describes. Returns at once; what is queued waits for it.

        Failure, also a peer that holds another cache (``Incompatible``), is reported by ``lost``.
        Raises ProtocolViolation when the descriptor is malformed or of another kind of transport.
        """
        ...

    def invite(self, descriptor: bytes) -> None:
        """Expect a link from the sending transport that ``descriptor`` describes: a grant for it is about to leave.

        Where this end is the one that dials (``LinkConfig.dial``) it does so now; otherwise nothing happens.
        Raises ProtocolViolation when the descriptor is malformed or of another kind of transport.
        """
        ...

    def stats(self) -> tuple[LinkStats, ...]:
        """One entry for each living link that this end sends on, ordered by peer."""
        ...

    def close(self) -> None:
        """Close every link and stop accepting; returns when every ``lost`` was called and no thread is left.

        Must not be called from an event.
        """
        ...


class TransportFactory(Protocol):
    def __call__(
        self,
        config: KvTransferConfig,
        fingerprint: CacheFingerprint,
        clock: Clock,
        identity: PeerIdentity,
        credentials: Credentials | None,
    ) -> Transport: ...


# name |-> module:class, imported when first asked for: an optional dependency of one transport stays optional.
TRANSPORTS = {
    "local": "kv_transfer.local:LocalTransport",
    "nixl": "kv_transfer.nixl:NixlTransport",
    "tcp": "kv_transfer.tcp:TcpTransport",
}


def create_transport(
    config: KvTransferConfig,
    fingerprint: CacheFingerprint,
    clock: Clock,
    identity: PeerIdentity = ANONYMOUS,
    credentials: Credentials | None = None,
) -> Transport:
    """The transport that ``config.transport`` names. Raises InvalidConfig for an unknown name.

    With ``credentials`` every connection of a transport that uses sockets is mutual TLS; None: it is plain.
    """
    target = TRANSPORTS.get(config.transport)
    if target is None:
        known = ", ".join(sorted(TRANSPORTS))
        raise InvalidConfig("kv_transfer.transport", f"must be one of {known}, got {config.transport!r}")
    module, _, name = target.partition(":")
    factory: TransportFactory = getattr(import_module(module), name)
    return factory(config, fingerprint, clock, identity, credentials)
