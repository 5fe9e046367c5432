"""Who sends which pages, and when may they be reused? The sending end of every hand-over of one worker.

Threads: every method may be called from any thread. ``on_closed`` is called without any lock of this layer held,
either from a transport thread or from within ``abort``, ``granted`` or ``close`` (never from within ``open``,
``pages_stored``, ``commit`` or ``expire``). While it runs the link
waits, so it should only hand the news on; it must not raise.

Invariant: queueing on a link happens while the sender's lock is held, in the order in which the sessions decided it;
so a commit can never get ahead of a write that another thread is about to queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from threading import Condition
from typing import Protocol

from core.clock import Clock
from core.errors import PeerLost, ProtocolViolation, TransferAborted, TransferError
from core.kv_layout import KvLayout
from core.request import SessionId
from kv_transfer.codec import Codec
from kv_transfer.messages import Abort, AbortAck, CommitAck, Renew, Resend, decode, encode
from kv_transfer.rank_parts import together
from kv_transfer.session import Grant, Outgoing, SendReport, SendSession, SendState
from kv_transfer.transfer_plan import layout_of_pages
from kv_transfer.transport import LayerPages, PeerIdentity, SendLink, SendOrder, Transport, Write

logger = logging.getLogger(__name__)

OnClosed = Callable[[SessionId, SendReport], None]
# Bytes/s that the way to a receiving worker carries; None while it is not known.
LinkSpeed = Callable[[PeerIdentity], float | None]
# What a write of pages of these layers to a worker is to be encoded as.
CodecFor = Callable[[PeerIdentity, Sequence[LayerPages], Write], Codec]

RENEWALS_PER_LEASE = 3
_RENEWALS = SessionId("")  # a lane of their own: they must not wait behind the writes of their sessions


@dataclass(frozen=True, slots=True)
class StoredPages:
    """Pages of one session that are, or will be, complete in a layer, or in all."""

    session_id: SessionId
    first_page: int
    page_ids: tuple[int, ...]


@dataclass(slots=True)
class _Whole:
    """A session that goes to several ranks of the receiving worker, each by a part of its own."""

    session_id: SessionId
    left: list[SessionId]  # parts that have not closed
    reports: list[SendReport]


@dataclass(slots=True)
class _Entry:
    session: SendSession
    raw: bool  # whatever the codec of its link
    whole: _Whole | None = None  # None: it is no part
    link: SendLink | None = None  # from the grant on
    lease_s: float = 0.0
    said_at: float = 0.0  # when something was last queued


@dataclass(slots=True)
class _Peer:
    link: SendLink
    lease_s: float


class SendingEnd(Protocol):
    """What hand-overs ask of a worker's sending end: ``KvSender``, or all ranks' together (rank_sender.py)."""

    def open(
        self,
        session_id: SessionId,
        num_pages: int,
        order: SendOrder = SendOrder(),
        num_tokens: int | None = None,
        *,
        raw: bool = False,
    ) -> None: ...
    def pages_stored(self, session_id: SessionId, layer: int, first_page: int, src_page_ids: Sequence[int]) -> None: ...
    def step_stores(self, stores: Sequence[StoredPages]) -> Callable[[int], None]: ...
    def granted(self, session_id: SessionId, grant: Grant) -> None: ...
    def commit(self, session_id: SessionId, payload: bytes) -> None: ...
    def abort(self, session_id: SessionId, reason: str) -> None: ...


class KvSender:
    """Sends the pages of many sessions. Sole writer of their ``SendSession``s."""

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        on_closed: OnClosed,
        layout: KvLayout | None = None,
        link_speed: LinkSpeed = lambda peer: None,
        codec_for: CodecFor | None = None,
    ) -> None:
        """``transport`` has its region; it is shared with the worker's KvReceiver and closed by neither.

        ``layout``: what the region's pages hold; None: nothing is known but their size, and a token stands for a page.
        ``codec_for``: None: everything is sent raw.
        """
        self._transport = transport
        self._clock = clock
        self._on_closed = on_closed
        self._layout = layout or layout_of_pages(transport.region.geometry)
        self._link_speed = link_speed
        self._codec_for = codec_for
        self._changed = Condition()
        self._entries: dict[SessionId, _Entry] = {}
        self._wholes: dict[SessionId, _Whole] = {}  # sessions whose parts are in _entries
        self._peers: dict[bytes, _Peer] = {}  # descriptor |-> the one link to that peer
        self._num_reporting = 0  # sessions out of _entries whose on_closed has not returned
        self._bytes_sent = 0
        self._writes_resent = 0
        self._closed = False

    @property
    def num_sessions(self) -> int:
        """Sessions, or parts of them, that have not closed."""
        return len(self._entries)

    @property
    def bytes_sent(self) -> int:
        """Payload bytes of all writes since the start."""
        return self._bytes_sent

    @property
    def writes_resent(self) -> int:
        """Writes that were queued again because they came damaged or were lost, since the start."""
        return self._writes_resent

    def open(
        self,
        session_id: SessionId,
        num_pages: int,
        order: SendOrder = SendOrder(),
        num_tokens: int | None = None,
        *,
        raw: bool = False,
    ) -> None:
        """Begin a session for a sequence of ``num_pages`` pages here; ``order``: its place among others on a link.

        ``num_tokens``: tokens of it, of which the last page may hold fewer than it could; None: it is full.
        ``raw``: its bytes must arrive as they are, also on a link whose codec changes numbers a little.

        ``on_closed`` will be called exactly once for it; after that no byte of its source pages is read.
        Raises ProtocolViolation if it is open already, or the sender is closed.
        """
        with self._changed:
            if self._closed:
                raise ProtocolViolation("the sender is closed")
            if session_id in self._entries or session_id in self._wholes:
                raise ProtocolViolation(f"session {session_id} is open already")
            if num_tokens is None:
                num_tokens = num_pages * self._layout.page_size
            assert self._layout.num_pages(num_tokens) == num_pages, "a page for every token"
            geometry = self._transport.region.geometry
            self._entries[session_id] = _Entry(
                SendSession(session_id, num_tokens, geometry, self._layout, order, self._transport.pieces), raw
            )

    def pages_stored(self, session_id: SessionId, layer: int, first_page: int, src_page_ids: Sequence[int]) -> None:
        """Pages ``first_page ..`` of ``layer`` are complete and are in the pool at ``src_page_ids``.

        In device memory: once the kernels have run that the calling thread launched on its current stream.
        Each page of each layer once, in any order. Never blocks; ignored when the session has closed.
        Raises ProtocolViolation for pages or layers that the session or the pool does not have, or after ``commit``.
        """
        self._transport.region.mark(layer)
        with self._changed:
            for entry in self._entries_of(session_id):
                self._queue(entry, entry.session.store(layer, first_page, src_page_ids, self._clock.now()))

    def step_stores(self, stores: Sequence[StoredPages]) -> Callable[[int], None]:
        """A step is about to be computed that completes these pages. To be called with 0, 1, ... when they are complete
        in that layer, as ``pages_stored`` is."""

        def layer_stored(layer: int) -> None:
            for pages in stores:
                self.pages_stored(pages.session_id, layer, pages.first_page, pages.page_ids)

        return layer_stored

    def granted(self, session_id: SessionId, grant: Grant) -> None:
        """The receiver gave pages: what was stored so far is sent, what follows goes at once. Ignored when closed.

        Raises, changing nothing, ProtocolViolation if the session was granted before or the grant does not fit it, and
        Incompatible if the receiver's pool cannot hold what this one does.
        """
        with self._changed:
            entry = self._entries.get(session_id)
            if entry is None:
                if session_id in self._wholes:
                    raise ProtocolViolation(f"session {session_id} was granted before")
                return
            now, speed = self._clock.now(), self._link_speed(grant.receiver)
            begun: list[tuple[_Entry, Grant, list[Outgoing]]] = []
            if grant.parts:
                whole = _Whole(session_id, [part.session_id for part in grant.parts], [])
                for part in grant.parts:
                    of_part = _Entry(entry.session.part(part.session_id), entry.raw, whole)
                    granted = grant.of_part(part)
                    begun.append((of_part, granted, of_part.session.grant(granted, now, speed)))
                del self._entries[session_id]
                self._wholes[session_id] = whole
                self._entries.update((of_part.session.session_id, of_part) for of_part, _, _ in begun)
            else:
                begun.append((entry, grant, entry.session.grant(grant, now, speed)))
            for granted_entry, granted, outgoing in begun:
                self._begin(granted_entry, granted, outgoing)
            closed = self._pop_closed([granted_entry for granted_entry, _, _ in begun])
        self._report(closed)

    def commit(self, session_id: SessionId, payload: bytes) -> None:
        """Every page was stored: after the last write send ``payload`` to the receiver's ``on_committed``.

        May come before ``granted``. Ignored when closed. Raises ProtocolViolation if committed before, or for a
        payload of more than ``messages.MAX_PAYLOAD_BYTES``.
        """
        with self._changed:
            for entry in self._entries_of(session_id):
                self._queue(entry, entry.session.commit(payload, self._clock.now()))

    def abort(self, session_id: SessionId, reason: str) -> None:
        """Give the session up in any state; ``on_closed`` comes with TransferAborted. Ignored when closed."""
        error = TransferAborted(f"given up by the sending end: {reason}")
        with self._changed:
            entries = self._entries_of(session_id)
            for entry in entries:
                self._abort(entry, error)
            closed = self._pop_closed(entries)
        self._report(closed)

    def expire(self, now: float) -> None:
        """Call it every second or so: links whose peer was silent for the lease are lost, their sessions PeerLost.

        Sessions that have nothing to send for a while renew their grant.
        """
        with self._changed:
            for entry in self._entries.values():
                self._renew(entry, now)
            for peer in self._peers.values():
                silent_s = now - peer.link.heard_at
                if silent_s > peer.lease_s:
                    logger.warning("kv peer %s was silent for %.1f s: link closed", peer.link.peer, silent_s)
                    peer.link.close(PeerLost(f"{peer.link.peer} was silent for {silent_s:.1f} s"))

    def close(self) -> None:
        """Abort every session and close every link; returns when every ``on_closed`` was called.

        Must not be called from ``on_closed``.
        """
        with self._changed:
            self._closed = True
            sessions = [*self._entries, *self._wholes]
        for session_id in sessions:
            self.abort(session_id, "the worker stops")
        with self._changed:
            for peer in self._peers.values():
                peer.link.close(PeerLost("this end was closed"))
            self._changed.wait_for(lambda: not self._entries and not self._peers and not self._num_reporting)

    # ---- SendEvents: called by the transport's threads ----

    def written(self, link: SendLink, write: Write) -> None:
        with self._changed:
            self._bytes_sent += write.num_bytes
            entry = self._entries.get(write.session_id)
            if entry is None or entry.link is not link or entry.session.token != write.token:
                return
            entry.session.written(write)

    def drained(self, link: SendLink, session_id: SessionId) -> None:
        with self._changed:
            entry = self._entries.get(session_id)
            if entry is None or entry.link is not link or entry.session.state is not SendState.ABORTING:
                return
            entry.session.drained(self._clock.now())
            closed = self._pop_closed([entry])
        self._report(closed)

    def notified(self, link: SendLink, message: bytes) -> None:
        match decode(message):
            case CommitAck() as ack:
                closed = self._acknowledged(link, ack)
            case Resend() as resend:
                closed = self._asked_again(link, resend)
            case Abort() as abort:
                closed = self._aborted_by_peer(link, abort)
            case other:
                raise ProtocolViolation(f"a receiving end does not send {type(other).__name__}")
        self._report(closed)

    def lost(self, link: SendLink, error: TransferError) -> None:
        with self._changed:
            self._peers = {descriptor: peer for descriptor, peer in self._peers.items() if peer.link is not link}
            entries = [entry for entry in self._entries.values() if entry.link is link]
            for entry in entries:
                entry.session.lost(error, self._clock.now())
            closed = self._pop_closed(entries)
            self._changed.notify_all()
        if entries:
            logger.warning("kv link to %s lost with %d sessions: %s", link.peer, len(entries), error)
        self._report(closed)

    # ---- with the lock held ----

    def _entries_of(self, session_id: SessionId) -> list[_Entry]:
        """The session, or those of its parts that have not closed."""
        whole = self._wholes.get(session_id)
        names = [session_id] if whole is None else whole.left
        return [entry for name in names if (entry := self._entries.get(name)) is not None]

    def _begin(self, entry: _Entry, grant: Grant, outgoing: Iterable[Outgoing]) -> None:
        entry.lease_s = grant.lease_s
        try:
            entry.link = self._link_to(grant)
        except ProtocolViolation as error:
            entry.session.lost(error, self._clock.now())
        else:
            self._queue(entry, outgoing)

    def _queue(self, entry: _Entry, outgoing: Iterable[Outgoing]) -> None:
        for item in outgoing:
            assert entry.link is not None, "a session sends nothing before its grant"
            entry.said_at = self._clock.now()
            if isinstance(item, Write):
                entry.link.write(self._encoded(entry, item))
            else:
                entry.link.notify(item.session_id, encode(item))

    def _encoded(self, entry: _Entry, write: Write) -> Write:
        """With the codec that it is to have on the wire."""
        if self._codec_for is None or entry.raw:
            return write
        layers = self._transport.region.geometry.layers[write.first_layer : write.layers.stop]
        codec = self._codec_for(entry.session.receiver, layers, write)
        return write if codec is write.codec else replace(write, codec=codec)

    def _link_to(self, grant: Grant) -> SendLink:
        peer = self._peers.get(grant.descriptor)
        if peer is None:
            peer = _Peer(self._transport.connect(grant.descriptor, self), grant.lease_s)
            self._peers[grant.descriptor] = peer
        peer.lease_s = grant.lease_s
        return peer.link

    def _renew(self, entry: _Entry, now: float) -> None:
        session, link = entry.session, entry.link
        if link is None or session.token is None or session.state is SendState.ABORTING:
            return
        if now - entry.said_at > entry.lease_s / RENEWALS_PER_LEASE:
            entry.said_at = now
            link.notify(_RENEWALS, encode(Renew(session.session_id, session.token)))

    def _abort(self, entry: _Entry, error: TransferError, asked: bool = False) -> None:
        """The farewell tells the peer that nothing follows: it is queued behind the writes that may be under way.

        ``asked``: it was the peer who wanted the end.
        """
        session, link = entry.session, entry.link
        if session.state is SendState.ABORTING:
            return
        now = self._clock.now()
        session.abort(error, now)
        if link is None or session.token is None:
            return
        name, token = session.session_id, session.token
        idle = link.cancel(name)
        link.notify(name, encode(AbortAck(name, token) if asked else Abort.because_of(name, token, error)))
        if idle:
            session.drained(now)

    def _entry_of(self, link: SendLink, message: CommitAck | Resend | Abort) -> _Entry | None:
        entry = self._entries.get(message.session_id)
        if entry is None or entry.link is not link or entry.session.token != message.token:
            return None  # it ended, and its name may be in use again
        return entry

    def _pop_closed(self, entries: Iterable[_Entry]) -> list[tuple[SessionId, SendReport]]:
        closed = []
        waiting = list(entries)
        while waiting:
            entry = waiting.pop(0)
            session, whole = entry.session, entry.whole
            if session.report is None or self._entries.get(session.session_id) is not entry:
                continue
            del self._entries[session.session_id]
            if whole is None:
                closed.append((session.session_id, session.report))
                continue
            whole.left.remove(session.session_id)
            whole.reports.append(session.report)
            if session.report.error is not None:
                waiting += self._abort_rest(whole, session.report.error)
            if not whole.left:
                del self._wholes[whole.session_id]
                closed.append((whole.session_id, together(whole.reports)))
        self._num_reporting += len(closed)
        return closed

    def _abort_rest(self, whole: _Whole, error: TransferError) -> list[_Entry]:
        """One part has failed, so nobody has use for the others."""
        entries = [self._entries[name] for name in whole.left]
        for entry in entries:
            if entry.session.report is None:
                self._abort(entry, TransferAborted(f"another part of the hand-over failed: {error}"))
        return entries

    # ---- the rest of an event ----

    def _acknowledged(self, link: SendLink, ack: CommitAck) -> list[tuple[SessionId, SendReport]]:
        with self._changed:
            entry = self._entry_of(link, ack)
            if entry is None or entry.session.state is SendState.ABORTING:
                return []  # given up here while the acknowledgement was under way
            entry.session.acknowledged(self._clock.now())
            return self._pop_closed([entry])

    def _asked_again(self, link: SendLink, resend: Resend) -> list[tuple[SessionId, SendReport]]:
        with self._changed:
            entry = self._entry_of(link, resend)
            if entry is None or entry.session.state is SendState.ABORTING:
                return []  # given up here while the request was under way
            try:
                outgoing = entry.session.resend(resend.missing)
            except ProtocolViolation as error:
                self._abort(entry, error)
                return self._pop_closed([entry])
            self._writes_resent += len(outgoing) - 1
            logger.warning(
                "kv session %s to %s: %d bytes did not arrive as they were sent, and are sent again in %d writes",
                resend.session_id,
                link.peer,
                sum(missing.num_bytes for missing in resend.missing),
                len(outgoing) - 1,
            )
            self._queue(entry, outgoing)
            return []

    def _aborted_by_peer(self, link: SendLink, abort: Abort) -> list[tuple[SessionId, SendReport]]:
        with self._changed:
            entry = self._entry_of(link, abort)
            if entry is None:  # nothing of it is queued, or ever will be
                link.notify(abort.session_id, encode(AbortAck(abort.session_id, abort.token)))
                return []
            self._abort(entry, abort.error, asked=True)
            return self._pop_closed([entry])

    def _report(self, closed: Iterable[tuple[SessionId, SendReport]]) -> None:
        for session_id, report in closed:
            try:
                self._on_closed(session_id, report)
            finally:
                with self._changed:
                    self._num_reporting -= 1
                    self._changed.notify_all()
