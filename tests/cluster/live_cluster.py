"""A real service without Ray: workers, gRPC, KV transfer and a router, for tests that must see it whole.

Workers run as threads of the test process (``threads``: fast, can be asked whether their pools are whole) or as
processes (``processes``: can be killed). The gateway's half is the production Membership, Router and CostRecorder.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter

from cluster.catalogue import Catalogue
from cluster.certificates import write_files
from cluster.config import RouterConfig, TlsConfig, TracingConfig, WorkerConfig
from cluster.cost_recorder import CostRecorder
from cluster.internal_tls import InternalTls, Proof
from cluster.link_tester import LinkTester
from cluster.membership import Membership
from cluster.otlp import open_tracing
from cluster.router import RequestObserver, Router
from cluster.routing_policy import RoutingPolicy, make_policy
from cluster.view import ClusterView
from cluster.worker_host import WorkerHost
from cluster.worker_host import main as serve_worker
from core.clock import WallClock
from core.credentials import Credentials, Pem
from core.request import (
    ClusterId,
    FinishReason,
    GatewayId,
    GenerateRequest,
    OutputChunk,
    RequestId,
    RequestTiming,
    Role,
    SamplingParams,
    WorkerId,
)
from core.tracing import TRACING_OFF, Tracing
from engine.config import EngineConfig
from kv_transfer.config import KvTransferConfig
from protos.channels import InternalGrpc

START_TIMEOUT_S = 120
PLAIN = TlsConfig(mode="off")
ROUTER = RouterConfig(lease_s=3.0, no_route_wait_s=60.0, max_attempts=6, costs_file=None)


# Workers are forked from one process that has imported torch and transformers, which takes seconds of a core each time.
_PREPARED = multiprocessing.get_context("forkserver")
_PREPARED.set_forkserver_preload(["cluster.worker_host"])


@dataclass
class WorkerProcess:
    """One worker as a process of its own."""

    config: WorkerConfig
    process: multiprocessing.process.BaseProcess

    @classmethod
    def start(cls, config: WorkerConfig) -> WorkerProcess:
        told = TypeAdapter(WorkerConfig).dump_json(config).decode()
        process = _PREPARED.Process(target=_serve, args=(told,), name=config.worker_id)
        process.start()
        return cls(config, process)

    @property
    def has_ended(self) -> bool:
        return not self.process.is_alive()

    def kill(self, signum: int = signal.SIGKILL) -> None:
        assert self.process.pid is not None, "started"
        os.kill(self.process.pid, signum)

    def ask_to_stop(self) -> None:
        if not self.has_ended:
            self.process.terminate()

    def stop(self) -> None:
        self.ask_to_stop()
        self.process.join(timeout=15)
        if not self.has_ended:
            self.process.kill()
            self.process.join()


def _serve(config: str) -> None:
    """What ``python -m cluster.worker_host`` does, in a process that was prepared; its address is asked of nobody."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        sys.exit(serve_worker([config]))


@dataclass
class LiveCluster:
    """What a test holds of a running service."""

    membership: Membership
    router: Router
    internal: InternalGrpc  # how the gateway reaches the workers
    registry: str
    hosts: dict[WorkerId, WorkerHost] = field(default_factory=dict)
    processes: dict[WorkerId, WorkerProcess] = field(default_factory=dict)
    num_requests: int = 0
    tracing: Tracing = TRACING_OFF

    async def generate(
        self, prompt: Sequence[int], sampling: SamplingParams | None = None, salt: bytes = b""
    ) -> Answer:
        """Run one request to its end."""
        answer = Answer()
        async for chunk in self.stream(prompt, sampling, salt):
            answer.take(chunk)
        return answer

    def stream(
        self, prompt: Sequence[int], sampling: SamplingParams | None = None, salt: bytes = b""
    ) -> AsyncIterator[OutputChunk]:
        """The chunks of one request."""
        self.num_requests += 1
        sampling = sampling or SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        if sampling.seed is None:
            sampling = replace(sampling, seed=self.num_requests)
        request = GenerateRequest(
            RequestId(f"request-{self.num_requests}"), tuple(prompt), sampling, salt, WallClock().now()
        )
        return self.router.generate(request)

    async def pools_whole(self, timeout_s: float = 10.0) -> bool:
        """True once every live worker reports all its pages free (or cached) and nothing under way."""
        return await self.membership.wait_until(_all_idle, timeout_s)

    async def check_integrity(self) -> None:
        """Every in-process pool accounts for each of its pages."""
        assert await self.pools_whole(), self.membership.view()
        for host in self.hosts.values():
            await asyncio.wrap_future(host.engine.submit(lambda engine: engine.check_integrity()))


@dataclass
class Answer:
    """A request's output, put together per continuation."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    chunks: list[OutputChunk] = field(default_factory=list)
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    timings: dict[int, RequestTiming] = field(default_factory=dict)

    def take(self, chunk: OutputChunk) -> None:
        self.chunks.append(chunk)
        self.token_ids.setdefault(chunk.index, []).extend(chunk.token_ids)
        if chunk.finish_reason is not None:
            assert chunk.index not in self.finish_reasons, "a continuation ends once"
            self.finish_reasons[chunk.index] = chunk.finish_reason
        if chunk.timing is not None:
            self.timings[chunk.index] = chunk.timing

    @property
    def tokens(self) -> list[int]:
        """The only continuation's tokens."""
        assert set(self.token_ids) == {0}
        return self.token_ids[0]

    @property
    def timing(self) -> RequestTiming:
        return self.timings[0]


