"""The load generator against a real service: real workers, router and gRPC door."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.client_record import TOKEN_IDS
from cluster.bench.grpc_target import GrpcTarget
from cluster.bench.load import run_load
from cluster.bench.metrics import Slos, summary
from cluster.bench.prompts import TokenWording
from cluster.bench.schedule import DrawnRequests, make_schedule
from cluster.config import GrpcConfig, ServiceConfig
from cluster.finished_requests import RecentRequests
from cluster.generation import Generation
from cluster.grpc_gateway import GrpcGateway
from cluster.internal_tls import TlsDecision
from cluster.length_distribution import LengthDistribution
from cluster.metrics import Metrics
from cluster.simulator.workload import USERS, ArrivalPlan
from cluster.tokenizer import Tokenizer
from core.clock import WallClock
from engine.config import EngineConfig
from tests.cluster.live_cluster import live_cluster
from tests.cluster.reference import ReferenceModel
from tests.unit.cluster import tiny_tokenizers
from tests.unit.cluster.scripted_router import ScriptedLinks, ScriptedPlanner

PAGE = 16
ENGINE = EngineConfig(dtype="float32", page_size=PAGE, num_pages=256, max_batch_tokens=64, max_batch_size=8, threads=1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("family", ["llama"])
async def test_conversations_with_a_real_service_reuse_what_it_answered(
    family: str, tiny_model: ReferenceModel, tmp_path: Path
) -> None:
    config = ServiceConfig(model="tiny", served_model_name="tiny", grpc=GrpcConfig(port=0))
    clock, links, planner = WallClock(), ScriptedLinks(), ScriptedPlanner()
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path))
    async with live_cluster(str(tiny_model.folder), engine=ENGINE) as cluster:
        membership, router = cluster.membership, cluster.router
        metrics = Metrics(membership, router, lambda *_: None, planner)
        generation = Generation(router, membership, tokenizer, metrics, config, clock)
        off, requests = TlsDecision(False, "test"), RecentRequests()
        door = GrpcGateway(generation, router, membership, links, planner, config, clock, off, requests)
        await door.start()
        target = GrpcTarget(f"127.0.0.1:{door.port}")
        try:
            facts = await target.open()
            # Two turns: 40 tokens in and 24 out, then 40 more behind both.
            lengths = LengthDistribution.from_sample([40]), LengthDistribution.from_sample([24])
            drawn = DrawnRequests(*lengths, num_requests=6, turns=2)
            schedule = make_schedule(
                list(drawn.draw(1)), ArrivalPlan(USERS, num_users=3), warm_up=1, max_model_len=facts.max_model_len
            )
            assert facts.vocab_size is not None
            wording, warm = (TokenWording(facts.vocab_size, seed) for seed in (1, 2))
            result = await run_load(schedule, target, wording, warm, clock)
        finally:
            await target.close()
            await door.stop(0)
        await cluster.check_integrity()

    assert [record.error for record in result.records] == [None] * 6
    assert {record.counted_by for record in result.records} == {TOKEN_IDS}
    assert [(record.prompt_tokens, record.output_tokens) for record in result.records] == [(40, 24), (104, 24)] * 3
    for first, second in zip(result.records[::2], result.records[1::2], strict=True):
        assert (first.cached_tokens, second.cached_tokens) == (0, 40 // PAGE * PAGE)
        # The first prompt and all but the last token of its answer fill three pages of the decode worker.
        assert second.timing is not None
        assert second.timing["decode_cached_tokens"] == (40 + 24 - 1) // PAGE * PAGE
        assert second.sent_at >= first.sent_at + first.ended_s
    found = summary(result.records, Slos({"ttft": 100.0, "tpot": 100.0}))
    assert (found["num_good"], found["errors"]) == (6, {})
