from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.spans import Spans
from kv_transfer.transport import Span, Strip, Strips

strip = st.builds(Strip, st.integers(0, 2**62), st.integers(0, 2**62), st.integers(1, 2**40))


@given(st.lists(strip, max_size=8), st.integers(-9, 9), st.integers(-9, 9))
def test_a_table_is_the_sequence_that_it_was_made_of(them: list[Strip], first: int, stop: int) -> None:
    table = Strips(them)
    assert list(table) == them
    assert table == them
    assert tuple(them) == table
    assert table[first:stop] == them[first:stop]
    assert [table[i] for i in range(len(table))] == them
    assert hash(table) == hash(tuple(them))
    assert table.num_bytes == sum(one.num_bytes for one in them)
    assert Spans.of(table) == [Span(one.dst, one.num_bytes) for one in them]


def test_tables_of_other_runs_or_of_other_numbers_are_not_equal() -> None:
    table = Strips([Strip(1, 2, 3)])
    assert table != Strips([Strip(1, 2, 4)])
    assert table != (Strip(1, 2, 3),) * 2
    assert table != "a text"
    assert Spans() != Strips()


def test_a_table_is_indexed_like_a_tuple() -> None:
    table = Spans([Span(0, 1), Span(4, 2)])
    assert table[-1] == Span(4, 2)
    assert all(type(number) is int for number in (table[0].offset, next(iter(table)).num_bytes))
    with pytest.raises(IndexError):
        table[2]
