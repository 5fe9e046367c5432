"""One connection to one fake worker: demultiplexing, loss, and what statuses mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from cluster.worker_client import Assignment, GrpcWorkerClient, SequenceEvent, WorkerLost
from core.compute import ComputeProfile
from core.errors import InvalidRequest, PeerLost, PrfaasError, SequenceFailed
from core.request import (
    Role,
    SamplingParams,
    SequenceFailure,
    SequenceId,
    SequenceSpec,
    SessionId,
    TokenChunk,
    WorkerId,
)
from protos.channels import InternalGrpc
from tests.unit.cluster.fake_worker import ANNOUNCED, FakeWorker, Refusal, Visit
from tests.unit.cluster.gateway_and_fakes import GATEWAY, until

SPEC = SequenceSpec(SequenceId("s"), (1, 2, 3), SamplingParams(seed=1, max_tokens=4))


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[FakeWorker, GrpcWorkerClient, asyncio.Task[None]]]:
    worker = FakeWorker("decode-0", Role.DECODE)
    client = await GrpcWorkerClient.connect(await worker.start({}), GATEWAY, InternalGrpc(None))
    pump = asyncio.create_task(client.pump_outputs())
    try:
        yield worker, client, pump
    finally:
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)
        await client.close()
        await worker.kill()


async def test_connecting_tells_who_answers() -> None:
    async with connection() as (worker, client, _):
        assert client.description.worker_id == "decode-0"
        assert client.description.address == worker.address
        assert client.description.model.eos_token_ids == (0,)


async def test_connecting_to_nobody_is_a_lost_peer() -> None:
    worker = FakeWorker("decode-0", Role.DECODE)
    address = await worker.start({})
    await worker.kill()

    with pytest.raises(PeerLost, match=address):
        await GrpcWorkerClient.connect(address, GATEWAY, InternalGrpc(None), timeout_s=0.2)


async def test_each_sequence_gets_its_own_events_in_order_and_unknown_ones_are_dropped() -> None:
    async with connection() as (worker, client, _):
        a: list[SequenceEvent] = []
        b: list[SequenceEvent] = []
        client.open_sequence(SequenceId("a"), a.append)
        client.open_sequence(SequenceId("b"), b.append)
        chunks = [TokenChunk(SequenceId(name), i, (i,)) for i in range(3) for name in ("a", "b", "unknown")]
        failure = SequenceFailure(SequenceId("a"), "full", True, Role.DECODE)

        worker.send(*chunks, failure)
        await until(lambda: len(a) == 4)

        assert a == [TokenChunk(SequenceId("a"), i, (i,)) for i in range(3)] + [failure]
        assert b == [TokenChunk(SequenceId("b"), i, (i,)) for i in range(3)]


async def test_a_closed_sequence_hears_nothing_more() -> None:
    async with connection() as (worker, client, _):
        a: list[SequenceEvent] = []
        b: list[SequenceEvent] = []
        client.open_sequence(SequenceId("a"), a.append)
        client.open_sequence(SequenceId("b"), b.append)

        client.close_sequence(SequenceId("a"))
        worker.send(TokenChunk(SequenceId("a"), 0, (1,)), TokenChunk(SequenceId("b"), 0, (1,)))
        await until(lambda: b)

        assert a == []
        assert client.num_open == 1


async def test_a_broken_stream_ends_the_pump_with_a_lost_peer() -> None:
    async with connection() as (worker, _, pump):
        await worker.kill()

        with pytest.raises(PeerLost, match="Outputs stream"):
            await pump


async def test_failing_tells_every_open_sequence_once_and_every_later_one() -> None:
    async with connection() as (_, client, _pump):
        heard: list[SequenceEvent] = []
        client.open_sequence(SequenceId("a"), heard.append)
        client.open_sequence(SequenceId("b"), heard.append)

        client.fail("its lease ran out")
        client.fail("again")
        client.open_sequence(SequenceId("c"), heard.append)

        assert heard == [WorkerLost(client.description.worker_id, "its lease ran out")] * 3
        assert client.num_open == 0
        with pytest.raises(PeerLost, match="its lease ran out"):
            await client.decode(SPEC, None)


async def test_calls_after_closing_are_a_lost_peer() -> None:
    async with connection() as (_, client, _pump):
        await client.close()

        with pytest.raises(PeerLost):
            await client.abort(SequenceId("s"), Role.DECODE, "gone")


async def test_a_prefill_tells_whose_bytes_it_sends_and_how_soon() -> None:
    async with connection() as (worker, client, _):
        await client.prefill(SPEC, SessionId("a"), "nowhere:1", "acme", 2.5)
        await client.prefill(replace(SPEC, sequence_id=SequenceId("t")), SessionId("b"), "nowhere:1")
        with_deadline, without = worker.prefill_requests
        assert (with_deadline.tenant, with_deadline.deadline_s) == ("acme", 2.5)
        assert (without.tenant, without.HasField("deadline_s")) == ("", False)


async def test_a_sequence_is_announced_as_it_is() -> None:
    async with connection() as (worker, client, _):
        spec = SequenceSpec(SequenceId("s"), (1, 2), SamplingParams(seed=5, max_tokens=9), (7, 8), b"salt")

        await client.decode(spec, SessionId("session"))
        await client.abort(SequenceId("s"), Role.DECODE, "over")

        assert worker.decodes == [spec]
        assert worker.aborts == [("s", Role.DECODE)]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, PeerLost),
        (grpc.StatusCode.DEADLINE_EXCEEDED, PeerLost),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, SequenceFailed),
        (grpc.StatusCode.FAILED_PRECONDITION, SequenceFailed),
        (grpc.StatusCode.INTERNAL, SequenceFailed),
    ],
)
async def test_a_status_becomes_the_error_that_says_what_to_do(code: grpc.StatusCode, error: type[PrfaasError]) -> None:
    async with connection() as (worker, client, _):

        async def refuse(visit: Visit) -> None:
            raise Refusal(code, "prompt: too long")

        worker.hooks[ANNOUNCED] = refuse

        with pytest.raises(error, match="prompt: too long"):
            await client.decode(SPEC, None)


def unreported(client: GrpcWorkerClient) -> tuple[int, int, int]:
    return client.num_unreported, client.unreported_tokens, client.unreported_kv_tokens


async def test_what_is_sent_counts_until_a_report_could_count_it() -> None:
    async with connection() as (_, client, _):
        client.open_sequence(SPEC.sequence_id, lambda _: None, Assignment(tokens=3, kv_tokens=7))
        client.note_report(0.0)
        assert unreported(client) == (1, 3, 7), "the worker has not said that it has it"

        await client.decode(SPEC, None)
        client.note_report(5.0)
        assert unreported(client) == (1, 3, 7), "that load is older"
        client.note_report(0.0)
        assert unreported(client) == (0, 0, 0)
        assert client.num_open == 1


async def test_what_is_closed_or_lost_is_no_longer_waited_for() -> None:
    async with connection() as (_, client, _):
        client.open_sequence(SequenceId("a"), lambda _: None, Assignment(1))
        client.open_sequence(SequenceId("b"), lambda _: None, Assignment(2))
        client.close_sequence(SequenceId("a"))
        assert unreported(client) == (1, 2, 0)
        client.fail("gone")
        assert unreported(client) == (0, 0, 0)


async def test_workers_alike_in_model_device_and_step_share_a_profile() -> None:
    async with connection() as (_, client, _):
        described = client.description
        assert described.profile == "", "nothing is known of its device"
        one = replace(described, compute=ComputeProfile("NVIDIA H100", 2, step_tokens=512))
        assert one.profile == "fake float32 on 2 x NVIDIA H100, 512 tokens a step"
        assert one.profile == replace(one, worker_id=WorkerId("decode-1")).profile
        assert one.profile != replace(one, compute=replace(one.compute, step_tokens=256)).profile
