"""Pages go to pinned memory and back unchanged, whatever the model computes meanwhile, and tokens stay the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from core.cache_tiers import Tier
from core.clock import WallClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine import host_pages
from engine.cache_layout import CacheLayout, LayerCache
from engine.config import EngineConfig
from engine.engine import Engine
from engine.host_pages import HostPages
from engine.page_pool import PagePool
from engine.reload_choice import PrefillCost
from engine.reload_costs import ReloadCosts
from tests.tiny_engine import draw_prompts, greedy_tokens
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pages_come_back_as_they_were_behind_kernels_that_write_them(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_pages, "STAGING_BYTES", 1 << 20)  # many turns of the two buffers
    layers = tuple(LayerCache(i, 8, 128, 128 if i else 64, dtype) for i in range(4))
    pool = PagePool(CacheLayout(layers, 16), 96, "cuda")
    host = HostPages(pool, 64)
    assert host.pinned
    draw = random.Random(dtype)
    pages, slots = draw.sample(range(96), 50), draw.sample(range(64), 50)
    expected = []
    for index in range(4):
        memory = pool.pages(index)
        scratch = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            scratch = scratch @ scratch / 4096  # keeps the stream busy: what follows has not run when it is saved
        memory.copy_(torch.randn_like(memory, dtype=torch.float32))
        expected.append(memory[pages])
    host.save(pages, slots, host.mark())
    for index in range(4):
        pool.pages(index).zero_()
    other = draw.sample(range(96), 50)
    host.load(slots, other, host.mark())
    for index in range(4):
        assert torch.equal(pool.pages(index)[other], expected[index])
        untouched = [page for page in range(96) if page not in other]
        assert not pool.pages(index)[untouched].any()
    host.close()


def test_tokens_are_the_same_from_every_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReloadCosts, "prefill", property(lambda self: PrefillCost(1.0, 1.0, 0.0, 64)))
    folder = save_tiny_model("llama", tmp_path / "model")
    prompts = draw_prompts(5, (50,) * 6)
    expected = [tuple(tokens) for tokens in greedy_tokens(folder, prompts, 8)]
    config = EngineConfig(
        device="cuda",
        dtype="float32",
        page_size=4,
        num_pages=48,
        attention="sdpa",
        compile="never",
        host_cache_bytes=1 << 20,
        disk_cache_bytes=1 << 24,
        disk_cache_dir=str(tmp_path / "pages"),
    )
    for restart in range(2):
        engine = Engine.load_model(config, str(folder), WallClock())
        for turn in range(3):
            got: dict[str, tuple[int, ...]] = {f"{restart}/{turn}/{i}": () for i in range(6)}
            for name, prompt in zip(got, prompts, strict=True):
                engine.add(SequenceSpec(SequenceId(name), tuple(prompt), SamplingParams(max_tokens=8, temperature=0.0)))
            while any(len(tokens) < 8 for tokens in got.values()):
                if not engine.has_work:
                    assert engine.wait_for_copies()
                output = engine.step()
                assert not output.failures
                for chunk in output.chunks:
                    got[chunk.sequence_id] += chunk.token_ids
            assert list(got.values()) == expected
        while engine.wait_for_copies() and engine.has_work:
            engine.step()
        engine.check_integrity()
        loaded = {state.tier: state.loaded_tokens for state in engine.load().tiers}
        assert loaded[Tier.HOST] > 0
        assert restart == 0 or loaded[Tier.DISK] > 0
        engine.close()
