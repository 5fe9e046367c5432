"""The gRPC client against our own door, around a scripted router."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from cluster.bench.client_record import TOKEN_IDS
from cluster.bench.grpc_target import GrpcTarget
from cluster.bench.target import Ask, EndpointFailed, Reply, Stopwatch
from cluster.grpc_gateway import GrpcGateway
from cluster.internal_tls import TlsDecision
from core.clock import WallClock
from core.errors import Overloaded
from tests.unit.cluster.scripted_router import Gateway


@pytest.fixture
async def door(service: Gateway) -> AsyncIterator[str]:
    """The address of the door."""
    gateway = GrpcGateway(
        service.generation,
        service.router,
        service.membership,
        service.links,
        service.planner,
        service.config,
        service.clock,
        TlsDecision(False, "test"),
        service.requests,
    )
    await gateway.start()
    yield f"127.0.0.1:{gateway.port}"
    await gateway.stop(0)


async def ask(address: str, prompt: tuple[int, ...] = (5, 6, 7), **options: object) -> tuple[Reply, Stopwatch]:
    target = GrpcTarget(address, **options)  # type: ignore[arg-type]
    try:
        await target.open()
        watch = Stopwatch(WallClock())
        return await target.send(target.prepare(Ask(prompt, 8)), watch), watch
    finally:
        await target.close()


async def test_token_ids_go_out_and_come_back(service: Gateway, door: str) -> None:
    reply, watch = await ask(door)

    (request,) = service.router.requests
    assert request.prompt_token_ids == (5, 6, 7)
    assert (request.sampling.max_tokens, request.sampling.ignore_eos, request.sampling.temperature) == (8, True, 0.0)
    assert reply.token_ids == service.router.answer[:8]
    assert (reply.output_tokens, reply.counted_by, reply.finish_reason) == (8, TOKEN_IDS, "length")
    assert (reply.prompt_tokens, reply.cached_tokens) == (3, 3)
    assert reply.timing is not None
    assert reply.timing["prefill_worker"] == "prefill-0"
    assert len(watch.chunk_at) == 8


async def test_several_tokens_in_one_message_are_one_chunk(service: Gateway, door: str) -> None:
    service.router.chunk_size = 4

    reply, watch = await ask(door)

    assert (reply.output_tokens, len(watch.chunk_at)) == (8, 2)


async def test_the_served_model_is_described(door: str) -> None:
    target = GrpcTarget(door)
    facts = await target.open()
    await target.close()

    assert (facts.model, facts.max_model_len, facts.vocab_size, facts.ignore_eos) == ("tiny", 64, 350, True)


async def test_a_refusal_is_a_failure_with_its_status(service: Gateway, door: str) -> None:
    service.router.error = Overloaded("full")

    reply, _ = await ask(door)

    assert (reply.error, reply.output_tokens) == ("resource_exhausted", 0)


async def test_nobody_there_is_said_before_the_run() -> None:
    target = GrpcTarget("127.0.0.1:9")
    with pytest.raises(EndpointFailed, match=r"127\.0\.0\.1:9: UNAVAILABLE"):
        await target.open()
    await target.close()
