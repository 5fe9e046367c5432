"""What does a continuation wait for, and when does its reader run? Two workers' events in one queue; fair turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine

from cluster.worker_client import SequenceEvent
from core.errors import PrfaasError
from core.request import Role, TokenChunk

WAKES_A_TURN = 8  # continuations whose readers run before the event loop looks at its sockets again


class Wakes:
    """Lets readers run, a few in each turn of the event loop; the others keep their order.

    One engine step brings tokens for hundreds of continuations. If all their readers ran before the loop looks at its
    sockets again, a gateway that is too slow for one message per token would fall ever further behind. So it reads the
    next step meanwhile, and whoever still waits takes all its tokens at once: the busier, the fewer messages.
    """

    def __init__(self) -> None:
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._num_woken = 0  # in this turn
        self._turning = False

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Its reader may run: in this turn, if few do, else in a later one."""
        if not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)
        if self._num_woken < WAKES_A_TURN and not self._waiters:
            self._num_woken += 1
            waiter.set_result(None)
        else:
            self._waiters.append(waiter)

    def _turn(self) -> None:
        self._num_woken = 0
        while self._waiters and self._num_woken < WAKES_A_TURN:
            waiter = self._waiters.popleft()
            if not waiter.done():  # its reader was cancelled
                self._num_woken += 1
                waiter.set_result(None)
        self._turning = bool(self._num_woken)
        if self._turning:
            asyncio.get_running_loop().call_soon(self._turn)


class Inbox:
    """What one continuation waits for, in order of arrival; one reader."""

    def __init__(self, wakes: Wakes) -> None:
        self._wakes = wakes
        self._is_waking = False
        self._events: deque[tuple[Role, SequenceEvent]] = deque()
        self._error: PrfaasError | None = None
        self.stopped = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, stage: Role, event: SequenceEvent) -> None:
        """An event of the current attempt, from the worker of that stage."""
        self._events.append((stage, event))
        self._wake()

    def interrupt(self, error: PrfaasError) -> None:
        """The reader raises ``error``, before any event; the first one counts."""
        self._error = self._error or error
        self._wake()

    def stop(self) -> None:
        """The reader gets None, before any event."""
        self.stopped = True
        self._wake()

    def clear(self) -> None:
        """Forget the events of an attempt that is over."""
        self._events.clear()

    async def get(self) -> tuple[Role, SequenceEvent] | None:
        """The next event; None: the text side stopped the continuation."""
        while True:
            if self._error is not None:
                raise self._error
            if self.stopped:
                return None
            if self._events:
                return self._events.popleft()
            await self._wait()

    def next_chunk(self) -> tuple[Role, TokenChunk] | None:
        """The next event if it is there and a chunk; None if there is something else to look at first."""
        if not self._events or self._error is not None or self.stopped:
            return None
        stage, event = self._events[0]
        if not isinstance(event, TokenChunk):
            return None
        self._events.popleft()
        return stage, event

    async def guard(self, work: Coroutine[None, None, bool]) -> None:
        """Wait for ``work``, or until interrupted or stopped, whichever comes first."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._wake())
        try:
            while not task.done() and self._error is None and not self.stopped:
                await self._wait()
        finally:
            task.cancel()
        if self._error is not None:
            raise self._error

    async def _wait(self) -> None:
        assert self._waiter is None, "an inbox has one reader"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter, self._is_waking = None, False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and not self._is_waking:
            self._is_waking = True
            self._wakes.wake(self._waiter)
