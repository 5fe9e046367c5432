"""The gateway process with a fleet of fake workers: it starts, says why it cannot, and stops in order."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from cluster.certificates import Authority, private_files, write_files
from cluster.config import GrpcConfig, HttpConfig, PoolConfig, RegistryConfig, RouterConfig, ServiceConfig, TlsConfig
from cluster.internal_tls import IssueProof
from cluster.launch import (
    EXIT_WRONG_INPUT,
    Endpoints,
    NotReadyInTime,
    check_links,
    resolve_model,
    serve,
    serve_async,
)
from cluster.link_tester import PairResult
from core.compute import ComputeProfile, StepSample
from core.credentials import Pem
from core.errors import InvalidConfig, UnsupportedModel
from core.link import ProbeReport
from core.request import Role, WorkerId
from kv_transfer.config import KvTransferConfig
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc
from protos import worker_pb2, worker_pb2_grpc
from protos.channels import InternalGrpc
from tests.unit.cluster import tiny_tokenizers
from tests.unit.cluster.fake_worker import FIRST_TOKEN, FakeWorker, Visit, passing_probe
from tests.unit.cluster.gateway_and_fakes import PATIENCE_S, register


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_tokenizers.save(tmp_path_factory.mktemp("model"))
    (folder / "config.json").write_text("{}")
    return str(folder)


def config(model: str, *, start_timeout_s: float = PATIENCE_S, drain_timeout_s: float = PATIENCE_S) -> ServiceConfig:
    return ServiceConfig(
        model=model,
        served_model_name="tiny",
        prefill=PoolConfig(count=1),
        decode=PoolConfig(count=2),
        router=RouterConfig(lease_s=20.0, costs_file=None),  # no worker here is lost, however busy the machine is
        http=HttpConfig(port=0),
        grpc=GrpcConfig(port=0),
        start_timeout_s=start_timeout_s,
        drain_timeout_s=drain_timeout_s,
    )


@pytest.fixture(autouse=True)
async def no_server_outlives_its_loop() -> AsyncIterator[None]:
    """The finaliser of a grpc.aio server needs its event loop, and cycles of frames may hold one until then."""
    yield
    gc.collect()


class FakeFleet:
    """Fake workers on the test's event loop, behind the blocking methods of a fleet."""

    def __init__(self, num_missing: int = 0, failure: Exception | None = None) -> None:
        self.workers: list[FakeWorker] = []
        self.done: list[str] = []
        self.registry = ""
        self._files = ExitStack()
        self._num_missing = num_missing
        self._failure = failure
        self._loop = asyncio.get_running_loop()

    def make(self, config: ServiceConfig) -> FakeFleet:
        names = [(role, index) for role in Role for index in range(config.pool(role).count)]
        self.workers = [FakeWorker(f"{role}-{index}", role) for role, index in names[self._num_missing :]]
        return self

    def join(self) -> str:
        self.done.append("join")
        return "127.0.0.1"

    def start(self, registry: str, issue_proof: IssueProof) -> None:
        self.done.append("start")
        self.registry = registry
        for worker in self.workers:
            proof = issue_proof(WorkerId(worker.worker_id))
            held = self._files.enter_context(private_files(proof)) if isinstance(proof, Pem) else proof
            worker.internal = InternalGrpc(held)
        asyncio.run_coroutine_threadsafe(self._start(registry), self._loop).result()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def drain(self, timeout_s: float) -> bool:
        self.done.append("drain")
        return True

    def stop(self, timeout_s: float) -> None:
        self.done.append("stop" if timeout_s > 0 else "stop at once")
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._files.close()

    async def _start(self, registry: str) -> None:
        fabric: dict[str, FakeWorker] = {}
        for worker in self.workers:
            await worker.start(fabric)
            await register(registry, worker)

    async def _stop(self) -> None:
        for worker in self.workers:
            await worker.kill()


@asynccontextmanager
async def serving(fleet: FakeFleet, config: ServiceConfig) -> AsyncIterator[tuple[asyncio.Task[None], Endpoints]]:
    """The service in a task, ready; ended whatever the test does."""
    ready: asyncio.Future[Endpoints] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve_async(config, ready.set_result, fleet.make))
    try:
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        yield task, ready.result()
    finally:
        task.cancel()
        await asyncio.wait({task})


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


