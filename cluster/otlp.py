"""How do spans leave a process? Over OTLP to an OpenTelemetry collector. Every call of OpenTelemetry is in this file.

The SDK is the extra ``otel`` and is loaded only where ``tracing.endpoint`` is set. Its tracer is told when spans began
and ended, and which ids they have: ours, which travelled to other processes before (``core/tracing.py``). Spans wait in
the SDK's queue and are sent from its thread; when the collector is away or slow they are dropped, and it logs that.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster.config import TracingConfig
from cluster.version import version
from core.clock import Clock, unix_time
from core.errors import InvalidConfig
from core.tracing import TRACING_OFF, Span, SpanKind, TraceContext, Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.trace import SpanContext

_MAX_WAITING = 8192  # spans; about a thousand requests
_MAX_BATCH = 512  # of one message
_SEND_EVERY_MS = 1000
_SEND_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0


class OtlpTracer:
    """A ``Tracer`` that sends spans to a collector. ``close`` sends what is left."""

    def __init__(self, config: TracingConfig, clock: Clock, resource: Mapping[str, str]) -> None:
        """``resource``: what all spans of this process share. Raises ``InvalidConfig`` if the SDK is not installed."""
        assert config.endpoint is not None, "else there is nothing to send to"
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import SpanLimits, TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        except ImportError as error:
            raise InvalidConfig(
                "tracing.endpoint", f"needs the extra otel: pip install prfaas[otel] ({error})"
            ) from error
        self._clock = clock
        self._trace = trace
        self._ids = _OurIds()
        shared = {"service.name": config.service_name, "service.version": version(), **resource}
        self._provider: TracerProvider = TracerProvider(
            sampler=ALWAYS_ON,  # what is not to be kept is not recorded here
            resource=Resource(shared),
            shutdown_on_exit=False,
            id_generator=_generator(self._ids),
            span_limits=SpanLimits(),
        )
        exporter = OTLPSpanExporter(
            endpoint=config.endpoint, insecure=not config.endpoint.startswith("https:"), timeout=_SEND_TIMEOUT_S
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=_MAX_WAITING,
                schedule_delay_millis=_SEND_EVERY_MS,
                max_export_batch_size=_MAX_BATCH,
                export_timeout_millis=_SEND_TIMEOUT_S * 1000,
            )
        )
        self._tracer = self._provider.get_tracer("prfaas", version())
        self._kinds = {kind: getattr(trace.SpanKind, kind.name) for kind in SpanKind}

    def record(self, span: Span) -> None:
        unix_offset_s = unix_time() - self._clock.now()  # each time: the machine's clock may be set meanwhile
        self._ids.next.context = span.context
        context = None if span.parent is None else self._remote(span.parent)
        started = self._tracer.start_span(
            span.name,
            context=self._trace.set_span_in_context(self._trace.NonRecordingSpan(context)) if context else None,
            kind=self._kinds[span.kind],
            attributes=dict(span.attributes),
            start_time=_nanoseconds(span.began_at + unix_offset_s),
        )
        if span.error:
            started.set_status(self._trace.Status(self._trace.StatusCode.ERROR, span.error))
        started.end(end_time=_nanoseconds(span.ended_at + unix_offset_s))

    def close(self) -> None:
        """Send what waits, for a bounded time; blocks. Later spans are lost."""
        # The SDK's own shutdown waits up to 30 s for a collector that is not there.
        sending = threading.Thread(target=self._provider.shutdown, name="otlp-close", daemon=True)
        sending.start()
        sending.join(_CLOSE_TIMEOUT_S)

    def _remote(self, parent: TraceContext) -> SpanContext:
        return self._trace.SpanContext(
            int(parent.trace_id, 16),
            int(parent.span_id, 16),
            is_remote=True,
            trace_flags=self._trace.TraceFlags(self._trace.TraceFlags.SAMPLED),
        )


class _OurIds:
    """The ids of the span that is being made, on the thread that makes it."""

    def __init__(self) -> None:
        self.next = threading.local()

    def span_id(self) -> int:
        return int(self.next.context.span_id, 16)

    def trace_id(self) -> int:
        return int(self.next.context.trace_id, 16)


def _generator(ids: _OurIds) -> IdGenerator:
    """``ids`` as the SDK wants them: a class of its own, which must not be named before the SDK is loaded."""
    from opentelemetry.sdk.trace.id_generator import IdGenerator

    class Generator(IdGenerator):
        def generate_span_id(self) -> int:
            return ids.span_id()

        def generate_trace_id(self) -> int:
            return ids.trace_id()

    return Generator()


def _nanoseconds(unix_s: float) -> int:
    return round(unix_s * 1e9)


def open_tracing(config: TracingConfig, clock: Clock, resource: Mapping[str, str]) -> tuple[Tracing, OtlpTracer | None]:
    """A process's tracing, and what is to be closed at its end (None: tracing is off)."""
    if config.endpoint is None:
        return TRACING_OFF, None
    tracer = OtlpTracer(config, clock, resource)
    return Tracing(tracer, config.sample_ratio), tracer
