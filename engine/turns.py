"""Whose step runs now, when several workers compute on the same cores? One after the other, in turn.

Two CPU workers that compute at once on the same cores are slower than one after the other: each splits an operation
over all cores and waits at its end for the thread that the other one keeps from running (docs/adr/0005-turns.md has
the numbers). So workers that share cores share a ``FileTurns``, and each step holds it.

Two locks make it fair: who wants a turn first takes the queue, keeps it while it waits for the turn, and leaves it
when it has the turn. Whoever has just had its turn finds the other one in the queue, and comes after it. Nothing
blocks: the engine's thread asks again and again, and serves its callers in between.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from typing import Protocol

from core.clock import Clock

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0


class Turns(Protocol):
    """One worker's part in the turns. Called by its engine's thread alone."""

    def try_take(self) -> bool:
        """True: it is this worker's turn, until ``give_back``. False: it stands in line; ask again soon."""
        ...

    def give_back(self) -> None:
        """The turn is over, or the worker wants none any more."""
        ...


class NoTurns:
    """The worker has its device to itself."""

    def try_take(self) -> bool:
        return True

    def give_back(self) -> None:
        pass


class FileTurns:
    """Turns among the processes that lock ``path`` and ``path``.queue.

    One that dies loses its turn and its place. One that hangs is waited for ``patience_s``, once; then this worker
    computes without a turn until it gets one again, because computing at once is slow but not computing is worse.
    """

    def __init__(self, path: Path, clock: Clock, patience_s: float = PATIENCE_S) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._turn = _Lock(path)
        self._queue = _Lock(path.with_name(path.name + ".queue"))
        self._clock = clock
        self._patience_s = patience_s
        self._waits_since: float | None = None  # on the clock
        self._lost_patience = False

    def try_take(self) -> bool:
        if self._queue.try_lock() and self._turn.try_lock():
            self._queue.unlock()
            self._waits_since, self._lost_patience = None, False
            return True
        now = self._clock.now()
        if self._waits_since is None:
            self._waits_since = now
        if not self._lost_patience and now - self._waits_since > self._patience_s:
            self._lost_patience = True
            logger.warning("no turn within %g s: computing at once with who holds it", self._patience_s)
        return self._lost_patience

    def give_back(self) -> None:
        self._queue.unlock()
        self._turn.unlock()
        self._waits_since = None

    def close(self) -> None:
        """Give up turn and place."""
        self._queue.close()
        self._turn.close()


class _Lock:
    """An advisory lock on a file, held by at most one open of it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._held = False

    def try_lock(self) -> bool:
        if not self._held:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._held = True
        return True

    def unlock(self) -> None:
        if self._held:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._held = False

    def close(self) -> None:
        os.close(self._file)  # which unlocks it
        self._held = False


def make_turns(path: str | None, clock: Clock) -> Turns:
    """``FileTurns`` on ``path``, where ``~`` is the user's home; ``NoTurns`` if there is none."""
    return NoTurns() if path is None else FileTurns(Path(path).expanduser(), clock)
