"""What may happen to one hand-over, in which order? Sans-I/O; signatures first, the machines follow."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import TransferError
from core.request import SessionId


@dataclass(frozen=True, slots=True)
class Grant:
    """The receiver's permission to write, issued by ``KvReceiver.issue`` and handed to ``KvSender.granted``.

    ``pages[i]`` is the receiver's page id for the sequence's page ``first_page + i``; earlier pages are cached there.
    """

    session_id: SessionId
    token: bytes  # random secret of this session; every write names it
    first_page: int
    pages: tuple[int, ...]
    descriptor: bytes  # of the receiver's transport
    lease_s: float


@dataclass(frozen=True, slots=True)
class SendReport:
    """How a hand-over ended at the sending end. ``error`` None: the receiver acknowledged the commit."""

    error: TransferError | None
    bytes_sent: int = 0
    num_writes: int = 0
    transfer_s: float = 0.0  # first write queued to acknowledged commit
    exposed_s: float = 0.0  # commit call to acknowledged commit
