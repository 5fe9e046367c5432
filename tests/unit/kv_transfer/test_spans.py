from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ProtocolViolation
from kv_transfer import spans as module
from kv_transfer.run_table import MAX_OFFSET
from kv_transfer.spans import SentTables, Spans, SpanTables, num_bytes_of
from kv_transfer.transport import Span, Strip, Strips

span = st.builds(Span, st.integers(0, MAX_OFFSET), st.integers(1, 2**32 - 1))


@given(st.lists(span))
def test_a_table_comes_back_as_it_was_and_equal_bytes_give_one_object(them: list[Span]) -> None:
    tables = SpanTables()
    packed = Spans(them).packed
    parsed = tables.parse(packed)
    assert parsed == tuple(them)
    assert parsed.num_bytes == num_bytes_of(them) == sum(one.num_bytes for one in them)
    assert tables.parse(bytes(packed)) is parsed


BAD_TABLES = [
    pytest.param(b"x", id="too short"),
    pytest.param(Spans((Span(3, 4),)).packed[:-1], id="cut short"),
    pytest.param(Spans((Span(3, 4), Span(3, 0))).packed, id="an empty span"),
    pytest.param(Spans((Span(MAX_OFFSET + 1, 1),)).packed, id="an offset that no memory has"),
    pytest.param(struct.pack("<QI", 2**64 - 1, 1), id="an offset that would be negative"),
]


@pytest.mark.parametrize("packed", BAD_TABLES)
def test_what_is_no_table_is_refused(packed: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        SpanTables().parse(packed)


def test_no_more_than_so_many_spans_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 4)
    tables, sent = SpanTables(), SentTables()
    first = tables.parse(Spans((Span(0, 1),) * 3).packed)
    again = tables.parse(Spans((Span(1, 1),) * 3).packed)
    assert (tables.parse(first.packed), tables.parse(again.packed)) == (first, again)
    assert tables.parse(first.packed) is not first
    strips = [Strips((Strip(i, i + 1, 2),) * 3) for i in range(3)]
    assert [sent.of(one) for one in strips] == [(Span(i + 1, 2),) * 3 for i in range(3)]
    assert sent.of(strips[2]) is sent.of(strips[2])
