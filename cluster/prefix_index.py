"""Which workers hold how much of this prompt? Page hash |-> workers, for every worker that a gateway follows.

A worker's pages are prefix-closed: whoever holds page i of a prompt holds pages 0..i-1 as well (the allocator evicts
the end of a prefix first). So along a prompt's pages the set of holders only shrinks, and the depth of every worker
is found by halving intervals: O(log pages) look-ups for each distinct set of workers that the prompt meets, however
many workers are in it.

    key    the first 8 bytes of a PageHash, of which the table looks at 46 bits: of 10 million prefixes about one pair
           is taken for the same. A wrong hit costs a worse route, never a wrong token: the allocators compare whole
           hashes.
    slot   one bit for one worker's cache since it last began empty. A worker that is lost, or that clears its cache,
           just loses its slot: its bits stay in the index, are masked out of every answer, and are swept out a shard
           at a time, so that no event waits for a walk over all pages.
    set    an interned bitmap of slots: millions of pages share a few thousand of them.
    tiers  a worker whose cache has lower tiers has one slot more for each: "on the device", "or in host memory", "or
           on disk". Each of these is prefix-closed, as the end of a prefix leaves a tier first, and a page costs no
           byte more.

Invariant: an answer is what a scan of every worker's own pages would give, as of the last event of each.
Everything happens on one event loop; ``Membership`` is the one writer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.page_table import NUM_SHARDS, Move, PageTable
from core.cache_tiers import LOWER_TIERS, Tier
from core.errors import ProtocolViolation
from core.prefix_hash import PageEvents, PageHash, page_key
from core.request import EngineId


@dataclass(frozen=True, slots=True)
class PrefixLevel:
    """``holders`` (a bitmap of slots) hold exactly ``num_pages`` leading pages of the prompt."""

    num_pages: int
    holders: int


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """For one prompt: how many of its leading pages each worker holds, most first. Who holds none is on no level."""

    levels: tuple[PrefixLevel, ...] = ()
    slots: Mapping[EngineId, int] = field(default_factory=dict)  # is replaced, never changed
    # Of workers with lower tiers: the slot of each, "in this tier or a better one"; is replaced, never changed.
    lower_slots: Mapping[EngineId, Mapping[Tier, int]] = field(default_factory=dict)

    def pages_on(self, engine_id: EngineId) -> int:
        """Leading pages that ``engine_id`` holds on its device."""
        return self._pages_of(self.slots.get(engine_id))

    def pages_within(self, engine_id: EngineId, tier: Tier) -> int:
        """Leading pages that ``engine_id`` holds in a lower tier or a better one; 0 if it has no such tier."""
        return self._pages_of(self.lower_slots.get(engine_id, {}).get(tier))

    def _pages_of(self, slot: int | None) -> int:
        if slot is None:
            return 0
        return next((level.num_pages for level in self.levels if level.holders >> slot & 1), 0)

    @property
    def longest(self) -> int:
        """Pages that the best worker holds, in whatever tier."""
        return self.levels[0].num_pages if self.levels else 0

    def tokens_by_slot(self, page_size: int, most: int) -> NDArray[np.int64]:
        """Leading tokens that each worker holds, ``most`` at most, for whoever asks of a thousand workers.

        The last entry, 0, is that of every slot beyond.
        """
        num_slots = max((level.holders.bit_length() for level in self.levels), default=0)
        held = np.zeros(num_slots + 1, np.int64)
        for level in self.levels:
            tokens = min(level.num_pages * page_size, most)
            if level.holders.bit_count() <= _FEW:
                for slot in _bits(level.holders):
                    held[slot] = tokens
            else:
                octets = np.frombuffer(level.holders.to_bytes(num_slots // 8 + 1, "little"), np.uint8)
                held[:-1] += np.unpackbits(octets, count=num_slots, bitorder="little") * np.int64(tokens)
        return held


NO_MATCH = PrefixMatch()


_FEW = 8  # slots that are named faster one by one than in an array of all


class PrefixIndex:
    """The pages of every followed worker."""

    def __init__(self) -> None:
        self._table = PageTable()  # key |-> id of a set
        self._sets = _SlotSets()
        self._slot_of: Mapping[EngineId, int] = {}  # replaced, never changed: answers keep the one of their time
        self._lower_slots: Mapping[EngineId, Mapping[Tier, int]] = {}  # likewise; of those that have lower tiers
        self._alive = 0  # bitmap of the slots in _slot_of
        self._num_slots = 0
        self._free_slots: list[int] = []
        self._dead = 0  # bitmap of lost slots whose bits may still be in some set
        self._sweeping = 0  # the part of _dead that the present sweep takes out
        self._next_shard = 0

    @property
    def num_keys(self) -> int:
        """Distinct pages in the index, those of lost workers that are not swept out yet included."""
        return len(self._table)

    # ---- events ----

    def add_worker(self, engine_id: EngineId, lower_tiers: Collection[Tier] = ()) -> None:
        """Follow a worker, whose cache has these lower tiers; it counts as empty. Of a worker that is followed already,
        everything is forgotten."""
        self.remove_worker(engine_id)
        self._slot_of = {**self._slot_of, engine_id: self._take_slot()}
        if lower_tiers:
            own = {tier: self._take_slot() for tier in LOWER_TIERS if tier in lower_tiers}
            self._lower_slots = {**self._lower_slots, engine_id: own}

    def remove_worker(self, engine_id: EngineId) -> None:
        """Forget a worker and all its pages; unknown ones are ignored."""
        slots = self._slots(engine_id)
        if not slots:
            return
        self._slot_of = {name: s for name, s in self._slot_of.items() if name != engine_id}
        if engine_id in self._lower_slots:
            self._lower_slots = {name: s for name, s in self._lower_slots.items() if name != engine_id}
        self._alive &= ~slots
        self._dead |= slots

    def stored(self, engine_id: EngineId, keys: Iterable[int]) -> None:
        """The worker now holds these pages on its device; events of workers that are not followed are ignored."""
        slots = self._slots(engine_id)
        if slots:
            self._sets.note(self._table.move(keys, self._sets.adding(slots), absent_too=True))

    def removed(self, engine_id: EngineId, keys: Iterable[int]) -> None:
        """The worker no longer holds these pages, in any tier."""
        slots = self._slots(engine_id)
        if slots:
            self._sets.note(self._table.move(keys, self._sets.removing(slots), absent_too=False))

    def lowered(self, engine_id: EngineId, tier: Tier, keys: Iterable[int]) -> None:
        """The worker now holds these pages in a lower tier and in no better one. Raises ``ProtocolViolation`` if it did
        not say that it has such a tier."""
        slots = self._slots(engine_id)
        if not slots:
            return
        own = self._lower_slots.get(engine_id, {})
        if tier not in own:
            raise ProtocolViolation(f"{engine_id} holds pages in a tier that it did not describe: {tier}")
        within = sum(1 << slot for lower, slot in own.items() if LOWER_TIERS.index(lower) >= LOWER_TIERS.index(tier))
        self._sets.note(self._table.move(keys, self._sets.changing(within, slots & ~within), absent_too=True))

    def apply(self, engine_id: EngineId, events: PageEvents) -> None:
        """What a worker reported; the caller has seen to it that nothing is missing between two reports."""
        if events.snapshot:
            self.add_worker(engine_id, self._lower_slots.get(engine_id, {}).keys())
        self.removed(engine_id, events.removed)
        self.stored(engine_id, events.stored)
        for lower in events.lower:
            self.lowered(engine_id, lower.tier, lower.pages)

    def sweep(self) -> bool:
        """Take lost workers' bits out of one shard, or tidy one; call it now and then. False: all was done."""
        if not self._sweeping:
            if not self._dead:
                return self._table.tidy()
            self._sweeping, self._next_shard = self._dead, 0
        self._sets.note(self._table.move_shard(self._next_shard, self._sets.removing(self._sweeping)))
        self._next_shard += 1
        if self._next_shard == NUM_SHARDS:
            self._free_slots += _bits(self._sweeping)
            self._dead &= ~self._sweeping
            self._sweeping = 0
        return True

    # ---- answers ----

    def match(self, hashes: Sequence[PageHash]) -> PrefixMatch:
        """How many of the prompt's leading pages each followed worker holds."""
        if not hashes:
            return NO_MATCH
        bitmaps, get, alive = self._sets.bitmaps, self._table.get, self._alive

        def holders(page_hash: PageHash) -> int:
            return bitmaps[get(page_key(page_hash))] & alive

        first, last = holders(hashes[0]), holders(hashes[-1])
        ends: list[tuple[int, int]] = []  # (page, its holders) wherever they are not those of the page before
        intervals = [(0, first, len(hashes) - 1, last)]  # (page, its holders, later page, its holders); first ones last
        while intervals:
            low, before, high, after = intervals.pop()
            if before == after:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                between = holders(hashes[middle])
                if between == before:
                    low = middle
                else:
                    if between != after:
                        intervals.append((middle, between, high, after))
                    high, after = middle, between
            ends.append((high, after))
        levels: list[PrefixLevel] = []
        staying = first
        for page, survivors in ends:
            gone = staying & ~survivors
            if gone:
                levels.append(PrefixLevel(page, gone))
            staying &= survivors
        if staying:
            levels.append(PrefixLevel(len(hashes), staying))
        return PrefixMatch(tuple(reversed(levels)), self._slot_of, self._lower_slots)

    # ---- inside ----

    def _slots(self, engine_id: EngineId) -> int:
        """The bits of all its slots; 0: it is not followed."""
        slot = self._slot_of.get(engine_id)
        if slot is None:
            return 0
        bits = 1 << slot
        for lower in self._lower_slots.get(engine_id, {}).values():
            bits |= 1 << lower
        return bits

    def _take_slot(self) -> int:
        if not self._free_slots:
            self._free_slots.append(self._num_slots)
            self._num_slots += 1
        slot = self._free_slots.pop()
        self._alive |= 1 << slot
        return slot


