"""Where the time to the first and to the second token went: parts from three processes add up to what a client sees."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median

import pytest

from core.clock import WallClock
from core.request import OutputChunk, RequestTiming, SamplingParams
from engine.config import EngineConfig
from tests.cluster.live_cluster import LiveCluster, live_cluster
from tests.cluster.reference import ReferenceModel

pytestmark = [pytest.mark.timeout(150), pytest.mark.parametrize("family", ["llama"])]

# The parts of every request add up to its time exactly. What a client of this process measures is as much, give or take
# the moment between a chunk's arrival and the client's turn, in which a busy machine may run somebody else.
USUAL_S, MOST_S = 0.005, 0.5
ENGINE = EngineConfig(
    dtype="float32",
    page_size=16,
    num_pages=256,
    max_prefill_chunk=16,
    max_batch_tokens=64,
    max_batch_size=4,  # fewer than there are requests: some wait in a worker's queue
    threads=1,
)


@dataclass
class Seen:
    """One continuation as its client measures it."""

    timing: RequestTiming
    ttft_s: float
    ttst_s: float | None


async def measured(cluster: LiveCluster, prompt: Sequence[int], n: int = 1, num_new: int = 4) -> list[Seen]:
    """Run a request, with a clock of our own in hand."""
    clock = WallClock()
    sampling = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True, n=n)
    arrived_at = clock.now()
    came: dict[int, list[float]] = {index: [] for index in range(n)}
    last: dict[int, OutputChunk] = {}
    async for chunk in cluster.stream(prompt, sampling):
        now = clock.now()
        came[chunk.index] += [now] * len(chunk.token_ids)
        last[chunk.index] = chunk
    seen = []
    for index, times in came.items():
        timing = last[index].timing
        assert timing is not None
        seen.append(Seen(timing, times[0] - arrived_at, times[1] - times[0] if len(times) > 1 else None))
    return seen


def check(one: Seen) -> None:
    """Parts add up, none is negative, and what cannot be without a duration has one."""
    timing = one.timing
    parts = timing.ttft_parts
    assert parts is not None
    assert abs(parts.total_s - timing.ttft_s) < 1e-6
    assert abs(parts.total_s - one.ttft_s) < MOST_S, (parts, one.ttft_s)
    assert all(getattr(parts, field.name) >= 0 for field in fields(parts)), parts
    assert parts.prefill_s > 0
    assert parts.messages_s > 0, "another process was asked, and answered"
    assert (timing.ttst_parts is None) == (one.ttst_s is None)
    if timing.ttst_parts is not None:
        assert one.ttst_s is not None
        assert abs(timing.ttst_parts.total_s - one.ttst_s) < MOST_S, (timing.ttst_parts, one.ttst_s)
        assert all(getattr(timing.ttst_parts, f.name) >= 0 for f in fields(timing.ttst_parts)), timing.ttst_parts


async def test_parts_of_every_request_add_up(family: str, tiny_model: ReferenceModel) -> None:
    """Disaggregated, one token only, n > 1 and more at once than the workers take; every process is a real one."""
    prompts = [prompt for prompt in tiny_model.prompts if len(prompt) > 16]
    async with live_cluster(str(tiny_model.folder), engine=ENGINE, processes=True) as cluster:
        alone = await measured(cluster, prompts[-1])
        single = await measured(cluster, prompts[0], num_new=1)
        siblings = await measured(cluster, prompts[1], n=3)
        crowd = await asyncio.gather(*(measured(cluster, [*prompt, i]) for i in range(6) for prompt in prompts))
    every = [*alone, *single, *siblings, *(one for seen in crowd for one in seen)]
    for one in every:
        check(one)
    ttfts = [(parts.total_s, one.ttft_s) for one in every if (parts := one.timing.ttft_parts) is not None]
    ttsts = [
        (parts.total_s, one.ttst_s)
        for one in every
        if (parts := one.timing.ttst_parts) is not None and one.ttst_s is not None
    ]
    for told in (ttfts, ttsts):
        assert median(abs(sum_s - measured_s) for sum_s, measured_s in told) < USUAL_S
    assert single[0].timing.ttst_parts is None
    shipped = [parts for one in every if (parts := one.timing.ttst_parts) is not None]
    assert any(parts.first_step_s > 0 for parts in shipped)
    assert any(parts.decode_queue_s + parts.transfer_s + parts.transfer_wait_s > 0 for parts in shipped)
    waited = [parts.siblings_s for one in siblings if (parts := one.timing.ttft_parts) is not None]
    assert waited[0] == 0
    assert min(waited[1:]) > 0, "they wait for the first one's first token"


async def test_parts_of_what_a_decode_worker_prefills_add_up(family: str, tiny_model: ReferenceModel) -> None:
    async with live_cluster(str(tiny_model.folder), engine=ENGINE, num_prefill=0, processes=True) as cluster:
        (one,) = await measured(cluster, tiny_model.prompts[-1])
    check(one)
    parts = one.timing.ttst_parts
    assert parts is not None
    assert parts.first_step_s == pytest.approx(parts.total_s), "nothing is handed over"


async def test_a_worker_that_is_lost_before_the_first_token_is_a_part_of_its_time(
    family: str, tiny_model: ReferenceModel
) -> None:
    async with live_cluster(str(tiny_model.folder), engine=ENGINE, num_prefill=2, processes=True) as cluster:
        view = cluster.membership.view()
        for worker in list(cluster.processes.values()):
            if worker.config.worker_id == "prefill-0":
                worker.kill()  # the gateway does not know it yet
        seen = [one for i in range(4) for one in await measured(cluster, [*tiny_model.prompts[-1], i])]
    assert len(view.workers) == 3
    for one in seen:
        check(one)
    again = [one for one in seen if one.timing.num_attempts > 1]
    assert again, "one of them was sent to the worker that is gone"
    assert all(parts.retries_s > 0 for one in again if (parts := one.timing.ttft_parts) is not None)
