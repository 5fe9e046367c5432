"""Who sends which pages, and when may they be reused? The sending end of every hand-over of one worker.

Threads: every method may be called from any thread. ``on_closed`` is called without any lock of this layer held,
either from a transport thread or from within ``abort``, ``granted``, ``expire`` or ``close`` (never from within
``open``, ``pages_stored`` or ``commit``); it should only hand the news on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.clock import Clock
from core.request import SessionId
from kv_transfer.session import Grant, SendReport
from kv_transfer.transport import Transport

OnClosed = Callable[[SessionId, SendReport], None]


class KvSender:
    """Sends the pages of many sessions. Sole writer of their ``SendSession``s."""

    def __init__(self, transport: Transport, clock: Clock, on_closed: OnClosed) -> None:
        raise NotImplementedError

    def open(self, session_id: SessionId, num_pages: int) -> None:
        """Begin a session for a sequence of ``num_pages`` pages. Raises ProtocolViolation if it is open already.

        ``on_closed`` will be called exactly once for it; after that no byte of its source pages is read.
        """
        raise NotImplementedError

    def pages_stored(self, session_id: SessionId, layer: int, first_page: int, src_page_ids: Sequence[int]) -> None:
        """Pages ``first_page ..`` of ``layer`` are complete and are in the pool at ``src_page_ids``.

        Each page of each layer once, in any order. Never blocks; ignored when the session has closed.
        """
        raise NotImplementedError

    def granted(self, session_id: SessionId, grant: Grant) -> None:
        """The receiver gave pages: what was stored so far is sent, what follows goes at once. Ignored when closed.

        Raises ProtocolViolation if the session was granted before.
        """
        raise NotImplementedError

    def commit(self, session_id: SessionId, payload: bytes) -> None:
        """Every page was stored: after the last write send ``payload`` to the receiver's ``on_committed``.

        May come before ``granted``. Ignored when closed. Raises ProtocolViolation if committed before.
        """
        raise NotImplementedError

    def abort(self, session_id: SessionId, reason: str) -> None:
        """Give the session up in whatever state it is; ``on_closed`` comes with TransferAborted. Ignored when closed."""
        raise NotImplementedError

    def expire(self, now: float) -> None:
        """Call it every second or so: links whose peer was silent for the lease are lost, their sessions PeerLost."""
        raise NotImplementedError

    def close(self) -> None:
        """Abort every session and close every link; returns when every ``on_closed`` was called."""
        raise NotImplementedError

    @property
    def num_sessions(self) -> int:
        """Sessions whose ``on_closed`` was not called yet."""
        raise NotImplementedError

    @property
    def bytes_sent(self) -> int:
        """Payload bytes of all writes since the start."""
        raise NotImplementedError