def _all_idle(view: ClusterView) -> bool:
    return all(
        w.load.pages_free == w.pages_total
        and not (w.load.num_running or w.load.num_waiting or w.load.num_sessions or w.load.pages_quarantined)
        for w in view.workers
    )


def worker_config(
    worker_id: str,
    role: Role,
    model: str,
    registry: str,
    engine: EngineConfig,
    kv_transfer: KvTransferConfig | None = None,
    credentials: Credentials | None = None,
    tracing: TracingConfig = TracingConfig(),
    tensor_parallel: int = 1,
) -> WorkerConfig:
    return WorkerConfig(
        worker_id=WorkerId(worker_id),
        cluster_id=ClusterId("test"),
        role=role,
        model=model,
        model_cache_dir="~/.cache/prfaas/models",
        engine=engine,
        kv_transfer=kv_transfer or KvTransferConfig(),
        host="127.0.0.1",
        registries=(registry,),
        credentials=credentials,
        log_level="warning",
        tracing=tracing,
        tensor_parallel=tensor_parallel,
    )


def _on_this_node(proof: Proof, files: ExitStack) -> Credentials | None:
    """Files that another process can open too, of what ray_fleet's actor keeps to itself."""
    if not isinstance(proof, Pem):
        return proof
    return write_files(Path(files.enter_context(tempfile.TemporaryDirectory())), proof)


@asynccontextmanager
async def live_cluster(
    model: str,
    *,
    engine: EngineConfig,
    decode_engine: EngineConfig | None = None,
    num_prefill: int = 1,
    num_decode: int = 1,
    kv_transfer: KvTransferConfig | None = None,
    processes: bool = False,
    policy: str | RoutingPolicy = "cache_aware",
    router: RouterConfig = ROUTER,
    tls: TlsConfig = PLAIN,
    self_test: bool = False,
    differing: Mapping[str, KvTransferConfig] | None = None,
    observer: RequestObserver | None = None,
    tracing: TracingConfig = TracingConfig(),
    num_ranks: tuple[int, int] = (1, 1),
) -> AsyncIterator[LiveCluster]:
    """A service of tiny workers on this machine; torn down whatever happens.

    ``self_test``: links are tested before they are used. ``decode_engine``: that of decode workers, if it differs.
    ``differing``: worker id |-> its own ``kv_transfer``. ``num_ranks``: of each prefill and each decode worker.
    """
    clock = WallClock()
    gateway_id = GatewayId("test-gateway")
    internal_tls = InternalTls(tls, ("127.0.0.1",), ClusterId("test"))
    internal = InternalGrpc(internal_tls.open(gateway_id))
    costs = CostRecorder(Catalogue(), lambda *_: None)
    membership = Membership(router, gateway_id, clock, internal, self_test=self_test, listener=costs)
    costs.start(membership)
    tester = LinkTester(membership, clock, unasked=self_test)
    tester.start()
    registry = await membership.start("127.0.0.1")
    routing = make_policy(policy, router.routing) if isinstance(policy, str) else policy
    traced, otlp = open_tracing(tracing, clock, {"service.instance.id": gateway_id})
    requests = Router(membership, routing, router, clock, gateway_id, observer=observer, tracing=traced)
    cluster = LiveCluster(membership, requests, internal, registry, tracing=traced)
    files = ExitStack()
    roles = [(Role.PREFILL, i) for i in range(num_prefill)] + [(Role.DECODE, i) for i in range(num_decode)]
    engines = {Role.PREFILL: engine, Role.DECODE: decode_engine or engine}
    configs = [
        worker_config(
            f"{role.value}-{i}",
            role,
            model,
            registry,
            engines[role],
            (differing or {}).get(f"{role.value}-{i}", kv_transfer),
            held,
            tracing,
            num_ranks[role is Role.DECODE],
        )
        for role, i in roles
        for held in [_on_this_node(internal_tls.proof_of(WorkerId(f"{role.value}-{i}")), files)]
    ]
    try:
        for config in configs:
            if processes:
                cluster.processes[config.worker_id] = WorkerProcess.start(config)
            else:
                host = WorkerHost(config)
                await asyncio.to_thread(host.start)
                cluster.hosts[config.worker_id] = host
        ready = await membership.wait_until(lambda view: len(view.workers) == len(configs), START_TIMEOUT_S)
        assert ready, "the workers did not register in time"
        yield cluster
    finally:
        await cluster.router.drain(1.0)
        # At once: nobody asks any more, and no gateway needs a moment to hear that they leave.
        await asyncio.gather(*(asyncio.to_thread(host.stop, 0.0) for host in cluster.hosts.values()))
        await asyncio.gather(*(asyncio.to_thread(worker.stop) for worker in cluster.processes.values()))
        await tester.close()
        await costs.close()
        await membership.close()
        files.close()
        internal_tls.close()
        if otlp is not None:
            await asyncio.to_thread(otlp.close)
