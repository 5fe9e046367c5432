"""What does a codec do to a transfer when every write has it? A transport around another, for the benchmark alone.

In service a policy chooses (kv_transfer/codec_policy.py), and on a fast path it chooses raw.
"""

from __future__ import annotations

from dataclasses import replace

from core.errors import TransferError
from core.request import SessionId
from kv_transfer.codec import Codec
from kv_transfer.transport import (
    LinkStats,
    PieceLimits,
    ReceiveEvents,
    Region,
    SendEvents,
    SendLink,
    Transport,
    TransportCounters,
    Write,
)


class FixedCodecTransport:
    """``transport``, but each write that is sent through it has ``codec``."""

    def __init__(self, transport: Transport, codec: Codec) -> None:
        self._transport = transport
        self._codec = codec

    @property
    def region(self) -> Region:
        return self._transport.region

    @property
    def counters(self) -> TransportCounters:
        return self._transport.counters

    @property
    def pieces(self) -> PieceLimits:
        return self._transport.pieces

    def register(self, region: Region) -> None:
        self._transport.register(region)

    def serve(self, events: ReceiveEvents) -> None:
        self._transport.serve(events)

    def describe(self) -> bytes:
        return self._transport.describe()

    def connect(self, descriptor: bytes, events: SendEvents) -> SendLink:
        link = _EncodingLink(self._codec, events)
        link.inner = self._transport.connect(descriptor, link)
        return link

    def invite(self, descriptor: bytes) -> None:
        self._transport.invite(descriptor)

    def stats(self) -> tuple[LinkStats, ...]:
        return self._transport.stats()

    def close(self) -> None:
        self._transport.close()


class _EncodingLink:
    """The sender's link to the inner one, and the inner one's events to the sender."""

    inner: SendLink

    def __init__(self, codec: Codec, events: SendEvents) -> None:
        self._codec = codec
        self._events = events

    @property
    def peer(self) -> str:
        return self.inner.peer

    @property
    def heard_at(self) -> float:
        return self.inner.heard_at

    def write(self, write: Write) -> None:
        self.inner.write(replace(write, codec=self._codec))

    def notify(self, session_id: SessionId, message: bytes) -> None:
        self.inner.notify(session_id, message)

    def cancel(self, session_id: SessionId) -> bool:
        return self.inner.cancel(session_id)

    def close(self, error: TransferError) -> None:
        self.inner.close(error)

    def written(self, link: SendLink, write: Write) -> None:
        self._events.written(self, write)

    def drained(self, link: SendLink, session_id: SessionId) -> None:
        self._events.drained(self, session_id)

    def notified(self, link: SendLink, message: bytes) -> None:
        self._events.notified(self, message)

    def lost(self, link: SendLink, error: TransferError) -> None:
        self._events.lost(self, error)
