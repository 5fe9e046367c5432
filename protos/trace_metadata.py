"""How does a trace cross a gRPC call? As ``traceparent`` in its metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from core.tracing import TRACEPARENT, TraceContext


def trace_metadata(trace: TraceContext | None) -> tuple[tuple[str, str], ...] | None:
    """What a call within ``trace`` says; None: nothing, it is not traced."""
    return None if trace is None else ((TRACEPARENT, str(trace)),)


def trace_of(metadata: Iterable[Any] | None) -> TraceContext | None:
    """The span that made a call, of its metadata's pairs; None: it named none."""
    for key, value in metadata or ():
        if key == TRACEPARENT and isinstance(value, str):
            return TraceContext.parse(value)
    return None