async def test_a_service_answers_through_both_doors_and_stops_in_order(model: str) -> None:
    fleet = FakeFleet()
    async with serving(fleet, config(model)) as (task, endpoints):
        models = await asyncio.to_thread(lambda: urllib.request.urlopen(f"{endpoints.http}/v1/models").read())
        async with grpc.aio.insecure_channel(endpoints.grpc) as channel:
            info = await rpc.GenerationStub(channel).GetClusterInfo(pb.GetClusterInfoRequest())
        status = await asyncio.to_thread(lambda: urllib.request.urlopen(f"{endpoints.http}/status").read())
        interrupt()
        await asyncio.wait_for(task, PATIENCE_S)

    assert json.loads(models)["data"][0]["id"] == "tiny"
    assert [worker.worker_id for worker in info.workers] == ["decode-0", "decode-1", "prefill-0"]
    assert info.internal_tls == "off: workers listen on loopback only"
    plan = json.loads(status)["plan"]
    assert (plan["mode"], plan["num_prefill"], plan["num_decode"]) == ("dual", 1, 2)
    assert "no PrfaaS worker" in plan["reason"]
    assert fleet.done == ["join", "start", "stop"]


async def test_what_was_measured_is_in_the_status_and_kept_for_the_next_start(model: str, tmp_path: Path) -> None:
    path, fleet = tmp_path / "costs.json", FakeFleet()
    router = RouterConfig(lease_s=2.0, costs_file=str(path))
    cpu = ComputeProfile("cpu", 1, weight_bytes=10**6, weight_flops=1e6, attention_flops=10.0, step_tokens=64)

    def make(asked: ServiceConfig) -> FakeFleet:
        fleet.make(asked)
        for worker in fleet.workers:
            worker.compute = cpu
        return fleet

    fleet_like = SimpleNamespace(make=make)
    async with serving(fleet_like, replace(config(model), router=router)) as (_, endpoints):  # type: ignore[arg-type]
        await fleet.workers[0].change(steps=(StepSample(64, 2048.0, 0, 0, 0.5),))
        async with grpc.aio.insecure_channel(endpoints.grpc) as channel:
            stub = rpc.GenerationStub(channel)
            async with asyncio.timeout(PATIENCE_S):
                while not (info := await stub.GetClusterInfo(pb.GetClusterInfoRequest())).costs[0].samples:
                    await asyncio.sleep(0.05)

    profile = "fake float32 on 1 x cpu, 64 tokens a step"
    assert [(cost.work, cost.of, cost.samples) for cost in info.costs][:2] == [
        ("prefill", profile, 1),
        ("decode", profile, 0),
    ]
    assert json.loads(path.read_text())["lines"][f"prefill {profile}"]["samples"]


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def register_a_stranger(registry: str, internal: InternalGrpc) -> None:
    async with internal.channel(registry) as channel:
        request = worker_pb2.RegisterRequest(worker_id="x", engine_id="x", address="127.0.0.1:1", leaving=True)
        await worker_pb2_grpc.RegistryStub(channel).Register(request, timeout=PATIENCE_S)


async def test_with_tls_on_and_no_files_the_run_makes_its_own_and_keeps_strangers_out(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fleet = FakeFleet()
    async with serving(fleet, replace(config(model), tls=TlsConfig(mode="on"))) as (task, endpoints):
        async with grpc.aio.insecure_channel(endpoints.grpc) as channel:
            info = await rpc.GenerationStub(channel).GetClusterInfo(pb.GetClusterInfoRequest())
            answer = [reply async for reply in rpc.GenerationStub(channel).Generate(tokens(3))][-1]
        with private_files(Authority.create("local").issue("x")) as foreign:
            for stranger in (InternalGrpc(None), InternalGrpc(foreign)):
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await register_a_stranger(fleet.registry, stranger)
        await register_a_stranger(fleet.registry, fleet.workers[0].internal)
        written = files_in(tmp_path)
        interrupt()
        await asyncio.wait_for(task, PATIENCE_S)

    assert info.internal_tls == "on: tls.mode says so, with certificates made for this run"
    assert len(answer.complete.output_ids) == 3
    assert sys.platform != "linux" or written == [], "keys are in memory only"
    assert files_in(tmp_path) == []


async def test_given_certificates_that_cannot_be_used_are_an_error_at_the_start(model: str, tmp_path: Path) -> None:
    held = write_files(tmp_path / "old", Authority.create("local").issue("gateway", days=-1.0))
    files = TlsConfig(ca_file=str(held.ca_file), cert_file=str(held.cert_file), key_file=str(held.key_file))
    fleet = FakeFleet()

    with pytest.raises(InvalidConfig, match=r"tls\.cert_file: .*expired"):
        await serve_async(replace(config(model), tls=files), None, fleet.make)
    assert fleet.done == ["join", "stop"]


def tokens(num_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=[5, 6]), sampling_params=pb.SamplingParams(max_tokens=num_tokens)
    )


async def test_requests_that_run_end_before_the_service_does(model: str) -> None:
    fleet = FakeFleet()
    async with serving(fleet, config(model)) as (task, endpoints):
        for worker in fleet.workers:
            worker.step_s = 0.02
        async with grpc.aio.insecure_channel(endpoints.grpc) as channel:
            replies = []
            async for reply in rpc.GenerationStub(channel).Generate(tokens(10)):
                if not replies:
                    interrupt()
                replies.append(reply)
        await asyncio.wait_for(task, PATIENCE_S)

    assert len(replies[-1].complete.output_ids) == 10


