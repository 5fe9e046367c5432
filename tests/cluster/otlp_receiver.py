"""What an OpenTelemetry collector is to the service: a gRPC server that keeps the spans of all processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc


@dataclass(frozen=True)
class ReceivedSpan:
    """One span as it came. Instants are Unix nanoseconds."""

    process: str
    trace_id: str
    span_id: str
    parent_id: str
    name: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    failed: bool


@dataclass
class OtlpReceiver(rpc.TraceServiceServicer):
    """Everything that was sent."""

    endpoint: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)

    async def Export(  # noqa: N802
        self, request: pb.ExportTraceServiceRequest, context: grpc.aio.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            process = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.instance.id")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        ReceivedSpan(
                            process,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.name,
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes},
                            span.status.code == 2,
                        )
                    )
        return pb.ExportTraceServiceResponse()

    async def wait_for(self, names: set[str], timeout_s: float = 20.0) -> None:
        """Until spans of all these names came."""
        async with asyncio.timeout(timeout_s):
            while names - {span.name for span in self.spans}:
                await asyncio.sleep(0.02)

    def tree(self, trace_id: str) -> Iterator[tuple[int, ReceivedSpan]]:
        """Depth and span, parents before their children, in order of time."""
        mine = sorted((s for s in self.spans if s.trace_id == trace_id), key=lambda s: (s.began_ns, -s.ended_ns))
        ids = {s.span_id for s in mine}

        def below(parent: str | None, depth: int) -> Iterator[tuple[int, ReceivedSpan]]:
            for span in mine:
                if (span.parent_id not in ids) if parent is None else (span.parent_id == parent):
                    yield depth, span
                    yield from below(span.span_id, depth + 1)

        return below(None, 0)


@asynccontextmanager
async def otlp_receiver() -> AsyncIterator[OtlpReceiver]:
    """A collector at ``endpoint``."""
    receiver, server = OtlpReceiver(), grpc.aio.server()
    rpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    receiver.endpoint = f"http://127.0.0.1:{port}"
    try:
        yield receiver
    finally:
        await server.stop(grace=None)
