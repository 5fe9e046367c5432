"""Conversations on the real service: the next turn reuses what any worker computed or wrote, through page pulls.

Each turn's prompt is the last turn's prompt, its answer and a few new tokens. Whatever was pulled from wherever, tokens
must be those of ``transformers.generate`` on the whole prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from cluster.config import TlsConfig
from cluster.routing_policy import RoundRobin
from cluster.view import ClusterView
from core.prefix_hash import page_hashes
from core.request import PullOutcome, SamplingParams, WorkerId
from engine.config import EngineConfig
from kv_transfer.config import KvTransferConfig
from tests.cluster.live_cluster import LiveCluster, live_cluster
from tests.cluster.reference import ReferenceModel
from tests.pulling_policy import PullFromTheBest

pytestmark = [pytest.mark.timeout(120), pytest.mark.parametrize("family", ["llama"])]

PAGE_SIZE = 16
NUM_NEW = 30
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
ENGINE = EngineConfig(
    dtype="float32",
    page_size=PAGE_SIZE,
    num_pages=128,
    max_prefill_chunk=32,
    max_batch_tokens=64,
    max_batch_size=8,
    threads=1,
)


def transfer(transport: str) -> KvTransferConfig:
    return KvTransferConfig(transport=transport, host="127.0.0.1", staging_mib=1)


def num_cached(num_tokens: int) -> int:
    """Tokens of full pages of a prompt, its last token aside; or of a conversation, whose last token has no K/V."""
    return (num_tokens - 1) // PAGE_SIZE * PAGE_SIZE


async def known(cluster: LiveCluster, worker_id: str, tokens: Sequence[int]) -> None:
    """Wait until the gateway knows that the worker caches all of the tokens' pages that can be."""
    names = page_hashes(tokens[:-1], PAGE_SIZE)

    def enough(view: ClusterView) -> bool:
        match = cluster.membership.match_prefix(names)
        return any(w.worker_id == worker_id and match.pages_on(w.engine_id) == len(names) for w in view.workers)

    assert await cluster.membership.wait_until(enough, 10.0)


def outcomes(cluster: LiveCluster, worker_id: str) -> dict[str, int]:
    """How the pulls of that worker ended, as its Watch stream tells gateways."""
    (worker,) = (w for w in cluster.membership.view().workers if w.worker_id == worker_id)
    return dict(worker.load.pulls)


