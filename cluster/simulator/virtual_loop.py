"""Where does time come from in a simulation? From the event loop: where a real one would wait, this one jumps.

Production code runs on it unchanged: ``asyncio.sleep``, ``timeout`` and ``call_later`` all ask the loop for time. What
is ready runs in the order in which it became ready, timers in the order of their instants, so equal programs make equal
runs.

Invariants: no call of this loop waits; time never goes back; nobody is behind its back (threads, signals, sockets), so
a loop with nothing ready and no timer would wait for ever: that is a ``Deadlock``.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, NoReturn, TypeVar, TypeVarTuple

T = TypeVar("T")
_Ts = TypeVarTuple("_Ts")

# Timers so close together are due together, on every machine. More than what a float tells apart up to 2**28 s, eight
# years: a timer whose instant rounds up to just behind the loop's would never be due.
_TIMER_RESOLUTION_S = 2.0**-24


class Deadlock(RuntimeError):
    """Everything waits for something else, and no timer is set."""


class _JumpingSelector(selectors.BaseSelector):
    """Has no file ever ready; being asked to wait for them moves the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = selectors.SelectorKey(fileobj, fileobj if isinstance(fileobj, int) else fileobj.fileno(), events, data)
        self._keys[fileobj] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock(f"at {self.now:.6f} s everything waits and no timer is set")
        if timeout > 0:
            self.now += timeout
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time begins at 0 and passes only where it would wait. It is its own ``Clock``."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = _TIMER_RESOLUTION_S

    def time(self) -> float:
        """Virtual seconds since the beginning."""
        return self._jumping.now

    now = time

    def run_in_executor(self, executor: Executor | None, func: Callable[[*_Ts], T], *args: *_Ts) -> NoReturn:
        """There is no other thread, and none would be deterministic."""
        raise RuntimeError("a simulation has one thread")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` in virtual time. Raises what it raises, or ``Deadlock``."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def running_loop() -> VirtualTimeLoop:
    """The loop of the simulation that calls."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop), "simulated things live on a VirtualTimeLoop"
    return loop
