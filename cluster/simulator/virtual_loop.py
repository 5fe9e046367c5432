"""Where does time come from in a simulation? From the event loop: where a real one would wait, this one jumps.

Production code runs on it unchanged: ``asyncio.sleep``, ``timeout`` and ``call_later`` all ask the loop for time. What
is ready runs in the order in which it became ready, timers in the order of their instants and then in the order in
which they were set, so equal programs make equal runs.

Invariants: no call of this loop waits; time never goes back; nobody is behind its back (threads, signals, sockets), so
a loop with nothing ready and no timer would wait for ever: that is a ``Deadlock``. What a callback raises ends the run.

It keeps its own queues because events are what a simulation consists of, thirty for each request: asyncio's look at
sockets between any two of them, and compare timers in Python.
"""

from __future__ import annotations

import asyncio
import heapq
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context, copy_context
from typing import Any, NoReturn, TypeVar, TypeVarTuple

T = TypeVar("T")
_Ts = TypeVarTuple("_Ts")

# Timers so close together are due together, on every machine: sums of the same seconds in another order differ by less.
_TIMER_RESOLUTION_S = 2.0**-24
_MOST_CANCELLED = 1000  # timers that wait to be forgotten; more, and most of all, are taken out at once


class Deadlock(RuntimeError):
    """Everything waits for something else, and no timer is set."""


class _Call(asyncio.TimerHandle):
    """A callback that is ready, or will be at its instant."""

    __slots__ = ()
    # What asyncio's own loops need of a handle:
    _loop = None
    _repr = None
    _source_traceback = None

    def __init__(self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: Context) -> None:
        self._when = when
        self._callback = callback
        self._args = args
        self._context = context
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self._args = ()
        self._callback = _nothing


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """An event loop whose time begins at 0 and passes only where it would wait. It is its own ``Clock``."""

    _stopping: bool  # of the base class: run what is ready once more, then return

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._calls: deque[_Call] = deque()  # ready
        self._timers: list[tuple[float, int, _Call]] = []  # a heap: by instant, then by the order of setting
        self._num_set = 0
        self._cleared_at = _MOST_CANCELLED  # timers, at which cancelled ones are taken out

    def time(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now

    now = time

    @property
    def num_timers(self) -> int:
        """Timers that are set, and some of those that were cancelled."""
        return len(self._timers)

    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        call = _Call(self._now, callback, args, copy_context() if context is None else context)
        self._calls.append(call)
        return call

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        call = _Call(when, callback, args, copy_context() if context is None else context)
        self._num_set += 1
        heapq.heappush(self._timers, (when, self._num_set, call))
        if len(self._timers) > self._cleared_at:
            self._clear()
        return call

    def run_in_executor(self, executor: Executor | None, func: Callable[[*_Ts], T], *args: *_Ts) -> NoReturn:
        """There is no other thread, and none would be deterministic."""
        raise RuntimeError("a simulation has one thread")

    # ---- inside ----

    def _run_once(self) -> None:
        """Run what is ready; what it makes ready comes next time. The base class calls this until it is stopped."""
        calls, timers = self._calls, self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not calls and not self._stopping:
            if not timers:
                raise Deadlock(f"at {self._now:.6f} s everything waits and no timer is set")
            self._now = max(self._now, timers[0][0])
        end = self._now + _TIMER_RESOLUTION_S
        while timers and timers[0][0] < end:
            calls.append(heapq.heappop(timers)[2])
        for _ in range(len(calls)):
            call = calls.popleft()
            if not call._cancelled:
                call._context.run(call._callback, *call._args)

    def _clear(self) -> None:
        """Take cancelled timers out, so that timeouts which never come do not fill the memory."""
        self._timers[:] = [timer for timer in self._timers if not timer[2].cancelled()]
        heapq.heapify(self._timers)
        self._cleared_at = max(_MOST_CANCELLED, 2 * len(self._timers))


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` in virtual time. Raises what it raises, or ``Deadlock``."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(_with_unlisted_generators(main))


async def _with_unlisted_generators(main: Coroutine[Any, Any, T]) -> T:
    """asyncio lists every asynchronous generator that begins, to close those that are left at the end: of a simulation
    none is, and there are three for each request. One that is dropped half-way is still closed."""
    sys.set_asyncgen_hooks(firstiter=None)
    return await main


def running_loop() -> VirtualTimeLoop:
    """The loop of the simulation that calls."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop), "simulated things live on a VirtualTimeLoop"
    return loop


def _nothing() -> None:
    pass
