"""Which trace does a piece of work belong to, and what is a span? W3C's trace context, and spans as plain records.

A span is recorded when it has ended, from instants that were noted anyway: nothing is opened and closed on the way of a
request, so a process that traces nothing does nothing. Who ships spans is a ``Tracer``; see cluster/otlp.py.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

TRACEPARENT = "traceparent"  # the header of HTTP, and the key of gRPC's metadata
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span as others refer to it: its trace, itself, and whether it is to be kept."""

    trace_id: str  # 32 lower-case hexadecimal digits
    span_id: str  # 16
    sampled: bool = True

    @classmethod
    def parse(cls, traceparent: str) -> TraceContext | None:
        """Of a ``traceparent``; None for what is none (W3C: then it is as if nobody had sent one)."""
        found = _TRACEPARENT.fullmatch(traceparent.strip())
        if found is None:
            return None
        version, trace_id, span_id, flags, more = found.groups()
        if version == "ff" or trace_id == _NO_TRACE or span_id == _NO_SPAN or (version == "00" and more):
            return None
        return cls(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))

    @classmethod
    def new(cls) -> TraceContext:
        """The first span of a new trace."""
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    def child(self) -> TraceContext:
        """A new span in the same trace."""
        return TraceContext(self.trace_id, secrets.token_hex(8), self.sampled)

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


class SpanKind(StrEnum):
    """Which side of a call between processes a span is."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


AttributeValue = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Span:
    """Work that has ended. Instants are on the process's Clock."""

    name: str
    context: TraceContext
    parent: TraceContext | None
    began_at: float
    ended_at: float
    kind: SpanKind = SpanKind.INTERNAL
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    error: str = ""  # why it failed; empty: it did not


class Tracer(Protocol):
    """Takes spans. From any thread; never blocks and never raises."""

    def record(self, span: Span) -> None:
        """The span has ended."""
        ...


class NoTracer:
    """Keeps nothing: tracing is off."""

    def record(self, span: Span) -> None:
        return


@dataclass(frozen=True, slots=True)
class Tracing:
    """Who takes this process's spans, and which requests are traced. ``sample_ratio`` None: none is."""

    tracer: Tracer = field(default_factory=NoTracer)
    sample_ratio: float | None = None

    def root(self, parent: TraceContext | None) -> TraceContext | None:
        """A request's own span; ``parent`` is the client's, if it named one. None: the request is not traced.

        The client's word counts; if it said nothing, so large a share is traced as ``sample_ratio`` says.
        """
        if self.sample_ratio is None:
            return None
        if parent is not None:
            return parent.child() if parent.sampled else None
        root = TraceContext.new()
        return root if int(root.trace_id[16:], 16) < self.sample_ratio * (1 << 64) else None


TRACING_OFF = Tracing()


class SpanLog:
    """Keeps every span, for tests."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def record(self, span: Span) -> None:
        self.spans.append(span)


def record_steps(tracer: Tracer, parent: TraceContext, began_at: float, steps: Mapping[str, float]) -> None:
    """Spans for what was done one after the other from ``began_at`` on: name |-> seconds; none for what took none."""
    for name, seconds in steps.items():
        if seconds > 0:
            tracer.record(Span(name, parent.child(), parent, began_at, began_at + seconds))
        began_at += seconds
