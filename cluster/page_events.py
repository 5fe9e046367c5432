"""What does a worker tell gateways of its prefix cache? A numbered log of changes, and a snapshot for who comes late.

A reader asks for what came after the number that it has. It gets the changes since, merged into one message; or, if it
has none yet or the log no longer reaches back so far (a slow reader), a snapshot of everything that is cached now. So a
gap cannot go unseen and needs no question: either the numbers follow each other or a snapshot replaces all.

Pages are named by their key, as in the gateway's index (cluster/prefix_index.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from core.prefix_hash import PageEvents, PageHash, page_key

MAX_LOGGED_CHANGES = 100_000  # page changes that the log keeps: a reader further behind takes a snapshot


@dataclass(frozen=True, slots=True)
class _Change:
    number: int
    stored: tuple[int, ...]
    removed: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.stored) + len(self.removed)


class PageEventLog:
    """The prefix pages of one worker, now, and the latest changes. One thread."""

    def __init__(self, max_changes: int = MAX_LOGGED_CHANGES) -> None:
        self._max_changes = max_changes
        self._keys: set[int] = set()
        self._log: deque[_Change] = deque()
        self._num_logged = 0
        self._number = 0

    @property
    def number(self) -> int:
        """Of the latest change; 0: there was none."""
        return self._number

    def record(self, stored: Iterable[PageHash], removed: Iterable[PageHash]) -> None:
        """The engine's cache changed."""
        change = _Change(self._number + 1, tuple(map(page_key, stored)), tuple(map(page_key, removed)))
        if not change.size:
            return
        self._number += 1
        self._keys.difference_update(change.removed)
        self._keys.update(change.stored)
        self._log.append(change)
        self._num_logged += change.size
        while self._num_logged > self._max_changes and self._log:
            self._num_logged -= self._log.popleft().size

    def since(self, number: int | None) -> PageEvents | None:
        """What a reader that knows all up to ``number`` lacks (None: it knows nothing); None if it lacks nothing."""
        if number == self._number:
            return None
        oldest = self._number - len(self._log)
        if number is None or not oldest <= number < self._number:
            return PageEvents(self._number, snapshot=True, stored=tuple(self._keys))
        net: dict[int, bool] = {}
        for change in list(self._log)[number - oldest :]:
            net |= dict.fromkeys(change.removed, False)
            net |= dict.fromkeys(change.stored, True)
        stored = tuple(key for key, known in net.items() if known)
        removed = tuple(key for key, known in net.items() if not known)
        return PageEvents(self._number, number, stored=stored, removed=removed)
