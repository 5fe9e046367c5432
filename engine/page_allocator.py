"""Which pages are free, who uses the others, and which of them hold a known prefix?

The sole writer of page ids, reference counts and the prefix index of one engine. A page is in exactly one state:

    free      refs 0, no hash          taken first
    cached    refs 0, has a hash       its K/V is kept for whoever sends that prefix again; evicted when free pages
                                       run out, least recently used first
    used      refs >= 1, hash or none  as many refs as sequences (and reservations) hold it

Where there are lower tiers (page_tiers.py), a cached page is *unsaved* until its K/V is in one of them too. It is
copied there before it must go, and *held* meanwhile (``hold_unsaved``, ``put_back``): it keeps its place in the order
of eviction and may be used by who has its prefix, but it is not evicted, hence not written. A page that is evicted
unsaved is lost, and counted.

Invariants: free + cached + used == num_pages. A hash names at most one page and a page has at most one hash. The
contents of a page that has a hash never change: whoever holds it may only read, so sharing needs no copy on write.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from core.prefix_hash import PageHash

_FREE = 1


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """What became of known prefixes since the last report: net, so a page that came and went is in neither."""

    stored: tuple[PageHash, ...] = ()  # known on the device
    removed: tuple[PageHash, ...] = ()  # known nowhere
    host: tuple[PageHash, ...] = ()  # known in host memory, not on the device
    disk: tuple[PageHash, ...] = ()  # known on disk, in no better tier


class PageAllocator:
    """Hands out pages of a pool of ``num_pages``; knows nothing of their bytes."""

    def __init__(
        self, num_pages: int, page_size: int, prefix_cache: bool = True, below: Container[PageHash] | None = None
    ) -> None:
        """``below``: what lower tiers hold, as of the moment that it is asked; None: there are none."""
        assert num_pages >= 1, "a pool has at least one page"
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        # One byte for each page: bytearray.find is how a run of n free pages is found at the speed of memory.
        self._free = bytearray([_FREE]) * num_pages
        self._num_unused = num_pages  # set bytes in _free
        self._refs = [0] * num_pages
        self._page_of: dict[PageHash, int] = {}
        self._hash_of: dict[int, PageHash] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._changed: dict[PageHash, bool] = {}  # since the last report; True: known now, and was not then
        self._below = below
        self._unsaved: OrderedDict[int, None] = OrderedDict()  # of the cached ones; least recently used first
        self._held: set[int] = set()  # cached or used
        self._num_held = 0  # of the cached ones
        self._num_lost = 0

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` could hand out now: free and cached ones."""
        return self._num_unused + len(self._cached) - self._num_held

    @property
    def num_cached(self) -> int:
        """Pages that nobody uses and that hold a known prefix; those that are held left aside."""
        return len(self._cached) - self._num_held

    @property
    def num_unsaved(self) -> int:
        """Cached pages whose K/V no lower tier holds."""
        return len(self._unsaved)

    @property
    def num_lost(self) -> int:
        """Pages that were evicted while no lower tier held their K/V, since the start; 0 where there is none."""
        return self._num_lost

    def knows(self, page_hash: PageHash) -> bool:
        """Does a page hold this prefix?"""
        return page_hash in self._page_of

    def match_prefix(self, hashes: Sequence[PageHash]) -> list[int]:
        """Pages of the longest known prefix of ``hashes``; the caller holds one reference to each."""
        pages: list[int] = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            pages.append(page)
        self.retain(pages)
        return pages

    def num_known(self, hashes: Sequence[PageHash]) -> int:
        """Pages of the longest known prefix of ``hashes``, of which nobody holds a reference for having asked."""
        # The end of a prefix is evicted first, so what is known is a prefix and can be halved for.
        return bisect_left(hashes, True, key=lambda page_hash: page_hash not in self._page_of)

    def allocate(self, num_pages: int) -> list[int] | None:
        """``num_pages`` pages with unknown contents, ascending, one reference each; None (and nothing taken) if there
        are not so many. Contiguous if a free run is long enough: neighbouring pages travel as one write."""
        if num_pages > self.num_free:
            return None
        self._evict(num_pages - self._num_unused)
        start = self._free.find(bytes([_FREE]) * num_pages)
        if start >= 0:
            end = start + num_pages
            pages = list(range(start, end))
            self._free[start:end] = bytes(num_pages)
            self._refs[start:end] = [1] * num_pages
        else:
            pages = self._lowest_free(num_pages)
            for page in pages:
                self._free[page] = 0
                self._refs[page] = 1
        self._num_unused -= num_pages
        return pages

    def register(self, page: int, page_hash: PageHash) -> None:
        """``page`` is full, computed and used: from now on ``page_hash`` finds it. If another page already has this
        name, that one stays the known one (two sequences computed the same prefix side by side)."""
        assert self._refs[page] > 0, f"page {page} is registered by nobody who holds it"
        if not self.prefix_cache or page_hash in self._page_of:
            return
        assert page not in self._hash_of, f"page {page} already has a name"
        self._page_of[page_hash] = page
        self._hash_of[page] = page_hash
        self._note_change(page_hash, known=True)

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each of ``pages``, which must be used or cached."""
        for page in pages:
            if self._refs[page] == 0:
                del self._cached[page]
                self._unsaved.pop(page, None)
                self._num_held -= page in self._held
            self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference fewer to each of ``pages`` (in the order of a block table)."""
        # Backwards: of one prefix the last page must be evicted first, for without page i nobody finds page i + 1.
        refs, hash_of = self._refs, self._hash_of
        for page in reversed(pages):
            left = refs[page] - 1
            assert left >= 0, f"page {page} is released more often than it was taken"
            refs[page] = left
            if left:
                continue
            if page in hash_of:
                self._cached[page] = None
                if page in self._held:
                    self._num_held += 1
                elif self._below is not None and hash_of[page] not in self._below:
                    self._unsaved[page] = None
            else:
                self._free[page] = _FREE
                self._num_unused += 1

    def hold_unsaved(self, max_pages: int) -> list[tuple[int, PageHash]]:
        """Up to ``max_pages`` unsaved pages with their names, those that would be evicted first in front.

        Until ``put_back`` they are not evicted, so that they can be copied; whoever has their prefix may use them.
        """
        pages = [page for page, _ in zip(self._unsaved, range(max_pages), strict=False)]
        for page in pages:
            del self._unsaved[page]
        self._held.update(pages)
        self._num_held += len(pages)
        return [(page, self._hash_of[page]) for page in pages]

    def put_back(self, pages: Iterable[int]) -> None:
        """Pages of ``hold_unsaved`` are copied, or will not be. They can be evicted again, in their turn, and are not
        offered again before somebody has used them."""
        for page in pages:
            self._held.remove(page)
            self._num_held -= page in self._cached

    def copy_is_gone(self, page_hash: PageHash) -> None:
        """No lower tier holds this prefix any more."""
        page = self._page_of.get(page_hash)
        if page is not None and page in self._cached and page not in self._held:
            self._unsaved[page] = None

    def take_changes(self) -> CacheChanges:
        """Prefix pages that became known, or unknown, since this was called last; in the order of the changes."""
        changed, self._changed = self._changed, {}
        return CacheChanges(
            stored=tuple(page_hash for page_hash, known in changed.items() if known),
            removed=tuple(page_hash for page_hash, known in changed.items() if not known),
        )

    def whole(self) -> bool:
        """True when no page is referenced or held."""
        return self.num_free == self.num_pages

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the pages do not add up; O(num_pages), for idle moments and tests."""
        used = {page for page, refs in enumerate(self._refs) if refs > 0}
        free = {page for page, flag in enumerate(self._free) if flag == _FREE}
        cached = set(self._cached)
        assert len(free) == self._num_unused, "the count of free pages is off"
        assert used.isdisjoint(free), "a used page is free"
        assert cached.isdisjoint(used | free), "a cached page is used or free"
        assert len(used) + len(free) + len(cached) == self.num_pages, "a page is lost"
        assert all(refs >= 0 for refs in self._refs), "a reference count is negative"
        assert {page: name for name, page in self._page_of.items()} == self._hash_of, "the prefix index is torn"
        assert cached <= self._hash_of.keys() <= cached | used, (
            "a page has a name and cannot be found, or a free one has"
        )
        assert self._unsaved.keys() <= cached, "a page that is not cached is to be saved"
        assert self._held <= cached | used, "a held page is free"
        assert self._held.isdisjoint(self._unsaved), "a page is to be saved while it is"
        assert len(self._held & cached) == self._num_held, "the count of held pages is off"
        below = self._below
        assert below is None or all(self._hash_of[page] not in below for page in self._unsaved), "a page is saved twice"

    def _note_change(self, page_hash: PageHash, *, known: bool) -> None:
        if self._changed.pop(page_hash, known) is known:
            self._changed[page_hash] = known

    def _evict(self, num_pages: int) -> None:
        evictable: Iterable[int] = self._cached
        if self._held:
            evictable = (page for page in self._cached if page not in self._held)
        for page in [page for page, _ in zip(evictable, range(num_pages), strict=False)]:
            del self._cached[page]
            page_hash = self._hash_of.pop(page)
            del self._page_of[page_hash]
            self._unsaved.pop(page, None)
            self._num_lost += self._below is not None and page_hash not in self._below
            self._note_change(page_hash, known=False)
            self._free[page] = _FREE
            self._num_unused += 1

    def _lowest_free(self, num_pages: int) -> list[int]:
        pages: list[int] = []
        page = -1
        for _ in range(num_pages):
            page = self._free.find(_FREE, page + 1)
            pages.append(page)
        return pages
