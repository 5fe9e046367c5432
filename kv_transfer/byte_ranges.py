"""Which bytes of one memory are in a set? Ranges that are taken out and put back in.

Invariant: ranges are kept ascending, not empty, and never touch each other; so a set of bytes has one form only, and
what is taken in order from a long range costs one comparison.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray


class ByteRanges:
    """A set of byte offsets. Everything costs O(log n) in the number of ranges, beside the shift of a list."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """``ranges`` are (first, end), in any order; they may touch, but not overlap."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(ranges):
            if self._ends and self._ends[-1] == start:
                self._ends[-1] = end
            elif end > start:
                assert not self._ends or self._ends[-1] < start, "ranges overlap"
                self._starts.append(start)
                self._ends.append(end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(first, end) of each range, ascending."""
        return iter(zip(self._starts, self._ends, strict=True))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteRanges) and (self._starts, self._ends) == (other._starts, other._ends)

    __hash__ = None  # type: ignore[assignment]  # it changes

    @property
    def num_bytes(self) -> int:
        return sum(self._ends) - sum(self._starts)

    def copy(self) -> ByteRanges:
        other = ByteRanges()
        other._starts, other._ends = self._starts.copy(), self._ends.copy()
        return other

    def take(self, start: int, end: int) -> bool:
        """Remove the bytes ``start .. end - 1``; False, changing nothing, unless every one of them was in the set."""
        i = bisect_right(self._starts, start) - 1
        if i < 0 or end > self._ends[i] or end <= start:
            return False
        if start > self._starts[i]:
            if end < self._ends[i]:
                self._starts.insert(i + 1, end)
                self._ends.insert(i, start)
            else:
                self._ends[i] = start
        elif end < self._ends[i]:
            self._starts[i] = end
        else:
            del self._starts[i], self._ends[i]
        return True

    def without(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> ByteRanges | None:
        """A set that lacks the bytes of those many ranges; None unless every one of them was here, once.

        What ``take`` of one after the other leaves, in a tenth of the time for hundreds.
        """
        order = np.argsort(starts)
        starts, ends = starts[order], ends[order]
        ours, our_ends = np.array((self._starts, self._ends), dtype=np.int64)
        within = np.searchsorted(ours, starts, side="right") - 1
        if (within < 0).any() or (ends <= starts).any() or (ends > our_ends[within]).any():
            return None
        if (starts[1:] < ends[:-1]).any():
            return None  # a byte twice
        # A range of what is left begins where one of ours began or a taken one ended, and ends where one of ours
        # ended or a taken one began: in ascending order the beginnings and the ends are pairs.
        firsts, lasts = np.sort(np.concatenate((ours, ends))), np.sort(np.concatenate((our_ends, starts)))
        some = firsts < lasts
        left = ByteRanges()
        left._starts, left._ends = firsts[some].tolist(), lasts[some].tolist()
        return left

    def put(self, start: int, end: int) -> None:
        """Add bytes of which none is in the set."""
        assert start < end, "an empty range"
        i = bisect_left(self._starts, start)
        assert i == 0 or self._ends[i - 1] <= start, "a byte is put twice"
        assert i == len(self._starts) or end <= self._starts[i], "a byte is put twice"
        if i < len(self._starts) and self._starts[i] == end:
            end = self._ends[i]
            del self._starts[i], self._ends[i]
        if i > 0 and self._ends[i - 1] == start:
            self._ends[i - 1] = end
        else:
            self._starts.insert(i, start)
            self._ends.insert(i, end)

    def overlap(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of ``start .. end - 1`` that are in the set, ascending."""
        i = max(0, bisect_right(self._starts, start) - 1)
        while i < len(self._starts) and self._starts[i] < end:
            first, last = max(start, self._starts[i]), min(end, self._ends[i])
            if first < last:
                yield first, last
            i += 1

    def discard(self, start: int, end: int) -> None:
        """Remove whatever of ``start .. end - 1`` is in the set."""
        for first, last in list(self.overlap(start, end)):
            self.take(first, last)
