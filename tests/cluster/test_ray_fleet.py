"""A real Ray of our own with tiny workers: they come, come back after kill -9, and go without a trace.

Each test pays for a Ray and for torch in its workers (10 to 20 s on two cores), so each asks several questions.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from cluster import ray_fleet
from cluster.config import PoolConfig, RayConfig, ServiceConfig, TlsConfig
from cluster.internal_tls import InternalTls
from cluster.membership import Membership
from cluster.ray_fleet import RayFleet, StartFailure, WorkerActor
from cluster.view import ClusterView
from core.clock import WallClock
from core.errors import InvalidConfig, UnsupportedModel
from core.request import ClusterId, GatewayId, Role, WorkerId
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc
from tests.cluster.ray_service import START_S, service
from tests.unit.cluster import tiny_tokenizers

pytestmark = pytest.mark.ray

STOP_S = 10.0
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights, with a tokenizer."""
    return tiny_tokenizers.save_dummy_model(tmp_path_factory.mktemp("dummy"))


@asynccontextmanager
async def running(config: ServiceConfig) -> AsyncIterator[tuple[RayFleet, Membership, InternalGrpc]]:
    """The fleet, a gateway's membership for it to register at, and how that gateway reaches workers."""
    fleet = RayFleet(config)
    tls = InternalTls(config.tls, ("127.0.0.1",), ClusterId("test"))
    internal = InternalGrpc(tls.open(GatewayId("test")))
    membership = Membership(config.router, GatewayId("test"), WallClock(), internal)
    try:
        host = await asyncio.to_thread(fleet.join)
        await asyncio.to_thread(fleet.start, await membership.start(host), tls.proof_of)
        yield fleet, membership, internal
    finally:
        await membership.close()
        await asyncio.to_thread(fleet.stop, 1.0)
        tls.close()


async def view_where(fleet: RayFleet, membership: Membership, fits: Callable[[ClusterView], bool]) -> ClusterView:
    async with asyncio.timeout(START_S):
        while not await membership.wait_until(fits, 0.5):
            await asyncio.to_thread(fleet.check)
    return membership.view()


async def describe(address: str, internal: InternalGrpc) -> pb.WorkerDescription:
    async with internal.channel(address) as channel:
        reply: pb.WorkerDescription = await rpc.WorkerStub(channel).Describe(pb.DescribeRequest(), timeout=5.0)
        return reply


def num_ready(view: ClusterView) -> int:
    return sum(len(view.ready(role)) for role in Role)


