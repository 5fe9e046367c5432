from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ProtocolViolation
from kv_transfer.transfer_plan import plan_writes
from kv_transfer.transport import Strip

PAGE_BYTES = 100


@st.composite
def page_tables(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Distinct pages at each end, with stretches that follow each other."""

    def pages(count: int) -> list[int]:
        order = draw(st.permutations(range(count)))
        keep_together = draw(st.integers(1, 8))
        return [page * keep_together + i for page in order for i in range(keep_together)]

    src, dst = pages(draw(st.integers(0, 12))), pages(draw(st.integers(0, 12)))
    count = min(len(src), len(dst))
    return src[:count], dst[:count]


@given(tables=page_tables(), max_pages=st.integers(1, 9), max_strips=st.integers(1, 5))
def test_every_page_goes_to_its_place_exactly_once_in_order(
    tables: tuple[list[int], list[int]], max_pages: int, max_strips: int
) -> None:
    src, dst = tables
    pieces = plan_writes(src, dst, PAGE_BYTES, max_pages * PAGE_BYTES, max_strips)
    strips = [strip for piece in pieces for strip in piece]
    moved = [
        ((strip.src + at) // PAGE_BYTES, (strip.dst + at) // PAGE_BYTES)
        for strip in strips
        for at in range(0, strip.num_bytes, PAGE_BYTES)
    ]
    assert all((strip.src % PAGE_BYTES, strip.dst % PAGE_BYTES) == (0, 0) for strip in strips)
    assert moved == list(zip(src, dst, strict=True))


@given(tables=page_tables(), max_pages=st.integers(1, 9), max_strips=st.integers(1, 5))
def test_pieces_keep_their_bounds_and_are_not_empty(
    tables: tuple[list[int], list[int]], max_pages: int, max_strips: int
) -> None:
    pieces = plan_writes(*tables, PAGE_BYTES, max_pages * PAGE_BYTES, max_strips)
    assert all(1 <= len(piece) <= max_strips for piece in pieces)
    assert all(sum(strip.num_bytes for strip in piece) <= max_pages * PAGE_BYTES for piece in pieces)
    assert all(strip.num_bytes >= 1 for piece in pieces for strip in piece)


def test_pages_that_follow_each_other_at_both_ends_become_one_run() -> None:
    assert plan_writes([4, 5, 6], [10, 11, 12], PAGE_BYTES) == [(Strip(400, 1000, 300),)]


def test_a_gap_at_either_end_parts_runs_within_one_piece() -> None:
    assert plan_writes([4, 5, 6], [10, 11, 13], PAGE_BYTES) == [(Strip(400, 1000, 200), Strip(600, 1300, 100))]
    assert plan_writes([4, 5, 9], [10, 11, 12], PAGE_BYTES) == [(Strip(400, 1000, 200), Strip(900, 1200, 100))]


def test_a_page_larger_than_the_bound_is_a_piece_of_its_own() -> None:
    assert plan_writes([0, 1], [0, 1], PAGE_BYTES, max_bytes=1) == [(Strip(0, 0, 100),), (Strip(100, 100, 100),)]


def test_unequal_sides_raise() -> None:
    with pytest.raises(ProtocolViolation):
        plan_writes([0, 1], [0], PAGE_BYTES)
