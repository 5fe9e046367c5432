"""How long is a message on its way from one cluster to another? The latency of the path, and for ever while it is cut.

Messages of a path arrive in the order in which they were sent. While it is cut they wait, as in TCP's buffers, and go
on when it is mended; who has waited too long by then has given up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVarTuple

from core.errors import PeerLost

_Ts = TypeVarTuple("_Ts")


class ControlPath:
    """One direction between two clusters, or within one."""

    def __init__(self, loop: asyncio.AbstractEventLoop, latency_s: float) -> None:
        self._loop = loop
        self.latency_s = latency_s
        self._up = True
        self._on_way: deque[tuple[float, Callable[[], None]]] = deque()  # (due at, what it does there)
        self._timer: asyncio.TimerHandle | None = None
        self._crossing: dict[asyncio.Future[None], float] = {}  # who waits |-> until when

    @property
    def up(self) -> bool:
        """Does it carry anything now?"""
        return self._up

    def send(self, deliver: Callable[[*_Ts], None], *args: *_Ts) -> None:
        """``deliver(*args)`` is called when the message has arrived; at once on a path without latency."""
        if self._up and self.latency_s <= 0 and not self._on_way:
            deliver(*args)
            return
        self._on_way.append((self._loop.time() + self.latency_s, partial(deliver, *args)))
        if self._up and self._timer is None:
            self._arm()

    async def cross(self, timeout_s: float) -> None:
        """Returns when a message that is sent now has arrived; ``PeerLost`` if that takes longer than ``timeout_s``."""
        if self._up and self.latency_s <= 0 and not self._on_way:
            return
        arrived: asyncio.Future[None] = self._loop.create_future()
        self._crossing[arrived] = self._loop.time() + timeout_s
        self.send(lambda: None if arrived.done() else arrived.set_result(None))
        if not self._up:
            self._give_up_later(arrived)
        try:
            await arrived
        finally:
            del self._crossing[arrived]

    def cut(self) -> None:
        """Nothing arrives any more."""
        self._up = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for waiting in self._crossing:  # only now: a timer for each message would cost more than the message
            self._give_up_later(waiting)

    def mend(self) -> None:
        """What waits arrives after the latency, and everything later as before."""
        self._up = True
        again = self._loop.time() + self.latency_s
        self._on_way = deque((max(due, again), deliver) for due, deliver in self._on_way)
        if self._on_way and self._timer is None:
            self._arm()

    def _give_up_later(self, waiting: asyncio.Future[None]) -> None:
        def give_up() -> None:
            if not waiting.done():
                waiting.set_exception(PeerLost("the path is cut: no answer in time"))

        self._loop.call_at(self._crossing[waiting], give_up)

    def _arm(self) -> None:
        self._timer = self._loop.call_at(self._on_way[0][0], self._arrive)

    def _arrive(self) -> None:
        self._timer = None
        now = self._loop.time() + 1e-12
        while self._on_way and self._on_way[0][0] <= now:
            self._on_way.popleft()[1]()
        if self._on_way and self._timer is None and self._up:
            self._arm()
