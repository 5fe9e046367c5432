"""What does a link send next? The queue between those who hold pages and the threads that send them.

Invariants:

- What was put for one session is taken in that order. Messages are taken by the control connection's taker alone.
- Every message carries the number of a barrier, and every other taker gets a ``Barrier`` of at least that number behind
  all writes that it took before the message was taken. So whoever waits for the barriers at the other end sees no
  message overtake an earlier write, on however many connections they travelled.
- Tenants share the link by weight, in bytes (start-time fair queueing: Goyal, Vin and Cheng, 1996). A tenant that had
  nothing to send saves no credit. Within a tenant the earliest deadline goes first; equal ones take turns, one write
  each: a long prompt delays a short one by one write, not by its whole length. A message waits for none of this.
- After ``cancel`` returned True, or ``done`` returned True for the session, no write of it that was put before the
  cancel is being read or will be taken.

Thread-safe; as many takers as the link has connections.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from threading import Condition

from core.clock import Clock
from core.request import SessionId
from kv_transfer.transport import Write

Item = Write | bytes  # pages, or an encoded message
_MANY_TENANTS = 64


@dataclass(frozen=True, slots=True)
class Notice:
    """A message, to be delivered once every other connection has shown barrier ``barrier`` (0: at once)."""

    barrier: int
    message: bytes


@dataclass(frozen=True, slots=True)
class Barrier:
    """Every write that this taker was given before the messages up to ``number`` were taken has gone ahead of this."""

    number: int


@dataclass(eq=False, slots=True)
class Taker:
    """One connection's place at the outbox. ``control``: it takes the messages, and shows no barriers."""

    control: bool
    shown: int = 0  # the highest barrier that it was given
    left: bool = False


@dataclass(eq=False, slots=True)
class _Lane:
    """What is queued for one session, each with its bytes. In ``_ready`` once, under its newest ``turn`` only."""

    items: deque[tuple[Item, int]] = field(default_factory=deque)
    turn: int = 0


@dataclass(eq=False, slots=True)
class _Tenant:
    """The sessions of one tenant whose next item is a write, the most urgent first."""

    start: float = 0.0  # virtual time at which its next write starts: bytes over weight
    lanes: list[tuple[float, int, _Lane]] = field(default_factory=list)  # heap: deadline, turn, lane


