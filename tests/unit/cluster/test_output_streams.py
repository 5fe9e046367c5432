"""One stream for each gateway: nothing lost, nothing out of order, and a gateway that leaves is noticed."""

from __future__ import annotations

import asyncio
import threading

from hypothesis import given
from hypothesis import strategies as st

from cluster.output_streams import OutputStreams
from core.request import (
    FinishReason,
    GatewayId,
    Role,
    SequenceFailure,
    SequenceId,
    StageStats,
    TokenChunk,
    TokenLogprob,
    WorkerId,
)
from protos import worker_pb2 as pb
from protos.wire import chunk_from_message

G1, G2 = GatewayId("g1"), GatewayId("g2")


def chunk(position: int, sequence: str = "s", **more: object) -> TokenChunk:
    return TokenChunk(SequenceId(sequence), position, (position,), **more)  # type: ignore[arg-type]


def make(gone: list[GatewayId], max_pending: int = 1000) -> OutputStreams:
    return OutputStreams(asyncio.get_running_loop(), gone.append, max_pending)


async def read_until(streams: OutputStreams, gateway_id: GatewayId, count: int) -> list[pb.OutputBatch]:
    batches = []
    reader = streams.read(gateway_id)
    async for batch in reader:
        batches.append(batch)
        if sum(sum(len(c.token_ids) for c in b.chunks) + len(b.failures) for b in batches) >= count:
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
    assert [token for b in batches for c in b.chunks for token in c.token_ids] == list(range(40))
    assert [len(b.chunks) for b in batches] == [0, 1]  # the greeting and one message with everything, as one chunk
    assert gone == [G1]
    assert not streams.has(G1)


async def together(*items: TokenChunk | SequenceFailure) -> pb.OutputBatch:
    """What travels when all of them are there before the stream runs."""
    streams = make([])
    reader = streams.read(G1)
    await anext(reader)
    for item in items:
        streams.publish(G1, item)
    batch = await anext(reader)
    await reader.aclose()  # type: ignore[attr-defined]
    return batch


async def test_tokens_of_a_sequence_that_wait_together_travel_as_one_chunk_with_their_end() -> None:
    entries = [TokenLogprob(token, -0.5, ((token, -0.5),)) for token in (1, 2)]
    batch = await together(
        chunk(1, "a", logprobs=(entries[0],)),
        chunk(1, "b"),
        chunk(2, "a", logprobs=(entries[1],), finish_reason=FinishReason.STOP, stop_token_id=2),
        chunk(2, "b"),
    )

    a, b = map(chunk_from_message, batch.chunks)
    assert a == TokenChunk(SequenceId("a"), 1, (1, 2), tuple(entries), FinishReason.STOP, 2)
    assert b == TokenChunk(SequenceId("b"), 1, (1, 2))


async def test_a_report_and_what_does_not_follow_stay_chunks_of_their_own() -> None:
    stats = StageStats(WorkerId("w"), Role.PREFILL)
    first, report = chunk(0, stats=stats), TokenChunk(SequenceId("s"), 1, stats=stats)

    batch = await together(first, report, chunk(1), chunk(5), chunk(6))

    assert [chunk_from_message(message) for message in batch.chunks] == [
        first, report, chunk(1), TokenChunk(SequenceId("s"), 5, (5, 6))
    ]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3)), max_size=12))
def test_joining_changes_no_token_and_no_order(published: list[tuple[str, int]]) -> None:
    next_position = {"a": 0, "b": 0}
    items = []
    for sequence, count in published:
        begin = next_position[sequence]
        items.append(TokenChunk(SequenceId(sequence), begin, tuple(range(begin, begin + count))))
        next_position[sequence] += count
    if not items:
        return

    batch = asyncio.run(together(*items))

    for sequence, count in next_position.items():
        own = [message for message in batch.chunks if message.sequence_id == sequence]
        assert [token for message in own for token in message.token_ids] == list(range(count))
        assert len(own) == (count > 0)


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
