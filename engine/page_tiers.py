"""Which prefix pages lie in host memory and on disk, what is being copied, and which must go?

The books of the lower tiers: no bytes, no threads, no clock. What is decided leaves as orders (``take_orders``), which
the mover carries out (page_mover.py), and each order comes back once, as ``saved``, ``spilled`` or ``loaded``.

    Save    pages of the device -> slots of host memory         before the device must evict them
    Spill   slots of host memory -> files                       before host memory must evict them
    Load    [files ->] slots of host memory -> pages            because a request is to begin with that prefix
    Drop    files are deleted

A slot of host memory is in exactly one state:

    free
    filling   a Save or the first half of a Load writes it; its name is not found yet
    stored    found by its name; with pins (a Spill or a Load reads it) it stays, without it may be evicted

A file is writing (not found yet), stored, or read by Loads (pinned: it stays). The budget of the disk counts them all.

Invariants:
- free + filling + stored == num_slots; a name is in a tier at most once; nothing that is pinned or filling is evicted
  or overwritten, so what a copy reads or writes is nobody else's until it has come back.
- Copies go down ahead of need, the least recently used first, and what went down is still above: evicting it there
  costs nothing then. How far ahead: everything, where a tier below has twice the room; else what half of it holds. A
  copy to host memory waits for those to disk, rather than push out what is to go there.
- Within a prefix later pages are older, as in the allocator: the end of a prefix is evicted before its beginning.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from core.cache_tiers import Tier
from core.prefix_hash import PageHash

MOST_SPILLS = 8  # orders to the disk that are out at one time: their slots cannot be evicted
_FREE = 1


@dataclass(frozen=True, slots=True)
class Save:
    """Copy ``page_ids[i]`` to ``slots[i]``."""

    page_ids: tuple[int, ...]
    slots: tuple[int, ...]
    page_hashes: tuple[PageHash, ...]


@dataclass(frozen=True, slots=True)
class Spill:
    """Write ``slots[i]`` to the file of ``page_hashes[i]``."""

    slots: tuple[int, ...]
    page_hashes: tuple[PageHash, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Copy ``slots[i]`` to ``page_ids[i]``, pages of a prefix that follow each other; those at ``from_disk`` are read
    into their slots first."""

    number: int  # of its books' loads
    page_ids: tuple[int, ...]
    slots: tuple[int, ...]
    page_hashes: tuple[PageHash, ...]
    from_disk: frozenset[int]


@dataclass(frozen=True, slots=True)
class Drop:
    """Delete these files."""

    page_hashes: tuple[PageHash, ...]


Order: TypeAlias = Save | Spill | Load | Drop


@dataclass(frozen=True, slots=True)
class Done:
    """What the mover says of an order that it has carried out, or could not. Seconds of the work itself."""

    order: Save | Spill | Load
    num_good: int = 0  # pages that are where the order says; of a Load: from the first on
    written: tuple[PageHash, ...] = ()  # of a Spill: files that are there now
    damaged: tuple[PageHash, ...] = ()  # files that did not hold what they should
    num_read: int = 0  # pages read from files, used or not
    read_s: float = 0.0
    copy_s: float = 0.0  # between host memory and the device


@dataclass(frozen=True, slots=True)
class TierCounts:
    """What happened to one tier since the start, in pages."""

    stored: int = 0  # came in
    loaded: int = 0  # went up
    evicted: int = 0  # for want of room
    damaged: int = 0
    foreign: int = 0


