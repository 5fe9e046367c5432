"""More than a live gateway can take, over HTTP and gRPC to workers: who is served, in which order, and what the others
are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import httpx
import pytest

from cluster.config import AdmissionConfig, GrpcConfig, HttpConfig, ServiceConfig
from cluster.finished_requests import RecentRequests
from cluster.generation import Generation
from cluster.grpc_gateway import GrpcGateway
from cluster.http_gateway import HttpGateway
from cluster.internal_tls import TlsDecision
from cluster.message_json import as_dict
from cluster.metrics import Metrics
from cluster.tokenizer import Tokenizer
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc
from tests.unit.cluster.fake_worker import FIRST_TOKEN, Visit
from tests.unit.cluster.gateway_and_fakes import Gateway, gateway, until
from tests.unit.cluster.scripted_router import ScriptedLinks, ScriptedPlanner

MAX_QUEUED = 6
ADMISSION = AdmissionConfig(prefill_queue_tokens=3, prefill_queue_s=1e-9, max_queued=MAX_QUEUED)


@dataclass
class Service:
    """Both doors, a router, a prefill worker that computes one prompt when the test says so, and a decode worker."""

    gateway: Gateway
    metrics: Metrics
    http: httpx.AsyncClient
    grpc: rpc.GenerationStub
    computed: list[int] = field(default_factory=list)  # first token of each prompt, in the order of their turns
    crowd: int = 0  # most prompts that the prefill worker held at once
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def prefill(self, visit: Visit) -> None:
        self.crowd = max(self.crowd, len(visit.worker.running))
        await self.turns.acquire()
        self.computed.append(visit.spec.prompt_token_ids[0])

    async def send(self, number: int, **headers: str) -> asyncio.Task[httpx.Response]:
        """A request that has come to the router, or is answered already."""
        router, before = self.gateway.router, self.gateway.router.counters
        body = {"prompt": [number], "max_tokens": 2, "seed": 0}
        task = asyncio.create_task(self.http.post("/v1/completions", json=body, headers=headers))
        inflight = router.num_inflight
        await until(lambda: router.num_inflight > inflight or router.counters != before)
        return task


@asynccontextmanager
async def overloaded(tokenizer: Tokenizer, admission: AdmissionConfig) -> AsyncIterator[Service]:
    """The service; its first request occupies the prefill worker."""
    config = ServiceConfig("m", http=HttpConfig(port=0), grpc=GrpcConfig(port=0), admission=admission)
    async with gateway(admission=admission) as g:
        planner = ScriptedPlanner()
        metrics = Metrics(g.membership, g.router, lambda *_: None, planner)
        generation = Generation(g.router, g.membership, tokenizer, metrics, config, g.clock)
        off = TlsDecision(False, "this is a test")
        requests = RecentRequests()
        door = GrpcGateway(generation, g.router, g.membership, ScriptedLinks(), planner, config, g.clock, off, requests)
        http = HttpGateway(
            generation,
            g.membership,
            metrics,
            config,
            g.clock,
            lambda: as_dict(door.cluster_info()),
            lambda limit: as_dict(door.recent_requests(limit)),
        )
        await http.start()
        await door.start()
        try:
            async with (
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{http.port}", timeout=20) as client,
                grpc.aio.insecure_channel(f"127.0.0.1:{door.port}") as channel,
            ):
                service = Service(g, metrics, client, rpc.GenerationStub(channel))
                g["prefill-0"].hooks[FIRST_TOKEN] = service.prefill
                yield service
        finally:
            await http.stop(0)
            await door.stop(0)


async def test_overload_gets_429_and_whoever_is_admitted_is_served_in_order_within_the_bounds(
    tiny_tokenizer: Tokenizer,
) -> None:
    async with overloaded(tiny_tokenizer, ADMISSION) as service:
        priorities = (0, 0, 0, 0, 0, 5, 0, 5, 0, 0, 0, -5, 0, 0)
        tasks = [
            await service.send(10 + number, **{"x-priority": str(priority), "x-slo-ttft-ms": "15000"})
            for number, priority in enumerate(priorities)
        ]
        assert service.gateway.router.counters.admission.num_queued == MAX_QUEUED

        for _ in tasks:
            service.turns.release()
        answers = await asyncio.gather(*tasks)

        # The worker holds three prompts of one token and lets a fourth in; six wait, those of priority 5 first. Of the
        # others the first ones wait: whoever comes later, or would go last, gives way.
        served = [number for number, answer in enumerate(answers) if answer.status_code == 200]
        assert served == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert service.computed == [10, 11, 12, 13, 15, 17, 14, 16, 18, 19]
        assert service.crowd == 4
        for number in served:
            (timing,) = answers[number].json()["prfaas"]["timing"]
            assert timing["slo_ttft_met"]
            assert (timing["admission_s"] > 0) == (number > 3)
        for number in set(range(len(answers))) - set(served):
            refused = answers[number]
            assert (refused.status_code, refused.headers["x-prfaas-rejection"]) == (429, "max_queued")
            assert int(refused.headers["retry-after"]) >= 1
            said = refused.json()["prfaas"]["rejection"]
            assert (said["reason"], said["predicted"], said["allowed"]) == ("max_queued", MAX_QUEUED + 1, MAX_QUEUED)
        value = service.metrics.registry.get_sample_value
        assert value("prfaas_rejections_total", {"reason": "max_queued"}) == 4
        assert value("prfaas_slo_requests_total", {"result": "met"}) == 10
        assert value("prfaas_slo_requests_total", {"result": "refused"}) == 4
        assert value("prfaas_admission_wait_seconds_count") == 14
        assert service.gateway.router.num_inflight == 0


async def test_a_tenants_flood_costs_another_tenant_nothing(tiny_tokenizer: Tokenizer) -> None:
    async with overloaded(tiny_tokenizer, ADMISSION) as service:
        flood = [await service.send(10 + number) for number in range(4 + 2 * MAX_QUEUED)]
        other = asyncio.create_task(
            service.http.post("/v1/completions", json={"prompt": [99], "max_tokens": 2, "seed": 0, "cache_salt": "b"})
        )
        await until(lambda: service.gateway.router.counters.admission.refusals_by_reason == {"max_queued": 7})

        for _ in range(len(flood) + 1):
            service.turns.release()
        await asyncio.gather(*flood)

        assert (await other).status_code == 200
        assert service.computed.index(99) <= 5  # after those that the worker had, and at most one of the flood


async def test_grpc_is_told_the_same(tiny_tokenizer: Tokenizer) -> None:
    async with overloaded(tiny_tokenizer, AdmissionConfig(prefill_queue_tokens=0, max_queued=0)) as service:
        running = await service.send(10)
        request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[11]))
        request.sampling_params.max_tokens = 2

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.grpc.Generate(request).read()
        service.turns.release()

        metadata = dict(caught.value.trailing_metadata())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "1 continuations would wait for their turn, 0 may"
        assert (metadata["x-prfaas-rejection"], int(metadata["retry-after"])) == ("max_queued", 1)
        assert (await running).status_code == 200