async def test_a_second_signal_cuts_the_drain_short(model: str) -> None:
    async def stall(visit: Visit) -> None:
        await asyncio.Event().wait()

    fleet = FakeFleet()
    async with serving(fleet, config(model, drain_timeout_s=1000.0)) as (task, endpoints):
        for worker in fleet.workers:
            worker.hooks[FIRST_TOKEN] = stall
        async with grpc.aio.insecure_channel(endpoints.grpc) as channel:
            reading = asyncio.ensure_future(rpc.GenerationStub(channel).Generate(tokens(10)).read())
            while not any(worker.prefills for worker in fleet.workers):
                await asyncio.sleep(0.005)
            interrupt()
            await asyncio.sleep(0.05)
            assert not task.done()
            interrupt()
            await asyncio.wait_for(task, PATIENCE_S)
            await asyncio.wait({reading})

    assert isinstance(reading.exception(), grpc.aio.AioRpcError)
    assert fleet.done[-1] == "stop at once"


async def test_a_signal_during_the_start_stops_what_was_started(model: str) -> None:
    fleet = FakeFleet(num_missing=1)
    task = asyncio.create_task(serve_async(config(model, start_timeout_s=1000.0), None, fleet.make))
    while "start" not in fleet.done:
        await asyncio.sleep(0.005)

    interrupt()
    await asyncio.wait_for(task, PATIENCE_S)

    assert fleet.done == ["join", "start", "stop"]


async def test_workers_that_do_not_come_in_time_end_the_start_with_what_is_missing(model: str) -> None:
    fleet = FakeFleet(num_missing=1)

    with pytest.raises(NotReadyInTime, match="0 of 1 prefill, 2 of 2 decode"):
        await serve_async(config(model, start_timeout_s=0.5), None, fleet.make)
    assert fleet.done[-1] == "stop"


async def test_what_a_worker_could_not_start_for_is_raised_and_the_fleet_stopped(model: str) -> None:
    fleet = FakeFleet(failure=UnsupportedModel("it is an encoder"))

    with pytest.raises(UnsupportedModel, match="it is an encoder"):
        await serve_async(config(model), None, fleet.make)
    assert fleet.done[-1] == "stop"


async def test_a_port_in_use_is_an_error_of_the_configuration_and_leaves_nothing(model: str) -> None:
    fleet = FakeFleet()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        clash = replace(config(model), http=HttpConfig(port=taken.getsockname()[1]))

        with pytest.raises(InvalidConfig, match=r"http\.port"):
            await serve_async(clash, None, fleet.make)

    assert fleet.done == ["join", "start", "stop"]


