"""How do bytes get from one process's page pool into another's? The seam that every transport implements.

A *link* joins one sending transport to one receiving transport. Its sending end reads pages out of the region that
was registered there and puts them into the pages that the receiving end's ``ReceiveEvents.admit`` allowed; both ends
exchange small messages on it. Links are made by the sending end, are long-lived and carry many sessions.

Rules that every implementation keeps:

- Per session, what ``write`` and ``notify`` were given is delivered in that order: a message never overtakes an
  earlier write of its session. Between sessions the link takes turns, one write each.
- ``write``, ``notify``, ``cancel`` and ``close`` of a link only queue: they never block on the peer and never call an
  event from within the call, so they may be called while holding the caller's own locks.
- Events are called from the transport's threads, one at a time for each end of a link, while no transport lock is held.
  They must be short: they delay the link. An event that raises ``TransferError`` closes the link.
- ``lost`` is the last event of each end of a link and comes exactly once. After it no byte of this end's region is
  read or written for the link.
- Payload bytes land only in pages that ``admit`` allowed, and are all there when ``landed`` is called.
- A peer is heard at least every few seconds (``keep_alive``), also when there is nothing to send.

How to add one: implement ``Transport`` in a file of its own, name it in ``TRANSPORTS``, and put it through
tests/contract/test_transport_contract.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from core.clock import Clock
from core.errors import InvalidConfig, TransferError
from core.fingerprint import CacheFingerprint
from core.request import SessionId
from kv_transfer.config import KvTransferConfig

TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer of a page pool: every page of it is one contiguous run of ``page_bytes`` bytes."""

    page_bytes: int


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


class Region:
    """The memory of one page pool: per layer a writable memoryview of ``num_pages * page_bytes`` bytes.

    The views belong to the pool's owner, who keeps the memory alive until the transport is closed.
    """

    def __init__(self, geometry: PageGeometry, layers: tuple[memoryview, ...]) -> None:
        assert len(layers) == geometry.num_layers, "one view for each layer"
        flat = tuple(view.cast("B") if view.format != "B" or view.ndim != 1 else view for view in layers)
        for view, pages in zip(flat, geometry.layers, strict=True):
            assert view.nbytes == geometry.num_pages * pages.page_bytes, "a layer's view is not the geometry's size"
            assert not view.readonly, "the pool must be writable"
        self.geometry = geometry
        self._layers = flat

    def pages(self, layer: int, first: int, count: int) -> memoryview:
        """The bytes of pages ``first .. first + count - 1`` of ``layer``, uncopied."""
        size = self.geometry.layers[layer].page_bytes
        return self._layers[layer][first * size : (first + count) * size]


@dataclass(frozen=True, slots=True)
class PageRun:
    """Pages that follow each other at both ends: ``src_page + i`` goes to ``dst_page + i`` for i < num_pages."""

    src_page: int
    dst_page: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class PageSpan:
    """``num_pages`` pages from ``first_page`` on, at one end."""

    first_page: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Write:
    """Page runs of one layer, sent as one piece. ``token`` is the grant's secret, by which the receiver knows it."""

    session_id: SessionId
    token: bytes  # [TOKEN_BYTES]
    layer: int
    runs: tuple[PageRun, ...]

    @property
    def num_pages(self) -> int:
        return sum(run.num_pages for run in self.runs)


@dataclass(frozen=True, slots=True)
class TransportCounters:
    """What went wrong at the receiving ends of one transport since its start, for metrics."""

    links_refused: int = 0  # handshakes that ended in a refusal: fingerprint, access key, nonsense
    bad_frames: int = 0  # links closed because the peer spoke nonsense
    writes_refused: int = 0  # writes that ``admit`` did not allow; drained, never landed


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

        True: none of its pages is being read. False: one write is under way; its ``written`` (or ``lost``) follows.
        """
        ...


class SendEvents(Protocol):
    """What the sending end of a link reports; one object serves all links of a transport."""

    def written(self, link: SendLink, write: Write) -> None:
        """The write's source pages were read for the last time."""
        ...

    def notified(self, link: SendLink, message: bytes) -> None:
        """The receiving end sent a message."""
        ...

    def lost(self, link: SendLink, error: TransferError) -> None:
        """The link is gone: ``Incompatible``, ``PeerLost``, ``ProtocolViolation`` or what ``close`` was given."""
        ...


class ReceiveEvents(Protocol):
    """What the receiving end of a link asks and reports; one object serves all links of a transport."""

    def admit(self, link: Link, token: bytes, layer: int, spans: tuple[PageSpan, ...]) -> SessionId | None:
        """May this write land? The session that it belongs to, or None: not one byte of it lands.

        Called before the payload is read. Spans may name any page or layer: judging them is the callee's work.
        """
        ...

    def landed(self, link: Link, session_id: SessionId, num_bytes: int) -> None:
        """An admitted write is in the region, whole."""
        ...

    def notified(self, link: Link, message: bytes) -> None:
        """The sending end sent a message; every earlier write of its session has landed or was refused."""
        ...

    def lost(self, link: Link, error: TransferError) -> None:
        """The link is gone, and nothing can land from it any more."""
        ...


class Transport(Protocol):
    """One process's end of every link. Constructed with (config, fingerprint, clock); thread-safe."""

    @property
    def region(self) -> Region:
        """What ``register`` was given."""
        ...

    @property
    def counters(self) -> TransportCounters: ...

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

    def close(self) -> None:
        """Close every link and stop accepting; returns when every ``lost`` was called and no thread is left.

        Must not be called from an event.
        """
        ...


class TransportFactory(Protocol):
    def __call__(self, config: KvTransferConfig, fingerprint: CacheFingerprint, clock: Clock) -> Transport: ...


# name |-> module:class, imported when first asked for: an optional dependency of one transport stays optional.
TRANSPORTS = {
    "local": "kv_transfer.local:LocalTransport",
    "tcp": "kv_transfer.tcp:TcpTransport",
}


def create_transport(config: KvTransferConfig, fingerprint: CacheFingerprint, clock: Clock) -> Transport:
    """The transport that ``config.transport`` names. Raises InvalidConfig for an unknown name."""
    target = TRANSPORTS.get(config.transport)
    if target is None:
        known = ", ".join(sorted(TRANSPORTS))
        raise InvalidConfig("kv_transfer.transport", f"must be one of {known}, got {config.transport!r}")
    module, _, name = target.partition(":")
    factory: TransportFactory = getattr(import_module(module), name)
    return factory(config, fingerprint, clock)
