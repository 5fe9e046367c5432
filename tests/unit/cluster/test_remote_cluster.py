"""A cluster without a gateway, with a fleet of fake workers: who took it, who did not and why, and its orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import registration
from cluster.certificates import Authority, write_files
from cluster.config import PoolConfig, ServiceConfig, TlsConfig
from cluster.internal_tls import IssueProof
from cluster.launch import NotReadyInTime
from cluster.membership import Membership
from cluster.registration import Registration, Registrations
from cluster.remote_cluster import LEASE_S, HomeRegistry, Worker, gateway_line, serve_async
from core.clock import VirtualClock, WallClock
from core.credentials import Credentials
from core.errors import InvalidConfig
from core.request import ClusterId, EngineId, Role, WorkerId
from protos import worker_pb2 as pb
from protos.channels import InternalGrpc
from tests.unit.cluster import tiny_tokenizers
from tests.unit.cluster.fake_worker import FakeWorker
from tests.unit.cluster.gateway_and_fakes import CONFIG, GATEWAY, PATIENCE_S, register, until

EAST, WEST = ClusterId("east"), ClusterId("west")
PLAIN = InternalGrpc(None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_tokenizers.save(tmp_path_factory.mktemp("model"))
    (folder / "config.json").write_text("{}")
    return str(folder)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "RETRY_S", 0.01)


def config(model: str, *gateways: str, num_workers: int = 2) -> ServiceConfig:
    return ServiceConfig(
        model=model,
        cluster_id=WEST,
        join=gateways,
        prefill=PoolConfig(count=num_workers),
        decode=PoolConfig(count=0),
        start_timeout_s=PATIENCE_S,
        drain_timeout_s=PATIENCE_S,
    )


class JoiningFleet:
    """Fake workers on the test's event loop that register as real ones do, behind the blocking methods of a fleet."""

    def __init__(self, num_missing: int = 0) -> None:
        self.workers: list[FakeWorker] = []
        self.done: list[str] = []
        self.drained = True  # what ``drain`` answers
        self._num_missing = num_missing
        self._loop = asyncio.get_running_loop()
        self._registrations: list[Registrations] = []
        self._keeping: list[asyncio.Task[None]] = []

    def make(self, config: ServiceConfig) -> JoiningFleet:
        self._config = config
        return self

    def join(self) -> str:
        self.done.append("join")
        return "127.0.0.1"

    def start(self, registry: str, issue_proof: IssueProof) -> None:
        self.done.append("start")
        names = [self._config.worker_id(Role.PREFILL, index) for index in range(self._config.prefill.count)]
        for name in names[self._num_missing :]:
            proof = issue_proof(name)
            assert proof is None or isinstance(proof, Credentials)
            worker = FakeWorker(name, Role.PREFILL, cluster_id=self._config.cluster_id, internal=InternalGrpc(proof))
            self.workers.append(worker)
        asyncio.run_coroutine_threadsafe(self._start((registry, *self._config.join)), self._loop).result()

    def check(self) -> None: ...

    def drain(self, timeout_s: float) -> bool:
        if "drain" not in self.done:
            self.done.append("drain")
        return self.drained

    def stop(self, timeout_s: float) -> None:
        self.done.append("stop")
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()

    async def _start(self, registries: tuple[str, ...]) -> None:
        for worker in self.workers:
            await worker.start({})
            name, engine_id = WorkerId(worker.worker_id), EngineId(worker.engine_id)
            kept = Registrations(name, engine_id, worker.address, registries, worker.internal)
            self._registrations.append(kept)
            self._keeping.append(asyncio.create_task(kept.keep()))

    async def _stop(self) -> None:
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(kept.leave() for kept in self._registrations))
        for worker in self.workers:
            await worker.kill()


