from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from core.prefix_hash import PageHash, page_hashes
from engine.page_allocator import CacheChanges, PageAllocator


def names(*letters: str) -> list[PageHash]:
    return [PageHash(letter.encode()) for letter in letters]


def take(allocator: PageAllocator, num_pages: int) -> list[int]:
    pages = allocator.allocate(num_pages)
    assert pages is not None
    return pages


def cache(allocator: PageAllocator, *letters: str) -> list[int]:
    """Pages that hold a known prefix and that nobody uses."""
    pages = take(allocator, len(letters))
    for page, name in zip(pages, names(*letters), strict=True):
        allocator.register(page, name)
    allocator.release(pages)
    return pages


def test_allocation_is_all_or_nothing() -> None:
    allocator = PageAllocator(4, 16)
    take(allocator, 3)
    assert allocator.allocate(2) is None
    assert allocator.num_free == 1
    allocator.check_integrity()


def test_no_pages_are_a_valid_request() -> None:
    allocator = PageAllocator(1, 16)
    take(allocator, 1)
    assert allocator.allocate(0) == []


def test_a_free_run_that_is_long_enough_is_preferred_to_lower_scattered_pages() -> None:
    allocator = PageAllocator(10, 16)
    pages = take(allocator, 10)
    allocator.release([pages[0], pages[2], pages[5], pages[6], pages[7]])
    assert take(allocator, 3) == [5, 6, 7]


def test_scattered_pages_come_in_ascending_order() -> None:
    allocator = PageAllocator(6, 16)
    pages = take(allocator, 6)
    allocator.release([pages[5], pages[1], pages[3]])
    assert take(allocator, 3) == [1, 3, 5]


def test_a_released_prefix_is_found_again_and_shared() -> None:
    allocator = PageAllocator(4, 16)
    pages = cache(allocator, "a", "b")
    assert (allocator.num_cached, allocator.num_free, allocator.whole()) == (2, 4, True)
    assert allocator.match_prefix(names("a", "b", "c")) == pages
    assert allocator.match_prefix(names("a")) == pages[:1]
    assert (allocator.num_cached, allocator.num_free, allocator.whole()) == (0, 2, False)
    allocator.release(pages)
    assert allocator.num_free == 3  # page "a" has one more holder
    allocator.release(pages[:1])
    assert allocator.whole()


def test_a_match_stops_at_the_first_miss() -> None:
    allocator = PageAllocator(4, 16)
    cache(allocator, "a", "b", "c")
    assert len(allocator.match_prefix(names("a", "x", "c"))) == 1
    assert allocator.match_prefix(names("x", "b")) == []


def test_free_pages_are_taken_before_cached_ones() -> None:
    allocator = PageAllocator(4, 16)
    pages = cache(allocator, "a", "b")
    assert set(take(allocator, 2)).isdisjoint(pages)
    assert allocator.num_cached == 2


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    allocator = PageAllocator(3, 16)
    cache(allocator, "a")
    cache(allocator, "b")
    cache(allocator, "c")
    allocator.release(allocator.match_prefix(names("a")))
    take(allocator, 1)
    assert allocator.match_prefix(names("b")) == []
    assert len(allocator.match_prefix(names("a"))) == 1


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    allocator = PageAllocator(3, 16)
    pages = cache(allocator, "a", "b", "c")
    take(allocator, 1)
    assert allocator.match_prefix(names("a", "b", "c")) == pages[:2]


def test_a_page_that_is_used_is_never_evicted() -> None:
    allocator = PageAllocator(2, 16)
    cache(allocator, "a")
    held = allocator.match_prefix(names("a"))
    assert allocator.allocate(2) is None
    assert set(take(allocator, 1)).isdisjoint(held)


def test_of_two_pages_with_one_name_the_first_stays_known() -> None:
    allocator = PageAllocator(2, 16)
    first, second = take(allocator, 2)
    allocator.register(first, names("a")[0])
    allocator.register(second, names("a")[0])
    allocator.release([first, second])
    assert allocator.num_cached == 1
    assert allocator.match_prefix(names("a")) == [first]
    allocator.check_integrity()


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    allocator = PageAllocator(2, 16, prefix_cache=False)
    cache(allocator, "a")
    assert allocator.num_cached == 0
    assert allocator.match_prefix(names("a")) == []


