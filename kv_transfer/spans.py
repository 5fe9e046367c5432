"""Where do a write's bytes go, as both transports say it on the wire, and how is a table of spans known again?

    packed     for each span: offset u64 (at most 2^62) | bytes u32, little endian

A prompt's pages are the same in every layer, so a link carries few tables, each many times; with 16-token pages a table
may have hundreds of spans. ``SpanTables`` gives the same object for the same bytes: what somebody found out about a
table (its bytes, that a session may take it, the index of its rows on a device) can be kept with the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from core.errors import ProtocolViolation
from kv_transfer.run_table import MAX_OFFSET, RunTable
from kv_transfer.transport import Span, Strips

_SPAN = np.dtype([("offset", "<u8"), ("num_bytes", "<u4")])
SPAN_BYTES = _SPAN.itemsize
MAX_REMEMBERED = 1 << 16  # spans, of all tables of a link together


class Spans(RunTable[Span]):
    """A table: spans of one layer at one end."""

    run = Span
    columns = ("offset", "num_bytes")

    @classmethod
    def of(cls, strips: Strips) -> Spans:
        """Where ``strips`` go."""
        return cls.of_rows(strips.rows[:, 1:])

    @classmethod
    def parse(cls, packed: bytes) -> Spans:
        """Raises ProtocolViolation for an empty span, an offset that no memory has, or no whole number of spans."""
        if len(packed) % SPAN_BYTES:
            raise ProtocolViolation(f"spans in {len(packed)} bytes")
        them = np.frombuffer(packed, dtype=_SPAN)
        rows = np.empty((len(them), 2), dtype=np.int64)
        rows[:, 0], rows[:, 1] = them["offset"], them["num_bytes"]
        if not rows[:, 1].all():
            raise ProtocolViolation("a write with an empty span")
        if len(rows) and int(them["offset"].max()) > MAX_OFFSET:
            raise ProtocolViolation(f"a write beyond byte {MAX_OFFSET}")
        return cls.of_rows(rows)

    @cached_property
    def num_bytes(self) -> int:
        """Of one layer."""
        return int(self.rows[:, 1].sum())

    @cached_property
    def packed(self) -> bytes:
        them = np.empty(len(self), dtype=_SPAN)
        them["offset"], them["num_bytes"] = self.rows[:, 0], self.rows[:, 1]
        return them.tobytes()


class SpanTables:
    """The tables that came on one link. Threads may share it."""

    def __init__(self) -> None:
        self._known: dict[bytes, Spans] = {}
        self._num_spans = 0

    def parse(self, packed: bytes) -> Spans:
        """As ``Spans.parse``; while it is remembered, the object that equal bytes gave before."""
        known = self._known.get(packed)
        if known is not None:
            return known
        spans = Spans.parse(packed)
        if self._num_spans + len(spans) > MAX_REMEMBERED:
            self._known, self._num_spans = {}, 0
        self._num_spans += len(spans)
        return self._known.setdefault(packed, spans)


class SentTables:
    """Where the strips of a link's writes go. A session's writes of different layers share their strips. Threads may
    share it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Strips, Spans]] = {}  # id of strips |-> these, which keeps the id theirs
        self._num_spans = 0

    def of(self, strips: Strips) -> Spans:
        known = self._known.get(id(strips))
        if known is not None:
            return known[1]
        spans = Spans.of(strips)
        if self._num_spans + len(spans) > MAX_REMEMBERED:
            self._known, self._num_spans = {}, 0
        self._num_spans += len(spans)
        self._known[id(strips)] = (strips, spans)
        return spans


def spans_of(spans: Sequence[Span]) -> Spans:
    """As a table, uncopied if it is one."""
    return spans if isinstance(spans, Spans) else Spans(spans)


def num_bytes_of(spans: Sequence[Span]) -> int:
    """Bytes of the spans of one layer; of a table that was asked before it is known."""
    return spans_of(spans).num_bytes