class EarlyGuests(FakeFleet):
    """A prefill worker of another cluster registers before the service's own, at the registry that others know."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.guest = FakeWorker("west/prefill-0", Role.PREFILL, cluster_id="west")
        self.guest.probe = failing_probe
        self._address = address
        self.refused = ""

    async def _start(self, registry: str) -> None:
        await self.guest.start({})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await register(self._address, self.guest)
        self.refused = caught.value.details() or ""
        own, self.workers = self.workers, self.workers[1:]  # the decode workers, without the only prefill worker
        await super()._start(registry)
        await register(self._address, self.guest)
        self.late, self.workers = own[0], [*own, self.guest]

    async def complete(self) -> None:
        await self.late.start(self.workers[1]._fabric)
        await register(self.registry, self.late)


async def test_workers_of_other_clusters_come_to_a_known_port_and_are_not_waited_for(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fleet = EarlyGuests(f"127.0.0.1:{port}")
    service = asyncio.create_task(
        serve_async(
            replace(config(model), registry=RegistryConfig("0.0.0.0", port), tls=TlsConfig("off")), None, fleet.make
        )
    )
    while "workers ready: 0 of 1 prefill, 2 of 2 decode" not in capsys.readouterr().out:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    assert "ready: tiny" not in capsys.readouterr().out, "the guest is not the prefill worker that was asked for"

    await fleet.complete()
    said = ""
    while "ready: tiny" not in said:
        said += capsys.readouterr().out
        await asyncio.sleep(0.01)
    interrupt()
    await asyncio.wait_for(service, PATIENCE_S)

    assert "no worker of local has registered yet" in fleet.refused
    assert fleet.registry == f"127.0.0.1:{port}", "where the service's own workers reach it"
    assert "links tested: 2 of 2 work" in said, "those within the cluster"


async def test_a_known_port_that_nobody_elses_certificates_open_is_warned_of(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    closed = replace(config(model), registry=RegistryConfig(port=port), tls=TlsConfig("on"))
    async with serving(FakeFleet(), closed):
        assert "no other cluster can join" in caplog.text


async def failing_probe(request: worker_pb2.ProbeRequest) -> ProbeReport:
    return ProbeReport("tcp", error="PeerLost", reason="no answer")


def break_links(fleet: FakeFleet, *receivers: str) -> None:
    """Links to these workers fail their self-tests."""

    async def probe(request: worker_pb2.ProbeRequest) -> ProbeReport:
        return await (failing_probe if request.worker_id in receivers else passing_probe)(request)

    for worker in fleet.workers:
        worker.probe = probe


class BrokenFleet(FakeFleet):
    """Links to ``broken`` fail."""

    def __init__(self, *broken: str) -> None:
        super().__init__()
        self._broken = broken

    def make(self, config: ServiceConfig) -> FakeFleet:
        super().make(config)
        break_links(self, *self._broken)
        return self


async def test_the_doors_open_after_every_link_was_tested_and_a_broken_one_is_said_and_shown(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = BrokenFleet("decode-1")
    async with serving(fleet, config(model)) as (_, endpoints):
        probed = [worker.probed for worker in fleet.workers if worker.role is Role.PREFILL]
        async with grpc.aio.insecure_channel(endpoints.grpc) as channel:
            info = await rpc.GenerationStub(channel).GetClusterInfo(pb.GetClusterInfoRequest())
            answer = [reply async for reply in rpc.GenerationStub(channel).Generate(tokens(3))][-1]

    assert sorted(probed[0]) == ["decode-0", "decode-1"]
    assert [(link.to_worker, link.state, link.reason) for link in info.links] == [
        ("decode-0", "usable", ""),
        ("decode-1", "failed", "PeerLost: no answer"),
    ]
    assert (info.cluster_links[0].num_usable, info.cluster_links[0].num_links) == (1, 2)
    assert answer.complete.timing.decode_worker == "decode-0"
    said = capsys.readouterr().out
    assert "link prefill-0 to decode-1 is not used: PeerLost: no answer" in said
    assert "links tested: 1 of 2 work" in said


async def test_a_service_none_of_whose_links_works_does_not_start(model: str) -> None:
    fleet = BrokenFleet("decode-0", "decode-1")

    with pytest.raises(NotReadyInTime, match=r"no link .* prefill-0 to decode-0: PeerLost: no answer"):
        await serve_async(config(model, start_timeout_s=1.0), None, fleet.make)

    assert fleet.done == ["join", "start", "stop"]


async def test_with_self_tests_off_nothing_is_tested_until_somebody_asks(model: str) -> None:
    fleet = BrokenFleet("decode-1")
    off = replace(config(model), kv_transfer=KvTransferConfig(self_test=False))
    async with serving(fleet, off) as (_, endpoints):
        probed = [name for worker in fleet.workers for name in worker.probed]
        async with grpc.aio.insecure_channel(endpoints.grpc) as channel:
            checks = [check async for check in rpc.GenerationStub(channel).CheckLinks(pb.CheckLinksRequest())]

    assert probed == []
    verdicts = sorted((check.from_worker, check.to_worker, check.passed, check.num_pairs) for check in checks)
    assert verdicts == [("prefill-0", "decode-0", True, 2), ("prefill-0", "decode-1", False, 2)]


async def test_checking_links_starts_the_workers_tests_each_pair_once_and_stops_them(model: str) -> None:
    fleet = BrokenFleet("decode-1")
    results: list[PairResult] = []

    assert await check_links(config(model), results.append, fleet.make)

    assert sorted((result.pair.to_worker, result.report.passed) for result in results) == [
        ("decode-0", True),
        ("decode-1", False),
    ]
    assert sorted(name for worker in fleet.workers for name in worker.probed) == ["decode-0", "decode-1"]
    assert fleet.done == ["join", "start", "stop"]


async def test_a_signal_ends_a_check_and_its_workers(model: str) -> None:
    fleet = FakeFleet(num_missing=1)
    task = asyncio.create_task(check_links(config(model), lambda _: None, fleet.make))
    while "start" not in fleet.done:
        await asyncio.sleep(0.01)

    interrupt()

    assert await asyncio.wait_for(task, PATIENCE_S) is False
    assert fleet.done[-1].startswith("stop")


async def test_resolving_gives_the_folder(model: str, tmp_path: Path) -> None:
    assert await resolve_model(model, str(tmp_path)) == model


async def test_resolving_says_why_there_is_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="there is no config"):
        await resolve_model(f"dummy:{tmp_path}", str(tmp_path))


def test_serve_returns_2_and_prints_the_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = serve(config(f"dummy:{tmp_path}"))

    assert code == EXIT_WRONG_INPUT
    assert "there is no config.json" in capfd.readouterr().err