def children() -> set[int]:
    """Processes below this one that are alive."""
    return {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


async def none_left(pids: set[int]) -> bool:
    for _ in range(100):
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        await asyncio.sleep(0.05)
    return False


async def test_workers_serve_come_back_after_kill_9_and_leave_nothing_when_stopped(model: str) -> None:
    """The decode worker is of two ranks, each an actor in its placement group; they come and go with the first."""
    before = children()
    config = service(model, tls=TlsConfig(mode="on"), decode=PoolConfig(tensor_parallel=2))
    async with running(config) as (fleet, membership, internal):
        view = await view_where(fleet, membership, lambda view: num_ready(view) == 2)
        decode, prefill = view.workers
        assert (decode.worker_id, decode.role, decode.tensor_parallel) == ("decode-0", Role.DECODE, 2)
        assert (prefill.worker_id, prefill.role) == ("prefill-0", Role.PREFILL)
        assert decode.engine_id != prefill.engine_id
        assert decode.address != prefill.address
        assert decode.model.fingerprint == prefill.model.fingerprint

        pid = (await describe(decode.address, internal)).pid
        assert psutil.Process(pid).nice() == psutil.Process().nice(), "Ray would have it step back behind all others"
        os.kill(pid, signal.SIGKILL)
        view = await view_where(
            fleet,
            membership,
            lambda view: num_ready(view) == 2 and all(w.engine_id != decode.engine_id for w in view.workers),
        )

        restarted = view.workers[0]
        assert restarted.worker_id == "decode-0"
        assert (await describe(restarted.address, internal)).pid != pid
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await describe(restarted.address, InternalGrpc(None))
        started = children() - before
        assert len(started) > 2

    assert await none_left(started)


async def test_a_model_that_cannot_be_served_is_reported_with_its_reason_and_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    async with running(service(f"dummy:{tmp_path}", prefill=PoolConfig(count=0))) as (fleet, membership, _):
        with pytest.raises(UnsupportedModel) as caught:
            await view_where(fleet, membership, lambda view: num_ready(view) == 1)

        assert str(caught.value)


def test_gpus_that_the_machine_does_not_have_are_refused_at_once(model: str) -> None:
    fleet = RayFleet(service(model, decode=PoolConfig(num_gpus=64)))
    try:
        with pytest.raises(InvalidConfig, match="64 GPUs"):
            fleet.join()
    finally:
        fleet.stop(0.0)


def test_a_ray_that_is_not_there_is_an_error_of_the_configuration(model: str) -> None:
    fleet = RayFleet(service(model, ray=RayConfig(address="127.0.0.1:1")))

    with pytest.raises(InvalidConfig, match=r"ray\.address"):
        fleet.join()
    fleet.stop(0.0)


SERVE = """
import sys
from tests.cluster.ray_service import service
from cluster.config import PoolConfig
from cluster.launch import serve
sys.exit(serve(service(sys.argv[1], prefill=PoolConfig(count=0))))
"""  # of one worker: that others stop as well is asked above, and each has torch to load


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_whole_service_in_time_with_exit_code_0(
    model: str, signum: signal.Signals, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", SERVE, model],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            lines.append(line)
            if line.startswith("prfaas: ready: "):
                break
        assert lines[-1].startswith("prfaas: ready: "), (lines, (tmp_path / "log").read_text())
        family = {p.pid for p in psutil.Process(child.pid).children(recursive=True)}
        if sys.platform == "linux":
            loaded = Path(f"/proc/{child.pid}/maps").read_text()
            assert "tokenizers" in loaded
            assert "torch" not in loaded, "a gateway computes nothing"

        if signum is signal.SIGINT:
            os.killpg(child.pid, signum)  # as a terminal does
        else:
            child.send_signal(signum)
        child.stdout.read()

        assert child.wait(STOP_S) == 0, (tmp_path / "log").read_text()
        assert asyncio.run(none_left(family))
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.stdout is not None:
            child.stdout.close()


def test_a_service_whose_model_cannot_be_served_ends_with_code_2_and_the_reason(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE, f"dummy:{tmp_path}"], capture_output=True, text=True, cwd=ROOT, timeout=START_S
    )

    assert done.returncode == 2
    assert "there is no config.json" in done.stderr


def test_a_worker_has_no_thread_limit_of_rays_when_it_loads_torch(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[str | None] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(ray_fleet, "_start_host", lambda *_: limits.append(os.environ.get("OMP_NUM_THREADS")))

    WorkerActor(service(model), Role.DECODE, WorkerId("decode-0"), "127.0.0.1:1", None)

    assert limits == [None]


@pytest.mark.parametrize("restarted", [False, True])
def test_an_exception_at_the_first_start_is_kept_to_be_asked_for_and_ends_a_restarted_actor(
    restarted: bool, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(ray_fleet, "_start_host", fail)
    monkeypatch.setattr(ray_fleet, "_is_restart", lambda: restarted)
    if restarted:
        with pytest.raises(OSError, match="no space left"):
            WorkerActor(service(model), Role.DECODE, WorkerId("decode-0"), "127.0.0.1:1", None)
    else:
        actor = WorkerActor(service(model), Role.DECODE, WorkerId("decode-0"), "127.0.0.1:1", None)
        assert actor.start_failure() == StartFailure("OSError", "no space left")
