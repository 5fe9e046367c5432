from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ProtocolViolation
from kv_transfer.transfer_plan import plan_writes
from kv_transfer.transport import PageRun

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


@given(tables=page_tables(), max_pages=st.integers(1, 9), max_runs=st.integers(1, 5))
def test_every_page_goes_to_its_place_exactly_once_in_order(
    tables: tuple[list[int], list[int]], max_pages: int, max_runs: int
) -> None:
    src, dst = tables
    pieces = plan_writes(src, dst, PAGE_BYTES, max_pages * PAGE_BYTES, max_runs)
    runs = [run for piece in pieces for run in piece]
    moved = [(run.src_page + i, run.dst_page + i) for run in runs for i in range(run.num_pages)]
    assert moved == list(zip(src, dst, strict=True))


@given(tables=page_tables(), max_pages=st.integers(1, 9), max_runs=st.integers(1, 5))
def test_pieces_keep_their_bounds_and_are_not_empty(
    tables: tuple[list[int], list[int]], max_pages: int, max_runs: int
) -> None:
    pieces = plan_writes(*tables, PAGE_BYTES, max_pages * PAGE_BYTES, max_runs)
    assert all(1 <= len(piece) <= max_runs for piece in pieces)
    assert all(1 <= sum(run.num_pages for run in piece) <= max_pages for piece in pieces)
    assert all(run.num_pages >= 1 for piece in pieces for run in piece)


def test_pages_that_follow_each_other_at_both_ends_become_one_run() -> None:
    assert plan_writes([4, 5, 6], [10, 11, 12], PAGE_BYTES) == [(PageRun(4, 10, 3),)]


def test_a_gap_at_either_end_parts_runs_within_one_piece() -> None:
    assert plan_writes([4, 5, 6], [10, 11, 13], PAGE_BYTES) == [(PageRun(4, 10, 2), PageRun(6, 13, 1))]
    assert plan_writes([4, 5, 9], [10, 11, 12], PAGE_BYTES) == [(PageRun(4, 10, 2), PageRun(9, 12, 1))]


def test_a_page_larger_than_the_bound_is_a_piece_of_its_own() -> None:
    assert plan_writes([0, 1], [0, 1], PAGE_BYTES, max_write_bytes=1) == [(PageRun(0, 0, 1),), (PageRun(1, 1, 1),)]


def test_unequal_sides_raise() -> None:
    with pytest.raises(ProtocolViolation):
        plan_writes([0, 1], [0], PAGE_BYTES)