class _SlotSets:
    """Interned bitmaps, each known by an id as long as some page has it; 0 is the empty one's."""

    def __init__(self) -> None:
        self._bitmaps = [0]  # id |-> bitmap; 0 for ids that are free
        self._num_pages = [0]  # id |-> pages that have it; not counted for the empty one
        self._ids: dict[int, int] = {}  # bitmap |-> id
        self._free_ids: list[int] = []

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def bitmaps(self) -> Sequence[int]:
        """id |-> bitmap; of the moment."""
        return self._bitmaps

    def adding(self, slots: int) -> Callable[[int], int]:
        """Id of a set |-> id of that set with ``slots``."""
        return lambda set_id: self._id_of(self._bitmaps[set_id] | slots)

    def removing(self, slots: int) -> Callable[[int], int]:
        """Id of a set |-> id of that set without ``slots``."""
        return lambda set_id: self._id_of(self._bitmaps[set_id] & ~slots)

    def changing(self, added: int, removed: int) -> Callable[[int], int]:
        """Id of a set |-> id of that set with some slots and without others."""
        return lambda set_id: self._id_of((self._bitmaps[set_id] | added) & ~removed)

    def note(self, moves: Sequence[Move]) -> None:
        """Pages went from set to set. Sets that none has any more are forgotten: histories are longer than memory."""
        for move in moves:
            self._num_pages[move.after] += move.num_keys
        for move in moves:
            self._num_pages[move.before] -= move.num_keys
            if move.before and not self._num_pages[move.before]:
                del self._ids[self._bitmaps[move.before]]
                self._bitmaps[move.before] = 0
                self._free_ids.append(move.before)

    def _id_of(self, bitmap: int) -> int:
        if not bitmap:
            return 0
        set_id = self._ids.get(bitmap)
        if set_id is None:
            if not self._free_ids:
                self._free_ids.append(len(self._bitmaps))
                self._bitmaps.append(0)
                self._num_pages.append(0)
            set_id = self._ids[bitmap] = self._free_ids.pop()
            self._bitmaps[set_id] = bitmap
        return set_id


def _bits(bitmap: int) -> Iterator[int]:
    """Positions of the set bits, lowest first."""
    while bitmap:
        low = bitmap & -bitmap
        yield low.bit_length() - 1
        bitmap ^= low