class PageTiers:
    """The lower tiers of one engine: ``num_slots`` pages of host memory, ``num_files`` pages on disk (0: no disk).

    ``page_hash in tiers``: some lower tier holds it.
    """

    def __init__(self, num_slots: int, num_files: int = 0, *, device_pages: int, batch: int = 32) -> None:
        """``batch``: most pages of one order down; ``device_pages``: of the pool above."""
        assert num_slots >= 1, "a host tier has room for a page"
        self.num_slots, self.num_files = num_slots, num_files
        self.batch = max(1, min(batch, num_slots))
        self.ahead_of_device = min(device_pages, max(1, num_slots // 2, num_files // 2))
        self._ahead_of_host = min(num_slots, num_files // 2 or min(num_files, 1))
        self._free = bytearray([_FREE]) * num_slots
        self._num_unused = num_slots
        self._slot_of: dict[PageHash, int] = {}  # stored
        self._pins: Counter[PageHash] = Counter()  # of stored slots
        self._evictable: OrderedDict[PageHash, None] = OrderedDict()  # stored without pins; least recently used first
        self._unspilled: OrderedDict[PageHash, None] = OrderedDict()  # of those, not on disk either
        self._filling: dict[PageHash, int] = {}  # name |-> slot
        self._files: OrderedDict[PageHash, None] = OrderedDict()  # stored; least recently used first
        self._writing: set[PageHash] = set()
        self._reading: Counter[PageHash] = Counter()  # files' pins
        self._loads: dict[int, Load] = {}  # under way
        self._saves: set[Save] = set()
        self._spills: set[Spill] = set()
        self._loading: dict[PageHash, int] = {}  # name |-> the load that brings it
        self._num_loads = 0
        self._orders: list[Order] = []
        self._noted: dict[PageHash, None] = {}  # changed since the last report
        self._gone: list[PageHash] = []  # left the last lower tier, and the device was not told yet
        self._counts: dict[Tier, Counter[str]] = {Tier.HOST: Counter(), Tier.DISK: Counter()}

    # ---- what is asked ----

    def __contains__(self, page_hash: object) -> bool:
        return page_hash in self._slot_of or page_hash in self._files

    def tier_of(self, page_hash: PageHash) -> Tier | None:
        """The best of the lower tiers that hold it."""
        if page_hash in self._slot_of:
            return Tier.HOST
        return Tier.DISK if page_hash in self._files else None

    def reachable(self, page_hashes: Sequence[PageHash]) -> list[Tier]:
        """The tiers of these pages of a prefix, as far as each can be loaded."""
        found: list[Tier] = []
        for page_hash in page_hashes:
            tier = self.tier_of(page_hash)
            if tier is None or (tier is Tier.DISK and page_hash in self._filling):
                break
            found.append(tier)
        return found

    def loading(self, page_hash: PageHash) -> int | None:
        """The number of the load that brings this page to the device."""
        return self._loading.get(page_hash)

    @property
    def idle(self) -> bool:
        """True when no order is out or about to go."""
        return not (self._orders or self._loads or self._saves or self._spills)

    @property
    def num_pages(self) -> dict[Tier, int]:
        """Pages that each tier holds."""
        return {Tier.HOST: len(self._slot_of), Tier.DISK: len(self._files)}

    def counts(self, tier: Tier) -> TierCounts:
        return TierCounts(**self._counts[tier])

    def take_orders(self) -> list[Order]:
        """What is to be done, in that order; each is to be done once."""
        orders, self._orders = self._orders, []
        return orders

    def take_noted(self) -> list[PageHash]:
        """Names whose tiers have changed since this was called last."""
        noted, self._noted = list(self._noted), {}
        return noted

    def take_gone(self) -> list[PageHash]:
        """Names that no lower tier holds any more, since this was called last. Some may be back."""
        gone, self._gone = self._gone, []
        return gone

    # ---- down: device to host ----

    def room_for_saves(self) -> int:
        """Pages that could be saved now: to free slots and to those that could be evicted without losing what is to go
        to disk yet. Copies to host memory wait for those to disk; there is no hurry."""
        return self._num_unused + len(self._evictable) - len(self._unspilled)

    def save(self, pages: Sequence[tuple[int, PageHash]]) -> None:
        """Order copies of these pages, at most ``room_for_saves``; whoever calls sees that they stay as they are."""
        for start in range(0, len(pages), self.batch):
            self._save(pages[start : start + self.batch])

    def _save(self, pages: Sequence[tuple[int, PageHash]]) -> None:
        slots = self._take_slots(len(pages), spilled_only=True)
        assert slots is not None, "room was asked for before"
        order = Save(tuple(page for page, _ in pages), tuple(slots), tuple(name for _, name in pages))
        for name, slot in zip(order.page_hashes, order.slots, strict=True):
            assert name not in self, "what is below already needs no copy"
            self._filling[name] = slot
        self._saves.add(order)
        self._orders.append(order)

    def saved(self, save: Save, ok: bool) -> None:
        """The copies are done, or have failed."""
        self._saves.remove(save)
        for name, slot in zip(save.page_hashes, save.slots, strict=True):
            del self._filling[name]
            if ok:
                self._store(name, slot)
            else:
                self._give_slot(slot)
        if ok:
            self._counts[Tier.HOST]["stored"] += len(save.slots)

    # ---- down: host to disk ----

    def plan_spills(self) -> None:
        """Order the next copies to disk, if host memory has too little that it could evict for nothing."""
        while self._unspilled and self.num_files and len(self._spills) < MOST_SPILLS:
            missing = self._ahead_of_host - self._num_unused - (len(self._evictable) - len(self._unspilled))
            missing -= sum(len(spill.slots) for spill in self._spills)
            num_pages = min(missing, self.batch, len(self._unspilled), self._room_for_files())
            if num_pages <= 0:
                return
            self._spill(num_pages)

    def _spill(self, num_pages: int) -> None:
        names = tuple(name for name, _ in zip(self._unspilled, range(num_pages), strict=False))
        self._evict_files(len(self._files) + len(self._writing) + num_pages - self.num_files)
        order = Spill(tuple(self._slot_of[name] for name in names), names)
        for name in names:
            self._pin(name)
        self._writing.update(names)
        self._spills.add(order)
        self._orders.append(order)

    def spilled(self, spill: Spill, written: Iterable[PageHash]) -> None:
        """The files are written, or some are not."""
        self._spills.remove(spill)
        done = set(written)
        for name in spill.page_hashes:
            self._writing.discard(name)
            if name in done:
                self._files[name] = None
                self._note(name)
            self._unpin(name, offer=False)  # a file that could not be written is not tried again for now
        self._counts[Tier.DISK]["stored"] += len(done)

    def found_files(self, names: Iterable[PageHash], num_foreign: int) -> None:
        """What the folder held at the start, the least recently used first."""
        for name in names:
            assert len(self._files) < self.num_files, "more files than the budget has room for"
            self._files[name] = None
            self._note(name)
        self._counts[Tier.DISK]["foreign"] += num_foreign

    # ---- up ----

    def load(self, page_hashes: Sequence[PageHash], page_ids: Sequence[int]) -> Load | None:
        """Order copies of these pages, all ``reachable``, to pages of the device that nobody else reads or writes.

        Fewer of them, from the first on, if host memory has no room for what comes from the disk; None if for none.
        """
        wanted = list(page_hashes)
        for name in wanted:
            if name in self._slot_of:
                self._pin(name)  # before room is made for others
        names: list[PageHash] = []
        slots: list[int] = []
        from_disk: set[int] = set()
        for name in wanted:
            slot = self._slot_of.get(name)
            if slot is None:
                taken = self._take_slots(1)
                if taken is None:
                    break
                slot = self._filling[name] = taken[0]
                self._reading[name] += 1
                from_disk.add(len(names))
            names.append(name)
            slots.append(slot)
        for name in wanted[len(names) :]:
            if name in self._slot_of:
                self._unpin(name)
        if not names:
            return None
        load = Load(self._num_loads, tuple(page_ids[: len(names)]), tuple(slots), tuple(names), frozenset(from_disk))
        self._num_loads += 1
        self._loads[load.number] = load
        self._loading.update(dict.fromkeys(names, load.number))
        self._orders.append(load)
        return load

    def loaded(self, load: Load, num_good: int, damaged: Iterable[PageHash] = ()) -> tuple[int, int]:
        """The first ``num_good`` pages are on the device, the others will not be; ``damaged`` files were found on the
        way. Returns how many came from host memory and from the disk."""
        del self._loads[load.number]
        bad = set(damaged)
        from_disk = sum(index < num_good for index in load.from_disk)
        # Backwards: the beginning of the prefix is to be the youngest.
        for index in reversed(range(len(load.slots))):
            name, slot = load.page_hashes[index], load.slots[index]
            del self._loading[name]
            if index not in load.from_disk:
                self._unpin(name)
                self._touch(name)
                continue
            self._reading[name] -= 1
            if not self._reading[name]:
                del self._reading[name]
            del self._filling[name]
            if index < num_good:
                self._store(name, slot)
                self._files.move_to_end(name)
            else:
                self._give_slot(slot)
        self._counts[Tier.HOST]["loaded"] += num_good - from_disk
        self._counts[Tier.HOST]["stored"] += from_disk
        self._counts[Tier.DISK]["loaded"] += from_disk
        self._counts[Tier.DISK]["damaged"] += len(bad)
        self._forget_files([name for name in load.page_hashes if name in bad])
        return num_good - from_disk, from_disk

    # ---- whole? ----

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if slots or files do not add up; for idle moments and tests."""
        free = {slot for slot, flag in enumerate(self._free) if flag == _FREE}
        filling, stored = set(self._filling.values()), set(self._slot_of.values())
        assert len(free) == self._num_unused, "the count of free slots is off"
        assert len(self._filling) == len(filling), "two names fill one slot"
        assert len(self._slot_of) == len(stored), "two names lie in one slot"
        assert free.isdisjoint(filling | stored), "a free slot is used"
        assert filling.isdisjoint(stored), "a slot is written that is read"
        assert len(free) + len(filling) + len(stored) == self.num_slots, "a slot is lost"
        assert self._filling.keys().isdisjoint(self._slot_of), "a name is in host memory twice"
        assert self._evictable.keys() | self._pins.keys() == self._slot_of.keys(), "a stored slot is in no list"
        assert self._evictable.keys().isdisjoint(self._pins), "what is pinned could be evicted"
        assert self._unspilled.keys() <= self._evictable.keys(), "what is pinned could be spilled"
        assert self._unspilled.keys().isdisjoint(self._files), "what is on disk is to go there"
        assert len(self._files) + len(self._writing) <= self.num_files, "more files than the budget has room for"
        assert self._reading.keys() <= self._files.keys(), "a file that is read is gone"
        assert self._writing.isdisjoint(self._files), "a file is written twice"
        if self.idle:
            assert not self._filling, "no copy runs, yet a slot is being written"
            assert not self._pins, "no copy runs, yet a slot is being read"
            assert not self._writing, "no copy runs, yet a file is being written"
            assert not self._reading, "no copy runs, yet a file is being read"
            assert not self._loading, "no copy runs, yet a page is being loaded"

    # ---- inside ----

    def _note(self, name: PageHash) -> None:
        self._noted[name] = None
        if name not in self:
            self._gone.append(name)

    def _store(self, name: PageHash, slot: int) -> None:
        self._slot_of[name] = slot
        self._make_evictable(name)
        self._note(name)

    def _make_evictable(self, name: PageHash, *, offer: bool = True) -> None:
        self._evictable[name] = None
        if offer and self.num_files and name not in self._files:
            self._unspilled[name] = None

    def _pin(self, name: PageHash) -> None:
        self._pins[name] += 1
        self._evictable.pop(name, None)
        self._unspilled.pop(name, None)

    def _unpin(self, name: PageHash, *, offer: bool = True) -> None:
        self._pins[name] -= 1
        if not self._pins[name]:
            del self._pins[name]
            self._make_evictable(name, offer=offer and name not in self._writing)

    def _touch(self, name: PageHash) -> None:
        """It is the youngest from now on."""
        if name in self._evictable:
            self._evictable.move_to_end(name)
        if name in self._unspilled:
            self._unspilled.move_to_end(name)
        if name in self._files:
            self._files.move_to_end(name)

    def _take_slots(self, num_slots: int, *, spilled_only: bool = False) -> list[int] | None:
        """Free ones, or those of the oldest that may be evicted; neighbours, if there are so many."""
        missing = max(0, num_slots - self._num_unused)
        if missing > len(self._evictable):
            return None
        names = (name for name in self._evictable if not (spilled_only and name in self._unspilled))
        for name in [name for name, _ in zip(names, range(missing), strict=False)]:
            del self._evictable[name]
            self._unspilled.pop(name, None)
            self._counts[Tier.HOST]["evicted"] += 1
            self._give_slot(self._slot_of.pop(name))
            self._note(name)
        start = self._free.find(bytes([_FREE]) * num_slots)
        slots = list(range(start, start + num_slots)) if start >= 0 else self._lowest_free(num_slots)
        for slot in slots:
            self._free[slot] = 0
        self._num_unused -= num_slots
        return slots

    def _lowest_free(self, num_slots: int) -> list[int]:
        slots: list[int] = []
        slot = -1
        for _ in range(num_slots):
            slot = self._free.find(_FREE, slot + 1)
            slots.append(slot)
        return slots

    def _give_slot(self, slot: int) -> None:
        self._free[slot] = _FREE
        self._num_unused += 1

    def _room_for_files(self) -> int:
        return self.num_files - len(self._writing) - len(self._reading)

    def _evict_files(self, num_files: int) -> None:
        if num_files <= 0:
            return
        oldest = list(islice((name for name in self._files if name not in self._reading), num_files))
        self._counts[Tier.DISK]["evicted"] += len(oldest)
        self._forget_files(oldest)

    def _forget_files(self, names: Sequence[PageHash]) -> None:
        for name in names:
            del self._files[name]
            if name in self._evictable:
                self._unspilled[name] = None
            self._note(name)
        if names:
            self._orders.append(Drop(tuple(names)))