def test_releasing_twice_and_registering_a_free_page_are_our_bugs() -> None:
    allocator = PageAllocator(2, 16)
    pages = take(allocator, 1)
    allocator.release(pages)
    with pytest.raises(AssertionError):
        allocator.release(pages)
    with pytest.raises(AssertionError):
        allocator.register(pages[0], names("a")[0])
    allocator.check_integrity()


class AllocatorMachine(RuleBasedStateMachine):
    """Random holders of block tables, against a model of who holds what. Prompts are over two letters and pages hold
    two tokens, so prefixes collide all the time."""

    NUM_PAGES = 12
    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(self.NUM_PAGES, 2)
        self.refs: dict[int, int] = dict.fromkeys(range(self.NUM_PAGES), 0)
        self.contents: dict[int, tuple[int, ...]] = {}  # registered page -> the tokens that its prefix stands for

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), computed=st.booleans())
    def start(self, tokens: list[int], computed: bool) -> object:
        hashes = page_hashes(tokens, 2)
        free_before = self.allocator.num_free
        matched = self.allocator.match_prefix(hashes)
        for index, page in enumerate(matched):
            assert self.contents[page] == tuple(tokens[: 2 * index + 2]), "a hit gives another prefix's page"
        fresh = self.allocator.allocate(-(-len(tokens) // 2) - len(matched))
        if fresh is None:
            self.allocator.release(matched)
            assert self.allocator.num_free == free_before
            return multiple()
        assert fresh == sorted(set(fresh))
        assert all(self.refs[page] == 0 for page in fresh), "a used page is handed out"
        table = matched + fresh
        for page in table:
            self.refs[page] += 1
        for page in fresh:
            self.contents.pop(page, None)
        if computed:
            for index in range(len(matched), len(hashes)):
                known = self.allocator.match_prefix(hashes[: index + 1])
                self.allocator.release(known)
                self.allocator.register(table[index], hashes[index])
                if len(known) <= index:
                    self.contents[table[index]] = tuple(tokens[: 2 * index + 2])
        return table

    @rule(target=tables, table=tables)
    def share(self, table: list[int]) -> object:
        if any(self.refs[page] == 0 for page in table):
            return multiple()
        self.allocator.retain(table)
        for page in table:
            self.refs[page] += 1
        return table

    @rule(table=consumes(tables))
    def stop(self, table: list[int]) -> None:
        self.allocator.release(table)
        for page in table:
            self.refs[page] -= 1

    @invariant()
    def the_books_are_right(self) -> None:
        self.allocator.check_integrity()
        used = sum(refs > 0 for refs in self.refs.values())
        assert self.allocator.num_free == self.NUM_PAGES - used
        assert self.allocator.whole() == (used == 0)


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestAllocatorMachine = AllocatorMachine.TestCase


def test_changes_tell_once_what_became_known_or_unknown() -> None:
    allocator = PageAllocator(2, 4)
    first, second, third = (PageHash(bytes([i]) * 16) for i in range(3))
    pages = allocator.allocate(2)
    assert pages is not None
    allocator.register(pages[0], first)
    allocator.register(pages[1], second)
    assert allocator.take_changes() == CacheChanges(stored=(first, second))
    assert allocator.take_changes() == CacheChanges()
    allocator.release(pages)
    (page,) = allocator.allocate(1) or ()
    allocator.register(page, third)
    assert allocator.take_changes() == CacheChanges(stored=(third,), removed=(second,))


def test_a_page_that_came_and_went_between_two_reports_is_in_neither() -> None:
    allocator = PageAllocator(1, 4)
    pages = allocator.allocate(1) or []
    allocator.register(pages[0], PageHash(b"0" * 16))
    allocator.release(pages)
    assert allocator.allocate(1) is not None
    assert allocator.take_changes() == CacheChanges()
