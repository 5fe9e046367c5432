"""Time, as everything that decides sees it. Only this module imports ``time``.

``Clock.now()`` is monotonic seconds with an arbitrary origin: differences mean something, values do not, and values
of two processes must never be compared. Durations cross process borders, instants do not.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic seconds."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...


class WallClock:
    """The process's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when told to; for tests and for simulation."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds`` (>= 0)."""
        assert seconds >= 0, "time does not go back"
        self._now += seconds


def unix_time() -> float:
    """Seconds since 1970, for timestamps that people read (OpenAI's ``created``); never for decisions."""
    return time.time()
