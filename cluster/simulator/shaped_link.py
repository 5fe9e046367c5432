"""How fast do bytes arrive when several hand-overs share a link? As fluid: rates change only at events.

Every flow gets its fair share (max-min): one that needs less than an equal part, because its prompt is still being
computed, leaves the rest to the others. A flow's bytes become available at the rate of a *source* (layers of a chunk,
one after the other) or at once, and what is available and not sent is its *backlog*.

Invariants: the rates of all flows never add up to more than the link's; a flow sends nothing that is not available;
``on_sent`` comes exactly once, when a finished flow has no backlog, and never after ``cancel``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

_LESS_THAN_A_BYTE = 0.5


class Flow:
    """The bytes of one hand-over. Made by ``SharedLink.open``, which alone writes it."""

    __slots__ = ("_link", "backlog", "busy_s", "finished", "most_per_s", "on_sent", "rate", "sent", "source_rate")

    def __init__(self, link: SharedLink, on_sent: Callable[[], None], most_per_s: float) -> None:
        self._link = link
        self.on_sent = on_sent
        self.most_per_s = most_per_s
        self.backlog = 0.0
        self.source_rate = 0.0  # bytes/s that become available
        self.rate = 0.0  # bytes/s that are sent
        self.sent = 0.0
        self.busy_s = 0.0  # that a socket with these bytes would have been busy
        self.finished = False

    @property
    def available(self) -> float:
        """Bytes that became available so far."""
        return self.sent + self.backlog

    @property
    def open(self) -> bool:
        """Is it neither sent nor cancelled?"""
        return self._link.has(self)

    def settle(self) -> None:
        """Book what was sent up to now."""
        self._link.settle()

    def add(self, num_bytes: float) -> None:
        """So many bytes are available at once."""
        self._link.update(self, num_bytes, self.source_rate)

    def start_source(self, bytes_per_s: float) -> None:
        """From now on bytes become available at that rate."""
        self._link.update(self, 0.0, bytes_per_s)

    def stop_source(self, available: float) -> None:
        """The source ends; by now ``available`` bytes became available since the flow was opened."""
        self._link.settle()
        self._link.update(self, max(0.0, available - self.available), 0.0)

    def finish(self) -> None:
        """Nothing more will become available."""
        self.finished = True
        self._link.update(self, 0.0, 0.0)

    def cancel(self) -> None:
        """Forget it; nothing happens if it is over."""
        self._link.close(self)


class SharedLink:
    """A link of ``bytes_per_s`` that its open flows share."""

    def __init__(self, loop: asyncio.AbstractEventLoop, bytes_per_s: float) -> None:
        self._loop = loop
        self._bytes_per_s = bytes_per_s
        self._flows: dict[Flow, None] = {}  # in the order in which they were opened
        self._settled_at = loop.time()
        self._level = bytes_per_s  # what a flow may have at most: the height of the water
        self._timer: asyncio.TimerHandle | None = None
        self._bytes_sent = 0.0

    @property
    def bytes_per_s(self) -> float:
        """What it carries now."""
        return self._bytes_per_s

    @property
    def num_flows(self) -> int:
        """Hand-overs that are not over."""
        return len(self._flows)

    @property
    def bytes_sent(self) -> float:
        """Since its beginning, up to now."""
        self.settle()
        return self._bytes_sent

    def open(self, on_sent: Callable[[], None], most_per_s: float = math.inf) -> Flow:
        """A flow without bytes, which never gets more than ``most_per_s`` bytes/s."""
        flow = Flow(self, on_sent, most_per_s)
        self._flows[flow] = None
        return flow

    def has(self, flow: Flow) -> bool:
        """Is it one of those that are not over?"""
        return flow in self._flows

    def set_rate(self, bytes_per_s: float) -> None:
        """It carries so many bytes/s from now on; 0: it is cut."""
        self.settle()
        self._bytes_per_s = bytes_per_s
        self._share_out()

    def update(self, flow: Flow, num_bytes: float, source_rate: float) -> None:
        """``num_bytes`` more are available, and the source has that rate from now on."""
        if flow not in self._flows:
            return
        self.settle()
        flow.backlog += num_bytes
        flow.source_rate = source_rate
        self._share_out()

    def close(self, flow: Flow) -> None:
        """The flow is over."""
        if flow not in self._flows:
            return
        self.settle()
        del self._flows[flow]
        flow.rate = flow.source_rate = 0.0
        self._share_out()

    def settle(self) -> None:
        """Book what was sent up to now."""
        now = self._loop.time()
        passed_s = now - self._settled_at
        self._settled_at = now
        if passed_s <= 0:
            return
        for flow in self._flows:
            rate = flow.rate
            if rate <= 0 and flow.source_rate <= 0:
                if flow.backlog >= _LESS_THAN_A_BYTE:
                    flow.busy_s += passed_s
                continue
            flow.busy_s += passed_s if flow.backlog >= _LESS_THAN_A_BYTE else passed_s * rate / self._level
            moved = rate * passed_s
            flow.sent += moved
            flow.backlog = max(0.0, flow.backlog + flow.source_rate * passed_s - moved)
            self._bytes_sent += moved

    # ---- inside ----

    def _share_out(self) -> None:
        """Give every flow its rate, and wake up when one of them will need another."""
        for flow in [f for f in self._flows if f.finished and f.backlog < _LESS_THAN_A_BYTE]:
            del self._flows[flow]
            flow.rate = 0.0
            self._loop.call_soon(flow.on_sent)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._flows:
            return
        self._fill()
        wait_s = math.inf
        for flow in self._flows:
            drain = flow.rate - flow.source_rate
            if flow.backlog >= _LESS_THAN_A_BYTE and drain > 0:
                wait_s = min(wait_s, flow.backlog / drain)
        if wait_s < math.inf:
            self._timer = self._loop.call_later(wait_s, self._on_timer)

    def _fill(self) -> None:
        """Max-min fairness: who needs least is served first, an equal part of what is left bounds the others."""
        if len(self._flows) == 1:  # of the links within a cluster nearly always
            (flow,) = self._flows
            need = flow.most_per_s if flow.backlog >= _LESS_THAN_A_BYTE else min(flow.most_per_s, flow.source_rate)
            flow.rate = min(need, self._bytes_per_s)
            self._level = self._bytes_per_s if self._bytes_per_s > 0 else math.inf
            return
        wanted = [
            (f.most_per_s if f.backlog >= _LESS_THAN_A_BYTE else min(f.most_per_s, f.source_rate)) for f in self._flows
        ]
        left, num_left = self._bytes_per_s, len(wanted)
        level = left
        for need, flow in sorted(zip(wanted, self._flows, strict=True), key=lambda pair: pair[0]):
            level = left / num_left
            flow.rate = min(need, level)
            left -= flow.rate
            num_left -= 1
        self._level = level if level > 0 else math.inf

    def _on_timer(self) -> None:
        self._timer = None
        self.settle()
        self._share_out()
