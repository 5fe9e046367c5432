"""Whose step runs now, when several workers compute on the same cores? One after the other, as with engine/turns.py.

Who wants a turn stands in line; who has had one comes after those who wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class SharedDevice:
    """Computes one step at a time."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[Callable[[], None]] = deque()

    def try_take(self, go: Callable[[], None]) -> bool:
        """True: it is the caller's turn, until ``give_back``. False: ``go`` is called when it is."""
        if not self._taken:
            self._taken = True
            return True
        self._waiting.append(go)
        return False

    def give_back(self) -> None:
        """The turn is over; whoever waits longest has the next one."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._taken = False
