"""Real ports and channels: who gets an answer, and what a rotation of certificates does to either end."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from cluster.certificates import Authority, write_files
from core.credentials import Credentials
from core.errors import InvalidConfig
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc

OURS, THEIRS = Authority.create("ours"), Authority.create("theirs")
TIMEOUT_S = 10.0


class Registry(rpc.RegistryServicer):
    """Notes whose certificate each call came with."""

    def __init__(self) -> None:
        self.peers: list[str | None] = []

    async def Register(self, request, context):  # noqa: N802
        names = context.auth_context().get("x509_common_name")
        self.peers.append(names[0].decode() if names else None)
        return pb.RegisterReply(lease_s=7.0)


def issued(directory: Path, authority: Authority = OURS, name: str = "worker", days: float = 1.0) -> Credentials:
    return write_files(directory, authority.issue(name, days))


@asynccontextmanager
async def serving(credentials: Credentials | None) -> AsyncIterator[tuple[str, Registry]]:
    server, registry = grpc.aio.server(), Registry()
    rpc.add_RegistryServicer_to_server(registry, server)
    port = InternalGrpc(credentials).listen(server, "127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", registry
    finally:
        await server.stop(grace=None)


async def register(address: str, credentials: Credentials | None) -> float:
    async with InternalGrpc(credentials).channel(address) as channel:
        return (await rpc.RegistryStub(channel).Register(pb.RegisterRequest(), timeout=TIMEOUT_S)).lease_s


async def test_processes_of_one_authority_talk_and_know_each_other(tmp_path):
    async with serving(issued(tmp_path / "gateway")) as (address, registry):
        assert await register(address, issued(tmp_path / "worker", name="prefill-0")) == 7.0
    assert registry.peers == ["prefill-0"]


async def test_without_credentials_calls_are_plain():
    async with serving(None) as (address, registry):
        assert await register(address, None) == 7.0
    assert registry.peers == [None]


@pytest.mark.parametrize("intruder", ["plain", "foreign", "expired", "no certificate"])
async def test_who_has_no_valid_certificate_reaches_no_method(tmp_path, intruder):
    ours = issued(tmp_path / "gateway")
    async with serving(ours) as (address, registry):
        match intruder:
            case "plain":
                channel = InternalGrpc(None).channel(address)
            case "foreign":
                theirs = issued(tmp_path / "b", THEIRS)  # trusts us, so that it is us who refuse
                channel = InternalGrpc(Credentials(ours.ca_file, theirs.cert_file, theirs.key_file)).channel(address)
            case "expired":
                channel = InternalGrpc(issued(tmp_path / "b", days=-0.001)).channel(address)
            case _:
                secrets = grpc.ssl_channel_credentials(ours.ca_file.read_bytes())
                override = (("grpc.ssl_target_name_override", "prfaas.internal"),)
                channel = grpc.aio.secure_channel(address, secrets, options=override)
        async with channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await rpc.RegistryStub(channel).Register(pb.RegisterRequest(), timeout=TIMEOUT_S)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await register(address, issued(tmp_path / "c")) == 7.0, "the port goes on for who may come"
    assert len(registry.peers) == 1


@pytest.mark.parametrize("impostor", ["plain", "foreign", "expired"])
async def test_a_client_tells_nothing_to_a_port_without_a_valid_certificate(tmp_path, impostor):
    ours = issued(tmp_path / "worker")
    match impostor:
        case "plain":
            held = None
        case "foreign":
            theirs = issued(tmp_path / "b", THEIRS)
            held = Credentials(ours.ca_file, theirs.cert_file, theirs.key_file)
        case _:
            held = issued(tmp_path / "b", days=-0.001)
    async with serving(held) as (address, registry):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await register(address, ours)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert registry.peers == []


async def test_a_port_takes_up_changed_files_while_it_serves(tmp_path):
    held = issued(tmp_path / "gateway")
    async with serving(held) as (address, registry):
        old = InternalGrpc(issued(tmp_path / "a", name="early")).channel(address)
        async with old:
            await rpc.RegistryStub(old).Register(pb.RegisterRequest(), timeout=TIMEOUT_S)
            theirs = issued(tmp_path / "new", THEIRS)
            for new, path in (
                (theirs.ca_file, held.ca_file),
                (theirs.cert_file, held.cert_file),
                (theirs.key_file, held.key_file),
            ):
                os.replace(new, path)

            assert await register(address, issued(tmp_path / "b", THEIRS, name="late")) == 7.0
            with pytest.raises(grpc.aio.AioRpcError):
                await register(address, issued(tmp_path / "c", name="of the old authority"))
            await rpc.RegistryStub(old).Register(pb.RegisterRequest(), timeout=TIMEOUT_S)
    assert registry.peers == ["early", "late", "early"], "a connection keeps what it was made with"


async def test_a_channel_is_made_with_the_last_usable_files(tmp_path):
    async with serving(issued(tmp_path / "gateway")) as (address, registry):
        held = issued(tmp_path / "worker", name="before")
        internal = InternalGrpc(held)
        held.key_file.unlink()  # a rotation is half done
        async with internal.channel(address) as channel:
            await rpc.RegistryStub(channel).Register(pb.RegisterRequest(), timeout=TIMEOUT_S)
        new = issued(tmp_path / "new", name="after")
        os.replace(new.key_file, held.key_file)
        os.replace(new.cert_file, held.cert_file)
        async with internal.channel(address) as channel:
            await rpc.RegistryStub(channel).Register(pb.RegisterRequest(), timeout=TIMEOUT_S)
    assert registry.peers == ["before", "after"]


def test_files_that_cannot_be_used_are_named_at_the_start(tmp_path):
    held = issued(tmp_path / "gateway")
    held.key_file.unlink()
    with pytest.raises(InvalidConfig, match=r"tls\.key_file"):
        InternalGrpc(held)


async def test_many_channels_at_once_share_nothing_but_the_port(tmp_path):
    async with serving(issued(tmp_path / "gateway")) as (address, registry):
        ours = issued(tmp_path / "worker")
        assert await asyncio.gather(*(register(address, ours) for _ in range(16))) == [7.0] * 16
    assert len(registry.peers) == 16


async def test_servers_of_one_host_take_the_next_free_port_and_none_is_shared():
    servers = [grpc.aio.server(options=(("grpc.so_reuseport", 0),)) for _ in range(3)]
    internal = InternalGrpc(None)
    first = internal.listen(servers[0], "127.0.0.1:0")

    second = internal.listen_on_first(servers[1], "127.0.0.1", range(first, min(first + 20, 65536)))

    assert second > first
    with pytest.raises(RuntimeError):
        internal.listen_on_first(servers[2], "127.0.0.1", (first, second))
    for server in servers:
        await server.stop(grace=None)
