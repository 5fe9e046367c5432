"""What do the two ends of a TCP link do with pages? One reads them out of its pool, one puts them into its own.

The life of a write: a session queues it -> whichever connection is free takes it; its bytes are hashed where they lie
and sent with one gathered call, behind their checksum -> at the peer the reader of that connection asks ``admit``,
receives the payload straight into the destination pages, a piece at a time, and hashes each piece while it is in the
cache. A payload that may not land is read into a scratch buffer and thrown away; one that arrives otherwise than it was
sent, or not whole, is ``damaged``. Only what a codec makes, or device memory needs, is ever copied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import ClassVar

from xxhash import xxh3_64

from core.errors import PeerLost, ProtocolViolation, TransferError
from core.request import SessionId
from kv_transfer.codec import Codec, CodecUse, decode, encode, encoded_bound
from kv_transfer.config import LinkConfig
from kv_transfer.frames import KEEPALIVE, Checksum, FrameKind, Header, LinkRole, WriteHead, pack_write, parse_write
from kv_transfer.spans import SentTables, SpanTables
from kv_transfer.tcp_endpoint import HANDSHAKE_S, Endpoint, read_frame
from kv_transfer.tcp_link import Connection, LinkEnd
from kv_transfer.tcp_stream import Stream, pieces
from kv_transfer.transport import LayerPages, LinkStats, PeerIdentity, ReceiveEvents, SendEvents, Write

logger = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 18  # received and hashed at once: it stays in a core's cache in between, whatever else passes there
_DRAIN_BYTES = 1 << 18
_BYTES_PER_GBIT = 1e9 / 8


class SendEnd(LinkEnd):
    """The end that writes. ``events`` None: a peer dialled before anybody here asked for the link (``claim``)."""

    role: ClassVar[LinkRole] = LinkRole.SENDS_PAGES

    def __init__(
        self,
        endpoint: Endpoint,
        peer: str,
        identity: PeerIdentity,
        transport_id: bytes,
        forget: Callable[[LinkEnd], None],
        settings: LinkConfig,
        events: SendEvents | None,
    ) -> None:
        super().__init__(endpoint, peer, identity, transport_id, forget)
        self._settings = settings
        self._events = events
        self._path = ""
        self._bytes_sent = 0
        self._retransmits = 0  # of connections that are gone
        self._encoded: dict[Codec, CodecUse] = {}
        self._tables = SentTables()

    def write(self, write: Write) -> None:
        self._outbox.put(write.session_id, write)

    def cancel(self, session_id: SessionId) -> bool:
        return self._outbox.cancel(session_id)

    def claim(self, events: SendEvents) -> bool:
        """Take over a link that nobody had asked for. False: it is closing."""
        with self._changed:
            if self._error is None:
                self._events = events
            return self._error is None

    def wait_to_be_dialled(self) -> None:
        """Give the link up if the peer does not dial within the time of a handshake."""
        self._spawn(self._await_control, "kv-await")

    def stats(self) -> LinkStats:
        """Of what lives now."""
        with self._changed:
            connections = list(self._connections.values())
            retransmits, bytes_sent, reconnects = self._retransmits, self._bytes_sent, self._reconnects
            encoded = tuple(use for _, use in sorted(self._encoded.items()))
        infos = []
        for connection in connections:
            try:
                infos.append(connection.stream.info())
            except OSError:
                continue  # closed meanwhile
        min_rtts = [info.min_rtt_s for info in infos if info.min_rtt_s is not None]
        return LinkStats(
            peer=self.identity,
            path=self._path,
            connections=len(connections),
            bytes_sent=bytes_sent,
            rtt_s=sum(info.rtt_s for info in infos) / len(infos) if infos else None,
            min_rtt_s=min(min_rtts, default=None),
            delivery_rate=sum(info.delivery_rate for info in infos) if infos else None,
            retransmits=retransmits + sum(info.retransmits for info in infos),
            busy_s=self._outbox.busy_s,
            bytes_queued=self._outbox.bytes_queued,
            reconnects=reconnects,
            encoded=encoded,
        )

    def finish_handshake(self, stream: Stream) -> None:
        header, _ = read_frame(stream)
        if header.kind is not FrameKind.KEEPALIVE:
            raise ProtocolViolation(f"a {header.kind.name} frame where the peer was to say that it is ready")
        pace = self._settings.pace_gbps
        if pace is not None:
            stream.pace(pace * _BYTES_PER_GBIT / self._num_connections)
        self._path = stream.path
        super().finish_handshake(stream)

    def _await_control(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.connected or self._error is not None, HANDSHAKE_S):
                logger.warning("kv link: %s did not dial within %.0f s", self._peer, HANDSHAKE_S)
        if not self.connected:
            self.close(PeerLost(f"{self._peer} did not dial within {HANDSHAKE_S:.0f} s"))

    def _send_write(self, stream: Stream, write: Write) -> None:
        num_bytes = 0
        try:
            with self._endpoint.region.outgoing(write) as views:
                payload = self._encode(write, views)
                raw = write.codec is Codec.RAW
                num_bytes = write.num_bytes if raw else sum(view.nbytes for view in payload)
                checksum = _digest(payload) if self._settings.checksum == "xxh3" else None
                spans = self._tables.of(write.table)
                head = pack_write(write.token, write.layers, spans, num_bytes, write.codec, checksum)
                stream.send([memoryview(head), *payload])
        finally:
            drained = self._outbox.done(write)
            with self._changed:
                self._bytes_sent += num_bytes
            self._tell_written(write, drained)

    def _tell_written(self, write: Write, drained: bool) -> None:
        assert self._events is not None, "who writes has claimed the link"
        try:
            self._events.written(self, write)
            if drained:
                self._events.drained(self, write.session_id)
        except TransferError as error:
            self.close(error)
            raise

    def _encode(self, write: Write, views: Sequence[memoryview]) -> Sequence[memoryview]:
        if write.codec is Codec.RAW:
            return views
        pages = _common_layer(self._endpoint, write.layers)
        now = self._endpoint.clock.now
        started_at = now()
        payload = encode(write.codec, views, pages.dtype, pages.block_bytes)
        took_s = now() - started_at
        with self._changed:
            so_far = self._encoded.get(write.codec, CodecUse(write.codec, 0, 0, 0.0))
            self._encoded[write.codec] = CodecUse(
                write.codec,
                so_far.raw_bytes + write.num_bytes,
                so_far.wire_bytes + sum(view.nbytes for view in payload),
                so_far.encode_s + took_s,
            )
        return payload

    def _retire(self, connection: Connection) -> None:
        try:
            retransmits = connection.stream.info().retransmits
        except OSError:
            return  # the kernel has forgotten it
        with self._changed:
            self._retransmits += retransmits

    def _report_message(self, message: bytes) -> None:
        if self._events is None:
            raise ProtocolViolation("a message on a link of which no session was told")
        self._events.notified(self, message)

    def _report_lost(self, error: TransferError) -> None:
        if self._events is not None:
            self._events.lost(self, error)


class ReceiveEnd(LinkEnd):
    """The end that is written to."""

    role: ClassVar[LinkRole] = LinkRole.RECEIVES_PAGES

    def __init__(
        self,
        endpoint: Endpoint,
        peer: str,
        identity: PeerIdentity,
        transport_id: bytes,
        forget: Callable[[LinkEnd], None],
        events: ReceiveEvents,
    ) -> None:
        super().__init__(endpoint, peer, identity, transport_id, forget)
        self._events = events
        self._tables = SpanTables()
        self.invited_at = self._heard_at  # when a grant for the peer was last about to leave

    def _greet(self, stream: Stream) -> None:
        stream.say(KEEPALIVE)  # from here on this connection's barriers are waited for: it may be written on

    def _take_write(self, connection: Connection, header: Header, body: bytes) -> None:
        head = parse_write(body, self._tables.parse)
        if head.codec is Codec.RAW and header.payload_bytes != head.num_bytes:
            raise ProtocolViolation(f"a WRITE of {head.num_bytes} bytes with a payload of {header.payload_bytes}")
        session_id = self._admit(head)
        if session_id is None:
            self._endpoint.count("writes_refused")
            self._drain(connection, header.payload_bytes)
            return
        landed = False
        try:
            landed = self._land(connection, header, head)
        finally:
            self._tell_arrival(session_id, head, landed=landed)

    def _admit(self, head: WriteHead) -> SessionId | None:
        try:
            return self._events.admit(self, head.token, head.layers, head.spans)
        except TransferError as error:
            self.close(error)
            raise

    def _tell_arrival(self, session_id: SessionId, head: WriteHead, *, landed: bool) -> None:
        try:
            if landed:
                self._events.landed(self, session_id, head.layers, head.spans)
            else:
                self._endpoint.count("writes_damaged")
                self._events.damaged(self, session_id, head.layers, head.spans)
        except TransferError as error:
            self.close(error)
            raise

    def _land(self, connection: Connection, header: Header, head: WriteHead) -> bool:
        """Receive an admitted write's payload into the region. False: it is not what was sent."""
        try:
            with self._endpoint.region.incoming(head.layers, head.spans) as views:
                if head.codec is Codec.RAW:
                    _receive_checked(connection.stream, views, head)
                else:
                    self._decode(connection, header, head, views)
        except _Damaged:
            logger.warning("kv link from %s: a write of %d bytes fails its checksum", self._peer, header.payload_bytes)
            return False
        return True

    def _decode(self, connection: Connection, header: Header, head: WriteHead, views: Sequence[memoryview]) -> None:
        pages = _common_layer(self._endpoint, head.layers)
        if header.payload_bytes > encoded_bound(head.codec, head.num_bytes, pages.dtype):
            raise ProtocolViolation(f"{head.num_bytes} bytes encoded as {head.codec.name} in {header.payload_bytes}")
        payload = connection.scratch(header.payload_bytes)
        _receive_checked(connection.stream, [payload], head)
        decode(head.codec, payload, views, pages.dtype)

    def _drain(self, connection: Connection, num_bytes: int) -> None:
        while num_bytes:
            part = min(num_bytes, _DRAIN_BYTES)
            connection.stream.receive([connection.scratch(part)])
            num_bytes -= part

    def _report_message(self, message: bytes) -> None:
        self._events.notified(self, message)

    def _report_lost(self, error: TransferError) -> None:
        if self.connected:  # before the handshake nobody was told of this link
            self._events.lost(self, error)
        elif not isinstance(error, PeerLost):
            self._endpoint.count("links_refused")


class _Damaged(Exception):
    """The payload is not what its checksum says."""


def _digest(views: Sequence[memoryview]) -> int:
    digest = xxh3_64()
    for view in views:
        digest.update(view)
    return digest.intdigest()


def _receive_checked(stream: Stream, views: Sequence[memoryview], head: WriteHead) -> None:
    """Fill ``views``. Raises _Damaged when they are not what the write's checksum says."""
    if head.algorithm is Checksum.NONE:
        stream.receive(views)
        return
    digest = xxh3_64()
    for piece in pieces(views, _PIECE_BYTES):
        stream.receive(piece)
        for view in piece:
            digest.update(view)
    if digest.intdigest() != head.checksum:
        raise _Damaged


def _common_layer(endpoint: Endpoint, layers: range) -> LayerPages:
    """What the layers of an encoded write have in common. Raises ProtocolViolation when they differ."""
    kinds = {(pages.dtype, pages.block_bytes) for pages in endpoint.region.geometry.layers[layers.start : layers.stop]}
    if len(kinds) != 1:
        raise ProtocolViolation(f"an encoded write of layers {layers} that hold different things")
    return endpoint.region.geometry.layers[layers.start]
