"""Events are the same, however the bytes arrive."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.server_sent_events import EventStream

STREAM = (
    b": keep-alive\n\n"
    b'data: {"a":1}\n\n'
    b"event: message\r\nid: 7\r\ndata:two\r\n\r\n"
    b"data: first line\rdata: second line\r\r"
    b"data\n\n"
    b"data: [DONE]\n\n"
    b"data: never ended"
)
EVENTS = [b'{"a":1}', b"two", b"first line\nsecond line", b"", b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_division_of_the_bytes_gives_the_same_events(cuts: list[int]) -> None:
    stream, events = EventStream(), []
    places = [0, *sorted(cuts), len(STREAM)]

    for begin, end in pairwise(places):
        events += stream.push(STREAM[begin:end])

    assert events == EVENTS
