"""How do the processes of one worker talk? Over a line of messages between rank 0 and each of the others.

Both ends are processes that one worker started for itself, on one host, and prove it by a secret when they connect
(``multiprocessing.connection``): so messages are pickled objects. What is sent from one end arrives in that order, on a
thread of the other end's. Invariant: ``on_lost`` is called once, when the other process is gone or a message could not
be handled, and never after ``close``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from core.errors import RankLost

logger = logging.getLogger(__name__)


class RankChannel:
    """One end. ``peer``: what the other end is called in messages to people."""

    def __init__(
        self,
        connection: Connection,
        peer: str,
        on_message: Callable[[object], None],
        on_lost: Callable[[RankLost], None],
    ) -> None:
        """``on_message`` is called on the channel's thread; while it runs later messages wait."""
        self._connection = connection
        self._peer = peer
        self._on_message = on_message
        self._on_lost = on_lost
        self._sending = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name=f"channel-{peer}", daemon=True)

    def start(self) -> None:
        """Begin to hear the other end."""
        self._thread.start()

    def send(self, message: object) -> None:
        """Any thread may. Raises ``RankLost`` if the other end is gone."""
        with self._sending:
            try:
                self._connection.send(message)
            except (OSError, ValueError) as error:
                raise RankLost(f"{self._peer} is gone: {error}") from error

    def close(self) -> None:
        """Hear nothing any more. May be called twice."""
        self._closed = True
        with self._sending:
            self._connection.close()

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError) as error:
                self._lose(RankLost(f"{self._peer} is gone: {error or 'its process has ended'}"))
                return
            try:
                self._on_message(message)
            except Exception as error:  # a bug, or the process is ending: this end does not know what the other did
                if not self._closed:
                    logger.exception("a message of %s failed", self._peer)
                self._lose(RankLost(f"a message of {self._peer} failed: {type(error).__name__}: {error}"))
                return

    def _lose(self, error: RankLost) -> None:
        if not self._closed:
            self._on_lost(error)
