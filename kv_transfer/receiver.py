"""Which pages may a peer write into, and when are they ours again? The receiving end of every hand-over of a worker.

Threads: every method may be called from any thread. ``on_committed`` and ``on_released`` are called without any lock
of this layer held, from a transport thread or (``on_released``) from within ``abort``, ``expire`` or ``close``.
``on_committed`` is what the commit's acknowledgement waits for: when it returns the sender may reuse its pages.
Both should only hand the news on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.clock import Clock
from core.errors import TransferError
from core.request import SessionId
from kv_transfer.session import Grant
from kv_transfer.transport import Transport

OnCommitted = Callable[[SessionId, bytes], None]
OnReleased = Callable[[SessionId, TransferError], None]


class KvReceiver:
    """Grants pages to peers and takes what they write. Sole writer of its ``ReceiveSession``s."""

    def __init__(
        self, transport: Transport, clock: Clock, on_committed: OnCommitted, on_released: OnReleased, lease_s: float
    ) -> None:
        raise NotImplementedError

    def issue(self, session_id: SessionId, first_page: int, pages: Sequence[int]) -> Grant:
        """Let a peer write every layer of ``pages`` once, for the sequence's pages ``first_page ..``.

        Exactly one of ``on_committed`` and ``on_released`` follows. Raises ProtocolViolation if the session lives.
        """
        raise NotImplementedError

    def abort(self, session_id: SessionId, reason: str) -> None:
        """Give the session up. ``on_released`` follows when no write can land any more: at once if no peer has begun,
        else when the peer acknowledged or its link is gone. Ignored when the session has ended."""
        raise NotImplementedError

    def expire(self, now: float) -> None:
        """Call it every second or so: sessions whose peer was silent for the lease are aborted, and its link lost."""
        raise NotImplementedError

    def close(self) -> None:
        """Abort every session and close every link; returns when every session had its callback."""
        raise NotImplementedError

    @property
    def num_sessions(self) -> int:
        """Sessions that had no callback yet."""
        raise NotImplementedError

    @property
    def num_quarantined(self) -> int:
        """Pages of aborted sessions into which a write may still land."""
        raise NotImplementedError

    @property
    def bytes_received(self) -> int:
        """Payload bytes that landed since the start."""
        raise NotImplementedError
