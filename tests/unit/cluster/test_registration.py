"""A worker keeps itself registered: with each gateway for itself, for ever, and tells each what the others say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from cluster import registration
from cluster.certificates import Authority, write_files
from cluster.registration import Registration, Registrations
from core.request import EngineId, WorkerId
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc
from tests.unit.cluster.gateway_and_fakes import until

PLAIN = InternalGrpc(None)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "RETRY_S", 0.01)


class ScriptedRegistry(rpc.RegistryServicer):
    """Takes everyone, unless ``refusal`` says why not."""

    def __init__(self, lease_s: float = 1000.0) -> None:
        self.lease_s = lease_s
        self.refusal = ""
        self.requests: list[pb.RegisterRequest] = []
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def Register(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        self.requests.append(request)
        if self.refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        return pb.RegisterReply(lease_s=self.lease_s)

    async def start(self, internal: InternalGrpc = PLAIN, port: int = 0) -> str:
        self._server = grpc.aio.server()
        rpc.add_RegistryServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{internal.listen(self._server, f'127.0.0.1:{port}')}"
        await self._server.start()
        return self.address

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    @property
    def told(self) -> list[tuple[bool, str]]:
        """What the last call said of the other registries."""
        return [(other.taken, other.said) for other in self.requests[-1].others] if self.requests else []


@asynccontextmanager
async def registered(registries: Sequence[str], internal: InternalGrpc = PLAIN) -> AsyncIterator[Registrations]:
    registrations = Registrations(WorkerId("west/prefill-0"), EngineId("e"), "10.0.0.7:1", registries, internal)
    keeping = asyncio.create_task(registrations.keep())
    try:
        yield registrations
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})


async def test_a_lease_is_renewed_before_it_runs_out_and_given_back_at_the_end() -> None:
    gateway = ScriptedRegistry(lease_s=0.06)
    async with registered([await gateway.start()]) as registrations:
        await until(lambda: len(gateway.requests) >= 4)
        await registrations.leave()
    await gateway.stop()

    first, last = gateway.requests[0], gateway.requests[-1]
    assert (first.worker_id, first.engine_id, first.address, first.leaving) == (
        "west/prefill-0",
        "e",
        "10.0.0.7:1",
        False,
    )
    assert last.leaving


async def test_a_gateway_that_restarts_is_registered_with_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cluster.registration")
    gateway, after = ScriptedRegistry(lease_s=0.03), ScriptedRegistry(lease_s=0.03)
    async with registered([await gateway.start()]):
        await until(lambda: gateway.requests)
        await gateway.stop()
        await until(lambda: "does not take" in caplog.text)
        await asyncio.sleep(0.05)  # several tries, of which one is told
        await after.start(port=int(gateway.address.rpartition(":")[2]))
        await until(lambda: after.requests)
        await until(lambda: caplog.text.count(" took worker ") == 2)
    await after.stop()

    said = [record.getMessage() for record in caplog.records]
    assert [line.split()[2] for line in said] == ["took", "does", "took"]
    assert caplog.records[1].levelno == logging.WARNING


async def test_every_registry_hears_at_once_what_the_others_say() -> None:
    home, gateway = ScriptedRegistry(), ScriptedRegistry(lease_s=0.03)
    gateway.refusal = "model: another one"
    async with registered([await home.start(), await gateway.start()]):
        await until(lambda: home.told == [(False, "FAILED_PRECONDITION: model: another one")])
        gateway.refusal = ""
        await until(lambda: home.told == [(True, "")])
        await until(lambda: gateway.told == [(True, "")])
        num_calls = len(home.requests)
        await asyncio.sleep(0.1)
        assert len(home.requests) == num_calls, "no news, and its lease is long"
        await gateway.stop()
        await until(lambda: not home.told[0][0])
    await home.stop()


async def test_a_gateway_that_is_not_there_keeps_none_of_the_others_waiting() -> None:
    gateway = ScriptedRegistry()
    async with registered(["127.0.0.1:1", await gateway.start()]):
        await until(lambda: gateway.told and "UNAVAILABLE" in gateway.told[0][1])
    await gateway.stop()


async def test_a_certificate_of_another_authority_is_said_and_never_taken(tmp_path: Path) -> None:
    ours, theirs = Authority.create("east"), Authority.create("west")
    home, gateway = ScriptedRegistry(), ScriptedRegistry()
    held = InternalGrpc(write_files(tmp_path / "west", theirs.issue("worker")))
    await home.start(held)
    await gateway.start(InternalGrpc(write_files(tmp_path / "east", ours.issue("gateway"))))
    async with registered([home.address, gateway.address], held):
        await until(lambda: home.told and "CERTIFICATE_VERIFY_FAILED" in home.told[0][1])
    for registry in (home, gateway):
        await registry.stop()

    assert gateway.requests == []


def test_a_registration_is_the_same_after_the_wire() -> None:
    for said in (Registration("a:1", taken=True), Registration("a:1", taken=False, said="why")):
        assert Registration.from_message(said.to_message()) == said
