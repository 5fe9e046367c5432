"""A map from page keys to small numbers in 20 bytes an entry: a dict of Python integers takes 90 to 180.

Two numpy arrays for each of 256 shards, keys and values, open addressing with linear probing from ``key % capacity``.
Only a shard is ever walked or moved at once (40,000 of 10 million entries: about 3 ms), so no event waits for a walk
over all of them.

    places   0 .. capacity-1 | capacity .. len-1
             homes of keys   | where probing may run on to; the very last place stays empty and ends every probe

Rules: an empty place holds key 0, hence the key 0 is kept as 1 (one page in 2^64 has it). A value 0 means absent: it
stays until its shard is packed, so that the probes of other keys still pass over it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_SHARDS = 256
_SHARD = NUM_SHARDS - 1  # mask of the bits of a key that name its shard
_LEAST_PLACES = 32
_PACKED, _FULL = 0.55, 0.75  # entries per home: after a shard is packed, and when it is packed again

Values = NDArray[np.uint32]


class Move(NamedTuple):
    """``num_keys`` keys had the value ``before`` and have ``after`` now; 0: absent."""

    before: int
    after: int
    num_keys: int


class PageTable:
    """Page key |-> value in 1 .. 2^32-1. One thread."""

    def __init__(self) -> None:
        shards = [_empty(_LEAST_PLACES) for _ in range(NUM_SHARDS)]
        self._keys = [keys for keys, _ in shards]
        self._values = [values for _, values in shards]
        # The same memory, to be read one by one: indexing a memoryview costs a third of indexing an array.
        self._key_at = [keys.data for keys in self._keys]
        self._value_at = [values.data for values in self._values]
        self._capacities = [_capacity(keys) for keys in self._keys]
        self._room = [_room(capacity) for capacity in self._capacities]  # places that may be taken before packing
        self._num_entries = 0

    def __len__(self) -> int:
        return self._num_entries

    @property
    def num_bytes(self) -> int:
        """Of the arrays."""
        return sum(keys.nbytes + values.nbytes for keys, values in zip(self._keys, self._values, strict=True))

    def get(self, key: int) -> int:
        """Its value; 0: absent."""
        key = key or 1
        shard = key & _SHARD
        place, key_at = key % self._capacities[shard], self._key_at[shard]
        while (found := key_at[place]) != key:
            if not found:
                return 0
            place += 1
        return self._value_at[shard][place]

    def move(self, keys: Iterable[int], value_after: Callable[[int], int], *, absent_too: bool) -> list[Move]:
        """Give each key the value ``value_after(its value)``, 0 standing for absent before and after.

        ``absent_too`` False: absent keys stay so. ``value_after`` is asked once for each value. Returns what changed.
        """
        all_key_at, all_value_at, capacities = self._key_at, self._value_at, self._capacities
        after_of: dict[int, int] = {}
        left: list[int] = []
        for key in keys:
            key = key or 1
            shard = key & _SHARD
            place, key_at = key % capacities[shard], all_key_at[shard]
            while (found := key_at[place]) != key and found:
                place += 1
            before = all_value_at[shard][place] if found else 0
            if not before and not absent_too:
                continue
            after = after_of.get(before)
            if after is None:
                after = after_of[before] = value_after(before)
            if after == before:
                continue
            left.append(before)
            all_value_at[shard][place] = after
            if not found:
                self._take(shard, place, key)
        return self._counted([Move(before, after_of[before], count) for before, count in Counter(left).items()])

    def move_shard(self, shard: int, value_after: Callable[[int], int]) -> list[Move]:
        """``move`` for every entry of one shard, 0 .. ``NUM_SHARDS`` - 1, which is then packed."""
        if self._room[shard] == _room(self._capacities[shard]):
            return []
        values = self._values[shard]
        present, index_of, counts = np.unique(values, return_inverse=True, return_counts=True)
        afters = [value_after(before) if before else 0 for before in present.tolist()]
        values[:] = np.array(afters, np.uint32)[index_of]
        self._pack(shard)
        moves = zip(present.tolist(), afters, counts.tolist(), strict=True)
        return self._counted([Move(*move) for move in moves if move[0] != move[1]])

    # ---- inside ----

    def _counted(self, moves: list[Move]) -> list[Move]:
        self._num_entries += sum(m.num_keys * ((m.after != 0) - (m.before != 0)) for m in moves)
        return moves

    def _take(self, shard: int, place: int, key: int) -> None:
        """Put a new key where its probe ended; its value is there already."""
        self._key_at[shard][place] = key
        self._room[shard] -= 1
        if self._room[shard] <= 0 or place == len(self._key_at[shard]) - 1:
            self._pack(shard)

    def _pack(self, shard: int) -> None:
        """Move a shard to arrays of the right size, without what is absent."""
        there = np.flatnonzero(self._values[shard])
        capacity = max(_LEAST_PLACES, int(len(there) / _PACKED) | 1)
        keys, values = self._keys[shard][there], self._values[shard][there]
        homes = (keys % np.uint64(capacity)).astype(np.int64)
        order = np.argsort(homes, kind="stable")
        # In order of their homes each entry takes its own place or the one behind its predecessor: place - rank is
        # the largest home - rank so far.
        ranks = np.arange(len(there))
        places = np.maximum.accumulate(homes[order] - ranks) + ranks
        overhang = max(0, int(places[-1]) - capacity + 1) if len(there) else 0
        self._keys[shard], self._values[shard] = _empty(capacity, overhang)
        self._keys[shard][places] = keys[order]
        self._values[shard][places] = values[order]
        self._key_at[shard], self._value_at[shard] = self._keys[shard].data, self._values[shard].data
        self._capacities[shard] = capacity
        self._room[shard] = max(1, _room(capacity) - len(there))


def _empty(capacity: int, overhang: int = 0) -> tuple[NDArray[np.uint64], Values]:
    places = capacity + overhang + _LEAST_PLACES
    return np.zeros(places, np.uint64), np.zeros(places, np.uint32)


def _capacity(keys: NDArray[np.uint64]) -> int:
    return len(keys) - _LEAST_PLACES


def _room(capacity: int) -> int:
    return int(capacity * _FULL)
