"""The strongest claim: tokens through a prefill worker, the wire and a decode worker are those of the model itself.

Expected tokens come from ``transformers.generate`` on the same float32 weights (tests/tiny_models.py); the monolithic
engine is held to the same expectation in tests/unit/engine/test_token_equality.py.
"""

from __future__ import annotations

import asyncio

import pytest

from core.request import SamplingParams
from engine.config import EngineConfig
from kv_transfer.config import KvTransferConfig
from tests.cluster.live_cluster import live_cluster
from tests.cluster.reference import ReferenceModel
from tests.tiny_models import FAMILIES

pytestmark = pytest.mark.timeout(300)

NUM_NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)

# page size, most tokens of one prompt in one step: chunks that split pages, and pages longer than chunks
SHAPES = [(1, 7), (16, 5), (16, None), (64, 23)]


# Page size of the prefill worker, of the decode worker, most tokens of one prompt in one step.
UNEQUAL = [(16, 64, 23), (64, 16, None), (7, 5, 11), (1, 48, 40)]


def engine_config(page_size: int, chunk: int | None, num_tokens: int = 4096) -> EngineConfig:
    return EngineConfig(
        dtype="float32",
        page_size=page_size,
        num_pages=-(-num_tokens // page_size),
        max_prefill_chunk=chunk,
        max_batch_tokens=64,
        max_batch_size=16,
        threads=1,
    )


@pytest.mark.parametrize("transport", ["tcp", "local"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family_gives_the_models_own_tokens(
    family: str, transport: str, tiny_model: ReferenceModel
) -> None:
    """One and eight requests at once, cache miss then cache hit, for each page size and chunk size."""
    prompts = tiny_model.prompts
    kv_transfer = KvTransferConfig(transport=transport)
    for page_size, chunk in SHAPES:
        engine = engine_config(page_size, chunk)
        async with live_cluster(str(tiny_model.folder), engine=engine, kv_transfer=kv_transfer) as cluster:
            alone = await cluster.generate(prompts[0], GREEDY)
            assert alone.tokens == tiny_model.expected(prompts[0], NUM_NEW)
            answers = await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in prompts))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.tokens == tiny_model.expected(prompt, NUM_NEW), (family, page_size, chunk, len(prompt))
                assert answer.timing.prefill_worker == "prefill-0"
                assert answer.timing.decode_worker == "decode-0"
            again = await cluster.generate(prompts[-1], GREEDY)
            assert again.tokens == tiny_model.expected(prompts[-1], NUM_NEW)
            assert again.timing.cached_tokens == (len(prompts[-1]) - 1) // page_size * page_size
            await cluster.check_integrity()


@pytest.mark.parametrize("family", ["gemma3", "deepseek_v3"])
async def test_pages_of_another_size_at_each_end_give_the_models_own_tokens(
    family: str, tiny_model: ReferenceModel
) -> None:
    """Cache miss, then hits: on the decode worker of pages of its own size, which the prefill worker skips."""
    prompts = tiny_model.prompts
    for prefill_pages, decode_pages, chunk in UNEQUAL:
        prefill, decode = engine_config(prefill_pages, chunk), engine_config(decode_pages, None)
        async with live_cluster(str(tiny_model.folder), engine=prefill, decode_engine=decode) as cluster:
            answers = await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in prompts))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.tokens == tiny_model.expected(prompt, NUM_NEW), (prefill_pages, decode_pages, len(prompt))
                assert answer.timing.prefill_worker == "prefill-0"
            again = await cluster.generate(prompts[-1], GREEDY)
            assert again.tokens == tiny_model.expected(prompts[-1], NUM_NEW)
            num_tokens = len(prompts[-1])
            bytes_per_token = answers[-1].timing.bytes_shipped // num_tokens
            assert again.timing.bytes_shipped == bytes_per_token * (num_tokens % decode_pages)
            await cluster.check_integrity()


@pytest.mark.parametrize("family", ["llama"])
async def test_nixl_gives_the_models_own_tokens(family: str, tiny_model: ReferenceModel) -> None:
    pytest.importorskip("nixl", reason="pip install 'prfaas[nixl]'")
    prompts = tiny_model.prompts
    kv_transfer = KvTransferConfig(transport="nixl", staging_mib=1)
    engine = engine_config(page_size=16, chunk=5)
    async with live_cluster(str(tiny_model.folder), engine=engine, kv_transfer=kv_transfer) as cluster:
        for _ in ("miss", "hit"):
            answers = await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in prompts))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.tokens == tiny_model.expected(prompt, NUM_NEW), len(prompt)
                assert answer.timing.decode_worker == "decode-0"
        await cluster.check_integrity()