class Outbox:
    """Queued items of one end of a link."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changed = Condition()
        self._lanes: dict[SessionId, _Lane] = {}  # only sessions with something queued
        self._messages: deque[tuple[int, SessionId, _Lane]] = deque()  # lanes whose next item is a message
        self._tenants: dict[str, _Tenant] = {}
        self._ready: list[tuple[float, int, str]] = []  # heap: start, turn, tenant; each that may have a write once
        self._virtual_time = 0.0
        self._turn = 0
        self._barrier = 0
        self._wrote = False  # a write was taken since the barrier was raised
        self._reading: dict[SessionId, int] = {}  # how many writes of it are under way
        self._draining: set[SessionId] = set()  # cancelled with writes under way
        self._bytes_queued = 0
        self._num_queued = 0  # writes
        self._busy_since: float | None = None
        self._busy_s = 0.0
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def bytes_queued(self) -> int:
        """Bytes of the writes that nobody took yet."""
        return self._bytes_queued

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one write was queued or under way."""
        with self._changed:
            since = self._busy_since
            return self._busy_s + (0.0 if since is None else self._clock.now() - since)

    def put(self, session_id: SessionId, item: Item) -> None:
        """Queue behind everything of the session; dropped when closed."""
        num_bytes = item.num_bytes if isinstance(item, Write) else 0
        with self._changed:
            if self._closed:
                return
            lane = self._lanes.get(session_id)
            if lane is None:
                lane = self._lanes[session_id] = _Lane()
            lane.items.append((item, num_bytes))
            if isinstance(item, Write):
                self._count(1, num_bytes)
            if len(lane.items) == 1:
                self._line_up(session_id, lane)

    def take(self, taker: Taker, timeout_s: float) -> Write | Notice | Barrier | None:
        """What ``taker``'s connection sends next; None if nothing came in time, it left, or the outbox is closed."""
        if timeout_s <= 0.0 and taker.control and not self._lanes and not self._tenants:
            return None  # nothing is queued, it shows no barriers, and no share is to be forgotten: no lock for that
        with self._changed:
            if timeout_s <= 0.0:
                return None if self._closed or taker.left else self._next(taker)
            # Whoever woke this taker may have been served by another one meanwhile: it waits on, not for nothing.
            item = self._changed.wait_for(lambda: self._closed or taker.left or self._next(taker), timeout_s)
            return None if isinstance(item, bool) else item

    def done(self, write: Write) -> bool:
        """A write that was taken has been read. True: it was the last one under way of a session that was cancelled."""
        session_id = write.session_id
        with self._changed:
            left = self._reading.pop(session_id) - 1
            if left:
                self._reading[session_id] = left
            self._rest()
            drained = left == 0 and session_id in self._draining
            if drained:
                self._draining.discard(session_id)
            return drained

    def cancel(self, session_id: SessionId) -> bool:
        """Forget what is queued for the session. False: writes of it are under way; ``done`` will tell of the last."""
        with self._changed:
            lane = self._lanes.pop(session_id, None)
            if lane is not None:
                self._empty(lane)
            idle = session_id not in self._reading
            if not idle:
                self._draining.add(session_id)
            return idle

    def leave(self, taker: Taker) -> None:
        """The taker's connection is gone: it gets nothing more, and is woken."""
        with self._changed:
            taker.left = True
            self._changed.notify_all()

    def close(self) -> None:
        """Forget everything and wake the takers."""
        with self._changed:
            self._closed = True
            for lane in self._lanes.values():
                self._empty(lane)
            self._lanes.clear()
            self._messages.clear()
            self._tenants.clear()
            self._ready.clear()
            self._changed.notify_all()

    # ---- with the lock held ----

    def _line_up(self, session_id: SessionId, lane: _Lane) -> None:
        """The lane has a next item: put the lane where those look who may take it."""
        item, _ = lane.items[0]
        self._turn += 1
        lane.turn = self._turn
        if isinstance(item, bytes):
            self._messages.append((lane.turn, session_id, lane))
            self._changed.notify_all()  # one of them is the control connection
            return
        name = item.order.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            self._forget_tenants()
            tenant = self._tenants[name] = _Tenant()
        deadline = math.inf if item.order.deadline_at is None else item.order.deadline_at
        if not tenant.lanes:
            tenant.start = max(tenant.start, self._virtual_time)
            heappush(self._ready, (tenant.start, lane.turn, name))
        heappush(tenant.lanes, (deadline, lane.turn, lane))
        self._changed.notify()

    def _next(self, taker: Taker) -> Write | Notice | Barrier | None:
        if not taker.control and taker.shown < self._barrier:
            taker.shown = self._barrier
            return Barrier(self._barrier)
        return (self._next_message() if taker.control else None) or self._next_write()

    def _next_message(self) -> Notice | None:
        while self._messages:
            turn, session_id, lane = self._messages.popleft()
            if lane.turn != turn or not lane.items:
                continue  # cancelled
            message = self._pop(session_id, lane)
            assert isinstance(message, bytes), "the lane lined up with a message"
            if self._wrote:
                self._wrote = False
                self._barrier += 1
                self._changed.notify_all()  # the idle connections show it at once
            return Notice(self._barrier, message)
        return None

    def _next_write(self) -> Write | None:
        while self._ready:
            _, _, name = heappop(self._ready)
            tenant = self._tenants[name]
            lane = self._most_urgent(tenant)
            if lane is None:
                continue  # all of it was cancelled
            write, num_bytes = lane.items[0]
            assert isinstance(write, Write), "the lane lined up with a write"
            self._virtual_time = tenant.start
            tenant.start += num_bytes / write.order.weight
            self._wrote = True
            self._reading[write.session_id] = self._reading.get(write.session_id, 0) + 1
            if tenant.lanes:
                heappush(self._ready, (tenant.start, tenant.lanes[0][1], name))
            self._pop(write.session_id, lane)
            return write
        self._tenants.clear()  # nobody waits: what each tenant had so far says nothing about who comes next
        return None

    def _forget_tenants(self) -> None:
        """Those that wait for nothing and have no more than their share, once they are many."""
        if len(self._tenants) > _MANY_TENANTS + 2 * len(self._ready):
            tenants = self._tenants.items()
            self._tenants = {name: one for name, one in tenants if one.lanes or one.start > self._virtual_time}

    def _most_urgent(self, tenant: _Tenant) -> _Lane | None:
        while tenant.lanes:
            _, turn, lane = heappop(tenant.lanes)
            if lane.turn == turn and lane.items:
                return lane
        return None

    def _pop(self, session_id: SessionId, lane: _Lane) -> Item:
        item, num_bytes = lane.items.popleft()
        if isinstance(item, Write):
            self._count(-1, -num_bytes)
        if lane.items:
            self._line_up(session_id, lane)
        else:
            del self._lanes[session_id]
        return item

    def _empty(self, lane: _Lane) -> None:
        for item, num_bytes in lane.items:
            if isinstance(item, Write):
                self._count(-1, -num_bytes)
        lane.items.clear()
        self._rest()

    def _count(self, num_writes: int, num_bytes: int) -> None:
        if self._busy_since is None:
            self._busy_since = self._clock.now()
        self._num_queued += num_writes
        self._bytes_queued += num_bytes

    def _rest(self) -> None:
        """Stop the clock of ``busy_s`` if no write is queued or under way."""
        if self._busy_since is not None and not self._num_queued and not self._reading:
            self._busy_s += self._clock.now() - self._busy_since
            self._busy_since = None