@asynccontextmanager
async def gateway(
    registry: str = "127.0.0.1:0", *, internal: InternalGrpc = PLAIN, with_own_worker: bool = True
) -> AsyncIterator[tuple[Membership, str]]:
    """A gateway of cluster east with a decode worker of its own, and the address of its registry."""
    host, _, port = registry.rpartition(":")
    membership = Membership(CONFIG, GATEWAY, WallClock(), internal, cluster_id=EAST)
    address = await membership.start(host, int(port))
    own = FakeWorker("decode-0", Role.DECODE, cluster_id=EAST, internal=internal)
    try:
        await own.start({})
        if with_own_worker:
            await register(address, own)
        yield membership, address
    finally:
        await membership.close()
        await own.kill()


@asynccontextmanager
async def serving(
    fleet: JoiningFleet, config: ServiceConfig
) -> AsyncIterator[tuple[asyncio.Task[None], asyncio.Event]]:
    """The cluster in a task, and what is set when it is ready; ended whatever the test does."""
    ready = asyncio.Event()
    task = asyncio.create_task(serve_async(config, ready.set, fleet.make))
    try:
        yield task, ready
    finally:
        task.cancel()
        await asyncio.wait({task})


async def said(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Wait for the cluster to say it."""
    await until(lambda: text in capsys.readouterr().out)


def foreign(membership: Membership) -> list[str]:
    return [worker.worker_id for worker in membership.view().workers if worker.cluster_id != EAST]


async def test_its_workers_are_used_by_the_gateway_under_names_of_their_cluster_and_leave_when_it_is_stopped(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = JoiningFleet()
    async with gateway() as (membership, address), serving(fleet, config(model, address)) as (task, ready):
        await asyncio.wait_for(ready.wait(), PATIENCE_S)
        assert foreign(membership) == ["west/prefill-0", "west/prefill-1"]

        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, PATIENCE_S)
        assert foreign(membership) == []

    assert fleet.done == ["join", "start", "drain", "stop"]
    lines = capsys.readouterr().out.splitlines()
    assert f"prfaas: gateway {address} has taken 2 of 2 workers" in lines
    assert "prfaas: ready: all 2 workers of west are used" in lines


async def test_it_is_ready_when_one_of_two_gateways_has_taken_it_and_tells_what_the_other_says(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with gateway() as (_, address), serving(JoiningFleet(), config(model, "127.0.0.1:1", address)) as (_, ready):
        await asyncio.wait_for(ready.wait(), PATIENCE_S)

    assert "gateway 127.0.0.1:1 has taken 0 of 2 workers; it says: UNAVAILABLE:" in capsys.readouterr().out


async def test_it_waits_for_a_gateway_for_as_long_as_it_takes_and_comes_back_to_one_that_restarts(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with gateway() as (_, address):
        pass  # where one will be
    fleet = JoiningFleet()
    async with serving(fleet, replace(config(model, address), start_timeout_s=1.5)) as (task, ready):
        await until(lambda: fleet.workers)
        await asyncio.sleep(1.7)
        assert not task.done(), "the time to start is that of the workers"
        for _ in range(2):
            async with gateway(address) as (membership, _):
                await until(lambda membership=membership: len(foreign(membership)) == 2)
        assert ready.is_set()
        await said(capsys, "has taken 0 of 2")


async def test_a_gateway_whose_own_workers_are_not_there_yet_takes_nobody_elses(model: str) -> None:
    async with gateway(with_own_worker=False) as (membership, address):
        async with serving(JoiningFleet(), config(model, address)) as (_, ready):
            await asyncio.sleep(0.2)
            assert (foreign(membership), ready.is_set()) == ([], False)
            own = FakeWorker("decode-0", Role.DECODE, cluster_id=EAST)
            await own.start({})
            await register(address, own)
            await asyncio.wait_for(ready.wait(), PATIENCE_S)
            await own.kill()


async def test_a_cluster_with_the_gateways_own_name_is_refused_by_the_key_that_must_change(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with gateway() as (membership, address):
        named_alike = replace(config(model, address), cluster_id=EAST)
        async with serving(JoiningFleet(), named_alike) as (_, ready):
            await said(capsys, "FAILED_PRECONDITION: cluster_id: east is this gateway's own cluster")
        assert not ready.is_set()
        assert len(membership.view().workers) == 1


def given(credentials: Credentials) -> TlsConfig:
    files = (str(credentials.ca_file), str(credentials.cert_file), str(credentials.key_file))
    return TlsConfig("on", *files)


async def test_certificates_of_one_authority_let_it_in_and_those_of_another_do_not(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = Authority.create("both")
    internal = InternalGrpc(write_files(tmp_path / "east", authority.issue("gateway")))
    ours = given(write_files(tmp_path / "west", authority.issue("west")))
    theirs = given(write_files(tmp_path / "other", Authority.create("west").issue("west")))
    async with gateway(internal=internal) as (membership, address):
        async with serving(JoiningFleet(), replace(config(model, address), tls=theirs)) as (_, ready):
            await said(capsys, "CERTIFICATE_VERIFY_FAILED")
            assert (foreign(membership), ready.is_set()) == ([], False)
        async with serving(JoiningFleet(), replace(config(model, address), tls=ours)) as (_, ready):
            await asyncio.wait_for(ready.wait(), PATIENCE_S)


async def test_certificates_that_no_gateway_can_know_are_an_error_of_the_configuration(model: str) -> None:
    fleet = JoiningFleet()

    with pytest.raises(InvalidConfig, match=r"tls\.ca_file: is needed with join"):
        await serve_async(replace(config(model, "127.0.0.1:1"), tls=TlsConfig("on")), make_fleet=fleet.make)
    assert fleet.done == ["join", "stop"]


async def test_workers_that_do_not_start_in_time_are_counted(model: str) -> None:
    fleet = JoiningFleet(num_missing=1)
    late = replace(config(model, "127.0.0.1:1"), start_timeout_s=0.3)

    with pytest.raises(NotReadyInTime, match="1 of 2 workers run"):
        await serve_async(late, make_fleet=fleet.make)
    assert fleet.done[-1] == "stop"


async def test_a_second_signal_cuts_the_drain_short(model: str) -> None:
    fleet = JoiningFleet()
    fleet.drained = False
    lasting = replace(config(model, "127.0.0.1:1"), drain_timeout_s=1000.0)
    async with serving(fleet, lasting) as (task, _):
        await until(lambda: fleet.workers)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: "drain" in fleet.done)
        assert not task.done()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, PATIENCE_S)

    assert fleet.done[-1] == "stop"


async def test_the_home_registry_forgets_who_leaves_or_is_not_heard_of_and_tells_only_news() -> None:
    clock = VirtualClock()
    home = HomeRegistry(clock, PLAIN)
    first = pb.RegisterRequest(worker_id="w", engine_id="e1", others=[pb.Registration(registry="g", said="why")])

    async def told(request: pb.RegisterRequest) -> bool:
        home.changed.clear()
        await home.Register(request, None)  # type: ignore[arg-type]
        return home.changed.is_set()

    assert await told(first)
    assert not await told(first)
    assert home.workers == (Worker(WorkerId("w"), EngineId("e1"), clock.now(), (Registration("g", False, "why"),)),)
    assert await told(pb.RegisterRequest(worker_id="w", engine_id="e2"))
    assert not await told(pb.RegisterRequest(worker_id="w", engine_id="e1", leaving=True)), "replaced already"
    clock.advance(LEASE_S)
    assert home.workers == ()
    assert await told(pb.RegisterRequest(worker_id="w", engine_id="e2", leaving=True))


def test_a_line_says_how_many_are_taken_and_the_reason_of_most_that_are_not() -> None:
    def worker(number: int, said: str) -> Worker:
        registration = Registration("g:1", taken=not said, said=said)
        return Worker(WorkerId(f"w{number}"), EngineId(f"e{number}"), 0.0, (Registration("h:1", True), registration))

    workers = [worker(1, ""), worker(2, "full"), worker(3, "gone"), worker(4, "gone")]

    assert gateway_line("g:1", workers, 5) == "gateway g:1 has taken 1 of 5 workers; it says: gone"
    assert gateway_line("h:1", workers[:2], 2) == "gateway h:1 has taken 2 of 2 workers"
    assert gateway_line("i:1", workers, 5) is None, "nobody has asked it yet"
