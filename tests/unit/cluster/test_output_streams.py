"""One stream for each gateway: nothing lost, nothing out of order, and a gateway that leaves is noticed."""

from __future__ import annotations

import asyncio
import threading

from cluster.output_streams import OutputStreams
from core.request import GatewayId, Role, SequenceFailure, SequenceId, TokenChunk
from protos import worker_pb2 as pb

G1, G2 = GatewayId("g1"), GatewayId("g2")


def chunk(position: int) -> TokenChunk:
    return TokenChunk(SequenceId("s"), position, (position,))


def make(gone: list[GatewayId], max_pending: int = 1000) -> OutputStreams:
    return OutputStreams(asyncio.get_running_loop(), gone.append, max_pending)


async def read_until(streams: OutputStreams, gateway_id: GatewayId, count: int) -> list[pb.OutputBatch]:
    batches = []
    reader = streams.read(gateway_id)
    async for batch in reader:
        batches.append(batch)
        if sum(len(b.chunks) + len(b.failures) for b in batches) >= count:
            break
    await reader.aclose()  # type: ignore[attr-defined]
    return batches


async def test_what_is_published_together_travels_together_and_in_order() -> None:
    gone: list[GatewayId] = []
    streams = make(gone)
    reading = asyncio.create_task(read_until(streams, G1, 40))
    await asyncio.sleep(0)
    assert streams.has(G1)

    def publish() -> None:
        for position in range(40):
            streams.publish(G1, chunk(position))

    publisher = threading.Thread(target=publish)
    publisher.start()
    publisher.join()
    batches = await reading
    assert [c.position for b in batches for c in b.chunks] == list(range(40))
    assert len(batches) == 2  # the greeting and one message with everything
    assert gone == [G1]
    assert not streams.has(G1)


async def test_each_gateway_gets_its_own_and_a_stranger_nothing() -> None:
    streams = make([])
    first = asyncio.create_task(read_until(streams, G1, 1))
    second = asyncio.create_task(read_until(streams, G2, 1))
    await asyncio.sleep(0)
    streams.publish(G1, chunk(1))
    streams.publish(GatewayId("nobody"), chunk(2))
    streams.publish(G2, SequenceFailure(SequenceId("s"), "why", True, Role.DECODE))
    assert [c.position for b in await first for c in b.chunks] == [1]
    assert [f.message for b in await second for f in b.failures] == ["why"]


async def test_a_second_stream_of_a_gateway_replaces_the_first_without_ending_its_sequences() -> None:
    gone: list[GatewayId] = []
    streams = make(gone)
    old = asyncio.create_task(read_until(streams, G1, 99))
    await asyncio.sleep(0)
    new = asyncio.create_task(read_until(streams, G1, 1))
    await asyncio.sleep(0)
    streams.publish(G1, chunk(7))
    assert [c.position for b in await new for c in b.chunks] == [7]
    assert [len(b.chunks) for b in await old] == [0]
    assert gone == [G1]


async def test_closing_delivers_what_is_pending_first() -> None:
    streams = make([])
    reading = asyncio.create_task(read_until(streams, G1, 99))
    await asyncio.sleep(0)
    streams.publish(G1, chunk(1))
    streams.close()
    assert [c.position for b in await reading for c in b.chunks] == [1]


async def test_a_gateway_too_far_behind_is_dropped() -> None:
    gone: list[GatewayId] = []
    streams = make(gone, max_pending=10)
    reader = streams.read(G1)
    await anext(reader)  # the greeting; from now on it reads nothing
    for position in range(12):
        streams.publish(G1, chunk(position))
    received = [batch async for batch in reader]
    assert len(received) == 1
    assert gone == [G1]