@pytest.mark.parametrize(("transport", "tls"), [("local", "off"), ("tcp", "off"), ("tcp", "on"), ("nixl", "off")])
async def test_the_next_turn_reuses_what_decoding_wrote(
    family: str, tiny_model: ReferenceModel, transport: str, tls: str
) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl", reason="pip install 'prfaas[nixl]'")
    prompt = tiny_model.prompts[-1]  # 100 tokens
    policy = PullFromTheBest()
    async with live_cluster(
        str(tiny_model.folder),
        engine=ENGINE,
        kv_transfer=transfer(transport),
        policy=policy,
        tls=TlsConfig(mode=tls),
    ) as cluster:
        before = 0  # tokens of the conversation so far
        page_bytes = 0
        for turn in range(3):
            answer = await cluster.generate(prompt, GREEDY)
            timing = answer.timing
            assert answer.tokens == tiny_model.expected(prompt, NUM_NEW), turn
            assert (timing.prefill_worker, timing.decode_worker) == ("prefill-0", "decode-0")
            assert timing.cached_tokens == timing.decode_cached_tokens == (num_cached(before) if before else 0)
            num_pages = -(-len(prompt) // PAGE_SIZE)
            if turn == 0:
                page_bytes = timing.bytes_shipped // num_pages
                assert (timing.pull_outcome, timing.pulled_tokens, timing.bytes_pulled) == ("", 0, 0)
            else:
                written = num_cached(before) - (before - NUM_NEW) // PAGE_SIZE * PAGE_SIZE
                assert written >= PAGE_SIZE, "the prefill worker cannot have computed them"
                assert (timing.pull_outcome, timing.pulled_tokens) == ("pulled", written)
                assert timing.bytes_pulled == written // PAGE_SIZE * page_bytes
                assert timing.pull_s > 0
            missing = num_pages - timing.decode_cached_tokens // PAGE_SIZE
            assert timing.bytes_shipped == missing * page_bytes, "only what is new to the decode worker travels"
            conversation = (*prompt, *answer.tokens)
            before = len(conversation)
            await known(cluster, "decode-0", conversation)
            prompt = (*conversation, 3, 1, 4, 1, 5)
        await cluster.check_integrity()
        assert outcomes(cluster, "prefill-0") == {"pulled": 2}


@pytest.mark.parametrize("transport", ["local", "tcp"])
async def test_a_prefix_is_pulled_from_the_prefill_worker_that_computed_it(
    family: str, tiny_model: ReferenceModel, transport: str
) -> None:
    """Turns alternate between two prefill workers, which may pull from each other and not from the decode worker."""
    prompt = tiny_model.prompts[-1]
    prefills = frozenset({"prefill-0", "prefill-1"})
    async with live_cluster(
        str(tiny_model.folder),
        engine=ENGINE,
        num_prefill=2,
        kv_transfer=transfer(transport),
        policy=PullFromTheBest(RoundRobin(), prefills),
        self_test=True,
    ) as cluster:
        await cluster.membership.wait_until(lambda view: all(link.usable for link in view.links.values()), 30.0)
        for turn in range(3):
            answer = await cluster.generate(prompt, GREEDY)
            assert answer.tokens == tiny_model.expected(prompt, NUM_NEW), turn
            assert answer.timing.prefill_worker == f"prefill-{turn % 2}"
            computed = num_cached(len(prompt) - 20) if turn else 0  # by the other one
            assert answer.timing.cached_tokens == computed
            assert (answer.timing.pull_outcome == "pulled") is (turn > 0)
            await known(cluster, f"prefill-{turn % 2}", prompt)
            prompt = (*prompt, *range(turn, turn + 20))
        await cluster.check_integrity()
        carried = [pair for pair, link in cluster.membership.view().links.items() if link.estimate is not None]
        assert ("prefill-0", "prefill-1") in carried
        assert all(link.usable for link in cluster.membership.view().links.values())


async def test_a_decode_worker_that_prefills_pulls_from_another_one(family: str, tiny_model: ReferenceModel) -> None:
    prompt = tiny_model.prompts[-1]
    async with live_cluster(
        str(tiny_model.folder),
        engine=ENGINE,
        num_prefill=0,
        num_decode=2,
        kv_transfer=transfer("tcp"),
        policy=PullFromTheBest(RoundRobin()),
    ) as cluster:
        first = await cluster.generate(prompt, GREEDY)
        conversation = (*prompt, *first.tokens)
        await known(cluster, "decode-0", conversation)
        turn = (*conversation, 3, 1, 4)
        second = await cluster.generate(turn, GREEDY)
        assert second.tokens == tiny_model.expected(turn, NUM_NEW)
        assert (first.timing.decode_worker, second.timing.decode_worker) == ("decode-0", "decode-1")
        assert second.timing.cached_tokens == second.timing.pulled_tokens == num_cached(len(conversation))
        assert second.timing.pull_outcome == "pulled"
        await cluster.check_integrity()


async def test_a_pull_that_does_not_come_costs_the_request_nothing_but_time(
    family: str, tiny_model: ReferenceModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The source never sends; then it does not listen; then its transport is another one: each is computed here."""
    prompt = tiny_model.prompts[-1]
    kv_transfer = replace(transfer("tcp"), pull_timeout_s=0.3)
    async with live_cluster(
        str(tiny_model.folder),
        engine=ENGINE,
        kv_transfer=kv_transfer,
        policy=PullFromTheBest(sources=frozenset({"decode-0"})),
    ) as cluster:
        answer = await cluster.generate(prompt, GREEDY)
        conversation = (*prompt, *answer.tokens)
        await known(cluster, "decode-0", conversation)
        source = _source(cluster, "decode-0")

        async def hang(*arguments: Any) -> Any:
            await asyncio.Event().wait()

        source.push = hang
        turn = (*conversation, 3, 1, 4)
        slow = await cluster.generate(turn, GREEDY)
        again = await cluster.generate((*turn, 1), GREEDY)

        assert slow.tokens == tiny_model.expected(turn, NUM_NEW)
        assert again.tokens == tiny_model.expected((*turn, 1), NUM_NEW)
        assert (slow.timing.pull_outcome, slow.timing.pulled_tokens) == ("timeout", 0)
        assert slow.timing.pull_s >= 0.3
        assert "timeout after" in caplog.text
        await cluster.check_integrity()
        told = outcomes(cluster, "prefill-0")
        assert told[PullOutcome.TIMEOUT] == 1, "which gateways are told"


async def test_a_client_that_leaves_during_a_pull_leaves_nothing_behind(
    family: str, tiny_model: ReferenceModel
) -> None:
    prompt = tiny_model.prompts[-1]
    async with live_cluster(
        str(tiny_model.folder), engine=ENGINE, kv_transfer=transfer("tcp"), policy=PullFromTheBest()
    ) as cluster:
        answer = await cluster.generate(prompt, GREEDY)
        conversation = (*prompt, *answer.tokens)
        await known(cluster, "decode-0", conversation)
        source = _source(cluster, "decode-0")
        push, pushing = source.push, asyncio.Event()
        loop = asyncio.get_running_loop()

        async def hang(*arguments: Any) -> Any:
            loop.call_soon_threadsafe(pushing.set)
            await asyncio.Event().wait()

        source.push = hang
        leaving = asyncio.create_task(cluster.generate((*conversation, 3), GREEDY))
        await asyncio.wait_for(pushing.wait(), 10.0)
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await leaving
        await cluster.check_integrity()
        source.push = push
        turn = (*conversation, 3, 1)
        after = await cluster.generate(turn, GREEDY)

        assert after.tokens == tiny_model.expected(turn, NUM_NEW)
        assert after.timing.pull_outcome == "pulled"
        await cluster.check_integrity()
        assert outcomes(cluster, "prefill-0") == {"aborted": 1, "pulled": 1}


def _source(cluster: LiveCluster, worker_id: str) -> Any:
    return cluster.hosts[WorkerId(worker_id)]._started.sending.source
