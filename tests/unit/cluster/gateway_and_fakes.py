"""The gateway's production half (Membership and Router) with fake workers, for the tests of either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cluster.config import AdmissionConfig, RouterConfig
from cluster.membership import Membership, WorkerListener
from cluster.router import RequestObserver, Router
from cluster.routing_policy import RoundRobin, RoutingPolicy
from core.clock import WallClock
from core.request import (
    NO_SLO,
    GatewayId,
    GenerateRequest,
    OutputChunk,
    RequestId,
    RequestTiming,
    Role,
    SamplingParams,
    Slo,
)
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from protos.channels import InternalGrpc
from tests.unit.cluster.fake_worker import FakeWorker

GATEWAY = GatewayId("gateway-1")
CONFIG = RouterConfig(lease_s=2.0, no_route_wait_s=2.0, max_attempts=4, max_inflight=64, costs_file=None)
PROMPT = (1, 2, 3, 4, 5)
PATIENCE_S = 5.0


@dataclass
class Gateway:
    """A running gateway and the workers around it."""

    membership: Membership
    router: Router
    registry: str
    clock: WallClock
    fabric: dict[str, FakeWorker] = field(default_factory=dict)
    workers: dict[str, FakeWorker] = field(default_factory=dict)
    num_requests: int = 0

    def __getitem__(self, worker_id: str) -> FakeWorker:
        return self.workers[worker_id]

    async def add(self, worker: FakeWorker) -> FakeWorker:
        """Start the worker and register it."""
        await worker.start(self.fabric)
        self.workers[worker.worker_id] = worker
        await register(self.registry, worker)
        return worker

    def request(
        self,
        *,
        num_tokens: int = 8,
        n: int = 1,
        prompt: Sequence[int] = PROMPT,
        request_id: str | None = None,
        deadline_s: float | None = None,
        salt: bytes = b"",
        slo: Slo = NO_SLO,
        priority: int = 0,
    ) -> GenerateRequest:
        self.num_requests += 1
        now = self.clock.now()
        return GenerateRequest(
            request_id=RequestId(request_id or f"r{self.num_requests}"),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=num_tokens, seed=3, n=n),
            arrived_at=now,
            deadline_at=now + deadline_s if deadline_s is not None else None,
            salt=salt,
            slo=slo,
            priority=priority,
        )

    async def generate(self, request: GenerateRequest) -> Answer:
        return await collect(self.router.generate(request))


@dataclass
class Answer:
    """What came out of one generator."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    last: dict[int, OutputChunk] = field(default_factory=dict)
    chunks: list[OutputChunk] = field(default_factory=list)

    @property
    def timing(self) -> RequestTiming:
        timing = self.last[0].timing
        assert timing is not None
        return timing

    def take(self, chunk: OutputChunk) -> None:
        assert chunk.index not in self.last, "nothing comes after the last chunk"
        self.chunks.append(chunk)
        self.tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
        if chunk.finish_reason is not None:
            self.last[chunk.index] = chunk


async def collect(stream: AsyncGenerator[OutputChunk, None]) -> Answer:
    answer = Answer()
    async for chunk in stream:
        answer.take(chunk)
    return answer


async def register(registry: str, worker: FakeWorker, *, leaving: bool = False) -> pb.RegisterReply:
    """What a worker process does every few seconds."""
    async with worker.internal.channel(registry) as channel:
        reply: pb.RegisterReply = await rpc.RegistryStub(channel).Register(
            pb.RegisterRequest(
                worker_id=worker.worker_id, engine_id=worker.engine_id, address=worker.address, leaving=leaving
            ),
            timeout=PATIENCE_S,
        )
        return reply


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that other coroutines bring about."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def gateway(
    num_prefill: int = 1,
    num_decode: int = 1,
    *,
    config: RouterConfig = CONFIG,
    policy: RoutingPolicy | None = None,
    self_test: bool = False,
    admission: AdmissionConfig | None = None,
    observer: RequestObserver | None = None,
    listener: WorkerListener | None = None,
) -> AsyncIterator[Gateway]:
    """A gateway with so many fake workers, ``prefill-0``, ``decode-0``, ...; whatever happens, nothing is left."""
    clock = WallClock()
    membership = Membership(config, GATEWAY, clock, InternalGrpc(None), self_test=self_test, listener=listener)
    registry = await membership.start("127.0.0.1")
    router = Router(membership, policy or RoundRobin(), config, clock, GATEWAY, admission, observer)
    running = Gateway(membership, router, registry, clock)
    try:
        for index in range(num_prefill):
            await running.add(FakeWorker(f"prefill-{index}", Role.PREFILL))
        for index in range(num_decode):
            await running.add(FakeWorker(f"decode-{index}", Role.DECODE))
        yield running
    finally:
        await router.drain(0.0)
        await membership.close()
        for worker in running.workers.values():
            await worker.kill()
