"""A map from page keys to small numbers in 12 to 18 bytes an entry, where a dict of integers takes 78.

(Measured while a million keys were added, and with all of them.) Open addressing with linear probing in one numpy array
of entries, hence one cache miss for a look-up. It is cut into 256 shards, and only one is ever walked or moved at once,
of 10 million entries 40,000, so that no event waits for a walk over all:

    key     ... | 38 bits: tag | 8 bits: shard       the lowest 46 bits tell keys apart: of 10 million pages about one
                                                     pair is taken for the same, which costs a worse route at most
    entry   38 bits: tag | 26 bits: value
    place   tag % capacity within the shard, or one of those behind it
            0 .. capacity-1 | capacity .. len-1
            homes of tags   | where probing may run on to; the very last place stays empty and ends every probe

Rules: an empty place holds entry 0, hence tag 0 is kept as 1. A value 0 means absent: such an entry stays until its
shard is moved, so that the probes of other keys still pass over it. Shards lie in one arena, or some still in the one
before: all grow alike, so each moves when it is full, and ``tidy`` moves the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_SHARDS = 256
SHARD_BITS, TAG_BITS, VALUE_BITS = 8, 38, 26
MAX_VALUE = 2**VALUE_BITS - 1
_SHARD, _TAG = 2**SHARD_BITS - 1, 2**TAG_BITS - 1
_LEAST_CAPACITY = 32
_OVERHANG = 64  # places behind the homes
_PACKED, _FULL, _WASTED = 0.5, 0.7, 0.2  # entries per home: of a new arena, when a shard must move, of one too large

Entries = NDArray[np.uint64]


class Move(NamedTuple):
    """``num_keys`` keys had the value ``before`` and have ``after`` now; 0: absent."""

    before: int
    after: int
    num_keys: int


class PageTable:
    """Page key |-> value in 1 .. ``MAX_VALUE``. One thread."""

    def __init__(self) -> None:
        self._arena = _Arena(_LEAST_CAPACITY)  # where shards move to
        self._arenas = [self._arena] * NUM_SHARDS  # of each shard
        # A shard's part of its arena, to be read one by one: a memoryview costs a third of an array.
        self._entries = [self._arena.shard(shard).data for shard in range(NUM_SHARDS)]
        self._capacities = [self._arena.capacity] * NUM_SHARDS
        self._room = [self._arena.room] * NUM_SHARDS  # places that may be taken before the shard must move
        self._num_keys = 0
        self._next_tidied = 0

    def __len__(self) -> int:
        return self._num_keys

    @property
    def num_bytes(self) -> int:
        """Of the arrays."""
        return sum(arena.entries.nbytes for arena in {*self._arenas, self._arena})

    def get(self, key: int) -> int:
        """Its value; 0: absent."""
        shard, tag = key & _SHARD, key >> SHARD_BITS & _TAG or 1
        place, entries = tag % self._capacities[shard], self._entries[shard]
        while entry := entries[place]:
            if entry >> VALUE_BITS == tag:
                return int(entry & MAX_VALUE)
            place += 1
        return 0

    def move(self, keys: Iterable[int], value_after: Callable[[int], int], *, absent_too: bool) -> list[Move]:
        """Give each key the value ``value_after(its value)``, 0 standing for absent before and after.

        ``absent_too`` False: absent keys stay so. ``value_after`` is asked once for each value. Returns what changed.
        """
        shards, capacities, room = self._entries, self._capacities, self._room
        after_of: dict[int, int] = {}
        left: list[int] = []
        for key in keys:
            shard, tag = key & _SHARD, key >> SHARD_BITS & _TAG or 1
            place, entries = tag % capacities[shard], shards[shard]
            while (entry := entries[place]) and entry >> VALUE_BITS != tag:
                place += 1
            before = entry & MAX_VALUE
            if not before and not absent_too:
                continue
            after = after_of.get(before)
            if after is None:
                after = after_of[before] = value_after(before)
            if after == before:
                continue
            left.append(before)
            entries[place] = tag << VALUE_BITS | after
            if not entry:
                room[shard] -= 1
                if room[shard] <= 0 or place == len(entries) - 1:
                    self._make_room(shard)
        return self._counted([Move(before, after_of[before], count) for before, count in Counter(left).items()])

    def move_shard(self, shard: int, value_after: Callable[[int], int]) -> list[Move]:
        """``move`` for every key of one shard, 0 .. ``NUM_SHARDS`` - 1."""
        entries = self._arenas[shard].shard(shard)
        values, index_of, counts = np.unique(entries & _VALUE, return_inverse=True, return_counts=True)
        afters = [value_after(before) if before else 0 for before in values.tolist()]
        entries &= ~_VALUE
        entries |= np.array(afters, np.uint64)[index_of]
        moves = zip(values.tolist(), afters, counts.tolist(), strict=True)
        return self._counted([Move(*move) for move in moves if move[0] != move[1]])

    def tidy(self) -> bool:
        """Move one shard towards an arena of the right size; call it now and then. False: there was nothing to do."""
        homes = self._arena.capacity * NUM_SHARDS
        if self._num_keys < _WASTED * homes and self._arena.capacity > _LEAST_CAPACITY:
            self._arena = _Arena(_capacity_for(self._num_keys // NUM_SHARDS))
        for _ in range(NUM_SHARDS):
            shard, self._next_tidied = self._next_tidied, (self._next_tidied + 1) % NUM_SHARDS
            if self._arenas[shard] is not self._arena:
                self._make_room(shard)
                return True
        return False

    # ---- inside ----

    def _counted(self, moves: list[Move]) -> list[Move]:
        self._num_keys += sum(m.num_keys * ((m.after != 0) - (m.before != 0)) for m in moves)
        return moves

    def _make_room(self, shard: int) -> None:
        """Move a shard to the arena, a new one if need be, without what is absent."""
        entries = self._arenas[shard].shard(shard)
        present = entries[entries & _VALUE != 0]
        while not self._arena.fill(shard, present):
            self._arena = _Arena(max(_capacity_for(len(present)), self._arena.capacity + 1))
        arena = self._arenas[shard] = self._arena
        self._entries[shard] = arena.shard(shard).data
        self._capacities[shard] = arena.capacity
        self._room[shard] = arena.room - len(present)


_VALUE = np.uint64(MAX_VALUE)


class _Arena:
    """The array of entries, a part for each shard."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity  # homes of a shard
        self.num_places = capacity + _OVERHANG  # of a shard
        self.room = int(capacity * _FULL)  # places of a shard that may be taken
        self.entries: Entries = np.zeros(NUM_SHARDS * self.num_places, np.uint64)

    def shard(self, shard: int) -> Entries:
        return self.entries[shard * self.num_places : (shard + 1) * self.num_places]

    def fill(self, shard: int, entries: Entries) -> bool:
        """Have a shard hold just these. False, with nothing done, if they would soon be too many or end too far."""
        if len(entries) > self.capacity * (_PACKED + _FULL) / 2:
            return False
        homes = ((entries >> np.uint64(VALUE_BITS)) % np.uint64(self.capacity)).astype(np.int64)
        order = np.argsort(homes, kind="stable")
        # In order of their homes each entry takes its own place or the one behind its predecessor: place - rank is
        # the largest home - rank so far.
        ranks = np.arange(len(entries))
        places = np.maximum.accumulate(homes[order] - ranks) + ranks
        if len(entries) and places[-1] >= self.num_places - 1:
            return False
        here, in_order = self.shard(shard), entries[order]
        here[:] = 0
        here[places] = in_order
        return True


def _capacity_for(num_keys: int) -> int:
    """Homes of a shard that is to hold so many."""
    return max(_LEAST_CAPACITY, int(num_keys / _PACKED) | 1)
