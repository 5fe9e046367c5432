"""What a dead worker costs: time, never a token.

Real processes and SIGKILL, no Ray (tests/cluster/test_ray_fleet.py holds that Ray restarts them).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal

import pytest

from core.request import OutputChunk, Role, SamplingParams, WorkerId
from engine.config import EngineConfig
from tests.cluster.live_cluster import Answer, LiveCluster, live_cluster
from tests.cluster.reference import ReferenceModel

pytestmark = pytest.mark.timeout(300)

NUM_NEW = 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
# Small steps: the prompts of eight requests take many, so that a kill lands in the middle of them.
SLOW = EngineConfig(
    dtype="float32", page_size=16, num_pages=512, max_prefill_chunk=8, max_batch_tokens=16, max_batch_size=8, threads=1
)


async def run_all(cluster: LiveCluster, prompts: list[list[int]], started: asyncio.Event) -> list[Answer]:
    """Every prompt at once; ``started`` is set when the first token of any has arrived."""

    async def run(prompt: list[int]) -> Answer:
        answer = Answer()
        async for chunk in cluster.stream(prompt, GREEDY):
            answer.take(chunk)
            if chunk.token_ids:
                started.set()
        return answer

    return list(await asyncio.gather(*(run(prompt) for prompt in prompts)))


async def kill_under_load(cluster: LiveCluster, model: ReferenceModel, victim: str, signum: int) -> list[Answer]:
    prompts = [list(prompt) for prompt in (*model.prompts, *model.prompts)][:8]
    started = asyncio.Event()
    running = asyncio.create_task(run_all(cluster, prompts, started))
    await started.wait()
    cluster.processes[WorkerId(victim)].kill(signum)
    answers = await running
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == model.expected(tuple(prompt), NUM_NEW)
    return answers


@pytest.mark.parametrize("family", ["llama"])
async def test_sigkill_of_either_worker_loses_no_request_and_changes_no_token(
    family: str, tiny_model: ReferenceModel
) -> None:
    async with live_cluster(
        str(tiny_model.folder), engine=SLOW, num_prefill=2, num_decode=2, processes=True, policy="round_robin"
    ) as cluster:
        answers = await kill_under_load(cluster, tiny_model, "prefill-0", signal.SIGKILL)
        assert max(answer.timing.num_attempts for answer in answers) > 1, "the kill came too late to matter"
        assert await cluster.pools_whole()
        assert [w.worker_id for w in cluster.membership.view().ready(Role.PREFILL)] == ["prefill-1"]

        answers = await kill_under_load(cluster, tiny_model, "decode-0", signal.SIGKILL)
        assert max(answer.timing.num_attempts for answer in answers) > 1, "the kill came too late to matter"
        assert await cluster.pools_whole()
        assert cluster.router.counters.num_resumes > 0


@pytest.mark.parametrize("family", ["llama"])
async def test_a_stopped_worker_is_out_when_its_lease_ends_and_its_requests_go_on_elsewhere(
    family: str, tiny_model: ReferenceModel
) -> None:
    async with live_cluster(
        str(tiny_model.folder), engine=SLOW, num_decode=2, processes=True, policy="round_robin"
    ) as cluster:
        await kill_under_load(cluster, tiny_model, "decode-1", signal.SIGSTOP)
        assert [w.worker_id for w in cluster.membership.view().ready(Role.DECODE)] == ["decode-0"]
        assert await cluster.pools_whole(timeout_s=45.0)  # the prefill worker waits for the silent peer's KV lease
        cluster.processes[WorkerId("decode-1")].kill(signal.SIGKILL)


@pytest.mark.parametrize("family", ["llama"])
async def test_clients_that_disconnect_free_both_pools_within_a_second(family: str, tiny_model: ReferenceModel) -> None:
    endless = SamplingParams(temperature=0.0, max_tokens=100_000 // 256, ignore_eos=True)
    async with live_cluster(str(tiny_model.folder), engine=SLOW) as cluster:
        for num_chunks in (0, 1, 4):  # before the first token, at it, and while decoding

            async def read_some(prompt: tuple[int, ...], num_chunks: int = num_chunks) -> None:
                stream = cluster.stream(prompt, endless)
                async with contextlib.aclosing(stream):
                    if num_chunks == 0:
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(_next(stream), 0.01)
                        return
                    for _ in range(num_chunks):
                        await anext(stream)

            await asyncio.gather(*(read_some(prompt) for prompt in tiny_model.prompts))
            async with asyncio.timeout(1.0):
                while not await _all_whole(cluster):
                    await asyncio.sleep(0.01)
        await cluster.check_integrity()


async def _next(stream: contextlib.AbstractAsyncContextManager[object] | object) -> OutputChunk:
    return await anext(stream)  # type: ignore[call-overload,no-any-return]


async def _all_whole(cluster: LiveCluster) -> bool:
    loads = await asyncio.gather(
        *(asyncio.wrap_future(host.engine.submit(lambda engine: engine.load())) for host in cluster.hosts.values())
    )
    return all(load.pages_free == load.pages_total and not load.num_running + load.num_waiting for load in loads)
