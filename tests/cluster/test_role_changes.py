"""Workers of a real service that change their role under load: asked by hand, and by the planner. No token differs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from cluster.config import PlannerConfig
from cluster.cost_model import ComputeCost, CostView, LinearCost
from cluster.demand import DemandMeter
from cluster.planner import Planner
from cluster.planning_policy import PlannerSettings
from cluster.role_conversion import Outcome
from cluster.view import ClusterView, WorkerView
from core.clock import WallClock
from core.request import ClusterId, EngineId, Role, SamplingParams, WorkerId
from engine.config import EngineConfig
from tests.cluster.live_cluster import LiveCluster, live_cluster
from tests.cluster.reference import ReferenceModel

pytestmark = [pytest.mark.timeout(120), pytest.mark.parametrize("family", ["llama"])]

NUM_NEW, NUM_LONG = 12, 90
PATIENCE_S = 30.0
ENGINE = EngineConfig(dtype="float32", page_size=16, num_pages=256, max_batch_tokens=64, max_batch_size=16, threads=1)


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def worker(view: ClusterView, worker_id: str) -> WorkerView:
    return next(w for w in view.workers if w.worker_id == worker_id)


async def set_role(cluster: LiveCluster, worker_id: str, role: Role) -> None:
    client = cluster.membership.client(EngineId(worker(cluster.membership.view(), worker_id).engine_id))
    assert client is not None
    await client.set_role(role)


@dataclass
class Load:
    """Requests that keep coming, each checked against the reference."""

    cluster: LiveCluster
    model: ReferenceModel
    num_tokens: int = NUM_NEW
    workers: list[tuple[str | None, str | None]] = field(default_factory=list)  # (prefill, decode) of each answer

    async def keep_asking(self, prompts: Sequence[Sequence[int]], salt: bytes) -> None:
        count = 0
        while True:
            for prompt in prompts:
                count += 1
                num_tokens = self.num_tokens
                answer = await self.cluster.generate(prompt, greedy(num_tokens), salt=salt + b"%d" % count)
                assert answer.tokens == self.model.expected(prompt, num_tokens)
                assert answer.timing.num_attempts == 1
                self.workers.append((answer.timing.prefill_worker, answer.timing.decode_worker))


@asynccontextmanager
async def under_load(cluster: LiveCluster, model: ReferenceModel, num_clients: int = 3) -> AsyncIterator[Load]:
    load = Load(cluster, model)
    clients = [asyncio.create_task(load.keep_asking(model.prompts[4:7], b"%d-" % i)) for i in range(num_clients)]
    try:
        yield load
    finally:
        for client in clients:
            client.cancel()
        for client in clients:
            with suppress(asyncio.CancelledError):
                await client  # an answer that was wrong is raised here


async def test_a_worker_that_turns_keeps_what_it_has_and_says_how_much_of_it_is_left(
    family: str, tiny_model: ReferenceModel
) -> None:
    prompt = tiny_model.prompts[4]
    async with live_cluster(
        str(tiny_model.folder), engine=ENGINE, num_prefill=2, num_decode=2, self_test=True, policy="round_robin"
    ) as cluster:
        membership = cluster.membership
        assert await membership.wait_until(lambda v: all(link.usable for link in v.links.values()), PATIENCE_S)
        async with under_load(cluster, tiny_model, 2) as load:
            started: list[asyncio.Event] = []

            async def answer(index: int) -> tuple[list[int], str | None]:
                tokens: list[int] = []
                timing = None
                async for chunk in cluster.stream(prompt, greedy(NUM_LONG), salt=b"long%d" % index):
                    tokens += chunk.token_ids
                    timing = chunk.timing or timing
                    if len(tokens) >= 2:  # one of them is the decode worker's
                        started[index].set()
                assert timing is not None
                return tokens, timing.decode_worker

            started = [asyncio.Event() for _ in range(4)]
            answers = [asyncio.create_task(answer(index)) for index in range(4)]
            await asyncio.gather(*(event.wait() for event in started))
            await set_role(cluster, "decode-1", Role.PREFILL)

            def turned(view: ClusterView) -> bool:
                return worker(view, "decode-1").role is Role.PREFILL

            assert await membership.wait_until(turned, PATIENCE_S)
            assert worker(membership.view(), "decode-1").load.num_other_role >= 1
            finished = await asyncio.gather(*answers)
            assert all(tokens == tiny_model.expected(prompt, NUM_LONG) for tokens, _ in finished)
            assert "decode-1" in {decode for _, decode in finished}, "what it had, it decoded to the end"

            def drained(view: ClusterView) -> bool:
                return worker(view, "decode-1").load.num_other_role == 0

            assert await membership.wait_until(drained, PATIENCE_S)
            # Its new link is tested before it carries anything, and then it is a prefill worker like the others.
            link = (WorkerId("decode-1"), WorkerId("decode-0"))
            assert await membership.wait_until(lambda v: link in v.links and v.links[link].usable, PATIENCE_S)
            probe = membership.view().links[link].probe
            assert probe is not None
            assert probe.exact
            seen = len(load.workers)
            async with asyncio.timeout(PATIENCE_S):
                while ("decode-1", "decode-0") not in load.workers[seen:]:
                    await asyncio.sleep(0.02)
            await set_role(cluster, "decode-1", Role.DECODE)
            async with asyncio.timeout(PATIENCE_S):
                while not any(decode == "decode-1" for _, decode in load.workers[-4:]):
                    await asyncio.sleep(0.02)
        await cluster.check_integrity()


async def test_the_planner_turns_a_worker_when_answers_become_long_and_back(
    family: str, tiny_model: ReferenceModel
) -> None:
    """Costs are made up so that 2 + 2 workers are right for short answers and 1 + 3 for long ones."""
    quick = PlannerSettings(period_s=0.2, patience=1, cooldown_s=1.0, conversion_s=0.1, min_requests=4)
    config = PlannerConfig(interval_s=0.1, demand_window_s=1.0, dual=quick)
    clock = WallClock()
    demand = DemandMeter(clock, config.demand_window_s)
    # A prompt of about 38 tokens takes 38 ms; a token of an answer takes 1 ms / 16 of a decode worker.
    costs = ComputeCost(LinearCost((0.0, 1e-3, 0.0)), LinearCost((0.0, 4e-3, 0.0)))
    async with live_cluster(
        str(tiny_model.folder), engine=ENGINE, num_prefill=2, num_decode=2, self_test=True, observer=demand
    ) as cluster:
        profiles = {found.profile for found in cluster.membership.view().workers}
        cluster.membership.note_costs(CostView(dict.fromkeys(profiles, costs), {}))
        planner = Planner(
            cluster.membership,
            demand,
            cluster.router,
            config,
            clock,
            cluster_id=ClusterId("test"),
            capacity=lambda *_: None,
            retest=lambda *_: None,
        )
        planner.start()
        try:
            async with under_load(cluster, tiny_model) as load:

                async def roles_become(num_prefill: int, num_decode: int) -> None:
                    def reached(view: ClusterView) -> bool:
                        return (len(view.ready(Role.PREFILL)), len(view.ready(Role.DECODE))) == (
                            num_prefill,
                            num_decode,
                        )

                    assert await cluster.membership.wait_until(reached, PATIENCE_S), planner.status

                load.num_tokens = NUM_LONG
                await roles_become(1, 3)
                load.num_tokens = 4
                await roles_become(2, 2)
            assert planner.status.num_failures == 0
            assert planner.status.conversions[Role.DECODE, Outcome.DONE] >= 1
        finally:
            await planner.close()
        await cluster.check_integrity()
