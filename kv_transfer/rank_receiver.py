"""How does a worker of several ranks receive? Each rank has a KvReceiver of its own, and rank 0 says what it grants.

    rank 0's process    RankedReceiver   the hand-overs of the worker; its KvReceiver, and a line to each other rank
    every other one     RankReceiving    grants the same pages in its own pool, and tells how sessions ended

Invariants: a grant leaves when every rank has issued its part; ``on_committed`` comes when every rank has got all of
its heads, ``on_released`` when one has not and nothing can land on any of them any more: one of them, once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from core.errors import ProtocolViolation, RankLost, TransferAborted, TransferError
from core.kv_layout import KvEnd, KvLayout
from core.rank_channel import RankChannel, RankLines
from core.request import SessionId
from kv_transfer.receiver import KvReceiver, OnCommitted, OnReleased
from kv_transfer.session import Grant

ISSUE_WAIT_S = 10.0  # another rank looks at its line between any two things that it does


@dataclass(frozen=True, slots=True)
class IssueGrant:
    """As ``KvReceiver.issue``; the answer is the ``Grant``."""

    session_id: SessionId
    first_page: int
    pages: tuple[int, ...]
    num_tokens: int | None
    senders: tuple[KvEnd, ...]


@dataclass(frozen=True, slots=True)
class AbortReceiving:
    """As ``KvReceiver.abort``."""

    session_id: SessionId
    reason: str


@dataclass(frozen=True, slots=True)
class ReceivingCommitted:
    """A rank's ``on_committed``."""

    session_id: SessionId
    payload: bytes


@dataclass(frozen=True, slots=True)
class ReceivingReleased:
    """A rank's ``on_released``."""

    session_id: SessionId
    error: TransferError


@dataclass(slots=True)
class _Handover:
    """One session, on all ranks."""

    left: set[int]  # ranks on which it has not ended
    payload: bytes = b""
    error: TransferError | None = None  # of the rank that was first to fail
    refused: bool = False  # no grant left: nobody is told of the end


class RankedReceiver:
    """``KvReceiver`` of a worker of several ranks."""

    def __init__(self, lines: RankLines, on_committed: OnCommitted, on_released: OnReleased) -> None:
        self._lines = lines
        self._on_committed = on_committed
        self._on_released = on_released
        self._lock = threading.Lock()
        self._handovers: dict[SessionId, _Handover] = {}
        self._receiver: KvReceiver | None = None
        lines.hear(ReceivingCommitted, lambda rank, m: self.committed(rank, m.session_id, m.payload))
        lines.hear(ReceivingReleased, lambda rank, m: self.released(rank, m.session_id, m.error))

    def attach(self, receiver: KvReceiver) -> None:
        """Give rank 0's own, whose callbacks are ``committed`` and ``released`` with rank 0."""
        self._receiver = receiver

    @property
    def num_sessions(self) -> int:
        """Sessions that had no callback yet."""
        return len(self._handovers)

    @property
    def waits(self) -> bool:
        return True

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
        """As ``KvReceiver.issue``, on every rank; waits for the others, ``ISSUE_WAIT_S`` at most. Raises
        ``TransferAborted`` too, if one of them does not answer."""
        if not sender_ranks:
            assert sender is not None, "a sender of one rank says what its pool holds"
            sender_ranks = (KvEnd(sender, sender_descriptor),)
        handover = _Handover(set(range(self._lines.num_ranks)))
        with self._lock:
            if session_id in self._handovers:
                raise ProtocolViolation(f"session {session_id} was issued already")
            self._handovers[session_id] = handover
        try:
            grant = self._own.issue(session_id, first_page, pages, num_tokens, sender_ranks=sender_ranks)
        except TransferError:
            with self._lock:
                del self._handovers[session_id]
            raise
        asked = IssueGrant(session_id, first_page, tuple(pages), num_tokens, tuple(sender_ranks))
        try:
            others: list[Grant] = self._lines.ask_all(asked, ISSUE_WAIT_S)
        except (TransferError, RankLost) as error:
            with self._lock:
                handover.refused = True
            self.abort(session_id, f"it was not granted on every rank: {error}")
            raise TransferAborted(f"session {session_id} was not granted on every rank: {error}") from error
        return replace(grant, parts=grant.parts + tuple(part for other in others for part in other.parts))

    def abort(self, session_id: SessionId, reason: str) -> None:
        with self._lock:
            if session_id not in self._handovers:
                return
        with suppress(RankLost):  # the line has told whoever ends the worker
            self._lines.send_all(AbortReceiving(session_id, reason))
        self._own.abort(session_id, reason)

    def committed(self, rank: int, session_id: SessionId, payload: bytes) -> None:
        """Every byte of one rank has arrived."""
        self._ended(rank, session_id, payload, None)

    def released(self, rank: int, session_id: SessionId, error: TransferError) -> None:
        """The session broke on one rank, and nothing can land there any more."""
        self._ended(rank, session_id, b"", error)

    # ---- inside ----

    @property
    def _own(self) -> KvReceiver:
        assert self._receiver is not None, "attach() comes first"
        return self._receiver

    def _ended(self, rank: int, session_id: SessionId, payload: bytes, error: TransferError | None) -> None:
        with self._lock:
            handover = self._handovers.get(session_id)
            if handover is None:
                return
            handover.left.discard(rank)
            handover.payload = payload or handover.payload
            is_first = error is not None and handover.error is None
            handover.error = handover.error or error
            is_over = not handover.left
            if is_over:
                del self._handovers[session_id]
        if not is_over:
            if is_first:
                self.abort(session_id, f"it broke on rank {rank}: {error}")
        elif handover.refused:
            return
        elif handover.error is None:
            self._on_committed(session_id, handover.payload)
        else:
            self._on_released(session_id, handover.error)


class RankReceiving:
    """The receiving half of a rank other than 0. ``receiver``'s callbacks are ``committed`` and ``released``."""

    def __init__(self, channel: RankChannel) -> None:
        self._channel = channel

    def attach(self, receiver: KvReceiver) -> None:
        """Give the rank's own, and hear rank 0."""
        self._channel.hear(
            IssueGrant,
            lambda m: receiver.issue(m.session_id, m.first_page, m.pages, m.num_tokens, sender_ranks=m.senders),
        )
        self._channel.hear(AbortReceiving, lambda m: receiver.abort(m.session_id, m.reason))

    def committed(self, session_id: SessionId, payload: bytes) -> None:
        """``KvReceiver``'s ``on_committed``."""
        self._tell(ReceivingCommitted(session_id, payload))

    def released(self, session_id: SessionId, error: TransferError) -> None:
        """``KvReceiver``'s ``on_released``."""
        self._tell(ReceivingReleased(session_id, error))

    def _tell(self, message: object) -> None:
        with suppress(RankLost):  # rank 0 is gone, and this process ends with it
            self._channel.send(message)
