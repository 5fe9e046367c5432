"""With ``api_keys_file`` the doors answer who shows a key; what operators and probes ask for, they answer everybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from cluster import cli
from cluster.config import ServiceConfig
from cluster.grpc_gateway import GrpcGateway
from cluster.http_gateway import HttpGateway
from cluster.internal_tls import TlsDecision
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc
from tests.unit.cluster.conftest import ANSWER
from tests.unit.cluster.scripted_router import Gateway

KEY = "sk-one"
BODY = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def config(service: Gateway, tmp_path: Path) -> ServiceConfig:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    return replace(service.config, api_keys_file=str(file))


@pytest.fixture
async def client(service: Gateway, config: ServiceConfig) -> AsyncIterator[httpx.AsyncClient]:
    door = HttpGateway(
        service.generation,
        service.membership,
        service.metrics,
        config,
        service.clock,
        dict,
        lambda limit: {"requests": []},
    )
    await door.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}", timeout=20) as client:
        yield client
    await door.stop(0)


@pytest.fixture
async def address(service: Gateway, config: ServiceConfig) -> AsyncIterator[str]:
    door = GrpcGateway(
        service.generation,
        service.router,
        service.membership,
        service.links,
        service.planner,
        config,
        service.clock,
        TlsDecision(False, "test"),
        service.requests,
    )
    await door.start()
    yield f"127.0.0.1:{door.port}"
    await door.stop(0)


def num_refused(service: Gateway, door: str) -> float:
    return (
        service.metrics.registry.get_sample_value("prfaas_requests_total", {"door": door, "outcome": "wrong_key"}) or 0
    )


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/messages"),
        ("GET", "/v1/models"),
        ("GET", "/requests"),
        ("POST", "/tokenize"),
        ("POST", "/no-such-path"),
    ],
)
async def test_http_refuses_who_shows_no_key_and_says_what_to_show(
    method: str, path: str, client: httpx.AsyncClient, service: Gateway
) -> None:
    before = num_refused(service, "http")

    response = await client.request(method, path, json=BODY if method == "POST" else None)

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert response.json()["error"]["type"] == "authentication_error"  # OpenAI's word and Anthropic's
    assert "authorization: Bearer KEY" in response.json()["error"]["message"]
    assert num_refused(service, "http") == before + 1


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}])
async def test_http_answers_who_shows_a_key(headers: dict[str, str], client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=BODY, headers=headers)

    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize("path", ["/health", "/live", "/metrics", "/version", "/status", "/", "/page.js"])
async def test_http_tells_everybody_how_the_service_is(path: str, client: httpx.AsyncClient) -> None:
    assert (await client.get(path)).status_code in (200, 503)


async def test_grpc_refuses_who_shows_no_key_or_another(address: str, service: Gateway) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.GenerationStub(channel)
        for metadata in ((), (("authorization", "Bearer sk-two"),), (("x-key-bin", b"\xff"),)):
            for call in (
                stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata),
                stub.Generate(pb.GenerateRequest(text="hello"), metadata=metadata).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    assert num_refused(service, "grpc") == 6


async def test_grpc_answers_who_shows_a_key_and_tells_everybody_its_health(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        call = rpc.GenerationStub(channel).Generate(
            pb.GenerateRequest(text="hello"), metadata=(("authorization", f"Bearer {KEY}"),)
        )
        messages = [message async for message in call]
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    assert messages[-1].complete.text == ANSWER
    assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_command_shows_the_key_of_its_option_or_of_the_environment(address: str) -> None:
    def run(*arguments: str, env: dict[str, str] | None = None) -> object:
        return CliRunner().invoke(cli.app, ["generate", "hello", "--address", address, *arguments], env=env)

    refused = await asyncio.to_thread(run)
    by_option = await asyncio.to_thread(run, "--api-key", KEY)
    by_variable = await asyncio.to_thread(run, env={"PRFAAS_API_KEY": KEY})

    assert refused.exit_code == 1
    assert "UNAUTHENTICATED: a key is needed" in refused.output
    assert (by_option.exit_code, by_variable.exit_code) == (0, 0), (by_option.output, by_variable.output)
    assert ANSWER in by_option.output
