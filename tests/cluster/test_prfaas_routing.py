"""PrfaaS routing on real workers: tokens do not depend on it, and what it predicts by is learnt from what they do."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.view import ClusterView
from core.request import Role, SamplingParams
from tests.cluster.live_cluster import ROUTER, live_cluster
from tests.cluster.reference import ReferenceModel
from tests.cluster.test_service_behaviour import ENGINE

pytestmark = [pytest.mark.timeout(120), pytest.mark.parametrize("family", ["llama"])]

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


async def test_tokens_do_not_depend_on_who_prefills(family: str, tiny_model: ReferenceModel) -> None:
    prompts = tiny_model.prompts
    answers = {}
    for colocate in ("never", "always"):
        router = replace(ROUTER, colocate=colocate)
        async with live_cluster(
            str(tiny_model.folder), engine=ENGINE, num_prefill=2, policy="prfaas", router=router
        ) as cluster:
            answers[colocate] = await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in prompts))
            await cluster.check_integrity()
    apart, together = answers["never"], answers["always"]
    assert [answer.tokens for answer in apart] == [answer.tokens for answer in together]
    assert all(answer.timing.prefill_worker and not answer.timing.fallback for answer in apart)
    assert not any(answer.timing.prefill_worker or answer.timing.fallback for answer in together)


async def test_costs_are_learnt_and_forecasts_stand_beside_what_came_of_them(
    family: str, tiny_model: ReferenceModel
) -> None:
    router = replace(ROUTER, colocate="never")

    def learnt(view: ClusterView) -> bool:
        (cost,) = view.costs.profiles.values()
        return cost.prefill_cost.samples > 0 and cost.decode_cost.samples > 0

    async with live_cluster(str(tiny_model.folder), engine=ENGINE, policy="prfaas", router=router) as cluster:
        before = cluster.membership.view()
        assert len({worker.profile for worker in before.workers}) == 1, "workers alike share their costs"
        assert not learnt(before), "the roofline"
        for prompt in tiny_model.prompts:
            await cluster.generate(prompt, GREEDY, salt=b"first")
        assert await cluster.membership.wait_until(learnt, 10.0)
        answer = await cluster.generate(tiny_model.prompts[-1], GREEDY, salt=b"second")
        (decode,) = cluster.membership.view().ready(Role.DECODE)

    timing = answer.timing
    assert timing.expected_bytes_shipped == len(tiny_model.prompts[-1]) * decode.model.kv_bytes_per_token
    assert timing.bytes_shipped >= timing.expected_bytes_shipped, "whole pages travel"
    assert timing.expected_ttft_s is not None
    assert timing.expected_tpot_s is not None
    assert 0 < timing.expected_ttft_s < 60
    assert 0 < timing.expected_tpot_s < 60
