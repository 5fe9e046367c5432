"""A model that is divided among processes, real ones over gloo, gives the tokens of the model itself.

Whole services: prefill and decode workers of 1 and 2 ranks, K/V between each pair of ranks that share heads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import psutil
import pytest

from cluster.worker_host import EXIT_ENGINE_DIED
from core.errors import NoRoute, SequenceFailed
from core.request import OutputChunk, SamplingParams, WorkerId
from engine.config import EngineConfig
from tests.cluster.live_cluster import ROUTER, LiveCluster, live_cluster
from tests.cluster.reference import ReferenceModel

pytestmark = pytest.mark.timeout(300)

NUM_NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
ENGINE = EngineConfig(
    device="cpu",
    dtype="float32",
    page_size=16,
    num_pages=256,
    max_prefill_chunk=23,
    max_batch_tokens=64,
    max_batch_size=16,
    threads=1,
)


def kill_ranks(cluster: LiveCluster, worker_id: str) -> None:
    """Kill every rank of a worker but the first, whose children they are."""
    ranks = psutil.Process(cluster.processes[WorkerId(worker_id)].process.pid).children()
    assert len(ranks) == 1
    ranks[0].kill()


async def read_to_the_end(stream: AsyncIterator[OutputChunk]) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize(
    ("family", "num_ranks"), [("llama", (1, 2)), ("llama", (2, 1)), ("llama", (2, 2)), ("qwen3_moe", (2, 2))]
)
async def test_tokens_over_unequal_ranks_are_the_models_own(
    family: str, num_ranks: tuple[int, int], tiny_model: ReferenceModel
) -> None:
    prompts = tiny_model.prompts
    ahead = replace(ENGINE, plan_ahead="always", decode_graphs="always")  # tokens go from rank to rank, too
    async with live_cluster(
        str(tiny_model.folder),
        engine=ENGINE,
        decode_engine=ahead,
        processes=True,
        num_ranks=num_ranks,
        self_test=True,
    ) as cluster:
        assert await cluster.membership.wait_until(lambda view: all(link.probe for link in view.links.values()), 30.0)
        assert all(link.usable and link.probe.exact for link in cluster.membership.view().links.values())
        answers = await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.tokens == tiny_model.expected(prompt, NUM_NEW), len(prompt)
            assert answer.timing.prefill_worker == "prefill-0"
        again = await cluster.generate(prompts[-1], GREEDY)
        assert again.tokens == tiny_model.expected(prompts[-1], NUM_NEW)
        assert again.timing.cached_tokens == (len(prompts[-1]) - 1) // ENGINE.page_size * ENGINE.page_size
        assert await cluster.pools_whole()


async def test_a_killed_rank_of_a_decode_worker_ends_in_a_typed_error_and_every_page_comes_back(
    tiny_models: Callable[[str], ReferenceModel],
) -> None:
    model = tiny_models("llama")
    endless = replace(GREEDY, max_tokens=150)
    once = replace(ROUTER, no_route_wait_s=0.5, max_attempts=1)
    async with live_cluster(str(model.folder), engine=ENGINE, processes=True, num_ranks=(1, 2), router=once) as cluster:
        streams = [cluster.stream(prompt, endless) for prompt in model.prompts]
        await asyncio.gather(*(anext(stream) for stream in streams))
        kill_ranks(cluster, "decode-0")
        for stream in streams:
            with pytest.raises((SequenceFailed, NoRoute)):
                await asyncio.wait_for(read_to_the_end(stream), 20)
        decode = cluster.processes[WorkerId("decode-0")]
        await asyncio.to_thread(decode.process.join, 20)
        assert decode.process.exitcode == EXIT_ENGINE_DIED
        assert await cluster.membership.wait_until(lambda view: len(view.workers) == 1, 20.0)
        assert await cluster.pools_whole()


async def test_prompts_go_on_elsewhere_when_a_rank_of_their_prefill_worker_is_killed(
    tiny_models: Callable[[str], ReferenceModel],
) -> None:
    """The decode worker gets back what it granted, and prefills by itself."""
    model = tiny_models("llama")
    async with live_cluster(str(model.folder), engine=ENGINE, processes=True, num_ranks=(2, 1)) as cluster:
        streams = [cluster.generate(prompt, GREEDY) for prompt in model.prompts * 3]
        running = asyncio.gather(*streams)
        await asyncio.sleep(0.1)
        kill_ranks(cluster, "prefill-0")
        for prompt, answer in zip(model.prompts * 3, await running, strict=True):
            assert answer.tokens == model.expected(prompt, NUM_NEW)
        prefill = cluster.processes[WorkerId("prefill-0")]
        await asyncio.to_thread(prefill.process.join, 20)
        assert prefill.process.exitcode == EXIT_ENGINE_DIED
        assert await cluster.membership.wait_until(lambda view: len(view.workers) == 1, 20.0)
        assert await cluster.pools_whole()
