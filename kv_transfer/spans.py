"""Where do a write's bytes go, as both transports say it on the wire, and how is a table of spans known again?

    packed     for each span: offset u64 | bytes u32, little endian

A prompt's pages are the same in every layer, so a link carries few tables, each many times; with 16-token pages a table
may have hundreds of spans. ``SpanTables`` gives the same object for the same bytes: what somebody found out about a
table (its bytes, that a session may take it, the index of its rows on a device) can be kept with the object.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import cached_property

from core.errors import ProtocolViolation
from kv_transfer.transport import Span, Strip

SPAN = struct.Struct("<QI")
MAX_REMEMBERED = 1 << 16  # spans, of all tables of a link together


class Spans(tuple[Span, ...]):
    """A table: spans of one layer at one end."""

    @classmethod
    def of(cls, strips: Iterable[Strip]) -> Spans:
        """Where ``strips`` go."""
        return cls(Span(strip.dst, strip.num_bytes) for strip in strips)

    @classmethod
    def parse(cls, packed: bytes) -> Spans:
        """Raises ProtocolViolation for an empty span, or for what is no whole number of spans."""
        if len(packed) % SPAN.size:
            raise ProtocolViolation(f"spans in {len(packed)} bytes")
        spans = cls(Span(offset, num_bytes) for offset, num_bytes in SPAN.iter_unpack(packed))
        if not all(span.num_bytes for span in spans):
            raise ProtocolViolation("a write with an empty span")
        return spans

    @cached_property
    def num_bytes(self) -> int:
        """Of one layer."""
        return sum(span.num_bytes for span in self)

    @cached_property
    def packed(self) -> bytes:
        return b"".join(SPAN.pack(span.offset, span.num_bytes) for span in self)


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
    """Where the strips of a link's writes go. A session's writes of different layers share their strips."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Sequence[Strip], Spans]] = {}  # id of strips |-> these, which keeps the id theirs
        self._num_spans = 0

    def of(self, strips: Sequence[Strip]) -> Spans:
        known = self._known.get(id(strips))
        if known is not None:
            return known[1]
        spans = Spans.of(strips)
        if self._num_spans + len(spans) > MAX_REMEMBERED:
            self._known, self._num_spans = {}, 0
        self._num_spans += len(spans)
        self._known[id(strips)] = (strips, spans)
        return spans


def num_bytes_of(spans: Iterable[Span]) -> int:
    """Bytes of the spans of one layer; of a table that was asked before it is known."""
    return spans.num_bytes if isinstance(spans, Spans) else sum(span.num_bytes for span in spans)
