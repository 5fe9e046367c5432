"""What does a worker tell gateways of its prefix cache? A numbered log of changes, and a snapshot for who comes late.

A reader asks for what came after the number that it has. It gets the changes since, merged into one message; or, if it
has none yet or the log no longer reaches back so far (a slow reader), a snapshot of everything that is cached now. So a
gap cannot go unseen and needs no question: either the numbers follow each other or a snapshot replaces all.

Pages are named by their key, as in the gateway's index (cluster/prefix_index.py). Where the cache has several tiers,
each page is told by the best tier that it is in, whenever that changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from core.cache_tiers import LOWER_TIERS, Tier
from core.prefix_hash import PageEvents, PageHash, TierPages, page_key

MAX_LOGGED_CHANGES = 100_000  # page changes that the log keeps: a reader further behind takes a snapshot


@dataclass(frozen=True, slots=True)
class _Change:
    number: int
    stored: tuple[int, ...]
    removed: tuple[int, ...]
    lower: tuple[TierPages, ...] = ()

    @property
    def size(self) -> int:
        return len(self.stored) + len(self.removed) + sum(len(lower.pages) for lower in self.lower)


class PageEventLog:
    """The prefix pages of one worker, now, and the latest changes. One thread."""

    def __init__(self, max_changes: int = MAX_LOGGED_CHANGES) -> None:
        self._max_changes = max_changes
        self._keys: set[int] = set()  # on the device
        self._lower: dict[int, Tier] = {}  # key |-> its best tier, of those that are not
        self._log: deque[_Change] = deque()
        self._num_logged = 0
        self._number = 0

    @property
    def number(self) -> int:
        """Of the latest change; 0: there was none."""
        return self._number

    def record(
        self,
        stored: Iterable[PageHash],
        removed: Iterable[PageHash],
        lower: Mapping[Tier, Iterable[PageHash]] = MappingProxyType({}),
    ) -> None:
        """The engine's cache changed. ``lower``: pages that are in that tier now and in no better one; a page is in one
        of the three."""
        moved = ((tier, tuple(map(page_key, names))) for tier, names in lower.items())
        change = _Change(
            self._number + 1,
            tuple(map(page_key, stored)),
            tuple(map(page_key, removed)),
            tuple(TierPages(tier, pages) for tier, pages in moved if pages),
        )
        if not change.size:
            return
        self._number += 1
        self._keys.difference_update(change.removed)
        self._keys.update(change.stored)
        if change.lower or self._lower:
            for key in (*change.removed, *change.stored):
                self._lower.pop(key, None)
            for moved_pages in change.lower:
                self._keys.difference_update(moved_pages.pages)
                self._lower.update(dict.fromkeys(moved_pages.pages, moved_pages.tier))
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
            return PageEvents(
                self._number, snapshot=True, stored=tuple(self._keys), lower=_by_tier(self._lower.items())
            )
        net: dict[int, Tier | None] = {}
        for change in list(self._log)[number - oldest :]:
            net |= dict.fromkeys(change.removed)
            net |= dict.fromkeys(change.stored, Tier.DEVICE)
            for lower in change.lower:
                net |= dict.fromkeys(lower.pages, lower.tier)
        stored = tuple(key for key, tier in net.items() if tier is Tier.DEVICE)
        removed = tuple(key for key, tier in net.items() if tier is None)
        return PageEvents(self._number, number, stored=stored, removed=removed, lower=_by_tier(net.items()))


def _by_tier(tiers: Iterable[tuple[int, Tier | None]]) -> tuple[TierPages, ...]:
    """Those of lower tiers."""
    pages: dict[Tier, list[int]] = {tier: [] for tier in LOWER_TIERS}
    for key, tier in tiers:
        if tier is not None and tier is not Tier.DEVICE:
            pages[tier].append(key)
    return tuple(TierPages(tier, tuple(keys)) for tier, keys in pages.items() if keys)
