from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_transfer.byte_ranges import ByteRanges

SIZE = 40
bounds = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted).map(tuple).filter(lambda b: b[0] < b[1])


def offsets(ranges: ByteRanges) -> set[int]:
    return {offset for start, end in ranges for offset in range(start, end)}


@given(st.lists(bounds, max_size=6), st.lists(bounds, max_size=6), st.randoms())
def test_without_many_ranges_is_what_taking_each_leaves(
    some: list[tuple[int, int]], taken: list[tuple[int, int]], random: Random
) -> None:
    ranges = ByteRanges()
    for start, end in some:
        ranges.discard(start, end)
        ranges.put(start, end)
    random.shuffle(taken)
    before, left = ranges.copy(), ranges.copy()
    each = [left.take(start, end) for start, end in taken]
    starts, ends = np.array(taken, dtype=np.int64).reshape(-1, 2).T
    assert ranges.without(starts, ends) == (left if all(each) else None)
    assert ranges == before


class AgainstASet(RuleBasedStateMachine):
    """The same acts on ByteRanges and on a set of offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = ByteRanges([(0, 10), (10, 20), (25, SIZE)])
        self.model = {*range(20), *range(25, SIZE)}

    @rule(bounds=bounds)
    def take(self, bounds: tuple[int, int]) -> None:
        wanted = set(range(*bounds))
        assert self.ranges.take(*bounds) == (wanted <= self.model)
        if wanted <= self.model:
            self.model -= wanted

    @rule(bounds=bounds)
    def discard(self, bounds: tuple[int, int]) -> None:
        self.ranges.discard(*bounds)
        self.model -= set(range(*bounds))

    @precondition(lambda self: len(self.model) < SIZE)
    @rule(bounds=bounds)
    def put(self, bounds: tuple[int, int]) -> None:
        if self.model.isdisjoint(range(*bounds)):
            self.ranges.put(*bounds)
            self.model |= set(range(*bounds))

    @rule(bounds=bounds)
    def overlap(self, bounds: tuple[int, int]) -> None:
        found = [offset for start, end in self.ranges.overlap(*bounds) for offset in range(start, end)]
        assert found == sorted(self.model & set(range(*bounds)))

    @invariant()
    def same_bytes_in_one_form(self) -> None:
        assert offsets(self.ranges) == self.model
        assert self.ranges.num_bytes == len(self.model)
        assert bool(self.ranges) == bool(self.model)
        assert all(start < end for start, end in self.ranges)
        assert all(a[1] < b[0] for a, b in pairwise(self.ranges))


TestAgainstASet = AgainstASet.TestCase


@given(st.lists(st.integers(0, 30), unique=True))
def test_ranges_that_touch_are_one_in_whatever_order_they_come(pages: list[int]) -> None:
    ranges = ByteRanges((page * 4, page * 4 + 4) for page in pages)
    assert ranges.num_bytes == 4 * len(pages)
    assert len(ranges) == sum(page - 1 not in pages for page in pages)


def test_nothing_is_not_taken() -> None:
    assert not ByteRanges([(0, 4)]).take(2, 2)


def test_a_copy_is_of_its_own() -> None:
    ranges = ByteRanges([(0, 4)])
    other = ranges.copy()
    other.take(0, 2)
    assert list(ranges) == [(0, 4)]
    assert ranges != other


def test_overlapping_ranges_and_bytes_put_twice_are_bugs_of_ours() -> None:
    with pytest.raises(AssertionError):
        ByteRanges([(0, 4), (3, 6)])
    with pytest.raises(AssertionError):
        ByteRanges([(0, 4)]).put(3, 6)
