"""The chunks of one worker, sorted by the gateway that reads them.

A decode worker makes thousands of tokens a second and Python's gRPC does not make as many messages: everything that
is published for one gateway before its stream runs again travels as one ``OutputBatch``, in order of publishing. In
practice that is one message for each engine step. When the gateway reads late, what has come for a sequence meanwhile
travels as one chunk.

A gateway has one stream; a second one replaces the first. A gateway whose stream ends, or that falls ``max_pending``
messages behind, is gone: ``on_gone`` is called once, so that its sequences free their pages.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable

from core.request import GatewayId, SequenceFailure, SequenceId, TokenChunk, joined_chunk
from protos import wire
from protos import worker_pb2 as pb

logger = logging.getLogger(__name__)

MAX_PENDING = 100_000  # chunks; a gateway so far behind does not read


class OutputStreams:
    """Thread-safe to publish to; read on the event loop it was made on."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_gone: Callable[[GatewayId], None],
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._loop = loop
        self._on_gone = on_gone
        self._max_pending = max_pending
        self._lock = threading.Lock()
        self._streams: dict[GatewayId, _Stream] = {}

    def has(self, gateway_id: GatewayId) -> bool:
        """True while the gateway reads its stream."""
        return gateway_id in self._streams

    def publish(self, gateway_id: GatewayId, item: TokenChunk | SequenceFailure) -> None:
        """Queue ``item`` for its gateway; dropped if the gateway is gone (its sequences are being aborted)."""
        with self._lock:
            stream = self._streams.get(gateway_id)
            if stream is None:
                return
            stream.pending.append(item)
            ring = not stream.rung
            stream.rung = True
            too_far = len(stream.pending) > self._max_pending
        if ring or too_far:
            self._loop.call_soon_threadsafe(stream.wake.set)
        if too_far:
            logger.error("gateway %s is %d chunks behind: dropped", gateway_id, self._max_pending)
            stream.closed = True

    async def read(self, gateway_id: GatewayId) -> AsyncIterator[pb.OutputBatch]:
        """Every chunk for ``gateway_id`` from now on, until the reader goes away."""
        stream = _Stream()
        with self._lock:
            before = self._streams.get(gateway_id)
            self._streams[gateway_id] = stream
        if before is not None:
            before.closed = True
            before.wake.set()
        try:
            yield pb.OutputBatch()  # an empty first message tells the gateway that it may send sequences
            while True:
                await stream.wake.wait()
                stream.wake.clear()
                with self._lock:
                    items, stream.pending, stream.rung = stream.pending, [], False
                if items:
                    yield _batch(items)
                if stream.closed and not stream.pending:
                    return
        finally:
            with self._lock:
                current = self._streams.get(gateway_id) is stream
                if current:
                    del self._streams[gateway_id]
            if current:
                self._on_gone(gateway_id)

    def close(self) -> None:
        """End every stream after what is pending has been read."""
        with self._lock:
            streams = list(self._streams.values())
        for stream in streams:
            stream.closed = True
            self._loop.call_soon_threadsafe(stream.wake.set)


class _Stream:
    def __init__(self) -> None:
        self.pending: list[TokenChunk | SequenceFailure] = []
        self.wake = asyncio.Event()
        self.rung = False  # wake was scheduled since pending was last taken
        self.closed = False


def _batch(items: list[TokenChunk | SequenceFailure]) -> pb.OutputBatch:
    batch = pb.OutputBatch()
    runs: list[list[TokenChunk]] = []  # of chunks that can travel as one, in the order of their first ones
    last_run: dict[SequenceId, list[TokenChunk]] = {}
    for item in items:
        if isinstance(item, SequenceFailure):
            batch.failures.append(wire.failure_to_message(item))
            continue
        run = last_run.get(item.sequence_id)
        if run is not None and _follows(item, run[-1]):
            run.append(item)
        else:
            last_run[item.sequence_id] = run = [item]
            runs.append(run)
    for run in runs:
        batch.chunks.append(wire.chunk_to_message(run[0] if len(run) == 1 else joined_chunk(run)))
    return batch


def _follows(chunk: TokenChunk, before: TokenChunk) -> bool:
    """Is it nothing but more tokens? A chunk that ends something, or reports, is the last of its run."""
    is_plain = before.finish_reason is None and before.stats is None
    return is_plain and bool(chunk.token_ids) and chunk.position == before.position + len(before.token_ids)
