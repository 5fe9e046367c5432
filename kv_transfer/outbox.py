"""What does a link send next? The queue between those who hold pages and the thread that sends them.

Invariants:

- What was put for one session is taken in that order, so a message never overtakes an earlier write of its session.
- Sessions take turns, one item each: a long prompt delays a short one by one write, not by its whole length.
- After ``cancel`` returned True, or after ``done`` of the write that it found under way, no write that was put before
  is being read or will be taken.

Thread-safe; one taker. Deadlines and weights between sessions would be decided in ``_next``, nowhere else.
"""

from __future__ import annotations

from collections import deque
from threading import Condition

from core.request import SessionId
from kv_transfer.transport import Write

Item = Write | bytes  # pages, or an encoded message


class Outbox:
    """Queued items of one end of a link."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._lanes: dict[SessionId, deque[Item]] = {}  # only sessions with something queued
        self._turns: deque[SessionId] = deque()  # the keys of _lanes, next first
        self._reading: SessionId | None = None  # whose write is under way
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, session_id: SessionId, item: Item) -> None:
        """Queue behind everything of the session; dropped when closed."""
        with self._changed:
            if self._closed:
                return
            lane = self._lanes.get(session_id)
            if lane is None:
                lane = self._lanes[session_id] = deque()
                self._turns.append(session_id)
            lane.append(item)
            self._changed.notify()

    def take(self, timeout_s: float) -> Item | None:
        """The next item, waiting up to ``timeout_s`` for one; None if none came or the outbox is closed."""
        with self._changed:
            if not self._turns and not self._closed:
                self._changed.wait(timeout_s)
            if not self._turns or self._closed:
                return None
            return self._next()

    def done(self) -> None:
        """The write that was taken last has been read."""
        with self._changed:
            self._reading = None

    def cancel(self, session_id: SessionId) -> bool:
        """Forget what is queued for the session. False: a write of it is under way."""
        with self._changed:
            if self._lanes.pop(session_id, None) is not None:
                self._turns.remove(session_id)
            return self._reading != session_id

    def close(self) -> None:
        """Forget everything and wake the taker."""
        with self._changed:
            self._closed = True
            self._lanes.clear()
            self._turns.clear()
            self._changed.notify()

    def _next(self) -> Item:
        session_id = self._turns.popleft()
        lane = self._lanes[session_id]
        item = lane.popleft()
        if lane:
            self._turns.append(session_id)
        else:
            del self._lanes[session_id]
        if isinstance(item, Write):
            self._reading = session_id
        return item
