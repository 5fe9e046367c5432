"""Whose turn is it? Requests of several tenants that wait, in weighted fair order. Pure: no clock, no effects.

Between tenants: self-clocked fair queueing (Golestani, INFOCOM 1994). A tenant that waits has a start tag; the tag of
one of its requests is where the tenant stands when that request and those before it are served:

    tag = start + (cost of those before it + its own cost) / weight

The smallest tag is next. Serving a request moves its tenant's start by cost / weight, and the queue's clock to the
largest tag served so far; a tenant that begins to wait starts at the clock. Within a tenant ``Place.order`` decides.

Invariants:
- of two tenants that both wait all the time, what each was served, divided by its weight, differs by at most one
  largest request of the one and one of the other, each divided by its weight;
- nothing starves: every service moves the clock, and a newcomer's tag lies beyond it;
- a tenant that waits for nothing is not remembered, so names that clients make up cost no memory.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

Order = tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Place(Generic[T]):
    """One request that waits. ``order`` is unique in its queue; the smaller goes first within the tenant."""

    item: T
    tenant: str
    cost: float  # above 0, in any unit that is the same for all
    size: int  # how many it counts for where numbers are bounded
    order: Order


class FairQueue(Generic[T]):
    """Places of every tenant. ``weight_of`` a tenant is above 0 and never changes."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._weight_of = weight_of
        self._lines: dict[str, _Line[T]] = {}  # tenants that wait; the others are not remembered
        self._clock = 0.0
        self._size = 0
        self._num_places = 0

    def __len__(self) -> int:
        return self._num_places

    @property
    def size(self) -> int:
        """Of all places together."""
        return self._size

    @property
    def sizes(self) -> dict[str, int]:
        """tenant that waits |-> size of its places."""
        return {tenant: line.size for tenant, line in self._lines.items()}

    def size_of(self, tenant: str) -> int:
        """Of the tenant's places."""
        line = self._lines.get(tenant)
        return 0 if line is None else line.size

    def push(self, place: Place[T]) -> None:
        """Wait."""
        line = self._lines.get(place.tenant)
        if line is None:
            line = self._lines[place.tenant] = _Line(self._weight_of(place.tenant), self._clock)
        insort(line.places, place, key=_order)
        line.cost += place.cost
        line.size += place.size
        self._size += place.size
        self._num_places += 1

    def remove(self, place: Place[T]) -> None:
        """Wait no more, served nothing. The place must wait."""
        line = self._lines[place.tenant]
        del line.places[line.index(place)]
        line.cost -= place.cost
        line.size -= place.size
        self._size -= place.size
        self._num_places -= 1
        if not line.places:
            del self._lines[place.tenant]
        if not self._lines:
            self._clock = 0.0

    def serve(self, place: Place[T]) -> None:
        """Wait no more, and be charged for it. The place must wait; it need not be the next one."""
        line = self._lines[place.tenant]
        line.start += place.cost / line.weight
        self._clock = max(self._clock, line.start)
        self.remove(place)

    def places(self) -> Iterator[Place[T]]:
        """Every place, in no order that means anything."""
        for line in self._lines.values():
            yield from line.places

    def turns(self) -> Iterator[Place[T]]:
        """The order in which they would be served if nothing else came. The queue must not change meanwhile."""
        firsts = ((line, line.places[0]) for line in self._all())
        heads = [(line.start + place.cost / line.weight, place.order, line, 0) for line, place in firsts]
        heapq.heapify(heads)
        while heads:
            tag, _, line, index = heads[0]
            yield line.places[index]
            index += 1
            if index == len(line.places):
                heapq.heappop(heads)
            else:
                place = line.places[index]
                heapq.heapreplace(heads, (tag + place.cost / line.weight, place.order, line, index))

    def cost_ahead(self, place: Place[T]) -> float:
        """Cost of about what would be served before ``place``, which waits, if nothing else came: of other tenants what
        their shares are up to its tag, whole requests or not."""
        own = self._lines[place.tenant]
        before = sum(p.cost for p in own.places[: own.index(place)])
        tag = own.start + (before + place.cost) / own.weight
        others = (line for line in self._all() if line is not own)
        return before + sum(min(line.cost, max(0.0, tag - line.start) * line.weight) for line in others)

    def last_of(self, tenant: str) -> Place[T]:
        """The tenant's place that would be served last; it must wait for something."""
        return self._lines[tenant].places[-1]

    def last_of_longest(self) -> Place[T]:
        """The last place of the tenant whose wait is the longest for its weight: who is to give way when no more can
        wait, so that one tenant's flood costs the others nothing. Something must wait."""
        return max(self._all(), key=lambda line: (line.cost / line.weight, line.places[-1].order)).places[-1]

    def _all(self) -> Iterator[_Line[T]]:
        return iter(self._lines.values())


@dataclass(slots=True, eq=False)
class _Line(Generic[T]):
    """What one tenant waits for."""

    weight: float
    start: float
    places: list[Place[T]] = field(default_factory=list)  # by order
    cost: float = 0.0
    size: int = 0

    def index(self, place: Place[T]) -> int:
        index = bisect_left(self.places, place.order, key=_order)
        assert self.places[index : index + 1] == [place], f"{place} does not wait"
        return index


def _order(place: Place[T]) -> Order:
    return place.order
