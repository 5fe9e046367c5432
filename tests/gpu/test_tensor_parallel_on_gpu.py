"""Workers of two GPUs hand over to workers of one, and the other way round, with the tokens of the model itself.

Real worker processes over NCCL, K/V from pools in device memory over TCP. Skipped with fewer than two GPUs.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from pathlib import Path

import pytest
import torch

from core.request import SamplingParams
from engine.config import EngineConfig
from tests.cluster import live_cluster
from tests.cluster.reference import ReferenceModel, make_prompts
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here"),
    pytest.mark.timeout(300),
]

NUM_NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
ENGINE = EngineConfig(device="cuda", dtype="float32", num_pages=256, max_batch_tokens=64, max_batch_size=8)


@pytest.mark.parametrize("num_ranks", [(2, 1), (1, 2), (2, 2)], ids=str)
async def test_tokens_over_unequal_ranks_are_the_models_own(
    num_ranks: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All workers see both GPUs, and their first ranks share one."""
    monkeypatch.setattr(live_cluster, "_PREPARED", multiprocessing.get_context("spawn"))  # CUDA cannot be forked
    model = ReferenceModel(save_tiny_model("llama", tmp_path / "llama"), make_prompts(VOCAB_SIZE))
    async with live_cluster.live_cluster(
        str(model.folder), engine=ENGINE, processes=True, num_ranks=num_ranks, self_test=True
    ) as cluster:
        assert await cluster.membership.wait_until(lambda view: all(link.probe for link in view.links.values()), 60.0)
        assert all(link.usable for link in cluster.membership.view().links.values())
        answers = await asyncio.gather(*(cluster.generate(prompt, GREEDY) for prompt in model.prompts))
        for prompt, answer in zip(model.prompts, answers, strict=True):
            assert answer.tokens == model.expected(prompt, NUM_NEW), len(prompt)
            assert answer.timing.prefill_worker == "prefill-0"
        assert await cluster.pools_whole()
