"""Which pages may a peer write into, and when are they ours again? The receiving end of every hand-over of a worker.

Threads: every method may be called from any thread. ``on_committed`` and ``on_released`` are called without any lock
of this layer held, from a transport thread or (``on_released``) from within ``abort``, ``expire`` or ``close``.
``on_committed`` is what the commit's acknowledgement waits for: when it returns the sender may reuse its pages.
While they run the link waits, so they should only hand the news on; they must not raise.

Invariants: a session belongs to the one link that showed its token, and only that link can write, commit or end it;
of on_committed and on_released exactly one is called for each issued session; ``on_released`` only when nothing can
land in its pages any more. A session of which a living peer says nothing for the lease is given up too.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from threading import Condition
from typing import Protocol

from core.clock import Clock
from core.errors import Corrupted, PeerLost, ProtocolViolation, TransferAborted, TransferError
from core.kv_layout import KvEnd, KvLayout
from core.request import SessionId
from kv_transfer.messages import (
    Abort,
    AbortAck,
    AbortCause,
    Begin,
    Commit,
    CommitAck,
    Message,
    Missing,
    Renew,
    Resend,
    decode,
    encode,
)
from kv_transfer.rank_parts import part_name, senders_of
from kv_transfer.session import Expected, Grant, GrantPart, ReceiveSession, ReceiveState
from kv_transfer.spans import num_bytes_of
from kv_transfer.transfer_plan import layout_of_pages
from kv_transfer.transport import TOKEN_BYTES, Link, Span, Transport

logger = logging.getLogger(__name__)

OnCommitted = Callable[[SessionId, bytes], None]
OnReleased = Callable[[SessionId, TransferError], None]


@dataclass(slots=True)
class _Whole:
    """A session whose bytes come from several ranks of the sending worker, or to one of several: its parts here."""

    session_id: SessionId
    left: list[SessionId]  # parts that have neither been committed nor released
    error: TransferError | None = None  # of the first one that broke


@dataclass(slots=True)
class _Entry:
    session: ReceiveSession
    heard_at: float  # when its sender last said something of it, or it was given up here
    link: Link | None = None  # the one that showed the token
    whole: _Whole | None = None  # None: it is no part


class ReceivingEnd(Protocol):
    """What hand-overs ask of a worker's receiving end: ``KvReceiver``, or all ranks' together (rank_receiver.py)."""

    @property
    def num_sessions(self) -> int: ...
    @property
    def waits(self) -> bool:
        """``issue`` waits for other processes: call it where that does no harm."""
        ...

    def issue(
        self,
        session_id: SessionId,
        first_page: int,
        pages: Sequence[int],
        num_tokens: int | None = None,
        sender: KvLayout | None = None,
        sender_descriptor: bytes = b"",
        sender_ranks: Sequence[KvEnd] = (),
    ) -> Grant: ...
    def abort(self, session_id: SessionId, reason: str) -> None: ...


class KvReceiver:
    """Grants pages to peers and takes what they write. Sole writer of its ``ReceiveSession``s."""

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        on_committed: OnCommitted,
        on_released: OnReleased,
        lease_s: float,
        layout: KvLayout | None = None,
        rank: int = 0,
    ) -> None:
        """``transport`` has its region and serves nobody yet; it is shared with the worker's KvSender.

        ``layout``: what the region's pages hold; None: nothing is known but their size, and a token stands for a page.
        ``rank``: of this process among those of its worker.
        """
        self._rank = rank
        self._transport = transport
        self._layout = layout or layout_of_pages(transport.region.geometry)
        self._clock = clock
        self._on_committed = on_committed
        self._on_released = on_released
        self._lease_s = lease_s
        self._changed = Condition()
        self._entries: dict[SessionId, _Entry] = {}
        self._wholes: dict[SessionId, _Whole] = {}  # sessions whose parts are in _entries
        self._by_token: dict[bytes, _Entry] = {}
        self._num_reporting = 0  # sessions out of _entries whose callback has not returned
        self._bytes_received = 0
        self._num_resends = 0
        self._closed = False
        transport.serve(self)

    @property
    def num_sessions(self) -> int:
        """Sessions, or parts of them, that have not ended."""
        return len(self._entries)

    @property
    def waits(self) -> bool:
        return False

    @property
    def num_quarantined(self) -> int:
        """Pages of aborted sessions into which a write may still land."""
        with self._changed:
            entries = [e for e in self._entries.values() if e.session.state is ReceiveState.QUARANTINED]
        # Parts of one session share its pages.
        sessions = {e.session.session_id if e.whole is None else e.whole.session_id: e.session for e in entries}
        return sum(session.num_pages for session in sessions.values())

    @property
    def bytes_received(self) -> int:
        """Payload bytes that landed since the start."""
        return self._bytes_received

    @property
    def num_resends(self) -> int:
        """Times that a sender was asked to send again what came damaged or was lost, since the start."""
        return self._num_resends

    def issue(
        self,
        session_id: SessionId,
        first_page: int,
        pages: Sequence[int],
        num_tokens: int | None = None,
        sender: KvLayout | None = None,
        sender_descriptor: bytes = b"",
        sender_ranks: Sequence[KvEnd] = (),
    ) -> Grant:
        """Let a peer write every layer of ``pages`` once, for the sequence's pages ``first_page ..``.

        ``num_tokens``: tokens of the whole sequence, of which the last page may hold fewer than it could; None: it is
        full. ``sender``: the pool that it comes from, None: one like this; of its heads those that are here are waited
        for. ``sender_descriptor``: of the sender's transport, for links that this end dials; empty: it does not.
        Exactly one of ``on_committed`` and ``on_released`` follows.
        Raises ProtocolViolation if the session lives already, the receiver is closed, or the descriptor is nonsense;
        Incompatible if this pool cannot hold what the sender's does.
        """
        layout, now = self._layout, self._clock.now()
        num_pages = self._transport.region.geometry.num_pages
        assert all(0 <= page < num_pages for page in pages), "the allocator gives pages of the pool"
        if sender is not None:
            layout.require_compatible(sender)
        senders = senders_of(layout, [end.layout for end in sender_ranks]) if sender_ranks else ()
        if num_tokens is None:
            num_tokens = (first_page + len(pages)) * layout.page_size
        assert layout.num_pages(num_tokens) == first_page + len(pages), "a page for every token"
        for descriptor in [sender_ranks[rank].descriptor for rank in senders] or [sender_descriptor]:
            if descriptor:
                self._transport.invite(descriptor)

        def entry(name: SessionId, sending: KvLayout, whole: _Whole | None) -> _Entry:
            expected = Expected(layout, first_page, tuple(pages), num_tokens, sending)
            session = ReceiveSession(name, secrets.token_bytes(TOKEN_BYTES), expected, now)
            return _Entry(session, now, whole=whole)

        if senders:
            names = {rank: part_name(session_id, rank, self._rank) for rank in senders}
            whole = _Whole(session_id, list(names.values()))
            entries = {rank: entry(names[rank], sender_ranks[rank].layout, whole) for rank in senders}
        else:
            entries = {0: entry(session_id, sender or layout, None)}
        self._add(session_id, entries.values())
        here = self._transport.describe()
        grant = Grant(
            session_id, entries[min(entries)].session.token, first_page, tuple(pages), here, self._lease_s, layout
        )
        if not senders:
            return grant
        parts = (
            GrantPart(rank, of_part.session.session_id, of_part.session.token, here, layout)
            for rank, of_part in entries.items()
        )
        return replace(grant, parts=tuple(parts))

    def _add(self, session_id: SessionId, entries: Collection[_Entry]) -> None:
        with self._changed:
            if self._closed:
                raise ProtocolViolation("the receiver is closed")
            if session_id in self._wholes or any(e.session.session_id in self._entries for e in entries):
                raise ProtocolViolation(f"session {session_id} was issued already")
            for entry in entries:
                self._entries[entry.session.session_id] = self._by_token[entry.session.token] = entry
                if entry.whole is not None:
                    self._wholes[session_id] = entry.whole

    def abort(self, session_id: SessionId, reason: str) -> None:
        """Give the session up. ``on_released`` follows when no write can land any more: at once if no peer has begun,
        else when the peer acknowledged or its link is gone. Ignored when the session has ended."""
        with self._changed:
            whole = self._wholes.get(session_id)
            names = [session_id] if whole is None else whole.left
            entries = [entry for name in names if (entry := self._entries.get(name)) is not None]
            for entry in entries:
                self._abort(entry, TransferAborted(f"given up by the receiving end: {reason}"))
            released = self._pop_released(entries)
        self._report(released)

    def expire(self, now: float) -> None:
        """Call it every second or so: sessions whose peer was silent for the lease are given up, and its link lost."""
        with self._changed:
            entries = list(self._entries.values())
            for entry in entries:
                self._expire(entry, now)
            released = self._pop_released(entries)
        self._report(released)

    def close(self) -> None:
        """Abort every session, and close the links of those under way; returns when every session had its callback.

        Must not be called from a callback.
        """
        with self._changed:
            self._closed = True
            entries = list(self._entries.values())
        for entry in entries:
            self.abort(entry.session.session_id, "the worker stops")
        with self._changed:
            for entry in self._entries.values():
                if entry.link is not None:
                    entry.link.close(PeerLost("this end was closed"))
            self._changed.wait_for(lambda: not self._entries and not self._num_reporting)

    # ---- ReceiveEvents: called by the transport's threads ----

    def admit(self, link: Link, token: bytes, layers: range, spans: Sequence[Span]) -> SessionId | None:
        with self._changed:
            entry = self._by_token.get(token)
            if entry is not None and entry.link is None and entry.session.state is ReceiveState.ISSUED:
                self._begun(entry, link)  # a write may overtake its Begin; it, too, shows the token
            if entry is None or entry.link is not link or entry.session.state is not ReceiveState.RECEIVING:
                return None
            entry.heard_at = self._clock.now()
            try:
                entry.session.admit(layers, spans)
            except ProtocolViolation as error:
                self._abort(entry, error)
                return None
            return entry.session.session_id

    def landed(self, link: Link, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        with self._changed:
            self._bytes_received += len(layers) * num_bytes_of(spans)
            self._entries[session_id].session.landed()

    def damaged(self, link: Link, session_id: SessionId, layers: range, spans: Sequence[Span]) -> None:
        with self._changed:
            self._entries[session_id].session.damaged(layers, spans)

    def notified(self, link: Link, message: bytes) -> None:
        match decode(message):
            case Begin() as begin:
                self._begin(link, begin)
            case Renew() as renew:
                self._renew(link, renew)
            case Commit() as commit:
                self._commit(link, commit)
            case Abort() as abort:
                self._stopped(link, abort, abort.error)
            case AbortAck() as ack:
                unasked = f"session {ack.session_id}: an abort was acknowledged that was not asked for"
                self._stopped(link, ack, ProtocolViolation(unasked))
            case other:
                raise ProtocolViolation(f"a sending end does not send {type(other).__name__}")

    def lost(self, link: Link, error: TransferError) -> None:
        with self._changed:
            entries = [entry for entry in self._entries.values() if entry.link is link]
            for entry in entries:
                entry.session.stopped(error)
            released = self._pop_released(entries)
        if entries:
            logger.warning("kv link from %s lost with %d sessions: %s", link.peer, len(entries), error)
        self._report(released)

    # ---- with the lock held ----

    def _abort(self, entry: _Entry, error: TransferError) -> None:
        session = entry.session
        if session.state is ReceiveState.QUARANTINED:
            return
        session.abort(error)
        entry.heard_at = self._clock.now()
        if isinstance(error, ProtocolViolation | Corrupted):
            logger.warning("kv session %s aborted: %s", session.session_id, error)
        if entry.link is not None:
            abort = Abort.because_of(session.session_id, session.token, error)
            entry.link.notify(session.session_id, encode(abort))

    def _begun(self, entry: _Entry, link: Link) -> None:
        entry.session.begin()
        entry.link = link
        entry.heard_at = self._clock.now()

    def _expire(self, entry: _Entry, now: float) -> None:
        session, link = entry.session, entry.link
        silent_s = now - entry.heard_at
        if link is not None and now - link.heard_at > self._lease_s:
            # Its sessions are released by ``lost``, once the link's threads have stopped and nothing can land.
            link.close(PeerLost(f"{link.peer} was silent for {now - link.heard_at:.1f} s"))
        elif silent_s <= self._lease_s:
            return
        elif link is None:
            self._abort(entry, PeerLost(f"nobody began session {session.session_id} for {silent_s:.1f} s"))
        elif session.state is ReceiveState.QUARANTINED:
            link.close(PeerLost(f"{link.peer} did not acknowledge an abort for {silent_s:.1f} s"))
        else:
            said_nothing = f"{link.peer} said nothing of session {session.session_id} for {silent_s:.1f} s"
            self._abort(entry, PeerLost(said_nothing))

    def _entry_of(self, link: Link | None, message: Message) -> _Entry | None:
        """The living session that ``message`` names and proves, if it is on ``link`` (None: on no link yet)."""
        entry = self._entries.get(message.session_id)
        if entry is None or entry.link is not link or not hmac.compare_digest(entry.session.token, message.token):
            return None
        return entry

    def _pop_released(self, entries: Iterable[_Entry]) -> list[tuple[SessionId, TransferError]]:
        """Of a session of several parts: when the last has ended, if any was released."""
        released = []
        waiting = list(entries)
        while waiting:
            entry = waiting.pop(0)
            session, whole = entry.session, entry.whole
            if session.state is not ReceiveState.RELEASED or self._entries.get(session.session_id) is not entry:
                continue
            assert session.error is not None, "a release has a reason"
            self._forget(entry)
            if whole is None:
                released.append((session.session_id, session.error))
                continue
            whole.error = whole.error or session.error
            waiting += self._abort_rest(whole, session.error)
            if self._is_over(whole):
                released.append((whole.session_id, whole.error))
        self._num_reporting += len(released)
        return released

    def _abort_rest(self, whole: _Whole, error: TransferError) -> list[_Entry]:
        """One part has broken, so the others are of no use."""
        entries = [self._entries[name] for name in whole.left]
        for entry in entries:
            if entry.session.state is not ReceiveState.RELEASED:
                self._abort(entry, TransferAborted(f"another part of the hand-over broke: {error}"))
        return entries

    def _is_over(self, whole: _Whole) -> bool:
        """No part is left: forget it."""
        if whole.left:
            return False
        del self._wholes[whole.session_id]
        return True

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.session.session_id]
        del self._by_token[entry.session.token]
        if entry.whole is not None:
            entry.whole.left.remove(entry.session.session_id)

    # ---- the rest of an event ----

    def _begin(self, link: Link, begin: Begin) -> None:
        with self._changed:
            if self._entry_of(link, begin) is not None:
                return  # a write came before it
            entry = self._entry_of(None, begin)
            if entry is None:
                self._refuse(link, begin)
                return
            self._begun(entry, link)

    def _renew(self, link: Link, renew: Renew) -> None:
        with self._changed:
            entry = self._entry_of(link, renew) or self._entry_of(None, renew)  # it may overtake its Begin
            if entry is None:
                self._refuse(link, renew)
            elif entry.session.state is not ReceiveState.QUARANTINED:
                entry.heard_at = self._clock.now()

    def _commit(self, link: Link, commit: Commit) -> None:
        with self._changed:
            entry = self._entry_of(link, commit)
            if entry is None:
                self._refuse(link, commit)
                return
            if entry.session.state is ReceiveState.QUARANTINED:
                return  # our abort is under way to the sender
            entry.heard_at = self._clock.now()
            try:
                missing = entry.session.commit()
            except (ProtocolViolation, Corrupted) as error:
                self._abort(entry, error)
                return
            if missing:
                self._ask_again(link, commit, missing)
                return
            self._forget(entry)
            whole = entry.whole
            is_over = whole is None or self._is_over(whole)
            self._num_reporting += is_over
        if is_over:
            try:
                if whole is None or whole.error is None:
                    self._on_committed(commit.session_id if whole is None else whole.session_id, commit.payload)
                else:
                    self._on_released(whole.session_id, whole.error)
            finally:
                self._reported()
        link.notify(commit.session_id, encode(CommitAck(commit.session_id, commit.token)))

    def _stopped(self, link: Link, message: Abort | AbortAck, error: TransferError) -> None:
        with self._changed:
            # On no link yet: the sender gave up before its Begin was sent.
            entry = self._entry_of(link, message) or self._entry_of(None, message)
            if entry is None:
                return  # ended already, or was never granted to this peer
            entry.session.stopped(error)
            released = self._pop_released([entry])
        self._report(released)

    def _ask_again(self, link: Link, commit: Commit, missing: tuple[Missing, ...]) -> None:
        self._num_resends += 1
        num_bytes = sum(entry.num_bytes for entry in missing)
        logger.warning("kv session %s from %s: %d bytes are missing", commit.session_id, link.peer, num_bytes)
        link.notify(commit.session_id, encode(Resend(commit.session_id, commit.token, missing)))

    def _refuse(self, link: Link, message: Begin | Renew | Commit) -> None:
        reason = f"session {message.session_id} is not granted, or no longer"
        link.notify(
            message.session_id, encode(Abort(message.session_id, message.token, AbortCause.UNKNOWN_GRANT, reason))
        )

    def _report(self, released: Iterable[tuple[SessionId, TransferError]]) -> None:
        for session_id, error in released:
            try:
                self._on_released(session_id, error)
            finally:
                self._reported()

    def _reported(self) -> None:
        with self._changed:
            self._num_reporting -= 1
            self._changed.notify_all()
